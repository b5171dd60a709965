"""Stage 2: a cold start from the base on few long demonstrations in English (R1 section 2.3.1)."""

from deepseek_jax.train.sft import sft
from experiments.r1.setting import Setting, learn, tuning


def cold_start(s: Setting) -> None:
    """A few hundred conversations, several epochs: R1 had thousands."""
    learn(sft, tuning(s, "cold_start", "base", ("demonstrations",), s.cold_epochs))
