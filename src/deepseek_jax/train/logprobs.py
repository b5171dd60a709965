"""Log-probabilities of chosen tokens under the policy, without ever holding all logits."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax import sharding
from deepseek_jax.model.transformer import DeepSeekV3, logical_axes
from deepseek_jax.train import losses
from deepseek_jax.train.step import BATCH_SPEC, batch_specs
from deepseek_jax.types import Batch, Params, Rollout


class PolicyOutput(NamedTuple):
    """What the policy says about the tokens of a batch."""

    logp_BT: Float[Array, "B T"]
    """log pi(target); the only field with a gradient, but for ``balance_loss``."""
    entropy_BT: Float[Array, "B T"]
    """Entropy of the distribution that the target was drawn from, in nats."""
    best_logp_BT: Float[Array, "B T"]
    """Of the likeliest token: the target's own where it is what greedy decoding takes."""
    load_LE: Int[Array, "L E"]
    balance_loss: Float[Array, ""]


def policy_output(
    model: DeepSeekV3,
    params: Params,
    router_bias_LE: Float[Array, "L E"],
    batch: Batch,
    *,
    temperature: float | int = 1.0,
    kept_BTX: Int[Array, "B T X"] | None = None,
    experts_BTLK: Int[Array, "B T l K"] | None = None,
) -> PolicyOutput:
    """``token_logprobs`` of a batch's targets; per device, of its own rows.

    ``experts_BTLK`` are the sampler's choices, repeated here ("Keep Routing", V3.2 section 3.1).
    """
    experts_LBTK = None if experts_BTLK is None else jnp.moveaxis(experts_BTLK, 2, 0)
    hidden = losses.hidden_states(
        model, params, router_bias_LE, batch, mtp=False, experts_LBTK=experts_LBTK
    )
    shape = batch.targets_BT.shape
    said = token_logprobs(
        hidden.main_BTD.reshape(-1, hidden.main_BTD.shape[-1]),
        losses.head(model, params),
        batch.targets_BT.reshape(-1),
        temperature=temperature,
        kept_MX=None if kept_BTX is None else kept_BTX.reshape(-1, kept_BTX.shape[-1]),
    )
    return PolicyOutput(
        said.logp_M.reshape(shape),
        said.entropy_M.reshape(shape),
        said.best_logp_M.reshape(shape),
        losses.all_loads(model, hidden),
        hidden.balance_loss,
    )


class Scores(NamedTuple):
    """Log-probabilities of the tokens of a rollout, and of those that greedy decoding takes."""

    logp_ABT: Float[Array, "A B T"]
    best_logp_ABT: Float[Array, "A B T"]


def make_scorer(model: DeepSeekV3, temperature: float) -> Callable[[Params, Any, Rollout], Scores]:
    """``score(params, bias, rollout_ABT)``: what a policy says about the tokens, compiled.

    A micro-batch at a time, as the training step does.
    """

    def local(params: Params, bias_LE: Array, rollout: Rollout) -> Scores:
        def micro(_: None, part: Rollout) -> tuple[None, Scores]:
            said = policy_output(
                model,
                params,
                bias_LE,
                part.batch,
                temperature=temperature,
                kept_BTX=part.kept_BTX,
                experts_BTLK=part.experts_BTLK,
            )
            return None, Scores(said.logp_BT, said.best_logp_BT)

        return jax.lax.scan(micro, None, rollout)[1]

    @jax.jit
    def score(params: Params, bias_LE: Array, rollout: Rollout) -> Scores:
        specs = sharding.param_specs(jax.sharding.get_abstract_mesh(), logical_axes(model), params)
        in_specs = (specs, sharding.spec(), batch_specs(rollout))
        return sharding.per_device(local, in_specs, BATCH_SPEC)(params, bias_LE, rollout)

    return score


class TokenLogprobs(NamedTuple):
    """What a distribution says about a token, and of itself; see ``PolicyOutput``."""

    logp_M: Float[Array, "M"]
    entropy_M: Float[Array, "M"]
    best_logp_M: Float[Array, "M"]


def token_logprobs(
    hidden_MD: Float[Array, "M D"],
    head_DV: Float[Array, "D V"],
    targets_M: Int[Array, "M"],
    *,
    temperature: float | int = 1.0,
    kept_MX: Int[Array, "M X"] | None = None,
) -> TokenLogprobs:
    """The log softmax(hidden @ head / temperature)[target] of each row, its entropy and its top.

    Logits exist for a chunk of rows at a time, as in ``losses.cross_entropy``. Unlike there the
    factor of each row's gradient is not known in the forward pass (a ratio of log-probabilities
    decides it), so the backward pass computes the chunk's logits again. Only the
    log-probabilities have a gradient. Per device: over its own rows; ``head_DV`` may be its part
    of the vocabulary.

    Args:
        hidden_MD: final-normed states.
        head_DV: the output head.
        targets_M: the tokens asked about.
        temperature: the one that the tokens were sampled with, so that this is their policy.
        kept_MX: ids that top-k or top-p left to the sampler, padded with -1; the distribution is
            normalised over them alone ("Keep Sampling Mask", V3.2 section 3.1). A row of -1
            alone keeps all. A target is always kept.
    """
    M, V = len(hidden_MD), head_DV.shape[1]
    rows = losses.rows_at_once(M, V)
    pad = -M % rows
    kept_MX = jnp.full((M, 0), -1, jnp.int32) if kept_MX is None else kept_MX
    logp_M, *rest = _chunked(
        jnp.pad(hidden_MD, ((0, pad), (0, 0))),
        head_DV.astype(hidden_MD.dtype),
        jnp.pad(targets_M, (0, pad)),
        jnp.pad(kept_MX, ((0, pad), (0, 0)), constant_values=-1),
        rows,
        float(temperature),
    )
    return TokenLogprobs(logp_M[:M], *(jax.lax.stop_gradient(x[:M]) for x in rest))


class _Softmax(NamedTuple):
    logits: jax.Array
    """Scaled; -inf where not kept."""
    top_C1: jax.Array
    """The largest of them."""
    total_C1: jax.Array
    """log of the sum of their exponentials."""
    own: jax.Array
    """One-hot targets."""


def _softmax(chunk, head_DV: jax.Array, temperature: float) -> _Softmax:
    hidden_CD, targets_C, kept_CX = chunk
    logits = jnp.dot(hidden_CD, head_DV, preferred_element_type=jnp.float32) / temperature
    C, V = logits.shape
    first = sharding.part_index("vocab") * V
    own = targets_C[:, None] - first == jnp.arange(V)
    if kept_CX.shape[1]:
        # Ids of other parts of the vocabulary, and the padding, fall outside: sent to V, dropped.
        local = kept_CX - first
        local = jnp.where((kept_CX >= 0) & (local >= 0) & (local < V), local, V)
        kept = jnp.zeros((C, V), bool).at[jnp.arange(C)[:, None], local].set(True, mode="drop")
        everything = (kept_CX < 0).all(-1, keepdims=True)
        logits = jnp.where(kept | own | everything, logits, -jnp.inf)
    top_C1 = sharding.pmax(logits.max(-1, keepdims=True), "vocab")
    sum_C1 = sharding.psum(jnp.exp(logits - top_C1).sum(-1, keepdims=True), "vocab")
    return _Softmax(logits, top_C1, top_C1 + jnp.log(sum_C1), own)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunked(hidden_MD, head_DV, targets_M, kept_MX, rows: int, temperature: float):
    def body(_, chunk):
        logits, top_C1, total_C1, own = _softmax(chunk, head_DV, temperature)
        picked_C = jnp.where(own, logits, 0).sum(-1)
        expected_C = (jnp.exp(logits - total_C1) * jnp.where(logits > -jnp.inf, logits, 0)).sum(-1)
        picked_C, expected_C = sharding.psum((picked_C, expected_C), "vocab")
        total_C = total_C1[:, 0]
        return None, (picked_C - total_C, total_C - expected_C, top_C1[:, 0] - total_C)

    _, each = jax.lax.scan(body, None, _split(rows, hidden_MD, targets_M, kept_MX))
    return tuple(x.reshape(-1) for x in each)


def _split(rows, *arrays):
    return tuple(x.reshape(len(x) // rows, rows, *x.shape[1:]) for x in arrays)


def _chunked_fwd(hidden_MD, head_DV, targets_M, kept_MX, rows, temperature):
    out = _chunked(hidden_MD, head_DV, targets_M, kept_MX, rows, temperature)
    return out, (hidden_MD, head_DV, targets_M, kept_MX)


def _chunked_bwd(rows, temperature, residuals, cotangents):
    hidden_MD, head_DV, targets_M, kept_MX = residuals
    # Every part of the vocabulary holds a share of the cotangent.
    g_M = sharding.psum(cotangents[0], "vocab")

    def body(dhead, chunk):
        *inputs, g_C = chunk
        logits, _, total_C1, own = _softmax(inputs, head_DV, temperature)
        dlogits = (own - jnp.exp(logits - total_C1)) * (g_C[:, None] / temperature)
        dlogits = dlogits.astype(hidden_MD.dtype)
        dhidden = jnp.dot(dlogits, head_DV.T, preferred_element_type=jnp.float32)
        dhead += jnp.dot(inputs[0].T, dlogits, preferred_element_type=jnp.float32)
        return dhead, dhidden.astype(hidden_MD.dtype)

    start = jnp.zeros(head_DV.shape, jnp.float32)
    chunks = _split(rows, hidden_MD, targets_M, kept_MX, g_M)
    dhead, dhidden = jax.lax.scan(body, start, chunks)
    return dhidden.reshape(hidden_MD.shape), dhead.astype(head_DV.dtype), None, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
