"""Stage 3: reinforcement learning with the language-consistency reward (R1 section 2.3.2)."""

from deepseek_jax.train.grpo import grpo
from deepseek_jax.train.reward_terms import RewardConfig
from experiments.r1.setting import Setting, learn, reinforcing


def reasoning(s: Setting) -> None:
    """Accuracy, form, and the share of English words in the thinking."""
    rewards = RewardConfig(language="en")
    config = reinforcing(
        s,
        "reasoning",
        "cold_start",
        s.reasoning_steps,
        rewards,
        peak_lr=1.5e-4,
        prompt_style="chat",
    )
    learn(grpo, config)
