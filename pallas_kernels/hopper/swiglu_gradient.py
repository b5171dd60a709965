"""The gradient of a SwiGLU on Hopper: all that a backward pass multiplies, in one pass.

A block of threads takes 128 rows and 128 columns of one of three results: the gradient of ``gate``,
that of ``up``, or the product. Rows are quantized straight from registers; the transpose is read
from shared memory, as in `pallas_kernels.hopper.quantize_both`. What a result is made of is fetched
16 rows ahead.

Of a column of the product 4 bytes move in (gate, up, and the gradient in BF16) and 5 out. The three
blocks that read the same follow one another, so that two of them find it in the cache. One block
for all three, which would read it once, needs so much shared memory that too few of them are at
work at a time: it was four times slower than device memory.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.hopper import compat
from pallas_kernels.hopper.quantize import tile_layout
from pallas_kernels.hopper.quantize_both import EIGHT_BITS, ONE_EACH, SIXTEEN_BITS
from pallas_kernels.reference import E4M3, TILE, Quantized, RaggedTiles, scales_of

_ROWS = 16  # of a tile, in registers at a time, and as many that are on their way
_COLUMNS = 64  # likewise, of its transpose
_GATE, _UP, _PRODUCT = range(3)
# All barriers are written out: every access of shared memory by itself would make two.
_PARAMS = dict(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0)


def swiglu_gradient(
    gate_up: Quantized,
    dh_MK: Float[Array, "M K"],
    tiles: RaggedTiles,
    *,
    factors_M: Float[Array, "M"] | None = None,
    apart: bool = False,
    by_column: bool = True,
    interpret: bool = False,
) -> tuple[tuple[Quantized, ...], tuple[Quantized, ...], Float[Array, "k M"] | None]:
    """See `pallas_kernels.quantize.swiglu_gradient_quantize_tiles`.

    Args:
        gate_up: Side by side, in E4M3 with scales of tiles along the rows.
        dh_MK: The gradient of the product, in bfloat16.
        tiles: Which rows the tiles along the first axis take.
        factors_M: Of the product's rows.
        apart: Whether the first result is two matrices.
        by_column: Whether to make the second.
        interpret: Simulate on the CPU.

    Returns:
        The gradient of gate and up by row; by column, transposed, that of gate, that of up, and the
        product; and what must be summed over its first axis to be the gradient of the factors, if
        there are any. Rows of no tile and tiles past the last are not written.

    Raises:
        ValueError: unless M is a multiple of 8 and at least 128, and K a multiple of 128.
    """
    m, k = dh_MK.shape
    if m % 8 or m < TILE or k % TILE:
        raise ValueError(
            f"M must be a multiple of 8, and at least {TILE}, and K of {TILE}, not {m} and {k}"
        )
    most = tiles.first_T.shape[0]
    shape = jax.ShapeDtypeStruct

    def quantized(rows: int, columns: int):
        return shape((rows, columns), E4M3), shape((columns // TILE, rows), jnp.float32)

    out_type = (quantized(m, k) * 2) if apart else quantized(m, 2 * k)
    row_outs = len(out_type)
    if by_column:
        out_type += quantized(k, most * TILE) * 3
    column_outs = len(out_type)
    if factors_M is not None:
        out_type += (shape((k // TILE, m), jnp.float32),)
    kernel = compat.kernel(
        functools.partial(_body, outs=(row_outs, column_outs, len(out_type))),
        interpret=interpret,
        out_type=out_type,
        grid=(most, k // TILE, 3 if by_column or factors_M is not None else 2),
        grid_names=("tile", "columns", "result"),
        scratch_types=[
            plgpu.SMEM((TILE, TILE), jnp.bfloat16, transforms=SIXTEEN_BITS),
            plgpu.SMEM((_COLUMNS, TILE), E4M3, transforms=EIGHT_BITS),
            plgpu.SMEM((TILE,), jnp.float32),
            plgpu.SMEM((_COLUMNS,), jnp.float32),
        ],
        params=_PARAMS,
    )
    inputs = () if factors_M is None else (factors_M.astype(jnp.float32),)
    out = kernel(
        tiles.count, tiles.first_T, tiles.low_T, tiles.high_T, *gate_up[:2], dh_MK, *inputs
    )
    pairs = [Quantized(*out[i : i + 2]) for i in range(0, column_outs, 2)]
    rows, columns = tuple(pairs[: row_outs // 2]), tuple(pairs[row_outs // 2 :])
    return rows, columns, None if factors_M is None else out[-1]


def _body(count, first, low, high, gate_up, scales, dh, *refs, outs):
    """A tile of rows and 128 columns of a result; ``outs``: where kinds of outputs end."""
    row_outs, column_outs, all_outs = outs
    factors, given = (refs[0], refs[1:]) if all_outs > column_outs else (None, refs)
    by_row, by_column = given[:row_outs], given[row_outs:column_outs]
    sums = None if factors is None else given[column_outs]
    inputs, scratch = (gate_up, scales, dh, factors), given[all_outs:]
    tile, k_tile, result = (lax.axis_index(name) for name in ("tile", "columns", "result"))
    own = first[tile], low[tile] - first[tile], high[tile] - first[tile]
    apart, k_tiles = len(by_row) == 4, dh.shape[1] // TILE
    for which in (_GATE, _UP, _PRODUCT):
        # The gradients of gate and up by row are two matrices, or the halves of one.
        rows_out = None
        if which != _PRODUCT:
            at = k_tile if apart or which == _GATE else k_tiles + k_tile
            rows_out = *by_row[2 * which * apart :][:2], at
        columns_out = by_column[2 * which :][:2]
        one = functools.partial(_one, which, own, inputs, rows_out, columns_out, sums, scratch)
        if columns_out or which != _PRODUCT or sums is not None:
            pl.when((tile < count[0]) & (result == which))(one)


def _one(which, own, inputs, rows_out, columns_out, sums, scratch):
    """One result's tile."""
    gate_up, scales, dh, factors = inputs
    block, staged, numbers, columns_scale = scratch
    first_row, *own = own
    k_tile, k_tiles = lax.axis_index("columns"), dh.shape[1] // TILE
    layout = tile_layout(2)

    def read(part: jax.Array):
        """Gate, up and their scales; dh and factors, or None where they do not matter."""
        rows = pl.ds(first_row + part * _ROWS, _ROWS)

        def matrix(ref, at):
            return compat.load(ref.at[rows, pl.ds(at * TILE, TILE)], layout)

        def numbers_of(ref):
            return compat.load(ref, layout.reduce(1))

        halves = k_tile, k_tiles + k_tile
        found: list[Any] = [matrix(gate_up, at) for at in halves]
        found += [numbers_of(scales.at[at, rows]) for at in halves]
        found.append(None if which == _PRODUCT and factors is None else matrix(dh, k_tile))
        return *found, None if factors is None else numbers_of(factors.at[rows])

    def step(part, now):
        # Past the last one the last is read again: in a loop, and not in a branch.
        ahead = read(jnp.minimum(part + 1, TILE // _ROWS - 1))
        h, dfactors = _result(which, *now)
        within = pl.ds(pl.multiple_of(part * _ROWS, _ROWS), _ROWS)
        if columns_out:
            block[within] = h.astype(jnp.bfloat16)
        if rows_out:
            q, numbers[within] = _quantized(h)
            rows = pl.ds(first_row + part * _ROWS, _ROWS)
            rows_out[0][rows, pl.ds(rows_out[2] * TILE, TILE)] = q
        elif dfactors is not None:
            numbers[within] = dfactors
        return ahead

    lax.fori_loop(0, TILE // _ROWS, step, read(jnp.int32(0)))
    # By ordinary stores: where a group begins, a row is not aligned as a copy wants it.
    plgpu.commit_smem()
    whole = pl.ds(first_row, TILE)
    if rows_out:
        rows_out[1][rows_out[2], whole] = compat.load(numbers, ONE_EACH)
    elif sums is not None:
        sums[k_tile, whole] = compat.load(numbers, ONE_EACH)
    if columns_out:
        _transposed(block, columns_out, own, staged, columns_scale)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _dequantized(q, scale):
    """`reference.dequantize`."""
    return q.astype(jnp.float16).astype(jnp.float32) * lax.broadcast_in_dim(scale, q.shape, (0,))


def _result(which, gate, up, gate_scale, up_scale, dh, factor):
    """Of ``h = factor silu(gate) up``: its gradients, or h, and then ``dh h / factor``, summed.

    With s the sigmoid of gate, ``silu(gate) = gate s`` and ``silu'(gate) = s + gate s (1 - s)``.
    Where the exponential overflows s is 0, and with it everything but ``1 - s``.
    """
    gate, up = _dequantized(gate, gate_scale), _dequantized(up, up_scale)
    # A quotient would be five instructions; this is two.
    s = jnp.square(lax.rsqrt(1.0 + jnp.exp2(gate * -math.log2(math.e))))
    silu = gate * s
    dh = None if dh is None else dh.astype(jnp.float32)
    factor = None if factor is None else lax.broadcast_in_dim(factor, gate.shape, (0,))
    if which == _PRODUCT:
        h = silu * up
        sums = None if dh is None else jnp.sum(dh * h, axis=1)
    else:
        h = dh * (silu if which == _UP else up * (s + silu * (1.0 - s)))
        sums = None
    return h if factor is None else h * factor, sums


def _quantized(h):
    """Of rows in registers, values and scales."""
    scale = scales_of(jnp.max(jnp.abs(h), axis=1))
    return (h * lax.broadcast_in_dim(1.0 / scale, h.shape, (0,))).astype(E4M3), scale


def _transposed(block, columns_out, own, staged, columns_scale):
    """Quantize a block in shared memory by column, of its own rows, and send it off."""

    @pl.when((own[0] > 0) | (own[1] < TILE))  # few are not whole
    def _():
        layout = tile_layout(2)
        for first in range(0, TILE, _ROWS):
            within = pl.ds(first, _ROWS)
            h = compat.load(block.at[within], layout)
            row = first + plgpu.broadcasted_iota(jnp.int32, h.shape, 0, layout=layout)
            block[within] = jnp.where((row >= own[0]) & (row < own[1]), h, jnp.bfloat16(0))

    values, scales = columns_out
    plgpu.commit_smem()
    tile, k_tile = lax.axis_index("tile"), lax.axis_index("columns")
    for first in range(0, TILE, _COLUMNS):
        h = compat.load(block.at[:, pl.ds(first, _COLUMNS)].T, plgpu.Layout.WGMMA)
        q, scale = _quantized(h.astype(jnp.float32))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what was staged before has left
        columns_scale[...] = scale
        staged[...] = q
        plgpu.commit_smem()
        columns = pl.ds(k_tile * TILE + first, _COLUMNS)
        plgpu.copy_smem_to_gmem(staged, values.at[columns, pl.ds(tile * TILE, TILE)])
        plgpu.copy_smem_to_gmem(columns_scale, scales.at[tile, columns])
