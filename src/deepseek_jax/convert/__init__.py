"""Hugging Face safetensors folders <-> our parameters, for the DeepSeek-V2 and V3 families.

===================== ======================================================================
``table``             the one table of names and layouts, read in both directions
``memory``            whole models in memory, by that table: the plain form of all that follows
``safetensors_header`` strict reading of headers
``folder``            a Hugging Face folder and reading parts of its tensors
``check``             is everything there? from headers alone
``fp8``               128x128 block scales
``load``              straight onto a mesh, each process its own part
``to_orbax``          to a run directory, streaming
``to_hf``             to a Hugging Face folder, from memory; ``shards`` writes the files
``from_orbax``        to a Hugging Face folder, from a run directory, streaming
===================== ======================================================================
"""

from deepseek_jax.convert.check import CheckReport, check_hf
from deepseek_jax.convert.from_orbax import convert_to_hf
from deepseek_jax.convert.load import fp8_params, load_hf
from deepseek_jax.convert.memory import hf_from_params, params_from_hf
from deepseek_jax.convert.to_hf import export_hf
from deepseek_jax.convert.to_orbax import convert_to_orbax

__all__ = [
    "CheckReport",
    "check_hf",
    "convert_to_hf",
    "convert_to_orbax",
    "export_hf",
    "fp8_params",
    "hf_from_params",
    "load_hf",
    "params_from_hf",
]
