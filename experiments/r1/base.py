"""Stage 0: the base, pretrained on text that contains the task's language (see ``text``)."""

from deepseek_jax.train.pretrain import pretrain
from experiments.r1.setting import STUDENT, Setting, learn, pretraining


def base(s: Setting) -> None:
    """The policy's."""
    learn(pretrain, pretraining(s, "base", s.model))


def student_base(s: Setting) -> None:
    """The smaller model's, on the same text."""
    learn(pretrain, pretraining(s, "student_base", STUDENT))
