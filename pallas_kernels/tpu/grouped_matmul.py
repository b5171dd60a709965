"""Grouped block-scaled FP8 matmul on TPU: ragged rows, and weight gradients ragged along K.

Which rows and which matrix a step of the grid takes is read from arrays that are known before the
step (scalar prefetch), so that the pipeline loads the right blocks ahead. As in
`pallas_kernels.tpu.matmul`, chips without FP8 arithmetic multiply in BF16, which is exact.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.reference import TILE, Quantized, RaggedTiles
from pallas_kernels.tpu.matmul import takes_fp8

_ROWS = 256  # of a block: short, because a group ends inside one
_COLUMNS = 512
_TILES = 8  # tiles of K per step: the rows of one FP32 register, so that scales fill it
_SIDE = 512  # of a block of a weight gradient


def fp8_grouped_matmul(
    a: Quantized,
    b: Quantized,
    group_sizes: Int[Array, "G"],
    *,
    out_dtype=jnp.bfloat16,
    native_fp8: bool | None = None,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """See `pallas_kernels.grouped_matmul.fp8_grouped_matmul`; N and K are multiples of 128.

    The blocks of rows are fixed, and one that several groups share is visited once for each of
    them; a visit keeps what it does not own. Blocks of padding alone are visited once, for zeros.
    """
    (m, k), (groups, n, _) = a.values.shape, b.values.shape
    if k % TILE or n % TILE:
        raise ValueError(f"N and K must be multiples of {TILE}, not {n} and {k}")
    native_fp8 = takes_fp8(native_fp8, interpret)
    # Whole tiles of 128 even of the few rows of decoding: scales lie along them.
    rows, columns = min(_ROWS, pl.cdiv(m, TILE) * TILE), min(_COLUMNS, n)
    visits = row_visits(group_sizes, m, rows)
    tiles = k // TILE
    k_steps = pl.cdiv(tiles, _TILES)
    # A scale per column of b, 3% of its bytes, for one form of kernel.
    b_scale = jnp.repeat(b.scale.swapaxes(1, 2), TILE, axis=2)

    def matrix_and_step(visit, s, group):
        """Those of a visit of no group stay where they are, so that nothing is loaded for it."""
        real = group[visit] < groups
        return lax.select(real, group[visit], groups - 1), lax.select(real, s, k_steps - 1)

    def a_block(j, visit, s, block, group, low, high):
        return block[visit], matrix_and_step(visit, s, group)[1]

    def a_scale_block(j, visit, s, block, group, low, high):
        return matrix_and_step(visit, s, group)[1], block[visit]

    def b_block(j, visit, s, block, group, low, high):
        matrix, s = matrix_and_step(visit, s, group)
        return matrix, j, s

    def b_scale_block(j, visit, s, block, group, low, high):
        return *matrix_and_step(visit, s, group), j

    def out_block(j, visit, s, block, group, low, high):
        return block[visit], j

    return pl.pallas_call(
        functools.partial(
            _rows_kernel, groups=groups, rows=rows, tiles=tiles, native_fp8=native_fp8
        ),
        out_shape=jax.ShapeDtypeStruct((m, n), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(n, columns), len(visits[0]), k_steps),
            in_specs=[
                pl.BlockSpec((rows, _TILES * TILE), a_block),
                pl.BlockSpec((None, columns, _TILES * TILE), b_block),
                pl.BlockSpec((_TILES, rows), a_scale_block),
                pl.BlockSpec((None, _TILES, columns), b_scale_block),
            ],
            out_specs=pl.BlockSpec((rows, columns), out_block),
            scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        interpret=interpret,
        name="fp8_grouped_matmul",
    )(*visits, a.values, b.values, a.scale, b_scale)


def row_visits(
    group_sizes: Int[Array, "G"], m: int, rows: int
) -> tuple[Int[Array, "V"], Int[Array, "V"], Int[Array, "V"], Int[Array, "V"]]:
    """The visits of blocks of rows: block, group (G: none), and the range of rows that it owns.

    They are in the order of the rows. Visits beyond those that are needed own nothing, and stay at
    the last block.
    """
    sizes = group_sizes.astype(jnp.int32)
    sizes = jnp.append(sizes, m - jnp.sum(sizes))
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    first, last = starts // rows, jnp.maximum(ends - 1, 0) // rows
    visits = jnp.where(sizes > 0, last - first + 1, 0)
    visit_ends = jnp.cumsum(visits)
    index = jnp.arange(pl.cdiv(m, rows) + len(sizes) - 1, dtype=jnp.int32)
    group = jnp.sum(index[:, None] >= visit_ends, axis=1, dtype=jnp.int32)
    used, group = group < len(sizes), jnp.minimum(group, len(sizes) - 1)
    block = first[group] + index - (visit_ends - visits)[group]
    block = jnp.where(used, block, pl.cdiv(m, rows) - 1)
    low = jnp.where(used, jnp.maximum(starts[group], block * rows), m)
    high = jnp.where(used, jnp.minimum(ends[group], (block + 1) * rows), m)
    return block, jnp.where(used, group, len(sizes) - 1), low, high


def _partial(a, b, native_fp8):
    """The sum over one tile of K."""
    if not native_fp8:
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _rows_kernel(
    block, group, low, high, a, b, a_scale, b_scale, out, total, *, groups, rows, tiles, native_fp8
):
    visit, step = pl.program_id(1), pl.program_id(2)

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    # Padding, and visits that own nothing, are not multiplied.
    @pl.when((group[visit] < groups) & (low[visit] < high[visit]))
    def _():
        # A scale per row is wanted down the sublanes, and comes along the lanes.
        scale_a, scale_b = a_scale[...].T, b_scale[...]

        def promote(tile):
            ks = slice(tile * TILE, (tile + 1) * TILE)
            scale = scale_a[:, tile : tile + 1] * scale_b[tile : tile + 1]
            total[...] += _partial(a[:, ks], b[:, ks], native_fp8) * scale

        for tile in range(_TILES):
            if tiles % _TILES == 0:
                promote(tile)
            else:
                pl.when(step * _TILES + tile < tiles)(functools.partial(promote, tile))

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        row = block[visit] * rows + lax.broadcasted_iota(jnp.int32, total.shape, 0)
        own = (row >= low[visit]) & (row < high[visit])
        # A select of FP32 numbers: the layouts of masks and of narrow numbers do not agree.
        kept = out[...].astype(jnp.float32)
        out[...] = jnp.where(own, total[...], kept).astype(out.dtype)


def fp8_grouped_wgrad(
    a: Quantized,
    b: Quantized,
    tiles: RaggedTiles,
    *,
    out_dtype=jnp.float32,
    native_fp8: bool | None = None,
    interpret: bool = False,
) -> Float[Array, "G M N"]:
    """See `pallas_kernels.grouped_matmul.fp8_grouped_wgrad`; M and N are multiples of 128.

    One tile of K per step, added to the block of its group's gradient, which leaves the chip when
    the next group's turn comes.
    """
    (m, _), n = a.values.shape, b.values.shape[0]
    if m % TILE or n % TILE:
        raise ValueError(f"M and N must be multiples of {TILE}, not {m} and {n}")
    native_fp8 = takes_fp8(native_fp8, interpret)
    groups, most = len(tiles.tiles_G), len(tiles.first_T)
    if most == 0:
        return jnp.zeros((groups, m, n), out_dtype)
    index_T = jnp.arange(most, dtype=jnp.int32)
    ends_G = tiles.offset_G + tiles.tiles_G
    group_T = jnp.sum(index_T[:, None] >= ends_G, axis=1, dtype=jnp.int32)
    # Steps past the last tile stay where they are: at it, and at its group.
    last = jnp.maximum(tiles.count[0] - 1, 0)
    group_T = group_T[jnp.minimum(index_T, last)]
    group_T = jnp.minimum(group_T, groups - 1)
    rows, columns = min(_SIDE, m), min(_SIDE, n)

    def at(s, last):
        return lax.min(s, last[0])

    def a_block(i, j, s, last, count, group):
        return i, at(s, last)

    def b_block(i, j, s, last, count, group):
        return j, at(s, last)

    def a_scale_block(i, j, s, last, count, group):
        return at(s, last), 0, i

    def b_scale_block(i, j, s, last, count, group):
        return at(s, last), 0, j

    def out_block(i, j, s, last, count, group):
        return group[s], i, j

    out = pl.pallas_call(
        functools.partial(_tiles_kernel, native_fp8=native_fp8),
        out_shape=jax.ShapeDtypeStruct((groups, m, n), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(pl.cdiv(m, rows), pl.cdiv(n, columns), most),
            in_specs=[
                pl.BlockSpec((rows, TILE), a_block),
                pl.BlockSpec((columns, TILE), b_block),
                pl.BlockSpec((None, 1, rows), a_scale_block),
                pl.BlockSpec((None, 1, columns), b_scale_block),
            ],
            out_specs=pl.BlockSpec((None, rows, columns), out_block),
            scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="fp8_grouped_wgrad",
    )(last[None], tiles.count, group_T, a.values, b.values, a.scale[:, None], b.scale[:, None])
    # Groups without tiles were not visited.
    return jnp.where((tiles.tiles_G > 0)[:, None, None], out, 0)


def _tiles_kernel(last, count, group, a, b, a_scale, b_scale, out, total, *, native_fp8):
    del last
    step = pl.program_id(2)
    before, after = group[lax.max(step - 1, 0)], group[lax.min(step + 1, pl.num_programs(2) - 1)]

    @pl.when((step == 0) | (before != group[step]))
    def _():
        total[...] = jnp.zeros_like(total)

    @pl.when(step < count[0])
    def _():
        scale = a_scale[...].T * b_scale[...]
        total[...] += _partial(a[...], b[...], native_fp8) * scale

    @pl.when((step == pl.num_programs(2) - 1) | (after != group[step]))
    def _():
        out[...] = total[...].astype(out.dtype)
