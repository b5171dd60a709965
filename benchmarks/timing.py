"""Timing of device work, and a guard against kernels that never return."""

import contextlib
import faulthandler
import statistics
import time
from collections.abc import Callable, Sequence

import jax


def median_seconds(
    f: Callable, inputs: Sequence[tuple], *, calls: int = 20, repeats: int = 7
) -> float:
    """Median seconds of one call of ``f``, with the queue to the device kept full.

    Every repeat times a short and a long run of calls and divides the difference by the difference
    in calls, so what a run costs once (dispatch of the first call, the final synchronization) is
    not counted. ``inputs`` are taken in turn: several sets keep one call from reading what another
    has left in the cache. What takes longer than 10 ms is called a few times only.
    """

    def run(count: int) -> float:
        out = None
        start = time.perf_counter()
        for i in range(count):
            out = f(*inputs[i % len(inputs)])
        jax.block_until_ready(out)
        return time.perf_counter() - start

    run(len(inputs) + 1)  # compiles and warms up
    short = 5
    if run(1) > 0.01:
        short, calls, repeats = 1, min(calls, 2), min(repeats, 3)
    return statistics.median((run(short + calls) - run(short)) / calls for _ in range(repeats))


@contextlib.contextmanager
def deadline(seconds: float):
    """End the process, with a traceback, if the body takes longer: a hung kernel cannot be caught.

    What was printed before stays, so print as you go.
    """
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
