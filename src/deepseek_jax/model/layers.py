"""What every block is made of: matmul with the precision policy, RMSNorm, SwiGLU, parameters."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from deepseek_jax import sharding
from deepseek_jax.config import ModelConfig, Precision
from deepseek_jax.types import UserError
from pallas_kernels.linear import fp8_linear, fp8_swiglu_linear


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


def linear(
    x: Float[Array, "..."], w: Float[Array, "..."], precision: Precision, contracted: int = 1
) -> Float[Array, "..."]:
    """Multiply over the last ``contracted`` axes of x and the first of w; in FP8 if so asked."""
    if precision.matmuls == "compute":
        dtype, accumulate = precision.compute_dtype, jnp.dtype(precision.accumulate)
        out = jnp.tensordot(
            x.astype(dtype), w.astype(dtype), contracted, preferred_element_type=accumulate
        )
        return out.astype(dtype)
    rows, columns = x.shape[: x.ndim - contracted], w.shape[contracted:]
    K = math.prod(w.shape[:contracted])
    x_MK = x.astype(precision.compute_dtype).reshape(-1, K)
    return fp8_linear(x_MK, w.reshape(K, -1)).reshape(*rows, *columns)


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


# Beside a matrix "w" may lie "w_lora_a" and "w_lora_b", whose product is added where it is used.
LORA_A, LORA_B = "_lora_a", "_lora_b"


def low_rank(a: Any, b: Any, ndim: int) -> Any:
    """A B of LoRA (Hu et al., 2021) as an array of ``ndim`` axes; of NumPy or JAX arrays.

    ``a`` is ``[*lead, *inputs, r]`` and ``b`` ``[*lead, r, *outputs]``; ``lead`` are stacks of
    matrices (layers, experts), as many as the numbers of axes say.
    """
    lead = a.ndim + b.ndim - ndim - 2
    stack, r = a.shape[:lead], a.shape[-1]
    product = a.reshape(*stack, -1, r) @ b.reshape(*stack, r, -1)
    return product.reshape(*a.shape[:-1], *b.shape[lead + 1 :])


class LogicalAxes(nn.Partitioned):
    """A parameter boxed with the names of its logical axes (``sharding.RULES``).

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
    ) -> jax.Array:
        """A matrix drawn from N(0, initializer_range^2) (V3 section 4.2), in the compute dtype.

        Per device it comes whole along the axes that it is only stored by (``sharding.STORED``).
        """
        init = nn.initializers.normal(self.config.initializer_range)
        stored = self._declare(name, init, shape, axes)
        if dtype is None:
            # FP8 is rounded to from the master weights where they are at hand.
            here = stored.shape == sharding.local_shapes(axes, shape)[1]
            in_fp8 = self.precision.matmuls == "fp8"
            dtype = stored.dtype if in_fp8 and here else self.precision.compute_dtype
        w = sharding.gathered(stored, axes, shape, dtype)
        if self.has_variable("params", name + LORA_A):
            delta = self._low_rank(name, axes, shape)
            w = (w.astype(jnp.float32) + delta).astype(w.dtype)
        return checkpoint_name(w, GATHERED)

    def _low_rank(
        self, name: str, axes: tuple[str | None, ...], shape: tuple[int, ...]
    ) -> jax.Array:
        """The product to add to a matrix: its halves are stored as it is, and gathered like it."""
        a: Any = self.get_variable("params", name + LORA_A)
        b: Any = self.get_variable("params", name + LORA_B)
        lead, split, r = a.ndim + b.ndim - len(shape) - 2, a.ndim - 1, a.shape[-1]
        a = sharding.gathered(a, (*axes[:split], None), (*shape[:split], r), jnp.float32)
        names, whole = (*axes[:lead], None, *axes[split:]), (*shape[:lead], r, *shape[split:])
        return low_rank(a, sharding.gathered(b, names, whole, jnp.float32), len(shape))

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
        expected = sharding.local_shapes(axes, shape)
        if value.shape not in expected:
            raise UserError(
                f"parameter {'/'.join((*self.path, name))} has shape {value.shape}, not "
                f"{expected[0]}; do the weights belong to this config?"
            )
        return value


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

        def ffn(x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
            gate = checkpoint_name(linear(x_BTD, w1_DF, self.precision), "ffn_gate")
            up = checkpoint_name(linear(x_BTD, w3_DF, self.precision), "ffn_up")
            if self.precision.matmuls == "fp8":
                gate_MF, up_MF = (a.reshape(-1, a.shape[-1]) for a in (gate, up))
                out = fp8_swiglu_linear(gate_MF, up_MF, w2_FD).reshape(x_BTD.shape)
            else:
                out = linear(swiglu(gate, up, self.precision), w2_FD, self.precision)
            return sharding.psum(out, "mlp")

        return ffn
