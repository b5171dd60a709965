"""Distillation of logits: a teacher's likeliest tokens as soft targets (Hinton et al., 2015)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from deepseek_jax import sharding
from deepseek_jax.config import Precision
from deepseek_jax.model.transformer import DeepSeekV3, logical_axes
from deepseek_jax.train.losses import (
    LossParts,
    Totals,
    head,
    hidden_states,
    next_token_loss,
    rows_at_once,
)
from deepseek_jax.train.run import RunConfig, Trainee, load_weights, model_of
from deepseek_jax.types import Batch, Params, UserError


@dataclass(frozen=True)
class DistillConfig:
    """A teacher whose distributions are learnt beside, or instead of, the tokens."""

    teacher: Path | None = None
    """A run's directory or a Hugging Face folder, of the same vocabulary; None: no teacher."""
    teacher_weight: float = 0.5
    """Of the divergence from the teacher; the loss on tokens keeps the rest."""
    teacher_top_k: int = 64
    """The teacher's likeliest tokens, to which its distribution is cut and renormalised."""

    def __post_init__(self) -> None:
        """Refuse a weight that is no share."""
        if not 0 <= self.teacher_weight <= 1 or self.teacher_top_k < 1:
            raise UserError("teacher_weight lies between 0 and 1, and teacher_top_k is 1 or more.")


def with_teacher(
    config: RunConfig, distill: DistillConfig, trainee: Trainee, mesh: Mesh
) -> tuple[Trainee, DeepSeekV3]:
    """The teacher's weights among the frozen ones, in the compute dtype; and its model.

    Raises:
        UserError: the teacher has another vocabulary.
    """
    assert distill.teacher is not None
    found, own = model_of(distill.teacher), trainee.model.config
    if found.vocab_size != own.vocab_size:
        raise UserError(
            f"the teacher has a vocabulary of {found.vocab_size} and the model one of "
            f"{own.vocab_size}: a teacher must speak in the same tokens."
        )
    compute = config.precision.compute
    teacher = DeepSeekV3(found, Precision(compute, compute), parallel=config.parallel)
    params, bias_LE = load_weights(distill.teacher, teacher, mesh)
    bias = jax.device_put(bias_LE, sharding.sharding(mesh))
    trainee = trainee._replace(
        frozen=trainee.frozen | {"teacher": params, "teacher_bias": bias},
        frozen_axes=trainee.frozen_axes
        | {"teacher": logical_axes(teacher), "teacher_bias": (None, None)},
    )
    return trainee, teacher


def distillation_loss(
    model: DeepSeekV3,
    params: Params,
    router_bias_LE: Float[Array, "L E"],
    batch: Batch,
    totals: Totals,
    mtp_weight: Float[Array, ""] | float | None,
    teacher: DeepSeekV3,
    teacher_params: Params,
    teacher_bias_LE: Float[Array, "_ _"],
    config: DistillConfig,
) -> tuple[Float[Array, ""], LossParts]:
    """L = (1 - w) CE + w KL(teacher || model) + MTP + balance, this micro-batch's share."""
    w = config.teacher_weight
    mtp = mtp_weight is not None and model.config.num_nextn_predict_layers > 0
    hidden = hidden_states(model, params, router_bias_LE, batch, mtp=mtp)
    loss, parts = next_token_loss(model, params, hidden, batch, totals, mtp_weight, 1 - w)
    taught = hidden_states(teacher, teacher_params, teacher_bias_LE, batch, mtp=False).main_BTD
    nats = top_k_divergence(
        hidden.main_BTD.reshape(-1, hidden.main_BTD.shape[-1]),
        head(model, params),
        taught.reshape(-1, taught.shape[-1]),
        head(teacher, teacher_params),
        batch.loss_weights_BT.reshape(-1),
        config.teacher_top_k,
    )
    divergence = sharding.psum(nats, "batch", "sequence") / jnp.maximum(totals.weight, 1)
    metrics = parts.metrics | {"teacher_divergence": divergence}
    return loss + w * divergence, LossParts(metrics, parts.load_LE)


def top_k_divergence(
    hidden_MD: Float[Array, "M D"],
    head_DV: Float[Array, "D V"],
    taught_MD: Float[Array, "M _"],
    teacher_head_DV: Float[Array, "_ V"],
    weights_M: Float[Array, "M"],
    k: int,
) -> Float[Array, ""]:
    """Sum over rows of weight * KL(p || q), p the teacher's top k renormalised, q the model's.

    Forward: where the teacher sees something likely the model must too. Both models' logits exist
    for a chunk of rows at a time, and are made again for the gradient. Per device: over its own
    rows; the heads may be its part of the vocabulary.
    """
    M, V = len(hidden_MD), head_DV.shape[1]
    rows = rows_at_once(M, 2 * V)
    pad = -M % rows
    head_DV = head_DV.astype(hidden_MD.dtype)
    teacher_head_DV = jax.lax.stop_gradient(teacher_head_DV).astype(taught_MD.dtype)

    @jax.checkpoint
    def body(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        hidden_CD, taught_CD, weights_C = chunk
        taught = jnp.dot(taught_CD, teacher_head_DV, preferred_element_type=jnp.float32)
        top_CK, ids_CK = _top_k(taught, k)
        p_log_CK = jax.nn.log_softmax(top_CK)
        logits = jnp.dot(hidden_CD, head_DV, preferred_element_type=jnp.float32)
        q_log_CK = _log_softmax_at(logits, ids_CK)
        each_C = (jnp.exp(p_log_CK) * (p_log_CK - q_log_CK)).sum(-1)
        return total + (each_C * weights_C).sum(), None

    def split(x: Any) -> jax.Array:
        x = jnp.pad(x, ((0, pad), *((0, 0) for _ in x.shape[1:])))
        return x.reshape(-1, rows, *x.shape[1:])

    chunks = (split(hidden_MD), split(jax.lax.stop_gradient(taught_MD)), split(weights_M))
    return jax.lax.scan(body, jnp.float32(0), chunks)[0]


def _top_k(logits_CV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest over the whole vocabulary, and their ids."""
    V = logits_CV.shape[1]
    values, ids = jax.lax.top_k(logits_CV, min(k, V))
    ids += sharding.part_index("vocab") * V
    values, ids = (sharding.all_gather(x, "vocab", 1) for x in (values, ids))
    values, order = jax.lax.top_k(values, min(k, values.shape[1]))
    return values, jnp.take_along_axis(ids, order, axis=1)


def _log_softmax_at(logits_CV: jax.Array, ids_CK: Int[Array, "C K"]) -> jax.Array:
    """Log softmax over the whole vocabulary, at these ids."""
    V = logits_CV.shape[1]
    here_CK = ids_CK - sharding.part_index("vocab") * V
    mine = (here_CK >= 0) & (here_CK < V)
    picked = jnp.take_along_axis(logits_CV, jnp.clip(here_CK, 0, V - 1), axis=1)
    picked = sharding.psum(jnp.where(mine, picked, 0), "vocab")
    top_C1 = sharding.pmax(jax.lax.stop_gradient(logits_CV).max(-1, keepdims=True), "vocab")
    total_C1 = sharding.psum(jnp.exp(logits_CV - top_C1).sum(-1, keepdims=True), "vocab")
    return picked - top_C1 - jnp.log(total_C1)
