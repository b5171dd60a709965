"""Conversations from files: ``messages``, or prompt and completion, as JSON lines or Parquet.

A record is one of::

    {"messages": [{"role": "user", "content": "..."},
                  {"role": "assistant", "reasoning_content": "...", "content": "..."}]}
    {"prompt": "...", "completion": "..."}
    {"messages": [...], "completion": "..."}

Other fields are passed over, so what a generation left is read as it is; of ``finish`` it is noted
whether the completion came to its end. Thinking may stand in ``reasoning_content`` or inside the
content as ``<think>...</think>``.
"""

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_jax.data.records import JsonRecords, ParquetRecords
from deepseek_jax.data.tokenizer import END_THINK, THINK
from deepseek_jax.types import UserError

ROLES = ("system", "user", "assistant")
_COLUMNS = ("messages", "prompt", "completion", "reasoning_content", "finish")


class Message(NamedTuple):
    """One turn; ``reasoning`` is what the assistant thought before it answered."""

    role: str
    content: str
    reasoning: str = ""
    finished: bool = True
    """False where generation stopped at its limit: the end is no end."""


Conversation = tuple[Message, ...]


class Conversations:
    """The conversations of some files, end to end; read one by one.

    Args:
        files: ``.jsonl`` or ``.parquet``.

    Raises:
        UserError: another format, or a file that cannot be opened; and, on reading, a record that
            is no conversation, named by its line.
    """

    def __init__(self, files: Sequence[Path]):
        self.parts: list[JsonRecords | ParquetRecords] = []
        for suffix, group in itertools.groupby(files, lambda path: path.suffix.lower()):
            paths = list(group)
            if suffix == ".parquet":
                remedy = "conversations are under `messages`, or `prompt` and `completion`"
                self.parts.append(ParquetRecords(paths, _COLUMNS, remedy))
            elif suffix == ".jsonl":
                self.parts += [JsonRecords(path) for path in paths]
            else:
                raise UserError(
                    f"{paths[0]} is neither .jsonl nor .parquet: write its conversations as lines "
                    "of JSON."
                )
        self._ends = list(itertools.accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Conversation:
        part, own = self._locate(index)
        try:
            return parse_record(part[own])
        except _BadRecord as error:
            raise UserError(f"{part.place(own)}: {error}") from error

    def place(self, index: int) -> str:
        """Where a conversation is, for a message."""
        part, own = self._locate(index)
        return part.place(own)

    def _locate(self, index: int) -> tuple[JsonRecords | ParquetRecords, int]:
        number = bisect_right(self._ends, index)
        return self.parts[number], index - (self._ends[number - 1] if number else 0)


class _BadRecord(ValueError):
    """What is wrong with a record, without its place."""


def parse_record(record: Any) -> Conversation:
    """A record as a conversation; ``ValueError`` says what is wrong with it."""
    if not isinstance(record, dict):
        raise _BadRecord("the record is not an object with fields: see `messages`.")
    record = {name: value for name, value in record.items() if value is not None}
    if "completion" not in record:
        if "messages" not in record:
            missing = "`completion`" if "prompt" in record else "`messages`"
            raise _BadRecord(
                f"the field {missing} is missing: a conversation is `messages`, or `prompt` and "
                "`completion`."
            )
        messages = parse_messages(record["messages"])
    else:
        if "messages" in record:
            before = parse_messages(record["messages"])
        elif isinstance(record.get("prompt"), str):
            before = (Message("user", record["prompt"]),)
        else:
            raise _BadRecord("the field `prompt` is missing, or not a text, beside `completion`.")
        fields = {"role": "assistant", "content": record["completion"]}
        if "reasoning_content" in record:
            fields["reasoning_content"] = record["reasoning_content"]
        said = _parse_message(fields, len(before) + 1)
        messages = (*before, said._replace(finished=record.get("finish") != "length"))
    if not any(message.role == "assistant" for message in messages):
        raise _BadRecord("no turn is the assistant's, so there is nothing to learn.")
    return messages


def parse_messages(value: Any) -> Conversation:
    """Turns as JSON has them; ``ValueError`` says what is wrong with them."""
    if not isinstance(value, list) or not value:
        raise _BadRecord("`messages` is not a list of turns.")
    return tuple(_parse_message(turn, number) for number, turn in enumerate(value, 1))


def _parse_message(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict):
        raise _BadRecord(f"turn {number} is not an object with `role` and `content`.")
    for name in ("role", "content"):
        if not isinstance(turn.get(name), str):
            raise _BadRecord(f"turn {number} has no text under `{name}`.")
    role, content, reasoning = turn["role"], turn["content"], turn.get("reasoning_content") or ""
    if role not in ROLES:
        raise _BadRecord(f"turn {number} has the role {role!r}; roles are {', '.join(ROLES)}.")
    if role != "assistant":
        return Message(role, content)
    if not isinstance(reasoning, str):
        raise _BadRecord(f"turn {number} has a `reasoning_content` that is not a text.")
    if not reasoning and END_THINK in content:
        # What a model says after a prompt that ends in <think> does not begin with it.
        reasoning, _, content = content.partition(END_THINK)
        reasoning = reasoning.strip().removeprefix(THINK)
    if not content.strip():
        raise _BadRecord(f"turn {number}, the assistant's, is empty: leave it out or fill it in.")
    reasoning = reasoning.strip()
    return Message(role, content.lstrip("\n") if reasoning else content, reasoning)
