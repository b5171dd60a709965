"""Hugging Face safetensors folders <-> our parameters, for the DeepSeek-V2 and V3 families."""

from deepseek_jax.convert.memory import hf_from_params, params_from_hf

__all__ = ["hf_from_params", "params_from_hf"]
