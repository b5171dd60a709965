"""``deepseek-jax rejection-sample``: a policy's own good answers, to fine-tune on."""

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from deepseek_jax.checkpoint.files import write_json, write_json_lines
from deepseek_jax.cli.evaluate import SolvingConfig, attempt
from deepseek_jax.cli.serving import check_out, opened
from deepseek_jax.data.prompts import PromptStyle
from deepseek_jax.data.tasks import open_tasks, split
from deepseek_jax.generate import Sampling
from deepseek_jax.rejection import RejectionConfig, Sifted, sift
from deepseek_jax.report import summary_table
from deepseek_jax.types import UserError


@dataclass(frozen=True)
class RejectionSampleConfig(SolvingConfig):
    """Whom to ask what, and what is kept of the answers."""

    out: Path | None = None
    """Where the answers kept go, as JSON lines for `sft --data`; what became of the others is
    counted beside it, in `.counts.json`."""
    limit: int | None = 10_000
    """Tasks to ask, at the most."""
    held_out_fraction: float = 0.05
    """Share of the tasks that is not asked: what GRPO holds out of the same tasks."""
    rejection: RejectionConfig = field(default_factory=RejectionConfig)
    prompt_style: PromptStyle = "chat"
    samples: int = 16
    """Answers to each task."""
    sampling: Sampling = field(default_factory=lambda: Sampling(1024, temperature=1.0, top_p=1.0))

    def __post_init__(self) -> None:
        """Refuse to ask nothing, or to keep nothing."""
        super().__post_init__()
        if self.tasks is None or self.out is None:
            raise UserError("rejection-sample takes --tasks and --out FILE.")


def rejection_sample(config: RejectionSampleConfig) -> Sifted:
    """Ask, judge, sift, and write what is left; a file appears when it is complete."""
    assert config.tasks is not None
    assert config.out is not None
    counts = config.out.with_suffix(".counts.json")
    check_out(config.out, counts)
    with opened(config) as ready:
        asked = open_tasks(config.tasks, size=config.limit or 10_000, seed=config.task_seed)
        tasks = split(asked, config.held_out_fraction).train[: config.limit]
        sifted = sift(attempt(config, ready, tasks), tasks, config.rejection)
    if not sifted.records:
        found = ", ".join(f"{count} {name}" for name, count in sifted.counts.items() if count)
        raise UserError(f"no answer is fit to be kept ({found}); sample more of them.")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(counts, sifted.counts)
    write_json_lines(config.out, sifted.records)  # last: where it is, all is
    rows = [{"answers": name, "number": count} for name, count in sifted.counts.items()]
    Console().print(summary_table(rows))
    return sifted
