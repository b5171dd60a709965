"""Rejection sampling: of a policy's answers, those fit to be imitated (R1 section 2.3.3)."""

import collections
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from deepseek_jax.data.tasks import Task
from deepseek_jax.evaluate import Solved
from deepseek_jax.rewards import Completion, language_consistency
from deepseek_jax.rewards.answers import split_thinking
from deepseek_jax.types import UserError


@dataclass(frozen=True)
class RejectionConfig:
    """What is kept.

    R1 left out wrong answers and thoughts in mixed languages, long paragraphs, blocks of code.
    """

    language: str | None = None
    """Of the thinking, as in ``en``; None: any."""
    min_language: float = 1.0
    """Least share of its words in this language."""
    longest: int | None = None
    """Tokens of an answer at the most; None: as many as were generated. One that was cut off is
    never kept."""
    longest_paragraph: int | None = None
    """Characters of a paragraph of the thinking at the most; None: any."""
    code_blocks: bool = False
    """Keep thinking that holds fenced code."""
    keep: int = 1
    """Answers to a task at the most, the first ones."""

    def __post_init__(self) -> None:
        """Refuse what keeps nothing."""
        if self.keep < 1 or not 0 <= self.min_language <= 1:
            raise UserError("keep must be at least 1, and min_language a share from 0 to 1.")
        if self.language is not None:
            language_consistency("", Completion("", 0), "", language=self.language)


class Sifted(NamedTuple):
    """What rejection sampling leaves."""

    records: list[dict[str, Any]]
    """``prompt``, ``completion``, ``answer``: conversations, ready for fine-tuning."""
    counts: dict[str, int]
    """Of all answers: why they went, and ``kept``."""


def sift(solved: Solved, tasks: Sequence[Task], config: RejectionConfig) -> Sifted:
    """The right, finished, readable and different answers to each task."""
    records: list[dict[str, Any]] = []
    counts = dict.fromkeys(
        ("sampled", "wrong", "cut_off", "long", "mixed", "unreadable", "repeated", "surplus"), 0
    )
    found: collections.Counter[str] = collections.Counter()
    for row, (task, samples) in enumerate(zip(tasks, solved.samples, strict=True)):
        kept: set[str] = set()
        for column, sample in enumerate(samples):
            text = " ".join(sample.completion.text.split())
            reason = (
                "wrong"
                if not solved.correct_Pk[row, column]
                else _fault(sample.prompt, sample.completion, config)
                or ("repeated" if text in kept else "surplus" if len(kept) == config.keep else "")
            )
            found[reason or "kept"] += 1
            if reason:
                continue
            kept.add(text)
            said = sample.completion.text
            records.append({"prompt": task.prompt, "completion": said, "answer": task.answer})
    return Sifted(records, counts | {"sampled": found.total(), "kept": 0} | found)


def _fault(prompt: str, said: Completion, config: RejectionConfig) -> str:
    """Why a right answer is not to be imitated; empty where it is."""
    if said.truncated:
        return "cut_off"
    if config.longest is not None and said.num_tokens > config.longest:
        return "long"
    parts = split_thinking(prompt, said.text)
    if parts is None:
        return "unreadable"
    if config.language is not None:
        share = language_consistency(prompt, said, "", language=config.language)
        if share < config.min_language:
            return "mixed"
    paragraphs = (len(paragraph) for paragraph in parts[0].split("\n"))
    most = config.longest_paragraph
    if (most is not None and max(paragraphs) > most) or (
        not config.code_blocks and "```" in parts[0]
    ):
        return "unreadable"
    return ""
