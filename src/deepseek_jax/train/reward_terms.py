"""What a run of reinforcement learning rewards: rules, and a learned reward model."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax

from deepseek_jax.config import Precision
from deepseek_jax.rewards import (
    Completion,
    Term,
    brevity,
    language_consistency,
    soft_overlong,
    think_answer_format,
)
from deepseek_jax.rewards.verifiers import Verifier, verifier
from deepseek_jax.train.learned_reward import LearnedReward
from deepseek_jax.types import UserError


@dataclass(frozen=True)
class RewardConfig:
    """What is rewarded; R1-Zero: accuracy and format alike, by rules alone (section 2.2)."""

    verifier: Verifier = "auto"
    """How an answer, in <answer> or \\boxed, is compared; auto: as generated tasks want it,
    exactly otherwise."""
    accuracy_weight: float = 1.0
    format_weight: float = 1.0
    """Of <think>...</think><answer>...</answer> and nothing else."""
    language: str | None = None
    """Add the share of the thinking's words in this language (R1 section 2.3.2), as in ``en``."""
    overlong_buffer: int = 0
    """Tokens before ``max_new_tokens`` over which the reward falls by 1 (DAPO Eq. 13); 0: off."""
    brevity_weight: float = 0.0
    """Of a reward that falls with the length."""
    reward_model: Path | None = None
    """A run of ``deepseek-jax reward-model``: judges the answers to ``--general`` prompts, by what
    stands after the thinking (R1 section 2.3.4)."""
    preference_weight: float = 1.0
    """Of the reward model's score, from 0 to 1."""

    def terms(self, source: str, max_tokens: int) -> list[Term]:
        """The rewards of tasks from ``source``; accuracy and format are reported at any weight."""
        terms = [
            Term("accuracy", self.accuracy_weight, verifier(self.verifier, source), "reasoning"),
            Term("format", self.format_weight, think_answer_format),
        ]
        if self.language is not None:
            language = partial(language_consistency, language=self.language)
            language("", Completion("", 0), "")  # complains now of a language that is not known
            terms.append(Term("language", 1.0, language))
        if self.overlong_buffer:
            overlong = partial(soft_overlong, max_tokens=max_tokens, buffer=self.overlong_buffer)
            overlong("", Completion("", 0), "")
            terms.append(Term("overlong", 1.0, overlong))
        if self.brevity_weight:
            short = partial(brevity, max_tokens=max_tokens)
            terms.append(Term("brevity", self.brevity_weight, short))
        return terms

    def learned(self, mesh: str, precision: Precision) -> list[Term]:
        """The reward model's term, if one is named.

        Raises:
            UserError: the directory holds no reward model, or the run has several processes.
        """
        if self.reward_model is None:
            return []
        if jax.process_count() > 1:
            raise UserError("a reward model scores in a run of one process; start one alone.")
        model = LearnedReward(self.reward_model, mesh=mesh, precision=precision, summary=True)
        return [Term("preference", self.preference_weight, model, "general")]
