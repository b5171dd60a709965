"""Attention over the latent cache in decoding: the kernel, the reference, the model's own loop.

    PYTHONPATH=src:. python benchmarks/mla_decode.py
    PYTHONPATH=src:. python benchmarks/mla_decode.py --batch 8 --cache 32768 --queries 1 2 4
    PYTHONPATH=src:. python benchmarks/mla_decode.py --splits 1 2 4 --only kernel

V3's shape: 128 heads, latents of 512 and 64, every row full. Beside each time stand the bytes of
the cache over it, as a share too of what a copy reaches in the same run, and the products. All is
checked before it is timed: against the reference in float32, on a few rows of different length,
and by running it twice, because a race shows as a result that moves.
"""

import argparse
import functools
import unittest.mock
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.timing import deadline, median_seconds
from pallas_kernels import mla_attention, reference

HEADS, R, P = 128, 512, 64
SCALE = (128 + 64) ** -0.5
SECONDS_PER_ROW = 180
# Rounding of the weights and of the result to BF16, as a share of the largest element.
LARGEST_ERROR = 8e-3
# One call of a loop after another, each over another layer, as a step of decoding makes them:
# enough layers that none is left in the cache of the chip, enough calls to forget the launch.
LEAST_BYTES, LEAST_CALLS = 512 * 2**20, 16


def _model_loop(q_nope, q_pe, c_kv, k_pe, length, layer, *, scale):
    from deepseek_jax.model import attention
    from deepseek_jax.types import KVCache

    cache = KVCache(c_kv, k_pe, length)
    with unittest.mock.patch.object(attention, "has_kernel", return_value=False):
        return attention.attend_absorbed(q_nope, q_pe, cache, layer, scale)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def operands(key, layers, batch, queries, slots):
    """Random queries and a random cache; scores spread by a few, as those of a model do."""
    keys = jax.random.split(key, 4)
    shapes = (batch, queries, HEADS, R), (batch, queries, HEADS, P)
    shapes += (layers, batch, slots, R), (layers, batch, slots, P)
    return [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _every_layer(decode, calls, q_nope, q_pe, c_kv, k_pe, length):
    def call(i, out):
        del out
        return decode(q_nope, q_pe, c_kv, k_pe, length, i % len(c_kv), scale=SCALE)

    return jax.lax.fori_loop(0, calls, call, jnp.zeros_like(q_nope))


@jax.jit
def _error(got, *args):
    in_fp32 = [x.astype(jnp.float32) for x in args[:4]]
    want = reference.mla_decode(*in_fp32, *args[4:], scale=SCALE)
    return jnp.abs(got.astype(jnp.float32) - want).max() / jnp.abs(want).max()


@functools.cache  # for it takes longer than the timing
def _check(decode, queries, slots) -> str:
    lengths = jnp.array([slots - queries, slots // 2, 63, 0])
    args = *operands(jax.random.key(1), 2, 4, queries, slots), lengths, jnp.int32(1)
    once = jax.jit(functools.partial(decode, scale=SCALE))
    got, again = once(*args), once(*args)
    error = _error(got, *args)
    note = f"error {error:.1e}" + ("" if jnp.array_equal(got, again) else ", MOVES")
    return note if error <= LARGEST_ERROR else f"{note} WRONG"


def _row(label, decode: Callable, batch, queries, slots, copy):
    """Check, time and print one implementation; an error is a row too."""
    layer_bytes = 2 * batch * slots * (R + P)
    layers = max(2, -(-LEAST_BYTES // layer_bytes))
    calls = -(-LEAST_CALLS // layers) * layers
    try:
        with deadline(SECONDS_PER_ROW):
            note = _check(decode, queries, slots)
            arrays = operands(jax.random.key(0), layers, batch, queries, slots)
            length = jnp.full(batch, slots - queries)
            run = functools.partial(_every_layer, decode, calls)
            seconds = median_seconds(run, [(*arrays, length)], repeats=15) / calls
    except Exception as problem:
        print(f"{label:24} {type(problem).__name__}: {str(problem)[:300]}", flush=True)
        return
    bandwidth = layer_bytes / seconds
    rate = 2 * batch * queries * HEADS * slots * (2 * R + P) / seconds / 1e12
    print(
        f"{label:24} {seconds * 1e6:9.1f} us {bandwidth / 1e9:7.0f} GB/s"
        f" {bandwidth / copy:5.0%} of a copy {rate:7.1f} TFLOP/s  {note}",
        flush=True,
    )


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy of 2 GiB."""
    x = jnp.ones(2**30, jnp.bfloat16)
    return 2 * x.nbytes / median_seconds(jax.jit(jnp.copy), [(x,)])


def main():
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--cache", type=int, nargs="+", default=[4096], help="slots, all filled")
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 2], help="per row")
    parser.add_argument("--impl", default="hopper", help="the kernel: hopper or tpu")
    parser.add_argument("--splits", type=int, nargs="*", default=[], help="of the Hopper kernel")
    parser.add_argument("--only", default="", help="rows whose label holds this")
    arguments = parser.parse_args()
    copy = copy_bandwidth()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, a copy {copy / 1e9:.0f} GB/s")
    ways = {
        f"kernel ({arguments.impl})": functools.partial(
            mla_attention.mla_decode, impl=arguments.impl
        ),
        "the model's loop": _model_loop,
        "reference": reference.mla_decode,
    }
    for count in arguments.splits:
        from pallas_kernels.hopper import mla_attention as hopper

        ways[f"kernel, {count} splits"] = functools.partial(hopper.mla_decode, splits=count)
    ways = {label: way for label, way in ways.items() if arguments.only in label}
    for slots in arguments.cache:
        for queries in arguments.queries:
            for batch in arguments.batch:
                print(f"\nbatch {batch}, {slots} slots, queries {queries}")
                for label, decode in ways.items():
                    _row(label, decode, batch, queries, slots, copy)


if __name__ == "__main__":
    main()
