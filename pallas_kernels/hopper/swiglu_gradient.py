"""The gradient of a SwiGLU on Hopper: all that a backward pass multiplies, in one pass.

A block of threads takes 128 rows and 128 columns of the gradients of ``gate`` and ``up``, or of the
product. Rows are quantized straight from registers; the transpose is read from shared memory, as in
`pallas_kernels.hopper.quantize_both`. What a result is made of is fetched 16 rows ahead.

Of a column of the product 4 bytes move in (gate, up, and the gradient in BF16) and 5 out. The two
blocks that read the same follow one another, so that the second finds it in the cache. One block
for all, which would read it once, needs so much shared memory that too few of them are at work at a
time: it was four times slower than device memory. So was code without a loop over the rows: the
cache for instructions does not hold it.
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
        grid=(most, k // TILE, 2 if by_column or factors_M is not None else 1),
        grid_names=("tile", "columns", "result"),
        scratch_types=[
            *[plgpu.SMEM((TILE, TILE), jnp.bfloat16, transforms=SIXTEEN_BITS)] * 2,
            plgpu.SMEM((_COLUMNS, TILE), E4M3, transforms=EIGHT_BITS),
            # One for all scales: each by itself would be aligned to 1 KiB, and two blocks of
            # threads, not three, would find room.
            plgpu.SMEM((2 * TILE + _COLUMNS,), jnp.float32),
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
    """A tile of rows and 128 columns of the gradients or the product; ``outs``: where kinds end."""
    row_outs, column_outs, all_outs = outs
    factors, given = (refs[0], refs[1:]) if all_outs > column_outs else (None, refs)
    by_row, by_column = given[:row_outs], given[row_outs:column_outs]
    sums = None if factors is None else given[column_outs]
    inputs, scratch = (gate_up, scales, dh, factors), given[all_outs:]
    tile, k_tile, result = (lax.axis_index(name) for name in ("tile", "columns", "result"))
    own = first[tile], low[tile] - first[tile], high[tile] - first[tile]
    k_tiles = dh.shape[1] // TILE
    # By row the gradients are two matrices, or the halves of one.
    halves = (k_tile, k_tile) if len(by_row) == 4 else (k_tile, k_tiles + k_tile)
    rows = [(*pair, at) for pair, at in zip((by_row[:2], by_row[-2:]), halves, strict=True)]
    columns = [by_column[i : i + 2] for i in range(0, len(by_column), 2)]
    gradients = functools.partial(_some, own, inputs, rows, columns[:2], None, scratch)
    pl.when((tile < count[0]) & (result == 0))(gradients)
    if columns or sums is not None:
        product = functools.partial(_some, own, inputs, [], columns[2:], sums, scratch)
        pl.when((tile < count[0]) & (result == 1))(product)


def _some(own, inputs, rows_out, columns_out, sums, scratch):
    """Both gradients' tiles, where ``rows_out`` are given, or the product's."""
    gate_up, scales, dh, factors = inputs
    *blocks, staged, all_scales = scratch
    numbers = [all_scales.at[pl.ds(i * TILE, TILE)] for i in range(2)]
    columns_scale = all_scales.at[pl.ds(2 * TILE, _COLUMNS)]
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
        found.append(matrix(dh, k_tile) if rows_out or sums is not None else None)
        return *found, None if factors is None else numbers_of(factors.at[rows])

    def step(part, now):
        # Past the last one the last is read again: in a loop, and not in a branch.
        ahead = read(jnp.minimum(part + 1, TILE // _ROWS - 1))
        within = pl.ds(pl.multiple_of(part * _ROWS, _ROWS), _ROWS)
        rows = pl.ds(first_row + part * _ROWS, _ROWS)
        results, dfactors = (_gradients if rows_out else _product)(*now)
        for i, h in enumerate(results):
            if columns_out:
                blocks[i][within] = h.astype(jnp.bfloat16)
            if rows_out:
                q, numbers[i][within] = _quantized(h)
                rows_out[i][0][rows, pl.ds(rows_out[i][2] * TILE, TILE)] = q
        if dfactors is not None:
            numbers[0][within] = dfactors
        return ahead

    lax.fori_loop(0, TILE // _ROWS, step, read(jnp.int32(0)))
    # By ordinary stores: where a group begins, a row is not aligned as a copy wants it.
    plgpu.commit_smem()
    whole = pl.ds(first_row, TILE)
    for (_, scale_out, at), scale in zip(rows_out, numbers, strict=False):
        scale_out[at, whole] = compat.load(scale, ONE_EACH)
    if sums is not None:
        sums[k_tile, whole] = compat.load(numbers[0], ONE_EACH)
    for block, out in zip(blocks, columns_out, strict=False):
        _transposed(block, out, own, staged, columns_scale)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _dequantized(q, scale):
    """`reference.dequantize`."""
    return q.astype(jnp.float16).astype(jnp.float32) * _of_rows(scale, q)


def _sigmoid(gate):
    """0 where the exponential overflows; by two instructions, where a quotient would be five."""
    return jnp.square(lax.rsqrt(1.0 + jnp.exp2(gate * -math.log2(math.e))))


def _of_rows(numbers, like):
    return lax.broadcast_in_dim(numbers, like.shape, (0,))


def _gradients(gate, up, gate_scale, up_scale, dh, factor):
    """Of ``h = factor silu(gate) up``, by gate and by up.

    With s the sigmoid of gate, ``silu(gate) = gate s`` and ``silu'(gate) = s + gate s (1 - s)``.
    """
    gate, up = _dequantized(gate, gate_scale), _dequantized(up, up_scale)
    dh = dh.astype(jnp.float32)
    if factor is not None:
        dh *= _of_rows(factor, dh)
    s = _sigmoid(gate)
    silu = gate * s
    return (dh * up * (s + silu * (1.0 - s)), dh * silu), None


def _product(gate, up, gate_scale, up_scale, dh, factor):
    """``h = factor silu(gate) up``, and ``dh h / factor``, summed."""
    gate, up = _dequantized(gate, gate_scale), _dequantized(up, up_scale)
    h = gate * _sigmoid(gate) * up
    if factor is None:
        return (h,), None
    return (h * _of_rows(factor, h),), jnp.sum(dh.astype(jnp.float32) * h, axis=1)


def _quantized(h):
    """Of rows in registers, values and scales."""
    scale = scales_of(jnp.max(jnp.abs(h), axis=1))
    return (h * _of_rows(1.0 / scale, h)).astype(E4M3), scale


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
