"""What the stages that learn from batches share: a run's configuration, its start, its course."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax import sharding
from deepseek_jax.checkpoint import Checkpointer, load_params
from deepseek_jax.checkpoint.files import local_path
from deepseek_jax.checkpoint.run_directory import NO_RESUME, read_run
from deepseek_jax.config import ModelConfig, Precision, RematPolicy
from deepseek_jax.convert import fp8_params, load_hf
from deepseek_jax.convert.folder import HFFolder
from deepseek_jax.data.feed import Feed, OpenStream, TrainRows
from deepseek_jax.data.pipeline import EvalBatch
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.model.dispatch import ExpertParallel
from deepseek_jax.model.transformer import DeepSeekV3, logical_axes, param_counts, sharded_params
from deepseek_jax.plan import training_flops_per_token
from deepseek_jax.report import (
    MetricsWriter,
    Progress,
    peak_flops,
    plot_expert_load,
    plot_loss,
    read_metrics,
)
from deepseek_jax.train.loop import (
    Evaluation,
    LoopConfig,
    OpenRun,
    Outcome,
    Task,
    fit,
    from_json,
    to_json,
)
from deepseek_jax.train.losses import batch_nats, head, hidden_states
from deepseek_jax.train.optim import OptimConfig, bias_speed, learning_rate
from deepseek_jax.train.step import BATCH_SPEC, LossFn, abstract_state, make_train_step
from deepseek_jax.types import Array, Batch, Params, TrainState, UserError

# What --resume may change: nothing here alters the steps already made.
MAY_CHANGE = (
    "mesh",
    "remat",
    "parallel",
    "resume",
    "out",
    "init",
    "loop.steps",
    "loop.eval_every",
    "loop.eval_batches",
    "loop.save_every",
    "loop.keep_last",
    "loop.keep_every",
    "loop.max_skips",
    "loop.max_total_skips",
)


@dataclass(frozen=True)
class StageConfig:
    """Which run it is, where it starts and where it happens."""

    stage: ClassVar[str] = ""
    out: Path = Path("out/run")
    """Directory of the run: checkpoints, metrics, pictures, tokenizer."""
    resume: bool = False
    """Continue the run in ``out`` from its last checkpoint."""
    init: Path | None = None
    """Start from these weights: a run's directory, or a Hugging Face folder."""
    mesh: str = "data=-1"
    """Devices over data, fsdp, expert, context and tensor, as in data=2,expert=4; -1 fills one."""


@dataclass(frozen=True)
class RunConfig(StageConfig):
    """What a run of any stage of the policy is made with."""

    remat: RematPolicy = "none"
    """What the backward pass computes again: nothing, all, or the V3 report's selection, which on a
    GPU is the fastest for all but small models."""
    parallel: ExpertParallel = field(default_factory=ExpertParallel)
    precision: Precision = field(default_factory=Precision)
    loop: LoopConfig = field(default_factory=LoopConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    @property
    def schedule(self) -> OptimConfig:
        """``optim`` with fractions of the steps, where the batch-size ramp makes that another."""
        return self.loop.in_steps(self.optim)


Config = TypeVar("Config", bound=StageConfig)


class Trainee(NamedTuple):
    """A model, and which of its parameters are trained."""

    model: DeepSeekV3
    frozen: Params
    """Trees of arrays by name, which the step reads and nothing updates."""
    axes: Params
    """Logical axes of the trained parameters."""
    frozen_axes: Params
    abstract: Params
    """The trained parameters' shapes and places."""
    whole: Callable[..., Params]
    """``whole(trained, **frozen)``: what ``model.apply`` takes, in training."""
    merged: Callable[..., Params]
    """The same as plain parameters, for generation and export."""


def all_of(model: DeepSeekV3, mesh: Mesh) -> Trainee:
    """Every parameter is trained."""

    def itself(params: Params, **_: Any) -> Params:
        return params

    axes = logical_axes(model)
    return Trainee(model, {}, axes, {}, sharded_params(model, mesh), itself, itself)


class Course(NamedTuple):
    """What a stage makes of a run."""

    trainee: Trainee
    tx: optax.GradientTransformation
    loss_fn: LossFn
    open_stream: OpenStream
    streams: int
    eval_batches: Callable[[int], Iterator[EvalBatch]]
    """``eval_batches(rows)``: one pass over what is held out."""
    seq_len: int
    fresh_state: Callable[[TrainState], TrainState]
    """The first state, made where the abstract one says."""
    claim: Callable[[], None]
    """Makes the directory this run's, and writes its small files."""
    sample: Callable[[TrainState, int], str] | None = None


def run(
    config: RunConfig, course: Course, mesh: Mesh, feed: Feed, started: float
) -> tuple[Outcome, Evaluation] | None:
    """Run, or continue, to the end and evaluate; None if it was interrupted (and saved).

    Under the mesh. The directory is claimed once all input has been found good.
    """
    loop, trainee = config.loop, course.trainee
    model = trainee.model
    peak = peak_flops(jax.devices()[0])
    evaluate = make_evaluate(course.eval_batches, trainee, feed)
    task = Task(
        model=model,
        step=make_train_step(
            model,
            course.tx,
            course.loss_fn,
            bias_speed(config.schedule, loop.total_steps),
            axes=trainee.axes,
            frozen_axes=trainee.frozen_axes,
        ),
        batches=TrainRows(course.open_stream, feed, course.streams),
        feed=feed,
        learning_rate=learning_rate(config.schedule, loop.total_steps),
        evaluate=evaluate,
        flops_per_token=training_flops_per_token(model.config, course.seq_len),
        peak_flops=peak and peak * mesh.size,
        frozen=trainee.frozen,
        sample=course.sample,
    )
    abstract = abstract_state(model, course.tx, mesh, trainee.abstract)
    with open_run(config, loop, abstract, course.fresh_state, course.claim) as opened:
        _announce(config, trainee, mesh, opened.step)
        outcome = fit(task, loop, opened, started=started)
        if not outcome.finished:
            return None
        evaluation = evaluate(outcome.state, None)
        opened.writer.write(outcome.step, evaluation.scalars())
    return outcome, evaluation


@contextlib.contextmanager
def open_run(
    config: StageConfig,
    loop: LoopConfig,
    abstract: TrainState,
    fresh_state: Callable[[TrainState], TrainState],
    claim: Callable[[], None],
) -> Iterator[OpenRun]:
    """The run in ``config.out``: with ``resume`` from its checkpoint, if any, else from the start.

    The directory is claimed once there is a state: weights that cannot be read leave no run behind.

    Raises:
        UserError: if it cannot be claimed, or has gone further than it is to go.
    """
    with Checkpointer(config.out, keep_last=loop.keep_last, keep_every=loop.keep_every) as saver:
        restored = saver.restore_latest(abstract) if config.resume else None
        if restored is not None and restored.step > loop.total_steps:
            raise UserError(
                f"{config.out} has made {restored.step} steps already, more than "
                f"steps={loop.total_steps}; ask for more steps, give it all the data that it was "
                "started with, or use what it has saved."
            )
        state = restored.state if restored else fresh_state(abstract)
        claim()
        resumed = restored.step if restored else None
        with MetricsWriter(config.out, resumed_step=resumed) as writer:
            yield OpenRun(state, saver, writer, restored)


# --- identity --------------------------------------------------------------------------------


def identity(config: StageConfig, model: ModelConfig) -> dict[str, Any]:
    """The run's identity; ``model`` is a Hugging Face ``config.json``, so one reader serves."""
    return to_json(config) | {"stage": config.stage, "model": model.to_hf()}


def stored_config(config: Config) -> Config:
    """The configuration that the run in ``config.out`` was started with, set to resume.

    Raises:
        UserError: if there is no run, or it was of another stage.
    """
    stored = read_run(config.out, NO_RESUME)
    found = stored.get("stage")
    if found != config.stage:
        raise UserError(f"{config.out} holds a run of stage {found!r}, not {config.stage}.")
    return dataclasses.replace(from_json(type(config), stored), out=config.out, resume=True)


def check_vocabulary(tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Refuse a tokenizer with more tokens than the model has rows."""
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model a vocabulary of "
            f"{model.vocab_size}; raise vocab_size or use the model's own tokenizer."
        )


# --- weights to start from -------------------------------------------------------------------


def model_of(init: Path) -> ModelConfig:
    """The model that a run's directory, or a Hugging Face folder, holds.

    Raises:
        UserError: if it is neither.
    """
    if (init / "run.json").exists():
        return ModelConfig.from_hf(read_run(local_path(init))["model"])
    if (init / "config.json").exists():
        return HFFolder(init).config
    raise UserError(
        f"{init} is neither a run's directory (run.json) nor a Hugging Face folder (config.json)."
    )


def load_weights(
    init: Path, model: DeepSeekV3, mesh: Mesh, *, fp8: bool = False
) -> tuple[Params, Array]:
    """Parameters where they belong on the mesh, and the router bias.

    ``fp8``: those that ``init`` has in FP8 stay so, with their scales.

    Raises:
        UserError: if they are damaged, or of another model.
    """
    if (init / "run.json").exists() or not (init / "config.json").exists():
        abstract = sharded_params(model, mesh)
        abstract = fp8_params(model.config, abstract) if fp8 else abstract
        params, bias_LE, _ = load_params(init, abstract)
    else:
        dtype = "fp8" if fp8 else model.precision.params
        found, params, bias_LE = load_hf(init, dtype=dtype, mesh=mesh)
        if found != model.config:
            raise UserError(f"{init} holds another model than this configuration says.")
    # From NumPy: an array on one device does not go to devices of other processes.
    return params, np.asarray(bias_LE)


def first_state(
    params: Params, bias_LE: Array, tx: optax.GradientTransformation, abstract: TrainState
) -> TrainState:
    """Step 0 with these parameters."""
    where = jax.tree.map(lambda x: x.sharding, abstract)
    step, bias_LE = jax.device_put((np.int32(0), bias_LE), (where.step, where.router_bias_LE))
    opt_state = jax.jit(tx.init, out_shardings=where.opt_state)(params)
    return TrainState(step, params, opt_state, bias_LE)


# --- evaluation ------------------------------------------------------------------------------


def make_evaluate(
    batches: Callable[[int], Iterator[EvalBatch]], trainee: Trainee, feed: Feed
) -> Callable[[TrainState, int | None], Evaluation]:
    """Held-out loss of the main head, no MTP, current router bias."""
    everywhere = NamedSharding(feed.where.mesh, PartitionSpec())
    model = trainee.model

    def local_sums(trained: Params, frozen: Params, bias_LE: jax.Array, batch_1BT: Batch) -> Any:
        batch, params = Batch(*(x[0] for x in batch_1BT)), trainee.whole(trained, **frozen)
        hidden = hidden_states(model, params, bias_LE, batch, mtp=False)
        weights_BT = batch.loss_weights_BT
        nats = batch_nats(hidden.main_BTD, head(model, params), batch.targets_BT, weights_BT)
        return nats, sharding.psum(weights_BT.sum(), "batch", "sequence")

    @functools.partial(jax.jit, out_shardings=everywhere)
    def sums(state: TrainState, frozen: Params, batch_1BT: Batch) -> tuple[jax.Array, jax.Array]:
        specs, frozen_specs = (
            sharding.param_specs(feed.where.mesh, axes, params)
            for axes, params in ((trainee.axes, state.params), (trainee.frozen_axes, frozen))
        )
        in_specs = (specs, frozen_specs, everywhere.spec, BATCH_SPEC)
        local = sharding.per_device(local_sums, in_specs, everywhere.spec)
        return local(state.params, frozen, state.router_bias_LE, batch_1BT)

    def evaluate(state: TrainState, limit: int | None) -> Evaluation:
        totals = np.zeros(3)  # nats, tokens, bytes
        for index, part in enumerate(batches(feed.total)):
            if limit is not None and index >= limit:
                break
            nats, tokens = sums(state, trainee.frozen, feed.place([feed.own(part.batch)]))
            totals += float(nats), float(tokens), float(part.num_bytes)
        nats, tokens, num_bytes = totals
        return Evaluation(nats / tokens, nats / math.log(2) / num_bytes)

    return evaluate


def _announce(config: RunConfig, trainee: Trainee, mesh: Mesh, step: int) -> None:
    counts = param_counts(trainee.model.config)
    trained = sum(leaf.size for leaf in jax.tree.leaves(trainee.abstract))
    part = "" if trained >= counts.total else f", {trained:,} of them trained"
    used = {axis: size for axis, size in mesh.shape.items() if size > 1} or {"data": 1}
    with Progress(config.loop.total_steps) as console:
        console.print(
            f"{counts.total:,} parameters ({counts.active:,} active, {counts.mtp:,} in MTP){part}, "
            f"mesh {','.join(f'{k}={v}' for k, v in used.items())} of "
            f"{jax.devices()[0].device_kind}, "
            + (f"resuming at step {step}" if step else f"output in {config.out}")
        )
        if jax.devices()[0].platform == "cpu" and config.precision.compute == "bfloat16":
            console.print("CPUs have no fast bfloat16; --compute float32 takes half the time")


def draw(out: Path, outcome: Outcome, references: Mapping[str, float]) -> None:
    """The pictures of a finished run."""
    metrics = read_metrics(out / "metrics.jsonl")
    plot_loss(metrics, out / "loss.png", references=references)
    plot_expert_load(outcome.first_load_LE, outcome.last_load_LE, out / "expert_load.png")
