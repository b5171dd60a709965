"""Step time against experts, sequence length and tokens, each beside the line it should follow.

    python benchmarks/cost_scaling.py --out out/cost --parts

Three sweeps around one point, a slice of V2-Lite's widths with one dense and one MoE layer and a
small vocabulary: experts at a fixed number per token; sequences at a fixed number of tokens; and
sequences a step. Each point is the whole step of ``train_step.py`` and draws a line from

    t = bytes * parameters / bandwidth + attention FLOPs / rate + a * FLOPs of all products

with model FLOPs as MFU counts them (``deepseek_jax.plan``). Only a is fitted: to the base point,
whose time the line therefore meets. It stands for whatever goes with the tokens: dispatch, norms,
head and loss are in it. The rest is said beforehand (``BYTES``, ``BANDWIDTH``, ``ATTENTION``).

All programs compile at once, on a thread each; then points are timed one at a time, the base point
first and once more at the end. Every result is in ``cost.jsonl`` as soon as it is known, and
``--report`` makes tables and picture of it again; a second run with ``--matmuls fp8`` adds to it.
``--parts`` profiles every point afterwards, so that a departure can be told by the part of the
model that departs; the steps that are timed then run without command buffers, too.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import profile_parts
from benchmarks.timing import deadline, say
from benchmarks.train_step import Run, model_arguments, slice_of, step_arguments
from deepseek_jax import ModelConfig
from deepseek_jax.model.transformer import param_counts
from deepseek_jax.plan import training_flops_per_token
from deepseek_jax.report.hardware import peak_flops

# Of every parameter, whatever the number of tokens. AdamW on FP32 with BF16 moments: parameter
# 4 + 4, moments 4 + 4, gradient 4; its norm 4 more.
_OPTIMIZER = 24
BYTES = {
    # Cast for the products 4 + 2, read by two of them 2 + 2, the gradient in BF16 2, cast 2 + 4.
    "compute": _OPTIMIZER + 18,
    # Quantized along both axes 4 + 2, read 1 + 1, the gradient in FP32 4.
    "fp8": _OPTIMIZER + 12,
}
BANDWIDTH = 3e12
"""Bytes a second: an H100's HBM, of 3.35 on the data sheet."""
ATTENTION = 375e12
"""Model FLOPs a second of the causal core, forward and backward: cuDNN at 192/128, 4096 tokens."""
RESULTS = "cost.jsonl"
SWEEPS = {
    "experts": "routed experts",
    "seq": "tokens a sequence, as many in all",
    "batch": "tokens a step",
}


class Point(NamedTuple):
    """What is varied."""

    experts: int
    seq: int
    batch: int

    def __str__(self) -> str:
        return f"{self.experts} experts, {self.batch} x {self.seq}"


def points(arguments: argparse.Namespace) -> dict[Point, list[str]]:
    """The base point first; with the sweeps that each belongs to."""
    base = Point(arguments.experts, arguments.seq, arguments.batch)
    found: dict[Point, list[str]] = {base: []}
    values = {
        "experts": [base._replace(experts=n) for n in arguments.experts_sweep],
        "seq": [
            base._replace(seq=n, batch=base.batch * base.seq // n) for n in arguments.seq_sweep
        ],
        "batch": [base._replace(batch=n) for n in arguments.batch_sweep],
    }
    for sweep in arguments.sweeps:
        for point in (base, *values[sweep]):
            if sweep not in found.setdefault(point, []):
                found[point].append(sweep)
    return found


# --- the model of the cost --------------------------------------------------------------------


class Work(NamedTuple):
    """What a step has to do."""

    parameters: int
    attention_flops: float
    """Model FLOPs of the causal core."""
    product_flops: float
    """Of all other products."""

    @property
    def flops(self) -> float:
        """All model FLOPs."""
        return self.attention_flops + self.product_flops


def work_of(config: ModelConfig, point: Point) -> Work:
    """By the formulas that MFU and ``plan`` use."""
    tokens = point.batch * point.seq
    products = training_flops_per_token(config, 0) * tokens
    whole = training_flops_per_token(config, point.seq) * tokens
    return Work(param_counts(config).total, whole - products, products)


def apart(work: Work, matmuls: str) -> float:
    """Seconds that are said beforehand: of the parameters, and of attention."""
    moved = BYTES[matmuls] * work.parameters
    return moved / BANDWIDTH + work.attention_flops / ATTENTION


def expected(work: Work, base: Work, base_seconds: float, matmuls: str) -> float:
    """Seconds of a step, given those of the base point."""
    rest = base_seconds - apart(base, matmuls)
    return apart(work, matmuls) + rest * work.product_flops / base.product_flops


# --- running ----------------------------------------------------------------------------------


def measure(run: Run, arguments: argparse.Namespace) -> dict[str, Any]:
    """The time of a point's step, after two to warm up."""
    memory: Any = run.step.memory_analysis()
    run.start().timed(1)
    seconds = run.timed(arguments.steps)
    return {
        "ms": statistics.median(seconds) * 1e3,
        "fastest_ms": min(seconds) * 1e3,
        "slowest_ms": max(seconds) * 1e3,
        "state_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "trace_s": run.trace_s,
        "compile_s": run.compile_s,
        "losses": run.losses[:3],
    }


def parts(run: Run) -> dict[str, Any]:
    """Device time by part of the model, of two steps."""
    run.start().timed(1)
    with tempfile.TemporaryDirectory() as folder:
        return {"parts": profile_parts.by_part(run.parts(folder, 2), 2)}


class Sweep:
    """All points of one call: ``compile``, then ``each``."""

    def __init__(self, arguments: argparse.Namespace):
        """Nothing is traced yet."""
        self.arguments, self.points = arguments, points(arguments)
        self.work = {p: work_of(slice_of(self.at(p)), p) for p in self.points}
        self.until = time.perf_counter() + arguments.limit
        self.runs: dict[Point, Run] = {}
        device = jax.devices()[0]
        self.common = {
            "model": arguments.model,
            "layers": arguments.layers,
            "matmuls": arguments.matmuls,
            "device": device.device_kind,
            "jax": jax.__version__,
            "flags": os.environ.get("XLA_FLAGS", ""),
            "peak": peak_flops(device),
        }

    def left(self) -> float:
        """Seconds."""
        return self.until - time.perf_counter()

    def at(self, point: Point) -> argparse.Namespace:
        """The arguments of a point."""
        return argparse.Namespace(**(vars(self.arguments) | point._asdict()))

    def compile(self, pool: concurrent.futures.Executor) -> bool:
        """Whether all came to an end in their time."""
        reserve = self.arguments.reserve
        pending: dict[Point, concurrent.futures.Future[Run]] = {}
        for point in self.points:
            if self.left() < self.arguments.limit / 2:
                self.write(point, {"error": "no time to trace it"})
                continue
            # Traced here, where no two can be in one another's way, while others compile.
            arguments = self.at(point)
            try:
                run = Run(slice_of(arguments), "data=1", arguments, jax.devices()[:1])
                pending[point] = pool.submit(run.compile)
            except Exception as failure:
                self.write(point, _error(failure))
        say(f"{len(pending)} points traced")
        done, late = concurrent.futures.wait(pending.values(), max(0, self.left() - reserve))
        say(f"{len(done)} points compiled")
        for point, future in pending.items():
            if future in late:
                self.write(point, {"error": "not compiled in time"})
            elif failure := future.exception():
                self.write(point, _error(failure))
            else:
                self.runs[point] = future.result()
        return not late

    def each(self, of: Callable[[Run], dict[str, Any]], chosen: Iterable[Point]) -> None:
        """Take the points one after the other, and write what is found."""
        for point in chosen:
            if self.left() < 0:
                self.write(point, {"error": "no time left"})
                continue
            run = self.runs[point]
            try:
                self.write(point, of(run))
            except Exception as failure:  # out of memory, say: the other points are still good
                self.write(point, _error(failure))
            run.stop()

    def write(self, point: Point, found: dict[str, Any]) -> None:
        """Add a line to the results, and say so."""
        place = {"sweeps": self.points[point], "base": point == next(iter(self.points))}
        line = self.common | point._asdict() | place | self.work[point]._asdict() | found
        with (self.arguments.out / RESULTS).open("a") as file:
            file.write(json.dumps(line) + "\n")
        figure = f"{found['ms']:.1f} ms" if "ms" in found else str(found)
        say(f"{self.arguments.matmuls}, {point}: {figure}")


def _error(failure: BaseException) -> dict[str, Any]:
    return {"error": f"{type(failure).__name__}: {str(failure)[:300]}"}


def run_all(arguments: argparse.Namespace) -> None:
    """Compile all, time one after the other, profile, report."""
    sweep = Sweep(arguments)
    with concurrent.futures.ThreadPoolExecutor(arguments.compilers) as pool:
        # What still compiles takes processors from the thread that launches kernels.
        alone = {"alone": sweep.compile(pool)}
        # Does the base point, on which the line hangs, take as long at the end?
        again = [p for p in sweep.runs if p == next(iter(sweep.points))]
        sweep.each(lambda run: measure(run, arguments) | alone, (*sweep.runs, *again))
        if arguments.parts:
            sweep.each(parts, sweep.runs)
        report(arguments.out)
        pool.shutdown(wait=False, cancel_futures=True)


# --- report -----------------------------------------------------------------------------------

Row = dict[str, Any]


def read(out: Path) -> dict[str, list[Row]]:
    """The measured points by products; of one measured twice the last time."""
    found: dict[str, dict[Point, Row]] = {}
    for line in (out / RESULTS).read_text().splitlines():
        row = json.loads(line)
        if "error" not in row:
            rows = found.setdefault(row["matmuls"], {})
            point = Point(*(row[name] for name in Point._fields))
            rows[point] = rows.get(point, {}) | row
    return {matmuls: list(rows.values()) for matmuls, rows in found.items()}


def with_expected(rows: Sequence[Row]) -> list[Row]:
    """Beside each its ``expected_ms``; without the base point there is no line, and no rows."""
    base = next((row for row in rows if row["base"]), None)
    if base is None:
        return []

    def of(row: Row) -> float:
        work, of_base = (Work(*(r[name] for name in Work._fields)) for r in (row, base))
        return 1e3 * expected(work, of_base, base["ms"] / 1e3, row["matmuls"])

    return [row | {"expected_ms": of(row)} for row in rows]


def of_sweep(rows: Iterable[Row], sweep: str) -> list[Row]:
    """One sweep's rows in the order of what it varies."""
    return sorted((row for row in rows if sweep in row["sweeps"]), key=lambda row: row[sweep])


def report(out: Path) -> None:
    """Print and draw all that has been measured."""
    found = {matmuls: with_expected(rows) for matmuls, rows in read(out).items()}
    for matmuls, rows in found.items():
        base = next((row for row in rows if row["base"]), None)
        if base is None:
            print(f"{matmuls}: no base point, no line")
            continue
        work = Work(*(base[name] for name in Work._fields))
        rest = base["ms"] / 1e3 - apart(work, matmuls)
        moved = BYTES[matmuls] * work.parameters / BANDWIDTH
        print(
            f"\n{base['model']}, {base['layers']} layers, products {matmuls}, {base['device']}, "
            f"jax {base['jax']}. Base point {base['ms']:.1f} ms = {moved * 1e3:.1f} parameters + "
            f"{work.attention_flops / ATTENTION * 1e3:.1f} attention + {rest * 1e3:.1f} what goes "
            f"with the tokens, {work.product_flops / rest / 1e12:.1f} TFLOP/s"
        )
        for sweep in SWEEPS:
            if len(own := of_sweep(rows, sweep)) > 1:
                print("\n".join(table(own)))
    if any(found.values()):
        draw(found, out / "cost_scaling.png")


def table(rows: Sequence[Row]) -> list[str]:
    """Measured beside expected, as in Markdown; then milliseconds by part."""
    lines = [
        "",
        "| experts | sequences | parameters | ms | expected | measured / expected | MFU | GB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        work = Work(*(row[name] for name in Work._fields))
        mfu = f"{work.flops / row['ms'] * 1e3 / row['peak']:.1%}" if row["peak"] else ""
        memory = f"{row['state_bytes'] / 1e9:.1f} + {row['temporary_bytes'] / 1e9:.1f}"
        busy = "" if row["alone"] else " (others compiling)"
        lines.append(
            f"| {row['experts']} | {row['batch']} x {row['seq']} | {work.parameters / 1e6:,.0f}M | "
            f"{row['ms']:.1f}{busy} | {row['expected_ms']:.1f} | "
            f"{row['ms'] / row['expected_ms']:.2f} | {mfu} | {memory} |"
        )
    if profiled := [row for row in rows if "parts" in row]:
        names = [*profile_parts.PARTS, profile_parts.REST]
        lines += ["", f"| ms | {' | '.join(names)} | sum |", "| --- " * (len(names) + 2) + "|"]
        for row in profiled:
            each = [row["parts"].get(name, 0.0) for name in names]
            point = Point(*(row[name] for name in Point._fields))
            figures = " | ".join(f"{ms:.1f}" for ms in (*each, sum(each)))
            lines.append(f"| {point} | {figures} |")
    return lines


def draw(found: dict[str, list[Row]], path: Path) -> None:
    """A panel for each sweep: measured points on expected lines."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    names = {"compute": "BF16", "fp8": "FP8"}
    for axis, (sweep, label) in zip(figure.subplots(1, len(SWEEPS)), SWEEPS.items(), strict=True):
        ticks: set[int] = set()
        for color, (matmuls, rows) in zip(("C0", "C1"), found.items(), strict=False):
            own, name = of_sweep(rows, sweep), names[matmuls]
            if not own:
                continue
            at = [row["batch"] * row["seq"] if sweep == "batch" else row[sweep] for row in own]
            ticks |= set(at)
            axis.plot(at, [row["ms"] for row in own], "o", color=color, label=f"{name}, measured")
            lines = [row["expected_ms"] for row in own]
            axis.plot(at, lines, color=color, linewidth=1.2, label=f"{name}, expected")
        if not ticks:
            continue
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.set_xticks(sorted(ticks), [_short(n) for n in sorted(ticks)])
        axis.xaxis.set_minor_locator(NullLocator())
        low, high = axis.get_ylim()
        # A narrow range has few round figures in it.
        dense = tuple(itertools.chain(range(10, 20), range(20, 100, 5)))
        subs = (
            (1, 2, 5) if high > 8 * low else tuple(n / 10 for n in dense[:: 1 + (high > 2 * low)])
        )
        axis.yaxis.set_major_locator(LogLocator(subs=subs))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("milliseconds a step")
    # A sweep that was not asked for has no lines.
    drawn = [axis for axis in figure.axes if axis.get_legend_handles_labels()[0]]
    for axis in drawn[:1]:
        axis.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=160)


def _short(number: int) -> str:
    return f"{number // 1024}k" if number % 1024 == 0 else str(number)


def main(words: list[str] | None = None) -> None:
    """Parse the arguments, run, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="results are added to what is there")
    parser.add_argument("--report", type=Path, metavar="DIR", help="of results that are there")
    model_arguments(parser)
    step_arguments(parser)
    parser.set_defaults(
        model="v2_lite", layers=2, experts=64, vocab=8192, batch=8, remat="selective"
    )
    parser.set_defaults(moments="bfloat16")
    parser.add_argument("--sweeps", nargs="*", default=[*SWEEPS], choices=SWEEPS)
    sizes = {"type": int, "nargs": "*"}
    parser.add_argument("--experts-sweep", **sizes, default=[8, 16, 32, 64, 128, 256])
    seqs = [1024 << i for i in range(6)]
    parser.add_argument("--seq-sweep", **sizes, default=seqs, help="as many tokens as the base")
    parser.add_argument("--batch-sweep", **sizes, default=[1, 2, 4, 8, 16])
    parser.add_argument("--parts", action="store_true", help="profile every point")
    parser.add_argument("--limit", type=float, default=360, help="seconds, all in all")
    parser.add_argument("--reserve", type=float, default=90, help="of these, after compiling")
    parser.add_argument("--compilers", type=int, default=os.cpu_count())
    arguments = parser.parse_args(words)
    if arguments.report:
        report(arguments.report)
        return
    if arguments.out is None:
        parser.error("--out DIR or --report DIR")
    tokens = arguments.batch * arguments.seq
    if "seq" in arguments.sweeps and (odd := [n for n in arguments.seq_sweep if tokens % n]):
        parser.error(f"--seq-sweep: {odd} do not divide the base point's {tokens} tokens")
    if arguments.parts:
        profile_parts.keep_names()
    arguments.out.mkdir(parents=True, exist_ok=True)
    # Should something hang, what has been written is still there.
    with deadline(arguments.limit + 20):
        run_all(arguments)


if __name__ == "__main__":
    # The largest state and its gradients are most of a device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    main()
