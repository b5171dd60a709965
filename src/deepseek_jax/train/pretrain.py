"""Pretraining: random weights to a language model, in one call (V3 section 4)."""

import functools
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
from jax.sharding import Mesh

from deepseek_jax import distributed, sharding
from deepseek_jax.checkpoint import claim_run_directory
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.baselines import Baselines, measure_baselines
from deepseek_jax.data.pipeline import DataConfig, eval_batches, fit_tokenizer, train_batches
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.generate import Sampling, complete
from deepseek_jax.model.transformer import DeepSeekV3
from deepseek_jax.presets import preset
from deepseek_jax.report import (
    Progress,
    summary_table,
)
from deepseek_jax.train.loop import (
    Evaluation,
    Outcome,
    divide_batch,
)
from deepseek_jax.train.losses import pretrain_loss
from deepseek_jax.train.optim import (
    learning_rate,
    make_optimizer,
    mtp_weight,
)
from deepseek_jax.train.run import (
    MAY_CHANGE,
    Course,
    RunConfig,
    all_of,
    check_vocabulary,
    draw,
    first_state,
    identity,
    load_weights,
    run,
)
from deepseek_jax.train.step import init_state
from deepseek_jax.types import TrainState, UserError

_MAY_CHANGE = (*MAY_CHANGE, "prompt", "sample_tokens")


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """A pretraining run."""

    stage: ClassVar[str] = "pretrain"
    out: Path = Path("out/pretrain")
    prompt: str = "def "
    """What the sample at the end continues."""
    sample_tokens: int = 160
    """Of that sample; 0: none, which spares compiling for it."""
    model: ModelConfig = field(default_factory=lambda: preset("tiny"))
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        """Refuse now what would end the run at its end."""
        if self.sample_tokens < 0:
            raise UserError(f"sample_tokens={self.sample_tokens} must not be negative; 0: none.")


class Result(NamedTuple):
    """What a finished run has to show."""

    outcome: Outcome
    evaluation: Evaluation
    """On the whole held-out split."""
    baselines: Baselines
    sample: str | None
    """Prompt and all; None if none was asked for."""


def pretrain(config: PretrainConfig) -> Result | None:
    """Run, or continue, a pretraining; None if it was interrupted (and saved).

    Where several processes train together (`distributed.initialize`), all call this.

    Leaves in ``config.out``: ``checkpoints/``, ``metrics.jsonl``, ``tensorboard/``,
    ``tokenizer.json``, ``run.json``, ``loss.png``, ``expert_load.png``, ``sample.txt``.

    Raises:
        UserError: for bad input, see ``types.UserError``.
    """
    started = time.perf_counter()
    if config.data.seq_len > config.model.max_position_embeddings:
        raise UserError(
            f"seq_len={config.data.seq_len} exceeds the model's context of "
            f"{config.model.max_position_embeddings} (max_position_embeddings); lower it, or give "
            "a config.json with a longer context as --model."
        )
    mesh = sharding.make_mesh(config.mesh)
    feed = divide_batch(
        config.loop.rows,
        config.data.seq_len,
        mesh,
        option=config.loop.rows_option,
        resume=config.resume,
    )
    config.parallel.check_rows(config.loop.rows // sharding.batch_shards(mesh))
    learning_rate(config.schedule, config.loop.total_steps)  # complains now of what cannot be
    claim = functools.partial(
        claim_run_directory,
        config.out,
        run_json(config),
        resume=config.resume,
        may_change=_MAY_CHANGE,
    )
    claim(dry_run=True)
    tokenizer = run_tokenizer(config)
    model = DeepSeekV3(
        config.model,
        config.precision,
        config.remat,
        config.parallel,
        whole_rows=not config.data.mask_documents,
    )
    tx = make_optimizer(config.schedule, config.loop.total_steps)
    lam = mtp_weight(config.schedule, config.loop.total_steps)

    def loss_fn(params, router_bias_LE, batch, totals, step):
        return pretrain_loss(model, params, router_bias_LE, batch, totals, lam(step))

    def claim_all() -> None:
        claim()
        if jax.process_index() == 0:
            tokenizer.save(config.out / "tokenizer.json")

    course = Course(
        trainee=all_of(model, mesh),
        tx=tx,
        loss_fn=loss_fn,
        open_stream=functools.partial(train_batches, config.data, tokenizer),
        streams=config.data.streams,
        eval_batches=functools.partial(eval_batches, config.data, tokenizer),
        seq_len=config.data.seq_len,
        fresh_state=functools.partial(_fresh_state, config, model, tx, mesh),
        claim=claim_all,
    )
    with jax.set_mesh(mesh):
        done = run(config, course, mesh, feed, started)
        return done and _finish(config, model, tokenizer, *done)


def run_json(config: PretrainConfig) -> dict[str, Any]:
    """The run's identity."""
    return identity(config, config.model)


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
    check_vocabulary(tokenizer, config.model)
    return tokenizer


def _fresh_state(
    config: PretrainConfig, model: DeepSeekV3, tx: Any, mesh: Mesh, abstract: TrainState
) -> TrainState:
    """Random weights, or another run's, made where they belong."""
    if config.init is None:
        init = functools.partial(init_state, model, tx)
        where = jax.tree.map(lambda x: x.sharding, abstract)
        return jax.jit(init, out_shardings=where)(jax.random.key(config.loop.init_seed))
    return first_state(*load_weights(config.init, model, mesh), tx, abstract)


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
    text = None
    if config.sample_tokens:
        sampling = Sampling(max_new_tokens=config.sample_tokens, seed=config.loop.init_seed)
        weights = outcome.state.params, outcome.state.router_bias_LE
        (said,) = complete(model, *weights, tokenizer, [config.prompt], sampling)
        text = config.prompt + said
    if jax.process_index() == 0:
        draw(config.out, outcome, {"token bigram": baselines.bigram, "gzip -9": baselines.gzip})
        if text is not None:
            (config.out / "sample.txt").write_text(text, encoding="utf-8")
    with Progress(config.loop.total_steps) as console:
        rows = [
            {"held-out split": config.out.name, "bits per byte": evaluation.bits_per_byte},
            {"held-out split": "token bigram (Kneser-Ney)", "bits per byte": baselines.bigram},
            {"held-out split": "gzip -9", "bits per byte": baselines.gzip},
        ]
        console.console.print(summary_table(rows))
        console.print(f"loss {evaluation.loss:.4f} nats per token\n")
        if text is not None:
            console.print(f"sample:\n{text}\n")
        console.print(f"pictures: {config.out / 'loss.png'}, {config.out / 'expert_load.png'}")
    return Result(outcome, evaluation, baselines, text)
