"""The loop around the training step, the same for every stage that learns from batches."""

import contextlib
import dataclasses
import math
import os
import signal
import statistics
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_origin, get_type_hints

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from deepseek_jax import distributed, sharding
from deepseek_jax.checkpoint import Checkpointer, Restored
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.feed import Feed, TrainRows, make_feed
from deepseek_jax.model.transformer import DeepSeekV3
from deepseek_jax.report import LossMonitor, MetricsWriter, Progress
from deepseek_jax.train.optim import OptimConfig, Schedule, batch_ramp, batch_ramp_stairs
from deepseek_jax.train.step import BATCH_SPEC, Metrics, TrainStep
from deepseek_jax.types import Batch, Params, TrainState, UserError


@dataclass(frozen=True)
class LoopConfig:
    """How long, how much at a time, and what is kept."""

    steps: int | None = None
    """Optimizer steps (GRPO: rollouts). None: 1000; in fine-tuning, as many as make its epochs."""
    batch_size: int = 16
    """Sequences per optimizer step, over all devices."""
    micro_batch: int | None = None
    """Sequences at a time, gradients accumulated. None: at once."""
    first_batch_size: int | None = None
    """Where the batch-size ramp begins (V3: 3072). None: no ramp."""
    ramp_fraction: float = 0.469 / 14.8
    """Share of the run's tokens that the ramp takes (V3: 469B of 14.8T)."""
    eval_every: int = 200
    """Steps between evaluations on the held-out split; 0: at the end alone."""
    eval_batches: int | None = 8
    """Batches of an evaluation during the run; the one at the end takes the whole split."""
    save_every: int = 200
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 3
    keep_every: int | None = None
    """Also keep for ever each step that is a multiple of this."""
    max_skips: int = 8
    """Steps skipped in a row (loss not finite, or a spike) after which the run stops."""
    max_total_skips: int = 100
    """Steps skipped in all after which it stops."""
    init_seed: int = 0
    """Of the initial weights, and of the sample at the end."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not divide one another."""
        if min(self.total_steps, self.save_every, self.keep_last, self.max_skips) < 1:
            raise UserError("steps, save_every, keep_last and max_skips must be at least 1.")
        optional = "micro_batch", "first_batch_size", "eval_batches", "keep_every"
        for name in ("batch_size", "max_total_skips", *optional):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise UserError(f"{name} must be at least 1, not {number}.")
        if self.eval_every < 0:
            raise UserError(f"eval_every={self.eval_every} must not be negative; 0: at the end.")
        for name in ("batch_size", "first_batch_size"):
            size = getattr(self, name)
            if size is not None and size % self.rows:
                raise UserError(f"{name}={size} must be a multiple of micro_batch={self.rows}.")
        if self.first_batch_size is not None and self.first_batch_size > self.batch_size:
            raise UserError(
                f"the ramp goes up: first_batch_size={self.first_batch_size} exceeds "
                f"batch_size={self.batch_size}."
            )

    @property
    def total_steps(self) -> int:
        """``steps``, or their default."""
        return 1000 if self.steps is None else self.steps

    @property
    def rows(self) -> int:
        """Sequences of one micro-batch."""
        return getattr(self, self.rows_option)

    @property
    def rows_option(self) -> str:
        """The option that says so."""
        if self.micro_batch is not None:
            return "micro_batch"
        return "batch_size" if self.first_batch_size is None else "first_batch_size"

    def micro_batches(self, step: int) -> int:
        """How many micro-batches step ``step`` (from 0) accumulates."""
        return self._ramp(self.ramp_steps)(step) // self.rows

    @property
    def ramp_steps(self) -> int:
        """Steps of the ramp: more than its share of them, as its batches are smaller."""
        if self.first_batch_size is None:
            return 0
        stairs = batch_ramp_stairs(self.first_batch_size, self.batch_size, self.rows)
        mean = statistics.mean(map(self._ramp(stairs), range(stairs)))
        share, last = self.ramp_fraction, self.batch_size
        # Of r steps of it: r mean = share (r mean + (total - r) last).
        return round(share * self.total_steps * last / (mean * (1 - share) + share * last))

    def _ramp(self, steps: int) -> Callable[[int], int]:
        first = self.first_batch_size or self.batch_size
        return batch_ramp(first, self.batch_size, steps, self.rows)

    def in_steps(self, optim: OptimConfig) -> OptimConfig:
        """The schedule with its fractions, which are of tokens, as fractions of the steps.

        They differ where there is a ramp, since a step of it sees less.
        """
        if self.first_batch_size is None:
            return optim
        steps, size = self.ramp_steps, self._ramp(self.ramp_steps)
        seen = np.cumsum([0, *map(size, range(steps))])
        total = seen[-1] + (self.total_steps - steps) * self.batch_size

        def of_steps(fraction: float) -> float:
            wanted = fraction * total
            if wanted <= seen[-1]:
                return float(np.searchsorted(seen, wanted)) / self.total_steps
            return min((steps + (wanted - seen[-1]) / self.batch_size) / self.total_steps, 1.0)

        return dataclasses.replace(
            optim,
            constant_until=of_steps(optim.constant_until),
            cosine_until=of_steps(optim.cosine_until),
            min_until=of_steps(optim.min_until),
        )


class Evaluation(NamedTuple):
    """Held-out figures."""

    loss: float
    """Nats per token."""
    bits_per_byte: float

    def scalars(self) -> dict[str, float]:
        """As they are named in the metrics."""
        return {
            "eval_loss": self.loss,
            "eval_perplexity": math.exp(min(self.loss, 700.0)),
            "eval_bits_per_byte": self.bits_per_byte,
        }


class Task(NamedTuple):
    """What the loop works on; made by a stage (``pretrain``, ...)."""

    model: DeepSeekV3
    """What the step trains, for XLA's options."""
    step: TrainStep
    batches: TrainRows
    """This process's rows of the micro-batches."""
    feed: Feed
    """How they become global batches."""
    learning_rate: Schedule
    evaluate: Callable[[TrainState, int | None], Evaluation] | None = None
    """``evaluate(state, batches)``: on so many batches, or on all; None: nothing is held out."""
    flops_per_token: float = 0.0
    peak_flops: float | None = None
    """Of all devices together, where known."""
    spike_margin: float = 1.0
    """How far above the recent ones a loss is always normal: ``LossMonitor``'s ``min_margin``."""
    shown: tuple[str, ...] = ()
    """Metrics shown beside the loss."""
    frozen: Params = {}  # noqa: RUF012, never written to
    """Parameters that the step reads and leaves as they are, by name."""
    sample: Callable[[TrainState, int], str] | None = None
    """``sample(state, step)``: what the model says so far, shown at every evaluation."""


class OpenRun(NamedTuple):
    """Where a run stands, and where it writes."""

    state: TrainState
    """At the beginning, or as restored."""
    checkpointer: Checkpointer
    writer: MetricsWriter
    restored: Restored | None = None
    """What the run is continued from."""

    @property
    def step(self) -> int:
        """The steps that have been made."""
        return self.restored.step if self.restored else 0


class Outcome(NamedTuple):
    """How ``fit`` ended."""

    state: TrainState
    step: int
    finished: bool
    """False after SIGTERM or SIGINT: all is saved, ``--resume`` continues."""
    first_load_LE: np.ndarray
    """Tokens per expert in the first step; 0 where none was made."""
    last_load_LE: np.ndarray


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """SIGTERM and SIGINT are noted and answered between two steps; a second SIGINT kills.

    Where several processes train together JAX listens for SIGTERM, so that all stop at one step.
    """
    requested = False

    def note(signum: int, _: Any) -> None:
        nonlocal requested
        requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if together:
            os.kill(os.getpid(), signal.SIGTERM)

    together = jax.process_count() > 1
    signals = (signal.SIGINT,) if together else (signal.SIGTERM, signal.SIGINT)
    before = {s: signal.signal(s, note) for s in signals}
    try:
        yield lambda: requested and not together
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def stopped_at(step: int) -> str:
    """What is said of a run that was asked to stop when it had made so many steps."""
    if not step:
        return "stopped before the first step, nothing was saved; begin again with --resume."
    return f"stopped and saved at step {step}; continue with --resume."


def fit(task: Task, config: LoopConfig, run: OpenRun, *, started: float | None = None) -> Outcome:
    """Train from where the run stands to ``config.total_steps``.

    ``started`` is when the stage began, by ``time.perf_counter``; the first step says how long
    it has been since.

    Raises:
        UserError: too many steps were skipped, or a checkpoint could not be written. The last
            good checkpoint is intact either way.
    """
    state, checkpointer, writer, restored = run
    monitor = LossMonitor(
        max_consecutive=config.max_skips,
        max_total=config.max_total_skips,
        min_margin=task.spike_margin,
    )
    first, tokens = run.step, 0
    first_load = last_load = None
    key = jax.random.key(config.init_seed)
    if restored is not None:
        key = restored.rng
        task.batches.set_state(restored.data_states)
        monitor.load(restored.extra["monitor"])
        first_load, last_load = (np.asarray(restored.extra[k]) for k in ("first_load", "last_load"))
        tokens = restored.extra["tokens"]
    # Waiting for each step's loss before the next is started keeps the spike threshold, and so
    # the run, the same whether or not it was interrupted; the next batch is made meanwhile.
    train_step = jit_step(task.step, state, task.model)
    saved = first

    def save(step: int) -> None:
        extra = {
            "monitor": monitor.state(),
            "first_load": np.asarray(first_load).tolist(),
            "last_load": np.asarray(last_load).tolist(),
            "tokens": tokens,
        }
        checkpointer.save(step, state, data_state=data_state, rng=key, extra=extra)

    step = first
    data_state = task.batches.get_state()
    with stop_requests() as stop, Progress(config.total_steps, initial=first) as progress:
        batch = _next_batch(task, config, step) if step < config.total_steps else None
        while step < config.total_steps and not (stop() or distributed.stop_agreed(step)):
            began = time.perf_counter()
            assert batch is not None
            size = batch.tokens_BT.size
            state, metrics = train_step(state, batch, np.float32(monitor.threshold()), task.frozen)
            data_state = task.batches.get_state()
            if step + 1 < config.total_steps:
                batch = _next_batch(task, config, step + 1)
            metrics = jax.device_get(metrics)
            ended = time.perf_counter()
            seconds = ended - began
            if started is not None:
                progress.print(
                    f"first step done {ended - started:.1f} s after the start, {seconds:.1f} s of "
                    "it compiling and computing the step"
                )
                started = None
            step, tokens = step + 1, tokens + size
            last_load = metrics.pop("load_LE")
            first_load = last_load if first_load is None else first_load
            line = _scalars(task, metrics, state, size / seconds) | {"tokens": tokens}
            skipped = bool(line.pop("skipped"))
            # Written before the monitor ends a run that diverges, which its owner will look into.
            writer.write(step, line | {"skipped": monitor.skipped + skipped})
            if monitor.observe(step, line["loss"], skipped=skipped):
                progress.print(f"step {step} skipped: loss {line['loss']:.4g}")
            shown = {name: line[name] for name in ("loss", *task.shown)}
            progress.update(step, tokens_per_s=size / seconds, **shown)
            due = config.eval_every and step % config.eval_every == 0 and step < config.total_steps
            if task.evaluate is not None and due:
                evaluation = task.evaluate(state, config.eval_batches)
                writer.write(step, evaluation.scalars())
                progress.print(
                    f"step {step}: held-out loss {evaluation.loss:.4f}, "
                    f"{evaluation.bits_per_byte:.4f} bits per byte"
                )
                if task.sample is not None:
                    progress.print(task.sample(state, step))
            if step % config.save_every == 0:
                save(step)
                saved = step
        if step > saved:
            save(step)
        checkpointer.wait()
        if step < config.total_steps:
            progress.print(stopped_at(step))
    if first_load is None or last_load is None:  # stopped before there was any
        first_load = last_load = np.zeros(state.router_bias_LE.shape, np.int32)
    return Outcome(state, step, step == config.total_steps, first_load, last_load)


def compiler_options(mesh: Mesh, model: DeepSeekV3) -> dict[str, Any]:
    """XLA's options for a training step on these devices; what each brought: docs/performance.md.

    On TPUs every exchange of tokens is synchronous by default, and nothing can run under it.

    On GPUs XLA plans with 76% of the memory, however much of it this process may take, and what
    does not fit there it computes again. So it is told how much that is.

    And it can have kernels read from the stacks of all layers, and write into them, in place of
    copies. But where a result is both used and kept for the backward pass, it runs the kernel
    twice. In FP8 little of what is kept is used as well; in BF16, and where everything is kept,
    that costs more than the copies.
    """
    (platform,) = {device.platform for device in mesh.devices.flat}
    options = sharding.exchange_options(mesh)
    if platform == "tpu":
        options["xla_tpu_enable_async_ragged_all_to_all"] = "true"
        options["xla_tpu_enable_async_all_to_all"] = "true"
    if platform == "gpu":
        in_place = model.precision.matmuls == "fp8" and model.remat != "none"
        options["xla_gpu_enable_dynamic_slice_fusion"] = in_place
        names = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
        fraction = next((float(os.environ[name]) for name in names if os.environ.get(name)), 0.75)
        options["xla_gpu_memory_limit_slop_factor"] = round(100 * fraction / 0.8)
    return options


def jit_step(step: TrainStep, state: TrainState, model: DeepSeekV3) -> TrainStep:
    """Compile with donation; every leaf stays where it was, and every process sees the metrics."""
    where = jax.tree.map(lambda x: x.sharding, state)
    mesh = getattr(where.step, "mesh", None)
    if not isinstance(mesh, Mesh):  # a device by itself
        mesh = Mesh(np.array(list(where.step.device_set)), ("data",))
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(where, where.step),
        compiler_options=compiler_options(mesh, model) or None,
    )


def _next_batch(task: Task, config: LoopConfig, step: int) -> Batch:
    return task.feed.place([next(task.batches) for _ in range(config.micro_batches(step))])


def _scalars(
    task: Task, metrics: Metrics, state: TrainState, tokens_per_s: float
) -> dict[str, float]:
    line = {name: float(value) for name, value in metrics.items()}
    # The state counts the updates applied; the one just made used the rate of the one before.
    applied = int(state.step) - (0 if line["skipped"] else 1)
    line |= {"learning_rate": float(task.learning_rate(applied)), "tokens_per_s": tokens_per_s}
    if task.peak_flops is not None:
        line["mfu"] = tokens_per_s * task.flops_per_token / task.peak_flops
    return line


def divide_batch(
    rows: int,
    seq_len: int,
    mesh: Mesh,
    *,
    option: str = "the rows at a time",
    resume: bool = False,
) -> Feed:
    """This process's share of micro-batches of ``rows`` sequences.

    ``option`` said how many, which a run that is resumed cannot change.

    Raises:
        UserError: if they cannot be divided evenly over the mesh.
    """
    where = NamedSharding(mesh, BATCH_SPEC)
    shards, parts = _parts(where, 1), _parts(where, 2)
    if rows % shards:
        remedy = f"make {option} a multiple of {shards}."
        if resume:
            remedy = f"a run keeps its {option}, so choose a mesh whose batch shards divide {rows}."
        raise UserError(
            f"{rows} sequences cannot be divided over {shards} batch shards of the mesh "
            f"({dict(mesh.shape)}); {remedy}"
        )
    if seq_len % parts:
        raise UserError(
            f"sequences of {seq_len} tokens cannot be divided into {parts} parts, as the mesh "
            f"({dict(mesh.shape)}) asks; make seq_len a multiple of {parts}."
        )
    return make_feed(where, rows, seq_len)


def _parts(where: NamedSharding, dim: int) -> int:
    axes = where.spec[dim] or ()
    return math.prod(where.mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes))


def to_json(config: Any) -> Any:
    """A configuration as JSON values, for ``run.json``."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [to_json(x) for x in config]
    return config if isinstance(config, str | int | float | bool | None) else str(config)


def from_json(kind: Any, value: Any) -> Any:
    """The inverse of ``to_json`` for a type of configuration; ``model`` is a config.json."""
    if kind is ModelConfig:
        return ModelConfig.from_hf(value)
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        known = [f.name for f in dataclasses.fields(kind) if f.name in value]
        return kind(**{name: from_json(hints[name], value[name]) for name in known})
    if isinstance(kind, types.UnionType):
        inner = [k for k in kind.__args__ if k is not type(None)]
        return None if value is None else from_json(inner[0], value)
    if value is not None and get_origin(kind) is tuple:
        return tuple(value)
    return Path(value) if kind is Path and value is not None else value
