"""Block-scaled FP8 matmul beside cuBLAS BF16 and XLA's tensor-wise FP8, in one run.

    PYTHONPATH=. python benchmarks/fp8_gemm.py            # the table of docs/performance.md
    PYTHONPATH=. python benchmarks/fp8_gemm.py --sweep    # other tilings at the first shape
    PYTHONPATH=. python benchmarks/fp8_gemm.py --rows 1 32 64    # few rows, K split in several ways

Every row is checked before it is timed: against the product of the dequantized operands in
FP32, and by running it twice, because a race shows as a result that moves.
"""

import argparse
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.mla_decode import copy_bandwidth
from benchmarks.timing import deadline, median_seconds
from pallas_kernels import quantize, reference
from pallas_kernels.hopper import compat
from pallas_kernels.hopper import matmul as hopper

# (M, N, K): the shapes for which DeepGEMM publishes figures, and a square one.
SHAPES = [
    (4096, 4096, 7168),
    (4096, 7168, 2048),
    (4096, 24576, 1536),
    (4096, 7168, 16384),
    (8192, 8192, 8192),
]
# What the sweep changes in the default tiling.
CHANGES: list[dict[str, Any]] = [
    dict(),
    dict(shared="none"),
    dict(shared="b"),
    dict(waves=1),
    dict(waves=1, shared="none"),
    dict(waves=1, warpgroups=3),
    dict(group=4),
    dict(group=16),
    dict(stages=3),
    dict(store_slots=2),
]
# (N, K) of V3 in decoding: `wq_a` and `wkv_a` together, `wq_b`, `wo`, the shared expert.
WEIGHTS = [(2112, 7168), (24576, 1536), (7168, 16384), (2048, 7168), (7168, 2048)]
SPLITS = (1, 2, 4, 8)
# Weights of as many layers as do not fit into the cache of the device, each multiplied in its turn.
STACK_BYTES = 400e6
PRODUCTS = 128  # one after the other, in one program
SECONDS_PER_ROW = 60
# Rounding of the result to BF16 alone gives 1.7e-3.
LARGEST_ERROR = 3e-3
_NT = (((1,), (1,)), ((), ()))


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def operands(key, m, n, k, b_in_tiles):
    """Random operands, quantized, and the same in BF16."""
    keys = jax.random.split(key, 3)
    # Rows of different magnitude: equal scales would hide a scale taken from the wrong row.
    a = jax.random.normal(keys[0], (m, k)) * jnp.exp(jax.random.normal(keys[1], (m, 1)))
    b = jax.random.normal(keys[2], (n, k))
    of_b = quantize.quantize_tiles if b_in_tiles else quantize.quantize_blocks
    return quantize.quantize_tiles(a), of_b(b), a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)


@jax.jit
def _error(got, a, b):
    want = lax.dot_general(
        reference.dequantize(a), reference.dequantize(b), _NT, precision="highest"
    )
    return jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)


@jax.jit
def _dot(a, b):
    return lax.dot_general(a, b, _NT, preferred_element_type=jnp.bfloat16)


def _row(label, shape, multiply, inputs, *, check=False):
    """Check, time and print one way of multiplying; an error is a row too."""
    m, n, k = shape
    try:
        with deadline(SECONDS_PER_ROW):
            note = ""
            if check:
                once, again = multiply(*inputs[0]), multiply(*inputs[0])
                error, stable = _error(once, *inputs[0]), jnp.array_equal(once, again)
                note = f"error {error:.1e}" + ("" if stable else ", MOVES")
                if not error <= LARGEST_ERROR:
                    note += " WRONG"
            seconds = median_seconds(multiply, inputs)
    except Exception as problem:
        print(f"{label:44} {type(problem).__name__}: {str(problem)[:200]}", flush=True)
        return None
    rate = 2 * m * n * k / seconds / 1e12
    print(f"{label:44} {seconds * 1e6:9.1f} us {rate:7.0f} TFLOP/s  {note}", flush=True)
    return rate


def _sets(shape, b_in_tiles=False, count=2):
    return [operands(jax.random.key(seed), *shape, b_in_tiles) for seed in range(count)]


def table(shapes):
    """Ours beside the libraries', at every shape, forward and weight-gradient form."""
    for shape in shapes:
        print(f"\nM, N, K = {shape}")
        sets = _sets(shape)
        bf16 = _row("cuBLAS, BF16", shape, _dot, [s[2:] for s in sets])
        fp8 = [(s[0].values, s[1].values) for s in sets]
        _row("XLA, FP8, one scale per tensor", shape, _dot, fp8)
        multiply = jax.jit(hopper.fp8_matmul)
        ours = _row("1x128 by 128x128", shape, multiply, [s[:2] for s in sets], check=True)
        if ours and bf16:
            print(f"{'':44} {ours / bf16:.2f} times BF16")
        del sets, fp8
        sets = [s[:2] for s in _sets(shape, b_in_tiles=True)]
        as_float32 = jax.jit(functools.partial(hopper.fp8_matmul, out_dtype=jnp.float32))
        _row("1x128 by 1x128, FP32 result", shape, as_float32, sets, check=True)


def sweep(shape):
    """The default tiling and what differs from it in one thing, at one shape; fastest last."""
    print(f"\nM, N, K = {shape}")
    inputs = [s[:2] for s in _sets(shape)]
    rates = {}
    default = hopper.tiling_by_rule(
        *shape, b_in_tiles=False, multiprocessors=compat.multiprocessors()
    )
    for change in CHANGES:
        tiling = dataclasses.replace(default, **change)
        multiply = jax.jit(functools.partial(hopper.fp8_matmul, tiling=tiling))
        label = ", ".join(f"{name} {value}" for name, value in change.items()) or "default"
        if rate := _row(label, shape, multiply, inputs, check=True):
            rates[label] = rate
    print("\nfastest last:")
    for label, rate in sorted(rates.items(), key=lambda item: item[1])[-8:]:
        print(f"{label:44} {rate:7.0f} TFLOP/s")


@functools.partial(jax.jit, static_argnames="tiling")
def _in_turn(a, b, tiling):
    """The sum of the products with the weights of all layers, so many times over."""
    layers = b.values.shape[0]

    def add(i, total):
        one = b._replace(layer=i % layers)
        return total + hopper.fp8_matmul(a, one, out_dtype=jnp.float32, tiling=tiling)

    zeros = jnp.zeros((a.values.shape[0], b.values.shape[1]), jnp.float32)
    return lax.fori_loop(0, PRODUCTS, add, zeros)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _stack(key, layers, n, k):
    """Weights of random bits; scales so that no product is out of the ordinary."""
    bits = jax.random.bits(key, (layers, n, k), jnp.uint8)
    values = lax.bitcast_convert_type(bits & 0xBF, jnp.float8_e4m3fn)  # magnitudes below 2
    return quantize.Quantized(values, jnp.ones((layers, -(-n // 128), k // 128)))


def few_rows(rows, weights):
    """Products as in decoding: by the rule, as more rows are multiplied, and in other parts."""
    copy = copy_bandwidth()
    count = compat.multiprocessors()
    print(f"a copy {copy / 1e9:.0f} GB/s; times include adding the product to a sum")
    for n, k in weights:
        stack = _stack(jax.random.key(0), max(2, round(STACK_BYTES / (n * k))), n, k)
        for m in rows:
            print(f"\nM, N, K = {m}, {n}, {k}")
            a = quantize.quantize_tiles(jax.random.normal(jax.random.key(1), (m, k)))
            rule = hopper.tiling_of_few_rows(m, n, k, multiprocessors=count)
            shared = "none" if -(-n // 128) % 2 else "a"
            whole = dataclasses.replace(rule, warpgroups=2, splits=1, shared=shared)
            ways = {f"by rule, {rule.splits} parts": rule, "2 consumers, K whole": whole}
            for splits in dict.fromkeys((*SPLITS, rule.splits)):
                for consumers in (1, 2):
                    tiling = dataclasses.replace(rule, warpgroups=consumers, splits=splits)
                    ways.setdefault(f"{splits} parts, {consumers} consumers", tiling)
            for label, tiling in ways.items():
                _few_rows_line(label, a, stack, tiling, copy)


def _few_rows_line(label, a, stack, tiling, copy):
    first = stack._replace(layer=jnp.int32(0))
    try:
        with deadline(SECONDS_PER_ROW):
            error = _error(hopper.fp8_matmul(a, first, tiling=tiling), a, first)
            run = functools.partial(_in_turn, tiling=tiling)
            seconds = median_seconds(run, [(a, stack)], calls=5, repeats=5) / PRODUCTS
    except Exception as problem:
        print(f"{label:30} {type(problem).__name__}: {str(problem)[:200]}", flush=True)
        return
    rate = stack.values[0].nbytes / seconds
    print(
        f"{label:30} {seconds * 1e6:7.1f} us {rate / 1e9:6.0f} GB/s, {rate / copy:4.0%} of a copy"
        f"  error {error:.1e}{'' if error <= LARGEST_ERROR else ' WRONG'}",
        flush=True,
    )


def main():
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sweep", action="store_true", help="time other tilings instead")
    parser.add_argument("--rows", type=int, nargs="+", default=[], help="few rows instead")
    parser.add_argument(
        "--shape", nargs=3, type=int, action="append", metavar=("M", "N", "K"), help="repeatable"
    )
    arguments = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    shapes = [tuple(shape) for shape in arguments.shape or SHAPES]
    if arguments.rows:
        few_rows(arguments.rows, WEIGHTS)
    elif arguments.sweep:
        for shape in shapes if arguments.shape else shapes[:1]:
            sweep(shape)
    else:
        table(shapes)


if __name__ == "__main__":
    main()
