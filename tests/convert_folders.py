"""Synthetic Hugging Face folders, written by the safetensors library and not by our own code."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import deserialize
from safetensors.numpy import save_file

from deepseek_jax.config import ModelConfig
from deepseek_jax.convert.table import SCALE, entries
from deepseek_jax.presets import preset

# No dimension is a multiple of 128, some are larger; the rotated rows of every head lie in one
# block of 128 rows, as in the released models (with a head of 24 + 8 = 32).
V3 = preset("tiny").replace(
    vocab_size=301,
    hidden_size=131,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    num_attention_heads=5,
    q_lora_rank=29,
    kv_lora_rank=139,
    qk_nope_head_dim=24,
    qk_rope_head_dim=8,
    v_head_dim=13,
    intermediate_size=263,
    moe_intermediate_size=133,
    n_routed_experts=6,
    num_experts_per_tok=2,
    n_group=3,
    topk_group=2,
    num_nextn_predict_layers=1,
)
V2_LITE = V3.replace(
    q_lora_rank=None,
    n_shared_experts=2,
    n_group=1,
    topk_group=1,
    scoring_func="softmax",
    topk_method="greedy",
    norm_topk_prob=False,
    num_nextn_predict_layers=0,
)

_NUMPY = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}
Tensors = dict[str, tuple[str, np.ndarray]]


def random_tensors(config: ModelConfig, dtype: str = "BF16", fp8: bool = False) -> Tensors:
    """Every tensor of a checkpoint: (dtype name, values)."""
    random = np.random.default_rng(0)
    tensors: Tensors = {}
    for entry in entries(config):
        if entry.row.copy:
            original = "lm_head.weight" if "head" in entry.name else "model.embed_tokens.weight"
            tensors[entry.name] = tensors[original]
        elif fp8 and entry.row.fp8:
            codes = random.integers(0, 256, entry.shape, np.uint8)
            codes[(codes & 0x7F) == 0x7F] = 0  # the two NaNs
            codes[..., ::128, ::128] = 0x7E  # 448 in every block, as quantizing leaves it
            tensors[entry.name] = "F8_E4M3", codes.view(_NUMPY["F8_E4M3"])
            grid = [-(-n // 128) for n in entry.shape]
            tensors[entry.name + SCALE] = "F32", random.uniform(1e-4, 1e-3, grid).astype(np.float32)
        else:
            kind = "F32" if entry.name.endswith("bias") else dtype
            values = random.standard_normal(entry.shape) / entry.shape[-1] ** 0.5
            tensors[entry.name] = kind, values.astype(_NUMPY[kind])
    return tensors


def write_folder(
    folder: Path, config: ModelConfig, tensors: Tensors, shards: int = 3, **hf_config
) -> Path:
    """``config.json``, shards and index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf() | hf_config))
    weight_map = {}
    names = list(tensors)
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name][1] for name in names[i::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_folder(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a folder, as dtype, shape and bytes."""
    files = sorted(folder.glob("*.safetensors"))
    found = [pair for file in files for pair in deserialize(file.read_bytes())]
    return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in found}


def as_read(tensors: Tensors) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What ``read_folder`` must give for these tensors."""
    return {name: (dtype, x.shape, x.tobytes()) for name, (dtype, x) in tensors.items()}
