"""Online quantization to E4M3: 1x128 tiles for activations, 128x128 blocks for weights.

The definitions (scales, saturation, what becomes of zeros, infinities and NaN) are those of
`pallas_kernels.reference`; XLA fuses each function here into one or two passes over its input.
"""

import functools
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from pallas_kernels import reference
from pallas_kernels.reference import Quantized

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


@functools.partial(jax.jit, static_argnames=("axis", "power_of_two"))
def quantize_tiles(
    x: Float[Array, "A B"], *, axis: int = -1, power_of_two: bool = False
) -> Quantized:
    """Quantize a matrix in 1x128 tiles along the axis that will be contracted.

    Args:
        x: Any floating point matrix.
        axis: The contracted axis. It comes last in ``values``: with ``axis=0`` they are transposed.
        power_of_two: Round scales up to powers of two (UE8M0 can hold them), which makes
            requantizing along the other axis exact in the scale.

    Returns:
        ``values`` in E4M3, and ``scale`` with one row per 128 of the contracted axis.
    """
    return reference.quantize_tiles(x, axis=axis, power_of_two=power_of_two)


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
