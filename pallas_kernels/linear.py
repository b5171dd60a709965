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

A feed-forward network is one function, `fp8_swiglu_ffn`, so that what lies between its products
never reaches memory in more than FP8: ``silu(gate) * up`` is quantized where it is computed, in the
forward pass along one axis, and again in the backward pass along the other, from its inputs in FP8
(the paper recomputes it likewise), in the same pass over them in which their gradient is computed
and quantized along both.

Experts' tokens may come quantized, and the gradient of what they return, too, as both are sent to
them (section 3.3.3): `fp8_grouped_swiglu_ffn` and `fp8_grouped_swiglu_ffn_returned`.

What stays in higher precision is the caller's choice: in V3 the embedding, the output head, the
router, norms and the core of attention (section 3.3.1).
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels import backend
from pallas_kernels.backend import Impl
from pallas_kernels.grouped_matmul import fp8_grouped_matmul, fp8_grouped_wgrad
from pallas_kernels.matmul import fp8_matmul
from pallas_kernels.quantize import (
    BothWays,
    quantize_blocks_both,
    quantize_tiles,
    quantize_tiles_both,
    ragged_tiles,
    requantize_tiles,
    swiglu_gradient_quantize_tiles,
    swiglu_quantize_tiles,
    transpose_blocks,
)
from pallas_kernels.reference import E4M3, TILE, Quantized, RaggedTiles

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
    _check_input("fp8_linear", x_MK)
    if _one_by_one(w_KN):
        return jnp.concatenate([fp8_linear(x_MK, w, impl=impl) for w in w_KN], axis=1)
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
    _check_input("fp8_grouped_linear", x_MK)
    return _grouped(*backend.varying_alike(x_MK, w_GKN, group_sizes_G), impl)


def fp8_swiglu_ffn(
    x_MD: Float[Array, "M D"],
    w1_DF: Float[Array, "D F"] | Quantized,
    w3_DF: Float[Array, "D F"] | Quantized,
    w2_FD: Float[Array, "F N"] | Quantized,
    *,
    impl: Impl = "auto",
) -> Float[Array, "M N"]:
    """``(silu(x @ w1) * (x @ w3)) @ w2`` (Shazeer, 2020), products and gradients as `fp8_linear`'s.

    Args:
        x_MD: activations.
        w1_DF: gate's weight, usually the FP32 master copy; or values with block scales.
        w3_DF: up's.
        w2_FD: of the product of both.
        impl: as in `fp8_linear`.

    Returns:
        ``[M, N]`` in the dtype of ``x``.
    """
    _check_input("fp8_swiglu_ffn", x_MD)
    x_MD, weights = backend.varying_alike(x_MD, _FfnWeights(w1_DF, w3_DF, w2_FD))
    return _ffn(x_MD, None, weights, None, None, impl, False)[0]


def fp8_grouped_swiglu_ffn(
    x_MD: Float[Array, "M D"],
    factors_M: Float[Array, "M"],
    w1_GDF: Float[Array, "G D F"] | Quantized,
    w3_GDF: Float[Array, "G D F"] | Quantized,
    w2_GFD: Float[Array, "G F N"] | Quantized,
    group_sizes_G: Int[Array, "G"],
    *,
    quantized: Quantized | None = None,
    impl: Impl = "auto",
) -> Float[Array, "M N"]:
    """``factor * FFN(x)``, `fp8_swiglu_ffn` with matrices per group of rows.

    The factors are the experts' gates (V3 Eq. 12): the last product is linear, and multiplied
    before it they cost no pass over the output.

    Args:
        x_MD: as in `fp8_grouped_linear`.
        factors_M: of each row.
        w1_GDF: gate's matrix per group; or values with block scales.
        w3_GDF: up's.
        w2_GFD: of the product of both.
        group_sizes_G: as in `fp8_grouped_linear`.
        quantized: ``x_MD`` in 1x128 tiles, where it is quantized already, as tokens are that were
            sent in FP8. Then ``x_MD`` itself is not read; it says in which dtype the result and
            its own gradient are. Scales should be powers of two (see `requantize_tiles`).
        impl: as in `fp8_grouped_linear`.
    """
    _check_input("fp8_grouped_swiglu_ffn", x_MD)
    weights = _FfnWeights(w1_GDF, w3_GDF, w2_GFD)
    args = backend.varying_alike(x_MD, factors_M, weights, group_sizes_G, quantized)
    return _ffn(*args, impl, False)[0]


def fp8_grouped_swiglu_ffn_returned(
    x_MD: Float[Array, "M D"],
    factors_M: Float[Array, "M"],
    w1_GDF: Float[Array, "G D F"] | Quantized,
    w3_GDF: Float[Array, "G D F"] | Quantized,
    w2_GFD: Float[Array, "G F N"] | Quantized,
    group_sizes_G: Int[Array, "G"],
    *,
    quantized: Quantized | None = None,
    impl: Impl = "auto",
) -> tuple[Float[Array, "M N"], Quantized]:
    """`fp8_grouped_swiglu_ffn` for a gradient that is in FP8 when it comes.

    The second result is the way by which it comes. It holds zeros, which nobody need read; what
    autodiff takes for *its* gradient must be that of the first result, in 1x128 tiles along N, with
    scales that are powers of two (see `requantize_tiles`). The gradient of the first result itself
    is not read.
    """
    _check_input("fp8_grouped_swiglu_ffn", x_MD)
    weights = _FfnWeights(w1_GDF, w3_GDF, w2_GFD)
    args = backend.varying_alike(x_MD, factors_M, weights, group_sizes_G, quantized)
    return _ffn(*args, impl, True)


def as_bytes(values: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """E4M3 as bytes, as which it may be kept for a backward pass and used in the forward pass, too.

    JAX passes what `jax.checkpoint` does both with through ``reduce_precision``, which takes E4M3
    for a format of IEEE 754: its largest exponent for infinity, so that 256 and more become NaN.
    """
    return jax.lax.bitcast_convert_type(values, jnp.uint8)


def from_bytes(values: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """`as_bytes` undone."""
    return jax.lax.bitcast_convert_type(values, E4M3)


def _check_input(operation: str, x_MK: jax.Array) -> None:
    """Refuse activations that are no matrix of floating point numbers."""
    if x_MK.ndim != 2 or not jnp.issubdtype(x_MK.dtype, jnp.floating):
        raise ValueError(
            f"{operation}: x must be a floating point matrix [M, K], not "
            f"{x_MK.dtype}{list(x_MK.shape)}; reshape it"
        )


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


def _trained(*ws: Weights) -> bool:
    """Whether any of them has a gradient."""
    return not all(isinstance(w, Quantized) for w in ws)


def _quantized_input(x_MK, trained: bool, tiles, impl: Impl) -> tuple[Quantized, Quantized | None]:
    """By row for the forward product, by column for the weight's gradient, where it has one."""
    if not trained:
        return quantize_tiles(x_MK, impl=_quantizer(impl)), None
    return quantize_tiles_both(x_MK, tiles, impl=_quantizer(impl))


def _like(w: Weights) -> Any:
    """The weights without their rows, to say what their gradients are like; None: there is none."""
    return None if isinstance(w, Quantized) else jax.tree.map(lambda part: part[..., :0, :], w)


def _wgrad(
    product: Callable[..., jax.Array], x: Quantized | None, dy: Quantized | None, like: Any
) -> Any:
    """A weight's gradient, by the quantized transposes of x and dy, where it has one."""
    return None if like is None else product(x, dy, out_dtype=like.dtype)


def _wgrads(
    product: Callable[..., jax.Array], x: Quantized | None, dy: Quantized, like: Any
) -> Any:
    """The gradient of each weight by its own rows of the quantized transpose of dy."""
    parts, tree = jax.tree.flatten(like)
    grads, first = [], 0
    for part in parts:
        own = slice(first, first + part.shape[-1])
        columns = Quantized(dy.values[own], dy.scale[:, own])
        grads.append(_wgrad(product, x, columns, part))
        first = own.stop
    return jax.tree.unflatten(tree, grads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x_MK: jax.Array, w_KN: Weights, impl: Impl) -> jax.Array:
    return _linear_fwd(x_MK, w_KN, impl)[0]


def _linear_fwd(x_MK, w_KN, impl):
    x, x_transposed = _quantized_input(x_MK, _trained(w_KN), None, impl)
    w, w_transposed = _quantized_weight(w_KN, impl)
    y_MN = fp8_matmul(x, w_transposed, out_dtype=x_MK.dtype, impl=impl)
    like = x_MK[:0], _like(w_KN)
    return y_MN, (_named(x_transposed, "fp8_input"), _named(w, "fp8_weight"), like)


def _linear_bwd(impl, residuals, dy_MN):
    x_transposed, w, (like_x, like_w) = residuals
    dy = quantize_tiles_both(dy_MN, impl=_quantizer(impl))
    dx_MK = fp8_matmul(dy.by_row, w, out_dtype=like_x.dtype, impl=impl)
    wgrad = functools.partial(fp8_matmul, impl=impl)
    return dx_MK, _wgrads(wgrad, x_transposed, dy.by_column, like_w)


_linear.defvjp(_linear_fwd, _linear_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped(x_MK: jax.Array, w_GKN: jax.Array | Quantized, sizes_G: jax.Array, impl: Impl):
    return _grouped_fwd(x_MK, w_GKN, sizes_G, impl)[0]


def _grouped_fwd(x_MK, w_GKN, sizes_G, impl):
    tiles = ragged_tiles(sizes_G, len(x_MK))
    x, x_transposed = _quantized_input(x_MK, _trained(w_GKN), tiles, impl)
    w, w_transposed = _quantized_weight(w_GKN, impl)
    y_MN = fp8_grouped_matmul(x, w_transposed, sizes_G, out_dtype=x_MK.dtype, impl=impl)
    kept = _named(x_transposed, "fp8_input"), _named(w, "fp8_weight")
    return y_MN, (*kept, sizes_G, (x_MK[:0], _like(w_GKN)))


def _grouped_bwd(impl, residuals, dy_MN):
    x_transposed, w, sizes_G, (like_x, like_w) = residuals
    tiles = ragged_tiles(sizes_G, len(dy_MN))
    dy = quantize_tiles_both(dy_MN, tiles, impl=_quantizer(impl))
    dx_MK = fp8_grouped_matmul(dy.by_row, w, sizes_G, out_dtype=like_x.dtype, impl=impl)
    wgrad = functools.partial(fp8_grouped_wgrad, tiles=tiles, impl=impl)
    return dx_MK, _wgrad(wgrad, x_transposed, dy.by_column, like_w), None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


class _FfnWeights(NamedTuple):
    """Of a feed-forward network; or what there is of each, such as its gradient."""

    w1: Any
    w3: Any
    w2: Any


class _Products(NamedTuple):
    """The products of a layer: of all rows with one matrix, or by group with a matrix each."""

    sizes_G: jax.Array | None
    tiles: RaggedTiles | None
    impl: Impl

    def rows(self, x: Quantized, w: Quantized, dtype: Any) -> jax.Array:
        """Each row times the transpose of its matrix."""
        if self.sizes_G is None:
            return fp8_matmul(x, w, out_dtype=dtype, impl=self.impl)
        return fp8_grouped_matmul(x, w, self.sizes_G, out_dtype=dtype, impl=self.impl)

    def wgrad(self, x: Quantized, dy: Quantized, *, out_dtype: Any) -> jax.Array:
        """The gradient of the matrices, by the quantized transposes of x and dy."""
        if self.tiles is None:
            return fp8_matmul(x, dy, out_dtype=out_dtype, impl=self.impl)
        return fp8_grouped_wgrad(x, dy, self.tiles, out_dtype=out_dtype, impl=self.impl)


def _products(sizes_G: jax.Array | None, rows: int, impl: Impl) -> _Products:
    return _Products(sizes_G, None if sizes_G is None else ragged_tiles(sizes_G, rows), impl)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _ffn(
    x_MD: jax.Array,
    factors_M: jax.Array | None,
    weights: _FfnWeights,
    sizes_G: jax.Array | None,
    quantized: Quantized | None,
    impl: Impl,
    returned: bool,
) -> tuple[jax.Array, Quantized]:
    """The network, and the way by which its gradient comes if it is ``returned`` in FP8."""
    return _ffn_fwd(x_MD, factors_M, weights, sizes_G, quantized, impl, returned)[0]


def _ffn_fwd(x_MD, factors_M, weights, sizes_G, quantized, impl, returned):
    products = _products(sizes_G, len(x_MD), impl)
    first = weights.w1, weights.w3
    trained = _trained(*first)
    if quantized is None:
        x, x_transposed = _quantized_input(x_MD, trained, products.tiles, impl)
    else:
        x, x_transposed = quantized, None
    both = [_quantized_weight(w, impl) for w in (first if _one_by_one(first) else (first,))]
    gate_up = [products.rows(x, transposed, x_MD.dtype) for _, transposed in both]
    gate_up_MF = jnp.concatenate(gate_up, axis=1)
    h = swiglu_quantize_tiles(gate_up_MF, factors_M, products.tiles, impl=_quantizer(impl))
    w2, w2_transposed = _quantized_weight(weights.w2, impl)
    y_MN = products.rows(h, w2_transposed, x_MD.dtype)
    # What came quantized is turned round in the backward pass, and its name is the caller's affair.
    rows = None
    if quantized is not None and trained:
        rows = as_bytes(quantized.values), quantized.scale
    kept = rows, _named(x_transposed, "fp8_input")
    kept_weights = _named(([w for w, _ in both], w2), "fp8_weight")
    kept_gate_up = _named(quantize_tiles(gate_up_MF, impl=_quantizer(impl)), "fp8_gate_up")
    M, N = y_MN.shape
    way = Quantized(jnp.zeros((M, N), E4M3), jnp.zeros((-(-N // TILE), M), jnp.float32))
    way, _ = backend.varying_alike(way, y_MN)
    like = x_MD[:0], _FfnWeights(*map(_like, weights))
    return (y_MN, way), (*kept, kept_gate_up, factors_M, kept_weights, sizes_G, like)


def _ffn_bwd(impl, returned, residuals, gradients):
    rows, x_transposed, gate_up, factors_M, (ws, w2), sizes_G, (like_x, like) = residuals
    dy_MN, dy = gradients
    products, quantizer = _products(sizes_G, len(dy_MN), impl), _quantizer(impl)
    tiles, dtype = products.tiles, like_x.dtype
    if returned:
        dy = BothWays(dy, requantize_tiles(dy, tiles, impl=quantizer))
    else:
        dy = quantize_tiles_both(dy_MN, tiles, impl=quantizer)
    dh_MK = products.rows(dy.by_row, w2, dtype)
    which = dict(apart=len(ws) == 2, by_column=any(w is not None for w in like))
    inner = swiglu_gradient_quantize_tiles(
        gate_up, dh_MK, factors_M, tiles, impl=quantizer, **which
    )
    dx_MD, *more = (products.rows(d, w, dtype) for d, w in zip(inner.by_row, ws, strict=True))
    dx_MD = sum(more, dx_MD)
    dgate, dup, h = inner.by_column or (None, None, None)
    if rows is not None:
        q = Quantized(from_bytes(rows[0]), rows[1])
        x_transposed = requantize_tiles(q, tiles, impl=quantizer)
    operands = (x_transposed, dgate), (x_transposed, dup), (h, dy.by_column)
    pairs = zip(operands, like, strict=True)
    dweights = _FfnWeights(*(_wgrad(products.wgrad, *pair, part) for pair, part in pairs))
    return dx_MD, inner.factors_M, dweights, None, None


_ffn.defvjp(_ffn_fwd, _ffn_bwd)


def _named(q, name: str):
    return jax.tree.map(lambda x: checkpoint_name(x, name), q)
