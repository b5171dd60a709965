"""Pretraining: random weights to a language model, in one call (V3 section 4)."""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax import distributed, sharding
from deepseek_jax.checkpoint import Checkpointer, claim_run_directory, load_params
from deepseek_jax.checkpoint.run_directory import read_run
from deepseek_jax.config import ModelConfig, Precision, RematPolicy
from deepseek_jax.data.baselines import Baselines, measure_baselines
from deepseek_jax.data.feed import Feed, TrainRows
from deepseek_jax.data.pipeline import DataConfig, eval_batches, fit_tokenizer
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.generate import Sampling, continue_text
from deepseek_jax.model.dispatch import ExpertParallel
from deepseek_jax.model.transformer import DeepSeekV3, logical_axes, param_counts
from deepseek_jax.plan import training_flops_per_token
from deepseek_jax.presets import preset
from deepseek_jax.report import (
    MetricsWriter,
    Progress,
    peak_flops,
    plot_expert_load,
    plot_loss,
    read_metrics,
    summary_table,
)
from deepseek_jax.train.loop import (
    Evaluation,
    LoopConfig,
    Outcome,
    Task,
    divide_batch,
    fit,
    from_json,
    to_json,
)
from deepseek_jax.train.losses import batch_nats, head, hidden_states, pretrain_loss
from deepseek_jax.train.optim import (
    OptimConfig,
    bias_speed,
    learning_rate,
    make_optimizer,
    mtp_weight,
)
from deepseek_jax.train.step import BATCH_SPEC, abstract_state, init_state, make_train_step
from deepseek_jax.types import Batch, Params, TrainState, UserError

# What --resume may change: nothing here alters the steps already made.
_MAY_CHANGE = (
    "mesh",
    "remat",
    "parallel",
    "resume",
    "out",
    "init",
    "prompt",
    "sample_tokens",
    "loop.steps",
    "loop.eval_every",
    "loop.eval_batches",
    "loop.save_every",
    "loop.keep_last",
    "loop.keep_every",
    "loop.max_skips",
    "data.num_workers",
)


@dataclass(frozen=True)
class PretrainConfig:
    """A pretraining run."""

    out: Path = Path("out/pretrain")
    """Directory of the run: checkpoints, metrics, pictures, tokenizer."""
    resume: bool = False
    """Continue the run in ``out`` from its last checkpoint."""
    init: Path | None = None
    """Start from the weights of another run's directory."""
    mesh: str = "data=-1"
    """Devices, as in ``data=2,expert=4``; -1 fills one axis."""
    remat: RematPolicy = "none"
    """What the backward pass computes again: nothing, all, or the V3 report's selection."""
    parallel: ExpertParallel = field(default_factory=ExpertParallel)
    prompt: str = "def "
    """What the sample at the end continues."""
    sample_tokens: int = 160
    model: ModelConfig = field(default_factory=lambda: preset("tiny"))
    precision: Precision = field(default_factory=Precision)
    data: DataConfig = field(default_factory=DataConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


class Result(NamedTuple):
    """What a finished run has to show."""

    outcome: Outcome
    evaluation: Evaluation
    """On the whole held-out split."""
    baselines: Baselines
    sample: str


def pretrain(config: PretrainConfig) -> Result | None:
    """Run, or continue, a pretraining; None if it was interrupted (and saved).

    Where several processes train together (`distributed.initialize`), all call this.

    Leaves in ``config.out``: ``checkpoints/``, ``metrics.jsonl``, ``tensorboard/``,
    ``tokenizer.json``, ``run.json``, ``loss.png``, ``expert_load.png``, ``sample.txt``.

    Raises:
        UserError: for bad input, see ``types.UserError``.
    """
    started = time.perf_counter()
    mesh = sharding.make_mesh(config.mesh)
    feed = divide_batch(config.loop.rows, config.data.seq_len, mesh)
    config.parallel.check_rows(config.loop.rows // sharding.batch_shards(mesh))
    lr = learning_rate(config.optim, config.loop.steps)
    claim = functools.partial(
        claim_run_directory,
        config.out,
        run_json(config),
        resume=config.resume,
        may_change=_MAY_CHANGE,
    )
    claim(dry_run=True)
    tokenizer = run_tokenizer(config)
    model = DeepSeekV3(config.model, config.precision, config.remat, config.parallel)
    tx = make_optimizer(config.optim, config.loop.steps)
    lam = mtp_weight(config.optim, config.loop.steps)

    def loss_fn(params, router_bias_LE, batch, totals, step):
        return pretrain_loss(model, params, router_bias_LE, batch, totals, lam(step))

    peak = peak_flops(jax.devices()[0])
    task = Task(
        step=make_train_step(model, tx, loss_fn, bias_speed(config.optim, config.loop.steps)),
        batches=TrainRows(config.data, tokenizer, feed),
        feed=feed,
        evaluate=make_evaluate(config.data, tokenizer, model, feed),
        learning_rate=lr,
        flops_per_token=training_flops_per_token(config.model, config.data.seq_len),
        peak_flops=peak and peak * mesh.size,
    )
    loop = config.loop
    with (
        jax.set_mesh(mesh),
        Checkpointer(config.out, keep_last=loop.keep_last, keep_every=loop.keep_every) as saver,
    ):
        abstract = abstract_state(model, tx, mesh)
        restored = saver.restore_latest(abstract) if config.resume else None
        state = restored.state if restored else _fresh_state(config, model, tx, abstract)
        claim()
        if jax.process_index() == 0:
            tokenizer.save(config.out / "tokenizer.json")
        _announce(config, mesh, restored.step if restored else 0)
        resumed = restored.step if restored else None
        with MetricsWriter(config.out, resumed_step=resumed) as writer:
            outcome = fit(task, loop, state, saver, writer, restored, started=started)
            if not outcome.finished:
                return None
            evaluation = task.evaluate(outcome.state, None)
            writer.write(outcome.step, evaluation.scalars())
        return _finish(config, model, tokenizer, outcome, evaluation)


def run_json(config: PretrainConfig) -> dict[str, Any]:
    """The run's identity; ``model`` is a Hugging Face ``config.json``, so one reader serves."""
    return to_json(config) | {"stage": "pretrain", "model": config.model.to_hf()}


def stored_config(config: PretrainConfig) -> PretrainConfig:
    """The configuration that the run in ``config.out`` was started with, set to resume.

    Raises:
        UserError: if there is no run, or it was not a pretraining run.
    """
    run = read_run(config.out)
    if run.get("stage") != "pretrain":
        raise UserError(f"{config.out} holds a run of stage {run.get('stage')!r}, not pretrain.")
    stored = from_json(PretrainConfig, run)
    return dataclasses.replace(stored, out=config.out, resume=True)


def run_tokenizer(config: PretrainConfig) -> Tokenizer:
    """The run's tokenizer: the stored one on resume, else the given one, else a trained one.

    Raises:
        UserError: if it has more tokens than the model's vocabulary.
    """
    stored = config.out / "tokenizer.json"
    if config.resume and stored.exists():
        return Tokenizer.load(stored)
    given = config.data.tokenizer or (config.init and config.init / "tokenizer.json")
    if given:
        tokenizer = Tokenizer.load(given)
    else:
        vocabulary = config.model.vocab_size
        trained = distributed.from_first(
            lambda: fit_tokenizer(config.data, vocabulary).to_json().encode()
        )
        tokenizer = Tokenizer.from_json(trained.decode())
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model a vocabulary of "
            f"{config.model.vocab_size}; raise vocab_size or use the model's own tokenizer."
        )
    return tokenizer


def _fresh_state(
    config: PretrainConfig, model: DeepSeekV3, tx: Any, abstract: TrainState
) -> TrainState:
    """Random weights, or another run's, made where they belong."""
    where = jax.tree.map(lambda x: x.sharding, abstract)
    if config.init is None:
        init = functools.partial(init_state, model, tx)
        return jax.jit(init, out_shardings=where)(jax.random.key(config.loop.init_seed))
    params, bias_LE, _ = load_params(config.init, abstract.params)
    # From NumPy: an array on one device does not go to devices of other processes.
    step, bias_LE = jax.device_put(
        (np.int32(0), np.asarray(bias_LE)), (where.step, where.router_bias_LE)
    )
    opt_state = jax.jit(tx.init, out_shardings=where.opt_state)(params)
    return TrainState(step, params, opt_state, bias_LE)


def make_evaluate(
    data: DataConfig, tokenizer: Tokenizer, model: DeepSeekV3, feed: Feed
) -> Callable[[TrainState, int | None], Evaluation]:
    """Held-out loss of the main head, no MTP, current router bias."""
    everywhere = NamedSharding(feed.where.mesh, PartitionSpec())

    def local_sums(params: Params, bias_LE: jax.Array, batch_1BT: Batch) -> Any:
        batch = Batch(*(x[0] for x in batch_1BT))
        hidden = hidden_states(model, params, bias_LE, batch, mtp=False)
        weights_BT = batch.loss_weights_BT
        nats = batch_nats(hidden.main_BTD, head(model, params), batch.targets_BT, weights_BT)
        return nats, sharding.psum(weights_BT.sum(), "batch", "sequence")

    @functools.partial(jax.jit, out_shardings=everywhere)
    def sums(state: TrainState, batch_1BT: Batch) -> tuple[jax.Array, jax.Array]:
        specs = sharding.param_specs(feed.where.mesh, logical_axes(model), state.params)
        in_specs = (specs, everywhere.spec, BATCH_SPEC)
        run = sharding.per_device(local_sums, in_specs, everywhere.spec)
        return run(state.params, state.router_bias_LE, batch_1BT)

    def evaluate(state: TrainState, limit: int | None) -> Evaluation:
        totals = np.zeros(3)  # nats, tokens, bytes
        for index, part in enumerate(eval_batches(data, tokenizer, feed.total)):
            if limit is not None and index >= limit:
                break
            nats, tokens = sums(state, feed.place([feed.own(part.batch)]))
            totals += float(nats), float(tokens), float(part.num_bytes)
        nats, tokens, num_bytes = totals
        return Evaluation(nats / tokens, nats / math.log(2) / num_bytes)

    return evaluate


def _announce(config: PretrainConfig, mesh: Mesh, step: int) -> None:
    counts = param_counts(config.model)
    used = {axis: size for axis, size in mesh.shape.items() if size > 1} or {"data": 1}
    with Progress(config.loop.steps) as console:
        console.print(
            f"{counts.total:,} parameters ({counts.active:,} active, {counts.mtp:,} in MTP), "
            f"mesh {','.join(f'{k}={v}' for k, v in used.items())} of "
            f"{jax.devices()[0].device_kind}, "
            + (f"resuming at step {step}" if step else f"output in {config.out}")
        )


def _finish(
    config: PretrainConfig,
    model: DeepSeekV3,
    tokenizer: Tokenizer,
    outcome: Outcome,
    evaluation: Evaluation,
) -> Result:
    """Pictures, baselines, a sample; printed by the first process."""
    measured = distributed.from_first(
        lambda: json.dumps(measure_baselines(config.data, tokenizer)).encode()
    )
    baselines = Baselines(*json.loads(measured))
    text = config.prompt + continue_text(
        model,
        outcome.state.params,
        outcome.state.router_bias_LE,
        tokenizer,
        config.prompt,
        Sampling(max_new_tokens=config.sample_tokens, seed=config.loop.init_seed),
    )
    if jax.process_index() == 0:
        plot_loss(
            read_metrics(config.out / "metrics.jsonl"),
            config.out / "loss.png",
            references={"token bigram": baselines.bigram, "gzip -9": baselines.gzip},
        )
        plot_expert_load(
            outcome.first_load_LE, outcome.last_load_LE, config.out / "expert_load.png"
        )
        (config.out / "sample.txt").write_text(text, encoding="utf-8")
    with Progress(config.loop.steps) as console:
        rows = [
            {"held-out split": config.out.name, "bits per byte": evaluation.bits_per_byte},
            {"held-out split": "token bigram (Kneser-Ney)", "bits per byte": baselines.bigram},
            {"held-out split": "gzip -9", "bits per byte": baselines.gzip},
        ]
        console.console.print(summary_table(rows))
        console.print(f"loss {evaluation.loss:.4f} nats per token\n\nsample:\n{text}\n")
        console.print(f"pictures: {config.out / 'loss.png'}, {config.out / 'expert_load.png'}")
    return Result(outcome, evaluation, baselines, text)
