"""The small files beside the weights: tokenizer, chat template, generation settings."""

import json
import shutil
from pathlib import Path
from typing import Any

from deepseek_jax.config import ModelConfig
from deepseek_jax.convert.table import BLOCK_SIZE

# Data only: a released folder may also hold Python files, which are never carried along.
_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tiktoken.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def copy_sidecars(source: Path, target: Path) -> None:
    """Copy what ``source`` has of them."""
    for name in _NAMES:
        if (source / name).is_file() and not (target / name).exists():
            shutil.copyfile(source / name, target / name)


def write_configs(target: Path, config: ModelConfig, dtype: str, scale_fmt: str | None) -> None:
    """``config.json``, and the files that transformers wants where none was carried along.

    Args:
        target: the exported folder.
        config: the model.
        dtype: ``bf16``, ``fp32`` or ``fp8``.
        scale_fmt: ``"ue8m0"`` if the FP8 scales are powers of two.
    """
    hf = config.to_hf() | {"torch_dtype": "float32" if dtype == "fp32" else "bfloat16"}
    if dtype == "fp8":
        hf["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK_SIZE, BLOCK_SIZE],
        } | ({"scale_fmt": scale_fmt} if scale_fmt else {})
    ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    _write_new(target / "generation_config.json", ends)
    if (target / "tokenizer.json").exists():
        _write_new(target / "tokenizer_config.json", _tokenizer_config(target, ends))
    (target / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")


def _tokenizer_config(target: Path, ends: dict[str, int | None]) -> dict[str, Any]:
    """Enough for ``AutoTokenizer``: the class, and the tokens that begin and end a text."""
    tokenizer = json.loads((target / "tokenizer.json").read_text(encoding="utf-8"))
    by_id = {token["id"]: token["content"] for token in tokenizer.get("added_tokens", [])}
    names = {"bos_token": ends["bos_token_id"], "eos_token": ends["eos_token_id"]}
    known = {name: by_id[i] for name, i in names.items() if i in by_id}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **known,
    }


def _write_new(path: Path, value: dict[str, Any]) -> None:
    if not path.exists():
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
