"""Losses: cross-entropy that never holds all logits, and the pretraining objective."""

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax import sharding
from deepseek_jax.model.mtp import shift_left
from deepseek_jax.model.transformer import DeepSeekV3, Hidden
from deepseek_jax.types import Batch, Params

# Logits that exist at one time, in float32 elements: 512 MiB. With V3's vocabulary of 129,280
# that is about 1,000 tokens; a whole micro-batch of 4K tokens would be 2 GiB, several times over.
LOGITS_AT_ONCE = 2**27


class Totals(NamedTuple):
    """What a micro-batch's share of the step's loss is divided by."""

    weight: Float[Array, ""]
    """Sum of the loss weights over the whole step: all micro-batches, all shards."""
    micro_batches: Int[Array, ""]


class LossParts(NamedTuple):
    """A micro-batch's additive shares of the step's figures."""

    metrics: dict[str, Float[Array, ""]]
    load_LE: Int[Array, "L E"]


def cross_entropy(
    hidden_ND: Float[Array, "N D"],
    head_DV: Float[Array, "D V"],
    targets_N: Int[Array, "N"],
    weights_N: Float[Array, "N"],
) -> Float[Array, ""]:
    """Sum over rows of weight * -log softmax(hidden @ head)[target], in float32.

    Per device: over its own rows; ``head_DV`` may be its part of the vocabulary.

    Logits exist for a chunk of rows at a time. When a gradient is wanted it is computed in the
    same pass, while the chunk's logits are there, so they are never computed twice.
    """
    N, V = len(hidden_ND), head_DV.shape[1]
    rows = max(1, min(N, LOGITS_AT_ONCE // V))
    pad = -N % rows
    hidden_ND = jnp.pad(hidden_ND, ((0, pad), (0, 0)))
    targets_N, weights_N = jnp.pad(targets_N, (0, pad)), jnp.pad(weights_N, (0, pad))
    return _chunked(hidden_ND, head_DV.astype(hidden_ND.dtype), targets_N, weights_N, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(hidden_ND, head_DV, targets_N, weights_N, rows: int):
    def body(total, chunk):
        loss, _ = _chunk_loss(chunk, head_DV)
        return total + loss, None

    chunks = _split(rows, hidden_ND, targets_N, weights_N)
    return jax.lax.scan(body, jnp.float32(0), chunks)[0]


def _chunk_loss(chunk: tuple[jax.Array, jax.Array, jax.Array], head_DV: jax.Array):
    """Weighted loss of a chunk, and d loss / d logits."""
    hidden_CD, targets_C, weights_C = chunk
    logits = jnp.dot(hidden_CD, head_DV, preferred_element_type=jnp.float32)
    V = logits.shape[-1]
    targets_C1 = targets_C[:, None] - sharding.part_index("vocab") * V
    here_C1 = (targets_C1 >= 0) & (targets_C1 < V)
    picked_C1 = jnp.take_along_axis(logits, jnp.clip(targets_C1, 0, V - 1), axis=-1)
    picked_C1 = sharding.psum(jnp.where(here_C1, picked_C1, 0), "vocab")
    top_C1 = sharding.pmax(logits.max(-1, keepdims=True), "vocab")
    sum_C1 = sharding.psum(jnp.exp(logits - top_C1).sum(-1, keepdims=True), "vocab")
    total_C1 = top_C1 + jnp.log(sum_C1)
    own = targets_C1 == jnp.arange(V)
    dlogits = (jnp.exp(logits - total_C1) - own) * weights_C[:, None]
    return ((total_C1 - picked_C1)[:, 0] * weights_C).sum(), dlogits


def _split(rows, *arrays):
    return tuple(x.reshape(-1, rows, *x.shape[1:]) for x in arrays)


def _chunked_fwd(hidden_ND, head_DV, targets_N, weights_N, rows):
    def body(carry, chunk):
        total, dhead = carry
        loss, dlogits = _chunk_loss(chunk, head_DV)
        dlogits = dlogits.astype(hidden_ND.dtype)
        dhidden = jnp.dot(dlogits, head_DV.T, preferred_element_type=jnp.float32)
        dhead += jnp.dot(chunk[0].T, dlogits, preferred_element_type=jnp.float32)
        return (total + loss, dhead), dhidden.astype(hidden_ND.dtype)

    chunks = _split(rows, hidden_ND, targets_N, weights_N)
    start = (jnp.float32(0), jnp.zeros(head_DV.shape, jnp.float32))
    (total, dhead), dhidden = jax.lax.scan(body, start, chunks)
    return total, (dhidden.reshape(hidden_ND.shape), dhead.astype(head_DV.dtype))


def _chunked_bwd(rows, residuals, g):
    dhidden_ND, dhead_DV = residuals
    # Every part of the vocabulary holds a share of the loss's cotangent.
    g = sharding.psum(g, "vocab")
    # Weights get no gradient: they mask, and nothing learns them.
    return (
        (g * dhidden_ND).astype(dhidden_ND.dtype),
        (g * dhead_DV).astype(dhead_DV.dtype),
        None,
        None,
    )


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def batch_nats(
    hidden_BTD: Float[Array, "B T D"],
    head_DV: Float[Array, "D V"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
) -> Float[Array, ""]:
    """``cross_entropy`` over the positions of a batch, the whole mesh's."""
    flat_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    nats = cross_entropy(flat_ND, head_DV, targets_BT.reshape(-1), weights_BT.reshape(-1))
    return sharding.psum(nats, "batch", "sequence")


def head(model: DeepSeekV3, params: Params) -> Float[Array, "D V"]:
    """The output head; per device, its part of the vocabulary."""
    return cast(jax.Array, model.apply({"params": params}, method="head"))


def hidden_states(
    model: DeepSeekV3,
    params: Params,
    router_bias_LE: Float[Array, "L E"],
    batch: Batch,
    *,
    mtp: bool,
) -> Hidden:
    """The model on a batch, up to the head; with or without its MTP modules."""
    hidden = model.apply(
        {"params": params},
        batch.tokens_BT,
        router_bias_LE,
        batch.targets_BT if mtp else None,
        batch.segment_ids_BT,
        batch.positions_BT,
        method="hidden",
    )
    return cast(Hidden, hidden)


def mtp_targets(batch: Batch, depth: int) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """Targets of depth k, token i+1+k, and their weights (V3 Eq. 24).

    Weight 0 where the row ends and where token i+k or i+1+k lies in another segment, that is,
    where the chain would cross into a document it must not see.
    """
    targets_BT = shift_left(batch.targets_BT, depth)
    weights_BT = shift_left(batch.loss_weights_BT, depth)
    same = shift_left(batch.segment_ids_BT, depth) == batch.segment_ids_BT
    return targets_BT, weights_BT * same


def pretrain_loss(
    model: DeepSeekV3,
    params: Params,
    router_bias_LE: Float[Array, "L E"],
    batch: Batch,
    totals: Totals,
    mtp_weight: Float[Array, ""] | float,
) -> tuple[Float[Array, ""], LossParts]:
    """L = CE + (lambda / D) sum_k CE_k + balance (V3 Eqs. 17, 24, 25), this micro-batch's share.

    The shares of a step's micro-batches add up to its loss, whatever the split.
    """
    depths = model.config.num_nextn_predict_layers
    hidden = hidden_states(model, params, router_bias_LE, batch, mtp=depths > 0)
    head_DV = head(model, params)

    def ce(h_BTD, targets_BT, weights_BT):
        nats = batch_nats(h_BTD, head_DV, targets_BT, weights_BT)
        return nats / jnp.maximum(totals.weight, 1)

    main = ce(hidden.main_BTD, batch.targets_BT, batch.loss_weights_BT)
    balance = hidden.balance_loss / totals.micro_batches
    metrics = {"loss": main, "balance_loss": balance}
    loss = main + balance
    if depths:
        per_depth = [ce(h, *mtp_targets(batch, k + 1)) for k, h in enumerate(hidden.mtp_BTD)]
        metrics["mtp_loss"] = sum(per_depth, jnp.float32(0)) / depths
        loss += mtp_weight * metrics["mtp_loss"]
    return loss, LossParts(metrics, hidden.load_LE)
