"""Bandwidth of the quantization kernels beside a copy on the device.

    PYTHONPATH=. python benchmarks/quantize.py

Bytes are those that must move: the inputs once, the values and scales once.
"""

import argparse
import functools

import jax
import jax.numpy as jnp

from benchmarks.grouped_gemm import sizes_of_groups
from benchmarks.timing import deadline, median_seconds
from pallas_kernels import quantize

SHAPES = [(16384, 7168), (32768, 2048), (4096, 7168)]
WEIGHTS = (16, 7168, 2048)
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


def _implementations(no_xla: bool):
    return (("hopper", "kernel"),) if no_xla else (("hopper", "kernel"), ("reference", "XLA"))


def _weights(no_xla: bool):
    """The masters of a layer's experts, as a training step quantizes them."""
    print(f"\n{WEIGHTS}, float32")
    # None of them fits into the cache.
    inputs = [(jax.random.normal(jax.random.key(i), WEIGHTS),) for i in range(2)]
    copy_rate = _row("copy", jax.jit(jnp.copy), inputs)
    for impl, name in _implementations(no_xla):
        blocks = functools.partial(quantize.quantize_blocks_both, impl=impl)
        _row(f"128x128 blocks, both ways, {name}", blocks, inputs, copy_rate)


def main():
    """Print a table for each shape."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--no-xla", action="store_true", help="time the kernels only")
    arguments = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    _weights(arguments.no_xla)
    for shape in SHAPES:
        print(f"\n{shape}, bfloat16")
        # Enough sets of inputs that none is in the cache when its turn comes.
        inputs = [(jax.random.normal(jax.random.key(i), shape, jnp.bfloat16),) for i in range(4)]
        copy_rate = _row("copy", jax.jit(jnp.copy), inputs)
        pairs = [(jnp.concatenate([inputs[i][0], inputs[i - 1][0]], axis=1),) for i in range(4)]
        # In groups the rows are copied to whole tiles, which is a little more to write.
        tiles = quantize.ragged_tiles(
            jnp.asarray(sizes_of_groups(32, shape[0], 0.5), jnp.int32), shape[0]
        )
        grouped = [(*x, tiles) for x in inputs]
        gradients = [
            (quantize.quantize_tiles(*pair), *x, x[0][:, 0], tiles)
            for pair, x in zip(pairs, inputs, strict=True)
        ]
        for impl, name in _implementations(arguments.no_xla):
            of_impl = functools.partial(functools.partial, impl=impl)
            rows = of_impl(quantize.quantize_tiles)
            _row(f"rows, {name}", rows, inputs, copy_rate)
            columns = of_impl(quantize.quantize_tiles, axis=0)
            _row(f"columns (transposed), {name}", columns, inputs, copy_rate)
            both = of_impl(quantize.quantize_tiles_both)
            _row(f"rows and columns, {name}", both, inputs, copy_rate)
            _row(f"rows and columns, 32 groups, {name}", both, grouped, copy_rate)
            swiglu = of_impl(quantize.swiglu_quantize_tiles)
            _row(f"SwiGLU, rows, {name}", swiglu, pairs, copy_rate)
            gradient = of_impl(quantize.swiglu_gradient_quantize_tiles)
            _row(f"SwiGLU's gradient, 32 groups, {name}", gradient, gradients, copy_rate)
            blocks = of_impl(quantize.quantize_blocks_both)
            _row(f"128x128 blocks, both ways, {name}", blocks, inputs, copy_rate)


if __name__ == "__main__":
    main()
