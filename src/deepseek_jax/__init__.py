"""DeepSeek-V3 and R1 in JAX."""

from deepseek_jax.config import ModelConfig, Precision, preset
from deepseek_jax.model.transformer import (
    DeepSeekV3,
    ParamCounts,
    forward,
    init_params,
    init_router_bias,
    param_counts,
)
from deepseek_jax.types import Batch, KVCache, TrainState, UserError

__all__ = [
    "Batch",
    "DeepSeekV3",
    "KVCache",
    "ModelConfig",
    "ParamCounts",
    "Precision",
    "TrainState",
    "UserError",
    "forward",
    "init_params",
    "init_router_bias",
    "param_counts",
    "preset",
]
