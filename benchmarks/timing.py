"""Timing of device work, and a guard against kernels that never return."""

import contextlib
import faulthandler
import functools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax


def _run(f: Callable, inputs: Sequence[tuple], count: int) -> float:
    """Seconds of so many calls, the inputs taken in turn."""
    out = None
    start = time.perf_counter()
    for i in range(count):
        out = f(*inputs[i % len(inputs)])
    jax.block_until_ready(out)
    return time.perf_counter() - start


def median_seconds(
    f: Callable, inputs: Sequence[tuple], *, calls: int = 20, repeats: int = 7
) -> float:
    """Median seconds of one call of ``f``, with the queue to the device kept full.

    Every repeat times a short and a long run of calls and divides the difference by the difference
    in calls, so what a run costs once (dispatch of the first call, the final synchronization) is
    not counted. ``inputs`` are taken in turn: several sets keep one call from reading what another
    has left in the cache. What takes longer than 10 ms is called a few times only.
    """
    run = functools.partial(_run, f, inputs)
    run(len(inputs) + 1)  # compiles and warms up
    short = 5
    if run(1) > 0.01:
        short, calls, repeats = 1, min(calls, 2), min(repeats, 3)
    return statistics.median((run(short + calls) - run(short)) / calls for _ in range(repeats))


def sustained_seconds(
    f: Callable, inputs: Sequence[tuple], *, warm: float = 0.25, seconds: float = 0.3
) -> float:
    """Seconds of one call of ``f`` in a long row of calls, after ``warm`` seconds of them.

    A large product alone brings a GPU to its power limit, as a training step does, but not at once:
    the clock falls after some tenths of a second. A short run is timed before it does, and so
    favours what is fast over what takes little energy.
    """
    run = functools.partial(_run, f, inputs)
    run(len(inputs))  # compiles
    once = run(3) / 3
    run(max(1, round(warm / once)))
    count = max(3, round(seconds / once))
    return run(count) / count


BEGAN = time.perf_counter()


def say(*parts: Any) -> None:
    """Print at once, with the time since the start."""
    print(f"[{time.perf_counter() - BEGAN:6.1f} s]", *parts, flush=True)


def process_age() -> float:
    """Seconds since the process began, Python's own start and all imports included.

    Where there is no ``/proc``, since this module was imported.
    """
    try:
        # What follows the name, which is in parentheses: the 22nd field is the start.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began = int(fields[22 - 3]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, AttributeError):
        return time.perf_counter() - BEGAN


@contextlib.contextmanager
def deadline(seconds: float):
    """End the process, with a traceback, if the body takes longer: a hung kernel cannot be caught.

    What was printed before stays, so print as you go.
    """
    # By its number, which what captures `sys.stderr` in a test has not.
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
