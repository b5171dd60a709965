"""Transformers' own models with random weights, and their weights in our layout."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from deepseek_jax.config import ModelConfig
from deepseek_jax.convert import params_from_hf


def torch_model(config: ModelConfig, seed: int = 0) -> torch.nn.Module:
    """A float32 model whose every parameter is random and whose logits are of order 1."""
    hf = config.to_hf()
    torch_config = AutoConfig.for_model(hf.pop("model_type"), **hf)
    torch_config._attn_implementation = "eager"
    torch_config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(torch_config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        noise = torch.randn(x.shape, generator=generator)
        with torch.no_grad():
            if name.endswith("e_score_correction_bias"):
                x.copy_(0.1 * noise)
            elif x.ndim == 1 and name.endswith("weight"):
                x.copy_(1 + 0.2 * noise)
            elif x.ndim > 1:
                x.copy_(noise / x.shape[-1] ** 0.5 if "embed" not in name else noise)
    return model.eval()


def hf_tensors(model: torch.nn.Module, folder: Path) -> dict[str, np.ndarray]:
    """The tensors as ``save_pretrained`` names them: one per expert, as in released files."""
    model.save_pretrained(folder)
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return {k: v for file in files for k, v in load_file(os.fspath(folder / file)).items()}


def our_params(config: ModelConfig, model: torch.nn.Module, folder: Path):
    """``(params, router_bias_LE)`` of a transformers model, by way of a saved file."""
    tensors = hf_tensors(model, folder)
    unused = set(tensors)

    def get(name: str) -> np.ndarray:
        unused.discard(name)
        return tensors[name]

    params, router_bias = params_from_hf(config, get)
    assert not unused, f"tensors that the table does not know: {sorted(unused)}"
    return jax.tree.map(jnp.asarray, (params, router_bias))
