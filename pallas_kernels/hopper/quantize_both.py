"""Quantization along both axes on Hopper, in one pass over the input; optionally of a SwiGLU.

A block of threads takes 128 rows and 128 columns. Rows are quantized straight from registers, as in
`pallas_kernels.hopper.quantize`. On the way the block is put into shared memory in BF16, from where
`ldmatrix` reads it transposed: a thread then holds elements of one column, four threads a column,
and the quantized transpose leaves through shared memory in whole lines of 128 bytes.

Needs jax 0.11: before, Pallas finds no layout for a transposed load.

A block of a weight, 128 x 128 with one scale, is quantized once, and what is transposed is the
result. So it may also be FP32, of which no bit is lost.

Bound by device memory: a BF16 element moves 2 bytes in and 2 out, or 4 in and 2 out for a SwiGLU or
an FP32 weight.
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
from pallas_kernels.reference import E4M3, TILE, Quantized, RaggedTiles, scales_of

_ROWS = 64  # of a tile, in registers at a time
_COLUMNS = 64  # likewise, of its transpose
ONE_EACH = plgpu.Layout.WG_STRIDED((TILE,), 1)  # of the threads
# A block in shared memory, in lines of 128 bytes, 8 rows after one another.
SIXTEEN_BITS = (plgpu.TilingTransform((8, TILE // 2)), plgpu.SwizzleTransform(TILE))
EIGHT_BITS = (plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(TILE))


def quantize_both(
    x_MK: Float[Array, "M _"],
    tiles: RaggedTiles,
    *,
    swiglu: bool = False,
    factors_M: Float[Array, "M"] | None = None,
    scale_kM: Float[Array, "k M"] | None = None,
    by_row: bool = True,
    by_column: bool = True,
    power_of_two: bool = False,
    interpret: bool = False,
) -> tuple[Quantized, ...]:
    """Quantize in 1x128 tiles along the last axis, and transposed along the first, in one pass.

    Args:
        x_MK: A bfloat16 matrix, or with ``scale_kM`` values in E4M3; with ``swiglu``, ``gate`` and
            ``up`` side by side.
        tiles: Which rows the tiles along the first axis take.
        swiglu: Quantize `reference.swiglu` of the two halves.
        factors_M: Of SwiGLU's rows.
        scale_kM: Of the tiles of what is quantized along the last axis already; not with
            ``swiglu``.
        by_row: Whether to make the first result; rows of no tile are not written.
        by_column: Whether to make the second; tiles past the last are not written.
        power_of_two: Round scales up to powers of two.
        interpret: Simulate on the CPU.

    Returns:
        Those of the two that are asked for.

    Raises:
        ValueError: unless M is a multiple of 8 and at least 128, and K a multiple of 128; for a
            SwiGLU of what is quantized.
    """
    m, k = x_MK.shape
    k = k // 2 if swiglu else k
    if m % 8 or m < TILE or k % TILE:
        raise ValueError(
            f"M must be a multiple of 8, and at least {TILE}, and K of {TILE}, not {m} and {k}"
        )
    if swiglu and scale_kM is not None:
        raise ValueError("of a SwiGLU the inputs must be bfloat16")
    most = tiles.first_T.shape[0]
    shape = jax.ShapeDtypeStruct
    rows = (shape((m, k), E4M3), shape((k // TILE, m), jnp.float32))
    columns = (shape((k, most * TILE), E4M3), shape((most, k), jnp.float32))
    scratch = dict(
        factors=plgpu.SMEM((TILE,), jnp.float32),
        scales=plgpu.SMEM((TILE,), jnp.float32),
        rows_scale=plgpu.SMEM((TILE,), jnp.float32),
        columns_scale=plgpu.SMEM((TILE,), jnp.float32),
        block=plgpu.SMEM((TILE, TILE), jnp.bfloat16, transforms=SIXTEEN_BITS),
        transposed=plgpu.SMEM((TILE, TILE), E4M3, transforms=EIGHT_BITS),
    )
    given = x_MK, factors_M if factors_M is None else factors_M.astype(jnp.float32), scale_kM
    has = tuple(x is not None for x in given)
    inputs = tuple(x for x in given if x is not None)
    kernel = compat.kernel(
        functools.partial(
            _body,
            has=has,
            swiglu=swiglu,
            by_row=by_row,
            by_column=by_column,
            power_of_two=power_of_two,
            names=tuple(scratch),
        ),
        interpret=interpret,
        out_type=(rows if by_row else ()) + (columns if by_column else ()),
        grid=(most, k // TILE),
        grid_names=("tile", "columns"),
        scratch_types=list(scratch.values()),
    )
    out = kernel(tiles.count, tiles.first_T, tiles.low_T, tiles.high_T, *inputs)
    return tuple(Quantized(*out[i : i + 2]) for i in range(0, len(out), 2))


def _body(count, first, low, high, *refs, has, swiglu, by_row, by_column, power_of_two, names):
    tile, k_tile = lax.axis_index("tile"), lax.axis_index("columns")

    @pl.when(tile < count[0])
    def _():
        given, rest = iter(refs[: sum(has)]), refs[sum(has) :]
        inputs: Any = [next(given) if there else None for there in has]
        x, factors, scales = inputs
        outs, scratch = rest[: -len(names)], dict(zip(names, rest[-len(names) :], strict=True))
        first_row = first[tile]
        own = low[tile] - first_row, high[tile] - first_row
        columns = pl.ds(k_tile * TILE, TILE)
        whole = pl.ds(first_row, TILE)
        # Once for all threads: read as the rows are spread, every thread would read them.
        if factors is not None:
            scratch["factors"][...] = compat.load(factors.at[whole], ONE_EACH)
        if scales is not None:
            scratch["scales"][...] = compat.load(scales.at[k_tile, whole], ONE_EACH)
        if factors is not None or scales is not None:
            plgpu.commit_smem()
        some = _ROWS // 2 if swiglu else _ROWS  # two inputs take twice the registers
        layout = tile_layout(2)

        def of_rows(name: str, begin: int) -> jax.Array:
            return compat.load(scratch[name].at[pl.ds(begin, some)], layout.reduce(1))

        def bf16(h, begin: int):
            """What E4M3 and its tile's scale stand for (`reference.dequantize`)."""
            if scales is None:
                return h
            h = h.astype(jnp.float16).astype(jnp.float32)
            scale = lax.broadcast_in_dim(of_rows("scales", begin), h.shape, (0,))
            return (h * scale).astype(jnp.bfloat16)

        for part in range(TILE // some):
            within = pl.ds(part * some, some)
            rows = pl.ds(first_row + part * some, some)
            h = bf16(compat.load(x.at[rows, columns], layout), part * some)
            if swiglu:
                right = pl.ds(x.shape[1] // 2 + k_tile * TILE, TILE)
                up = compat.load(x.at[rows, right], layout)
                h = _swiglu(h, up, None if factors is None else of_rows("factors", part * some))
            if by_column:
                row = plgpu.broadcasted_iota(jnp.int32, h.shape, 0, layout=layout) + part * some
                inside = (row >= own[0]) & (row < own[1])
                scratch["block"][within] = jnp.where(inside, h, jnp.bfloat16(0))
            if by_row:
                h = h.astype(jnp.float32)
                scale = scales_of(jnp.max(jnp.abs(h), axis=1), power_of_two=power_of_two)
                scratch["rows_scale"][within] = scale
                q = h * lax.broadcast_in_dim(1.0 / scale, h.shape, (0,))
                outs[0][rows, columns] = q.astype(E4M3)
        if by_row:
            # By ordinary stores: where a group begins, a row is not aligned as a copy wants it.
            outs[1][k_tile, whole] = compat.load(scratch["rows_scale"], ONE_EACH)
        if by_column:
            values, scales = outs[-2:]
            plgpu.commit_smem()
            for part in range(TILE // _COLUMNS):
                own_columns = pl.ds(part * _COLUMNS, _COLUMNS)
                block = scratch["block"].at[:, own_columns].T
                h = compat.load(block, plgpu.Layout.WGMMA)
                h = h.astype(jnp.float32)
                scale = scales_of(jnp.max(jnp.abs(h), axis=1), power_of_two=power_of_two)
                scratch["columns_scale"][own_columns] = scale
                q = h * lax.broadcast_in_dim(1.0 / scale, h.shape, (0,))
                scratch["transposed"][own_columns] = q.astype(E4M3)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                scratch["transposed"], values.at[columns, pl.ds(tile * TILE, TILE)]
            )
            plgpu.copy_smem_to_gmem(scratch["columns_scale"], scales.at[tile, columns])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _swiglu(gate, up, factors):
    """As `reference.swiglu`, with a power of two and a reciprocal for exp and the quotient."""
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    exp = jnp.exp2(gate * -math.log2(math.e))
    out = gate * (1.0 / (1.0 + exp)) * up
    if factors is not None:
        out *= lax.broadcast_in_dim(factors, out.shape, (0,))
    return out.astype(jnp.bfloat16)


def quantize_blocks_both(
    w: tuple[Float[Array, "G R _"], ...], *, power_of_two: bool = False, interpret: bool = False
) -> tuple[Quantized, Quantized]:
    """Quantize a matrix per group in 128x128 blocks, as it is and transposed, in one pass.

    Args:
        w: Bfloat16 or float32 matrices; several are quantized as if they stood side by side.
        power_of_two: Round scales up to powers of two.
        interpret: Simulate on the CPU.

    Raises:
        ValueError: unless R and K are multiples of 128.
    """
    groups, r, _ = w[0].shape
    widths = [part.shape[2] for part in w]
    k = sum(widths)
    if r % TILE or any(width % TILE for width in widths):
        raise ValueError(f"sides must be multiples of {TILE}, not {r} and {widths}")
    shape = jax.ShapeDtypeStruct
    kernel = compat.kernel(
        functools.partial(_blocks_body, widths=widths, power_of_two=power_of_two),
        interpret=interpret,
        out_type=(
            shape((groups, r, k), E4M3),
            shape((groups, k, r), E4M3),
            shape((groups, r // TILE, k // TILE), jnp.float32),
        ),
        grid=(groups, r // TILE, k // TILE),
        grid_names=("group", "rows", "columns"),
        scratch_types=[
            plgpu.SMEM((TILE, TILE), jnp.float16, transforms=SIXTEEN_BITS),
            plgpu.SMEM((TILE, TILE), E4M3, transforms=EIGHT_BITS),
            plgpu.SMEM((TILE,), jnp.float32),
        ],
    )
    values, transposed, scale = kernel(*w)
    return Quantized(values, scale), Quantized(transposed, scale.swapaxes(1, 2))


def _blocks_body(*refs, widths, power_of_two):
    """One block: of the matrix that its column of blocks belongs to."""
    inputs, outputs = refs[: len(widths)], refs[len(widths) :]
    column, first = lax.axis_index("columns"), 0
    for w, width in zip(inputs, widths, strict=True):
        blocks = width // TILE
        pl.when((column >= first) & (column < first + blocks))(
            functools.partial(_one_block, w, column - first, *outputs, power_of_two=power_of_two)
        )
        first += blocks


def _one_block(w, own, values, transposed, scales, block, staged, maxima, *, power_of_two):
    group = lax.axis_index("group")
    r_tile, k_tile = lax.axis_index("rows"), lax.axis_index("columns")
    columns = pl.ds(k_tile * TILE, TILE)
    halves = [pl.ds(first, _ROWS) for first in range(0, TILE, _ROWS)]
    # All at once, before the first is waited for; what is loaded stays in registers.
    layout = tile_layout(w.dtype.itemsize)
    loaded = [
        compat.load(
            w.at[group, pl.ds(r_tile * TILE + half.start, _ROWS), pl.ds(own * TILE, TILE)], layout
        )
        for half in halves
    ]
    for half, h in zip(halves, loaded, strict=True):
        maxima[half] = jnp.max(jnp.abs(h.astype(jnp.float32)), axis=1)
    plgpu.commit_smem()
    # The scale of the largest is the largest scale; a scale by itself cannot be rounded (bitcast).
    scale = jnp.max(scales_of(compat.load(maxima, ONE_EACH), power_of_two=power_of_two))
    inverse = 1.0 / scale  # what XLA makes of a division by one number, too
    scales[group, r_tile, k_tile] = scale
    for half, h in zip(halves, loaded, strict=True):
        q = (h.astype(jnp.float32) * inverse).astype(E4M3)
        values[group, pl.ds(r_tile * TILE + half.start, _ROWS), columns] = q
        # Every number of E4M3 is one of FP16, and 16 bits are what can be transposed.
        block[half] = q.astype(jnp.float16)
    plgpu.commit_smem()
    for part in range(TILE // _COLUMNS):
        own_columns = pl.ds(part * _COLUMNS, _COLUMNS)
        q = compat.load(block.at[:, own_columns].T, plgpu.Layout.WGMMA)
        staged[own_columns] = q.astype(E4M3)
    plgpu.commit_smem()
    rows = pl.ds(r_tile * TILE, TILE)
    plgpu.copy_smem_to_gmem(staged, transposed.at[group, columns, rows])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
