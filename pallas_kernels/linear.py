"""Linear layers in FP8 as DeepSeek-V3 trains them (section 3.3, figure 6), differentiable.

All three products of a layer are block-scaled FP8 products, promoted to FP32 every 128 of the
contracted axis:

=========  ============================  ============================  ====================
product    left, 1x128 tiles             right                         result
=========  ============================  ============================  ====================
forward    x, along K                    w, 128x128 blocks             dtype of x (BF16)
dgrad      dy, along N                   w, the same blocks            dtype of x (BF16)
wgrad      x transposed, along M         dy transposed, 1x128 along M  dtype of w (FP32)
=========  ============================  ============================  ====================

A weight may come quantized, as a checkpoint in FP8 has it: it is taken as it is, without gradient.

What is kept for the backward pass is in FP8: x, quantized along M in the same pass over it as along
K (the paper keeps the tiles along K and requantizes those; quantizing twice from BF16 rounds once),
and the quantized weight. They carry the names ``fp8_input`` and ``fp8_weight`` for
`jax.checkpoint`'s policies. Weights in FP32 are quantized from FP32 and get an FP32 gradient.

The down projection of a feed-forward network takes ``gate`` and ``up`` instead of x, so that
``silu(gate) * up`` never reaches memory: it is quantized where it is computed, in the forward pass
along one axis, and again in the backward pass along the other (the paper recomputes it likewise).

What stays in higher precision is the caller's choice: in V3 the embedding, the output head, the
router, norms and the core of attention (section 3.3.1).
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels import backend
from pallas_kernels.grouped_matmul import fp8_grouped_matmul, fp8_grouped_wgrad
from pallas_kernels.matmul import fp8_matmul
from pallas_kernels.quantize import (
    quantize_blocks_both,
    quantize_tiles,
    quantize_tiles_both,
    ragged_tiles,
    swiglu_quantize_tiles,
    transpose_blocks,
)
from pallas_kernels.reference import Quantized, swiglu

Impl = Literal["auto", "hopper", "tpu", "reference"]


def fp8_linear(
    x_MK: Float[Array, "M K"], w_KN: Float[Array, "K N"] | Quantized, *, impl: Impl = "auto"
) -> Float[Array, "M N"]:
    """``x @ w`` with the forward product and both gradients in FP8.

    Args:
        x_MK: activations.
        w_KN: the weight, usually the FP32 master copy; or ``[K, N]`` values with block scales.
        impl: of the products, as in `fp8_matmul`; ``reference`` also for quantization, which
            otherwise takes its kernel where one fits.

    Returns:
        ``[M, N]`` in the dtype of ``x``.
    """
    return _linear(*backend.varying_alike(x_MK, w_KN), impl)


def fp8_grouped_linear(
    x_MK: Float[Array, "M K"],
    w_GKN: Float[Array, "G K N"] | Quantized,
    group_sizes_G: Int[Array, "G"],
    *,
    impl: Impl = "auto",
) -> Float[Array, "M N"]:
    """`grouped_matmul` with the forward product and both gradients in FP8.

    Args:
        x_MK: rows in group order; those past the last group are padding, of zero result and
            gradient, which affects nothing.
        w_GKN: one matrix per group; or values with block scales.
        group_sizes_G: rows of each group, 0 allowed; the sum may be less than M.
        impl: of the products; ``hopper`` needs bfloat16 activations, and, like ``tpu``, K and N
            that are multiples of 128. ``reference`` does G times the work.

    Returns:
        ``[M, N]`` in the dtype of ``x``.
    """
    return _grouped(*backend.varying_alike(x_MK, w_GKN, group_sizes_G), impl)


def fp8_swiglu_linear(
    gate_MK: Float[Array, "M K"],
    up_MK: Float[Array, "M K"],
    w_KN: Float[Array, "K N"] | Quantized,
    *,
    impl: Impl = "auto",
) -> Float[Array, "M N"]:
    """`fp8_linear` of ``silu(gate) * up``, which is recomputed in the backward pass."""
    return _swiglu_linear(*backend.varying_alike(gate_MK, up_MK, w_KN), impl)


def fp8_grouped_swiglu_linear(
    gate_MK: Float[Array, "M K"],
    up_MK: Float[Array, "M K"],
    w_GKN: Float[Array, "G K N"] | Quantized,
    group_sizes_G: Int[Array, "G"],
    *,
    impl: Impl = "auto",
) -> Float[Array, "M N"]:
    """`fp8_grouped_linear` of ``silu(gate) * up``, which is recomputed in the backward pass."""
    return _swiglu_grouped(*backend.varying_alike(gate_MK, up_MK, w_GKN, group_sizes_G), impl)


def _quantizer(impl: Impl) -> Literal["auto", "reference"]:
    return "reference" if impl == "reference" else "auto"


def _quantized_weight(w: jax.Array | Quantized, impl: Impl) -> tuple[Quantized, Quantized]:
    """A weight and its transpose; what is quantized already stays as it is."""
    if isinstance(w, Quantized):
        return w, transpose_blocks(w)
    return quantize_blocks_both(w, impl=_quantizer(impl))


def _quantized_input(
    x_MK, w: jax.Array | Quantized, tiles, impl: Impl
) -> tuple[Quantized, Quantized | None]:
    """By row for the forward product, by column for the weight's gradient, where it has one."""
    if isinstance(w, Quantized):
        return quantize_tiles(x_MK, impl=_quantizer(impl)), None
    return quantize_tiles_both(x_MK, tiles, impl=_quantizer(impl))


def _empty(x: jax.Array | Quantized) -> jax.Array | None:
    """Of no size, in the dtype that the gradient must have; None: there is none."""
    return None if isinstance(x, Quantized) else x[(slice(0),) * x.ndim]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x_MK: jax.Array, w_KN: jax.Array | Quantized, impl: Impl) -> jax.Array:
    return _linear_fwd(x_MK, w_KN, impl)[0]


def _linear_fwd(x_MK, w_KN, impl):
    x, x_transposed = _quantized_input(x_MK, w_KN, None, impl)
    w, w_transposed = _quantized_weight(w_KN, impl)
    y_MN = fp8_matmul(x, w_transposed, out_dtype=x_MK.dtype, impl=impl)
    dtypes = _empty(x_MK), _empty(w_KN)
    return y_MN, (_named(x_transposed, "fp8_input"), _named(w, "fp8_weight"), dtypes)


def _linear_bwd(impl, residuals, dy_MN):
    x_transposed, w, (like_x, like_w) = residuals
    dy = quantize_tiles_both(dy_MN, impl=_quantizer(impl))
    dx_MK = fp8_matmul(dy.by_row, w, out_dtype=like_x.dtype, impl=impl)
    if like_w is None:
        return dx_MK, None
    dw_KN = fp8_matmul(x_transposed, dy.by_column, out_dtype=like_w.dtype, impl=impl)
    return dx_MK, dw_KN


_linear.defvjp(_linear_fwd, _linear_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped(x_MK: jax.Array, w_GKN: jax.Array | Quantized, sizes_G: jax.Array, impl: Impl):
    return _grouped_fwd(x_MK, w_GKN, sizes_G, impl)[0]


def _grouped_fwd(x_MK, w_GKN, sizes_G, impl):
    tiles = ragged_tiles(sizes_G, x_MK.shape[0])
    x, x_transposed = _quantized_input(x_MK, w_GKN, tiles, impl)
    w, w_transposed = _quantized_weight(w_GKN, impl)
    y_MN = fp8_grouped_matmul(x, w_transposed, sizes_G, out_dtype=x_MK.dtype, impl=impl)
    dtypes = _empty(x_MK), _empty(w_GKN)
    kept = _named(x_transposed, "fp8_input"), _named(w, "fp8_weight")
    return y_MN, (*kept, sizes_G, dtypes)


def _grouped_bwd(impl, residuals, dy_MN):
    x_transposed, w, sizes_G, (like_x, like_w) = residuals
    tiles = ragged_tiles(sizes_G, dy_MN.shape[0])
    dy = quantize_tiles_both(dy_MN, tiles, impl=_quantizer(impl))
    dx_MK = fp8_grouped_matmul(dy.by_row, w, sizes_G, out_dtype=like_x.dtype, impl=impl)
    if like_w is None:
        return dx_MK, None, None
    dw_GKN = fp8_grouped_wgrad(x_transposed, dy.by_column, tiles, out_dtype=like_w.dtype, impl=impl)
    return dx_MK, dw_GKN, None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _swiglu_linear(gate_MK: jax.Array, up_MK: jax.Array, w_KN: jax.Array | Quantized, impl: Impl):
    return _swiglu_linear_fwd(gate_MK, up_MK, w_KN, impl)[0]


def _swiglu_linear_fwd(gate_MK, up_MK, w_KN, impl):
    h = swiglu_quantize_tiles(gate_MK, up_MK, impl=_quantizer(impl))
    w, w_transposed = _quantized_weight(w_KN, impl)
    y_MN = fp8_matmul(h, w_transposed, out_dtype=gate_MK.dtype, impl=impl)
    return y_MN, (gate_MK, up_MK, _named(w, "fp8_weight"), _empty(w_KN))


def _swiglu_linear_bwd(impl, residuals, dy_MN):
    gate_MK, up_MK, w, like_w = residuals
    dy = quantize_tiles_both(dy_MN, impl=_quantizer(impl))
    dh_MK = fp8_matmul(dy.by_row, w, out_dtype=gate_MK.dtype, impl=impl)
    dw_KN = None
    if like_w is not None:
        h = swiglu_quantize_tiles(gate_MK, up_MK, axis=0, impl=_quantizer(impl))
        dw_KN = fp8_matmul(h, dy.by_column, out_dtype=like_w.dtype, impl=impl)
    return *jax.vjp(swiglu, gate_MK, up_MK)[1](dh_MK), dw_KN


_swiglu_linear.defvjp(_swiglu_linear_fwd, _swiglu_linear_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _swiglu_grouped(
    gate_MK: jax.Array,
    up_MK: jax.Array,
    w_GKN: jax.Array | Quantized,
    sizes_G: jax.Array,
    impl: Impl,
):
    return _swiglu_grouped_fwd(gate_MK, up_MK, w_GKN, sizes_G, impl)[0]


def _swiglu_grouped_fwd(gate_MK, up_MK, w_GKN, sizes_G, impl):
    tiles = ragged_tiles(sizes_G, gate_MK.shape[0])
    quantizer = _quantizer(impl)
    h = swiglu_quantize_tiles(gate_MK, up_MK, tiles, impl=quantizer)
    w, w_transposed = _quantized_weight(w_GKN, impl)
    y_MN = fp8_grouped_matmul(h, w_transposed, sizes_G, out_dtype=gate_MK.dtype, impl=impl)
    return y_MN, (gate_MK, up_MK, _named(w, "fp8_weight"), sizes_G, _empty(w_GKN))


def _swiglu_grouped_bwd(impl, residuals, dy_MN):
    gate_MK, up_MK, w, sizes_G, like_w = residuals
    tiles = ragged_tiles(sizes_G, dy_MN.shape[0])
    quantizer = _quantizer(impl)
    dy = quantize_tiles_both(dy_MN, tiles, impl=quantizer)
    dh_MK = fp8_grouped_matmul(dy.by_row, w, sizes_G, out_dtype=gate_MK.dtype, impl=impl)
    dw_GKN = None
    if like_w is not None:
        h = swiglu_quantize_tiles(gate_MK, up_MK, tiles, axis=0, impl=quantizer)
        columns = {"out_dtype": like_w.dtype, "impl": impl}
        dw_GKN = fp8_grouped_wgrad(h, dy.by_column, tiles, **columns)
    # Where a row is padding, its gradient is zero whatever gate and up hold there.
    own_M1 = (jnp.arange(len(dy_MN)) < jnp.sum(sizes_G))[:, None]
    gate_MK, up_MK = (jnp.where(own_M1, x, 0) for x in (gate_MK, up_MK))
    return *jax.vjp(swiglu, gate_MK, up_MK)[1](dh_MK), dw_GKN, None


_swiglu_grouped.defvjp(_swiglu_grouped_fwd, _swiglu_grouped_bwd)


def _named(q, name: str):
    return jax.tree.map(lambda x: checkpoint_name(x, name), q)
