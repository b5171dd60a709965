"""Tasks solved and judged: pass@k, maj@k, and what the answers look like."""

import collections
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import comb
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from deepseek_jax.data.prompts import Prompter
from deepseek_jax.data.tasks import Task
from deepseek_jax.generate import Engine, Sampling, completion_text, text_request
from deepseek_jax.rewards import Completion, Reward, Sample, think_answer_format
from deepseek_jax.rewards.answers import extract_answer
from deepseek_jax.rewards.total import RewardSum, Term


class Solved(NamedTuple):
    """k attempts at each of P tasks."""

    samples: list[list[Sample]]
    correct_Pk: Bool[np.ndarray, "P k"]
    """Where the verifier's reward is 1."""
    formatted_Pk: Bool[np.ndarray, "P k"]
    """In R1's form, thinking and answer each in their tags."""
    truncated_Pk: Bool[np.ndarray, "P k"]
    tokens_Pk: Int[np.ndarray, "P k"]

    def scalars(self) -> dict[str, float]:
        """Everything in one table: rates in [0, 1], lengths in tokens."""
        k = self.correct_Pk.shape[1]
        powers = [2**i for i in range(1, k.bit_length()) if 2**i <= k]
        figures = {"pass@1": float(self.correct_Pk.mean())}
        figures |= {f"pass@{n}": pass_at(n, self.correct_Pk) for n in powers}
        if k > 1:
            figures[f"maj@{k}"] = self.majority()
        return figures | {
            "format": float(self.formatted_Pk.mean()),
            "truncated": float(self.truncated_Pk.mean()),
            "tokens": float(self.tokens_Pk.mean()),
            "groups_without_spread": float(
                (self.correct_Pk == self.correct_Pk[:, :1]).all(1).mean()
            ),
        }

    def majority(self) -> float:
        """maj@k: the answer given most often (of as many, the first given) is judged."""
        right = 0
        for row, samples in enumerate(self.samples):
            answers = [extract_answer(s.prompt, s.completion.text) for s in samples]
            votes = collections.Counter(answer for answer in answers if answer is not None)
            if votes:
                right += bool(self.correct_Pk[row, answers.index(votes.most_common(1)[0][0])])
        return right / len(self.samples)


def pass_at(n: int, correct_Pk: Bool[np.ndarray, "P k"]) -> float:
    """Chance that one of n attempts is right: 1 - C(k - c, n) / C(k, n) (Chen et al., 2021)."""
    k = correct_Pk.shape[1]
    return float(np.mean([1 - comb(k - int(c), n) / comb(k, n) for c in correct_Pk.sum(1)]))


def solve(
    engine: Engine,
    prompter: Prompter,
    tasks: Sequence[Task],
    verifier: Reward,
    sampling: Sampling,
    samples: int = 1,
    on_done: Callable[[], None] | None = None,
) -> Solved:
    """Attempt every task ``samples`` times and judge.

    A verifier that raises or hangs counts as a wrong answer.
    """
    tokenizer = prompter.tokenizer
    # With one seed for all, the same unlucky draw would spoil the same token of every task.
    seeded = (replace(sampling, seed=sampling.seed + i) for i in range(len(tasks)))
    requests = [
        text_request(tokenizer, prompter.ids(task.prompt), how, samples=samples)
        for task, how in zip(tasks, seeded, strict=True)
    ]
    found: dict[tuple[int, int], Sample] = {}
    for done in engine.generate(requests):
        task = tasks[done.request]
        said = Completion(
            completion_text(tokenizer, done), len(done.tokens), done.finish == "length"
        )
        found[done.request, done.sample] = Sample(prompter.text(task.prompt), said, task.answer)
        if on_done is not None:
            on_done()
    grid = [[found[i, j] for j in range(samples)] for i in range(len(tasks))]
    flat = [sample for row in grid for sample in row]
    terms = [Term("correct", 1.0, verifier), Term("format", 1.0, think_answer_format)]
    report = RewardSum(terms)(flat)
    shape = (len(tasks), samples)

    def each(values: Any) -> np.ndarray:
        return np.asarray(values).reshape(shape)

    return Solved(
        grid,
        each(report.rewards_KB[0]) == 1,
        each(report.rewards_KB[1]) == 1,
        each([s.completion.truncated for s in flat]),
        each([s.completion.num_tokens for s in flat]),
    )
