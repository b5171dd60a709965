"""How a question is put to a model: as it is, in R1-Zero's words, or by the chat template."""

from typing import Literal

from deepseek_jax.data.chat import ChatTemplate
from deepseek_jax.data.conversations import Message
from deepseek_jax.data.tokenizer import Tokenizer

PromptStyle = Literal["plain", "r1_zero", "chat"]

# R1 (2501.12948) Table 1: a base model has no chat tokens, so the roles are plain text.
R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer. The reasoning process and answer are enclosed within <think> </think> "
    "and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> "
    "<answer> answer here </answer>. User: {prompt}. Assistant:"
)


class Prompter:
    """Questions into token ids.

    Args:
        style: ``plain`` continues the question; ``r1_zero`` wraps it in R1-Zero's template;
            ``chat`` asks it as a user, by ``template``.
        tokenizer: The model's.
        template: For ``chat``.
    """

    def __init__(
        self, style: PromptStyle, tokenizer: Tokenizer, template: ChatTemplate | None = None
    ):
        self.style, self.tokenizer, self.template = style, tokenizer, template

    def text(self, question: str) -> str:
        """What the model is given, as a reward sees it."""
        if self.style == "chat":
            assert self.template is not None
            return self.template.prompt([Message("user", question)])
        return R1_ZERO.format(prompt=question) if self.style == "r1_zero" else question

    def ids(self, question: str) -> list[int]:
        """The same in tokens, begin-of-sentence included."""
        if self.style == "chat":
            assert self.template is not None
            return self.template.prompt_ids([Message("user", question)])
        bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        return bos + self.tokenizer.encode(self.text(question))
