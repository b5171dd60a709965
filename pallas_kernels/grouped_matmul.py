"""Ragged (per-expert) matmul: rows sorted by group, one weight matrix per group.

On Hopper GPUs, in bfloat16, the three products (forward, and the gradients of rows and of matrices)
are kernels of `pallas_kernels.hopper`; on TPU they are jax's own (megablox). Not used anywhere is
``jax.lax.ragged_dot``: on CPU it does G times the work (a dense product with every group, then a
mask), as it does on TPU for the gradient of the matrices, and on Hopper it reaches a thirtieth of
the dense rate.

The groups need not fill the array. Rows past the last group are padding: they come out as zeros,
take part in no sum whatever they hold (a NaN included), and get a zero gradient. Expert
parallelism needs this, because how many tokens arrive is known on the device only.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import backend, reference
from pallas_kernels.backend import Impl as Fp8Impl
from pallas_kernels.reference import (
    TILE,
    Quantized,
    RaggedTiles,
    has_block_scales,
    has_tile_scales,
)

Impl = Literal["auto", "hopper", "tpu", "blocked"]

# Rows per dense product. A group wastes half a block on average, so small blocks for few rows;
# large enough that the product, not the loop around it, takes the time.
_BLOCK_ROWS = {"cpu": 128}
_BLOCK_ROWS_ELSEWHERE = 512
# Tiles of M, K and N on TPU: about 10 MiB of VMEM with double buffering, of 16 to 32.
_TPU_TILES = (512, 1024, 1024)


def grouped_matmul(
    x_MK: Float[Array, "M K"],
    w_GKN: Float[Array, "G K N"],
    group_sizes_G: Int[Array, "G"],
    *,
    impl: Impl = "auto",
) -> Float[Array, "M N"]:
    """Multiply each row by its group's matrix; differentiable in ``x`` and ``w``.

    Args:
        x_MK: rows in group order; the first ``group_sizes[0]`` belong to group 0, and so on.
        w_GKN: one matrix per group.
        group_sizes_G: rows of each group, 0 allowed. The sum may be less than M; if it is more,
            which only the device knows, results are wrong.
        impl: ``hopper`` needs bfloat16 operands, and K and N that are multiples of 64.
            ``tpu`` copies ``x`` unless M is a multiple of 512, and in `shard_map` it wants
            ``check_vma=False``. ``blocked`` loops over row blocks of one group each. In all, work
            is proportional to the rows of the groups, padding not counted. ``auto`` takes tpu on
            TPU, hopper where it can run, blocked elsewhere, and logs what it took.

    Returns:
        ``[M, N]`` in the dtype of ``x``; sums are float32.

    Raises:
        ValueError: if the operands do not fit one another, or ``impl="hopper"`` is asked for such
            as it cannot take.
    """
    backend.check_impl("grouped_matmul", impl, ("auto", "hopper", "tpu", "blocked"))
    _check("grouped_matmul", x_MK.shape[1], w_GKN.shape[1], w_GKN.shape[0], group_sizes_G)
    x_MK, w_GKN, group_sizes_G = backend.varying_alike(x_MK, w_GKN, group_sizes_G)
    if impl == "auto":
        impl = _pick(x_MK, w_GKN)
        backend.say_once("grouped_matmul", impl)
    if impl == "tpu":
        return _tpu(x_MK, w_GKN, group_sizes_G, backend.platform() != "tpu")
    if impl == "hopper":
        if not _hopper_can(x_MK, w_GKN):
            raise ValueError(
                "impl='hopper' needs bfloat16, and K and N that are multiples of 64, not "
                f"{x_MK.dtype}{x_MK.shape} and {w_GKN.dtype}{w_GKN.shape}"
            )
        return _hopper(x_MK, w_GKN, group_sizes_G, False)
    if x_MK.shape[0] == 0:
        return jnp.zeros((0, w_GKN.shape[2]), x_MK.dtype)
    # With few rows, as in decoding, about as many as a group has: a block is read whole.
    each = 1 << (x_MK.shape[0] // w_GKN.shape[0]).bit_length()
    most = _BLOCK_ROWS.get(backend.platform(), _BLOCK_ROWS_ELSEWHERE)
    rows = min(most, max(8, each), x_MK.shape[0])
    return _blocked(x_MK, w_GKN, group_sizes_G, rows)


def fp8_grouped_matmul(
    a: Quantized,
    b: Quantized,
    group_sizes_G: Int[Array, "G"],
    *,
    out_dtype=jnp.bfloat16,
    impl: Fp8Impl = "auto",
) -> Float[Array, "M N"]:
    """The grouped form of `fp8_matmul`: each row times the transpose of its group's matrix.

    Args:
        a: [M, K] values with 1x128 tile scales, rows in group order. Rows past the last group come
            out as zeros.
        b: [G, N, K] values with 128x128 block scales; or one of a stack, [L, G, N, K], which
            ``hopper`` reads in place.
        group_sizes_G: rows of each group, 0 allowed; the sum may be less than M.
        out_dtype: bfloat16 or float32 (which ``hopper`` lacks); sums are FP32.
        impl: ``hopper`` and ``tpu`` need K and N that are multiples of 128; in `shard_map`, ``tpu``
            wants ``check_vma=False``. ``reference`` does G times the work, in G times the memory.
            ``auto`` takes what can run, and logs it.

    Raises:
        ValueError: if the operands do not fit one another, have scales of another kind, or are
            such as the implementation asked for cannot take.
    """
    (M, K_rows), (G, N, K) = a.values.shape, b.shape
    _check("fp8_grouped_matmul", K_rows, K, G, group_sizes_G)
    if not has_tile_scales(a) or not has_block_scales(b):
        raise ValueError("fp8_grouped_matmul: rows need 1x128 tile scales, matrices 128x128 blocks")
    if 0 in (M, N, K, G):
        return jnp.zeros((M, N), out_dtype)
    fits = K % TILE == N % TILE == 0
    impl = _pick_fp8("fp8_grouped_matmul", fits, impl, on_hopper=out_dtype == jnp.bfloat16)
    if impl == "hopper":
        from pallas_kernels.hopper import grouped_matmul as hopper

        return hopper.fp8_grouped_matmul(a, b, group_sizes_G)
    if impl == "tpu":
        from pallas_kernels.tpu import grouped_matmul as tpu

        return tpu.fp8_grouped_matmul(a, b.cut_out(), group_sizes_G, out_dtype=out_dtype)
    return reference.fp8_grouped_matmul(a, b, group_sizes_G, out_dtype=out_dtype)


def fp8_grouped_wgrad(
    a: Quantized,
    b: Quantized,
    tiles: RaggedTiles,
    *,
    out_dtype=jnp.float32,
    impl: Fp8Impl = "auto",
) -> Float[Array, "G M N"]:
    """For every group, ``a @ b.T`` over its own tiles: the weight gradients in FP8.

    Args:
        a: [M, 128 T] values with tile scales: the quantized transpose of the rows of all groups,
            from `quantize_tiles_both` with the same ``tiles``.
        b: [N, 128 T] values, likewise.
        tiles: From `ragged_tiles`.
        out_dtype: float32 or bfloat16; sums are FP32, promoted every tile.
        impl: as in `fp8_grouped_matmul`; M and N must be multiples of 128 for the kernels.

    Raises:
        ValueError: as in `fp8_grouped_matmul`.
    """
    if a.values.shape[1] != b.values.shape[1]:
        raise ValueError(
            "fp8_grouped_wgrad: the operands have tiles of different rows, "
            f"{a.values.shape[1]} and {b.values.shape[1]} in all"
        )
    fits = a.values.shape[0] % TILE == b.values.shape[0] % TILE == 0
    fits = fits and 0 not in (*a.values.shape, *b.values.shape)
    impl = _pick_fp8("fp8_grouped_wgrad", fits, impl)
    if impl == "hopper":
        from pallas_kernels.hopper import matmul as hopper

        return hopper.fp8_grouped_wgrad(a, b, tiles, out_dtype=out_dtype)
    if impl == "tpu":
        from pallas_kernels.tpu import grouped_matmul as tpu

        return tpu.fp8_grouped_wgrad(a, b, tiles, out_dtype=out_dtype)
    return reference.fp8_grouped_wgrad(a, b, tiles, out_dtype=out_dtype)


def _check(operation: str, K_rows: int, K: int, G: int, group_sizes_G: jax.Array) -> None:
    """Refuse what would multiply numbers that have nothing to do with one another."""
    if K_rows != K:
        raise ValueError(f"{operation}: rows have K = {K_rows}, the matrices K = {K}")
    if len(group_sizes_G) != G:
        raise ValueError(f"{operation}: {len(group_sizes_G)} group sizes for {G} matrices")


def _pick_fp8(operation: str, fits: bool, impl: Fp8Impl, *, on_hopper: bool = True) -> Fp8Impl:
    """What to run. ``fits``: whether kernels take the shapes; ``on_hopper``: and the one there."""
    backend.check_impl(operation, impl, ("auto", "hopper", "tpu", "reference"))
    if impl == "auto":
        impl = "reference"
        if fits and backend.platform() == "tpu":
            impl = "tpu"
        elif fits and on_hopper and backend.on_hopper():
            impl = "hopper"
        backend.say_once(operation, impl)
    elif impl != "reference" and not (fits and (on_hopper or impl != "hopper")):
        raise ValueError(
            f"{operation}: impl={impl!r} needs sides that are multiples of {TILE}, "
            "and on Hopper a bfloat16 result"
        )
    return impl


def _pick(x_MK: jax.Array, w_GKN: jax.Array) -> Impl:
    if backend.platform() == "tpu":
        return "tpu"
    return "hopper" if backend.on_hopper() and _hopper_can(x_MK, w_GKN) else "blocked"


def _hopper_can(x_MK: jax.Array, w_GKN: jax.Array) -> bool:
    _, K, N = w_GKN.shape
    in_bfloat16 = x_MK.dtype == w_GKN.dtype == jnp.bfloat16
    return in_bfloat16 and K % 64 == N % 64 == 0 and 0 not in (*x_MK.shape, *w_GKN.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _tpu(x_MK: jax.Array, w_GKN: jax.Array, sizes_G: jax.Array, interpret: bool) -> jax.Array:
    return _megablox(x_MK, w_GKN, sizes_G, interpret, transpose_w=False)


def _megablox(x_MK, w_GKN, sizes_G, interpret: bool, *, transpose_w: bool) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.megablox.ops import backend as megablox

    M, N = x_MK.shape[0], w_GKN.shape[1 if transpose_w else 2]
    if 0 in (M, N, *w_GKN.shape):
        return jnp.zeros((M, N), x_MK.dtype)
    rows, tiles = _whole_tiles(x_MK, N)
    out = megablox.gmm(
        rows, w_GKN, sizes_G, x_MK.dtype, tiles, transpose_rhs=transpose_w, interpret=interpret
    )
    # Rows that belong to no group are not written at all.
    return jnp.where((jnp.arange(M) < sizes_G.sum())[:, None], out[:M], 0)


def _whole_tiles(x_MK: jax.Array, N: int) -> tuple[jax.Array, tuple[int, int, int]]:
    """``x`` with rows up to a multiple of the tile (the kernel's demand), and the tile."""
    M, K = x_MK.shape
    tm, tk, tn = _TPU_TILES
    tm = min(tm, -(-M // 8) * 8)
    padded = x_MK if M % tm == 0 else jnp.pad(x_MK, ((0, -M % tm), (0, 0)))
    return padded, (tm, min(tk, K), min(tn, N))


def _tpu_fwd(x_MK, w_GKN, sizes_G, interpret):
    return _tpu(x_MK, w_GKN, sizes_G, interpret), (x_MK, w_GKN, sizes_G)


def _tpu_bwd(interpret, residuals, dy_MN):
    from jax.experimental.pallas.ops.tpu.megablox.ops import backend as megablox

    x_MK, w_GKN, sizes_G = residuals
    dx_MK = _megablox(dy_MN, w_GKN, sizes_G, interpret, transpose_w=True)
    if 0 in (*x_MK.shape, *w_GKN.shape):
        return dx_MK, jnp.zeros_like(w_GKN), None
    rows, tiles = _whole_tiles(x_MK, dy_MN.shape[1])
    dy_rows, _ = _whole_tiles(dy_MN, dy_MN.shape[1])
    dw_GKN = megablox.tgmm(rows.T, dy_rows, sizes_G, w_GKN.dtype, tiles, interpret=interpret)
    return dx_MK, dw_GKN, None


_tpu.defvjp(_tpu_fwd, _tpu_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _hopper(x_MK: jax.Array, w_GKN: jax.Array, sizes_G: jax.Array, interpret: bool) -> jax.Array:
    from pallas_kernels.hopper import grouped_matmul as kernel

    return kernel.grouped_matmul(x_MK, w_GKN, sizes_G, interpret=interpret)


def _hopper_fwd(x_MK, w_GKN, sizes_G, interpret):
    return _hopper(x_MK, w_GKN, sizes_G, interpret), (x_MK, w_GKN, sizes_G)


def _hopper_bwd(interpret, residuals, dy_MN):
    from pallas_kernels.hopper import grouped_matmul as kernel
    from pallas_kernels.hopper import grouped_wgrad as wgrad

    x_MK, w_GKN, sizes_G = residuals
    dx_MK = kernel.grouped_matmul(dy_MN, w_GKN, sizes_G, transpose_w=True, interpret=interpret)
    dw_GKN = wgrad.grouped_wgrad(x_MK, dy_MN, sizes_G, out_dtype=w_GKN.dtype, interpret=interpret)
    return dx_MK, dw_GKN, None


_hopper.defvjp(_hopper_fwd, _hopper_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocked(x_MK: jax.Array, w_GKN: jax.Array, sizes_G: jax.Array, rows: int) -> jax.Array:
    return _rows_times_group(x_MK, w_GKN, sizes_G, rows, contract_w=0)


def _blocked_fwd(x_MK, w_GKN, sizes_G, rows):
    return _blocked(x_MK, w_GKN, sizes_G, rows), (x_MK, w_GKN, sizes_G)


def _blocked_bwd(rows, residuals, dy_MN):
    x_MK, w_GKN, sizes_G = residuals
    dx_MK = _rows_times_group(dy_MN, w_GKN, sizes_G, rows, contract_w=1)
    dw_GKN = _rows_times_rows(x_MK, dy_MN, sizes_G, rows)
    return dx_MK.astype(x_MK.dtype), dw_GKN.astype(w_GKN.dtype), None


_blocked.defvjp(_blocked_fwd, _blocked_bwd)


def _blocks(
    sizes_G: jax.Array, rows: int, most: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Cut every group into blocks: number of blocks, and each one's group, first and end row.

    ``most`` bounds the number of blocks; the entries past the real ones are not used.
    """
    ends_G = jnp.cumsum(sizes_G)
    blocks_G = (sizes_G + rows - 1) // rows
    block_ends_G = jnp.cumsum(blocks_G)
    index = jnp.arange(most)
    group = jnp.minimum(jnp.searchsorted(block_ends_G, index, side="right"), len(sizes_G) - 1)
    within = index - (block_ends_G - blocks_G)[group]
    first = (ends_G - sizes_G)[group] + within * rows
    return block_ends_G[-1], group, first, ends_G[group]


def _most_blocks(M: int, G: int, rows: int) -> int:
    """Sum of ceil(size/rows) over G groups of M rows together, at the worst."""
    return (M + G * (rows - 1)) // rows


def _own_rows(first: jax.Array, end: jax.Array, rows: int, M: int) -> tuple[jax.Array, jax.Array]:
    """Where to cut a block of whole size, and which of its rows are its own, ``[rows, 1]``.

    The last block is cut earlier rather than past the end: padding would copy the array.
    """
    start = jnp.minimum(first, M - rows)
    index = start + jnp.arange(rows)
    return start, ((index >= first) & (index < end))[:, None]


def _rows_times_group(x_MK, w_GKN, sizes_G, rows: int, *, contract_w: int) -> jax.Array:
    """Each row times its group's matrix (``contract_w=0``) or its transpose (``=1``)."""
    M, G = x_MK.shape[0], w_GKN.shape[0]
    count, group, first, end = _blocks(sizes_G, rows, _most_blocks(M, G, rows))
    out = jnp.zeros((M, w_GKN.shape[2 - contract_w]), x_MK.dtype)
    out, _ = backend.varying_alike(out, x_MK)

    def body(i, out):
        start, own = _own_rows(first[i], end[i], rows, M)
        x = jax.lax.dynamic_slice_in_dim(x_MK, start, rows)
        w = jax.lax.dynamic_index_in_dim(w_GKN, group[i], keepdims=False)
        y = jax.lax.dot_general(
            x, w, (((1,), (contract_w,)), ((), ())), preferred_element_type=jnp.float32
        )
        y = jnp.where(own, y.astype(out.dtype), jax.lax.dynamic_slice_in_dim(out, start, rows))
        return jax.lax.dynamic_update_slice_in_dim(out, y, start, axis=0)

    return jax.lax.fori_loop(0, count, body, out)


def _rows_times_rows(x_MK, dy_MN, sizes_G, rows: int) -> jax.Array:
    """The weight gradient: for every group, x^T dy over its rows, summed in float32."""
    M, G = x_MK.shape[0], sizes_G.shape[0]
    count, group, first, end = _blocks(sizes_G, rows, _most_blocks(M, G, rows))

    def body(i, dw):
        start, own = _own_rows(first[i], end[i], rows, M)
        x, dy = (
            jnp.where(own, jax.lax.dynamic_slice_in_dim(a, start, rows), 0) for a in (x_MK, dy_MN)
        )
        part = jax.lax.dot_general(
            x, dy, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return dw.at[group[i]].add(part)

    dw = jnp.zeros((G, x_MK.shape[1], dy_MN.shape[1]), jnp.float32)
    dw, _ = backend.varying_alike(dw, x_MK)
    return jax.lax.fori_loop(0, count, body, dw)
