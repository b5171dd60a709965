"""Stage 1, R1-Zero: reinforcement learning on the base, with rules alone (R1 section 2.2)."""

from deepseek_jax.train.grpo import grpo
from deepseek_jax.train.reward_terms import RewardConfig
from experiments.r1.setting import Setting, learn, reinforcing

# The base has seen no chat: the question is put as in its text. R1-Zero's template of 480
# characters would be most of every row of bytes.
RULES = RewardConfig(accuracy_weight=1.0, format_weight=1.0)


def zero(s: Setting) -> None:
    """Accuracy and form."""
    config = reinforcing(s, "zero", "base", s.zero_steps, RULES, prompt_style="plain")
    learn(grpo, config)
