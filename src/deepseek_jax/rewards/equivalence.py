r"""Mathematical equivalence by math-verify (extra ``rl``).

It computes what the answer spells, so ``9^{9^{9^9}}`` would keep it busy for ever: every comparison
has a deadline, after which its process is killed. And it is lenient, so the answer must stand in
``\boxed{}`` or ``<answer>`` and must not be a list or an alternative where the reference is none.
"""

import importlib
import importlib.util
import logging
import re
from typing import Any

from deepseek_jax.rewards.answers import balanced, extract_answer
from deepseek_jax.rewards.killable import Killable
from deepseek_jax.rewards.types import Completion
from deepseek_jax.types import UserError

_LONGEST_ANSWER = 1000
_THOUSANDS = re.compile(r"(?<![0-9.])[0-9]{1,3}(?:(?:,|\{,\}|\\,)[0-9]{3})+(?![0-9])")
# More than one value, or none in particular.
_HEDGES = re.compile(
    r"[,;]|\\(?:lor|vee|land|wedge|cup|pm|mp|quad|cdots|ldots|dots|approx|sim|ne|neq)(?![A-Za-z])"
    r"|[±∓≈≠∨∧∪]|\b(?:or|and|either|maybe|not|between|about|approximately|to)\b|\.\.\."
)


class MathEquivalence:
    r"""1 if the answer and the reference are the same mathematically; else 0.

    ``1/2``, ``0.5`` and ``\frac{1}{2}`` are. So are an expression and its value: where the
    question itself is an expression, its copy would be right, and ``answers.numeric`` is the
    reward to take. A context manager; it owns a process.

    Args:
        deadline_s: of one comparison.

    Raises:
        UserError: math-verify is not installed.
    """

    def __init__(self, *, deadline_s: float | int = 5.0):
        if importlib.util.find_spec("math_verify") is None:
            raise UserError(
                "mathematical equivalence needs math-verify; install it by "
                "`pip install -e '.[rl]'`."
            )
        self._equal = Killable(_equal, deadline_s=deadline_s, memory_bytes=2 * 2**30)
        self.deadline_s = self._equal.deadline_s

    def __call__(self, prompt: str, completion: Completion, reference: str) -> float:
        """The reward.

        Raises:
            killable.Hung: The comparison did not end.
            killable.Failed: It raised, or wanted too much memory.
            UserError: math-verify cannot read the reference.
        """
        answer = extract_answer(prompt, completion.text)
        if answer is None or len(answer) > _LONGEST_ANSWER:
            return 0.0
        if _plain(answer) == _plain(reference):
            return 1.0
        if hedged(answer, reference) or not balanced(answer):
            return 0.0
        equal = self._equal(_plain(reference), _plain(answer))
        if equal is None:
            raise UserError(f"math-verify cannot read the reference {reference!r}.")
        return float(equal)

    def close(self) -> None:
        """End the process."""
        self._equal.close()

    def __enter__(self) -> "MathEquivalence":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def hedged(answer: str, reference: str) -> bool:
    """Whether the answer has a sign of several values that the reference lacks."""
    marks = set(_HEDGES.findall(_plain(answer))) - set(_HEDGES.findall(_plain(reference)))
    return bool(marks) or _plain(answer).count("=") > max(1, _plain(reference).count("="))


def _plain(text: str) -> str:
    """Without dollar signs around it and commas between thousands."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] == "$" and "$" not in text[1:-1]:
        text = text[1:-1].strip()
    return _THOUSANDS.sub(lambda match: re.sub(r"[^0-9]", "", match[0]), text)


def _equal(reference: str, answer: str) -> bool | None:
    """In the other process; None where the reference cannot be read."""
    math_verify = importlib.import_module("math_verify")  # takes a second; not in every install
    logging.disable(logging.WARNING)  # that the deadline is ours to keep

    def read(text: str) -> list[Any]:
        return math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=None)

    expected = read(reference)
    if not expected:
        return None
    return math_verify.verify(expected, read(answer), timeout_seconds=None)
