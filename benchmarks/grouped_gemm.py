"""Grouped (per-expert) matmul on Hopper beside ``jax.lax.ragged_dot`` and a dense product.

    PYTHONPATH=. python benchmarks/grouped_gemm.py           # BF16, with both gradients, and FP8
    PYTHONPATH=. python benchmarks/grouped_gemm.py --case 8 32768 7168 4096

The BF16 rows go through the differentiable op; its gradients are timed one at a time (what is not
asked for is not computed).

The dense row is cuBLAS on as many rows in one group: what ragged rows cost is the distance to it.
Every row is checked against a float32 loop over the groups before it is timed, and run twice,
because a race shows as a result that moves.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.timing import deadline, median_seconds
from pallas_kernels import quantize, reference
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.hopper import grouped_matmul as hopper
from pallas_kernels.hopper import grouped_wgrad as wgrad_kernel
from pallas_kernels.hopper import matmul as fp8
from pallas_kernels.linear import fp8_grouped_linear

# (groups, rows of all groups together, K, N) of an expert's products: gate and up side by side,
# and down, in DeepSeek-V3 and in V2-Lite.
CASES = [(groups, 32768, k, n) for k, n in [(7168, 4096), (2048, 7168)] for groups in (8, 32, 64)]
CASES += [(64, 32768, 2048, 2816), (64, 32768, 2048, 1408), (64, 32768, 1408, 2048)]
SECONDS_PER_ROW = 90
_ONLY = [""]  # a row is timed if its label has one of these in it
LARGEST_ERROR = 3e-3  # rounding to BF16 alone gives 1.7e-3


def sizes_of_groups(groups: int, rows: int, skew: float) -> list[int]:
    """Group sizes as routing gives them: log-normal, a few rows of the sum left to the last."""
    weights = np.exp(skew * np.random.default_rng(groups).normal(size=groups))
    sizes = np.floor(weights / weights.sum() * rows).astype(int)
    sizes[-1] += rows - sizes.sum()
    return sizes.tolist()


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _operands(key, groups, rows, k, n):
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (rows, k)) * jnp.exp(jax.random.normal(keys[1], (rows, 1)))
    w = jax.random.normal(keys[2], (groups, k, n), jnp.bfloat16)
    return x.astype(jnp.bfloat16), w


@functools.partial(jax.jit, static_argnames=("most", "wgrad"))
def _error_of_group(got, x, w, first, size, *, most, wgrad):
    """Squares of the error and of the result, over one group of at most ``most`` rows.

    ``w`` is the group's matrix, or all rows of the gradient for its weight gradient.
    """

    def own(rows_MX):
        padded = jnp.pad(rows_MX, ((0, most), (0, 0)))
        rows = lax.dynamic_slice_in_dim(padded, first, most).astype(jnp.float32)
        return jnp.where((jnp.arange(most) < size)[:, None], rows, 0)

    if wgrad:
        want = jnp.dot(own(x).T, own(w), precision="highest")
    else:
        want, got = jnp.dot(own(x), w.astype(jnp.float32), precision="highest"), own(got)
    return tuple(jnp.sum(y.astype(jnp.float32) ** 2) for y in (got - want, want))


def _error(got, x, matrices, sizes, *, wgrad=False):
    """Relative error over all groups, one at a time to fit in memory."""
    firsts = np.cumsum([0, *sizes[:-1]])
    pairs = [
        _error_of_group(
            got[g] if wgrad else got, x, matrices(g), first, size, most=max(sizes), wgrad=wgrad
        )
        for g, (first, size) in enumerate(zip(firsts, sizes, strict=True))
    ]
    wrong, whole = (sum(float(pair[i]) for pair in pairs) for i in range(2))
    return (wrong / whole) ** 0.5


def _op(x, w, group_sizes):
    return grouped_matmul(x, w, group_sizes, impl="hopper")


@jax.jit
def _dgrad(x, w, group_sizes, dy):
    return jax.vjp(lambda x: _op(x, w, group_sizes), x)[1](dy)[0]


@jax.jit
def _wgrad(x, w, group_sizes, dy):
    return jax.vjp(lambda w: _op(x, w, group_sizes), w)[1](dy)[0]


def _row(label, flops, multiply, inputs, error=None):
    """Check, time and print one way of multiplying; an error is a row too."""
    if not any(part in label for part in _ONLY):
        return
    try:
        with deadline(SECONDS_PER_ROW):
            note = ""
            if error:
                once, again = multiply(*inputs[0]), multiply(*inputs[0])
                size = error(once)
                note = f"error {size:.1e}" + ("" if jnp.array_equal(once, again) else ", MOVES")
                if not size <= LARGEST_ERROR:
                    note += " WRONG"
            seconds = median_seconds(multiply, inputs, calls=10, repeats=5)
    except Exception as problem:
        print(f"{label:36} {type(problem).__name__}: {str(problem)[:200]}", flush=True)
        return
    rate = flops / seconds / 1e12
    print(f"{label:36} {seconds * 1e6:9.1f} us {rate:7.0f} TFLOP/s  {note}", flush=True)


def measure(groups: int, rows: int, k: int, n: int, skew: float, ragged_dot: bool):
    """Print the rows of one case."""
    sizes = sizes_of_groups(groups, rows, skew)
    print(f"\n{groups} groups, {rows} rows ({min(sizes)} to {max(sizes)}), K, N = {k}, {n}")
    group_sizes = jnp.asarray(sizes, jnp.int32)
    flops = 2 * rows * k * n
    x, w = _operands(jax.random.key(0), groups, rows, k, n)

    dense = jax.jit(jnp.dot)
    _row("cuBLAS, BF16, one group", flops, dense, [(x, w[0])])
    in_bf16 = functools.partial(_error, x=x, matrices=lambda g: w[g], sizes=sizes)
    inputs = [(x, w, group_sizes)]
    if ragged_dot:
        _row("lax.ragged_dot, BF16", flops, jax.jit(lax.ragged_dot), inputs, in_bf16)
    _row("ours, BF16, fprop", flops, jax.jit(_op), inputs, in_bf16)
    dy = jax.random.normal(jax.random.key(1), (rows, n), jnp.bfloat16)
    inputs = [(x, w, group_sizes, dy)]
    of_dx = functools.partial(_error, x=dy, matrices=lambda g: w[g].T, sizes=sizes)
    _row("ours, BF16, dgrad", flops, _dgrad, inputs, of_dx)
    of_dw = functools.partial(_error, x=x, matrices=lambda g: dy, sizes=sizes, wgrad=True)
    _row("ours, BF16, wgrad", flops, _wgrad, inputs, of_dw)
    in_fp32 = jax.jit(lambda x, w, s, dy: wgrad_kernel.grouped_wgrad(x, dy, s))
    _row("ours, BF16, wgrad, FP32 result", flops, in_fp32, inputs, of_dw)
    del inputs, in_bf16, of_dx, of_dw
    _fp8_rows(x, w, dy, sizes, flops)


def _fp8_rows(x, w, dy, sizes, flops):
    """The three products in FP8, of operands quantized before; and quantization with them."""
    group_sizes = jnp.asarray(sizes, jnp.int32)
    tiles = quantize.ragged_tiles(group_sizes, x.shape[0])
    both_x, both_dy = (quantize.quantize_tiles_both(z, tiles) for z in (x, dy))
    w_fp8, w_transposed = quantize.quantize_blocks_both(w)

    def matrix(q):
        return lambda g: reference.dequantize(jax.tree.map(lambda array: array[g], q)).T

    def of(q, matrices):
        return functools.partial(_error, x=reference.dequantize(q), matrices=matrices, sizes=sizes)

    a, b = both_x.by_row, w_transposed
    for name, form in (("wide", hopper.WIDE), ("tall", hopper.TALL), ("three", hopper.THREE)):
        multiply = jax.jit(functools.partial(hopper.fp8_grouped_matmul, form=form))
        label = f"ours, FP8, fprop, {name}"
        _row(label, flops, multiply, [(a, b, group_sizes)], of(a, matrix(b)))
    a, b = both_dy.by_row, w_fp8
    multiply = jax.jit(hopper.fp8_grouped_matmul)
    _row("ours, FP8, dgrad", flops, multiply, [(a, b, group_sizes)], of(a, matrix(b)))

    a, b = both_x.by_column, both_dy.by_column
    # Weight gradients are compared with those of the dequantized rows: the same numbers, elsewhere.
    rows = [_rows_of_tiles(reference.dequantize(q).T, tiles, x.shape[0]) for q in (a, b)]
    error = functools.partial(
        _error, x=rows[0], matrices=lambda g: rows[1], sizes=sizes, wgrad=True
    )
    for dtype in (jnp.float32, jnp.bfloat16):
        multiply = jax.jit(functools.partial(fp8.fp8_grouped_wgrad, out_dtype=dtype))
        _row(f"ours, FP8, wgrad, {dtype.__name__}", flops, multiply, [(a, b, tiles)], error)
    del rows, error, a, b, both_x, both_dy, w_fp8, w_transposed

    for label, layer in (("BF16", _op), ("FP8, quantization included", fp8_grouped_linear)):

        @jax.jit
        def all_three(x, w, group_sizes, dy, layer=layer):
            y, vjp = jax.vjp(lambda x, w: layer(x, w, group_sizes), x, w)
            return y, *vjp(dy)

        _row(f"all three, {label}", 3 * flops, all_three, [(x, w, group_sizes, dy)])


@functools.partial(jax.jit, static_argnums=2)
def _rows_of_tiles(tiled_XK, tiles, m):
    """Rows out of whole tiles, back to where they came from."""
    row_TI = tiles.first_T[:, None] + jnp.arange(128)
    used_T1 = (jnp.arange(len(tiles.first_T)) < tiles.count[0])[:, None]
    own_TI = used_T1 & (row_TI >= tiles.low_T[:, None]) & (row_TI < tiles.high_T[:, None])
    target = jnp.where(own_TI, row_TI, m).reshape(-1)
    out = jnp.zeros((m, tiled_XK.shape[1]), tiled_XK.dtype)
    return out.at[target].set(tiled_XK, mode="drop")


def main():
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--skew", type=float, default=0.5, help="spread of log group sizes")
    parser.add_argument("--no-ragged-dot", action="store_true", help="it takes most of the time")
    parser.add_argument("--only", action="append", help="time rows with this in the label only")
    parser.add_argument(
        "--case",
        nargs=4,
        type=int,
        action="append",
        metavar=("GROUPS", "ROWS", "K", "N"),
        help="repeatable",
    )
    arguments = parser.parse_args()
    _ONLY[:] = arguments.only or _ONLY
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    for groups, rows, k, n in arguments.case or CASES:
        measure(groups, rows, k, n, arguments.skew, not arguments.no_ragged_dot)


if __name__ == "__main__":
    main()
