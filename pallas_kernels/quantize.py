"""Online quantization to E4M3: 1x128 tiles for activations, 128x128 blocks for weights.

The definitions (scales, saturation, what becomes of zeros, infinities and NaN) are those of
`pallas_kernels.reference`. Where no kernel is written, XLA fuses them into a few passes over the
input.
"""

import functools
from typing import Literal, NamedTuple

import jax
from jaxtyping import Array, Float

from pallas_kernels import backend, reference
from pallas_kernels.reference import Quantized

Impl = Literal["auto", "hopper", "reference"]

__all__ = [
    "BothWays",
    "Quantized",
    "quantize_blocks",
    "quantize_tiles",
    "quantize_tiles_both",
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
        impl: ``hopper`` is one pass over the input, along the last axis, for whole tiles and rows
            by the 64; ``auto`` takes it where it can run.

    Returns:
        ``values`` in E4M3, and ``scale`` with one row per 128 of the contracted axis.
    """
    if impl == "auto":
        fits = axis % 2 == 1 and x.shape[0] % 64 == 0 and x.shape[1] % reference.TILE == 0
        fits = fits and x.dtype.itemsize <= 4
        impl = "hopper" if fits and backend.on_hopper() else "reference"
    if impl == "reference":
        return reference.quantize_tiles(x, axis=axis, power_of_two=power_of_two)
    if impl != "hopper" or axis % 2 == 0:
        raise ValueError(f"no implementation {impl!r} along axis {axis}")
    from pallas_kernels.hopper import quantize as hopper_quantize

    return hopper_quantize.quantize_tiles(x, power_of_two=power_of_two)


@functools.partial(jax.jit, static_argnames="power_of_two")
def quantize_tiles_both(x_MN: Float[Array, "M N"], *, power_of_two: bool = False) -> BothWays:
    """`quantize_tiles` along both axes, as the backward pass needs output gradients."""
    return BothWays(
        quantize_tiles(x_MN, axis=1, power_of_two=power_of_two),
        quantize_tiles(x_MN, axis=0, power_of_two=power_of_two),
    )


@functools.partial(jax.jit, static_argnames="power_of_two")
def quantize_blocks(w: Float[Array, "*G R K"], *, power_of_two: bool = False) -> Quantized:
    """Quantize a matrix, or one per group, in 128x128 blocks.

    The blocks are square, so the quantized transpose is the transpose of the quantized matrix: a
    weight is quantized once for the forward pass and the input gradient.
    """
    return reference.quantize_blocks(w, power_of_two=power_of_two)


def transpose_blocks(w: Quantized) -> Quantized:
    """The transpose of a matrix with 128x128 block scales, without requantizing."""
    if not reference.has_block_scales(w):
        raise ValueError("tile scales do not survive a transpose; quantize the other axis instead")
    return jax.tree.map(lambda x: x.swapaxes(-1, -2), w)
