"""Bandwidth of the quantization kernels beside a copy on the device.

    PYTHONPATH=. python benchmarks/quantize.py

Bytes are those that must move: the input once, the values and scales once.
"""

import functools

import jax
import jax.numpy as jnp

from benchmarks.timing import deadline, median_seconds
from pallas_kernels import quantize

SHAPES = [(4096, 7168), (16384, 7168), (32768, 2048)]
SECONDS_PER_ROW = 60


def _row(label, f, inputs, copy_rate=None):
    """Time and print one function; returns bytes per second."""
    try:
        with deadline(SECONDS_PER_ROW):
            seconds = median_seconds(f, inputs)
    except Exception as problem:
        print(f"{label:44} {type(problem).__name__}: {str(problem)[:200]}", flush=True)
        return None
    arrays = jax.tree.leaves((inputs[0], jax.eval_shape(f, *inputs[0])))
    moved = sum(x.size * x.dtype.itemsize for x in arrays)
    rate = moved / seconds
    share = f"{rate / copy_rate:.0%} of copy" if copy_rate else ""
    print(f"{label:44} {seconds * 1e6:9.1f} us {rate / 1e12:6.2f} TB/s  {share}", flush=True)
    return rate


def main():
    """Print a table for each shape."""
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    for shape in SHAPES:
        print(f"\n{shape}, bfloat16")
        # Enough sets of inputs that none is in the cache when its turn comes.
        inputs = [(jax.random.normal(jax.random.key(i), shape, jnp.bfloat16),) for i in range(4)]
        copy_rate = _row("copy", jax.jit(jnp.copy), inputs)
        for label, axis, impl in (
            ("rows, Hopper kernel", 1, "hopper"),
            ("rows, XLA", 1, "reference"),
            ("columns (transposed), XLA", 0, "reference"),
        ):
            f = functools.partial(quantize.quantize_tiles, axis=axis, impl=impl)
            _row(label, f, inputs, copy_rate)
        _row("128x128 blocks, XLA", quantize.quantize_blocks, inputs, copy_rate)


if __name__ == "__main__":
    main()
