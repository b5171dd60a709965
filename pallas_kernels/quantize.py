"""Online quantization to E4M3: 1x128 tiles for activations, 128x128 blocks for weights.

The definitions (scales, saturation, what becomes of zeros, infinities and NaN) are those of
`pallas_kernels.reference`. Where no kernel is written, XLA fuses them into a few passes over the
input.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import backend, reference
from pallas_kernels.reference import TILE, Quantized, RaggedTiles, ragged_tiles

Impl = Literal["auto", "hopper", "reference"]

__all__ = [
    "BothWays",
    "Quantized",
    "RaggedTiles",
    "SwigluGradient",
    "quantize_blocks",
    "quantize_blocks_both",
    "quantize_tiles",
    "quantize_tiles_both",
    "ragged_tiles",
    "requantize_tiles",
    "swiglu_gradient_quantize_tiles",
    "swiglu_quantize_tiles",
    "transpose_blocks",
]


class BothWays(NamedTuple):
    """One matrix quantized for both of the products that it takes part in.

    Attributes:
        by_row: Tiles along the last axis, for the forward pass or the input gradient.
        by_column: The quantized transpose, tiles along the first axis, for the weight gradient.
    """

    by_row: Quantized
    by_column: Quantized


@functools.partial(jax.jit, static_argnames=("axis", "power_of_two", "impl"))
def quantize_tiles(
    x: Float[Array, "A B"], *, axis: int = -1, power_of_two: bool = False, impl: Impl = "auto"
) -> Quantized:
    """Quantize a matrix in 1x128 tiles along the axis that will be contracted.

    Args:
        x: Any floating point matrix.
        axis: The contracted axis. It comes last in ``values``: with ``axis=0`` they are transposed.
        power_of_two: Round scales up to powers of two (UE8M0 can hold them), which makes
            requantizing along the other axis exact in the scale.
        impl: ``hopper`` is one pass over the input. Along the last axis it wants whole tiles and
            rows by the 64; along the first, bfloat16 and whole tiles on both axes. ``auto`` takes
            it where it can run.

    Returns:
        ``values`` in E4M3, and ``scale`` with one row per 128 of the contracted axis.
    """
    if axis not in (-2, -1, 0, 1):
        raise ValueError(f"quantize_tiles: a matrix has no axis {axis}")
    transposed = axis % 2 == 0
    if transposed:
        impl = _pick("quantize_tiles, transposed", _fits(x, None), impl)
    else:
        fits = x.shape[0] % 64 == 0 and x.shape[1] % TILE == 0 and x.dtype.itemsize <= 4
        impl = _pick("quantize_tiles", fits, impl, can=backend.on_hopper)
    if impl == "reference":
        return reference.quantize_tiles(x, axis=axis, power_of_two=power_of_two)
    if transposed:
        return _hopper(x, None, by_row=False, power_of_two=power_of_two)[0]
    from pallas_kernels.hopper import quantize as hopper_quantize

    return hopper_quantize.quantize_tiles(x, power_of_two=power_of_two)


@functools.partial(jax.jit, static_argnames=("power_of_two", "impl"))
def quantize_tiles_both(
    x_MN: Float[Array, "M N"],
    tiles: RaggedTiles | None = None,
    *,
    power_of_two: bool = False,
    impl: Impl = "auto",
) -> BothWays:
    """`quantize_tiles` along both axes, as the backward pass needs output gradients.

    Args:
        x_MN: The matrix.
        tiles: If the rows lie in groups, their tiles along the first axis, from `ragged_tiles`; the
            second result is then that of `reference.quantize_tiles_ragged`, and rows of no group
            hold anything at all in the first.
        power_of_two: Round scales up to powers of two.
        impl: ``hopper`` reads a bfloat16 matrix once; it wants columns by the 128 and rows by the
            128, or, in groups, by the 8 and at least 128. ``auto`` takes it where it can run.
    """
    if _pick("quantize_tiles_both", _fits(x_MN, tiles), impl) == "hopper":
        return BothWays(*_hopper(x_MN, tiles, power_of_two=power_of_two))
    return _reference_both(x_MN, tiles, power_of_two)


@functools.partial(jax.jit, static_argnames=("power_of_two", "impl"))
def swiglu_quantize_tiles(
    gate_up_MF: Float[Array, "M F"],
    factors_M: Float[Array, "M"] | None = None,
    tiles: RaggedTiles | None = None,
    *,
    power_of_two: bool = False,
    impl: Impl = "auto",
) -> Quantized:
    """`quantize_tiles` of `reference.swiglu`, which itself never reaches memory.

    The product is computed in FP32 and rounded to the dtype of its operands before it is quantized,
    so this equals quantizing the result of the separate operation.

    Args:
        gate_up_MF: ``gate`` and ``up`` side by side.
        factors_M: What each row of the product is multiplied by, as an expert's output by its gate.
        tiles: As in `quantize_tiles_both`; rows of no group hold anything at all.
        power_of_two: Round scales up to powers of two.
        impl: As in `quantize_tiles_both`.
    """
    fits = _fits(gate_up_MF, tiles, halves=True)
    if _pick("swiglu_quantize_tiles", fits, impl) == "hopper":
        options = dict(swiglu=True, by_column=False, power_of_two=power_of_two)
        return _hopper(gate_up_MF, tiles, factors_M=factors_M, **options)[0]
    h_MK = reference.swiglu(gate_up_MF, factors_M)
    return reference.quantize_tiles(h_MK, power_of_two=power_of_two)


class SwigluGradient(NamedTuple):
    """What a backward pass multiplies and sums around a SwiGLU.

    Attributes:
        by_row: The gradient of ``gate`` and ``up`` with tiles along the last axis, side by side as
            one matrix, or apart as two.
        by_column: The quantized transposes, of that of ``gate``, of that of ``up``, and of the
            product itself, with tiles along the rows; None if not asked for.
        factors_M: The gradient of the factors; None where there are none.
    """

    by_row: tuple[Quantized, ...]
    by_column: tuple[Quantized, ...] | None
    factors_M: Float[Array, "M"] | None


@functools.partial(jax.jit, static_argnames=("apart", "by_column", "impl"))
def swiglu_gradient_quantize_tiles(
    gate_up: Quantized,
    dh_MK: Float[Array, "M K"],
    factors_M: Float[Array, "M"] | None = None,
    tiles: RaggedTiles | None = None,
    *,
    apart: bool = False,
    by_column: bool = True,
    impl: Impl = "auto",
) -> SwigluGradient:
    """The gradient of ``h = factor * silu(gate) * up``, quantized, and h again, in one pass.

    With ``s = sigmoid(gate)`` and ``c = factor * dh``:

    * ``dgate = c * up * s * (1 + gate * (1 - s))`` and ``dup = c * silu(gate)``,
    * ``dfactor = sum_K(dh * silu(gate) * up)``,

    computed in FP32, from what gate and up stand for to the last bit of FP32. What is quantized by
    column is rounded to the dtype of dh first, which is how it can be transposed.

    Args:
        gate_up: ``[M, 2 K]`` values with tiles along the rows, as they are kept for the backward
            pass (V3 section 3.3.3); ``gate`` and ``up`` are what `reference.dequantize` makes of
            the two halves.
        dh_MK: The gradient of h.
        factors_M: What each row of the product was multiplied by.
        tiles: As in `quantize_tiles_both`: rows of no group hold anything at all in ``by_row``, and
            affect nothing else; the gradient of their factors is zero.
        apart: Whether ``by_row`` is two matrices, for weights that are not multiplied as one.
        by_column: Whether weights have gradients, that is, ``by_column`` is needed.
        impl: As in `quantize_tiles_both`, with columns those of dh.

    Raises:
        ValueError: if ``hopper`` is asked for what it cannot take.
    """
    fits = _fits(dh_MK, tiles)
    if _pick("swiglu_gradient_quantize_tiles", fits, impl) == "hopper":
        if not fits:
            raise ValueError(f"no kernel for the gradient of SwiGLU, {dh_MK.dtype}{dh_MK.shape}")
        from pallas_kernels.hopper import swiglu_gradient

        given = _whole(dh_MK.shape[0]) if tiles is None else tiles
        options = dict(factors_M=factors_M, apart=apart, by_column=by_column)
        rows, columns, sums_kM = swiglu_gradient.swiglu_gradient(gate_up, dh_MK, given, **options)
        dfactors_M = None if sums_kM is None else jnp.sum(sums_kM, axis=0)
    else:
        gate_up_MF, dh = reference.dequantize(gate_up), dh_MK.astype(jnp.float32)
        grad_MF, dfactors_M = reference.swiglu_gradient(gate_up_MF, dh, factors_M)
        halves = jnp.split(grad_MF, 2, axis=1)
        rows = tuple(reference.quantize_tiles(x) for x in (halves if apart else (grad_MF,)))
        # Where they are not used, neither are they computed.
        results = *halves, reference.swiglu(gate_up_MF, factors_M)
        columns = tuple(
            _reference_both(x.astype(dh_MK.dtype), tiles, False).by_column for x in results
        )
    if dfactors_M is not None and factors_M is not None:
        if tiles is not None:
            own_M = jnp.arange(len(dh_MK)) < jnp.max(tiles.high_T, initial=0)
            dfactors_M = jnp.where(own_M, dfactors_M, 0)
        dfactors_M = dfactors_M.astype(factors_M.dtype)
    return SwigluGradient(rows, columns if by_column else None, dfactors_M)


@functools.partial(jax.jit, static_argnames=("power_of_two", "impl"))
def requantize_tiles(
    q: Quantized, tiles: RaggedTiles, *, power_of_two: bool = True, impl: Impl = "auto"
) -> Quantized:
    """``by_column`` of `quantize_tiles_both`, from what is already quantized along the rows.

    Activations are kept in FP8 and their tiles turned round for the weight gradient (V3 section
    3.3.3). In between they are BF16, which E4M3 times a power of two fits in: where the scales are
    such, nothing is rounded but the new values.
    """
    x_MK = reference.dequantize(q).astype(jnp.bfloat16)  # not computed where the kernel is taken
    if _pick("requantize_tiles", _fits(x_MK, tiles), impl) == "hopper":
        options = dict(scale_kM=q.scale, by_row=False, power_of_two=power_of_two)
        return _hopper(q.values, tiles, **options)[0]
    return reference.quantize_tiles_ragged(x_MK, tiles, power_of_two=power_of_two)


def _reference_both(x_MN, tiles: RaggedTiles | None, power_of_two: bool) -> BothWays:
    by_row = reference.quantize_tiles(x_MN, power_of_two=power_of_two)
    if tiles is None:
        return BothWays(by_row, reference.quantize_tiles(x_MN, axis=0, power_of_two=power_of_two))
    by_column = reference.quantize_tiles_ragged(x_MN, tiles, power_of_two=power_of_two)
    return BothWays(by_row, by_column)


def _fits(
    x: jax.Array, tiles: RaggedTiles | None, *, halves: bool = False, dtype: Any = jnp.bfloat16
) -> bool:
    """Whether the kernel for both axes takes a matrix, or each half of it."""
    rows, columns = x.shape
    whole = rows % TILE == 0 if tiles is None else rows % 8 == 0
    of_tiles = columns % (2 * TILE if halves else TILE) == 0 < columns
    return x.dtype == dtype and whole and rows >= TILE and of_tiles


def _both_on_hopper() -> bool:
    """Whether the kernels for both axes can run: on a Hopper GPU, from jax 0.11 on."""
    if not backend.on_hopper():
        return False
    from pallas_kernels.hopper import compat

    return compat.loads_transposed()


def _pick(
    operation: str, fits: bool, impl: Impl, *, can: Callable[[], bool] = _both_on_hopper
) -> Impl:
    """What to run: the kernel if it takes the operands and ``can`` run here."""
    backend.check_impl(operation, impl, ("auto", "hopper", "reference"))
    if impl == "auto":
        impl = "hopper" if fits and can() else "reference"
        backend.say_once(operation, impl)
    return impl


def _hopper(x, tiles: RaggedTiles | None, *, swiglu: bool = False, **options):
    from pallas_kernels.hopper import quantize_both

    dtype = reference.E4M3 if "scale_kM" in options else jnp.bfloat16
    if not _fits(x, tiles, halves=swiglu, dtype=dtype):
        raise ValueError(f"no kernel to quantize {x.dtype}{x.shape} along its first axis")
    tiles = _whole(x.shape[0]) if tiles is None else tiles
    return quantize_both.quantize_both(x, tiles, swiglu=swiglu, **options)


def _whole(rows: int) -> RaggedTiles:
    """The tiles of rows of a single group."""
    return ragged_tiles(jnp.full((1,), rows, jnp.int32), rows)


@functools.partial(jax.jit, static_argnames="power_of_two")
def quantize_blocks(w: Float[Array, "*G R K"], *, power_of_two: bool = False) -> Quantized:
    """Quantize a matrix, or one per group, in 128x128 blocks.

    The blocks are square, so the quantized transpose is the transpose of the quantized matrix: a
    weight is quantized once for the forward pass and the input gradient.
    """
    return reference.quantize_blocks(w, power_of_two=power_of_two)


@functools.partial(jax.jit, static_argnames=("power_of_two", "impl"))
def quantize_blocks_both(
    w: Float[Array, "*G R _"] | tuple[Float[Array, "*G R _"], ...],
    *,
    power_of_two: bool = False,
    impl: Impl = "auto",
) -> tuple[Quantized, Quantized]:
    """`quantize_blocks` and `transpose_blocks` of the result.

    Args:
        w: A matrix, or one per group; or several, which are quantized as if they stood side by
            side. All but the last must then have a multiple of 128 columns.
        power_of_two: Round scales up to powers of two.
        impl: ``hopper`` reads matrices in bfloat16 or float32 once, whose sides are multiples of
            128; ``auto`` takes it where it can run.
    """
    parts = w if isinstance(w, tuple) else (w,)
    if any(part.shape[-1] % TILE for part in parts[:-1]):
        raise ValueError(f"columns {[part.shape[-1] for part in parts]}: a block would hold two")
    fits = all(
        part.dtype in (jnp.bfloat16, jnp.float32)
        and part.shape[-2] % TILE == part.shape[-1] % TILE == 0
        and 0 not in part.shape
        for part in parts
    )
    impl = _pick("quantize_blocks_both", fits, impl)
    if impl == "reference":
        q = reference.quantize_blocks(jnp.concatenate(parts, -1), power_of_two=power_of_two)
        return q, transpose_blocks(q)
    if not fits:
        shapes = ", ".join(f"{part.dtype}{part.shape}" for part in parts)
        raise ValueError(f"no implementation {impl!r} for {shapes}")
    from pallas_kernels.hopper import quantize_both

    lead = parts[0].shape[:-2]
    stacks = tuple(part.reshape(-1, *part.shape[-2:]) for part in parts)
    both = quantize_both.quantize_blocks_both(stacks, power_of_two=power_of_two)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), both)


def transpose_blocks(w: Quantized) -> Quantized:
    """The transpose of a matrix with 128x128 block scales, without requantizing."""
    if not reference.has_block_scales(w):
        raise ValueError("tile scales do not survive a transpose; quantize the other axis instead")
    return w._replace(values=w.values.swapaxes(-1, -2), scale=w.scale.swapaxes(-1, -2))
