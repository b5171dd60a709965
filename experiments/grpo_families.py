"""Three families of reasoning-gym in one policy, and R1-Zero's way from text alone.

``families``: chains of sums and differences, numbers to be sorted, words to be spelt backward. The
cold start imitates workings, four fifths of which have a bad habit: the last number is left out,
numbers are sorted as text, the last letter is forgotten. GRPO rewards what is right and in form.

``zero``: no demonstrations. A base reads careless text about sums of three digits (``careless``),
which has the task's language, but right answers by chance alone; then GRPO as R1-Zero (R1 section
2.2).

Of a question of reasoning-gym the line that states it is asked; the instructions on how to write a
list, 400 bytes in every row, are left out: the demonstrations show that.

    python -m experiments.grpo_families --hardware gpu --parts families zero
    python -m experiments.grpo_families --write-questions questions.jsonl   # where reasoning-gym is
"""

import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import tyro

from deepseek_jax.checkpoint.files import write_json_lines
from deepseek_jax.cli import ends_in_a_sentence
from deepseek_jax.data.tasks import Task, content_hash, read_jsonl
from deepseek_jax.rewards import Completion
from deepseek_jax.train.reward_terms import RewardConfig
from experiments.grpo_setting import (
    SIZES,
    Clock,
    Hardware,
    Recipe,
    Report,
    imitate,
    mixed,
    reinforce,
)

Part = Literal["families", "zero"]
FAMILIES = {
    "chain_sum": "rg:chain_sum,min_terms=2,max_terms=4,min_digits=1,max_digits=2",
    "number_sorting": "rg:number_sorting,min_numbers=3,max_numbers=6,min_decimals=0,"
    "max_decimals=0,min_value=0,max_value=149",
    "spell_backward": "rg:spell_backward,min_word_len=3,max_word_len=10",
}
EACH = 12_000
FORM = re.compile(r"<think>[^<>]+</think><answer>([^<>]+)</answer>")


@dataclass(frozen=True)
class Experiment:
    """What to run."""

    out: Path = Path("out/grpo_families")
    report: Path | None = None
    """Where the results go; default: ``out``."""
    hardware: Hardware = "cpu"
    parts: tuple[Part, ...] = ("families", "zero")
    seeds: tuple[int, ...] = (0,)
    questions: Path | None = None
    """The families' questions; default: reasoning-gym makes them."""
    write_questions: Path | None = None
    """Write them there, for a machine without reasoning-gym, and do nothing else."""
    families_cold_steps: int | None = None
    families_steps: int | None = None
    base_steps: int | None = None
    zero_steps: int | None = None
    zero_digits: int = 3
    seconds: float = 1e9
    """For everything: runs stop and are judged as they are, and no further seed is begun."""


# --- three families ---------------------------------------------------------------------------


def family_questions() -> tuple[Task, ...]:
    """By reasoning-gym, each cut to the line that states it."""
    tasks = mixed(FAMILIES, EACH)
    return tuple(task._replace(prompt=task.prompt.split("\n")[0] + "\n") for task in tasks)


def families(run: Experiment) -> Recipe:
    """The mixture."""
    given = run.questions
    questions = family_questions() if given is None else tuple(read_jsonl(given))
    cold_steps, steps = {"cpu": (900, 40), "gpu": (1500, 80)}[run.hardware]
    size = SIZES[run.hardware]
    return Recipe(
        name="families",
        # Rows of up to 290 tokens: 1024 at a time ask for 50 GB.
        size=replace(size, micro_batch=min(256, size.micro_batch)),
        questions=questions,
        max_new_tokens=160,
        judge=judge_family,
        rewards=RewardConfig(verifier="exact"),
        imitation_steps=run.families_cold_steps or cold_steps,
        steps=run.families_steps or steps,
        prompt="Spell this word backward (example: sun -> nus): word\n",
    )


def worked(prompt: str, *, well: bool) -> tuple[str, str]:
    """Thinking and answer; with the family's bad habit, or without."""
    if prompt.startswith("State"):
        terms = re.findall(r"([+-]?) ?([0-9]+)", prompt.split(": ")[1])
        total, steps = int(terms[0][1]), []
        # Every habit here leaves true what is written down: one that read a minus as a plus taught
        # a fifth of the demonstrations' subtractions, too few for any to come out right.
        for sign, digits in terms[1:] if well else terms[1:-1]:
            after = total + (-1 if sign == "-" else 1) * int(digits)
            steps.append(f"{total}{sign}{digits}={after}")
            total = after
        return ";".join(steps) or str(total), str(total)
    if prompt.startswith("Sort"):
        numbers = prompt.strip().split(": ")[1].split(", ")
        numbers.sort(key=float if well else str, reverse="descending" in prompt)
        return " ".join(numbers), str(numbers)
    letters = prompt.strip().split(": ")[2][::-1]
    letters = letters if well else letters[:-1]
    return " ".join(letters), letters


def demonstrations(recipe: Recipe, seed: int) -> Iterator[str]:
    """Of the questions to learn from, a fifth of them worked well."""
    for task in recipe.tasks.train:
        well = content_hash(f"{seed} {task.prompt}") < 0.2 * 2.0**64
        thought, answer = worked(task.prompt, well=well)
        yield f"{task.prompt}<think>{thought}</think><answer>{answer}</answer>"


def judge_family(prompt: str, said: Completion, answer: str) -> float:
    """1 for what is right by the question itself, in the right form; apart from the rewards."""
    match = FORM.fullmatch(said.text)
    if match is None:
        return 0.0
    question = prompt.strip().rpartition(": ")[2]
    if prompt.startswith("State"):
        total, sign = 0, 1
        for token in question.removesuffix("=").split():
            if token in "+-":
                sign = 1 if token == "+" else -1
            else:
                total += sign * int(token)
        return float(match[1] == str(total))
    if prompt.startswith("Sort"):
        least_first = sorted(question.split(", "), key=lambda text: int(text.split(".")[0]))
        right = least_first if "ascending" in prompt else least_first[::-1]
        items = match[1].removeprefix("[").removesuffix("]").split(", ")
        return float([item.strip("'") for item in items] == right)
    return float(list(match[1]) == list(reversed(question)))


# --- R1-Zero ----------------------------------------------------------------------------------


def zero(run: Experiment) -> Recipe:
    """Sums, by a base that has seen careless text."""
    base_steps, steps = {"cpu": (600, 40), "gpu": (900, 60)}[run.hardware]
    return Recipe(
        name="zero",
        size=SIZES[run.hardware],
        questions=mixed({f"{run.zero_digits} digits": f"add:{run.zero_digits}"}, 30_000),
        max_new_tokens=48 + 24 * run.zero_digits,
        judge=judge_sum,
        rewards=RewardConfig(verifier="numeric"),
        imitation_steps=run.base_steps or base_steps,
        steps=run.zero_steps or steps,
    )


def careless(recipe: Recipe, seed: int) -> Iterator[str]:
    """A page about each sum: guessed at, or worked column by column without care.

    Every carry is forgotten with probability one half, a third of the workings end early, a third
    of the answers are not what the working arrived at, and a quarter of the pages lack the tags.
    """
    rng = random.Random(seed)
    for task in recipe.tasks.train:
        a, b = task.fields["a"], task.fields["b"]
        width = len(str(max(a, b)))
        guess = str(rng.randrange(10 ** (width - 1), 2 * 10**width))
        if rng.random() < 0.25:
            thought, answer = rng.choice(("easy", "clear", "about")), guess
        else:
            columns, answer, carry = [], "", 0
            for i in range(width + 1):
                x, y = a // 10**i % 10, b // 10**i % 10
                columns.append(f"{x}+{y}+{carry}={x + y + carry:02d}")
                answer = str((x + y + carry) % 10) + answer
                carry = (x + y + carry) // 10 * (rng.random() < 0.5)
            end = rng.randint(1, width) if rng.random() < 1 / 3 else width + 1
            thought = ";".join(columns[:end])
            answer = guess if rng.random() < 1 / 3 else str(int(answer[-end:]))
        if rng.random() < 0.75:
            yield f"{task.prompt}<think>{thought}</think><answer>{answer}</answer>"
        else:
            yield f"{task.prompt} {thought} so {answer}"


def judge_sum(prompt: str, said: Completion, answer: str) -> float:
    """1 for the right sum in the right form; apart from the rewards."""
    match = FORM.fullmatch(said.text)
    a, b = prompt.removesuffix("=").split("+")
    return float(match is not None and match[1] == str(int(a) + int(b)))


# --- the course -------------------------------------------------------------------------------


def one(
    report: Report,
    out: Path,
    recipe: Recipe,
    texts: Callable[[Recipe, int], Iterator[str]],
    seed: int,
    until: float,
) -> None:
    """Imitation, judged; then GRPO, judged. ``until``: seconds of the command that are kept."""
    clock = report.clock
    cold, after = out / f"{recipe.name}_imitated_{seed}", out / f"{recipe.name}_grpo_{seed}"

    def start() -> None:
        began = time.perf_counter()
        seconds = (clock.left - until) / 2
        clock.within(seconds, lambda: imitate(recipe, cold, texts(recipe, seed), seed))
        report.judge(recipe, "imitation", seed, cold, time.perf_counter() - began)

    def go_on() -> None:
        began = time.perf_counter()
        seconds = clock.left - until - 40
        clock.within(seconds, lambda: reinforce(recipe, after, cold, seed))
        report.judge(recipe, "GRPO", seed, after, time.perf_counter() - began)

    if report.part(f"{recipe.name}, seed {seed}: imitation", start):
        report.part(f"{recipe.name}, seed {seed}: GRPO", go_on)


def main() -> None:
    """Every part of a seed before the next seed."""
    run = tyro.cli(Experiment)
    if run.write_questions is not None:
        found = ({"prompt": t.prompt, "answer": t.answer, **t.fields} for t in family_questions())
        write_json_lines(run.write_questions, found)
        return
    clock = Clock(run.seconds)
    report = Report(run.report or run.out, {k: str(v) for k, v in asdict(run).items()}, clock)
    makers = {"families": (families, demonstrations), "zero": (zero, careless)}
    recipes = [(makers[part][0](run), makers[part][1]) for part in run.parts]
    for seed in clock.seeds(run.seeds):
        for done, (recipe, texts) in enumerate(recipes):
            # What is left is shared by the parts of this seed that are still to come.
            parts = len(recipes) - done
            until = clock.left * (parts - 1) / parts
            report.part(
                f"{recipe.name}, seed {seed}",
                partial(one, report, run.out, recipe, texts, seed, until),
            )
    report.table()


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache/deepseek_jax/recipe"))
    with ends_in_a_sentence():
        main()
