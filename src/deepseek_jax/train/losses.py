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
# So much more on a GPU or TPU: for every chunk the gradient of the head, D x V in float32, is read
# and written once, which with 1,310 tokens a chunk took a fifth of V2-Lite's head and loss.
TIMES_ON_ACCELERATORS = 4
# Rows of a chunk come in multiples of a matrix product's tile.
ROWS = 256


def rows_at_once(rows: int, vocabulary: int) -> int:
    """Of how many rows, out of ``rows``, logits exist at a time: few chunks, of about one size."""
    times = 1 if sharding.platform() == "cpu" else TIMES_ON_ACCELERATORS
    most = max(1, LOGITS_AT_ONCE * times // vocabulary)
    tile = ROWS if most >= ROWS else 1
    most -= most % tile
    if rows <= most:
        return max(1, rows)
    each = -(-rows // -(-rows // most))
    return -(-each // tile) * tile


class Totals(NamedTuple):
    """What a micro-batch's share of the step's loss is divided by."""

    weight: Float[Array, ""]
    """Sum of the loss weights over the whole step: all micro-batches, all shards."""
    micro_batches: Int[Array, ""]


class LossParts(NamedTuple):
    """A micro-batch's additive shares of the step's figures."""

    metrics: dict[str, Float[Array, ""]]
    load_LE: Int[Array, "L E"]


@jax.named_scope("head_and_loss")
def cross_entropy(
    hidden_MD: Float[Array, "M D"],
    head_DV: Float[Array, "D V"],
    targets_M: Int[Array, "M"],
    weights_M: Float[Array, "M"],
) -> tuple[Float[Array, ""], Float[Array, "M"]]:
    """Sum over rows of weight * -log softmax(hidden @ head)[target], and each row's; in float32.

    Only the sum has a gradient. Logits exist for a chunk of rows at a time; when a gradient is
    wanted it is computed in the same pass, while the chunk's logits are there, so they are never
    computed twice. Per device: over its own rows; ``head_DV`` may be its part of the vocabulary.
    """
    M, V = len(hidden_MD), head_DV.shape[1]
    rows = rows_at_once(M, V)
    pad = -M % rows
    hidden_MD = jnp.pad(hidden_MD, ((0, pad), (0, 0)))
    targets_M, weights_M = jnp.pad(targets_M, (0, pad)), jnp.pad(weights_M, (0, pad))
    total, each_M = _chunked(hidden_MD, head_DV.astype(hidden_MD.dtype), targets_M, weights_M, rows)
    return total, jax.lax.stop_gradient(each_M[:M])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(hidden_MD, head_DV, targets_M, weights_M, rows: int):
    def body(total, chunk):
        nats, _ = _chunk_loss(chunk, head_DV)
        return total + (nats * chunk[2]).sum(), nats

    chunks = _split(rows, hidden_MD, targets_M, weights_M)
    total, nats = jax.lax.scan(body, jnp.float32(0), chunks)
    return total, nats.reshape(-1)


def _chunk_loss(chunk: tuple[jax.Array, jax.Array, jax.Array], head_DV: jax.Array):
    """Loss of each row of a chunk, and d (weighted sum) / d logits."""
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
    return (total_C1 - picked_C1)[:, 0], dlogits


def _split(rows, *arrays):
    return tuple(x.reshape(-1, rows, *x.shape[1:]) for x in arrays)


def _chunked_fwd(hidden_MD, head_DV, targets_M, weights_M, rows):
    def body(carry, chunk):
        total, dhead = carry
        nats, dlogits = _chunk_loss(chunk, head_DV)
        dlogits = dlogits.astype(hidden_MD.dtype)
        dhidden = jnp.dot(dlogits, head_DV.T, preferred_element_type=jnp.float32)
        dhead += jnp.dot(chunk[0].T, dlogits, preferred_element_type=jnp.float32)
        total += (nats * chunk[2]).sum()
        return (total, dhead), (nats, dhidden.astype(hidden_MD.dtype))

    chunks = _split(rows, hidden_MD, targets_M, weights_M)
    start = (jnp.float32(0), jnp.zeros(head_DV.shape, jnp.float32))
    (total, dhead), (nats, dhidden) = jax.lax.scan(body, start, chunks)
    residuals = (dhidden.reshape(hidden_MD.shape), dhead.astype(head_DV.dtype))
    return (total, nats.reshape(-1)), residuals


def _chunked_bwd(rows, residuals, cotangents):
    dhidden_MD, dhead_DV = residuals
    # Every part of the vocabulary holds a share of the loss's cotangent.
    g = sharding.psum(cotangents[0], "vocab")
    # Weights get no gradient: they mask, and nothing learns them.
    return (
        (g * dhidden_MD).astype(dhidden_MD.dtype),
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
    flat_MD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    nats, _ = cross_entropy(flat_MD, head_DV, targets_BT.reshape(-1), weights_BT.reshape(-1))
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
    experts_LBTK: Int[Array, "l B T K"] | None = None,
) -> Hidden:
    """The model on a batch, up to the head; with or without its MTP modules.

    ``experts_LBTK`` are choices made before, which its MoE layers repeat.
    """
    hidden = model.apply(
        {"params": params},
        batch.tokens_BT,
        router_bias_LE,
        batch.targets_BT if mtp else None,
        batch.segment_ids_BT,
        batch.positions_BT,
        experts_LBTK,
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


def all_loads(model: DeepSeekV3, hidden: Hidden) -> Int[Array, "L E"]:
    """The load of every router; zero, which moves no bias, for MTP modules that did not run."""
    absent = model.config.num_routers - len(hidden.load_LE)
    return jnp.pad(hidden.load_LE, ((0, absent), (0, 0)))


def pretrain_loss(
    model: DeepSeekV3,
    params: Params,
    router_bias_LE: Float[Array, "L E"],
    batch: Batch,
    totals: Totals,
    mtp_weight: Float[Array, ""] | float | None,
) -> tuple[Float[Array, ""], LossParts]:
    """L = CE + (lambda / D) sum_k CE_k + balance (V3 Eqs. 17, 24, 25), this micro-batch's share.

    The shares of a step's micro-batches add up to its loss, whatever the split. With ``mtp_weight``
    None the MTP modules are not computed, and their routers see no load.
    """
    mtp = mtp_weight is not None and model.config.num_nextn_predict_layers > 0
    hidden = hidden_states(model, params, router_bias_LE, batch, mtp=mtp)
    return next_token_loss(model, params, hidden, batch, totals, mtp_weight)


def next_token_loss(
    model: DeepSeekV3,
    params: Params,
    hidden: Hidden,
    batch: Batch,
    totals: Totals,
    mtp_weight: Float[Array, ""] | float | None,
    main_weight: float | int = 1,
) -> tuple[Float[Array, ""], LossParts]:
    """``pretrain_loss`` from the hidden states on, the main head's part times ``main_weight``."""
    depths = len(hidden.mtp_BTD)
    # Main head and MTP depths in one pass over the head: its gradient is as large as itself, and
    # there is one.
    targets, masks = [batch.targets_BT], [batch.loss_weights_BT]
    for depth in range(1, depths + 1):
        targets_BT, mask_BT = mtp_targets(batch, depth)
        targets.append(targets_BT)
        masks.append(mask_BT)
    share = 1 / jnp.maximum(totals.weight, 1)
    factors = [main_weight * share]
    if depths:
        assert mtp_weight is not None
        factors += [mtp_weight / depths * share] * depths
    states = jnp.stack((hidden.main_BTD, *hidden.mtp_BTD))
    nats, each = cross_entropy(
        states.reshape(-1, states.shape[-1]),
        head(model, params),
        jnp.stack(targets).reshape(-1),
        jnp.stack([f * m for f, m in zip(factors, masks, strict=True)]).reshape(-1),
    )
    per_depth = (each.reshape(depths + 1, -1) * jnp.stack(masks).reshape(depths + 1, -1)).sum(1)
    nats, per_depth = sharding.psum((nats, per_depth * share), "batch", "sequence")
    balance = hidden.balance_loss / totals.micro_batches
    metrics = {"loss": per_depth[0], "balance_loss": balance}
    if depths:
        metrics["mtp_loss"] = per_depth[1:].mean()
    return nats + balance, LossParts(metrics, all_loads(model, hidden))
