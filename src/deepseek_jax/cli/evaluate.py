"""``deepseek-jax eval``: tasks judged by rules, and text measured in bits per byte."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from rich.console import Console
from rich.progress import Progress

from deepseek_jax.checkpoint.files import write_json, write_json_lines
from deepseek_jax.cli.serving import Opened, ServingConfig, check_out, opened
from deepseek_jax.data.pipeline import DataConfig, EvalBatch, eval_batches
from deepseek_jax.data.prompts import Prompter, PromptStyle
from deepseek_jax.data.tasks import Task, open_tasks, split
from deepseek_jax.evaluate import Solved, solve
from deepseek_jax.report import summary_table
from deepseek_jax.rewards.verifiers import Verifier, verifier
from deepseek_jax.train.loop import divide_batch
from deepseek_jax.train.run import all_of, make_evaluate
from deepseek_jax.types import TrainState, UserError


@dataclass(frozen=True)
class SolvingConfig(ServingConfig):
    """A model, and what it is asked."""

    tasks: str | None = None
    """JSON lines with `prompt` and `answer`, or tasks to generate: add:3, rg:chain_sum."""
    verifier: Verifier = "auto"
    """How an answer, in <answer> or \\boxed, is compared; auto: as generated tasks want it,
    exactly otherwise."""
    prompt_style: PromptStyle = "plain"
    task_seed: int = 0
    """Of tasks that are generated."""
    samples: int = 1
    """Attempts at each task."""
    limit: int | None = None
    """Tasks at the most; default: all of a file, 200 of those that are generated, or all that
    is held out of 10,000."""

    def __post_init__(self) -> None:
        """Refuse to ask nothing."""
        super().__post_init__()
        for name in ("samples", "limit"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise UserError(f"{name}={number} must be at least 1.")


@dataclass(frozen=True)
class EvalConfig(SolvingConfig):
    """What to measure."""

    held_out_fraction: float | None = None
    """Ask only the tasks that GRPO and rejection sampling leave out with the same fraction (0.05
    by default); default: all, which says little of a policy that was trained on them."""
    text: tuple[str, ...] = ()
    """Instead: files or folders of text; perplexity and bits per byte."""
    seq_len: int = 1024
    """Tokens of context at the most, for text."""
    out: Path | None = None
    """Where figures go as JSON, and every attempt, as JSON lines beside it."""

    def __post_init__(self) -> None:
        """Refuse two subjects, or none."""
        super().__post_init__()
        if (self.tasks is None) == (not self.text):
            raise UserError("eval takes --tasks or --text, one of the two.")
        if self.held_out_fraction is not None and self.tasks is None:
            raise UserError("--held-out-fraction divides tasks; leave it out for --text.")
        if self.out is not None and self.out == self.attempts:
            raise UserError(f"{self.out} is where the attempts go; end --out in .json.")

    @property
    def attempts(self) -> Path | None:
        """The file beside the figures."""
        return self.out.with_suffix(".jsonl") if self.out is not None and self.tasks else None


def evaluate(config: EvalConfig) -> dict[str, float]:
    """Measure, print a table, write JSON."""
    check_out(config.out, config.attempts)
    tasks = asked_tasks(config) if config.tasks else []
    with opened(config) as ready:
        figures, lines = (
            _on_tasks(config, ready, tasks) if config.tasks else (_on_text(config, ready), [])
        )
    rows = [{"figure": name, "value": value} for name, value in figures.items()]
    Console().print(summary_table(rows))  # first of all: a full disk does not lose it
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(config.out, figures)
    if config.attempts is not None:
        write_json_lines(config.attempts, lines)
    return figures


def asked_tasks(config: EvalConfig) -> Sequence[Task]:
    """What is asked: all, or what training on the same tasks holds out."""
    assert config.tasks is not None
    share = config.held_out_fraction
    # As many as GRPO generates by default. Which are held out depends on each question alone.
    size = config.limit or 200 if share is None else 10_000
    found = open_tasks(config.tasks, size=size, seed=config.task_seed)
    return (found if share is None else split(found, share).held_out)[: config.limit]


def _on_tasks(
    config: EvalConfig, ready: Opened, tasks: Sequence[Task]
) -> tuple[dict[str, float], list[Any]]:
    """Figures, and a line for every attempt."""
    solved = attempt(config, ready, tasks)
    lines = [
        {
            "prompt": tasks[row].prompt,
            "answer": tasks[row].answer,
            "completion": sample.completion.text,
            "correct": bool(solved.correct_Pk[row, column]),
        }
        for row, samples in enumerate(solved.samples)
        for column, sample in enumerate(samples)
    ]
    return {"tasks": float(len(tasks))} | solved.scalars(), lines


def attempt(config: SolvingConfig, ready: Opened, tasks: Sequence[Task]) -> Solved:
    """Every task ``samples`` times, judged. To be used under ``set_mesh``."""
    assert config.tasks is not None
    template = ready.template() if config.prompt_style == "chat" else None
    prompter = Prompter(config.prompt_style, ready.tokenizer, template)
    longest = max(len(prompter.ids(task.prompt)) for task in tasks)
    engine = ready.engine(config, longest)
    judge = verifier(config.verifier, config.tasks)
    with Progress() as progress:
        bar = progress.add_task("solving", total=len(tasks) * config.samples)

        def advance() -> None:
            progress.advance(bar)

        return solve(engine, prompter, tasks, judge, config.sampling, config.samples, advance)


def _on_text(config: EvalConfig, ready: Opened) -> dict[str, float]:
    seq_len = min(config.seq_len, ready.model.config.max_position_embeddings)
    # All of the text is what is measured: it is held out of itself.
    data = DataConfig(source=config.text, held_out_source=config.text, seq_len=seq_len)

    def batches(size: int) -> Iterator[EvalBatch]:
        return eval_batches(data, ready.tokenizer, size)

    trainee = all_of(ready.model, ready.mesh)
    measure = make_evaluate(batches, trainee, divide_batch(ready.rows(config), seq_len, ready.mesh))
    state = TrainState(jnp.int32(0), ready.training_params(), (), ready.router_bias_LE)
    found = measure(state, None)
    return {name.removeprefix("eval_"): value for name, value in found.scalars().items()}
