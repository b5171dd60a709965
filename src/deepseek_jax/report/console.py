"""What a run prints: its progress, and tables at the end."""

import os
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import SupportsFloat

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table


class _Console(Console):
    """Goes silent where rich would end the program."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Progress:
    """Progress of a run: a bar on a terminal, a plain line now and then elsewhere.

    Silent on all processes but the first. The run goes on if nobody reads on, as with ``| head``
    or a ``tee`` that has died.

    Args:
        total: the step at which the run ends.
        initial: the step at which it starts (not 0 on resume).
        interval_s: seconds between two plain lines.
        console: where to print; standard output by default.
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        interval_s: float | int = 10,
        console: Console | None = None,
    ):
        self.console = console or _Console(quiet=jax.process_index() != 0)
        self._total, self._interval_s = total, interval_s
        self._first: tuple[int, float] | None = None  # step and time of the first update
        self._last_line = time.monotonic()
        self._bar = None
        if self.console.is_terminal:
            self._bar = RichProgress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(compact=True),
                console=self.console,
            )
            self._task = self._bar.add_task("train", total=total, completed=initial, text="")

    def update(self, step: int, *, tokens_per_s: SupportsFloat, **figures: SupportsFloat) -> None:
        """Shows that ``step`` steps are done.

        Args:
            step: number of finished steps, counted from the start of the run, not of the process.
            tokens_per_s: tokens per second over all devices.
            figures: what else to show, by name: the loss, the reward.
        """
        shown = [f"{name} {float(value):.4f}" for name, value in figures.items()]
        text = "  ".join([*shown, f"{_thousands(float(tokens_per_s))} tokens/s"])
        if self._bar is not None:
            self._bar.start()  # the first time; a run that ends before leaves no empty bar
            self._bar.update(self._task, completed=step, text=text)
            return
        now = time.monotonic()
        first, since = self._first = self._first or (step, now)  # leaves out the compilation
        if now - self._last_line >= self._interval_s or step >= self._total:
            self._last_line = now
            left = max(self._total - step, 0)
            eta = _clock((now - since) / (step - first) * left) if step > first else "?"
            self.print(f"step {step}/{self._total}  {text}  eta {eta}")

    def print(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        if not self.console.is_terminal:
            self.console.file.flush()  # a log file is read while the run goes on

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _thousands(value: float | int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _clock(seconds: float | int) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def summary_table(rows: Sequence[Mapping[str, object]], *, title: str | None = None) -> Table:
    """A table for the console: a row per mapping, columns by the keys in order of appearance.

    Floats get four significant digits, large numbers their thousands; both align to the right.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=title, title_justify="left")
    for name in names:
        numeric = all(isinstance(row.get(name), int | float | None) for row in rows)
        table.add_column(name, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in names))
    return table


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
