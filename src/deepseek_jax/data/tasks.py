"""Questions with answers that can be checked: what reinforcement learning asks.

A source is a sequence of ``Task``; ``split`` holds a share of it out by content, and ``TaskStream``
visits the rest in a new order each epoch, from any point on.
"""

import hashlib
import importlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from deepseek_jax.types import UserError


class Task(NamedTuple):
    """One question."""

    prompt: str
    answer: str
    """What a reward compares with: an answer, or tests as JSON."""
    fields: Mapping[str, Any] = {}
    """Whatever else its source says of it."""
    general: bool = False
    """Nothing to be right about: what people prefer decides (R1 section 2.3.4)."""


def open_tasks(source: str, *, size: int = 10_000, seed: int = 0) -> Sequence[Task]:
    """The tasks that ``source`` names.

    Args:
        source: A ``.jsonl`` file with the fields ``prompt`` and ``answer``; ``add:N``, sums of
            two N-digit numbers; or ``rg:name``, a data set of reasoning-gym, with its options
            as in ``rg:chain_sum,max_terms=3``.
        size: How many to generate. Fewer come where there are fewer, or where questions repeat.
        seed: Of what is generated.

    Raises:
        UserError: The source does not exist or cannot be read.
    """
    if source.startswith("add:"):
        digits = source.removeprefix("add:")
        if not digits.isdecimal():
            raise UserError(f"{source!r} needs a number of digits, as in add:3.")
        return addition(int(digits), size=size, seed=seed)
    if source.startswith("rg:"):
        name, *options = source.removeprefix("rg:").split(",")
        return reasoning_gym(name, size=size, seed=seed, options=_options(source, options))
    return read_jsonl(Path(source))


def read_jsonl(
    path: Path, prompt_field: str = "prompt", answer_field: str | None = "answer"
) -> list[Task]:
    """One task a line; blank lines are passed over, other fields are kept.

    An answer that is not a string is kept as JSON: ``7`` as ``"7"``, tests as what they are.
    Without ``answer_field`` the tasks are general ones: prompts that have no right answer.

    Raises:
        UserError: The file or a line of it cannot be read.
    """
    tasks: list[Task] = []
    try:
        lines = path.expanduser().read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}): name a .jsonl file, add:N or rg:NAME."
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON ({error}): mend it") from error
        if not isinstance(record, dict):
            raise UserError(f"{where} is not a JSON object: mend it")
        prompt = record.pop(prompt_field, None)
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f'{where} has no text under "{prompt_field}": mend it')
        if answer_field is None:
            tasks.append(Task(prompt, "", record, general=True))
            continue
        answer = record.pop(answer_field, None)
        if answer is None:
            raise UserError(f'{where} has nothing under "{answer_field}": mend it')
        tasks.append(
            Task(prompt, answer if isinstance(answer, str) else json.dumps(answer), record)
        )
    if not tasks:
        raise UserError(f"{path} holds no tasks: name another file")
    return tasks


def reasoning_gym(
    name: str, *, size: int = 10_000, seed: int = 0, options: Mapping[str, Any] | None = None
) -> list[Task]:
    """Questions of a reasoning-gym data set (extra ``rl``), none twice.

    Only its generators are used. Its scorers run what is in an answer as code, or give credit for
    substrings; ``rewards.puzzles`` has strict ones.

    Raises:
        UserError: There is no such data set, or it refuses an option.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError(f"rg:{name} needs reasoning-gym; install it by `pip install -e '.[rl]'`.")
    library = importlib.import_module("reasoning_gym")  # takes seconds; not in every install
    try:
        items = library.create_dataset(name, size=size, seed=seed, **(options or {}))
        tasks = {item["question"]: _gym_task(name, item) for item in items}
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"reasoning-gym has no data set rg:{name} like that ({error}).") from error
    return list(tasks.values())


def _gym_task(name: str, item: dict[str, Any]) -> Task:
    answer, metadata = item["answer"], item["metadata"]
    if name == "countdown":  # of many right answers it shows one
        answer = json.dumps({"numbers": metadata["numbers"], "target": metadata["target"]})
    return Task(item["question"], str(answer), {"data_set": name})


def _options(source: str, options: Sequence[str]) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for option in options:
        key, _, value = option.partition("=")
        try:
            parsed[key.strip()] = json.loads(value)
        except ValueError:
            raise UserError(
                f"option {option!r} of {source!r} is not of the form name=number."
            ) from None
    return parsed


# --- addition ---------------------------------------------------------------------------------


def addition(digits: int, *, size: int, seed: int = 0) -> list[Task]:
    """``size`` different sums of two numbers of so many digits, as ``47+85=`` and ``132``.

    Raises:
        UserError: Fewer than one digit, or more than 15.
    """
    if not 1 <= digits <= 15:
        raise UserError(f"add:{digits} is out of range; take 1 to 15 digits.")
    least = 10 ** (digits - 1) if digits > 1 else 0
    count = 10**digits - least
    tasks = []
    for i in range(min(size, count * count)):
        # A permutation of all pairs, of which the first are taken; beyond 2^62 pairs, of so many.
        last = min(count * count, 2**62) - 1
        pair = grain.experimental.index_shuffle(i, max_index=last, seed=seed % 2**32, rounds=4)
        a, b = (least + x for x in divmod(pair, count))
        tasks.append(Task(f"{a}+{b}=", str(a + b), {"a": a, "b": b}))
    return tasks


def addition_working(a: int, b: int, *, carries: bool = True) -> tuple[str, str]:
    """Digit-by-digit working, units first, and the number that it arrives at.

    ``47 + 85`` is ``7+5+0=12;4+8+1=13;0+0+1=01`` and ``132``: two digits and the carry of each
    column, their sum. Without ``carries`` every carry is taken as 0, and the result is ``22``.
    """
    width = max(len(str(a)), len(str(b))) + 1
    columns, written, carry = [], "", 0
    for i in range(width):
        x, y = a // 10**i % 10, b // 10**i % 10
        total = x + y + carry
        columns.append(f"{x}+{y}+{carry}={total:02d}")
        written = str(total % 10) + written
        carry = total // 10 if carries else 0
    return ";".join(columns), str(int(written))


def addition_demonstration(
    task: Task, *, wrong_share: float, seed: int = 0, padded: bool = False
) -> str:
    """A completion for an ``addition`` task, thinking and answer, to imitate.

    The share ``wrong_share`` of the tasks is shown without carries. Which ones depends on the
    prompt and the seed alone, so a task is always shown the same way. With most of them wrong,
    imitation's likeliest answer is wrong too, and only reward can tell the two habits apart.

    ``padded``: the answer has a digit for every column of the working, as in ``0741``. Without
    carries no answer is longer than the numbers; where it is not padded, most demonstrations
    therefore never show how a longer one is read off the working.
    """
    wrong = content_hash(f"{seed} {task.prompt}") < wrong_share * 2.0**64
    columns, answer = addition_working(task.fields["a"], task.fields["b"], carries=not wrong)
    if padded:
        answer = answer.zfill(columns.count("="))
    return f"<think>{columns}</think><answer>{answer}</answer>"


# --- split and order --------------------------------------------------------------------------


class Split(NamedTuple):
    """Tasks to learn from and tasks to evaluate on."""

    train: list[Task]
    held_out: list[Task]


def split(tasks: Sequence[Task], held_out_fraction: float) -> Split:
    """By the hash of the prompt: copies of a question are on one side, whatever the seed.

    (Generators that draw item i from seed + i give almost the same questions for the next seed,
    so a held-out set must not be made by one.)

    Raises:
        UserError: One side is empty.
    """
    if not 0 < held_out_fraction < 1:
        raise UserError(
            "`held_out_fraction` is a share between 0 and 1, both excluded, not "
            f"{held_out_fraction}"
        )
    parts: Split = Split([], [])
    for task in tasks:
        held = content_hash(task.prompt) < held_out_fraction * 2.0**64
        (parts.held_out if held else parts.train).append(task)
    for side, name in ((parts.train, "held out"), (parts.held_out, "for training")):
        if not side:
            raise UserError(
                f"all {len(tasks)} tasks are {name}: use more tasks or another `held_out_fraction`"
            )
    return parts


def content_hash(text: str) -> int:
    """64 bits of BLAKE2; the same on every machine and in every process."""
    data = text.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class TaskStream(Iterator[Task]):
    """Endless tasks, each once an epoch, in a new random order each epoch.

    Every process of a run that is given the same tasks and seed sees the same stream.

    Raises:
        UserError: no tasks.
    """

    def __init__(self, tasks: Sequence[Task], *, seed: int = 0):
        if not tasks:
            raise UserError("there are no tasks to ask; name another source.")
        self._tasks, self._seed = tasks, seed
        self._epoch = self._index = 0
        self._order = self._permutation()
        digest = hashlib.blake2b(digest_size=8)
        for task in tasks:
            digest.update(content_hash(f"{task.prompt}\0{task.answer}").to_bytes(8, "little"))
        self._fingerprint = digest.hexdigest()

    def __next__(self) -> Task:
        if self._index == len(self._tasks):
            self._epoch, self._index = self._epoch + 1, 0
            self._order = self._permutation()
        self._index += 1
        return self._tasks[self._order[self._index - 1]]

    def take(self, count: int) -> list[Task]:
        """The next ``count`` tasks."""
        return [next(self) for _ in range(count)]

    def get_state(self) -> dict[str, Any]:
        """Where it is; JSON values."""
        return {
            "epoch": self._epoch,
            "index": self._index,
            "seed": self._seed,
            "tasks": self._fingerprint,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``get_state`` returned.

        Raises:
            UserError: The tasks or the seed are not those that the state was written with.
        """
        if (state["tasks"], state["seed"]) != (self._fingerprint, self._seed):
            raise UserError(
                "the tasks or their seed are not those that the run began with; restore them, or "
                "start a new run."
            )
        self._epoch, self._index = state["epoch"], state["index"]
        self._order = self._permutation()

    def _permutation(self) -> np.ndarray:
        return np.random.default_rng((self._seed, self._epoch)).permutation(len(self._tasks))


class MixedStream(Iterator[Task]):
    """Tasks of several streams in fixed shares: after n, each has given its share to within one.

    Raises:
        UserError: a share that is not positive.
    """

    def __init__(self, streams: Sequence[TaskStream], shares: Sequence[float]):
        if len(streams) != len(shares) or min(shares) <= 0:
            raise UserError(f"each source of tasks needs a share above 0, not {list(shares)}.")
        self._streams, self._given = streams, [0] * len(streams)
        self._shares = [share / sum(shares) for share in shares]

    def __next__(self) -> Task:
        asked = sum(self._given) + 1
        owed = [s * asked - n for s, n in zip(self._shares, self._given, strict=True)]
        which = owed.index(max(owed))
        self._given[which] += 1
        return next(self._streams[which])

    def take(self, count: int) -> list[Task]:
        """The next ``count`` tasks."""
        return [next(self) for _ in range(count)]

    def get_state(self) -> dict[str, Any]:
        """Where it is; JSON values."""
        states = [stream.get_state() for stream in self._streams]
        return {"shares": self._shares, "given": list(self._given), "streams": states}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``get_state`` returned.

        Raises:
            UserError: The sources, their tasks or their shares are others.
        """
        if state.get("shares") != self._shares:
            raise UserError(
                "the sources of tasks or their shares are not those that the run began with; "
                "restore them, or start a new run."
            )
        self._given = list(state["given"])
        for stream, own in zip(self._streams, state["streams"], strict=True):
            stream.set_state(own)
