"""A learned reward: the transformer with a scalar head on the state of the last token (R1 B.1).

Trained on pairs (helpfulness: one response was preferred) by Bradley-Terry, or on single responses
with a grade (safety: 0 or 1). A row of a ``Batch`` is one conversation; ``loss_weights_BT`` is 1 at
its last token alone, and there ``targets_BT`` holds its grade, if it has one.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from deepseek_jax import sharding
from deepseek_jax.checkpoint import Checkpointer, claim_run_directory, load_params
from deepseek_jax.checkpoint.run_directory import read_run
from deepseek_jax.config import ModelConfig, Precision
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.model.transformer import DeepSeekV3, sharded_params
from deepseek_jax.report import MetricsWriter, Progress
from deepseek_jax.train.loop import divide_batch, jit_step, to_json
from deepseek_jax.train.losses import LossParts, Totals, hidden_states
from deepseek_jax.train.optim import OptimConfig, bias_speed, make_optimizer
from deepseek_jax.train.step import LossFn, abstract_state, make_train_step
from deepseek_jax.types import Array, Batch, Params, TrainState, UserError

HEAD = "reward_head"


class RewardModel(DeepSeekV3):
    """The policy's architecture, without MTP, and one more matrix."""

    def setup(self) -> None:
        """Declare the scalar head beside the model's own parameters."""
        super().setup()
        D = self.config.hidden_size
        dtype = self.precision.compute_dtype
        self.reward_head_D1 = self.weight(HEAD, (D, 1), ("embed", None), dtype)

    def reward_head(self) -> Float[Array, "D 1"]:
        """The scalar head."""
        return self.reward_head_D1


def make_model(config: ModelConfig, precision: Precision) -> RewardModel:
    """For a policy of this configuration."""
    return RewardModel(config.replace(num_nextn_predict_layers=0), precision)


# --- losses -----------------------------------------------------------------------------------


class Scored(NamedTuple):
    """What the model says of a batch."""

    scores_B: Float[Array, "B"]
    parts: LossParts
    balance_loss: Float[Array, ""]


def scores(
    model: RewardModel, params: Params, router_bias_LE: Float[Array, "L E"], batch: Batch
) -> Scored:
    """One number per row, any real; per device, of its own rows."""
    hidden = hidden_states(model, params, router_bias_LE, batch, mtp=False)
    head_D1 = model.apply({"params": params}, method="reward_head")
    assert isinstance(head_D1, jax.Array)
    score_BT1 = jnp.dot(hidden.main_BTD, head_D1, preferred_element_type=jnp.float32)
    at_last_B = jnp.where(batch.loss_weights_BT > 0, score_BT1[..., 0], 0).sum(-1)
    return Scored(
        sharding.psum(at_last_B, "sequence"), LossParts({}, hidden.load_LE), hidden.balance_loss
    )


def pairwise_loss(scores_B: Float[Array, "B"]) -> Float[Array, "pairs"]:
    """-log sigmoid(chosen - rejected) of rows that alternate (Bradley-Terry)."""
    pairs = scores_B.reshape(-1, 2)
    return -jax.nn.log_sigmoid(pairs[:, 0] - pairs[:, 1])


def bce_loss(scores_B: Float[Array, "B"], shares_B: Float[Array, "B"]) -> Float[Array, "B"]:
    """Cross-entropy of sigmoid(score) with the grade as a share of the best one."""
    return -(
        shares_B * jax.nn.log_sigmoid(scores_B) + (1 - shares_B) * jax.nn.log_sigmoid(-scores_B)
    )


def mse_loss(scores_B: Float[Array, "B"], shares_B: Float[Array, "B"]) -> Float[Array, "B"]:
    """Squared distance of the score from the grade as a share of the best one."""
    return jnp.square(scores_B - shares_B)


Kind = Literal["pairwise", "bce", "mse"]


def make_loss(model: RewardModel, kind: Kind, best_grade: int = 1) -> LossFn:
    """For ``make_train_step``: mean over the step's pairs, or rows."""

    def loss_fn(
        params: Params, bias_LE: jax.Array, batch: Batch, totals: Totals, step: jax.Array
    ) -> tuple[Float[Array, ""], LossParts]:
        scored = scores(model, params, bias_LE, batch)
        scores_B, rows = scored.scores_B, jnp.maximum(totals.weight, 1)
        if kind == "pairwise":
            if len(scores_B) % 2:
                raise UserError("the two rows of a pair must lie on one device: use even batches.")
            losses = pairwise_loss(scores_B)
            right = scores_B[::2] > scores_B[1::2]
        else:
            grade_BT = jnp.where(batch.loss_weights_BT > 0, batch.targets_BT, 0)
            shares_B = sharding.psum(grade_BT.sum(-1), "sequence") / best_grade
            losses = (bce_loss if kind == "bce" else mse_loss)(scores_B, shares_B)
            middle = 0.0 if kind == "bce" else 0.5
            right = (scores_B > middle) == (shares_B > 0.5)
        share = len(losses) / len(scores_B) * rows  # pairs or rows of the whole step
        sums = sharding.psum((losses.sum() / share, right.sum() / share), "batch")
        balance = scored.balance_loss / totals.micro_batches
        metrics = {"loss": sums[0], "accuracy": sums[1], "balance_loss": balance}
        return sums[0] + balance, LossParts(metrics, scored.parts.load_LE)

    return loss_fn


# --- data -------------------------------------------------------------------------------------


class Example(NamedTuple):
    """A prompt's responses: chosen and rejected, or one with its grade."""

    prompt: str
    responses: tuple[str, ...]
    grade: int = 0


def read_examples(path: Path, kind: Kind, best_grade: int = 1) -> list[Example]:
    """JSONL of ``prompt`` with ``chosen`` and ``rejected``, or ``response`` and ``grade``.

    Raises:
        UserError: a line that is not that.
    """
    names = ("chosen", "rejected") if kind == "pairwise" else ("response",)
    examples: list[Example] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}): name a JSONL file.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            texts = [record[name] for name in ("prompt", *names)]
            grade = record["grade"] if kind != "pairwise" else 0
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {number} is no JSON with prompt, {', '.join(names)}"
                f"{'' if kind == 'pairwise' else ', grade'} ({error!r})."
            ) from error
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{path}, line {number}: prompt, {', '.join(names)} must be text.")
        if type(grade) is not int or not 0 <= grade <= best_grade:
            raise UserError(f"{path}, line {number}: grade must be 0 to {best_grade}, not {grade}.")
        examples.append(Example(texts[0], tuple(texts[1:]), grade))
    if not examples:
        raise UserError(f"{path} holds no examples: name another file.")
    return examples


def encode(tokenizer: Tokenizer, prompt: str, response: str) -> list[int]:
    """Begin of sequence, both texts, end of sequence: the head reads the last one's state."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return bos + tokenizer.encode(prompt) + tokenizer.encode(response) + eos


def make_rows(rows: Sequence[list[int]], grades: Sequence[int], seq_len: int) -> Batch:
    """One conversation a row, padded at the end."""
    lengths_B1 = np.array([len(row) for row in rows])[:, None]
    places_BT = np.broadcast_to(np.arange(seq_len, dtype=np.int32), (len(rows), seq_len))
    tokens_BT = np.zeros((len(rows), seq_len), np.int32)
    for i, row in enumerate(rows):
        tokens_BT[i, : len(row)] = row
    last_BT = places_BT == lengths_B1 - 1
    grades_BT = np.where(last_BT, np.array(grades, np.int32)[:, None], 0).astype(np.int32)
    real_BT = (places_BT < lengths_B1).astype(np.int32)
    return Batch(tokens_BT, grades_BT, last_BT.astype(np.float32), places_BT, real_BT)


# --- training ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class RewardModelConfig:
    """A run of training; it keeps one checkpoint, at its end."""

    init: Path
    """The policy's run directory: its weights and tokenizer."""
    data: Path
    """JSON lines of prompt, chosen, rejected; or of prompt, response, grade."""
    out: Path
    """Directory of the run."""
    kind: Kind = "pairwise"
    """Pairs, or grades by cross-entropy (bce) or squared distance (mse)."""
    best_grade: int = 1
    """Grades go from 0 to this."""
    seq_len: int = 1024
    """Tokens of a conversation at the most."""
    batch_size: int = 256
    """Pairs, or responses, of a step (R1: 256)."""
    epochs: int = 1
    mesh: str = "data=-1"
    precision: Precision = field(default_factory=Precision)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(peak_lr=6e-6))
    """R1's rate."""
    seed: int = 0


def train_reward_model(config: RewardModelConfig) -> None:
    """Learn from preferences or grades; the result is for ``LearnedReward``.

    Raises:
        UserError: bad data, a conversation longer than ``seq_len``, or ``out`` holds a run.
    """
    examples = read_examples(config.data, config.kind, config.best_grade)
    tokenizer = Tokenizer.load(config.init / "tokenizer.json")
    mesh = sharding.make_mesh(config.mesh)
    feed = divide_batch(config.batch_size * len(examples[0].responses), config.seq_len, mesh)
    steps = len(examples) * config.epochs // config.batch_size
    if not steps:
        raise UserError(
            f"{len(examples)} examples fill no batch of {config.batch_size}; lower batch_size."
        )
    _check_lengths(config, examples, tokenizer)  # before the directory is a run's
    tx = make_optimizer(config.optim, steps)
    with jax.set_mesh(mesh):
        model, policy, policy_bias, policy_config = _policy(config, mesh)
        claim_run_directory(
            config.out,
            to_json(config) | {"stage": "reward_model", "model": policy_config.to_hf()},
            resume=False,
        )
        tokenizer.save(config.out / "tokenizer.json")
        state = _fresh_state(model, tx, policy, policy_bias, mesh)
        loss_fn = make_loss(model, config.kind, config.best_grade)
        step_fn = jit_step(
            make_train_step(model, tx, loss_fn, bias_speed(config.optim, steps)), state
        )
        batches = _batches(config, examples, tokenizer)
        with (
            Checkpointer(config.out) as saver,
            MetricsWriter(config.out) as writer,
            Progress(steps) as progress,
        ):
            for step in range(1, steps + 1):
                began = time.perf_counter()
                batch = feed.place([feed.own(next(batches))])
                state, metrics = step_fn(state, batch, np.float32(np.inf))
                metrics = jax.device_get(metrics)
                del metrics["load_LE"]
                writer.write(step, metrics)
                rate = batch.tokens_BT.size / (time.perf_counter() - began)
                shown = {"loss": metrics["loss"], "accuracy": metrics["accuracy"]}
                progress.update(step, tokens_per_s=rate, **shown)
            saver.save(steps, state, data_state={}, rng=jax.random.key(config.seed))


def _check_lengths(
    config: RewardModelConfig, examples: Sequence[Example], tokenizer: Tokenizer
) -> None:
    for example in examples:
        longest = max(len(encode(tokenizer, example.prompt, each)) for each in example.responses)
        if longest > config.seq_len:
            raise UserError(
                f"a conversation has {longest} tokens, more than seq_len={config.seq_len}: raise "
                f"it, or leave out {example.prompt[:60]!r}."
            )


def _batches(
    config: RewardModelConfig, examples: Sequence[Example], tokenizer: Tokenizer
) -> Iterator[Batch]:
    rng = np.random.default_rng(config.seed)
    order: list[int] = []
    while True:
        while len(order) < config.batch_size:
            order += rng.permutation(len(examples)).tolist()
        chosen, order = order[: config.batch_size], order[config.batch_size :]
        rows, grades = [], []
        for index in chosen:
            example = examples[index]
            for response in example.responses:
                rows.append(encode(tokenizer, example.prompt, response))
                grades.append(example.grade)
        yield make_rows(rows, grades, config.seq_len)


def _policy(
    config: RewardModelConfig, mesh: jax.sharding.Mesh
) -> tuple[RewardModel, Params, Array, ModelConfig]:
    """The reward model for the policy in ``config.init``, and the policy's weights without MTP."""
    policy_config = ModelConfig.from_hf(read_run(config.init)["model"])
    policy = DeepSeekV3(policy_config, config.precision)
    params, bias_LE, _ = load_params(config.init, sharded_params(policy, mesh))
    kept = {name: value for name, value in params.items() if not name.startswith("mtp")}
    model = make_model(policy_config, config.precision)
    return model, kept, np.asarray(bias_LE)[: model.config.num_routers], model.config


def _fresh_state(
    model: RewardModel, tx: Any, policy: Params, bias_LE: Array, mesh: jax.sharding.Mesh
) -> TrainState:
    """The policy's weights and a head of zeros: every response starts out equal."""
    abstract = abstract_state(model, tx, mesh)
    where = jax.tree.map(lambda x: x.sharding, abstract)
    head = abstract.params[HEAD]
    params = policy | {HEAD: jax.device_put(np.zeros(head.shape, head.dtype), head.sharding)}
    step, bias_LE = jax.device_put(
        (np.int32(0), np.asarray(bias_LE)), (where.step, where.router_bias_LE)
    )
    opt_state = jax.jit(tx.init, out_shardings=where.opt_state)(params)
    return TrainState(step, params, opt_state, bias_LE)
