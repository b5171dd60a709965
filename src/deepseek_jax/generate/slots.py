"""The engine's programs: prompts into lanes, lanes into slots, and rounds of decoding.

A *slot* is a row of the decoding batch, a *lane* a row in which a prompt is read. Each program is
compiled once for given numbers of slots and lanes, whatever the lengths of what is in them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, UInt32

from deepseek_jax import sharding
from deepseek_jax.generate.sampling import DRAFT, SAMPLE, Controls, draw, log_probs, verify
from deepseek_jax.model.transformer import (
    DeepSeekV3,
    cache_specs,
    init_cache,
    logical_axes,
    serving_variables,
)
from deepseek_jax.types import Array, KVCache, Params

IDLE, RUNNING, STOPPED, FULL, NOT_FINITE = range(5)
"""What a slot is doing, or how it ended: a stop token, its limit, logits that were not finite."""
MAX_STOP_TOKENS = 8
# Sequences copied to their slots in one go: one by one, a rollout of 2048 would begin with as many
# turns of a loop of small kernels; all at once, their prompts would be in memory twice.
_STARTED_AT_ONCE = 16


class Lanes(NamedTuple):
    """Prompts being read."""

    cache: KVCache
    mtp: KVCache | None
    window_BWD: Float[Array, "B W D"]
    """Final-normed states of the last W positions, the drafter's input; W = 1 without one."""
    experts_LBSK: Int[Array, "l B S K"] | None
    tokens_BS: Int[Array, "B S"]


class Slots(NamedTuple):
    """Sequences being continued. The last token known has not been through the model yet."""

    cache: KVCache
    mtp: KVCache | None
    window_BWD: Float[Array, "B W D"]
    experts_LBSK: Int[Array, "l B S K"] | None
    """The MoE layers' choices, where they are to be kept ("keep routing", V3.2 section 3.1)."""
    tokens_BS: Int[Array, "B S"]
    log_prob_BS: Float[Array, "B S"]
    """Of each token drawn, under the model as it is."""
    sampling_log_prob_BS: Float[Array, "B S"]
    """Of each token drawn, under the distribution it was drawn from."""
    kept_BSX: Int[Array, "B S X"] | None
    """The tokens that could have been drawn, likeliest first, then -1; all -1 if nothing was cut
    ("keep sampling mask", V3.2 section 3.1)."""
    status_B: Int[Array, "B"]
    limit_B: Int[Array, "B"]
    """Tokens at which a sequence ends, its prompt included."""
    stop_BX: Int[Array, "B X"]
    """Stop tokens; -1: none."""
    controls: Controls
    accepted_Bj: Int[Array, "B k+1"]
    """Rounds in which 0, 1, ..., k drafts were accepted."""


class Starts(NamedTuple):
    """Sequences to be started: which lane's prompt, in which slot, and how."""

    lane_N: Int[Array, "N"]
    slot_N: Int[Array, "N"]
    limit_N: Int[Array, "N"]
    stop_NX: Int[Array, "N X"]
    controls: Controls


def init_lanes(
    model: DeepSeekV3, rows: int, slots: int, dtype: Any, drafts: int, *, keep_routing: bool
) -> Lanes:
    """Empty lanes of ``slots`` tokens."""
    c = model.config
    window = drafts + c.num_nextn_predict_layers if drafts else 1
    experts = (c.num_moe_layers, rows, slots, c.num_experts_per_tok)
    return Lanes(
        init_cache(c, rows, slots, dtype),
        init_cache(c, rows, slots, dtype, mtp=True) if drafts else None,
        jnp.zeros((rows, window, c.hidden_size), model.precision.compute_dtype),
        jnp.zeros(experts, jnp.int16) if keep_routing else None,
        jnp.zeros((rows, slots), jnp.int32),
    )


def init_slots(
    model: DeepSeekV3,
    rows: int,
    slots: int,
    dtype: Any,
    drafts: int,
    *,
    keep_routing: bool,
    keep_top_k: int,
) -> Slots:
    """Idle slots of ``slots`` tokens."""
    lanes = init_lanes(model, rows, slots, dtype, drafts, keep_routing=keep_routing)
    zeros = jnp.zeros((rows,), jnp.int32)
    return Slots(
        *lanes,
        log_prob_BS=jnp.zeros((rows, slots)),
        sampling_log_prob_BS=jnp.zeros((rows, slots)),
        kept_BSX=jnp.full((rows, slots, keep_top_k), -1, jnp.int32) if keep_top_k else None,
        status_B=zeros,
        limit_B=zeros,
        stop_BX=jnp.full((rows, MAX_STOP_TOKENS), -1, jnp.int32),
        controls=Controls(
            jnp.zeros((rows,)),
            jnp.ones((rows,)),
            zeros,
            jnp.zeros((rows,)),
            jnp.zeros((rows, 2), jnp.uint32),
        ),
        accepted_Bj=jnp.zeros((rows, drafts + 1), jnp.int32),
    )


def row_specs(rows: Lanes | Slots) -> Any:
    """Rows over the batch axes."""
    first = jax.tree.map(lambda _: sharding.spec("batch"), rows)
    second = sharding.spec("layers", "batch")
    return first._replace(
        cache=cache_specs(rows.cache),
        mtp=None if rows.mtp is None else cache_specs(rows.mtp),
        experts_LBSK=None if rows.experts_LBSK is None else second,
    )


def _per_device(fn: Any, model: DeepSeekV3, params: Params, *others: Any) -> Any:
    """``fn(params, bias, *others)`` with rows where they lie, and weights as serving has them.

    ``others`` pairs every further argument with its specs; the first one's are the result's.
    """
    mesh, everywhere = jax.sharding.get_abstract_mesh(), sharding.spec()
    weights = sharding.param_specs(mesh, logical_axes(model), params, stored=False)
    return sharding.per_device(fn, in_specs=(weights, everywhere, *others), out_specs=others[0])


# What XLA would do on a GPU for products of few rows costs more than the products: its Triton
# kernels want a layer's matrix copied out of the stack of all layers first, where cuBLAS reads it
# in place; and matrices that multiply the same rows are joined into one, anew in every step.
_GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}


class _Program:
    """A function under ``jax.jit``, with ``_GPU_OPTIONS`` where it is called for a GPU."""

    def __init__(self, fn: Callable[..., Any], **options: Any):
        functools.update_wrapper(self, fn)
        on_gpu = functools.partial(jax.jit, compiler_options=_GPU_OPTIONS)
        self._jitted = {gpu: (on_gpu if gpu else jax.jit)(fn, **options) for gpu in (True, False)}

    def _here(self) -> Any:
        return self._jitted[sharding.on_gpu()]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._here()(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """As a jitted function's."""
        return self._here().lower(*args, **kwargs)


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], _Program]:
    return functools.partial(_Program, **options)


@_compiled(static_argnames="model", donate_argnames="lanes")
def prefill(
    model: DeepSeekV3,
    params: Params,
    router_bias_LE: Float[Array, "L E"],
    lanes: Lanes,
    tokens_BT: Int[Array, "B T"],
    next_BT: Int[Array, "B T"],
    count_B: Int[Array, "B"],
    fresh_B: Int[Array, "B"],
) -> Lanes:
    """Read up to T further tokens of every lane's prompt: the first ``count_B`` of each row.

    ``next_BT`` are the same one token further on; ``fresh_B`` is 1 where a prompt begins.
    """

    def read(params, bias_LE, lanes, tokens_BT, next_BT, count_B, fresh_B):
        apply = functools.partial(model.apply, serving_variables(model, params))
        length_B = jnp.where(fresh_B == 1, 0, lanes.cache.length_B)
        window_BWD = jnp.where(fresh_B[:, None, None] == 1, 0, lanes.window_BWD)
        cache = lanes.cache._replace(length_B=length_B)
        out: Any = apply(tokens_BT, bias_LE, cache, method="extend")
        h_BTD, cache, experts_LBTK = out
        mtp = lanes.mtp
        if mtp is not None:
            # So that the drafter, too, has seen the prompt; the last position's next token is
            # not known yet, and its entry is written again when it is.
            mtp, h = mtp._replace(length_B=length_B), h_BTD
            for depth in range(1, model.config.num_nextn_predict_layers + 1):
                ahead_BT = jnp.pad(next_BT[:, depth - 1 :], ((0, 0), (0, depth - 1)))
                drafted: Any = apply(h, ahead_BT, bias_LE, mtp, depth, method="draft")
                h, mtp = drafted
        return Lanes(
            cache._replace(length_B=length_B + count_B),
            mtp,
            _last_window(window_BWD, h_BTD, count_B),
            _put_experts(lanes.experts_LBSK, experts_LBTK, length_B),
            _put(lanes.tokens_BS, tokens_BT, length_B[:, None] + jnp.arange(tokens_BT.shape[1])),
        )

    specs, rows = row_specs(lanes), sharding.spec("batch")
    read = _per_device(read, model, params, specs, rows, rows, rows, rows)
    return read(params, router_bias_LE, lanes, tokens_BT, next_BT, count_B, fresh_B)


def _last_window(window_BWD: jax.Array, h_BTD: jax.Array, count_B: jax.Array) -> jax.Array:
    """The last W states after ``count_B`` of the T new ones."""
    both = jnp.concatenate([window_BWD, h_BTD.astype(window_BWD.dtype)], axis=1)
    at_BW = count_B[:, None] + jnp.arange(window_BWD.shape[1])
    return jnp.take_along_axis(both, at_BW[..., None], axis=1)


def _put(old_BS: jax.Array, new_BT: Any, at_BT: jax.Array) -> jax.Array:
    """Entries of each row; those past its end are dropped."""
    return old_BS.at[jnp.arange(len(old_BS))[:, None], at_BT].set(new_BT, mode="drop")


def _put_experts(
    kept_LBSK: jax.Array | None, new_LBTK: jax.Array, first_B: jax.Array
) -> jax.Array | None:
    if kept_LBSK is None:
        return None
    B, T = new_LBTK.shape[1:3]
    at_BT = first_B[:, None] + jnp.arange(T)
    at = kept_LBSK.at[:, jnp.arange(B)[:, None], at_BT]
    return at.set(new_LBTK.astype(kept_LBSK.dtype), mode="drop")


@_compiled(static_argnames="model", donate_argnames="slots")
def start(
    model: DeepSeekV3,
    params: Params,
    router_bias_LE: Float[Array, "L E"],
    slots: Slots,
    lanes: Lanes,
    starts: Starts,
    count: Int[Array, ""],
) -> Slots:
    """Copy the prompts of the first ``count`` entries of ``starts`` to slots; draw first tokens."""

    def copy_and_draw(params, bias_LE, slots, lanes, starts, count):
        del bias_LE
        rows, held = len(slots.status_B), len(lanes.window_BWD)
        first_slot = sharding.part_index("batch") * rows
        first_lane = sharding.part_index("batch") * held
        logits_BV = _logits(model, params, lanes.window_BWD[:, -1:])[:, 0]
        N, keep = len(starts.lane_N), _keep_top_k(slots)
        some = min(_STARTED_AT_ONCE, N)

        def copy_some(
            i: jax.Array, carried: tuple[Slots, _Drawn, jax.Array]
        ) -> tuple[Slots, _Drawn, jax.Array]:
            slots, drawn, began_B = carried
            entry_n = i * some + jnp.arange(some)
            lane_n, slot_n, limit_n, stop_nX, controls = jax.tree.map(
                lambda x: x[jnp.minimum(entry_n, N - 1)], starts
            )
            lane_n, slot_n = lane_n - first_lane, slot_n - first_slot
            own_n, at_n = (lane_n >= 0) & (lane_n < held), jnp.clip(lane_n, 0, held - 1)
            here_n = (entry_n < count) & (slot_n >= 0) & (slot_n < rows)
            # Indices past the end are dropped; no two are the same.
            slot_n = jnp.where(here_n, slot_n, rows + jnp.arange(some))

            def taken(x: jax.Array, axis: int) -> jax.Array:
                """Lanes' rows, from whichever device holds them."""
                own = jnp.expand_dims(own_n, tuple(a for a in range(x.ndim) if a != axis))
                x = jnp.take(x, at_n, axis)
                if x.dtype == jnp.float8_e4m3fn:  # which has no sum
                    bits = jax.lax.bitcast_convert_type(x, jnp.uint8)
                    bits = sharding.psum(jnp.where(own, bits, 0), "batch")
                    return jax.lax.bitcast_convert_type(bits, x.dtype)
                return sharding.psum(jnp.where(own, x, 0), "batch")

            def put(old: jax.Array, new: jax.Array, axis: int = 0) -> jax.Array:
                at = old.at[(slice(None),) * axis + (slot_n,)]
                return at.set(new, mode="drop", unique_indices=True)

            def move(old: Any, new: Any) -> Any:
                def one(a: jax.Array, b: jax.Array) -> jax.Array:
                    axis = int(a.ndim > 1)
                    return put(a, taken(b, axis), axis)

                return jax.tree.map(one, old, new)

            first = _drawn(taken(logits_BV, 0), controls, taken(lanes.cache.length_B, 0), keep)
            slots = slots._replace(
                cache=move(slots.cache, lanes.cache),
                mtp=move(slots.mtp, lanes.mtp),
                window_BWD=put(slots.window_BWD, taken(lanes.window_BWD, 0)),
                tokens_BS=put(slots.tokens_BS, taken(lanes.tokens_BS, 0)),
                experts_LBSK=move(slots.experts_LBSK, lanes.experts_LBSK),
                status_B=put(slots.status_B, jnp.full((some,), RUNNING)),
                limit_B=put(slots.limit_B, limit_n),
                stop_BX=put(slots.stop_BX, stop_nX),
                controls=jax.tree.map(put, slots.controls, controls),
                accepted_Bj=put(slots.accepted_Bj, jnp.zeros_like(slots.accepted_Bj[:1])),
            )
            return slots, jax.tree.map(put, drawn, first), put(began_B, jnp.ones_like(slot_n))

        nothing = _Drawn(
            jnp.zeros((rows, 1), jnp.int32),
            jnp.zeros((rows, 1)),
            jnp.zeros((rows, 1)),
            jnp.full((rows, 1, keep), -1, jnp.int32) if keep else None,
            jnp.ones((rows,), bool),
        )
        carried = slots, nothing, jnp.zeros((rows,), jnp.int32)
        slots, drawn, began_B = jax.lax.fori_loop(0, -(-count // some), copy_some, carried)
        # As if the prompt's last token were the one known and not yet run.
        before = slots.cache._replace(length_B=slots.cache.length_B - began_B)
        return _emit(slots._replace(cache=before), drawn, began_B, began=began_B)

    everywhere = sharding.spec()
    others = (row_specs(slots), row_specs(lanes), everywhere, everywhere)
    program = _per_device(copy_and_draw, model, params, *others)
    return program(params, router_bias_LE, slots, lanes, starts, count)


class _Drawn(NamedTuple):
    """Tokens drawn for T positions of each row, and what is known of them."""

    tokens_BT: jax.Array
    log_prob_BT: jax.Array
    sampling_log_prob_BT: jax.Array
    kept_BTX: jax.Array | None
    finite_B: jax.Array


def _logits(model: DeepSeekV3, params: Params, h_BTD: jax.Array) -> jax.Array:
    return cast(jax.Array, model.apply({"params": params}, h_BTD, method="logits"))


def _keep_top_k(slots: Slots) -> int:
    return 0 if slots.kept_BSX is None else slots.kept_BSX.shape[2]


def _drawn(
    logits_BV: jax.Array, controls: Controls, position_B: jax.Array, keep_top_k: int
) -> _Drawn:
    """One token per row."""
    sampling_BV = log_probs(logits_BV, controls)
    token_B = draw(sampling_BV, controls, position_B, SAMPLE)
    one = (token_B[:, None], logits_BV[:, None], sampling_BV[:, None])
    return _described(*one, controls, keep_top_k)


def _described(
    tokens_BT: jax.Array,
    logits_BTV: jax.Array,
    sampling_BTV: jax.Array,
    controls: Controls,
    keep_top_k: int,
) -> _Drawn:
    def of_tokens(log_probs_BTV: jax.Array) -> jax.Array:
        return jnp.take_along_axis(log_probs_BTV, tokens_BT[..., None], axis=-1)[..., 0]

    kept_BTX = None
    if keep_top_k:
        likeliest_BTX, kept_BTX = jax.lax.top_k(sampling_BTV, keep_top_k)
        cut_B11 = (controls.top_k_B > 0)[:, None, None]
        kept_BTX = jnp.where(cut_B11 & (likeliest_BTX > -jnp.inf), kept_BTX, -1)
    return _Drawn(
        tokens_BT,
        of_tokens(jax.nn.log_softmax(logits_BTV.astype(jnp.float32), axis=-1)),
        of_tokens(sampling_BTV),
        kept_BTX,
        ~jnp.isnan(logits_BTV.max((1, 2))) & (logits_BTV.max((1, 2)) < jnp.inf),
    )


def _emit(
    slots: Slots, drawn: _Drawn, count_B: jax.Array, *, began: jax.Array | None = None
) -> Slots:
    """Append the first ``count_B`` of the tokens, as far as stop tokens and limits allow.

    ``began``: rows whose last known token is in the cache already.
    """
    tokens_BT, finite_B = drawn.tokens_BT, drawn.finite_B
    T = tokens_BT.shape[1]
    running_B = slots.status_B == RUNNING
    known_B = slots.cache.length_B + 1
    stops_BT = (tokens_BT[..., None] == slots.stop_BX[:, None]).any(-1)
    before_stop_B = jnp.where(stops_BT.any(1), jnp.argmax(stops_BT, 1) + 1, T)
    count_B = jnp.minimum(jnp.minimum(count_B, before_stop_B), slots.limit_B - known_B)
    count_B = jnp.where(running_B & finite_B, count_B, 0)
    at_BT = known_B[:, None] + jnp.arange(T)
    at_BT = jnp.where(jnp.arange(T) < count_B[:, None], at_BT, slots.tokens_BS.shape[1])
    stopped_B = stops_BT.any(1) & (count_B == before_stop_B)
    now_B = jnp.where(known_B + count_B >= slots.limit_B, FULL, RUNNING)
    now_B = jnp.where(stopped_B, STOPPED, now_B)
    now_B = jnp.where(finite_B, now_B, NOT_FINITE)
    touched_B = running_B if began is None else running_B & (began == 1)
    kept_BSX = slots.kept_BSX
    return slots._replace(
        tokens_BS=_put(slots.tokens_BS, tokens_BT, at_BT),
        log_prob_BS=_put(slots.log_prob_BS, drawn.log_prob_BT, at_BT),
        sampling_log_prob_BS=_put(slots.sampling_log_prob_BS, drawn.sampling_log_prob_BT, at_BT),
        kept_BSX=None if kept_BSX is None else _put(kept_BSX, drawn.kept_BTX, at_BT),
        status_B=jnp.where(touched_B, now_B, slots.status_B),
        cache=slots.cache._replace(length_B=slots.cache.length_B + count_B),
    )


@_compiled(static_argnames=("model", "rounds"), donate_argnames="slots")
def decode(
    model: DeepSeekV3,
    params: Params,
    router_bias_LE: Float[Array, "L E"],
    slots: Slots,
    stopped_B: Int[Array, "B"],
    *,
    rounds: int,
) -> Slots:
    """Continue every running slot by so many rounds; those marked in ``stopped_B`` end before."""

    def run(params, bias_LE, slots, stopped_B):
        slots = slots._replace(status_B=jnp.where(stopped_B == 1, IDLE, slots.status_B))
        one = _one_token if slots.mtp is None else _drafted_tokens
        body = functools.partial(one, model, params, bias_LE)
        return jax.lax.fori_loop(0, rounds, lambda _, slots: body(slots), slots)

    specs, rows = row_specs(slots), sharding.spec("batch")
    return _per_device(run, model, params, specs, rows)(params, router_bias_LE, slots, stopped_B)


def _tokens_at(slots: Slots, at_BT: jax.Array) -> jax.Array:
    at_BT = jnp.clip(at_BT, 0, slots.tokens_BS.shape[1] - 1)
    return jnp.take_along_axis(slots.tokens_BS, at_BT, axis=1)


def _extend(
    model: DeepSeekV3, params: Params, bias_LE: jax.Array, slots: Slots, tokens_BT: jax.Array
) -> tuple[jax.Array, Slots]:
    """The states of further tokens; they are in the cache, but its lengths stay as they were."""
    length_B = slots.cache.length_B
    variables = serving_variables(model, params)
    out: Any = model.apply(variables, tokens_BT, bias_LE, slots.cache, method="extend")
    h_BTD, cache, experts_LBTK = out
    experts = _put_experts(slots.experts_LBSK, experts_LBTK, length_B)
    return h_BTD, slots._replace(cache=cache._replace(length_B=length_B), experts_LBSK=experts)


def _one_token(model: DeepSeekV3, params: Params, bias_LE: jax.Array, slots: Slots) -> Slots:
    length_B = slots.cache.length_B
    h_B1D, slots = _extend(model, params, bias_LE, slots, _tokens_at(slots, length_B[:, None]))
    logits_BV = _logits(model, params, h_B1D)[:, 0]
    drawn = _drawn(logits_BV, slots.controls, length_B + 1, _keep_top_k(slots))
    return _emit(slots, drawn, jnp.ones_like(length_B))


def _drafted_tokens(model: DeepSeekV3, params: Params, bias_LE: jax.Array, slots: Slots) -> Slots:
    """Draft k tokens with the MTP modules, run them through the model at once, keep a prefix.

    The modules' caches are rewritten for the last W positions, since only now are all of the
    tokens known that these depend on. What a refused draft left in a cache lies behind its length
    and is written over before it is seen.
    """
    length_B, controls = slots.cache.length_B, slots.controls
    k = slots.accepted_Bj.shape[1] - 1
    drafts_Bk, draft_BkV, mtp = _draft(model, params, bias_LE, slots, k)
    slots = slots._replace(mtp=mtp)
    tokens_Bj = jnp.concatenate([_tokens_at(slots, length_B[:, None]), drafts_Bk], axis=1)
    h_BjD, slots = _extend(model, params, bias_LE, slots, tokens_Bj)
    logits_BjV = _logits(model, params, h_BjD)
    B, j, V = logits_BjV.shape
    every = jax.tree.map(lambda x: jnp.repeat(x, j, axis=0), controls)
    sampling_BjV = log_probs(logits_BjV.reshape(B * j, V), every).reshape(B, j, V)
    accepted_B, next_B = verify(drafts_Bk, draft_BkV, sampling_BjV, controls, length_B + 1)
    place_B1 = accepted_B[:, None]
    padded_Bj = jnp.pad(drafts_Bk, ((0, 0), (0, 1)))
    tokens_Bj = jnp.where(jnp.arange(j) == place_B1, next_B[:, None], padded_Bj)
    drawn = _described(tokens_Bj, logits_BjV, sampling_BjV, controls, _keep_top_k(slots))
    running_B = slots.status_B == RUNNING
    after = _emit(slots, drawn, accepted_B + 1)
    one_hot_Bj = jax.nn.one_hot(accepted_B, j, dtype=jnp.int32) * running_B[:, None]
    return after._replace(
        window_BWD=_last_window(slots.window_BWD, h_BjD, after.cache.length_B - length_B),
        accepted_Bj=slots.accepted_Bj + one_hot_Bj,
    )


def _draft(
    model: DeepSeekV3, params: Params, bias_LE: jax.Array, slots: Slots, k: int
) -> tuple[jax.Array, jax.Array, KVCache]:
    """Drafts of each row, the distributions they were drawn from, the modules' caches.

    Module j gives draft j (V3 section 2.2.2). Past the last one, it goes on from its own states
    one position further, as if they were the model's.
    """
    assert slots.mtp is not None
    mtp, h_BTD = slots.mtp, slots.window_BWD
    length_B, controls = slots.cache.length_B, slots.controls
    W, D = h_BTD.shape[1], model.config.num_nextn_predict_layers
    # Token i + 1 of every position i of the window; the drafts follow them.
    ahead_BX = _tokens_at(slots, length_B[:, None] + jnp.arange(1 - W, 1))
    drafts, distributions = [], []
    for j in range(1, k + 1):
        depth = min(j, D)
        if j <= D:
            first_B, next_BT = length_B - W, ahead_BX[:, j - 1 : j - 1 + W]
        else:
            first_B, next_BT, h_BTD = length_B + (j - D - 1), ahead_BX[:, -1:], h_BTD[:, -1:]
        out: Any = model.apply(
            {"params": params},
            h_BTD,
            next_BT,
            bias_LE,
            mtp._replace(length_B=first_B),
            depth,
            method="draft",
        )
        h_BTD, mtp = out
        distribution_BV = log_probs(_logits(model, params, h_BTD[:, -1:])[:, 0], controls)
        draft_B = draw(distribution_BV, controls, length_B + j, DRAFT)
        ahead_BX = jnp.concatenate([ahead_BX, draft_B[:, None]], axis=1)
        drafts.append(draft_B)
        distributions.append(distribution_BV)
    return jnp.stack(drafts, 1), jnp.stack(distributions, 1), mtp._replace(length_B=length_B)


@jax.jit
def request_keys(seed_N: Int[Array, "N"], sample_N: Int[Array, "N"]) -> UInt32[Array, "N 2"]:
    """The randomness of samples of prompts, whatever else is generated beside them."""

    def one(seed: jax.Array, sample: jax.Array) -> jax.Array:
        return jax.random.key_data(jax.random.fold_in(jax.random.key(seed), sample))

    return jax.vmap(one)(seed_N, sample_N)
