"""From logits to tokens: the sampling distribution of each row, draws, and verified drafts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, UInt32

from deepseek_jax.types import Array

# What a position's randomness is for; each use of it has a stream of its own.
SAMPLE, DRAFT, ACCEPT = range(3)


class Controls(NamedTuple):
    """Every row's own sampling parameters."""

    temperature_B: Float[Array, "B"]
    """0: the likeliest token."""
    top_p_B: Float[Array, "B"]
    """1: off."""
    top_k_B: Int[Array, "B"]
    """0: off."""
    min_p_B: Float[Array, "B"]
    """0: off."""
    key_B2: UInt32[Array, "B 2"]


def log_probs(logits_BV: Float[Array, "B V"], controls: Controls) -> Float[Array, "B V"]:
    """Log-probabilities of the sampling distribution; -inf for tokens that cannot be drawn.

    In this order: softmax(logits / temperature); the ``top_k`` likeliest; the smallest set of
    these whose probability reaches ``top_p`` (the nucleus, Holtzman et al., 2020); those of at
    least ``min_p`` times the probability of the likeliest (Nguyen et al., 2024). Tokens exactly
    as likely as the last one kept are kept too.
    """
    V = logits_BV.shape[1]
    logits_BV = logits_BV.astype(jnp.float32)
    greedy_B1 = controls.temperature_B[:, None] == 0
    scaled_BV = logits_BV / jnp.where(greedy_B1, 1, controls.temperature_B[:, None])
    cut_B = (controls.top_p_B < 1) | (controls.top_k_B > 0)
    # Sorting a vocabulary takes longer than the rest together.
    least_B1 = jax.lax.cond(
        (cut_B & ~greedy_B1[:, 0]).any(),
        lambda: _least_kept(scaled_BV, controls),
        lambda: jnp.full_like(scaled_BV[:, :1], -jnp.inf),
    )
    by_min_p_B1 = scaled_BV.max(-1, keepdims=True) + jnp.log(controls.min_p_B[:, None])
    kept_BV = scaled_BV >= jnp.maximum(least_B1, by_min_p_B1)
    likeliest_BV = jnp.arange(V) == jnp.argmax(logits_BV, axis=-1, keepdims=True)
    kept_BV = jnp.where(greedy_B1, likeliest_BV, kept_BV)
    return jax.nn.log_softmax(jnp.where(kept_BV, scaled_BV, -jnp.inf), axis=-1)


def _least_kept(scaled_BV: jax.Array, controls: Controls) -> jax.Array:
    V = scaled_BV.shape[1]
    sorted_BV = jnp.sort(scaled_BV, axis=-1, descending=True)
    most_B1 = jnp.where(controls.top_k_B > 0, controls.top_k_B, V)[:, None]
    probs_BV = jax.nn.softmax(jnp.where(jnp.arange(V) < most_B1, sorted_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    top_p_B1 = jnp.where(controls.top_p_B < 1, controls.top_p_B, jnp.inf)[:, None]
    in_nucleus_B1 = (before_BV < top_p_B1).sum(-1, keepdims=True)
    kept_B1 = jnp.clip(jnp.minimum(in_nucleus_B1, most_B1), 1, V)
    return jnp.take_along_axis(sorted_BV, kept_B1 - 1, axis=-1)


def draw(
    log_probs_BV: Float[Array, "B V"],
    controls: Controls,
    position_B: Int[Array, "B"],
    purpose: int,
) -> Int[Array, "B"]:
    """A token per row, for its position in the row; nothing else of the batch matters."""
    keys_B = _keys(controls, position_B, purpose)
    return jax.vmap(jax.random.categorical)(keys_B, log_probs_BV).astype(jnp.int32)


def _keys(controls: Controls, position_B: jax.Array, purpose: int) -> jax.Array:
    def key(data_2: jax.Array, position: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.wrap_key_data(data_2, impl="threefry2x32"), position)
        return jax.random.fold_in(own, purpose)

    return jax.vmap(key)(controls.key_B2, position_B)


def verify(
    drafts_Bk: Int[Array, "B k"],
    draft_log_probs_BkV: Float[Array, "B k V"],
    log_probs_BjV: Float[Array, "B k+1 V"],
    controls: Controls,
    position_B: Int[Array, "B"],
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """How many drafts each row accepts, and the token that follows them.

    Draft x is accepted with probability min(1, p(x) / q(x)), p being the model's distribution and
    q the drafter's; at the first refusal the token comes from max(p - q, 0), normalised; after
    the last acceptance from p. What comes out is distributed as p (Leviathan et al., 2023,
    Theorem 1). ``position_B`` is that of the first draft.
    """
    k = drafts_Bk.shape[1]

    def of_draft(log_probs_BkV: jax.Array) -> jax.Array:
        return jnp.take_along_axis(log_probs_BkV, drafts_Bk[..., None], axis=-1)[..., 0]

    p_Bk, q_Bk = of_draft(log_probs_BjV[:, :k]), of_draft(draft_log_probs_BkV)
    uniform_Bk = jnp.stack(
        [jax.vmap(jax.random.uniform)(_keys(controls, position_B + j, ACCEPT)) for j in range(k)],
        axis=1,
    )
    accepted_Bk: Bool[Array, "B k"] = jnp.log(uniform_Bk) < p_Bk - q_Bk
    count_B = jnp.cumprod(accepted_Bk, axis=1).sum(1)
    at_B11 = count_B[:, None, None]
    p_BV = jnp.take_along_axis(log_probs_BjV, at_B11, axis=1)[:, 0]
    # After the last draft there is nothing to subtract.
    q_BjV = jnp.pad(draft_log_probs_BkV, ((0, 0), (0, 1), (0, 0)), constant_values=-jnp.inf)
    q_BV = jnp.take_along_axis(q_BjV, at_B11, axis=1)[:, 0]
    rest_BV = jnp.maximum(jnp.exp(p_BV) - jnp.exp(q_BV), 0)
    # Where rounding leaves nothing, p and q are the same.
    rest_BV = jnp.where(rest_BV.sum(-1, keepdims=True) > 0, jnp.log(rest_BV), p_BV)
    return count_B.astype(jnp.int32), draw(rest_BV, controls, position_B + count_B, SAMPLE)
