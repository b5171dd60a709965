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
and the quantized weight. Only tokens that arrive in FP8 leave no choice: their tiles are kept, and
turned round. SwiGLU's inputs are kept in tiles of FP8, too (section 3.3.3). For the policies of
`jax.checkpoint` they carry the names ``fp8_input``, ``fp8_weight`` and ``fp8_gate_up``. Weights in
FP32 are quantized from FP32 and get an FP32 gradient.

Weights that multiply one x may be given together, as those of ``gate`` and ``up`` in a feed-forward
network are: x is then quantized once, and the products with all of them are one.

The down projection of a feed-forward network takes ``gate`` and ``up`` instead of x, so that
``silu(gate) * up`` never reaches memory: it is quantized where it is computed, in the forward pass
along one axis, and again in the backward pass along the other, from the inputs in FP8 (the paper
recomputes it likewise).

The gradient of what experts return may come quantized, too, as it is sent to them (section 3.3.3):
`fp8_grouped_swiglu_linear_returned`.

What stays in higher precision is the caller's choice: in V3 the embedding, the output head, the
router, norms and the core of attention (section 3.3.1).
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeGuard

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels import backend
from pallas_kernels.grouped_matmul import fp8_grouped_matmul, fp8_grouped_wgrad
from pallas_kernels.matmul import fp8_matmul
from pallas_kernels.quantize import (
    BothWays,
    quantize_blocks_both,
    quantize_tiles,
    quantize_tiles_both,
    ragged_tiles,
    requantize_tiles,
    swiglu_quantize_tiles,
    transpose_blocks,
)
from pallas_kernels.reference import E4M3, TILE, Quantized, dequantize, swiglu

Impl = Literal["auto", "hopper", "tpu", "reference"]
Weights = jax.Array | Quantized | tuple[jax.Array | Quantized, ...]


def fp8_linear(
    x_MK: Float[Array, "M K"],
    w_KN: Float[Array, "K _"] | Quantized | tuple[Float[Array, "K _"] | Quantized, ...],
    *,
    impl: Impl = "auto",
) -> Float[Array, "M N"]:
    """``x @ w`` with the forward product and both gradients in FP8.

    Args:
        x_MK: activations.
        w_KN: the weight, usually the FP32 master copy; or ``[K, N]`` values with block scales. Of
            several weights the results stand side by side.
        impl: of the products, as in `fp8_matmul`; ``reference`` also for quantization, which
            otherwise takes its kernel where one fits.

    Returns:
        ``[M, N]`` in the dtype of ``x``.
    """
    if _one_by_one(w_KN):
        return jnp.concatenate([fp8_linear(x_MK, w, impl=impl) for w in w_KN], axis=1)
    return _linear(*backend.varying_alike(x_MK, w_KN), impl)


def fp8_grouped_linear(
    x_MK: Float[Array, "M K"],
    w_GKN: Float[Array, "G K _"] | Quantized | tuple[Float[Array, "G K _"] | Quantized, ...],
    group_sizes_G: Int[Array, "G"],
    *,
    quantized: Quantized | None = None,
    impl: Impl = "auto",
) -> Float[Array, "M N"]:
    """`grouped_matmul` with the forward product and both gradients in FP8.

    Args:
        x_MK: rows in group order; those past the last group are padding, of zero result and
            gradient, which affects nothing.
        w_GKN: one matrix per group; or values with block scales; or several, as in `fp8_linear`.
        group_sizes_G: rows of each group, 0 allowed; the sum may be less than M.
        quantized: ``x_MK`` in 1x128 tiles, where it is quantized already, as tokens are that were
            sent in FP8. Then ``x_MK`` itself is not read; it says in which dtype the result and
            its own gradient are. Scales should be powers of two (see `requantize_tiles`).
        impl: of the products; ``hopper`` needs bfloat16 activations, and, like ``tpu``, K and N
            that are multiples of 128. ``reference`` does G times the work.

    Returns:
        ``[M, N]`` in the dtype of ``x``.
    """
    if _one_by_one(w_GKN):
        layer = functools.partial(fp8_grouped_linear, quantized=quantized, impl=impl)
        return jnp.concatenate([layer(x_MK, w, group_sizes_G) for w in w_GKN], axis=1)
    return _grouped(*backend.varying_alike(x_MK, w_GKN, group_sizes_G, quantized), impl)


def fp8_swiglu_linear(
    gate_up_MF: Float[Array, "M F"], w_KN: Float[Array, "K N"] | Quantized, *, impl: Impl = "auto"
) -> Float[Array, "M N"]:
    """`fp8_linear` of ``silu(gate) * up``, which is recomputed in the backward pass.

    ``gate`` and ``up`` are the halves of ``gate_up_MF``.
    """
    return _swiglu_linear(*backend.varying_alike(gate_up_MF, w_KN), impl)


def fp8_grouped_swiglu_linear(
    gate_up_MF: Float[Array, "M F"],
    factors_M: Float[Array, "M"],
    w_GKN: Float[Array, "G K N"] | Quantized,
    group_sizes_G: Int[Array, "G"],
    *,
    impl: Impl = "auto",
) -> Float[Array, "M N"]:
    """`fp8_grouped_linear` of ``factor * silu(gate) * up``, recomputed in the backward pass.

    The factors are the experts' gates (V3 Eq. 12): the product is linear, and multiplied where it
    is made they cost no pass over the output.
    """
    args = backend.varying_alike(gate_up_MF, factors_M, w_GKN, group_sizes_G)
    return _swiglu_grouped(*args, impl, False)[0]


def fp8_grouped_swiglu_linear_returned(
    gate_up_MF: Float[Array, "M F"],
    factors_M: Float[Array, "M"],
    w_GKN: Float[Array, "G K N"] | Quantized,
    group_sizes_G: Int[Array, "G"],
    *,
    impl: Impl = "auto",
) -> tuple[Float[Array, "M N"], Quantized]:
    """`fp8_grouped_swiglu_linear` for a gradient that is in FP8 when it comes.

    The second result is the way by which it comes. It holds zeros, which nobody need read; what
    autodiff takes for *its* gradient must be that of the first result, in 1x128 tiles along N, with
    scales that are powers of two (see `requantize_tiles`). The gradient of the first result itself
    is not read.
    """
    args = backend.varying_alike(gate_up_MF, factors_M, w_GKN, group_sizes_G)
    return _swiglu_grouped(*args, impl, True)


def as_bytes(values: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """E4M3 as bytes, as which it may be kept for a backward pass and used in the forward pass, too.

    JAX passes what `jax.checkpoint` does both with through ``reduce_precision``, which takes E4M3
    for a format of IEEE 754: its largest exponent for infinity, so that 256 and more become NaN.
    """
    return jax.lax.bitcast_convert_type(values, jnp.uint8)


def from_bytes(values: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """`as_bytes` undone."""
    return jax.lax.bitcast_convert_type(values, E4M3)


def _one_by_one(w: Weights) -> TypeGuard[tuple[jax.Array | Quantized, ...]]:
    """Whether several weights cannot be multiplied as one.

    That is if a block of their scales would belong to two, and for weights that come quantized:
    beside one another they would have to be copied.
    """
    return (
        isinstance(w, tuple)
        and not isinstance(w, Quantized)
        and not (
            all(isinstance(part, jax.Array) for part in w)
            and all(part.shape[-1] % TILE == 0 for part in w[:-1])
        )
    )


def _quantizer(impl: Impl) -> Literal["auto", "reference"]:
    return "reference" if impl == "reference" else "auto"


def _quantized_weight(w: Weights, impl: Impl) -> tuple[Quantized, Quantized]:
    """A weight and its transpose; what is quantized already stays as it is."""
    if isinstance(w, Quantized):
        return w, transpose_blocks(w)
    return quantize_blocks_both(w, impl=_quantizer(impl))


def _quantized_input(x_MK, w: Weights, tiles, impl: Impl) -> tuple[Quantized, Quantized | None]:
    """By row for the forward product, by column for the weight's gradient, where it has one."""
    if isinstance(w, Quantized):
        return quantize_tiles(x_MK, impl=_quantizer(impl)), None
    return quantize_tiles_both(x_MK, tiles, impl=_quantizer(impl))


def _kept_gate_up(gate_up_MF: jax.Array, impl: Impl) -> Quantized:
    """SwiGLU's inputs as the backward pass gets them."""
    return _named(quantize_tiles(gate_up_MF, impl=_quantizer(impl)), "fp8_gate_up")


def _like(w: Weights) -> Any:
    """The weights without their rows, to say what their gradients are like; None: there is none."""
    return None if isinstance(w, Quantized) else jax.tree.map(lambda part: part[..., :0, :], w)


def _wgrads(product: Callable[..., jax.Array], dy: Quantized, like: Any) -> Any:
    """The gradient of each weight by its own rows of the quantized transpose of dy."""
    parts, tree = jax.tree.flatten(like)
    grads, first = [], 0
    for part in parts:
        own = slice(first, first + part.shape[-1])
        columns = Quantized(dy.values[own], dy.scale[:, own])
        grads.append(product(columns, out_dtype=part.dtype))
        first = own.stop
    return jax.tree.unflatten(tree, grads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x_MK: jax.Array, w_KN: Weights, impl: Impl) -> jax.Array:
    return _linear_fwd(x_MK, w_KN, impl)[0]


def _linear_fwd(x_MK, w_KN, impl):
    x, x_transposed = _quantized_input(x_MK, w_KN, None, impl)
    w, w_transposed = _quantized_weight(w_KN, impl)
    y_MN = fp8_matmul(x, w_transposed, out_dtype=x_MK.dtype, impl=impl)
    like = x_MK[:0], _like(w_KN)
    return y_MN, (_named(x_transposed, "fp8_input"), _named(w, "fp8_weight"), like)


def _linear_bwd(impl, residuals, dy_MN):
    x_transposed, w, (like_x, like_w) = residuals
    dy = quantize_tiles_both(dy_MN, impl=_quantizer(impl))
    dx_MK = fp8_matmul(dy.by_row, w, out_dtype=like_x.dtype, impl=impl)
    wgrad = functools.partial(fp8_matmul, x_transposed, impl=impl)
    return dx_MK, _wgrads(wgrad, dy.by_column, like_w)


_linear.defvjp(_linear_fwd, _linear_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _grouped(
    x_MK: jax.Array, w_GKN: Weights, sizes_G: jax.Array, quantized: Quantized | None, impl: Impl
):
    return _grouped_fwd(x_MK, w_GKN, sizes_G, quantized, impl)[0]


def _grouped_fwd(x_MK, w_GKN, sizes_G, quantized, impl):
    if quantized is None:
        tiles = ragged_tiles(sizes_G, x_MK.shape[0])
        x, x_transposed = _quantized_input(x_MK, w_GKN, tiles, impl)
    else:
        x, x_transposed = quantized, None
    w, w_transposed = _quantized_weight(w_GKN, impl)
    y_MN = fp8_grouped_matmul(x, w_transposed, sizes_G, out_dtype=x_MK.dtype, impl=impl)
    # What came quantized is turned round in the backward pass, and its name is the caller's affair.
    rows = None
    if quantized is not None and not isinstance(w_GKN, Quantized):
        rows = as_bytes(quantized.values), quantized.scale
    kept = rows, _named(x_transposed, "fp8_input"), _named(w, "fp8_weight")
    return y_MN, (*kept, sizes_G, (x_MK[:0], _like(w_GKN)))


def _grouped_bwd(impl, residuals, dy_MN):
    rows, x_transposed, w, sizes_G, (like_x, like_w) = residuals
    tiles = ragged_tiles(sizes_G, dy_MN.shape[0])
    dy = quantize_tiles_both(dy_MN, tiles, impl=_quantizer(impl))
    dx_MK = fp8_grouped_matmul(dy.by_row, w, sizes_G, out_dtype=like_x.dtype, impl=impl)
    if rows is not None:
        q = Quantized(from_bytes(rows[0]), rows[1])
        x_transposed = requantize_tiles(q, tiles, impl=_quantizer(impl))
    wgrad = functools.partial(fp8_grouped_wgrad, x_transposed, tiles=tiles, impl=impl)
    return dx_MK, _wgrads(wgrad, dy.by_column, like_w), None, None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _swiglu_linear(gate_up_MF: jax.Array, w_KN: jax.Array | Quantized, impl: Impl):
    return _swiglu_linear_fwd(gate_up_MF, w_KN, impl)[0]


def _swiglu_linear_fwd(gate_up_MF, w_KN, impl):
    h = swiglu_quantize_tiles(gate_up_MF, impl=_quantizer(impl))
    w, w_transposed = _quantized_weight(w_KN, impl)
    y_MN = fp8_matmul(h, w_transposed, out_dtype=gate_up_MF.dtype, impl=impl)
    kept = _kept_gate_up(gate_up_MF, impl), _named(w, "fp8_weight")
    return y_MN, (*kept, (gate_up_MF[:0], _like(w_KN)))


def _swiglu_linear_bwd(impl, residuals, dy_MN):
    gate_up, w, (like_x, like_w) = residuals
    gate_up_MF = dequantize(gate_up).astype(like_x.dtype)
    dy = quantize_tiles_both(dy_MN, impl=_quantizer(impl))
    dh_MK = fp8_matmul(dy.by_row, w, out_dtype=gate_up_MF.dtype, impl=impl)
    h = swiglu_quantize_tiles(gate_up, axis=0, impl=_quantizer(impl))
    dw_KN = _wgrads(functools.partial(fp8_matmul, h, impl=impl), dy.by_column, like_w)
    return *jax.vjp(swiglu, gate_up_MF)[1](dh_MK), dw_KN


_swiglu_linear.defvjp(_swiglu_linear_fwd, _swiglu_linear_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _swiglu_grouped(
    gate_up_MF: jax.Array,
    factors_M: jax.Array,
    w_GKN: jax.Array | Quantized,
    sizes_G: jax.Array,
    impl: Impl,
    returned: bool,
) -> tuple[jax.Array, Quantized]:
    """The product, and the way by which its gradient comes if it is ``returned`` in FP8."""
    return _swiglu_grouped_fwd(gate_up_MF, factors_M, w_GKN, sizes_G, impl, returned)[0]


def _swiglu_grouped_fwd(gate_up_MF, factors_M, w_GKN, sizes_G, impl, returned):
    tiles = ragged_tiles(sizes_G, gate_up_MF.shape[0])
    h = swiglu_quantize_tiles(gate_up_MF, factors_M, tiles, impl=_quantizer(impl))
    w, w_transposed = _quantized_weight(w_GKN, impl)
    y_MN = fp8_grouped_matmul(h, w_transposed, sizes_G, out_dtype=gate_up_MF.dtype, impl=impl)
    kept = _kept_gate_up(gate_up_MF, impl), factors_M, _named(w, "fp8_weight"), sizes_G
    M, N = y_MN.shape
    way = Quantized(jnp.zeros((M, N), E4M3), jnp.zeros((-(-N // TILE), M), jnp.float32))
    return (y_MN, way), (*kept, (gate_up_MF[:0], _like(w_GKN)))


def _swiglu_grouped_bwd(impl, returned, residuals, gradients):
    gate_up, factors_M, w, sizes_G, (like_x, like_w) = residuals
    gate_up_MF = dequantize(gate_up).astype(like_x.dtype)
    dy_MN, dy = gradients
    tiles = ragged_tiles(sizes_G, len(dy_MN))
    quantizer = _quantizer(impl)
    if returned:
        dy = BothWays(dy, requantize_tiles(dy, tiles, impl=quantizer))
    else:
        dy = quantize_tiles_both(dy_MN, tiles, impl=quantizer)
    dh_MK = fp8_grouped_matmul(dy.by_row, w, sizes_G, out_dtype=gate_up_MF.dtype, impl=impl)
    h = swiglu_quantize_tiles(gate_up, factors_M, tiles, axis=0, impl=quantizer)
    wgrad = functools.partial(fp8_grouped_wgrad, h, tiles=tiles, impl=impl)
    dw_GKN = _wgrads(wgrad, dy.by_column, like_w)
    # Where a row is padding, its gradient is zero whatever gate and up hold there.
    own_M = jnp.arange(len(dy_MN)) < jnp.sum(sizes_G)
    gate_up_MF = jnp.where(own_M[:, None], gate_up_MF, 0)
    factors_M = jnp.where(own_M, factors_M, 0)
    return *jax.vjp(swiglu, gate_up_MF, factors_M)[1](dh_MK), dw_GKN, None


_swiglu_grouped.defvjp(_swiglu_grouped_fwd, _swiglu_grouped_bwd)


def _named(q, name: str):
    return jax.tree.map(lambda x: checkpoint_name(x, name), q)
