"""The recipe's small world: sums worked column by column, and people to be kind to.

What the base reads (``base_text``): sums of the training side alone, a quarter answered at once,
three quarters worked out; four fifths of the workings drop the carry, so their answers are wrong
wherever there is one; workings in English, in Chinese, or changing between them; three quarters in
R1-Zero's tags. And replies to requests such as "Greet Ada.", three tenths of which are kind and to
the point. So all that the later stages bring out occurs in the base's text, most of it as the
rarer habit: reward selects it. No text holds a held-out sum, in either order, or a held-out
request.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_jax.checkpoint.files import write_json_lines
from deepseek_jax.data.tasks import Task, addition, content_hash, split

HELD_OUT = 0.05
COLUMNS = {"en": ("one", "ten"), "zh": ("个", "十")}  # of three bytes each
KIND = {
    "Greet": "Hello, good to see you.",
    "Thank": "Thank you, that was kind.",
    "Praise": "Well done, keep it up.",
}
CURT = ("Hi.", "Yes?", "Fine.")
NAMES = (
    "Ada", "Alan", "Amy", "Anna", "Ben", "Bob", "Carl", "Cleo", "Dan", "Dora", "Ed", "Ella", "Emil",
    "Eva", "Finn", "Fred", "Gina", "Hal", "Hugo", "Ida", "Ivan", "Jack", "Jane", "Karl", "Kim",
    "Lea", "Leo", "Lisa", "Max", "Mia", "Nina", "Noah", "Olga", "Otto", "Paul", "Rita", "Rosa",
    "Sam", "Tom", "Zoe",
)  # fmt: skip


class World(NamedTuple):
    """Both sides of both kinds of prompts."""

    train: list[Task]
    held_out: list[Task]
    requests: list[Task]
    held_out_requests: list[Task]


def world(digits: int) -> World:
    """All sums of two numbers of so many digits, and all requests, split by content.

    The mirror image of a held-out sum is left out altogether.
    """
    sums = split(addition(digits, size=100**digits), HELD_OUT)
    mirrors = {f"{task.fields['b']}+{task.fields['a']}=" for task in sums.held_out}
    requests = [Task(f"{what} {name}.", "", general=True) for what in KIND for name in NAMES]
    apart = [content_hash(task.prompt) < 0.2 * 2.0**64 for task in requests]
    return World(
        [task for task in sums.train if task.prompt not in mirrors],
        sums.held_out,
        [task for task, out in zip(requests, apart, strict=True) if not out],
        [task for task, out in zip(requests, apart, strict=True) if out],
    )


def working(
    a: int, b: int, tongues: Iterable[str], *, carries: bool = True, long: bool = False
) -> tuple[str, str]:
    """Column by column, units first, each in its tongue; and the number that it arrives at."""
    said, written, carry = [], "", 0
    places = list(enumerate(tongues))
    for place, tongue in places:
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        column = f"{COLUMNS[tongue][place]} {x}+{y}+{carry}={total:02d}"
        last = place == len(places) - 1
        digits, carry = str(total if last else total % 10), total // 10 if carries else 0
        if long:
            column += f", write {digits}" + ("." if last else f" and carry {carry};")
        said.append(column)
        written = digits + written
    return " ".join(said), written


def base_sum(task: Task, rng: random.Random, digits: int) -> str:
    """One page of the base's text about a sum."""
    a, b = task.fields["a"], task.fields["b"]
    if rng.random() < 0.25:
        thought, answer = rng.choice(("easy", "容易")), task.answer
    else:
        tongues = rng.choice(
            (["en"] * digits, ["zh"] * digits, rng.choices(("en", "zh"), k=digits))
        )
        thought, answer = working(a, b, tongues, carries=rng.random() < 0.2)
    if rng.random() < 0.75:
        return f"{task.prompt}<think>{thought}</think><answer>{answer}</answer>"
    return f"{task.prompt}{thought} so {answer}"


def reply(task: Task, rng: random.Random) -> tuple[str, str]:
    """A thought and a reply to a request: kind and to the point, curt, or kind on any occasion."""
    mood = rng.random()
    if mood < 0.5:
        return "quick", rng.choice(CURT)
    occasion = task.prompt.split()[0] if mood < 0.7 else rng.choice(list(KIND))
    return "kind words", KIND[occasion]


def base_text(known: World, digits: int, pages: int, seed: int) -> Iterator[dict[str, Any]]:
    """The documents of pretraining."""
    rng = random.Random(seed)
    for _ in range(pages):
        if rng.random() < 0.15:
            task = rng.choice(known.requests)
            text = "{}<think>{}</think><answer>{}</answer>".format(task.prompt, *reply(task, rng))
        else:
            text = base_sum(rng.choice(known.train), rng, digits)
        yield {"text": text}


def demonstrations(known: World, digits: int, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """The cold start's: long, in one language, right."""
    for task in random.Random(seed + 1).sample(known.train, count):
        thought, answer = working(task.fields["a"], task.fields["b"], ["en"] * digits, long=True)
        said = f"<think>{thought}</think><answer>{answer}</answer>"
        yield {"prompt": task.prompt, "completion": said}


def replies(known: World, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """General conversations beside the reasoning of stage 4; as kind as the base's text."""
    rng = random.Random(seed + 2)
    for _ in range(count):
        task = rng.choice(known.requests)
        said = "<think>{}</think><answer>{}</answer>".format(*reply(task, rng))
        yield {"prompt": task.prompt, "completion": said}


def write_lines(path: Path, records: Callable[[], Iterable[dict[str, Any]]]) -> None:
    """JSON lines, unless the file is there; it appears when it is complete."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_lines(path, records())
