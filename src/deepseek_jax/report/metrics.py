"""Scalars of a run on disk: JSON lines, and TensorBoard."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsFloat

import jax

from deepseek_jax.types import UserError


class MetricsWriter:
    """Appends scalars to ``metrics.jsonl`` and to TensorBoard event files; a context manager.

    A line is ``{"step": 7, "loss": 3.2, ...}``. JSON has no NaN: a value that is not finite is
    null, and ``"non_finite": {"loss": "nan"}`` says what it was. Each line is on its way to the
    disk before `write` returns, so a killed run loses none. Writes from the first process only.

    Args:
        directory: the run directory; events go to ``directory/tensorboard``.
        resumed_step: the step restored from a checkpoint. Lines of later steps, which will be
            done again, are dropped, and so is a last line that was cut off. None, for a fresh
            run, drops all.

    Raises:
        UserError: the directory cannot be written.
    """

    def __init__(self, directory: str | os.PathLike[str], *, resumed_step: int | None = None):
        self._file = self._events = None
        if jax.process_index() != 0:
            return
        # Imported late: where torch is installed tensorboardX imports it, which takes seconds.
        from tensorboardX import SummaryWriter

        path = Path(directory) / "metrics.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _truncate_after(path, resumed_step)
            self._file = path.open("a", encoding="utf-8")
            purge = None if resumed_step is None else resumed_step + 1
            self._events = SummaryWriter(str(path.parent / "tensorboard"), purge_step=purge)
        except OSError as error:
            raise UserError(
                f"cannot write metrics to {path}: {error.strerror}; choose another output "
                "directory."
            ) from error

    def write(self, step: int, scalars: Mapping[str, SupportsFloat]) -> None:
        """Writes the scalars of one step, preferably all in one call.

        A second call for the same step (an evaluation after the training metrics, say) adds a
        second line; `read_metrics` merges the two.

        Raises:
            UserError: the disk is full.
        """
        if self._file is None or self._events is None:
            return
        values = {name: float(value) for name, value in scalars.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        line: dict[str, Any] = {"step": step} | {name: finite.get(name) for name in values}
        if len(finite) < len(values):
            line["non_finite"] = {name: str(values[name]) for name in values if name not in finite}
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"cannot write metrics to {self._file.name}: {error.strerror}; make room, then "
                "continue with --resume."
            ) from error
        for name, value in finite.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files; nothing can be written afterwards."""
        if self._file is not None and self._events is not None:
            self._file.close()
            self._events.close()
        self._file = self._events = None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, float | int]]:
    """Reads ``metrics.jsonl``: one dict a step, in order, with ``"step"`` among the keys.

    Values that were not finite come back as such. A last line cut off by a kill is left out.

    Raises:
        UserError: the file cannot be read, or a line before the last is not of the format.
    """
    steps: dict[int, dict[str, float | int]] = {}
    for line in _parse(Path(path)):
        not_finite = {name: float(text) for name, text in line.pop("non_finite", {}).items()}
        steps.setdefault(line["step"], {}).update(line | not_finite)
    return list(steps.values())


def _parse(path: Path) -> list[dict[str, Any]]:
    try:
        rows = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the metrics {path}: {error}; check the path.") from error
    parsed = []
    for number, row in enumerate(rows[:-1], 1):  # what follows the last newline was cut off
        try:
            line = json.loads(row)
            line["step"] = int(line["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}, line {number}: not a line of metrics ({error}); remove that line."
            ) from error
        parsed.append(line)
    return parsed


def _truncate_after(path: Path, step: int | None) -> None:
    lines = _parse(path) if step is not None and path.exists() else []
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines if line["step"] <= (step or 0))
        file.flush()
        os.fsync(file.fileno())  # else a power cut after the rename could leave it empty
    os.replace(temporary, path)
