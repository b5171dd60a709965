"""Reward turns a habit around: addition with working, 80% of whose demonstrations drop the carry.

A small MLA+MoE model first imitates demonstrations of sums, worked digit by digit. Four fifths of
them take every carry as 0, so imitation's likeliest answer is wrong wherever there is one, and more
imitation cannot mend that. Then GRPO rewards right answers. It selects a behaviour that a fifth of
the demonstrations showed; it does not invent one.

Three controls go the same way with a reward for form alone, with random rewards, and with more
imitation at the same cost. Every figure is of held-out sums, by a judge that the rewards do not
share code with.

    python -m experiments.grpo_addition                                   # two cores, two digits
    python -m experiments.grpo_addition --hardware gpu --digits 4 5 6 --ways accuracy --seeds 0 1 2
"""

import hashlib
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import tyro

from deepseek_jax.cli import ends_in_a_sentence
from deepseek_jax.data.tasks import addition_demonstration
from deepseek_jax.rewards import Completion, Term, numeric
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

Way = Literal["accuracy", "format", "random", "imitation"]


@dataclass(frozen=True)
class Experiment:
    """What to run."""

    out: Path = Path("out/grpo_addition")
    report: Path | None = None
    """Where the results go; default: ``out``."""
    hardware: Hardware = "cpu"
    """How large the model is, and what is done at a time."""
    digits: tuple[int, ...] = (2,)
    """Of both numbers; several: sums of each."""
    seeds: tuple[int, ...] = (0,)
    padded: bool = False
    """Demonstrations write a digit for every column, as in 0741: how to read a longer answer off
    the working, which dropped carries never ask for, is then learnt from all of them."""
    ways: tuple[Way, ...] = ("accuracy", "format", "random", "imitation")
    cold_steps: int | None = None
    """Default: 500 on a CPU, 900 on a GPU."""
    steps: int | None = None
    """Of GRPO; default: 40 on a CPU, 60 on a GPU."""
    seconds: float = 1e9
    """For everything: runs stop and are judged as they are, and no further seed is begun."""


def recipe_of(run: Experiment) -> Recipe:
    """The sums, and how long a model learns."""
    cold_steps, steps = {"cpu": (500, 40), "gpu": (900, 60)}[run.hardware]
    return Recipe(
        name="addition",
        size=SIZES[run.hardware],
        questions=mixed(
            {f"{n} digits": f"add:{n}" for n in run.digits},
            10_000 if run.hardware == "cpu" else 16_000,
        ),
        # A demonstration and its end, with room to ramble.
        max_new_tokens=14 * max(run.digits) + 45,
        judge=judge,
        rewards=RewardConfig(verifier="numeric"),
        imitation_steps=run.cold_steps or cold_steps,
        steps=run.steps or steps,
    )


def demonstrations(run: Experiment, recipe: Recipe, seed: int) -> Iterator[str]:
    """Of the sums to learn from; which ones are wrong depends on the seed."""
    for task in recipe.tasks.train:
        yield task.prompt + addition_demonstration(
            task, wrong_share=0.8, seed=seed, padded=run.padded
        )


def judge(prompt: str, said: Completion, answer: str) -> float:
    """1 for the right sum in the right form; written apart from the rewards."""
    match = re.fullmatch(r"<think>[^<]+</think><answer>([0-9]+)</answer>", said.text)
    a, b = prompt.removesuffix("=").split("+")
    return float(match is not None and int(match[1]) == int(a) + int(b))


def learn(run: Experiment, recipe: Recipe, way: Way, seed: int, out: Path) -> bool:
    """One way to go on from the cold start; whether to its end."""
    cold = run.out / f"cold_{seed}"

    def random(prompt: str, said: Completion, answer: str) -> float:
        return hashlib.blake2b(f"{seed}{prompt}{said.text}".encode()).digest()[0] / 255

    if way == "imitation":
        # As many tokens trained on; a third more for those that GRPO generated.
        rows = recipe.size.prompts * recipe.size.group_size
        tokens = recipe.steps * rows * (recipe.max_new_tokens + 8) * 4 // 3
        steps = max(1, tokens // (recipe.size.imitated_rows * 256))
        return imitate(recipe, out, demonstrations(run, recipe, seed), seed, cold, steps)
    if way == "random":
        terms = [Term("accuracy", 0.0, numeric), Term("random", 1.0, random)]
        return reinforce(recipe, out, cold, seed, terms)
    rewards = RewardConfig(verifier="numeric", accuracy_weight=float(way == "accuracy"))
    return reinforce(recipe, out, cold, seed, rewards=rewards)


def one_seed(run: Experiment, recipe: Recipe, report: Report, seed: int) -> None:
    """The cold start, then every way from it."""
    clock, cold = report.clock, run.out / f"cold_{seed}"

    def start() -> None:
        began = time.perf_counter()
        if not cold.exists():
            texts = demonstrations(run, recipe, seed)
            clock.within(clock.left / 2, lambda: imitate(recipe, cold, texts, seed))
        report.judge(recipe, "cold start", seed, cold, time.perf_counter() - began)

    def go_on(way: Way) -> None:
        began, out = time.perf_counter(), run.out / f"{way}_{seed}"
        clock.within(clock.left - 40, lambda: learn(run, recipe, way, seed, out))
        report.judge(recipe, way, seed, out, time.perf_counter() - began)

    if report.part(f"seed {seed}, cold start", start):
        for way in run.ways:
            report.part(f"seed {seed}, {way}", partial(go_on, way))


def main() -> None:
    """Every seed, as long as there is time for one more like the last."""
    run = tyro.cli(Experiment)
    clock = Clock(run.seconds)
    report = Report(run.report or run.out, {k: str(v) for k, v in asdict(run).items()}, clock)
    # Tasks come in another order for another seed; which are held out does not change.
    recipe = recipe_of(run)
    for seed in clock.seeds(run.seeds):
        one_seed(run, recipe, report, seed)
    report.table()


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache/deepseek_jax/recipe"))
    with ends_in_a_sentence():
        main()
