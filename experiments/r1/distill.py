"""Stage 6: the result distilled into a smaller model; beside it, the latter's own RL (R1 2.4)."""

from deepseek_jax.train.distill import DistillConfig
from deepseek_jax.train.grpo import grpo
from deepseek_jax.train.sft import sft
from experiments.r1.rejection import samples_of
from experiments.r1.setting import Setting, learn, reinforcing, tuning
from experiments.r1.zero import RULES


def student_sft(s: Setting) -> None:
    """SFT on samples, as the paper distils."""
    samples_of(s, "scenarios", "taught")
    learn(sft, tuning(s, "student_sft", "student_base", ("taught",), s.tuning_epochs))


def student_logits(s: Setting) -> None:
    """The same samples, half of the loss being the divergence from the teacher's distribution."""
    samples_of(s, "scenarios", "taught")
    taught = DistillConfig(teacher=s.out / "scenarios")
    config = tuning(
        s, "student_logits", "student_base", ("taught",), s.tuning_epochs, distill=taught
    )
    learn(sft, config)


def student_rl(s: Setting) -> None:
    """R1-Zero's way, without a teacher; as many steps as the large model had."""
    config = reinforcing(s, "student_rl", "student_base", s.zero_steps, RULES, prompt_style="plain")
    learn(grpo, config)
