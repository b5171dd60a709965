"""Chat templates, and what of a rendered conversation is to be learnt.

A template turns turns into one text. The tokenizer's own (Jinja, as in Hugging Face's files) is
used where it has one, DeepSeek-V3's and R1's otherwise. Tokens to learn are found without looking
for them in the text: a turn is rendered as a *prompt*, exactly as generation will render it,
followed by what the model is to say. Prompt and answer are encoded apart, as in generation, so the
generation prompt's tokens begin the training tokens by construction.

The public DeepSeek templates cut ``<think>...</think>`` out of every assistant turn. That is right
for the turns of the past, which lose their thinking in generation too, and would be silently wrong
for the turns learnt. Here the latter never pass through the template.
"""

import datetime
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deepseek_jax.data.conversations import Conversation, Message
from deepseek_jax.data.packing import Sample
from deepseek_jax.data.tokenizer import ASSISTANT, END_THINK, THINK, USER, Tokenizer
from deepseek_jax.types import UserError

# What the released R1 template does without tools: the system's text bare after BOS, no newline
# anywhere, thinking cut out of the turns of the past.
DEEPSEEK = """\
{{- bos_token }}
{%- for message in messages if message.role == 'system' -%}
{{- '' if loop.first else '\\n\\n' }}{{ message.content }}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{- '<｜User｜>' + message.content }}
{%- elif message.role == 'assistant' %}
{{- '<｜Assistant｜>' + message.content.split('</think>')[-1] + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜>' }}{% endif %}"""

FILE = "chat_template.jinja"
TrainOn = Literal["all", "last"]

# Unicode reserves these code points for a program's own use: no text contains them.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_ANSWER = f"{_OPEN}answer{_CLOSE}"
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


class ChatTemplate:
    """A template and the tokenizer that it is for.

    Args:
        source: Jinja. It is data from outside: it runs in Jinja's sandbox, on copies.
        tokenizer: Reads special tokens in what the template says, never in what people say.
        name: Of the template, for messages.

    Raises:
        UserError: not Jinja; a template that raises, drops the assistant's words, or ends its
            turns without the tokenizer's end-of-sentence token, which could not be learnt then.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, name: str):
        self.source = source
        self._tokenizer, self._name = tokenizer, name
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"{name} is not a Jinja template ({error}): mend it.") from error
        self._ending = self._find_ending()

    @classmethod
    def load(cls, folder: str | Path, tokenizer: Tokenizer) -> "ChatTemplate":
        """The template beside a tokenizer, as Hugging Face stores it; else DeepSeek's own.

        Raises:
            UserError: as the class; or DeepSeek's is wanted and the tokenizer lacks its tokens.
        """
        path = Path(folder) / FILE
        if path.is_file():
            return cls(path.read_text(encoding="utf-8"), tokenizer, str(path))
        config = Path(folder) / "tokenizer_config.json"
        if config.is_file():
            found = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
            if isinstance(found, list):  # several, by name
                named = {entry.get("name"): entry.get("template") for entry in found}
                found = named.get("default")
            if isinstance(found, str):
                return cls(found, tokenizer, f"the chat template in {config}")
        if None in (tokenizer.bos_id, tokenizer.token_id(USER), tokenizer.token_id(ASSISTANT)):
            raise UserError(
                f"{folder} has no chat template, and its tokenizer lacks the tokens of DeepSeek's "
                f"({USER}, {ASSISTANT}): put a {FILE} beside the tokenizer.json."
            )
        return cls(DEEPSEEK, tokenizer, "DeepSeek's chat template")

    def prompt(self, messages: Sequence[Message], *, thinking: bool = True) -> str:
        """What generation continues: the turns so far, and the words that begin the answer.

        Args:
            messages: The turns so far; those of the assistant lose their thinking.
            thinking: Passed on to templates that know two ways to begin an answer.
        """
        return self._restore(self._render(messages, thinking=thinking, answering=True))

    def prompt_ids(self, messages: Sequence[Message], *, thinking: bool = True) -> list[int]:
        """``prompt`` in tokens, begin-of-sentence included if the template says it, once."""
        return self._encode(self._render(messages, thinking=thinking, answering=True))

    def samples(self, conversation: Conversation, train_on: TrainOn = "all") -> list[Sample]:
        """The conversation in tokens, each turn to be learnt after the prompt it would have had.

        One sample as long as what comes next begins with all that was said. Where it does not,
        because an earlier turn has lost its thinking, say, another sample begins.
        """
        turns = [i for i, message in enumerate(conversation) if message.role == "assistant"]
        done: list[Sample] = []
        ids: list[int] = []
        weights: list[float] = []
        for i in turns if train_on == "all" else turns[-1:]:
            message = conversation[i]
            prompt = self._render(
                conversation[:i], thinking=bool(message.reasoning), answering=True
            )
            before = self._encode(prompt)
            if before[: len(ids)] != ids:
                done.append(_sample(ids, weights))
                ids, weights = [], []
            new = before[len(ids) :]
            said = self._encode(self._answer(message, prompt) + self._ending)
            ids = ids + new + said
            weights = weights + [0.0] * len(new) + [1.0] * len(said)
        return [*done, _sample(ids, weights)]

    def _answer(self, message: Message, prompt: str) -> str:
        """What the model is to say after a prompt, which may have begun its thinking already."""
        content, reasoning = self._escape(message.content), self._escape(message.reasoning)
        if begun := re.search(f"{THINK}(\n*)$", prompt):
            gap = begun[1][:1]
            return f"{reasoning}{gap}{END_THINK}{gap * 2}{content}"
        if not reasoning:
            return content
        if prompt.rstrip().endswith(END_THINK):
            raise UserError(
                f"{self._name} ends the thinking before the answer begins, but this answer has "
                "been thought about: use a template that lets the model think."
            )
        return f"{THINK}\n{reasoning}\n{END_THINK}\n\n{content}"

    def _find_ending(self) -> str:
        """What the template says after the assistant's words, up to the end-of-sentence token."""
        turns = (Message("user", "?"), Message("assistant", _ANSWER))
        text = self._render(turns, thinking=False, answering=False, escape=False)
        if text.count(_ANSWER) != 1:
            raise UserError(f"{self._name} does not say the assistant's words once: mend it.")
        ending = text.partition(_ANSWER)[2]
        eos = self._tokenizer.eos_token
        if eos is None or eos not in ending:
            raise UserError(
                f"{self._name} ends the assistant's turns with {ending!r} and not with the "
                f"tokenizer's end-of-sentence token {eos!r}, so that no model could learn to stop: "
                "name the token that ends a turn as eos_token in tokenizer_config.json."
            )
        return ending[: ending.index(eos) + len(eos)]

    def _render(
        self,
        messages: Sequence[Message],
        *,
        thinking: bool,
        answering: bool,
        escape: bool = True,
    ) -> str:
        say = self._escape if escape else str
        try:
            return self._template.render(
                messages=[{"role": m.role, "content": say(m.content)} for m in messages],
                add_generation_prompt=answering,
                bos_token=self._tokenizer.bos_token or "",
                eos_token=self._tokenizer.eos_token or "",
                # DeepSeek-V3.1's name for it, and Qwen's.
                thinking=thinking,
                enable_thinking=thinking,
                tools=None,
            )
        except Exception as error:  # a template can raise anything
            reason = str(error).strip() or type(error).__name__
            raise UserError(f"{self._name} refuses the conversation: {reason}") from error

    # A message that spells <｜Assistant｜> must not begin a turn. Names of special tokens in it
    # become marks before rendering, and characters after it.

    def _escape(self, text: str) -> str:
        if _OPEN in text:
            raise UserError("a text holds U+FDD0, which is no character: take it out.")
        names = self._tokenizer.special_tokens
        return self._special.sub(lambda found: f"{_OPEN}{names.index(found[0])}{_CLOSE}", text)

    def _restore(self, text: str) -> str:
        return _MARK.sub(lambda found: self._tokenizer.special_tokens[int(found[1])], text)

    def _encode(self, text: str) -> list[int]:
        parts = _MARK.split(text)
        ids = self._tokenizer.encode(parts[0], allow_special=True)
        for number, said in zip(parts[1::2], parts[2::2], strict=True):
            ids += self._tokenizer.encode(self._tokenizer.special_tokens[int(number)])
            ids += self._tokenizer.encode(said, allow_special=True)
        return ids

    @functools.cached_property
    def _special(self) -> re.Pattern[str]:
        names = sorted(self._tokenizer.special_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")


def _sample(ids: list[int], weights: list[float]) -> Sample:
    return Sample(np.array(ids, np.int32), np.array(weights, np.float32))


class _Generation(Extension):
    """``{% generation %}``, by which some templates mark the assistant's words: passed over."""

    tags = {"generation"}  # noqa: RUF012, Jinja's name and kind

    def parse(self, parser: Any) -> list[nodes.Node]:
        """The body alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers': what templates in the wild are written for."""

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    own: dict[str, Any] = {
        "raise_exception": fail,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    environment.globals.update(own)
    return environment
