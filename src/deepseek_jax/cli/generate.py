"""``deepseek-jax generate`` and ``deepseek-jax chat``."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress

from deepseek_jax.cli.serving import (
    Opened,
    ServingConfig,
    Stream,
    check_out,
    opened,
    with_seed,
)
from deepseek_jax.data.conversations import Message, parse_messages
from deepseek_jax.data.records import JsonRecords, decode
from deepseek_jax.data.tokenizer import THINK
from deepseek_jax.generate import Completion, Request, completion_text, text_request
from deepseek_jax.types import UserError


@dataclass(frozen=True)
class GenerateConfig(ServingConfig):
    """What to continue."""

    prompt: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")] = None
    """A text; - reads one from standard input."""
    prompts: Path | None = None
    """Instead: JSON lines, each with a `prompt` (a text to continue) or `messages` (a
    conversation to answer). Other fields are handed on."""
    out: Path | None = None
    """Where the completions of `prompts` go, as JSON lines; they can be fine-tuned on."""
    samples: int = 1
    """Completions of each prompt."""
    chat: bool = False
    """Take each prompt for what a user says, and answer it by the model's chat template."""
    stop: tuple[str, ...] = ()
    """Strings at which a completion ends, without them."""

    def __post_init__(self) -> None:
        """Refuse two prompts, or none, and to answer none of them."""
        super().__post_init__()
        if (self.prompt is None) == (self.prompts is None):
            raise UserError("generate takes a prompt or --prompts FILE, one of the two.")
        if (self.prompts is None) != (self.out is None):
            raise UserError("--prompts FILE and --out FILE go together.")
        if self.samples < 1:
            raise UserError(f"samples={self.samples} must be at least 1.")


class _Record(NamedTuple):
    fields: dict[str, Any]
    request: Request


def generate(config: GenerateConfig) -> None:
    """Continue a text, or every prompt of a file."""
    check_out(config.out)
    with opened(config) as ready:
        if config.prompts is not None:
            _generate_file(config, ready)
            return
        text = config.prompt
        if text == "-":
            text = decode(sys.stdin.buffer.read(), "standard input")
        assert text is not None
        request = _request(config, ready, {"prompt": text})
        console = Console(highlight=False)
        engine = ready.engine(config, len(request.prompt))  # says its sizes, on standard error
        engine.check(request)
        if not config.chat:
            console.print(text, end="", markup=False, soft_wrap=True)
        if config.samples == 1 and not config.stop:
            stream = Stream(console, ready.tokenizer, thinking=_thinks(ready, request))
            (done,) = engine.generate([request], lambda _, __, tokens: stream(tokens))
            stream.finish(done.tokens)
            return
        for done in engine.generate([request]):
            said = completion_text(ready.tokenizer, done, config.stop)
            console.print(said, markup=False, soft_wrap=True)


def _request(config: GenerateConfig, ready: Opened, fields: dict[str, Any]) -> Request:
    prompt: Any = fields.get("prompt")
    if "messages" in fields:
        prompt = ready.template().prompt_ids(parse_messages(fields["messages"]))
    elif not isinstance(prompt, str):
        raise ValueError("has neither a text under `prompt` nor `messages`.")
    elif config.chat:
        prompt = ready.template().prompt_ids([Message("user", prompt)])
    return text_request(
        ready.tokenizer, prompt, config.sampling, samples=config.samples, stop=config.stop
    )


def _thinks(ready: Opened, request: Request) -> bool:
    """Whether the prompt has begun the answer's thinking."""
    return ready.tokenizer.decode(request.prompt[-4:]).rstrip().endswith(THINK)


def _generate_file(config: GenerateConfig, ready: Opened) -> None:
    """Every line as soon as it is done goes to ``out.partial``; the whole, in order, to ``out``."""
    assert config.prompts is not None
    assert config.out is not None
    records = list(_read(config, ready, JsonRecords(config.prompts)))
    if not records:
        raise UserError(f"{config.prompts} holds no prompt.")
    engine = ready.engine(config, max(len(record.request.prompt) for record in records))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    partial = config.out.with_name(config.out.name + ".partial")
    lines: dict[tuple[int, int], str] = {}
    with partial.open("w", encoding="utf-8") as file, Progress() as progress:
        bar = progress.add_task("generating", total=len(records) * config.samples)
        for done in engine.generate([record.request for record in records]):
            fields = records[done.request].fields | _described(config, ready, done)
            line = json.dumps(fields, ensure_ascii=False) + "\n"
            lines[done.request, done.sample] = line
            file.write(line)
            file.flush()
            progress.advance(bar)
    ordered = [lines[which] for which in sorted(lines)]
    partial.write_text("".join(ordered), encoding="utf-8")
    partial.replace(config.out)
    Console().print(f"wrote {len(lines)} completions to {config.out}", markup=False)


def _described(config: GenerateConfig, ready: Opened, done: Completion) -> dict[str, Any]:
    return {
        "completion": completion_text(ready.tokenizer, done, config.stop),
        "sample": done.sample,
        "finish": done.finish,
        "num_tokens": len(done.tokens),
        "log_prob": float(np.sum(done.log_probs)),
    }


def _read(config: GenerateConfig, ready: Opened, records: JsonRecords) -> Iterator[_Record]:
    for index in range(len(records)):
        fields = records[index]
        try:
            if not isinstance(fields, dict):
                raise ValueError("is not an object with fields.")
            request = _request(config, ready, fields)
        except ValueError as error:
            raise UserError(f"{records.place(index)}: {error}") from error
        # A sample's randomness is its line's, not its place among those generated together.
        sampling = with_seed(config.sampling, config.sampling.seed + index)
        yield _Record(fields, request._replace(sampling=sampling))


# --- chat ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatConfig(ServingConfig):
    """A conversation."""

    system: str | None = None
    """What the model is told before the conversation. R1's authors advise against it."""


def chat(config: ChatConfig, ask: Callable[[str], str] = input) -> None:
    """Talk to a model. /reset begins anew, /exit leaves; Ctrl-C stops an answer."""
    console = Console(highlight=False)
    first = [] if config.system is None else [Message("system", config.system)]
    with opened(config) as ready:
        template, messages, turn = ready.template(), list(first), 0
        room = config.max_length or ready.model.config.max_position_embeddings
        engine = ready.engine(config, room - config.sampling.max_new_tokens)
        while True:
            try:
                said = ask("> ").strip()
            except (EOFError, KeyboardInterrupt):
                console.print()
                return
            except UnicodeDecodeError:
                console.print("that is not UTF-8; say it again", style="red", markup=False)
                continue
            if said == "/exit":
                return
            if said == "/reset":
                messages = list(first)
                console.print("a new conversation", style="dim")
                continue
            if not said:
                continue
            sampling = with_seed(config.sampling, config.sampling.seed + turn)
            turn += 1
            try:
                asked = [*messages, Message("user", said)]
                request = text_request(ready.tokenizer, template.prompt_ids(asked), sampling)
                engine.check(request)
            except UserError as error:
                console.print(f"{error} (/reset begins anew)", style="red", markup=False)
                continue
            stream, tokens = Stream(console, ready.tokenizer, thinking=_thinks(ready, request)), []

            def show(_: int, __: int, so_far: list[int], stream=stream, tokens=tokens) -> None:
                tokens[:] = so_far
                stream(so_far)

            try:
                (done,) = engine.generate([request], show)
                tokens = done.tokens
            except KeyboardInterrupt:
                console.print(" [stopped]", style="dim", end="", markup=False)
            answer = stream.finish(tokens)
            messages = [*asked, Message("assistant", answer)]
