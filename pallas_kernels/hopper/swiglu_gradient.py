"""The gradient of a SwiGLU on Hopper: all that a backward pass multiplies, in one pass.

A block of threads takes 128 rows and 128 columns of the product, and so as many of ``gate`` as of
``up``, and puts the product and both gradients into shared memory in BF16. From there they are
quantized by row, as they lie, and by column, read transposed as in
`pallas_kernels.hopper.quantize_both`. What they are made of is fetched 16 rows ahead.

Bound by device memory: of a column of the product 4 bytes move in (gate, up, and the gradient in
BF16) and 5 out.
"""

import functools
import math

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
_ROWS_AGAIN = 32  # of one result at a time
_COLUMNS = 64  # likewise, of its transpose
# What shared memory holds in FP32, for all rows the scales of both gradients and the sums, and the
# scales of columns: one array, as each begins at a whole kilobyte.
_SCALES, _SUMS, _COLUMNS_SCALE = (0, TILE), 2 * TILE, 3 * TILE
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
    block = plgpu.SMEM((TILE, TILE), jnp.bfloat16, transforms=SIXTEEN_BITS)
    scratch = [
        *[block] * (3 if by_column else 2),
        plgpu.SMEM((_COLUMNS, TILE), E4M3, transforms=EIGHT_BITS),
        plgpu.SMEM((_COLUMNS_SCALE + _COLUMNS,), jnp.float32),
    ]
    kernel = compat.kernel(
        functools.partial(_body, outs=(row_outs, column_outs, len(out_type))),
        interpret=interpret,
        out_type=out_type,
        grid=(most, k // TILE),
        grid_names=("tile", "columns"),
        scratch_types=scratch,
        params=_PARAMS,
    )
    inputs = () if factors_M is None else (factors_M.astype(jnp.float32),)
    out = kernel(tiles.count, tiles.first_T, tiles.low_T, tiles.high_T, *gate_up[:2], dh_MK, *inputs)
    pairs = [Quantized(*out[i : i + 2]) for i in range(0, column_outs, 2)]
    rows, columns = tuple(pairs[: row_outs // 2]), tuple(pairs[row_outs // 2 :])
    return rows, columns, None if factors_M is None else out[-1]


def _body(count, first, low, high, gate_up, scales, dh, *refs, outs):
    """One tile of rows and 128 columns; ``outs``: where kinds of outputs end (see above)."""
    row_outs, column_outs, all_outs = outs
    with_factors = all_outs > column_outs
    tile, k_tile = lax.axis_index("tile"), lax.axis_index("columns")
    k_tiles = dh.shape[1] // TILE

    @pl.when(tile < count[0])
    def _():
        factors, given = (refs[0], refs[1:]) if with_factors else (None, refs)
        by_row, by_column = given[:row_outs], given[row_outs:column_outs]
        *blocks, staged, small = given[all_outs:]
        first_row = first[tile]
        whole = pl.ds(first_row, TILE)
        layout = tile_layout(2)

        def read(part: int):
            """Gate, up and dh, the scales of the first two, and factors."""
            rows = pl.ds(first_row + part * _ROWS, _ROWS)
            halves = k_tile, k_tiles + k_tile
            of = (gate_up, halves[0]), (gate_up, halves[1]), (dh, k_tile)
            matrices = [ref.at[rows, pl.ds(tile * TILE, TILE)] for ref, tile in of]
            numbers = [scales.at[half, rows] for half in halves]
            numbers += [] if factors is None else [factors.at[rows]]
            loaded = [compat.load(ref, layout) for ref in matrices]
            return *loaded, *(compat.load(ref, layout.reduce(1)) for ref in numbers)

        ahead = read(0)
        for part in range(TILE // _ROWS):
            gate, up, dh_part, gate_scale, up_scale, *factor = ahead
            if (part + 1) * _ROWS < TILE:
                ahead = read(part + 1)
            gate, up = _dequantized(gate, gate_scale), _dequantized(up, up_scale)
            *results, sums = _gradient(gate, up, dh_part.astype(jnp.float32), *factor)
            within = pl.ds(part * _ROWS, _ROWS)
            for block, h in zip(blocks, results, strict=False):
                block[within] = h
            if with_factors:
                small[pl.ds(_SUMS + part * _ROWS, _ROWS)] = sums
        # The gradients of gate and up by row are two matrices, or the halves of one.
        columns = k_tile, k_tile + (0 if len(by_row) == 4 else k_tiles)
        rows = tuple(zip(blocks[:2], (by_row[:2], by_row[-2:]), columns, _SCALES, strict=True))
        plgpu.commit_smem()
        for block, (values, _), column, numbers in rows:
            for begin in range(0, TILE, _ROWS_AGAIN):
                q, scale = _quantized(compat.load(block.at[pl.ds(begin, _ROWS_AGAIN)], layout))
                small[pl.ds(numbers + begin, _ROWS_AGAIN)] = scale
                own_rows = pl.ds(first_row + begin, _ROWS_AGAIN)
                values[own_rows, pl.ds(column * TILE, TILE)] = q
        plgpu.commit_smem()
        # By ordinary stores: where a group begins, a row is not aligned as a copy wants it.
        for _, (_, scale), column, numbers in rows:
            scale[column, whole] = compat.load(small.at[pl.ds(numbers, TILE)], ONE_EACH)
        if with_factors:
            sums = compat.load(small.at[pl.ds(_SUMS, TILE)], ONE_EACH)
            given[column_outs][k_tile, whole] = sums
        own = low[tile] - first_row, high[tile] - first_row
        for i in range(len(by_column) // 2):
            values, scale = by_column[2 * i : 2 * i + 2]
            _transposed(blocks[i], values, scale, own, staged, small)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _dequantized(q, scale):
    """`reference.dequantize`, rounded to BF16."""
    q = q.astype(jnp.float16).astype(jnp.float32)
    q *= lax.broadcast_in_dim(scale, q.shape, (0,))
    return q.astype(jnp.bfloat16).astype(jnp.float32)


def _gradient(gate, up, dh, factor=None):
    """Of ``h = factor silu(gate) up``: those of gate and up, and h; and ``dh h / factor``, summed.

    With s the sigmoid of gate, ``silu(gate) = gate s`` and ``silu'(gate) = s + gate s (1 - s)``.
    Where the exponential overflows s is 0, and with it everything but ``1 - s``.
    """
    # A quotient would be five instructions; this is two.
    s = jnp.square(lax.rsqrt(1.0 + jnp.exp2(gate * -math.log2(math.e))))
    silu = gate * s
    product, sums = silu * up, None
    if factor is not None:
        sums = jnp.sum(dh * product, axis=1)
        factor = lax.broadcast_in_dim(factor, dh.shape, (0,))
        product, dh = product * factor, dh * factor
    dgate = dh * up * (s + silu * (1.0 - s))
    return *(h.astype(jnp.bfloat16) for h in (dgate, dh * silu, product)), sums


def _quantized(h):
    """Of rows in registers, values and scales."""
    h = h.astype(jnp.float32)
    scale = scales_of(jnp.max(jnp.abs(h), axis=1))
    return (h * lax.broadcast_in_dim(1.0 / scale, h.shape, (0,))).astype(E4M3), scale


def _transposed(block, values, scales, own, staged, small):
    """Quantize a block in shared memory by column, of its own rows, and send it off."""

    @pl.when((own[0] > 0) | (own[1] < TILE))  # few are not whole
    def _():
        layout = tile_layout(2)
        for first in range(0, TILE, _ROWS):
            within = pl.ds(first, _ROWS)
            h = compat.load(block.at[within], layout)
            row = first + plgpu.broadcasted_iota(jnp.int32, h.shape, 0, layout=layout)
            block[within] = jnp.where((row >= own[0]) & (row < own[1]), h, jnp.bfloat16(0))

    plgpu.commit_smem()
    tile, k_tile = lax.axis_index("tile"), lax.axis_index("columns")
    columns_scale = small.at[pl.ds(_COLUMNS_SCALE, _COLUMNS)]
    for first in range(0, TILE, _COLUMNS):
        h = compat.load(block.at[:, pl.ds(first, _COLUMNS)].T, plgpu.Layout.WGMMA)
        q, scale = _quantized(h)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what was staged before has left
        columns_scale[...] = scale
        staged[...] = q
        plgpu.commit_smem()
        columns = pl.ds(k_tile * TILE + first, _COLUMNS)
        plgpu.copy_smem_to_gmem(staged, values.at[columns, pl.ds(tile * TILE, TILE)])
        plgpu.copy_smem_to_gmem(columns_scale, scales.at[tile, columns])
