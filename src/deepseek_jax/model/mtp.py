"""Multi-token prediction (V3 section 2.2, Eqs. 21-25)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from deepseek_jax import sharding
from deepseek_jax.model.attention import Positions
from deepseek_jax.model.layers import ParamModule, linear, rms_norm
from deepseek_jax.model.moe import LayerInput, LayerReport
from deepseek_jax.types import KVCache


def shift_left(x_BT: Int[Array, "B T"] | Float[Array, "B T"], by: int) -> Array:
    """x[i + by] at position i; zeros where the row ends (on whichever device that is)."""
    if by == 0:
        return x_BT
    if sharding.parts("sequence") == 1:
        return jnp.pad(x_BT[:, by:], ((0, 0), (0, by)))
    return jnp.concatenate([x_BT[:, by:], sharding.from_next(x_BT[:, :by], "sequence")], axis=1)


class MTPModule(ParamModule):
    """Module k: from depth k-1's hidden state and the embedding of token i+k, to depth k's.

    The embedding and the output head are the main model's. The chain hands on *normed* states:
    depth 1 takes the main model's state after its final norm, depth k that of depth k-1 after its
    own, as transformers runs the released weights. The report does not say; torchtitan and
    MaxText take the states before the norm.
    """

    block: Callable[..., nn.Module] = nn.Module

    @nn.compact
    def __call__(
        self,
        h_BTD: Float[Array, "B T D"],
        next_embedding_BTD: Float[Array, "B T D"],
        layer: LayerInput,
        positions: Positions,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None, LayerReport]:
        """Normed h of this depth, for the shared head and depth k+1; cache; its MoE's report."""
        D, eps = self.config.hidden_size, self.config.rms_norm_eps
        # The report prints [hidden; embedding]; the released weights are [embedding; hidden].
        both = jnp.concatenate(
            [
                rms_norm(next_embedding_BTD, self.scale("enorm", D), eps),
                rms_norm(h_BTD, self.scale("hnorm", D), eps),
            ],
            axis=-1,
        )
        eh_proj = self.weight("eh_proj", (2 * D, D), ("latent_out", "embed"))
        # In BF16 also where products are in FP8, as the released weights have it.
        plain = dataclasses.replace(self.precision, matmuls="compute")
        h_BTD = linear(both, eh_proj, plain)  # Eq. 21
        block: Any = self.block(self.config, self.precision, name="block")
        (h_BTD, cache), report = block((h_BTD, cache), layer, positions)  # Eq. 22
        return rms_norm(h_BTD, self.scale("norm", D), eps), cache, report
