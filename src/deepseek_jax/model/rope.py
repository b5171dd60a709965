"""Rotary position embedding (Su et al., 2021) with YaRN (Peng et al., 2023; V3 section 4.3).

Pairs are split in halves (element i with i + P/2). Released checkpoints pair neighbours
(2i with 2i + 1); ``convert.py`` permutes their rows once, so nothing is shuffled here.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from deepseek_jax.config import ModelConfig, Yarn, yarn_mscale


def inverse_frequencies(config: ModelConfig) -> Float[np.ndarray, "p"]:
    """Radians per position of each pair: theta^(-2i/P), stretched by YaRN where it is on."""
    P = config.qk_rope_head_dim
    freq = config.rope_theta ** (-np.arange(0, P, 2, dtype=np.float64) / P)
    if config.rope_scaling is not None:
        freq = _yarn(freq, config.rope_theta, P, config.rope_scaling)
    return freq.astype(np.float32)


def _yarn(freq: np.ndarray, theta: float, P: int, yarn: Yarn) -> np.ndarray:
    """Interpolate slow pairs by ``factor``, keep fast ones, ramp linearly between."""

    def pair_turning(rotations: float) -> float:
        """The pair that makes so many full rotations over the original context."""
        context = yarn.original_max_position_embeddings
        return P * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), P - 1)
    # K2 has beta_fast = beta_slow; the released code then widens an empty ramp by this much.
    width = (high - low) or 0.001
    ramp = np.clip((np.arange(P // 2) - low) / width, 0, 1)
    return freq / yarn.factor * ramp + freq * (1 - ramp)


def rope_tables(
    config: ModelConfig, positions_BT: Int[Array, "B T"]
) -> tuple[Float[Array, "B T p"], Float[Array, "B T p"]]:
    """Cosines and sines of every position, float32 (bfloat16 angles lose position past 256)."""
    angles = positions_BT[..., None].astype(jnp.float32) * inverse_frequencies(config)
    magnitude = 1.0
    if (yarn := config.rope_scaling) is not None:
        magnitude = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(
            yarn.factor, yarn.mscale_all_dim
        )
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def apply_rope(
    x_BTNP: Float[Array, "B T N P"], cos_BTp: Float[Array, "B T p"], sin_BTp: Float[Array, "B T p"]
) -> Float[Array, "B T N P"]:
    """Rotate each pair (x1, x2) by its angle; p = P/2. Computed in float32."""
    x1, x2 = jnp.split(x_BTNP.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTp[:, :, None], sin_BTp[:, :, None]
    rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return rotated.astype(x_BTNP.dtype)


@jax.custom_vjp
def rotate_last(
    x_BTNX: Float[Array, "B T N X"], cos_BTp: Float[Array, "B T p"], sin_BTp: Float[Array, "B T p"]
) -> Float[Array, "B T N X"]:
    """Every head with its last 2p numbers rotated and those before them as they are.

    These are not moved: what is rotated is written over what it was made of, where nobody else
    wants that. The gradient is the rotation back, likewise: by itself autodiff pads the halves'
    gradients to full width and adds them up. Positions have no gradient.
    """
    first = x_BTNX.shape[-1] - 2 * cos_BTp.shape[-1]
    rotated = apply_rope(x_BTNX[..., first:], cos_BTp, sin_BTp)
    return jax.lax.dynamic_update_slice_in_dim(x_BTNX, rotated, first, axis=-1)


def _rotate_last_forward(x_BTNX, cos_BTp, sin_BTp):
    return rotate_last(x_BTNX, cos_BTp, sin_BTp), (cos_BTp, sin_BTp)


def _rotate_last_backward(tables, gradient_BTNX):
    cos_BTp, sin_BTp = tables
    return rotate_last(gradient_BTNX, cos_BTp, -sin_BTp), None, None


rotate_last.defvjp(_rotate_last_forward, _rotate_last_backward)
