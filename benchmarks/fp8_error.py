"""Error of every operation of `pallas_kernels` against float64, as a table.

    PYTHONPATH=. python benchmarks/fp8_error.py

An operation runs as ``impl="auto"`` takes it on this device, on random rows whose magnitudes
differ. "Arithmetic" is the distance to what float64 makes of the operands as the operation gets
them, quantized ones included; "in all" the distance to what it makes of the operands before they
were quantized. Both are Frobenius norms, relative to the exact result's.
"""

import argparse
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import fp8_grouped_matmul, fp8_grouped_wgrad, grouped_matmul
from pallas_kernels.linear import fp8_grouped_linear, fp8_linear, fp8_swiglu_ffn
from pallas_kernels.matmul import fp8_matmul
from pallas_kernels.mla_attention import mla_decode
from pallas_kernels.quantize import (
    quantize_blocks,
    quantize_tiles,
    quantize_tiles_both,
    requantize_tiles,
    swiglu_gradient_quantize_tiles,
    swiglu_quantize_tiles,
)
from pallas_kernels.reference import TILE, Quantized, has_block_scales, ragged_tiles


class Row(NamedTuple):
    """An operation's result, and two exact ones."""

    name: str
    got: Any
    arithmetic: np.ndarray | None = None
    whole: np.ndarray | None = None


def exact(x: Any) -> np.ndarray:
    """A matrix, or what a quantized one stands for, in float64."""
    if not isinstance(x, Quantized):
        return np.asarray(x, np.float64)
    values, scale = np.asarray(x.values, np.float64), np.asarray(x.scale, np.float64)
    if has_block_scales(x):
        scale = np.repeat(scale, TILE, axis=-2)[..., : values.shape[-2], :]
    else:
        scale = scale.T
    return values * np.repeat(scale, TILE, axis=-1)[..., : values.shape[-1]]


def silu(x: np.ndarray) -> np.ndarray:
    """``x sigmoid(x)``."""
    return x / (1 + np.exp(-x))


def swiglu_gradient(gate: np.ndarray, up: np.ndarray, dh: np.ndarray) -> np.ndarray:
    """Of gate and up, side by side."""
    sigmoid = 1 / (1 + np.exp(-gate))
    return np.concatenate([dh * up * sigmoid * (1 + gate * (1 - sigmoid)), dh * silu(gate)], axis=1)


def distance(got: Any, want: np.ndarray | None) -> str:
    """Relative, as text."""
    if want is None:
        return ""
    return f"{np.linalg.norm(exact(got) - want) / np.linalg.norm(want):.1e}"


def normal(seed: int, *shape: int) -> jax.Array:
    """BF16, with rows of different magnitude: equal scales would hide one of the wrong row."""
    keys = jax.random.split(jax.random.key(seed))
    magnitudes = jnp.exp(jax.random.normal(keys[0], (*shape[:-1], 1)))
    return (jax.random.normal(keys[1], shape) * magnitudes).astype(jnp.bfloat16)


def quantizations(rows: int, columns: int) -> list[Row]:
    """What rounding to E4M3 costs."""
    x, sizes = normal(0, rows, columns), jnp.array([rows // 4, 0, rows // 2 + 8, rows // 8])
    tiles, total = ragged_tiles(sizes, rows), int(sizes.sum())
    gate_up, dh = normal(1, rows, 2 * columns), normal(2, rows, columns)
    gate, up = np.split(exact(gate_up), 2, axis=1)
    kept = quantize_tiles(gate_up, power_of_two=True)
    turned = requantize_tiles(quantize_tiles(x, power_of_two=True), tiles)
    # Back into rows: what lies past a group's end in its last tile is not its own.
    ends = np.cumsum(np.asarray(sizes))
    turned_back = np.zeros((total, columns))
    for end, size, first in zip(ends, np.asarray(sizes), np.asarray(tiles.offset_G), strict=True):
        own = exact(turned)[:, first * TILE : first * TILE + size]
        turned_back[end - size : end] = own.T
    return [
        Row("`quantize_tiles`", quantize_tiles(x), whole=exact(x)),
        Row("the same, powers of two", quantize_tiles(x, power_of_two=True), whole=exact(x)),
        Row("`quantize_tiles_both`, by column", quantize_tiles_both(x).by_column, whole=exact(x).T),
        Row("`quantize_blocks`", quantize_blocks(x), whole=exact(x)),
        Row("`requantize_tiles`, of tiles along the rows", turned_back, whole=exact(x)[:total]),
        Row("`swiglu_quantize_tiles`", swiglu_quantize_tiles(gate_up), whole=silu(gate) * up),
        Row(
            "`swiglu_gradient_quantize_tiles`, by row",
            swiglu_gradient_quantize_tiles(kept, dh).by_row[0],
            whole=swiglu_gradient(gate, up, exact(dh)),
        ),
    ]


def products(m: int, n: int, k: int) -> list[Row]:
    """Matmuls of one matrix, and their gradients."""
    x, w, dy = normal(3, m, k), normal(4, k, n), normal(5, m, n)
    x_q, w_q, by_column = quantize_tiles(x), quantize_blocks(w.T), quantize_tiles(w.T)
    want, quantized = exact(x) @ exact(w), exact(x_q) @ exact(w_q).T
    y, gradient = jax.vjp(fp8_linear, x, w)
    dx, dw = gradient(dy)
    found = [
        Row("`fp8_matmul`, 128x128 blocks, BF16 result", fp8_matmul(x_q, w_q), quantized, want),
        Row(
            "`fp8_matmul`, 128x128 blocks, FP32 result",
            fp8_matmul(x_q, w_q, out_dtype=jnp.float32),
            quantized,
            want,
        ),
        Row(
            "`fp8_matmul`, tiles on both sides, FP32 result",
            fp8_matmul(x_q, by_column, out_dtype=jnp.float32),
            exact(x_q) @ exact(by_column).T,
            want,
        ),
        Row("`fp8_linear`", y, whole=want),
        Row("its gradient of x", dx, whole=exact(dy) @ exact(w).T),
        Row("its gradient of w", dw, whole=exact(x).T @ exact(dy)),
    ]
    gate_w, up_w, down = (
        normal(seed, *shape) * jnp.bfloat16(k**-0.5)
        for seed, shape in ((6, (k, n)), (7, (k, n)), (8, (n, k)))
    )
    gate, up = exact(x) @ exact(gate_w), exact(x) @ exact(up_w)
    out = fp8_swiglu_ffn(x, gate_w, up_w, down)
    return [*found, Row("`fp8_swiglu_ffn`", out, whole=(silu(gate) * up) @ exact(down))]


def grouped(sizes: list[int], n: int, k: int) -> list[Row]:
    """Products with a matrix per group."""
    m, sizes_G = sum(sizes), jnp.array(sizes)
    x, w, dy = normal(9, m, k), normal(10, len(sizes), k, n), normal(11, m, n)
    starts = np.cumsum([0, *sizes])
    spans = [slice(a, b) for a, b in itertools.pairwise(starts)]

    def each(f: Callable[[int, slice], np.ndarray]) -> list[np.ndarray]:
        return [f(g, span) for g, span in enumerate(spans)]

    want = np.concatenate(each(lambda g, s: exact(x)[s] @ exact(w)[g]))
    want_dx = np.concatenate(each(lambda g, s: exact(dy)[s] @ exact(w)[g].T))
    want_dw = np.stack(each(lambda g, s: exact(x)[s].T @ exact(dy)[s]))
    rows = []
    for name, multiply, measure in (
        ("`grouped_matmul`, BF16", grouped_matmul, "arithmetic"),
        ("`fp8_grouped_linear`", fp8_grouped_linear, "whole"),
    ):
        y, back = jax.vjp(lambda x, w, multiply=multiply: multiply(x, w, sizes_G), x, w)
        dx, dw = back(dy)
        rows += [
            Row(name, y, **{measure: want}),
            Row("its gradient of x", dx, **{measure: want_dx}),
            Row("its gradient of w", dw, **{measure: want_dw}),
        ]
    x_q, w_q = quantize_tiles(x), quantize_blocks(jnp.swapaxes(w, 1, 2))
    quantized = np.concatenate(each(lambda g, s: exact(x_q)[s] @ exact(w_q)[g].T))
    rows.append(Row("`fp8_grouped_matmul`", fp8_grouped_matmul(x_q, w_q, sizes_G), quantized, want))
    tiles = ragged_tiles(sizes_G, m)
    a, b = (quantize_tiles_both(z, tiles).by_column for z in (x, dy))
    first, count = np.asarray(tiles.offset_G), np.asarray(tiles.tiles_G)
    spans = [slice(f * TILE, (f + c) * TILE) for f, c in zip(first, count, strict=True)]
    exact_dw = np.stack(each(lambda g, s: exact(a)[:, s] @ exact(b)[:, s].T))
    got = fp8_grouped_wgrad(a, b, tiles)
    rows.append(Row("`fp8_grouped_wgrad`, FP32 result", got, exact_dw, want_dw))
    return rows


def attention(batch: int, heads: int, slots: int, rank: int, rotated: int) -> list[Row]:
    """Over the latent cache."""
    q, q_pe = normal(12, batch, 1, heads, rank), normal(13, batch, 1, heads, rotated)
    cache, cache_pe = normal(14, 1, batch, slots, rank), normal(15, 1, batch, slots, rotated)
    scale = 0.02 * rank**-0.5
    length_B = jnp.full((batch,), slots - 1)
    got = mla_decode(q, q_pe, cache, cache_pe, length_B, 0, scale=scale)
    scores = np.einsum("bnr,bsr->bns", exact(q)[:, 0], exact(cache)[0])
    scores += np.einsum("bnp,bsp->bns", exact(q_pe)[:, 0], exact(cache_pe)[0])
    weights = np.exp(scale * (scores - scores.max(-1, keepdims=True)))
    weights /= weights.sum(-1, keepdims=True)
    want = np.einsum("bns,bsr->bnr", weights, exact(cache)[0])[:, None]
    return [Row("`mla_decode`, BF16", got, arithmetic=want)]


def main() -> None:
    """Compute, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=512)
    parser.add_argument("--contracted", type=int, default=4096)
    arguments = parser.parse_args()
    m, n, k = arguments.rows, arguments.columns, arguments.contracted
    sizes = [m // 2 + 3, 0, m // 8, m // 4, 1]
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; M, N, K = {m}, {n}, {k}\n")
    print("| operation | arithmetic | in all |\n| --- | --- | --- |")
    for rows in (
        quantizations(m, k),
        products(m, n, k),
        grouped(sizes, n, k),
        attention(4, 128, m, 512, 64),
    ):
        for row in rows:
            print(
                f"| {row.name} | {distance(row.got, row.arithmetic)} "
                f"| {distance(row.got, row.whole)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
