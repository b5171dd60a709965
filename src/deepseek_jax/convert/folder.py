"""A Hugging Face folder: its configuration, its headers, and reading parts of its tensors."""

import json
import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.config import ModelConfig
from deepseek_jax.convert.fp8 import E4M3, check_scales, dequantize
from deepseek_jax.convert.safetensors_header import DTYPES, TensorInfo, read_header
from deepseek_jax.convert.table import BLOCK_SIZE, SCALE
from deepseek_jax.types import UserError

_log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


class HFFolder:
    """A folder in Hugging Face's layout, opened: only headers have been read.

    Attributes:
        config: the model, ``num_nextn_predict_layers`` being what the files really hold.
        hf_config: ``config.json`` as it is.
        tensors: every tensor by name.

    Raises:
        UserError: no such folder; another architecture; pickled weights; a shard that is missing,
            truncated or malformed; an index that points elsewhere; a tensor that is there twice.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{path} is not a directory; give a folder with config.json in it.")
        if (self.path / "run.json").exists():
            raise UserError(
                f"{path} is a run and not a Hugging Face folder; give it to `generate`, `chat` or "
                f"`eval` as --run, or make a folder of it: `deepseek-jax convert {path} FOLDER`."
            )
        self.hf_config, self.config = _read_config(self.path / "config.json")
        _check_options(self.path, self.hf_config)
        self.tensors = _read_headers(self.path, _shards(self.path))
        self._drop_absent_mtp()

    def read(self, name: str, rows: slice = slice(None), cols: slice = slice(None)) -> np.ndarray:
        """A tensor as stored, or part of it; of the file, only that part is read."""
        info = self.tensors[name]
        dtype = np.dtype(DTYPES[info.dtype])
        if cols != slice(None) and cols.indices(info.shape[1]) != (0, info.shape[1], 1):
            view = np.memmap(info.path, np.uint8, "r", info.offset, (info.nbytes,))
            return np.array(view.view(dtype).reshape(info.shape)[rows, cols])
        start, stop, _ = rows.indices(info.shape[0])
        row_bytes = math.prod(info.shape[1:]) * dtype.itemsize
        out = np.empty((max(stop - start, 0), *info.shape[1:]), dtype)
        data: Any = out.reshape(-1).view(np.uint8)
        _pread(info.path, memoryview(data), info.offset + start * row_bytes)
        return out

    def scale(self, name: str) -> np.ndarray:
        """The scales of an FP8 weight, all of them, as float32."""
        return check_scales(name + SCALE, self.read(name + SCALE))

    def is_fp8(self, name: str) -> bool:
        """Whether a weight is stored in FP8."""
        return self.tensors[name].dtype == "F8_E4M3"

    def weight(
        self, name: str, rows: slice = slice(None), cols: slice = slice(None), *, dtype: np.dtype
    ) -> np.ndarray:
        """``read``, as another dtype; FP8 is multiplied out unless FP8 is asked for."""
        x = self.read(name, rows, cols)
        if self.is_fp8(name) and dtype != E4M3:
            x = dequantize(x, self.scale(name), rows.start or 0, cols.start or 0)
        return x.astype(dtype, copy=False)

    def _drop_absent_mtp(self) -> None:
        """Fine-tuning with transformers drops the MTP modules but leaves their number behind."""
        layers, depth = self.config.num_hidden_layers, self.config.num_nextn_predict_layers
        first = f"model.layers.{layers}."
        if depth and not any(name.startswith(first) for name in self.tensors):
            _log.warning("%s has no MTP modules although config.json says %d", self.path, depth)
            self.config = self.config.replace(num_nextn_predict_layers=0)


def _read_config(path: Path) -> tuple[dict[str, Any], ModelConfig]:
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(hf, dict):
            raise TypeError("it is not a JSON object")
        return hf, ModelConfig.from_hf(hf)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else repr(error)
        raise UserError(f"{path} is not a readable config.json: {reason:.200}.") from error


def _check_options(path: Path, hf: dict[str, Any]) -> None:
    if hf.get("rope_interleave", True) is False:
        raise UserError(f"{path}/config.json says rope_interleave=false; no released model does.")
    quantization = hf.get("quantization_config")
    if quantization is None:
        return
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method != "fp8" or block != [BLOCK_SIZE, BLOCK_SIZE]:
        raise UserError(
            f"{path}/config.json says quant_method={method!r} with weight_block_size={block}; only "
            f"'fp8' with blocks of {BLOCK_SIZE}x{BLOCK_SIZE} can be read."
        )


def _shards(path: Path) -> dict[str, str | None]:
    """Tensor -> file as the index says; without an index, {the one file: None}."""
    if (path / INDEX).exists():
        return dict(_weight_map(path / INDEX))
    if (path / SINGLE).exists():
        return {SINGLE: None}
    pickled = sorted(p.name for p in path.iterdir() if p.suffix in _PICKLED)
    if pickled:
        raise UserError(
            f"{path} holds pickled weights ({pickled[0]}), which can run code when opened and are "
            "refused; get the safetensors version, or save it again with "
            "model.save_pretrained(..., safe_serialization=True)."
        )
    raise UserError(f"{path} has neither {SINGLE} nor {INDEX}; the download may be incomplete.")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = set(weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is not a readable index: {error!r:.200}.") from error
    for file in files:
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or not file.endswith(".safetensors")
        ):
            raise UserError(
                f"{index} points to {str(file)[:200]!r}; it may only name .safetensors files in "
                "its own folder."
            )
    missing = sorted(file for file in files if not (index.parent / file).exists())
    if missing:
        raise UserError(
            f"{index.parent} lacks {len(missing)} of {len(files)} shards ({missing[0]}, ...); "
            "complete the download."
        )
    return weight_map


def _read_headers(path: Path, shards: dict[str, str | None]) -> dict[str, TensorInfo]:
    indexed = None not in shards.values()
    files = sorted(set(shards.values()) if indexed else shards)  # type: ignore[type-var]
    with ThreadPoolExecutor(8) as pool:
        headers = dict(zip(files, pool.map(lambda f: read_header(path / f), files), strict=True))
    tensors: dict[str, TensorInfo] = {}
    for file, header in headers.items():
        for name, info in header.items():
            if name in tensors:
                raise UserError(
                    f"tensor {name} is in both {tensors[name].path.name} and {file} of {path}; "
                    "remove the files that do not belong to the checkpoint."
                )
            tensors[name] = info
    for name, file in shards.items() if indexed else ():
        if file is not None and name not in headers[file]:
            raise UserError(f"{path / INDEX} says that {name} is in {file}, but it is not.")
    return tensors


def _pread(path: Path, buffer: memoryview, offset: int) -> None:
    with path.open("rb", buffering=0) as file:
        done = 0
        while done < len(buffer):
            count = os.preadv(file.fileno(), [buffer[done:]], offset + done)
            if count == 0:
                raise UserError(f"{path} became shorter while it was read; copy it again.")
            done += count
