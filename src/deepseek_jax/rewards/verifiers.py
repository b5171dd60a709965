"""Which reward says whether an answer is right."""

from typing import Literal

from deepseek_jax.rewards.answers import exact, multiple_choice, numeric
from deepseek_jax.rewards.code import CodeReward
from deepseek_jax.rewards.equivalence import MathEquivalence
from deepseek_jax.rewards.puzzles import reward_for
from deepseek_jax.rewards.sandbox import Sandbox
from deepseek_jax.rewards.types import Reward

Verifier = Literal["auto", "exact", "numeric", "math", "choice", "code"]


def verifier(kind: Verifier, source: str) -> Reward:
    """The reward by its name; ``auto``: the strict one for the source of the tasks."""
    if kind == "auto":
        return reward_for(source)
    if kind == "math":
        return MathEquivalence()
    if kind == "code":
        return CodeReward(Sandbox())
    return {"exact": exact, "numeric": numeric, "choice": multiple_choice}[kind]
