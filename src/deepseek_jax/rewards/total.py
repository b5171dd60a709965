"""The weighted sum of several rewards, each reported apart."""

import contextlib
import functools
import math
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from deepseek_jax.rewards.killable import Hung
from deepseek_jax.rewards.types import BatchReward, Reward, Sample
from deepseek_jax.types import UserError


class Term(NamedTuple):
    """One reward of a sum."""

    name: str
    weight: float
    reward: Reward | BatchReward
    on: Literal["all", "reasoning", "general"] = "all"
    """The samples it judges: with a right answer, or without one (R1 section 2.3.4)."""

    def judges(self, sample: Sample) -> bool:
        """Whether the term has something to say of the sample."""
        return self.on == "all" or sample.general == (self.on == "general")


class RewardReport(NamedTuple):
    """What a sum of rewards says about some samples."""

    total_B: Float[np.ndarray, "B"]
    """What to learn from: the sum of weight times reward."""
    rewards_KB: Float[np.ndarray, "K B"]
    """Each term's own, unweighted; 0 where it failed, NaN where it does not judge."""
    raised_K: Int[np.ndarray, "K"]
    """Samples for which a term raised, or gave what is no finite number."""
    hung_K: Int[np.ndarray, "K"]
    """Samples for which a term did not end in time."""
    names: tuple[str, ...]
    first_error: str | None
    """The first of them, in words."""

    def metrics(self) -> dict[str, float]:
        """Mean reward in all, and of each term; failures where there are any."""
        figures = {"reward": float(self.total_B.mean())}
        figures |= term_means(self.names, self.rewards_KB)
        for word, counts in (("raised", self.raised_K), ("hung", self.hung_K)):
            for name, count in zip(self.names, counts, strict=True):
                if count:
                    figures[f"reward_{word}/{name}"] = float(count)
        return figures


def term_means(names: Sequence[str], rewards_KB: Float[np.ndarray, "K B"]) -> dict[str, float]:
    """``reward/name``: each term's mean over what it judges; none where that is nothing."""
    pairs = zip(names, (row[~np.isnan(row)] for row in rewards_KB), strict=True)
    return {f"reward/{name}": float(row.mean()) for name, row in pairs if len(row)}


class RewardSum:
    """Scores samples by several rewards. A failure costs the sample that term, not the run.

    Args:
        terms: the rewards, of different names.
        deadline_s: for one sample and term. A reward that keeps one for itself (it has a
            ``deadline_s``, as those with processes of their own do) is left to it and called from
            several threads; a ``BatchReward``, which is a model, is not bounded. All others are
            interrupted by a signal, which works in the main thread alone and not in the midst of
            C code: let what may hang there run in a ``killable.Killable``.

    Raises:
        UserError: no terms, or two of one name.
    """

    def __init__(self, terms: Sequence[Term], *, deadline_s: float | int = 5.0):
        self._terms, self._deadline_s = tuple(terms), float(deadline_s)
        names = [term.name for term in self._terms]
        if not names or len(set(names)) < len(names):
            raise UserError(f"rewards need different names, at least one: not {names}.")
        if any(not math.isfinite(term.weight) for term in self._terms):
            raise UserError("the weights of rewards must be finite.")

    def __call__(self, samples: Sequence[Sample]) -> RewardReport:
        """Scores of ``samples``.

        Raises:
            UserError: called outside the main thread with a term that only a signal can stop.
        """
        K, B = len(self._terms), len(samples)
        rewards_KB = np.full((K, B), np.nan)
        raised_K, hung_K = np.zeros(K, int), np.zeros(K, int)
        first_error: str | None = None
        for k, term in enumerate(self._terms):
            judged = [b for b, sample in enumerate(samples) if term.judges(sample)]
            values = self._score(term, [samples[b] for b in judged]) if judged else []
            for b, value in zip(judged, values, strict=True):
                rewards_KB[k, b] = 0.0
                if isinstance(value, float) and math.isfinite(value):
                    rewards_KB[k, b] = value
                    continue
                hung_K[k] += (hung := isinstance(value, Hung))
                raised_K[k] += not hung
                first_error = first_error or f"{term.name}: {value!r}"
        weights_K = np.array([term.weight for term in self._terms], float)
        names = tuple(term.name for term in self._terms)
        return RewardReport(
            weights_K @ np.nan_to_num(rewards_KB), rewards_KB, raised_K, hung_K, names, first_error
        )

    def _score(self, term: Term, samples: Sequence[Sample]) -> Sequence[float | Exception]:
        """A number or the reason why there is none, for each sample."""
        reward = term.reward
        if isinstance(reward, BatchReward):
            try:
                values = [float(value) for value in reward.score(samples)]
                if len(values) != len(samples):
                    raise ValueError(f"{len(values)} values for {len(samples)} samples")
                return values
            except Exception as error:
                return [error] * len(samples)
        if hasattr(reward, "deadline_s"):  # what waits for other processes can wait for several
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return list(pool.map(functools.partial(_attempt, reward), samples))
        if threading.current_thread() is not threading.main_thread():
            raise UserError(
                f"the reward {term.name!r} is bounded by a signal, which the main thread alone "
                "gets; score there, or let it run in a rewards.Killable."
            )
        scores: list[float | Exception] = []
        for sample in samples:
            try:
                with self._deadline():
                    scores.append(_attempt(reward, sample))
            except _Interrupted:
                scores.append(Hung(f"no answer within {self._deadline_s:g} s"))
        return scores

    @contextlib.contextmanager
    def _deadline(self) -> Iterator[None]:
        armed = True

        def interrupt(*_: object) -> None:
            if armed:
                raise _Interrupted

        before = signal.signal(signal.SIGALRM, interrupt)
        # Again and again: a reward that catches everything is not to catch the last one.
        signal.setitimer(signal.ITIMER_REAL, self._deadline_s, self._deadline_s)
        try:
            try:
                yield
            finally:
                armed = False
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def _attempt(reward: Reward, sample: Sample) -> float | Exception:
    try:
        return float(reward(sample.prompt, sample.completion, sample.reference))
    except Exception as error:
        return error


class _Interrupted(BaseException):
    """Not an ``Exception``, so that a reward which catches those does not catch it."""
