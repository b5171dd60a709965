"""The whole of R1 on two CPU cores: R1-Zero, the four stages, distillation, and a report.

``python -m experiments.r1.recipe``. Stopped or killed, the same command goes on: what is finished
is not repeated, and the stage that was interrupted continues from its checkpoint. A stage is
finished when its figures are in ``figures/``.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro
from rich.console import Console

from deepseek_jax.checkpoint.files import write_json
from deepseek_jax.cli import ends_in_a_sentence
from deepseek_jax.data.prompts import PromptStyle
from deepseek_jax.types import UserError
from experiments.r1 import base, cold_start, distill, reasoning, rejection, scenarios, zero
from experiments.r1.judge import Judge, figures
from experiments.r1.report import report
from experiments.r1.setting import Setting, Stopped
from experiments.r1.text import World, base_text, demonstrations, replies, world, write_lines


class Stage(NamedTuple):
    """A step of the chain; its run is the directory of its name."""

    name: str
    title: str
    style: PromptStyle
    """How its model is asked."""
    run: Callable[[Setting], Any]


def stages(known: World) -> list[Stage]:
    """In order; each needs those before it."""
    return [
        Stage("base", "0 base", "plain", base.base),
        Stage("zero", "1 R1-Zero", "plain", zero.zero),
        Stage("cold_start", "2 cold start", "chat", cold_start.cold_start),
        Stage("reasoning", "3 reasoning RL", "chat", reasoning.reasoning),
        Stage("rejection", "4 rejection sampling, SFT", "chat", rejection.rejection),
        Stage("scenarios", "5 all scenarios", "chat", lambda s: scenarios.scenarios(s, known)),
        Stage("student_base", "6 smaller base", "plain", base.student_base),
        Stage("student_sft", "6a distilled, samples", "chat", distill.student_sft),
        Stage("student_logits", "6b distilled, logits", "chat", distill.student_logits),
        Stage("student_rl", "6c smaller, RL alone", "plain", distill.student_rl),
    ]


def write_data(s: Setting, known: World) -> None:
    """All files that no model has a part in."""
    sums = [*known.train, *known.held_out]
    prompts = ({"prompt": task.prompt} for task in known.requests)
    written = [{"prompt": task.prompt, "answer": task.answer} for task in sums]
    write_lines(s.file("sums"), lambda: written)
    write_lines(s.file("requests"), lambda: prompts)
    write_lines(s.file("text"), lambda: base_text(known, s.digits, s.pages, s.seed))
    count = min(s.demonstrations, len(known.train))
    write_lines(s.file("demonstrations"), lambda: demonstrations(known, s.digits, count, s.seed))
    write_lines(s.file("replies"), lambda: replies(known, s.replies, s.seed))


def claim(s: Setting) -> None:
    """Make the directory this chain's.

    Raises:
        UserError: it holds a chain of another setting.
    """
    path = s.out / "setting.json"
    wanted = {k: v for k, v in dataclasses.asdict(s).items() if k != "out"}
    if path.exists() and json.loads(path.read_text()) != wanted:
        raise UserError(f"{s.out} holds a chain of another setting; choose another --out.")
    (s.out / "figures").mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)


def run(s: Setting) -> Path:
    """What is left of the chain; the path of its report.

    Raises:
        Stopped: a stage was interrupted, and has saved.
        UserError: the directory holds another chain.
    """
    s = s.scaled()
    claim(s)
    known = world(s.digits)
    write_data(s, known)
    todo = stages(known)
    for stage in todo:
        path = s.out / "figures" / f"{stage.name}.json"
        if path.exists():
            continue
        Console().rule(stage.title)
        began = time.perf_counter()
        said = stage.run(s) or {}
        seconds = time.perf_counter() - began
        judge = Judge(s.out / stage.name, stage.style, s.max_new_tokens)
        found = figures(judge, known, s.judged) | said | {"seconds": seconds}
        rates = {k: round(v, 3) for k, v in found.items() if isinstance(v, float)}
        Console().print(f"{stage.title}: {rates}", markup=False)
        write_json(path, found)
    return report(s, {stage.name: stage.title for stage in todo})


def main() -> None:
    """The command line."""
    try:
        print(run(tyro.cli(Setting)))
    except Stopped as stage:
        sys.exit(f"stopped in stage {stage} and saved; the same command goes on.")


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache/deepseek_jax/recipe"))
    with ends_in_a_sentence():
        main()
