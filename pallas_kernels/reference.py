"""What "correct" means: every operation of the package in plain ``jax.numpy``.

The fast kernels are tested against these functions and nothing else. They run on any backend,
under ``jit``, and are differentiable where that makes sense; they are not fast.

Axis letters: M rows, N columns of the product, K the contracted axis, G groups; a small letter
counts the 128-wide tiles of an axis (``scale_kM`` has one row per 128 of K).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import backend

TILE = 128
"""Elements that share one scale along a contracted axis (V3 section 3.3.2)."""

E4M3 = jnp.float8_e4m3fn
E4M3_MAX = 448.0
_SMALLEST_NORMAL = 2.0**-126


class Quantized(NamedTuple):
    """An E4M3 matrix and its FP32 scales; ``values * scale`` is the matrix it stands for.

    ``values`` always has the axis to be contracted last, because FP8 tensor cores cannot
    transpose. ``scale`` is one of

    * tiles, ``(ceil(K / 128), R)``: one scale per row and 128 of K. The K tiles come first so that
      the scales that a block of rows needs at one step of K lie next to each other in memory;
    * blocks, ``(ceil(R / 128), ceil(K / 128))``: one scale per 128x128 block;

    with an extra leading axis on both where a matrix per group is meant.

    With ``layer``, both have one more axis before all others, and what is meant is the entry of
    that number: the weight of one layer, where it lies in the stack of all of them. A loop over
    layers would otherwise cut it out, which is a copy where a kernel wants it.
    """

    values: Float[Array, "*G R K"]
    scale: Float[Array, "..."]
    layer: Int[Array, ""] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return self.values.shape[0 if self.layer is None else 1 :]

    def cut_out(self) -> "Quantized":
        """The same by itself, without the rest of its stack."""
        if self.layer is None:
            return self
        values, scale = (
            jax.lax.dynamic_index_in_dim(x, self.layer, keepdims=False) for x in self[:2]
        )
        return Quantized(values, scale)


class RaggedTiles(NamedTuple):
    """Tiles of 128 rows, none with rows of two groups, in the order of the groups.

    Each group's first tile starts at its first row and its last tile may be shorter, so that a
    group's scales never depend on another's rows. The tiles come as arrays because group sizes are
    known on the device only; there are ``count`` of them, the entries past that are not used.

    Attributes:
        count: Number of tiles, ``[1]``.
        first_T: The row that stands first in each tile. It lies before the tile's own rows where
            128 rows would run past the end of the matrix.
        low_T: The first row that is the tile's own. The rest of the tile's rows count as zeros.
        high_T: The row after the last of its own.
        offset_G: The first tile of each group.
        tiles_G: Tiles of each group.
    """

    count: Int[Array, "1"]
    first_T: Int[Array, "T"]
    low_T: Int[Array, "T"]
    high_T: Int[Array, "T"]
    offset_G: Int[Array, "G"]
    tiles_G: Int[Array, "G"]


def ragged_tiles(group_sizes: Int[Array, "G"], m: int) -> RaggedTiles:
    """Cut the groups of m rows into tiles; with one group of all rows, every 128 rows are one."""
    sizes_G = group_sizes.astype(jnp.int32)
    ends_G = jnp.cumsum(sizes_G)
    tiles_G = (sizes_G + TILE - 1) // TILE
    tile_ends_G = jnp.cumsum(tiles_G)
    most = (m + (TILE - 1) * len(sizes_G)) // TILE  # sum of ceil(size / 128), at the worst
    index_T = jnp.arange(most, dtype=jnp.int32)
    group_T = jnp.sum(index_T[:, None] >= tile_ends_G, axis=1, dtype=jnp.int32)
    group_T = jnp.minimum(group_T, len(sizes_G) - 1)
    offset_G = tile_ends_G - tiles_G
    low_T = (ends_G - sizes_G)[group_T] + (index_T - offset_G[group_T]) * TILE
    high_T = jnp.minimum(low_T + TILE, ends_G[group_T])
    first_T = jnp.clip(low_T, 0, max(m - TILE, 0))
    return RaggedTiles(tile_ends_G[-1:], first_T, low_T, high_T, offset_G, tiles_G)


def scales_of(amax: Float[Array, "..."], *, power_of_two: bool = False) -> Float[Array, "..."]:
    """FP32 scales that map ``amax`` to the largest E4M3 number.

    Never below the smallest normal FP32 number, so a tile of zeros has a finite scale and no
    division yields a denormal. A tile with an infinity or a NaN gets a scale that is not finite,
    and so is NaN as a whole once it is dequantized: overflow must reach the loss, not hide.

    Args:
        amax: Largest magnitude of each tile.
        power_of_two: Round the scale up to a power of two (representable as UE8M0).
    """
    scale = jnp.maximum(amax.astype(jnp.float32) / E4M3_MAX, _SMALLEST_NORMAL)
    if not power_of_two:
        return scale
    # Adding all mantissa bits carries into the exponent unless the mantissa was already zero.
    bits = jax.lax.bitcast_convert_type(scale, jnp.uint32)
    bits = (bits + jnp.uint32(0x007FFFFF)) & jnp.uint32(0x7F800000)
    # A comparison, not isfinite: kernels use this function too, and have no isfinite.
    return jnp.where(scale < jnp.inf, jax.lax.bitcast_convert_type(bits, jnp.float32), scale)


def to_e4m3(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Round to E4M3 (nearest, ties to even), saturating finite values at +-448; NaN stays NaN."""
    return jnp.clip(x, -E4M3_MAX, E4M3_MAX).astype(E4M3)


def quantize_tiles(
    x: Float[Array, "A B"], *, axis: int = -1, power_of_two: bool = False
) -> Quantized:
    """Quantize in 1x128 tiles along ``axis``, the axis to be contracted (V3 section 3.3.2).

    With ``axis=0`` the result is the quantized transpose: what weight gradients contract is the
    rows, and the tensor cores need that axis last. The last tile may be shorter than 128.
    """
    x_RK = x.T if axis % 2 == 0 else x
    rows, k = x_RK.shape
    tiles = -(-k // TILE)
    padded = jnp.pad(x_RK.astype(jnp.float32), ((0, 0), (0, tiles * TILE - k)))
    x_RkT = padded.reshape(rows, tiles, TILE)
    scale_Rk = scales_of(jnp.max(jnp.abs(x_RkT), axis=2), power_of_two=power_of_two)
    values = to_e4m3(x_RkT / scale_Rk[:, :, None]).reshape(rows, tiles * TILE)[:, :k]
    return Quantized(values, scale_Rk.T)


def quantize_tiles_ragged(
    x_MK: Float[Array, "M K"], tiles: RaggedTiles, *, power_of_two: bool = False
) -> Quantized:
    """The quantized transpose, in 1x128 tiles along the rows, none of which straddles two groups.

    Tile t fills the columns ``[128 t, 128 t + 128)`` of ``values``, so every group starts at a
    whole tile there; rows that are not the tile's own are zeros. What tiles past ``tiles.count``
    hold is not defined.
    """
    row_TI = tiles.first_T[:, None] + jnp.arange(TILE)
    own_TI = (row_TI >= tiles.low_T[:, None]) & (row_TI < tiles.high_T[:, None])
    if not len(x_MK):  # from which nothing can be taken; no tile owns a row
        x_MK = jnp.zeros((1, x_MK.shape[1]), x_MK.dtype)
    x_XK = jnp.take(x_MK, row_TI.reshape(-1), axis=0, mode="clip")
    x_XK = jnp.where(own_TI.reshape(-1, 1), x_XK, 0)
    return quantize_tiles(x_XK, axis=0, power_of_two=power_of_two)


def swiglu(
    gate_up_MF: Float[Array, "M F"], factors_M: Float[Array, "M"] | None = None
) -> Float[Array, "M F//2"]:
    """``silu(gate) * up`` (Shazeer, 2020), times a factor per row, in FP32 and rounded once.

    ``gate`` and ``up`` are the left and the right half.
    """
    gate, up = jnp.split(gate_up_MF.astype(jnp.float32), 2, axis=1)
    # Where the exponential overflows, silu is 0, and so must its derivative be (autodiff's is NaN).
    overflows = gate < -88.0
    exp = jnp.exp(-jnp.where(overflows, 0.0, gate))
    out = jnp.where(overflows, 0.0, gate / (1.0 + exp)) * up
    if factors_M is not None:
        out *= factors_M.astype(jnp.float32)[:, None]
    return out.astype(gate_up_MF.dtype)


def swiglu_gradient(
    gate_up_MF: Float[Array, "M F"],
    dh_MK: Float[Array, "M K"],
    factors_M: Float[Array, "M"] | None = None,
) -> tuple[Float[Array, "M F"], Float[Array, "M"] | None]:
    """The gradient of `swiglu`, by its inputs and by the factors, where there are any."""
    if factors_M is None:
        return *jax.vjp(swiglu, gate_up_MF)[1](dh_MK), None
    return jax.vjp(swiglu, gate_up_MF, factors_M)[1](dh_MK)


def quantize_blocks(w_RK: Float[Array, "*G R K"], *, power_of_two: bool = False) -> Quantized:
    """Quantize in 128x128 blocks (V3 section 3.3.2); blocks at the edges may be smaller."""
    *lead, rows, k = w_RK.shape
    r_blocks, k_blocks = -(-rows // TILE), -(-k // TILE)
    pad = [(0, 0)] * len(lead) + [(0, r_blocks * TILE - rows), (0, k_blocks * TILE - k)]
    blocks = jnp.pad(w_RK.astype(jnp.float32), pad)
    blocks = blocks.reshape(*lead, r_blocks, TILE, k_blocks, TILE)
    scale = scales_of(jnp.max(jnp.abs(blocks), axis=(-3, -1)), power_of_two=power_of_two)
    values = to_e4m3(blocks / scale[..., :, None, :, None])
    values = values.reshape(*lead, r_blocks * TILE, k_blocks * TILE)[..., :rows, :k]
    return Quantized(values, scale)


def has_block_scales(q: Quantized) -> bool:
    """Whether the scales are 128x128 blocks; raises ValueError if they fit neither form."""
    *lead, rows, k = q.values.shape
    k_tiles = -(-k // TILE)
    if q.scale.shape == (*lead, -(-rows // TILE), k_tiles):
        return True
    if q.scale.shape == (*lead, k_tiles, rows):
        return False
    raise ValueError(
        f"scales of shape {q.scale.shape} are neither 1x128 tiles nor 128x128 blocks "
        f"of a matrix of shape {q.values.shape}"
    )


def has_tile_scales(q: Quantized) -> bool:
    """Whether the scales may be 1x128 tiles; of a single tile they may be a block, too."""
    *lead, rows, k = q.values.shape
    return q.scale.shape == (*lead, -(-k // TILE), rows)


def check_product(a: Quantized, b: Quantized) -> None:
    """Refuse operands of a product of which the left one has not tiles, or that do not fit.

    Raises:
        ValueError: naming what is wrong.
    """
    if a.values.shape[-1] != b.shape[-1]:
        raise ValueError(f"contracted sizes differ: {a.values.shape[-1]} and {b.shape[-1]}")
    if not has_tile_scales(a):
        raise ValueError("the left operand needs 1x128 tile scales")


def _tile_scales(q: Quantized) -> Float[Array, "*G k R"]:
    """Scales as 1x128 tiles, whichever form they have."""
    if not has_block_scales(q):
        return q.scale
    return jnp.repeat(q.scale.swapaxes(-1, -2), TILE, axis=-1)[..., : q.values.shape[-2]]


def dequantize(q: Quantized) -> Float[Array, "*G R K"]:
    """The FP32 matrix, or one per group, that a quantized one stands for."""
    q = q.cut_out()
    scale_RK = _tile_scales(q).swapaxes(-1, -2)
    scale_RK = jnp.repeat(scale_RK, TILE, axis=-1)[..., : q.values.shape[-1]]
    return q.values.astype(jnp.float32) * scale_RK


def fp8_matmul(a: Quantized, b: Quantized, *, out_dtype=jnp.bfloat16) -> Float[Array, "M N"]:
    """``dequantize(a) @ dequantize(b).T`` as DeepSeek-V3 computes it (V3 figure 7b).

    For every 128 of K the E4M3 products are summed by themselves, multiplied by both scales and
    added to an FP32 accumulator. (Products of E4M3 numbers are exact in FP32, so the only roundings
    are those of the sums.)
    """
    b = b.cut_out()
    (m, k), (n, k_b) = a.values.shape, b.values.shape
    if k != k_b:
        raise ValueError(f"contracted sizes differ: {k} and {k_b}")
    tiles = -(-k // TILE)

    def by_tile(q):
        padded = jnp.pad(q.values.astype(jnp.float32), ((0, 0), (0, tiles * TILE - k)))
        return padded.reshape(len(q.values), tiles, TILE).transpose(1, 0, 2)

    def promote(total_MN, block):
        a_MT, scale_M, b_NT, scale_N = block
        partial_MN = jax.lax.dot_general(a_MT, b_NT, (((1,), (1,)), ((), ())), precision="highest")
        return total_MN + partial_MN * (scale_M[:, None] * scale_N[None, :]), None

    blocks = (by_tile(a), _tile_scales(a), by_tile(b), _tile_scales(b))
    zeros_MN, *_ = backend.varying_alike(jnp.zeros((m, n), jnp.float32), *blocks)
    total_MN, _ = jax.lax.scan(promote, zeros_MN, blocks)
    return total_MN.astype(out_dtype)


def grouped_matmul(
    x_MK: Float[Array, "M K"],
    w_GKN: Float[Array, "G K N"],
    group_sizes: Int[Array, "G"],
    *,
    out_dtype=jnp.bfloat16,
) -> Float[Array, "M N"]:
    """Rows of ``x`` in G consecutive groups, each times its group's matrix.

    Group g has the next ``group_sizes[g]`` rows. Rows past the last group are padding: they come
    out as zeros, and what they hold affects neither results nor gradients.
    """
    own_GM1 = _own_rows(group_sizes, x_MK.shape[0])[:, :, None]
    # Masked before the product as well: else a gradient would multiply zeros by what others hold.
    x_GMK = jnp.where(own_GM1, x_MK.astype(jnp.float32), 0.0)
    out_GMN = jnp.einsum("GMK,GKN->GMN", x_GMK, w_GKN.astype(jnp.float32), precision="highest")
    return jnp.sum(jnp.where(own_GM1, out_GMN, 0.0), axis=0).astype(out_dtype)


def fp8_grouped_matmul(
    a: Quantized, b: Quantized, group_sizes: Int[Array, "G"], *, out_dtype=jnp.bfloat16
) -> Float[Array, "M N"]:
    """The grouped form of `fp8_matmul`: ``b`` holds a matrix and block scales per group.

    Rows past the last group are padding and come out as zeros.
    """
    b = b.cut_out()
    out_GMN = jax.vmap(
        lambda values, scale: fp8_matmul(a, Quantized(values, scale), out_dtype=jnp.float32)
    )(b.values, b.scale)
    own_GM1 = _own_rows(group_sizes, a.values.shape[0])[:, :, None]
    # where, not a product: another group's overflow must not turn a zero into NaN.
    return jnp.sum(jnp.where(own_GM1, out_GMN, 0.0), axis=0).astype(out_dtype)


def fp8_grouped_wgrad(
    a: Quantized, b: Quantized, tiles: RaggedTiles, *, out_dtype=jnp.float32
) -> Float[Array, "G M N"]:
    """Weight gradients of the grouped matmul: for each group, the product over its own tiles.

    Both operands come from `quantize_tiles_ragged` with the same ``tiles``. A group without tiles
    gets zeros, and tiles of no group affect nothing.
    """
    index_T = jnp.arange(a.scale.shape[0])
    low_G1, count_G1 = tiles.offset_G[:, None], tiles.tiles_G[:, None]
    own_GT = (index_T >= low_G1) & (index_T < low_G1 + count_G1)
    own_GK = jnp.repeat(own_GT, TILE, axis=1)[:, None, :]
    a_GMK, b_GNK = (jnp.where(own_GK, dequantize(q), 0.0) for q in (a, b))
    return jnp.einsum("GMK,GNK->GMN", a_GMK, b_GNK, precision="highest").astype(out_dtype)


def mla_decode(
    q_nope_BTNR: Float[Array, "B T N R"],
    q_pe_BTNP: Float[Array, "B T N P"],
    c_kv_LBSR: Float[Array, "L B S R"],
    k_pe_LBSP: Float[Array, "L B S P"],
    length_B: Int[Array, "B"],
    layer: Int[Array, ""] | int,
    *,
    scale: float,
) -> Float[Array, "B T N R"]:
    """Attention over one layer of the latent cache (V2 section 2.1.2), in FP32.

    Query t of row b sees the slots up to its own, ``length_B[b] + t``. What the others hold is of
    no effect, and a query that sees none gets zeros.
    """
    T, S = q_nope_BTNR.shape[1], c_kv_LBSR.shape[2]
    own_BT = length_B[:, None] + jnp.arange(T)
    seen_BTS = jnp.arange(S) <= own_BT[..., None]
    # What nobody sees must not be multiplied: zero times NaN is NaN.
    seen_BS = seen_BTS[:, -1]
    q_nope, q_pe = q_nope_BTNR.astype(jnp.float32), q_pe_BTNP.astype(jnp.float32)
    c_kv, k_pe = (
        jnp.where(seen_BS[..., None], x[layer].astype(jnp.float32), 0)
        for x in (c_kv_LBSR, k_pe_LBSP)
    )
    scores = jnp.einsum("btnr,bsr->btns", q_nope, c_kv, precision="highest")
    scores += jnp.einsum("btnp,bsp->btns", q_pe, k_pe, precision="highest")
    seen_BT1S = seen_BTS[:, :, None]
    weights = jax.nn.softmax(scores * scale, axis=-1, where=seen_BT1S)
    weights = jnp.where(seen_BT1S.any(-1, keepdims=True), weights, 0)
    out = jnp.einsum("btns,bsr->btnr", weights, c_kv, precision="highest")
    return out.astype(q_nope_BTNR.dtype)


def _own_rows(group_sizes: Int[Array, "G"], m: int) -> Bool[Array, "G M"]:
    """Which of m rows belong to each group."""
    ends_G = jnp.cumsum(group_sizes)
    row_M = jnp.arange(m)
    return (row_M < ends_G[:, None]) & (row_M >= (ends_G - group_sizes)[:, None])
