"""Rewards: functions of a prompt, a completion and a reference.

``answers`` compares by plain rules, ``equivalence`` by mathematics, ``code`` by running tests in a
``sandbox``; ``language`` and ``length`` judge the form; ``judge`` asks a model. ``total`` adds them
up and bounds what they may cost.
"""

from deepseek_jax.rewards.answers import (
    exact,
    multiple_choice,
    numeric,
    think_answer_format,
    think_format,
)
from deepseek_jax.rewards.code import CodeReward
from deepseek_jax.rewards.equivalence import MathEquivalence
from deepseek_jax.rewards.judge import SelfEvaluation
from deepseek_jax.rewards.killable import Killable
from deepseek_jax.rewards.language import language_consistency
from deepseek_jax.rewards.length import brevity, soft_overlong
from deepseek_jax.rewards.sandbox import Limits, Sandbox
from deepseek_jax.rewards.total import RewardReport, RewardSum, Term
from deepseek_jax.rewards.types import BatchReward, Completion, Reward, Sample

__all__ = [
    "BatchReward",
    "CodeReward",
    "Completion",
    "Killable",
    "Limits",
    "MathEquivalence",
    "Reward",
    "RewardReport",
    "RewardSum",
    "Sample",
    "Sandbox",
    "SelfEvaluation",
    "Term",
    "brevity",
    "exact",
    "language_consistency",
    "multiple_choice",
    "numeric",
    "soft_overlong",
    "think_answer_format",
    "think_format",
]
