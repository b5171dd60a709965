"""A learned reward: the transformer with a scalar head on the state of the last token (R1 B.1).

Trained on pairs (helpfulness: one response was preferred) by Bradley-Terry, or on single responses
with a grade (safety: 0 or 1). A row of a ``Batch`` is one conversation; ``loss_weights_BT`` is 1 at
its last token alone, and there ``targets_BT`` holds its grade, if it has one.
"""

import functools
import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from deepseek_jax import sharding
from deepseek_jax.checkpoint import claim_run_directory
from deepseek_jax.config import ModelConfig, Precision
from deepseek_jax.data.feed import TrainRows
from deepseek_jax.data.pipeline import NO_THREADS, SameData
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.model.transformer import DeepSeekV3
from deepseek_jax.train.loop import LoopConfig, Outcome, Task, divide_batch, fit
from deepseek_jax.train.losses import LossParts, Totals, hidden_states
from deepseek_jax.train.optim import (
    OptimConfig,
    bias_speed,
    constant_rate,
    learning_rate,
    make_optimizer,
)
from deepseek_jax.train.run import (
    MAY_CHANGE,
    StageConfig,
    draw,
    first_state,
    identity,
    load_weights,
    model_of,
    open_run,
)
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

_MAY_CHANGE = (*MAY_CHANGE, "save_every")

REWARD_OPTIM = constant_rate(6e-6)  # R1 appendix B.1


@dataclass(frozen=True)
class RewardModelConfig(StageConfig):
    """A run of training, from a policy's weights and tokenizer (``init``)."""

    stage: ClassVar[str] = "reward_model"
    out: Path = Path("out/reward_model")
    data: Path | None = None
    """JSON lines of prompt, chosen, rejected; or of prompt, response, grade."""
    kind: Kind = "pairwise"
    """Pairs, or grades by cross-entropy (bce) or squared distance (mse)."""
    best_grade: int = 1
    """Grades go from 0 to this."""
    seq_len: int = 1024
    """Tokens of a conversation at the most."""
    batch_size: int = 256
    """Pairs, or responses, of a step (R1: 256)."""
    epochs: int = 1
    save_every: int = 200
    """Steps between checkpoints; the last step is always saved."""
    precision: Precision = field(default_factory=Precision)
    optim: OptimConfig = REWARD_OPTIM
    seed: int = 0


def train_reward_model(config: RewardModelConfig) -> Outcome | None:
    """Learn, or go on learning, from preferences or grades; None if interrupted (and saved).

    The result is for ``LearnedReward``.

    Raises:
        UserError: bad data, a conversation longer than ``seq_len``, or see ``types.UserError``.
    """
    started = time.perf_counter()
    source = config.out if config.resume else config.init
    if source is None or config.data is None:
        raise UserError(
            "a reward model starts from a policy and learns from examples: name --init RUN and "
            "--data FILE."
        )
    examples = read_examples(config.data, config.kind, config.best_grade)
    policy_config = model_of(source)
    tokenizer = Tokenizer.load(source / "tokenizer.json")
    mesh = sharding.make_mesh(config.mesh)
    rows = config.batch_size * len(examples[0].responses)
    feed = divide_batch(rows, config.seq_len, mesh, option="batch_size", resume=config.resume)
    steps = len(examples) * config.epochs // config.batch_size
    if not steps:
        raise UserError(
            f"{len(examples)} examples fill no batch of {config.batch_size}; lower batch_size."
        )
    loop = LoopConfig(
        steps=steps, batch_size=rows, save_every=config.save_every, init_seed=config.seed
    )
    model = make_model(policy_config, config.precision)
    claim = functools.partial(
        claim_run_directory,
        config.out,
        identity(config, model.config),
        resume=config.resume,
        may_change=_MAY_CHANGE,
    )
    claim(dry_run=True)
    _check_lengths(config, examples, tokenizer)  # before the directory is a run's
    tx = make_optimizer(config.optim, steps)
    loss_fn = make_loss(model, config.kind, config.best_grade)
    task = Task(
        model=model,
        step=make_train_step(model, tx, loss_fn, bias_speed(config.optim, steps)),
        # Every process holds all examples, so one stream serves them all.
        batches=TrainRows(
            functools.partial(_batches, config, examples, tokenizer), feed, streams=1
        ),
        feed=feed,
        learning_rate=learning_rate(config.optim, steps),
        # A pair judged wrongly may cost any number of nats, and is what there is to learn.
        spike_margin=math.inf,
        shown=("accuracy",),
    )

    def fresh_state(abstract: TrainState) -> TrainState:
        weights = _policy_and_head(config, policy_config, mesh, abstract)
        return first_state(*weights, tx, abstract)

    with (
        jax.set_mesh(mesh),
        open_run(config, loop, abstract_state(model, tx, mesh), fresh_state, claim) as opened,
    ):
        if jax.process_index() == 0:
            tokenizer.save(config.out / "tokenizer.json")
        outcome = fit(task, loop, opened, started=started)
    if not outcome.finished:
        return None
    if jax.process_index() == 0:
        draw(config.out, outcome, {})
    return outcome


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
    config: RewardModelConfig,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    rows: int,
    **_: int,
) -> SameData:
    """Endless batches ``[rows, seq_len]``; a pair's rows lie next to each other."""

    def make(chosen: Sequence[Example]) -> Batch:
        pairs = [(example, response) for example in chosen for response in example.responses]
        encoded = [encode(tokenizer, example.prompt, response) for example, response in pairs]
        return make_rows(encoded, [example.grade for example, _ in pairs], config.seq_len)

    # Neighbouring seeds would share their epochs: grain shuffles epoch e with seed + e.
    seed = int(np.random.SeedSequence(config.seed).generate_state(1)[0])
    order = grain.MapDataset.source(examples).shuffle(seed=seed).repeat()
    batches = order.to_iter_dataset(NO_THREADS).batch(config.batch_size, batch_fn=make)
    what = repr((examples, tokenizer.to_json())).encode()
    return SameData(iter(batches), hashlib.blake2b(what, digest_size=8).hexdigest())


def _policy_and_head(
    config: RewardModelConfig, policy_config: ModelConfig, mesh: Mesh, abstract: TrainState
) -> tuple[Params, Array]:
    """The policy's weights without MTP, and a head of zeros: every response starts out equal."""
    assert config.init is not None
    policy = DeepSeekV3(policy_config, config.precision)
    params, bias_LE = load_weights(config.init, policy, mesh)
    kept = {name: value for name, value in params.items() if not name.startswith("mtp")}
    head = abstract.params[HEAD]
    kept[HEAD] = jax.device_put(np.zeros(head.shape, head.dtype), head.sharding)
    return kept, bias_LE[: abstract.router_bias_LE.shape[0]]
