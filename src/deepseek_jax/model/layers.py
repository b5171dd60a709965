"""What every block is made of: matmul with the precision policy, RMSNorm, SwiGLU, parameters."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from deepseek_jax import sharding
from deepseek_jax.config import ModelConfig, Precision
from deepseek_jax.sharding import LORA_A, LORA_B, SCALE
from deepseek_jax.types import Params, UserError
from pallas_kernels import backend
from pallas_kernels.linear import fp8_linear, fp8_swiglu_ffn
from pallas_kernels.reference import E4M3, TILE, Quantized

# A matrix as computation takes it: an array, or, where the products are in FP8 and the weights
# have been kept so, its values and the scales of its blocks, as they are.
Weight = jax.Array | Quantized
# The collection of variables with the weights of all layers, see `left_in_stacks`.
STACKS = "stacks"


def dot(
    equation: str, x: Float[Array, "..."], w: Float[Array, "..."], precision: Precision
) -> Float[Array, "..."]:
    """Einsum in the compute dtype, summed in the accumulation dtype."""
    dtype = precision.compute_dtype
    out = jnp.einsum(
        equation,
        x.astype(dtype),
        w.astype(dtype),
        preferred_element_type=jnp.dtype(precision.accumulate),
    )
    return out.astype(dtype)


def contract(
    x: Float[Array, "..."], w: Float[Array, "..."], contracted: int, accumulate: str
) -> Float[Array, "..."]:
    """``tensordot`` over the last ``contracted`` axes of x and the first of w, in ``accumulate``.

    One row alone XLA would multiply on a GPU as a vector, for which it first makes a float32 copy
    of the matrix: five times the bytes. With a second row it reads the matrix where it lies.
    """
    outer = x.shape[: x.ndim - contracted]
    alone = sharding.on_gpu() and x.dtype.itemsize == 2 and math.prod(outer) == 1
    if alone:
        x = x.reshape(1, *x.shape[len(outer) :])
        x = jnp.concatenate([x, jnp.zeros_like(x)])
    out = jnp.tensordot(x, w, contracted, preferred_element_type=jnp.dtype(accumulate))
    return out[0].reshape(*outer, *w.shape[contracted:]) if alone else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: jax.Array, w: jax.Array, contracted: int, accumulate: str) -> jax.Array:
    """`contract`, rounded to the dtype of x; so are its gradients.

    Autodiff would multiply the cotangent before it is rounded, in ``accumulate``: on an H100, a
    third of the speed of the same product in BF16.
    """
    return contract(x, w, contracted, accumulate).astype(x.dtype)


def _product_bwd(
    contracted: int, accumulate: str, saved: tuple[jax.Array, jax.Array], ct: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    outer = x.ndim - contracted
    outputs = tuple(range(contracted, w.ndim)), tuple(range(outer, ct.ndim))
    rows = tuple(range(outer))
    product = functools.partial(jnp.tensordot, preferred_element_type=jnp.dtype(accumulate))
    dx = product(ct, w, (outputs[1], outputs[0]))
    dw = product(x, ct, (rows, rows))
    return dx.astype(x.dtype), dw.astype(w.dtype)


_product.defvjp(
    lambda x, w, contracted, accumulate: (_product(x, w, contracted, accumulate), (x, w)),
    _product_bwd,
)


def fp8_kernels() -> bool:
    """Whether there are kernels here for products in FP8; elsewhere plain jnp stands in."""
    return backend.platform() == "tpu" or backend.on_hopper()


def linear(
    x: Float[Array, "..."],
    w: Float[Array, "..."] | Quantized,
    precision: Precision,
    contracted: int = 1,
) -> Float[Array, "..."]:
    """Multiply over the last ``contracted`` axes of x and the first of w; in FP8 if so asked."""
    return linears(x, (w,), precision, contracted)[0]


def linears(
    x: Float[Array, "..."], ws: Sequence[Weight], precision: Precision, contracted: int = 1
) -> list[Float[Array, "..."]]:
    """`linear` with several matrices of one x, which in FP8 is quantized once for all of them."""
    dtype = precision.compute_dtype
    x = x.astype(dtype)
    plain = [w.astype(dtype) for w in ws if not isinstance(w, Quantized)]
    if precision.matmuls == "compute" and len(plain) == len(ws):
        return [_product(x, w, contracted, precision.accumulate) for w in plain]
    rows, K = x.shape[: x.ndim - contracted], math.prod(x.shape[x.ndim - contracted :])

    def matrix(w: Weight) -> Weight:
        if isinstance(w, Quantized):
            stack = w.values.shape[: w.values.ndim - len(w.shape)]
            return w._replace(values=w.values.reshape(*stack, K, -1))
        return w.reshape(K, -1)

    y_MN = fp8_linear(x.reshape(-1, K), tuple(matrix(w) for w in ws))
    ends = itertools.accumulate(math.prod(w.shape[contracted:]) for w in ws[:-1])
    parts = jnp.split(y_MN, list(ends), axis=1)
    return [p.reshape(*rows, *w.shape[contracted:]) for p, w in zip(parts, ws, strict=True)]


def dequantized(
    w: Quantized, split: int, dtype: Any, first: tuple[Any, Any] = (0, 0)
) -> Float[Array, "..."]:
    """The matrices that FP8 values ``[*stack, *inputs, *outputs]`` and their scales stand for.

    ``W[r, c] = q[r, c] * scale[r // 128, c // 128]`` (V3 section 3.3.2), in float32, rounded once.

    Args:
        w: the values, and the scales of whole matrices, ``[*stack, blocks, blocks]``.
        split: where the outputs' axes begin.
        dtype: of the result.
        first: the row and the column of the whole matrix that the values begin with.
    """
    lead = w.scale.ndim - 2
    sizes = math.prod(w.shape[lead:split]), math.prod(w.shape[split:])
    scale = w.scale
    for axis, start, size in zip((lead, lead + 1), first, sizes, strict=True):
        each = jnp.repeat(scale, TILE, axis=axis)
        scale = jax.lax.dynamic_slice_in_dim(each, start, size, axis)
    values = w.values.reshape(scale.shape).astype(jnp.float32)
    return (values * scale).astype(dtype).reshape(w.shape)


def rms_norm(
    x: Float[Array, "*B D"], scale_D: Float[Array, "D"], eps: float
) -> Float[Array, "*B D"]:
    """X / sqrt(mean(x^2) + eps) * scale, in float32 (Zhang and Sennrich, 2019)."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inverse * scale_D).astype(x.dtype)


def swiglu(
    gate: Float[Array, "*B F"],
    up: Float[Array, "*B F"],
    precision: Precision,
    scale: Float[Array, "*B 1"] | None = None,
) -> Float[Array, "*B F"]:
    """silu(gate) * up (Shazeer, 2020), times ``scale``; in float32, rounded once."""
    out = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    if scale is not None:
        out *= scale
    return out.astype(precision.compute_dtype)


# What every rematerialisation policy leaves out: weights gathered for one layer's use.
GATHERED = "gathered_weight"


def low_rank(a: Any, b: Any, ndim: int) -> Any:
    """A B of LoRA (Hu et al., 2021) as an array of ``ndim`` axes; of NumPy or JAX arrays.

    ``a`` is ``[*lead, *inputs, r]`` and ``b`` ``[*lead, r, *outputs]``; ``lead`` are stacks of
    matrices (layers, experts), as many as the numbers of axes say.
    """
    lead = a.ndim + b.ndim - ndim - 2
    stack, r = a.shape[:lead], a.shape[-1]
    product = a.reshape(*stack, -1, r) @ b.reshape(*stack, r, -1)
    return product.reshape(*a.shape[:-1], *b.shape[lead + 1 :])


@jax.custom_vjp
def lookup(table_VD: Float[Array, "V D"], rows: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    """Rows of a table; what several places ask of one row is added up in float32.

    In bfloat16 it would come to a halt: 256 + 1 is 256.
    """
    return table_VD[rows]


def _lookup_bwd(
    saved: tuple[jax.Array, jax.Array], ct: jax.Array
) -> tuple[Float[Array, "V D"], None]:
    like, rows = saved
    total = jnp.zeros((like.shape[0], ct.shape[-1]), jnp.float32)
    return total.at[rows].add(ct.astype(jnp.float32)).astype(like.dtype), None


lookup.defvjp(lambda table_VD, rows: (lookup(table_VD, rows), (table_VD[:, :0], rows)), _lookup_bwd)


def tokens_whole(x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """x, laid out so that the numbers of a token lie together.

    For a single row XLA may choose the transposed layout on a GPU, for all that x is added to;
    every gather of tokens for their experts then reads a number at a time. With 32,768 tokens
    dispatch took 25 ms where eight rows of 4096 took 3.
    """
    if x_BTD.shape[0] == 1 < x_BTD.shape[1] and sharding.on_gpu():
        return with_layout_constraint(x_BTD, Layout((0, 1, 2)))
    return x_BTD


class LogicalAxes(nn.Partitioned):
    """A parameter boxed with the names of its logical axes (``sharding.COMPUTE`` and ``STORED``).

    Flax's own box takes the names for mesh axes and, under a mesh, constrains the value to them.
    """

    def unbox(self, apply_constraint: bool = True) -> Any:
        """The bare parameter."""
        del apply_constraint
        return self.value


class ParamModule(nn.Module):
    """A module that only declares parameters: shape, logical axes and initial value in one line.

    A layer, called, declares its parameters and returns its function: the weights are gathered
    once, however many parts of the batch the function is then applied to.
    """

    config: ModelConfig
    precision: Precision

    def weight(
        self,
        name: str,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        dtype: Any = None,
    ) -> Any:
        """A matrix drawn from N(0, initializer_range^2) (V3 section 4.2), in the compute dtype.

        Per device it comes whole along the axes that it is only stored by (``sharding.STORED``).
        One kept in FP8 is multiplied out here, or, where products are in FP8 and no ``dtype`` is
        asked for, comes as ``Quantized``. Where all layers have left theirs in ``STACKS``, the
        parameter is the number of the layer.
        """
        if self.has_variable(STACKS, name):
            return self._of_stack(name, shape, axes)
        init = nn.initializers.normal(self.config.initializer_range)
        stored = self._declare(name, init, shape, axes)
        adapted = self.has_variable("params", name + LORA_A)
        in_fp8 = self.precision.matmuls == "fp8" and dtype is None
        if stored.dtype == E4M3:
            as_it_is = in_fp8 and not adapted
            wanted = None if as_it_is else dtype or self.precision.compute_dtype
            w: Any = self._from_fp8(name, stored, shape, axes, wanted)
        else:
            # FP8 is rounded to from the master weights where they are at hand.
            here = stored.shape == sharding.local_shapes(axes, shape)[1]
            own = stored.dtype if in_fp8 and here else self.precision.compute_dtype
            w = sharding.gathered(stored, axes, shape, dtype or own)
        if adapted:
            delta = self._low_rank(name, axes, shape)
            w = (w.astype(jnp.float32) + delta).astype(w.dtype)
        return jax.tree.map(lambda x: checkpoint_name(x, GATHERED), w)

    def _from_fp8(
        self, name: str, stored: jax.Array, shape: tuple[int, ...], axes: Any, dtype: Any
    ) -> Weight:
        """A matrix that is kept in FP8, in ``dtype``; None: as it is, where that can be.

        That is where this device's part of it is whole blocks. What travels is FP8.
        """
        if not self.has_variable("params", name + SCALE):
            raise UserError(
                f"parameter {'/'.join((*self.path, name))} is in FP8, but {name + SCALE}, the "
                "scales of its blocks, is not there; load the weights with dtype='fp8', which "
                "gives both, or in bfloat16."
            )
        lead, split = sharding.matrix_axes(axes)
        scale = self._declare(
            name + SCALE,
            nn.initializers.ones_init(),
            _scale_shape(shape, axes),
            sharding.beside(axes, SCALE),
        )
        values = sharding.gathered(stored, axes, shape, E4M3)
        sizes = math.prod(values.shape[lead:split]), math.prod(values.shape[split:])
        names = axes[lead] or "", axes[split] or ""
        rows, columns = (
            sharding.part_index(n) * size for n, size in zip(names, sizes, strict=True)
        )
        divided = [size for n, size in zip(names, sizes, strict=True) if sharding.parts(n) > 1]
        if dtype is not None or any(size % TILE for size in divided):
            dtype = dtype or self.precision.compute_dtype
            return dequantized(Quantized(values, scale), split, dtype, (rows, columns))
        for axis, start, size in zip((lead, lead + 1), (rows, columns), sizes, strict=True):
            own = -(-size // TILE)
            scale = jax.lax.dynamic_slice_in_dim(scale, start // TILE, own, axis)
        return Quantized(values, scale)

    def _of_stack(self, name: str, shape: tuple[int, ...], axes: Any) -> Quantized:
        """This layer's entry of the stack of all layers, where it lies."""
        stack: Any = self.get_variable(STACKS, name)
        self._check(name, stack.values.shape[1:], (shape,))
        self._check(name + SCALE, stack.scale.shape[1:], (_scale_shape(shape, axes),))
        number: Any = self.get_variable("params", name)
        return stack._replace(layer=number)

    def _low_rank(
        self, name: str, axes: tuple[str | None, ...], shape: tuple[int, ...]
    ) -> jax.Array:
        """The product to add to a matrix: its halves are stored as it is, and gathered like it."""
        a: Any = self.get_variable("params", name + LORA_A)
        b: Any = self.get_variable("params", name + LORA_B)
        (lead, split), r = sharding.matrix_axes(axes), a.shape[-1]
        wholes = (*shape[:split], r), (*shape[:lead], r, *shape[split:])
        a, b = (
            sharding.gathered(half, sharding.beside(axes, end), whole, jnp.float32)
            for half, end, whole in zip((a, b), (LORA_A, LORA_B), wholes, strict=True)
        )
        return low_rank(a, b, len(shape))

    def scale(self, name: str, size: int) -> jax.Array:
        """The gain of an RMSNorm, initially 1."""
        return self._declare(name, nn.initializers.ones_init(), (size,), ("norm",))

    def _declare(self, name: str, init: Any, shape: tuple[int, ...], axes: Any) -> jax.Array:
        dtype = self.precision.param_dtype
        if not self.has_variable("params", name):
            boxed: Any = self.param(name, lambda key: LogicalAxes(init(key, shape, dtype), axes))
            return boxed  # Flax has taken it out of its box
        # Not through ``self.param``, which would compare a device's part with the whole shape.
        value: Any = self.get_variable("params", name)
        self._check(name, value.shape, sharding.local_shapes(axes, shape))
        return value

    def _check(
        self, name: str, shape: tuple[int, ...], expected: Sequence[tuple[int, ...]]
    ) -> None:
        if shape not in expected:
            raise UserError(
                f"parameter {'/'.join((*self.path, name))} has shape {shape}, not "
                f"{expected[0]}; do the weights belong to this config?"
            )


def left_in_stacks(params: Params) -> tuple[Params, Params]:
    """Parameters of all layers for a scan over layers, and what goes to each of them whole.

    A scan cuts every layer's slice out of every parameter. Where a kernel multiplies it, that is a
    copy, of as many bytes as the product reads. So stacks of FP8 matrices are left out, as the
    collection ``STACKS``, and the scan cuts the number of its layer for each instead. Not so what
    is not multiplied as it is: matrices with an adapter, and ``wkv_b``, which decoding absorbs.
    """
    sliced, stacks = {}, {}
    for name, x in params.items():
        if isinstance(x, dict):
            sliced[name], stacks[name] = left_in_stacks(x)
            continue
        scaled = x.dtype == E4M3 and name + SCALE in params
        if scaled and name != "wkv_b" and name + LORA_A not in params:
            sliced[name] = jnp.arange(len(x), dtype=jnp.int32)
            stacks[name] = Quantized(x, params[name + SCALE])
        else:
            sliced[name] = x
    return sliced, stacks


def _scale_shape(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> tuple[int, ...]:
    """Of the scales of a parameter's blocks."""
    lead, split = sharding.matrix_axes(axes)
    sides = math.prod(shape[lead:split]), math.prod(shape[split:])
    return (*shape[:lead], *(-(-side // TILE) for side in sides))


class FeedForward(ParamModule):
    """Dense SwiGLU FFN, w2(silu(w1 x) * w3 x); also the shared experts, side by side as one."""

    width: int = 0

    @nn.compact
    def __call__(self) -> Callable[[jax.Array], jax.Array]:
        """The FFN as a function of ``x_BTD``, applied to every position."""
        D, F = self.config.hidden_size, self.width
        w1_DF = self.weight("w1", (D, F), ("embed", "mlp"))
        w3_DF = self.weight("w3", (D, F), ("embed", "mlp"))
        w2_FD = self.weight("w2", (F, D), ("mlp", "embed"))

        @jax.named_scope("ffn")
        def ffn(x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
            if self.precision.matmuls == "fp8":
                x_MD = x_BTD.astype(self.precision.compute_dtype).reshape(-1, D)
                out = fp8_swiglu_ffn(x_MD, w1_DF, w3_DF, w2_FD).reshape(x_BTD.shape)
            else:
                gate, up = (
                    checkpoint_name(linear(x_BTD, w, self.precision), "ffn_gate_up")
                    for w in (w1_DF, w3_DF)
                )
                out = linear(swiglu(gate, up, self.precision), w2_FD, self.precision)
            return sharding.psum(out, "mlp")

        return ffn
