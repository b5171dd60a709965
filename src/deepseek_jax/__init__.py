"""DeepSeek-V3 and R1 in JAX."""

from typing import TYPE_CHECKING, Any

from deepseek_jax.config import ModelConfig, Precision
from deepseek_jax.model.transformer import (
    DeepSeekV3,
    ParamCounts,
    forward,
    init_params,
    init_router_bias,
    param_counts,
)
from deepseek_jax.presets import preset
from deepseek_jax.types import Batch, KVCache, TrainState, UserError

if TYPE_CHECKING:
    from deepseek_jax.convert import export_hf, load_hf

__all__ = [
    "Batch",
    "DeepSeekV3",
    "KVCache",
    "ModelConfig",
    "ParamCounts",
    "Precision",
    "TrainState",
    "UserError",
    "export_hf",
    "forward",
    "init_params",
    "init_router_bias",
    "load_hf",
    "param_counts",
    "preset",
]


def __getattr__(name: str) -> Any:
    # Imported at first use: the converter brings Orbax along, which takes seconds to import.
    if name in ("export_hf", "load_hf"):
        from deepseek_jax import convert

        return getattr(convert, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
