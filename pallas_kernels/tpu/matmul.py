"""Block-scaled FP8 matmul on TPU: a pipelined Pallas kernel around the matrix unit.

Chips without FP8 arithmetic multiply in BF16, which holds every E4M3 number exactly; what they
gain from FP8 is memory and bandwidth. Sums and promotion are FP32 on all of them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels import backend
from pallas_kernels.reference import TILE, Quantized, check_product, has_block_scales

# Tiles of K per step of the grid: the rows of one FP32 register, so that scales fill it.
_TILES = 8
_BLOCK_M, _BLOCK_N = 512, 512


def takes_fp8(native_fp8: bool | None, interpret: bool) -> bool:
    """What was asked for, else whether the chip that is compiled for multiplies in FP8."""
    if native_fp8 is None:
        return not interpret and "7" in backend.device_kind()
    return native_fp8


def fp8_matmul(
    a: Quantized,
    b: Quantized,
    *,
    out_dtype=jnp.bfloat16,
    native_fp8: bool | None = None,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """See `pallas_kernels.matmul.fp8_matmul`.

    Args:
        a: Left operand with 1x128 tile scales.
        b: Right operand, transposed, with block or tile scales.
        out_dtype: bfloat16 or float32.
        native_fp8: Whether the matrix unit takes E4M3; by default, whether the device's does.
        interpret: Run on the CPU.
    """
    (m, k), n = a.values.shape, b.values.shape[0]
    check_product(a, b)
    tiles = pl.cdiv(k, TILE)
    b_scale = b.scale
    if has_block_scales(b):
        # 3% of the bytes of b, for one form of kernel instead of two.
        b_scale = jnp.repeat(b_scale.T, TILE, axis=1)[:, :n]
    if 0 in (m, n, k):
        return jnp.zeros((m, n), out_dtype)
    native_fp8 = takes_fp8(native_fp8, interpret)

    # Past the end of an array a block holds anything at all. In rows of a and b that only reaches
    # results that are dropped; along K it would reach all of them, so K ends on a whole tile and
    # the kernel skips the tiles that do not exist.
    pad = [(0, 0), (0, tiles * TILE - k)]
    a_values, b_values = jnp.pad(a.values, pad), jnp.pad(b.values, pad)
    block_m = min(_BLOCK_M, pl.cdiv(m, TILE) * TILE)
    block_n = min(_BLOCK_N, pl.cdiv(n, TILE) * TILE)
    grid = (pl.cdiv(m, block_m), pl.cdiv(n, block_n), pl.cdiv(tiles, _TILES))
    return pl.pallas_call(
        functools.partial(_kernel, tiles=tiles, native_fp8=native_fp8),
        out_shape=jax.ShapeDtypeStruct((m, n), out_dtype),
        grid=grid,
        in_specs=[
            pl.BlockSpec((block_m, _TILES * TILE), lambda i, _, s: (i, s)),
            pl.BlockSpec((block_n, _TILES * TILE), lambda _, j, s: (j, s)),
            pl.BlockSpec((_TILES, block_m), lambda i, _, s: (s, i)),
            pl.BlockSpec((_TILES, block_n), lambda _, j, s: (s, j)),
        ],
        out_specs=pl.BlockSpec((block_m, block_n), lambda i, j, _: (i, j)),
        scratch_shapes=[pltpu.VMEM((block_m, block_n), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="fp8_matmul",
    )(a_values, b_values, a.scale, b_scale)


def _kernel(a_ref, b_ref, a_scale_ref, b_scale_ref, out_ref, total_ref, *, tiles, native_fp8):
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)

    # A scale per row is wanted down the sublanes, and comes along the lanes.
    a_scale = a_scale_ref[...].T
    b_scale = b_scale_ref[...]

    def promote(tile):
        ks = slice(tile * TILE, (tile + 1) * TILE)
        a, b = a_ref[:, ks], b_ref[:, ks]
        if not native_fp8:
            a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
        partial = lax.dot_general(
            a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        total_ref[...] += partial * a_scale[:, tile : tile + 1] * b_scale[tile : tile + 1]

    for tile in range(_TILES):
        if tiles % _TILES == 0:
            promote(tile)
        else:
            pl.when(step * _TILES + tile < tiles)(functools.partial(promote, tile))

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = total_ref[...].astype(out_ref.dtype)
