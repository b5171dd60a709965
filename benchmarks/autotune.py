"""Find the fastest tiling of the FP8 matmul at given shapes, and write it into the table.

    PYTHONPATH=. python benchmarks/autotune.py                      # the shapes of fp8_gemm.py
    PYTHONPATH=. python benchmarks/autotune.py --shape 4096 576 7168 --form blocks

Candidates are compiled, many at a time, and checked against the first one's result, then timed in
turns, several rounds each, under the load that they have in a training step: each runs until the
power limit has brought down the clock (`timing.sustained_seconds`). First forms of tiles and what
they share; then, for the best of these, the order of tiles and the buffers. A candidate replaces
the tiling by rule only if it is faster by more than the noise. The table,
``pallas_kernels/hopper/tilings.json``, is kept for other devices and shapes.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import fp8_gemm
from benchmarks.timing import deadline, sustained_seconds
from pallas_kernels.hopper import compat, tilings
from pallas_kernels.hopper import matmul as hopper

NOISE = 0.02  # a gain below this is not one
SECONDS_PER_CANDIDATE = 60
TABLE = Path(tilings.__file__).parent / tilings.TABLE


def forms(rule: hopper.Tiling, *, b_in_tiles: bool) -> list[hopper.Tiling]:
    """The tiling by rule, and forms of tile and sharing that may beat it."""
    found = [rule]
    for (waves, warpgroups), shared in itertools.product(
        [(2, 2), (1, 2), (1, 3)] if not b_in_tiles else [(1, 3), (1, 2)], ("a", "b", "none")
    ):
        form = dict(waves=waves, warpgroups=warpgroups, shared=shared)
        found.append(dataclasses.replace(rule, **form))
    return list(dict.fromkeys(found))


def refinements(best: hopper.Tiling) -> list[hopper.Tiling]:
    """A tiling's other orders of tiles and numbers of buffers."""
    found = [dataclasses.replace(best, group=group) for group in (4, 8, 16, 32)]
    found += [dataclasses.replace(best, store_slots=3 - best.store_slots)]
    return [tiling for tiling in found if tiling != best]


def tune(shape: tuple[int, ...], *, b_in_tiles: bool, rounds: int) -> dict | None:
    """An entry for the table, or None where the tiling by rule is as good as any."""
    m, n, k = shape
    sets: list[tuple] = [
        fp8_gemm.operands(jax.random.key(seed), m, n, k, b_in_tiles)[:2] for seed in range(2)
    ]
    rule = hopper.tiling_by_rule(
        m, n, k, b_in_tiles=b_in_tiles, multiprocessors=compat.multiprocessors()
    )
    dtype = jnp.float32 if b_in_tiles else jnp.bfloat16
    runs = _correct(forms(rule, b_in_tiles=b_in_tiles), sets[0], dtype)
    if rule not in runs:
        raise SystemExit(f"the tiling by rule, {rule}, fails at {shape}: nothing to compare with")
    best = min(runs, key=_times(runs, sets, rounds).__getitem__)
    finalists = {tiling: runs[tiling] for tiling in (rule, best)}
    finalists |= _correct(refinements(best), sets[0], dtype, like=runs[rule])
    medians = _times(finalists, sets, rounds)
    for tiling, time in sorted(medians.items(), key=lambda item: item[1])[:4]:
        print(f"  {_name(tiling, rule):40} {2e-12 * m * n * k / time:7.0f} TFLOP/s")
    print(f"  {'by rule':40} {2e-12 * m * n * k / medians[rule]:7.0f} TFLOP/s")
    best = min(medians, key=medians.__getitem__)
    if medians[best] > medians[rule] * (1 - NOISE):
        return None
    return dict(m=m, n=n, k=k, tiling=dataclasses.asdict(best))


def _correct(
    tilings_: list[hopper.Tiling], operands: tuple, dtype: Any, like: Callable | None = None
) -> dict[hopper.Tiling, Callable]:
    """Those compiled that give the result of ``like``, or of the first."""
    tracing = threading.Lock()

    def compiled(tiling: hopper.Tiling) -> Callable | Exception:
        multiply = jax.jit(functools.partial(hopper.fp8_matmul, out_dtype=dtype, tiling=tiling))
        try:
            with tracing:
                lowered = multiply.lower(*operands)
            return lowered.compile()
        except Exception as problem:
            return problem

    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(tilings_, pool.map(compiled, tilings_), strict=True))
    want = None if like is None else like(*operands)
    runs = {}
    for tiling, multiply in found.items():
        try:
            if isinstance(multiply, Exception):
                raise multiply
            with deadline(SECONDS_PER_CANDIDATE):
                got = multiply(*operands)
                want = got if want is None else want
                # All sum in the same order: another result is a wrong one.
                if not jnp.array_equal(got, want):
                    raise ArithmeticError("another result")
        except Exception as problem:
            print(f"  {tiling}: {type(problem).__name__}: {str(problem)[:100]}")
            continue
        runs[tiling] = multiply
    return runs


def _times(
    runs: dict[hopper.Tiling, Callable], sets: list[tuple], rounds: int
) -> dict[hopper.Tiling, float]:
    """Seconds of each, the median of several turns."""
    seconds = {tiling: [] for tiling in runs}
    for turn in range(rounds):
        # Back and forth: what comes before heats the device for what comes after.
        for tiling in list(runs)[:: -1 if turn % 2 else 1]:
            with deadline(SECONDS_PER_CANDIDATE):
                seconds[tiling].append(sustained_seconds(runs[tiling], sets))
    return {tiling: statistics.median(times) for tiling, times in seconds.items()}


def _name(tiling: hopper.Tiling, rule: hopper.Tiling) -> str:
    """What differs from the tiling by rule."""
    values, usual = dataclasses.asdict(tiling), dataclasses.asdict(rule)
    changed = (f"{name} {value}" for name, value in values.items() if value != usual[name])
    return ", ".join(changed) or f"by rule: {rule.waves} waves, shared {rule.shared}"


def write(device: str, operation: str, shape: tuple[int, ...], entry: dict | None) -> None:
    """Put an entry in the place of any of the same shape; none takes that away."""
    table = json.loads(TABLE.read_text())
    entries = table.setdefault(device, {}).setdefault(operation, [])
    kept = [e for e in entries if (e["m"], e["n"], e["k"]) != shape]
    table[device][operation] = sorted(
        kept + ([entry] if entry else []), key=lambda e: (e["n"], e["k"], e["m"])
    )
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


def main():
    """Parse the command line, tune, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--form", choices=["blocks", "tiles"], action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--shape", nargs=3, type=int, action="append", metavar=("M", "N", "K"), help="repeatable"
    )
    arguments = parser.parse_args()
    device = compat.device_kind()
    print(f"{device}, jax {jax.__version__}")
    for shape in map(tuple, arguments.shape or fp8_gemm.SHAPES):
        for form in arguments.form or ["blocks", "tiles"]:
            print(f"\nM, N, K = {shape}, {form}", flush=True)
            entry = tune(shape, b_in_tiles=form == "tiles", rounds=arguments.rounds)
            write(device, f"fp8_matmul, {form}", shape, entry)
            print(f"  -> {entry['tiling'] if entry else 'by rule'}", flush=True)


if __name__ == "__main__":
    main()
