"""The real training step, or the real decode step, compiled for devices that need not exist."""

import functools
import math
import re
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from deepseek_jax import sharding
from deepseek_jax.convert import fp8_params
from deepseek_jax.model import transformer
from deepseek_jax.model.attention import CACHE_BLOCKS, KEY_BLOCK
from deepseek_jax.model.transformer import (
    DeepSeekV3,
    cache_specs,
    init_cache,
    init_router_bias,
    sharded_params,
)
from deepseek_jax.train.loop import jit_step
from deepseek_jax.train.lora import LoraConfig, adapter_of
from deepseek_jax.train.losses import pretrain_loss
from deepseek_jax.train.optim import OptimConfig, bias_speed, make_optimizer, mtp_weight
from deepseek_jax.train.run import all_of
from deepseek_jax.train.step import BATCH_SPEC, abstract_state, make_train_step
from deepseek_jax.types import Batch, UserError

# Schedules need an end; nothing that is compiled depends on where it is.
_STEPS = 100_000
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Memory(NamedTuple):
    """Bytes of a device, as XLA has laid them out."""

    arguments: int
    outputs: int
    aliased: int
    """Outputs that take the place of donated arguments."""
    temporaries: int
    code: int

    @property
    def peak(self) -> int:
        """All that is held at once at the worst moment."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


class Compiled(NamedTuple):
    """A program, or the reason why there is none."""

    text: str
    """Optimized HLO."""
    memory: Memory | None
    flops_once: float
    """XLA's own count, bodies of loops once."""
    trace_seconds: float
    compile_seconds: float
    too_large: str = ""
    """What the compiler said, if the program does not fit the device."""
    needed: float = 0.0
    """Bytes that it would have needed, where the compiler said so."""


class Step(NamedTuple):
    """A step that can be compiled."""

    lower: Callable[[], Any]
    """Traces and lowers it, under the mesh."""
    arguments: int
    """Bytes of its arguments on a device."""
    open_trips: Mapping[str, int] = MappingProxyType({})
    """Of loops whose trips depend on data; see ``hlo.parse``."""


def training_step(
    model: DeepSeekV3,
    optim: OptimConfig,
    mesh: Mesh,
    micro_batches: int,
    rows: int,
    seq_len: int,
    lora: LoraConfig | None = None,
) -> Step:
    """What ``pretrain`` runs: loss, gradients, clip, Adam, router bias, the state donated.

    With ``lora``, what ``sft`` runs: the parameters are read, and an adapter's are trained.
    """
    tx = make_optimizer(optim, _STEPS)
    weight = mtp_weight(optim, _STEPS)
    trainee = all_of(model, mesh)
    if lora is not None and lora.lora_rank:
        base = trainee.abstract
        base = fp8_params(model.config, base) if lora.lora_base == "fp8" else base
        trainee = adapter_of(model, lora, base, mesh)

    def loss_fn(params, router_bias_LE, batch, totals, step, **frozen):
        params = trainee.whole(params, **frozen)
        return pretrain_loss(model, params, router_bias_LE, batch, totals, weight(step))

    speed = bias_speed(optim, _STEPS)
    axes = {"axes": trainee.axes, "frozen_axes": trainee.frozen_axes}
    step = make_train_step(model, tx, loss_fn, speed, **axes)
    state = abstract_state(model, tx, mesh, trainee.abstract)
    where = NamedSharding(mesh, BATCH_SPEC)

    def array(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((micro_batches, rows, seq_len), dtype, sharding=where)

    ints = array(jnp.int32)
    batch = Batch(ints, ints, array(jnp.float32), ints, ints)
    limit = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.sharding(mesh))
    jitted: Any = jit_step(step, state, model)
    held = _bytes((state, batch, trainee.frozen))
    return Step(lambda: jitted.lower(state, batch, limit, trainee.frozen), held)


def decode_step(model: DeepSeekV3, mesh: Mesh, rows: int, slots: int, *, fp8: bool = False) -> Step:
    """One token for every row, from and into a latent cache that is donated.

    Weights lie as computation wants them (``stored=False``), as they do in serving; ``fp8``: in
    FP8, as a checkpoint has them.
    """
    config, dtype = model.config, model.precision.compute_dtype
    params = sharded_params(model, mesh, stored=False)
    params = fp8_params(config, params) if fp8 else params
    shapes = jax.eval_shape(lambda: init_cache(config, rows, slots, dtype))
    cache = _placed(mesh, shapes, cache_specs(shapes))
    bias = _placed(mesh, jax.eval_shape(lambda: init_router_bias(config)), sharding.spec())
    tokens = jax.ShapeDtypeStruct((rows, 1), jnp.int32, sharding=sharding.sharding(mesh, "batch"))
    jitted: Any = jax.jit(functools.partial(transformer.decode_step, model), donate_argnums=3)
    arguments = (params, bias, tokens, cache)
    # Attention over a cache that is full: the first block stands before the loop.
    open_trips = {CACHE_BLOCKS: -(-slots // KEY_BLOCK) - 1}
    return Step(lambda: jitted.lower(*arguments), _bytes(arguments), open_trips)


def _placed(mesh: Mesh, shapes: Any, specs: Any) -> Any:
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        shapes,
        specs,
    )


def _bytes(tree: Any) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def compile_step(step: Step, mesh: Mesh, say: Callable[[str], None]) -> Compiled:
    """Trace, lower and compile under the mesh; ``say`` hears which of them is under way."""
    started = time.perf_counter()
    with jax.set_mesh(mesh):
        say("tracing")
        lowered = step.lower()
        traced = time.perf_counter()
        say("compiling")
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            message = str(error)
            if "RESOURCE_EXHAUSTED" not in message:
                raise
            seconds = time.perf_counter() - traced
            needed = needed_bytes(message, step.arguments)
            return Compiled("", None, 0.0, traced - started, seconds, message, needed)
        seconds = time.perf_counter() - traced
    say("reading")
    stats = compiled.memory_analysis()
    memory = Memory(
        stats.argument_size_in_bytes,
        stats.output_size_in_bytes,
        stats.alias_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.generated_code_size_in_bytes,
    )
    flops = float((compiled.cost_analysis() or {}).get("flops", 0.0))
    return Compiled(compiled.as_text(), memory, flops, traced - started, seconds)


def needed_bytes(message: str, arguments: int) -> float:
    """The memory that a program would have needed, by XLA's complaint; 0 if it names no size.

    Where temporaries alone are too large it says nothing of the arguments.
    """
    if found := re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message):
        return float(found[1]) * _UNITS[found[2]]
    if found := re.search(r"temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM", message):
        return float(found[1]) * _UNITS[found[2]] + arguments
    return 0.0


def check_rows(rows: int, micro_batches: int, seq_len: int, mesh: Mesh) -> None:
    """Refuse a batch that the mesh cannot divide.

    Raises:
        UserError: naming the sizes.
    """
    shards = sharding.batch_shards(mesh)
    if min(rows, micro_batches, seq_len) < 1 or rows % micro_batches:
        raise UserError(
            f"{rows} sequences cannot be taken in {micro_batches} micro-batches of whole sequences."
        )
    if rows // micro_batches % shards:
        raise UserError(
            f"{rows // micro_batches} sequences cannot be divided over {shards} batch shards of "
            f"the mesh; make batch a multiple of {shards * micro_batches}."
        )
    if seq_len % sharding.sequence_shards(mesh):
        raise UserError(
            f"a sequence of {seq_len} cannot be divided over {sharding.sequence_shards(mesh)} "
            "shards of the context axis."
        )
