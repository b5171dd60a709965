"""A plan for people: progress while it is made, a table, a picture."""

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from deepseek_jax.plan.report import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GIB = 2.0**30
_COLOURS = ("#1f5fa8", "#d1600f", "#3a8f5c", "#8a5aa8", "#b8a02a", "#6b6b6b")


class Stage:
    """What is under way and for how long: a spinner on a terminal, a line each elsewhere."""

    def __init__(self, console: Console, title: str):
        self._console, self._title = console, title
        self._bar = None
        if console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task(title, total=None)
        self._started = time.monotonic()

    def say(self, stage: str) -> None:
        """The next stage begins."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"{self._title}: {stage}")
            return
        seconds = time.monotonic() - self._started
        self._console.print(
            f"{self._title}: {stage} ({seconds:.0f} s)",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        self._console.file.flush()

    def __enter__(self) -> "Stage":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def plan_table(plan: Plan) -> Table:
    """Memory, work, traffic and time of one plan, per device."""
    table = Table(title=plan.title, title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_column("note", style="dim")
    _memory_rows(table, plan)
    if plan.roofline is not None:
        _work_rows(table, plan)
        _traffic_rows(table, plan)
        _time_rows(table, plan)
    table.add_section()
    note = f"and {plan.trace_seconds:.0f} s to trace; compiled for the slice, not executed"
    table.add_row("compile time", f"{plan.compile_seconds:,.0f} s", note)
    return table


def _memory_rows(table: Table, plan: Plan) -> None:
    memory = plan.memory
    if memory is None:
        needed = f"{plan.needed / _GIB:,.1f} GiB" if plan.needed else "?"
        table.add_row("does not fit", needed, f"of {plan.hbm / _GIB:.0f} GiB")
        table.add_row("compiler", "", plan.complaint.splitlines()[0][:300])
        return
    rows = [
        ("arguments", memory.arguments, "parameters, optimizer, batch or cache"),
        ("outputs", memory.outputs, f"of which {memory.aliased / _GIB:,.2f} in arguments' place"),
        ("temporaries", memory.temporaries, "activations, gradients, buffers"),
        ("program", memory.code, ""),
        ("peak", memory.peak, f"{memory.peak / plan.hbm:.0%} of {plan.hbm / _GIB:.0f} GiB"),
    ]
    for name, size, note in rows:
        table.add_row(name, f"{size / _GIB:,.2f} GiB", note)


def _work_rows(table: Table, plan: Plan) -> None:
    table.add_section()
    table.add_row("FLOPs", f"{plan.flops:.3e}", "loops by their trips, recomputation included")
    share = plan.model_flops / plan.flops if plan.flops else 0
    table.add_row("model FLOPs", f"{plan.model_flops:.3e}", f"on paper: {share:.0%} of them")
    table.add_row(
        "HBM traffic", _bytes(plan.hbm_bytes), "operands and results of what is not fused"
    )


def _traffic_rows(table: Table, plan: Plan) -> None:
    table.add_section()
    buffers = plan.sent(buffers=True)
    for (kind, axes), total in plan.sent().items():
        note = f"over {axes}"
        those = [one for one in plan.collectives if (one.kind, "+".join(one.axes)) == (kind, axes)]
        early = sum(one.total for one in those if one.is_async) / sum(one.total for one in those)
        if early:
            note += f", {early:.0%} asynchronous"
        if kind == "ragged-all-to-all":
            note += f"; its buffers {_bytes(buffers[kind, axes])}"
        table.add_row(kind, _bytes(total), note)
    if not plan.collectives:
        table.add_row("collectives", "none", "")


def _time_rows(table: Table, plan: Plan) -> None:
    assert plan.roofline is not None
    table.add_section()
    for name, seconds in plan.roofline._asdict().items():
        bound = "bounds the step" if name == plan.roofline.bound else ""
        table.add_row(name, _seconds(seconds), bound)
    used = plan.model_flops / plan.flops * plan.roofline.compute / plan.roofline.best
    note = f"{_seconds(plan.roofline.serial)} if nothing overlaps"
    table.add_row("step at the roofline", _seconds(plan.roofline.best), note)
    per_second = f"{plan.tokens_per_second:,.0f}"
    table.add_row("tokens/s at the roofline", per_second, f"whole slice; MFU at most {used:.0%}")


def search_table(plans: Sequence[Plan]) -> Table:
    """One line per try, in the order given."""
    table = Table(title="at the roofline; compiled, not executed", title_justify="left")
    for name in ("mesh", "remat", "peak GiB", "of HBM", "step", "bound", "tokens/s"):
        table.add_column(name, justify="left" if name in ("mesh", "remat", "bound") else "right")
    for plan in plans:
        remat = plan.title.rpartition("remat ")[2] if "remat" in plan.title else ""
        if plan.memory is None or plan.roofline is None:
            needed = f"{plan.needed / _GIB:,.0f}" if plan.needed else "?"
            table.add_row(plan.mesh, remat, needed, "does not fit", "", "", "")
            continue
        table.add_row(
            plan.mesh,
            remat,
            f"{plan.memory.peak / _GIB:,.1f}",
            f"{plan.memory.peak / plan.hbm:.0%}",
            _seconds(plan.roofline.best),
            plan.roofline.bound,
            f"{plan.tokens_per_second:,.0f}",
        )
    return table


def _bytes(size: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size / 1e3:,.2f} kB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


# --- picture ---------------------------------------------------------------------------------


def draw(plan: Plan, path: Path) -> None:
    """Memory beside the HBM there is, the terms of the roofline, what is sent over which axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.5))
    _draw_memory(left, plan)
    _draw_time(middle, plan)
    _draw_traffic(right, plan)
    figure.suptitle(f"{plan.title} (compiled, not executed)", fontsize=9)
    figure.savefig(path, dpi=160)


def _draw_memory(axes: "Axes", plan: Plan) -> None:
    memory, bottom = plan.memory, 0.0
    assert memory is not None
    parts = {
        "arguments": memory.arguments,
        "new outputs": memory.outputs - memory.aliased,
        "temporaries": memory.temporaries,
        "program": memory.code,
    }
    for (name, size), colour in zip(parts.items(), _COLOURS, strict=False):
        axes.bar([0], [size / _GIB], bottom=bottom, color=colour, width=0.5, label=name)
        bottom += size / _GIB
    axes.axhline(plan.hbm / _GIB, color="black", linestyle="--", linewidth=1)
    axes.set_xlim(-0.6, 1.6)
    axes.set_xticks([])
    axes.set_ylabel("GiB per device (dashed: HBM)")
    _tidy(axes)


def _draw_time(axes: "Axes", plan: Plan) -> None:
    assert plan.roofline is not None
    terms = plan.roofline._asdict()
    colours = [_COLOURS[1] if name == plan.roofline.bound else _COLOURS[0] for name in terms]
    axes.bar(list(terms), list(terms.values()), color=colours, width=0.6)
    axes.set_ylabel("seconds a step, at published peaks")
    _tidy(axes)


def _draw_traffic(axes: "Axes", plan: Plan) -> None:
    sent = plan.sent()
    # Axes over which next to nothing goes (scalars of the loss) would be empty rows.
    least = max(sent.values(), default=0.0) / 200
    names = list(dict.fromkeys(over for (_, over), size in sent.items() if size >= least))
    sent = {(kind, over): size for (kind, over), size in sent.items() if over in names}
    kinds = list(dict.fromkeys(kind for (kind, _), size in sent.items() if size >= least))
    left = dict.fromkeys(names, 0.0)
    for kind, colour in zip(kinds, _COLOURS * 2, strict=False):
        widths: list[Any] = [sent.get((kind, name), 0.0) / 1e9 for name in names]
        axes.barh(names, widths, left=list(left.values()), color=colour, height=0.6, label=kind)
        left = {name: left[name] + width for name, width in zip(names, widths, strict=True)}
    axes.invert_yaxis()
    axes.set_xlabel("GB sent by a device in a step, by mesh axis")
    _tidy(axes)


def _tidy(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
