"""Quantization in 1x128 tiles on Hopper: one pass, from registers.

Bound by device memory: 2 bytes in and 1 out per element of a BF16 matrix. Every load is 16 bytes
per thread, neighbours next to each other: 16 threads hold a tile of BF16, 32 a tile of FP32, and
find its largest magnitude with four or five exchanges.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.hopper import compat
from pallas_kernels.reference import E4M3, TILE, Quantized, scales_of

_ROWS = 64  # of a block of threads


def quantize_tiles(
    x_MK: Float[Array, "M K"], *, power_of_two: bool = False, interpret: bool = False
) -> Quantized:
    """See `pallas_kernels.quantize.quantize_tiles`; tiles lie along the last axis.

    Raises:
        ValueError: unless M is a multiple of 64 and K of 128.
    """
    m, k = x_MK.shape
    if m % _ROWS or k % TILE:
        raise ValueError(f"M must be a multiple of {_ROWS} and K of {TILE}, not {m} and {k}")
    if 0 in (m, k):
        return Quantized(jnp.zeros((m, k), E4M3), jnp.zeros((k // TILE, m), jnp.float32))
    kernel = compat.kernel(
        functools.partial(_body, power_of_two=power_of_two),
        interpret=interpret,
        out_type=(
            jax.ShapeDtypeStruct((m, k), E4M3),
            jax.ShapeDtypeStruct((k // TILE, m), jnp.float32),
        ),
        grid=(m // _ROWS, k // TILE),
        grid_names=("rows", "tile"),
        scratch_types=[plgpu.SMEM((_ROWS,), jnp.float32)],
    )
    return Quantized(*kernel(x_MK))


def tile_layout(itemsize: int):
    """Which thread holds what of a tile's rows: warps first, then rows, then 16 bytes each."""
    columns = 16 // itemsize
    rows_of_warp = columns * 32 // TILE
    if rows_of_warp == 1:  # jax demands that the dimension of size 1 be left out
        return plgpu.Layout.TILED(
            plgpu.Tiling(((4, TILE), (columns,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
        )
    return plgpu.Layout.TILED(
        plgpu.Tiling(((4 * rows_of_warp, TILE), (rows_of_warp, columns))),
        warp_dims=(-4,),
        lane_dims=(-2, -3),
        vector_dim=-1,
    )


def _body(x, values, scale, scale_smem, *, power_of_two):
    tile = lax.axis_index("tile")
    rows = pl.ds(lax.axis_index("rows") * _ROWS, _ROWS)
    columns = pl.ds(tile * TILE, TILE)
    layout = tile_layout(x.dtype.itemsize)
    block = compat.load(x.at[rows, columns], layout).astype(jnp.float32)
    scale_M = scales_of(jnp.max(jnp.abs(block), axis=1), power_of_two=power_of_two)
    # A warp has the scales of a few rows only: gathered first, they leave as one piece.
    scale_smem[...] = scale_M
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scale_smem, scale.at[tile, rows])
    # No clipping: the scale leaves nothing beyond 448, and the conversion saturates anyway.
    scaled = block / lax.broadcast_in_dim(scale_M, block.shape, (0,))
    values[rows, columns] = scaled.astype(E4M3)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
