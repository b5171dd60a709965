"""Continuous batching: many prompts through a fixed number of slots (Yu et al., 2022, "Orca")."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from deepseek_jax import sharding
from deepseek_jax.generate import slots as programs
from deepseek_jax.generate.sampling import Controls
from deepseek_jax.generate.slots import MAX_STOP_TOKENS, Slots, Starts
from deepseek_jax.model.transformer import DeepSeekV3, logical_axes
from deepseek_jax.sharding import LORA_A, LORA_B, SCALE
from deepseek_jax.types import Params, UserError

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The defaults are R1's."""

    max_new_tokens: int = 200
    temperature: float = 0.6
    """0 takes the likeliest token."""
    top_p: float = 0.95
    """Cut to the nucleus of this probability; 1: off."""
    top_k: int = 0
    """Cut to so many likeliest tokens; 0: off."""
    min_p: float = 0.0
    """Cut tokens less likely than this share of the likeliest; 0: off."""
    seed: int = 0
    """Same seed, same text, whatever else is generated at the time."""

    def __post_init__(self) -> None:
        """Refuse what is no distribution."""
        checks = [
            (self.max_new_tokens < 1, f"max_new_tokens={self.max_new_tokens} must be at least 1."),
            (
                not 0 <= self.temperature < math.inf,  # NaN too
                f"temperature={self.temperature} must be 0 or a positive number.",
            ),
            (not 0 < self.top_p <= 1, f"top_p={self.top_p} must lie above 0 and not above 1."),
            (self.top_k < 0, f"top_k={self.top_k} must not be negative (0 is off)."),
            (not 0 <= self.min_p <= 1, f"min_p={self.min_p} must lie between 0 and 1."),
        ]
        for failed, message in checks:
            if failed:
                raise UserError(message)


class Request(NamedTuple):
    """A prompt, and what is wanted of it."""

    prompt: Sequence[int]
    sampling: Sampling
    samples: int = 1
    """Completions; the prompt is read once."""
    stop_tokens: Sequence[int] = ()
    """Ids that end a completion, of which they are the last token."""
    stopped: Callable[[list[int]], int | None] | None = None
    """Of a completion so far: how many of its tokens to keep, if it is to end here."""


class Completion(NamedTuple):
    """One sample of a request."""

    request: int
    """Which request, counted from 0."""
    sample: int
    tokens: list[int]
    finish: Finish
    log_probs: Float[np.ndarray, "T"]
    """Of each token under the model as it is (temperature 1, nothing cut)."""
    sampling_log_probs: Float[np.ndarray, "T"]
    """Of each token under the distribution that it was drawn from."""
    experts_lTK: np.ndarray | None
    """With ``keep_routing``: what each MoE layer chose at every position but the last, the
    prompt's included."""
    kept_TX: np.ndarray | None
    """With ``keep_top_k``: the tokens that each could have been drawn from, padded with -1; all
    -1 where nothing was cut."""
    accepted: np.ndarray
    """Rounds in which 0, 1, ..., k drafts were accepted."""


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine; each is compiled for."""

    slots: int = 8
    """Sequences at a time; rounded up to a multiple of the mesh's batch shards."""
    max_length: int = 1024
    """Tokens of a prompt and its completion together."""
    lanes: int = 4
    """Prompts read at a time, likewise rounded up."""
    prefill_chunk: int = 256
    """Tokens of each prompt read at a time; decoding goes on in between."""
    rounds: int = 8
    """Rounds of decoding between two looks at what has finished."""
    drafts: int = 0
    """Tokens drafted per round by the MTP modules (V3 section 2.2.2); 0: no speculation."""
    cache_dtype: Literal["compute", "fp8"] = "compute"
    keep_routing: bool = False
    """Report which experts were chosen."""
    keep_top_k: int = 0
    """Report which tokens could have been drawn, so many at most; 0: no report."""

    def __post_init__(self) -> None:
        """Refuse sizes that hold nothing."""
        for name in ("slots", "max_length", "lanes", "prefill_chunk", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("drafts", "keep_top_k"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must not be negative (0 is off).")


class _Sequence(NamedTuple):
    request: int
    sample: int
    lane: int


def serving_params(model: DeepSeekV3, params: Params) -> Params:
    """Parameters as serving wants them: in the compute dtype, placed for compute.

    Router gates and norms, which are computed in float32 whatever the precision, stay as they are,
    and so do matrices in FP8, their scales and adapters: a layer makes of them what it needs.
    """
    # A Linen module can be hashed; its stub does not say so.
    axes, mesh = _axes(model), jax.sharding.get_mesh()  # pyrefly: ignore
    leaves, tree = jax.tree.flatten_with_path(params)
    own = jax.tree.leaves(sharding.axes_of(axes, params), is_leaf=lambda x: isinstance(x, tuple))
    dtypes = [
        x.dtype if _stays(path[-1].key, x.dtype, names) else model.precision.compute_dtype
        for (path, x), names in zip(leaves, own, strict=True)
    ]
    if mesh.empty:
        cast = [x.astype(dtype) for (_, x), dtype in zip(leaves, dtypes, strict=True)]
        if sharding.on_gpu():
            cast = [
                _for_gpu(p[-1].key, x, n) for (p, _), x, n in zip(leaves, cast, own, strict=True)
            ]
        return jax.tree.unflatten(tree, cast)
    where = jax.tree.leaves(sharding.param_shardings(mesh, axes, params, stored=False))
    # What is in FP8 is never trained, so its buffers can be shared with whoever holds them.
    moved = [
        i
        for i, (_, x) in enumerate(leaves)
        if x.dtype != jnp.float8_e4m3fn or not x.sharding.is_equivalent_to(where[i], x.ndim)
    ]
    place = _placed(tuple(dtypes[i] for i in moved), tuple(where[i] for i in moved))
    found = dict(zip(moved, place([leaves[i][1] for i in moved]), strict=True))
    return jax.tree.unflatten(tree, [found.get(i, x) for i, (_, x) in enumerate(leaves)])


_axes = functools.lru_cache(maxsize=8)(logical_axes)


def _stays(name: str, dtype: Any, names: tuple[str | None, ...]) -> bool:
    beside = name.endswith((SCALE, LORA_A, LORA_B))
    return names[-1] == "norm" or name == "gate" or dtype == jnp.float8_e4m3fn or beside


def _for_gpu(name: str, x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """FP8 tensor cores want the contracted axis last: in memory it then is, whatever the shape.

    Else every call would begin with transposing the matrices of all layers, and hold both. Not
    ``wkv_b``, which decoding multiplies out in the order of its axes.
    """
    if x.dtype != jnp.float8_e4m3fn or name == "wkv_b":
        return x
    lead, split = sharding.matrix_axes(names)
    stack, inputs, outputs = range(lead), range(lead, split), range(split, x.ndim)
    return jax.device_put(x, Format(Layout((*stack, *outputs, *inputs)), x.sharding))


@functools.lru_cache(maxsize=8)
def _placed(
    dtypes: tuple[Any, ...], where: tuple[jax.sharding.Sharding, ...]
) -> Callable[[list[jax.Array]], list[jax.Array]]:
    """Compiled once: a policy in training is placed anew for every rollout."""

    def cast(leaves: list[jax.Array]) -> list[jax.Array]:
        return [x.astype(dtype) for x, dtype in zip(leaves, dtypes, strict=True)]

    return jax.jit(cast, out_shardings=list(where))


class Engine:
    """Generates with one model and one set of parameters.

    Under ``jax.set_mesh``, slots are divided over the batch axes and weights lie as computation
    wants them. Memory beside the weights: (slots + lanes) * max_length * (R + P) values per layer.

    Slots are whole: a block table would save the part of ``max_length`` that a sequence does not
    use, at 576 values a token and layer where other attentions hold tens of thousands, and cost a
    gather of the whole cache per step in XLA, which has no indirect operand.
    """

    def __init__(
        self,
        model: DeepSeekV3,
        params: Params,
        router_bias_LE: Float[Array, "L E"],
        config: EngineConfig,
    ):
        """Allocate the caches.

        Raises:
            UserError: if the model cannot do what ``config`` asks.
        """
        c = model.config
        if config.max_length > c.max_position_embeddings:
            raise UserError(
                f"max_length={config.max_length} exceeds the model's "
                f"max_position_embeddings={c.max_position_embeddings}."
            )
        if config.drafts and not c.num_nextn_predict_layers:
            raise UserError(
                f"drafts={config.drafts}, but the model has no MTP module to draft with; set it to "
                "0, or load the modules with the model."
            )
        self.config = config
        if not config.drafts and c.num_nextn_predict_layers:
            # Weights that nothing reads need not be placed.
            c = c.replace(num_nextn_predict_layers=0)
            params = {name: x for name, x in params.items() if not name.startswith("mtp")}
        self.model = dataclasses.replace(model, config=c, remat="none")
        mesh = jax.sharding.get_mesh()
        shards = 1 if mesh.empty else sharding.batch_shards(mesh)
        self._rows = -(-config.slots // shards) * shards
        self._lanes = -(-config.lanes // shards) * shards
        self.update(params, router_bias_LE)
        dtype = self.model.precision.compute_dtype
        if config.cache_dtype == "fp8":
            dtype = jnp.float8_e4m3fn
        # Kernels copy slots eight at a time.
        self._slots = -(-config.max_length // 8) * 8
        sizes = (self._slots, dtype, config.drafts)
        routing, most = config.keep_routing, min(config.keep_top_k, c.vocab_size)
        self._state = self._empty(
            lambda: programs.init_slots(
                self.model, self._rows, *sizes, keep_routing=routing, keep_top_k=most
            )
        )
        self._prompts = self._empty(
            lambda: programs.init_lanes(self.model, self._lanes, *sizes, keep_routing=routing)
        )

    def _empty(self, make: Callable[[], Any]) -> Any:
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            return jax.jit(make)()  # every array a buffer of its own, to be donated
        specs = programs.row_specs(jax.eval_shape(make))
        where = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs)
        return jax.jit(make, out_shardings=where)()

    def update(self, params: Params, router_bias_LE: Float[Array, "L E"]) -> None:
        """Generate with these parameters from now on."""
        if not self.model.config.num_nextn_predict_layers:
            params = {name: x for name, x in params.items() if not name.startswith("mtp")}
        self._params = serving_params(self.model, params)
        self._bias_LE = router_bias_LE[: self.model.config.num_routers]

    @property
    def cache_bytes_per_token(self) -> int:
        """Of one token in all layers, the MTP modules' included where they draft."""
        caches = [c for c in (self._state.cache, self._state.mtp) if c is not None]
        each = [x for c in caches for x in jax.tree.leaves(c) if x.ndim > 1]
        return sum(x.nbytes for x in each) // (self._rows * self._slots)

    @property
    def weight_bytes(self) -> int:
        """Of all parameters, each counted once however many devices hold it."""
        return sum(x.nbytes for x in jax.tree.leaves(self._params))

    def check(self, request: Request) -> None:
        """Refuse what cannot be generated.

        Raises:
            UserError: for an empty prompt, an id outside the vocabulary, or one too long.
        """
        V, length = self.model.config.vocab_size, len(request.prompt)
        if not length:
            raise UserError("the prompt is empty; give at least one token (for instance BOS).")
        bad = [id for id in request.prompt if not 0 <= id < V]
        if bad:
            raise UserError(f"a prompt has the id {bad[0]}, outside the vocabulary of {V}.")
        if length >= self.config.max_length:
            raise UserError(
                f"a prompt of {length} tokens leaves no room in max_length="
                f"{self.config.max_length}; shorten it or raise max_length."
            )
        if len(request.stop_tokens) > MAX_STOP_TOKENS:
            raise UserError(f"at most {MAX_STOP_TOKENS} stop tokens are supported.")
        how, most = request.sampling, self.config.keep_top_k
        cut = how.temperature > 0 and (how.top_p < 1 or how.min_p > 0 or how.top_k > 0)
        if most and cut and not 0 < how.top_k <= most:
            raise UserError(
                f"with top_k={how.top_k} a token may be one of more than the keep_top_k={most} "
                f"that are reported; sample with top_k between 1 and {most}."
            )
        if request.samples < 1:
            raise UserError(f"samples={request.samples} must be at least 1.")

    def generate(
        self,
        requests: Iterable[Request],
        on_tokens: Callable[[int, int, list[int]], None] | None = None,
    ) -> Iterator[Completion]:
        """Completions in the order in which they finish.

        A completion ends at a stop token, at its ``max_new_tokens`` or where ``max_length`` is
        reached. ``on_tokens(request, sample, tokens)`` gets the tokens so far after each look.
        Closing the iterator leaves the engine ready for the next call.

        Raises:
            UserError: for a request that cannot be generated; before any is, if ``requests`` is
                a sequence. And if the model's logits are not finite.
        """
        if isinstance(requests, Sequence):
            for request in requests:
                self.check(request)
        return _Run(self, iter(requests), on_tokens).completions()


class _Run:
    """One call of ``Engine.generate``: which sequence is where."""

    def __init__(self, engine: Engine, requests: Iterator[Request], on_tokens: Any):
        self.engine, self.source, self.on_tokens = engine, enumerate(requests), on_tokens
        self.requests: dict[int, Request] = {}
        self.running: dict[int, _Sequence] = {}
        self.ready: collections.deque[_Sequence] = collections.deque()
        self.reading: dict[int, tuple[int, int]] = {}  # lane -> request, tokens read
        self.exhausted = False

    def completions(self) -> Iterator[Completion]:
        engine = self.engine
        stopped_B = np.ones(engine._rows, np.int32)  # whatever an earlier call left
        while True:
            self._read_prompts()
            stopped_B = self._start(stopped_B)
            if not self.running:
                if self.reading or self.ready or not self.exhausted:
                    continue
                return
            engine._state = programs.decode(
                engine.model,
                engine._params,
                engine._bias_LE,
                engine._state,
                stopped_B,
                rounds=engine.config.rounds,
            )
            stopped_B = np.zeros(engine._rows, np.int32)
            yield from self._finished(stopped_B)

    def _free_lanes(self) -> list[int]:
        taken = {sequence.lane for sequence in self.ready} | set(self.reading)
        return [lane for lane in range(self.engine._lanes) if lane not in taken]

    def _read_prompts(self) -> None:
        """One more chunk of every prompt that is being read, new ones in free lanes among them."""
        engine, T = self.engine, self.engine.config.prefill_chunk
        free = self._free_lanes() if len(self.ready) < engine._rows else []
        for lane in free:
            following = next(self.source, None)
            if following is None:
                self.exhausted = True
                break
            index, request = following
            engine.check(request)
            self.requests[index] = request
            self.reading[lane] = (index, 0)
        if not self.reading:
            return
        tokens_BT = np.zeros((engine._lanes, T), np.int32)
        next_BT, (count_B, fresh_B) = tokens_BT.copy(), np.zeros((2, engine._lanes), np.int32)
        for lane, (index, read) in list(self.reading.items()):
            prompt = np.asarray(self.requests[index].prompt, np.int32)
            now, ahead = prompt[read : read + T], prompt[read + 1 : read + 1 + T]
            tokens_BT[lane, : len(now)], next_BT[lane, : len(ahead)] = now, ahead
            count_B[lane], fresh_B[lane] = len(now), read == 0
            if read + T < len(prompt):
                self.reading[lane] = (index, read + T)
                continue
            del self.reading[lane]
            for sample in range(self.requests[index].samples):
                self.ready.append(_Sequence(index, sample, lane))
        engine._prompts = programs.prefill(
            engine.model,
            engine._params,
            engine._bias_LE,
            engine._prompts,
            tokens_BT,
            next_BT,
            count_B,
            fresh_B,
        )

    def _start(self, stopped_B: np.ndarray) -> np.ndarray:
        """Put what is ready into free slots; they are no longer to be stopped."""
        engine, rows = self.engine, self.engine._rows
        free = [slot for slot in range(rows) if slot not in self.running]
        lane_N, slot_N, limit_N, top_k_N, sample_N = np.zeros((5, rows), np.int32)
        temperature_N, top_p_N, min_p_N = np.zeros((3, rows), np.float32)
        seed_N = np.zeros(rows, np.int64)
        stop_NX = np.full((rows, MAX_STOP_TOKENS), -1, np.int32)
        count = 0
        while free and self.ready:
            slot, sequence = free.pop(0), self.ready.popleft()
            request = self.requests[sequence.request]
            how, length = request.sampling, len(request.prompt)
            lane_N[count], slot_N[count] = sequence.lane, slot
            limit_N[count] = min(length + how.max_new_tokens, engine.config.max_length)
            stop_NX[count, : len(request.stop_tokens)] = request.stop_tokens
            temperature_N[count], top_p_N[count] = how.temperature, how.top_p
            top_k_N[count], min_p_N[count] = how.top_k, how.min_p
            seed_N[count], sample_N[count] = how.seed, sequence.sample
            self.running[slot] = sequence
            stopped_B[slot] = 0
            count += 1
        if count:
            key_N2 = np.asarray(programs.request_keys(seed_N, sample_N))
            controls = Controls(temperature_N, top_p_N, top_k_N, min_p_N, key_N2)
            engine._state = programs.start(
                engine.model,
                engine._params,
                engine._bias_LE,
                engine._state,
                engine._prompts,
                Starts(lane_N, slot_N, limit_N, stop_NX, controls),
                np.int32(count),
            )
        return stopped_B

    def _finished(self, stopped_B: np.ndarray) -> Iterator[Completion]:
        """What has ended; slots that end for a reason of the host are marked to be stopped."""
        status_B, length_B = _on_host(
            (self.engine._state.status_B, self.engine._state.cache.length_B)
        )
        watched = self.on_tokens is not None or any(
            self.requests[sequence.request].stopped for sequence in self.running.values()
        )
        ended = any(status_B[slot] != programs.RUNNING for slot in self.running)
        if not (watched or ended):
            return
        state, wide = _fetch(self.engine._state), None
        for slot, sequence in list(self.running.items()):
            request = self.requests[sequence.request]
            status, first = int(status_B[slot]), len(request.prompt)
            if status == programs.RUNNING and not watched:
                continue
            tokens = state.tokens_BS[slot, first : length_B[slot] + 1].tolist()
            if status == programs.NOT_FINITE:
                raise UserError(
                    "the model's logits are not finite; its parameters are damaged or their number "
                    "format is too narrow (try compute=float32)."
                )
            keep = request.stopped(tokens) if request.stopped is not None else None
            if keep is not None:
                tokens, stopped_B[slot] = tokens[:keep], 1
            if self.on_tokens is not None:
                self.on_tokens(sequence.request, sequence.sample, tokens)
            if keep is None and status == programs.RUNNING:
                continue
            del self.running[slot]
            by_stop = keep is not None or status == programs.STOPPED
            where = slice(first, first + len(tokens))
            # Some hundred numbers per token: looked at only when a sequence has ended.
            wide = _fetch_wide(self.engine._state) if wide is None else wide
            experts_LBSK, kept_BSX = wide
            experts = None if experts_LBSK is None else experts_LBSK[:, slot, : where.stop - 1]
            yield Completion(
                sequence.request,
                sequence.sample,
                tokens,
                "stop" if by_stop else "length",
                state.log_prob_BS[slot, where],
                state.sampling_log_prob_BS[slot, where],
                experts,
                None if kept_BSX is None else kept_BSX[slot, where],
                state.accepted_Bj[slot],
            )


class _Fetched(NamedTuple):
    """What the host looks at where a sequence has ended, or somebody follows its tokens."""

    tokens_BS: np.ndarray
    log_prob_BS: np.ndarray
    sampling_log_prob_BS: np.ndarray
    accepted_Bj: np.ndarray


def _fetch(slots: Slots) -> _Fetched:
    wanted = (
        slots.tokens_BS,
        slots.log_prob_BS,
        slots.sampling_log_prob_BS,
        slots.accepted_Bj,
    )
    return _Fetched(*_on_host(wanted))


def _fetch_wide(slots: Slots) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Experts ``[l, B, S, K]`` and kept tokens ``[B, S, X]``."""
    return _on_host((slots.experts_LBSK, slots.kept_BSX))


def _on_host(wanted: Any) -> Any:
    mesh = jax.sharding.get_mesh()
    if not mesh.empty and jax.process_count() > 1:  # rows of other hosts
        wanted = _gather(sharding.sharding(mesh))(wanted)
    return jax.device_get(wanted)


@functools.cache
def _gather(everywhere: NamedSharding) -> Callable[[Any], Any]:
    # Kept: made anew it would be compiled at every look at the slots.
    return jax.jit(lambda x: x, out_shardings=everywhere)
