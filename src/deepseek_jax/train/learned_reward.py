"""A trained reward model as a reward: ``LearnedReward``."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deepseek_jax import sharding
from deepseek_jax.checkpoint import load_params
from deepseek_jax.checkpoint.run_directory import read_run
from deepseek_jax.config import ModelConfig, Precision
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.model.transformer import logical_axes, sharded_params
from deepseek_jax.rewards import Sample
from deepseek_jax.rewards.answers import split_thinking
from deepseek_jax.train.loop import divide_batch
from deepseek_jax.train.reward_model import RewardModel, encode, make_model, make_rows, scores
from deepseek_jax.types import Batch, Params, UserError


class LearnedReward:
    """Scores by a trained reward model: a ``rewards.BatchReward``.

    Args:
        directory: the run directory of ``train_reward_model``.
        seq_len: longest conversation; a longer one gets no verdict. None: as it was trained.
        rows: how many at a time.
        mesh: over which the model is divided.
        precision: of the computation.
        squash: sigmoid of the score, from 0 to 1: a grade for ``bce``, and a bound on what a
            policy can gain from a pairwise model's mistakes.
        summary: judge what stands after the thinking alone (R1 section 3.1, helpfulness).

    Raises:
        UserError: the directory holds no reward model.
    """

    def __init__(
        self,
        directory: Path,
        *,
        seq_len: int | None = None,
        rows: int = 16,
        mesh: str = "data=-1",
        precision: Precision = Precision(),  # noqa: B008 (immutable)
        squash: bool = True,
        summary: bool = False,
    ):
        run = read_run(directory)
        if run.get("stage") != "reward_model":
            raise UserError(f"{directory} holds a {run.get('stage')} run, not a reward model.")
        self._mesh = sharding.make_mesh(mesh)
        self._model = make_model(ModelConfig.from_hf(run["model"]), precision)
        with jax.set_mesh(self._mesh):
            self._params, bias_LE, _ = load_params(
                directory, sharded_params(self._model, self._mesh)
            )
        self._bias_LE = np.asarray(bias_LE)
        self._tokenizer = Tokenizer.load(directory / "tokenizer.json")
        self._seq_len = seq_len or int(run["seq_len"])
        self._squash, self._summary = squash, summary
        self._feed = divide_batch(rows, self._seq_len, self._mesh)
        self._rows = rows

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """The score of each sample; NaN for what is too long, or has no end of its thinking."""
        said = [summary(s) if self._summary else s.completion.text for s in samples]
        encoded = [
            None if text is None else encode(self._tokenizer, s.prompt, text)
            for s, text in zip(samples, said, strict=True)
        ]
        found = np.full(len(samples), np.nan)
        fitting = {i: row for i, row in enumerate(encoded) if row and len(row) <= self._seq_len}
        for first in range(0, len(fitting), self._rows):
            chosen = list(fitting)[first : first + self._rows]
            rows = [fitting[i] for i in chosen]
            rows += [rows[0]] * (self._rows - len(rows))
            batch = make_rows(rows, [0] * len(rows), self._seq_len)
            with jax.set_mesh(self._mesh):
                placed = self._feed.place([self._feed.own(batch)])
                values = _score_rows(self._model, self._params, self._bias_LE, placed)
            found[chosen] = np.asarray(values)[: len(chosen)]
        if self._squash:
            found = (1 + np.tanh(found / 2)) / 2  # the sigmoid, without overflow
        return found.tolist()


def summary(sample: Sample) -> str | None:
    """What is said after the thinking; None where the thinking has no end."""
    parts = split_thinking(sample.prompt, sample.completion.text)
    return None if parts is None else parts[1].strip()


@functools.partial(jax.jit, static_argnums=0)
def _score_rows(model: RewardModel, params: Params, bias_LE: Any, batch_1BT: Batch) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    specs = sharding.param_specs(mesh, logical_axes(model), params)
    rows = sharding.spec("batch", "sequence")

    def per_device(params: Params, bias_LE: jax.Array, batch: Batch) -> jax.Array:
        return scores(model, params, bias_LE, batch).scores_B

    run = sharding.per_device(
        per_device, (specs, sharding.spec(), Batch(*[rows] * 5)), sharding.spec("batch")
    )
    return run(params, bias_LE, Batch(*(x[0] for x in batch_1BT)))
