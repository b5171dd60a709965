"""``deepseek-jax harness``: the tasks of lm-evaluation-harness."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from deepseek_jax.checkpoint.files import write_json
from deepseek_jax.cli.serving import ServingConfig, check_out, opened
from deepseek_jax.generate import Sampling
from deepseek_jax.types import UserError


@dataclass(frozen=True)
class HarnessConfig(ServingConfig):
    """A model, and the tasks that it is measured on."""

    tasks: tuple[str, ...] = ()
    """Names that lm-evaluation-harness knows, or YAML files of its own kind."""
    include: Path | None = None
    """A folder with further tasks in such files."""
    num_fewshot: int | None = None
    """Solved examples before each question; default: as the task says."""
    limit: int | None = None
    """Questions of each task; default: all."""
    chat: bool = False
    """Ask in the model's chat template."""
    out: Path | None = None
    """Where figures go as JSON."""
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=256))
    """For tasks that do not say how long an answer may be; they say how it is drawn."""

    def __post_init__(self) -> None:
        """Refuse an empty list."""
        super().__post_init__()
        if not self.tasks:
            raise UserError("harness needs --tasks, such as: --tasks lambada_openai hellaswag.")


def harness(config: HarnessConfig) -> dict[str, Any]:
    """Measure, print the harness's table, write JSON."""
    check_out(config.out)
    try:
        import lm_eval  # pyrefly: ignore
        from lm_eval.tasks import TaskManager  # pyrefly: ignore
        from lm_eval.utils import make_table  # pyrefly: ignore

        from deepseek_jax.cli.harness_model import HarnessModel
    except ImportError as error:
        raise UserError(
            f"lm-evaluation-harness is not installed ({error}): pip install -e '.[harness]'."
        ) from error
    manager = TaskManager(include_path=None if config.include is None else str(config.include))
    unknown = [
        name for name in config.tasks if not manager.match_tasks([name]) and not Path(name).exists()
    ]
    if unknown:
        raise UserError(
            f"lm-evaluation-harness knows no task {', '.join(unknown)}; `lm_eval ls tasks` lists "
            "those that it knows."
        )
    with opened(config) as ready:
        results: Any = lm_eval.simple_evaluate(
            model=HarnessModel(ready, config, chat=config.chat),
            tasks=list(config.tasks),
            task_manager=manager,
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            apply_chat_template=config.chat,
            bootstrap_iters=1000,
            log_samples=False,
        )
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        kept = {name: results[name] for name in ("results", "versions", "n-shot", "n-samples")}
        write_json(config.out, kept)
    Console().print(make_table(results), markup=False, highlight=False)
    return results["results"]
