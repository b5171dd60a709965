"""Hugging Face folder -> a run directory with one Orbax checkpoint, a few rows at a time.

The arrays are written in Zarr's plain form (one file per chunk, uncompressed), which Orbax reads
like its own: a chunk is some rows of one Hugging Face tensor in our layout, so a stacked
``[L, E, D, F]`` array never exists in memory, chunks can be written in any order and in parallel,
and an interrupted conversion continues with the chunks that are missing.
"""

import hashlib
import json
import logging
import math
import os
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.checkpoint.files import local_path, write_json
from deepseek_jax.convert.check import open_checked
from deepseek_jax.convert.folder import HFFolder
from deepseek_jax.convert.fp8 import E4M3
from deepseek_jax.convert.load import LoadDtype, stacked_scales, stored_dtype
from deepseek_jax.convert.memory import Leaf, leaves, scale_path
from deepseek_jax.convert.sidecars import copy_sidecars
from deepseek_jax.convert.table import (
    BLOCK_SIZE,
    MODEL,
    Layout,
    axis_sizes,
    contiguous,
    entries,
    to_ours,
)
from deepseek_jax.convert.transfer import claim_output, disk_errors, run_all

_log = logging.getLogger(__name__)

CHUNK_BYTES = 64 << 20
_WORK = "converting"


def convert_to_orbax(
    hf_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    dtype: LoadDtype = None,
    workers: int = 4,
    progress: bool = False,
) -> Path:
    """Convert a Hugging Face folder to a run directory that ``--init`` and ``generate`` take.

    Interrupted, it continues when called again in the same way; the checkpoint appears under
    ``out_dir/checkpoints/0`` when it is complete and not before. Tokenizer, chat template and
    generation settings are carried along.

    Args:
        hf_dir: folder with ``config.json`` and safetensors.
        out_dir: the run directory to make.
        dtype: as in ``load_hf``.
        workers: chunks in the making at a time; memory is about 0.3 GB for each.
        progress: show a bar.

    Returns:
        The directory of the checkpoint.

    Raises:
        UserError: as ``load_hf``; or ``out_dir`` holds something else; or the disk is full.
    """
    folder, out = open_checked(hf_dir), local_path(out_dir)
    arrays = list(_arrays(folder, dtype))
    with disk_errors(out):
        marker = claim_output(out, {"from": _fingerprint(folder), "dtype": dtype})
        step = _Step(out / _WORK)
        step.write("model/_METADATA", _json(_orbax_metadata(arrays)))
        jobs = []
        for array in arrays:
            directory = "model/" + ".".join(array.path)
            step.write(f"{directory}/.zarray", _json(_zarray(array)))
            size = math.prod(array.chunk_shape) * np.dtype(array.dtype).itemsize
            for file, make in array.chunks:
                jobs.append(partial(step.write_once, f"{directory}/{file}", size, make))
        total = sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in arrays)
        run_all(jobs, total, workers, progress)
        _check_copies(folder)
        write_json(out / _WORK / "checksums.json", {"files": step.checksums})
        copy_sidecars(folder.path, out)
        write_json(out / "run.json", {"config": _run_config(folder)})
        (out / "checkpoints").mkdir(exist_ok=True)
        os.replace(out / _WORK, out / "checkpoints" / "0")
        marker.unlink()
    return out / "checkpoints" / "0"


class _Stored(NamedTuple):
    """One array on disk."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Any
    chunk_shape: tuple[int, ...]
    chunks: list[tuple[str, Callable[[], np.ndarray]]]
    """Zarr's name of each chunk (its place in the grid), and what makes it."""


def _arrays(folder: HFFolder, dtype: LoadDtype) -> Iterator[_Stored]:
    bias = None
    for leaf in leaves(folder.config):
        array = _from_tensors(folder, leaf, stored_dtype(folder, leaf, dtype))
        bias = bias or (array if leaf.path == ("router_bias",) else None)
        yield array
        if array.dtype == E4M3:
            yield _small(scale_path(leaf.path), stacked_scales(folder, leaf))
    if bias is None:
        config = folder.config
        shape = (config.num_routers, config.n_routed_experts)
        yield _small(("router_bias",), np.zeros(shape, np.float32))


def _small(path: tuple[str, ...], values: np.ndarray) -> _Stored:
    chunk = ".".join("0" * values.ndim)
    return _Stored(path, values.shape, values.dtype, values.shape, [(chunk, lambda: values)])


def _from_tensors(folder: HFFolder, leaf: Leaf, dtype: Any) -> _Stored:
    layout, sizes = leaf.layout, axis_sizes(folder.config)
    shape, lead = leaf.parts[0].shape, leaf.parts[0].lead
    outer = layout.groups[0][0]
    head = shape[0] // sizes[outer]
    step = _rows_per_chunk(layout, shape, head, dtype)
    own = [step // head if letter == outer else sizes[letter] for letter in layout.ours]
    chunk_shape = (*(1 for _ in lead), *own)

    def make(name: str, rows: slice) -> np.ndarray:
        x = to_ours(folder.weight(name, rows, dtype=dtype), layout, sizes)
        return contiguous(x, tuple(own))

    chunks = []
    for entry in leaf.parts:
        for i, first in enumerate(range(0, shape[0], step)):
            place = [i if letter == outer else 0 for letter in layout.ours]
            file = ".".join(map(str, (*entry.lead, *place)))
            rows = slice(first, min(first + step, shape[0]))
            chunks.append((file, partial(make, entry.name, rows)))
    return _Stored(leaf.path, leaf.shape, dtype, chunk_shape, chunks)


def _rows_per_chunk(layout: Layout, shape: tuple[int, ...], head: int, dtype: Any) -> int:
    """Rows of the Hugging Face tensor per chunk: whole heads, and whole FP8 blocks."""
    if len(shape) == 1 or layout.groups[0][0] == layout.rope:
        return shape[0]
    step = math.lcm(head, BLOCK_SIZE)
    step_bytes = step * shape[1] * np.dtype(dtype).itemsize
    return min(max(CHUNK_BYTES // step_bytes, 1) * step, shape[0])


# --- Zarr and Orbax --------------------------------------------------------------------------


class _Step:
    """A checkpoint in the making: its files, and what ``checkpoint`` wants to know of each.

    ``checksums.json`` is written here and not by ``checkpoint.files.write_checksums``, which
    would read again all that has just been written.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.checksums: dict[str, list[int]] = {}

    def write(self, name: str, data: Any) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fdatasync(file.fileno())
        os.replace(temporary, path)
        self.checksums[name] = [len(data), zlib.crc32(data)]

    def write_once(self, name: str, size: int, make: Callable[[], np.ndarray]) -> int:
        path = self._folder / name
        if path.exists() and path.stat().st_size == size:  # by the run that was interrupted
            self.checksums[name] = [size, zlib.crc32(path.read_bytes())]
        else:
            data: Any = make().reshape(-1).view(np.uint8)
            self.write(name, data.data)
        return size


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _zarray(array: _Stored) -> dict[str, Any]:
    dtype = np.dtype(array.dtype)
    return {
        "zarr_format": 2,
        "shape": array.shape,
        "chunks": array.chunk_shape,
        # Zarr has no name for these two; TensorStore's extension has.
        "dtype": dtype.name if dtype.name in ("bfloat16", "float8_e4m3fn") else dtype.str,
        "order": "C",
        "compressor": None,
        "filters": None,
        "fill_value": None,
        "dimension_separator": ".",
    }


def _orbax_metadata(arrays: list[_Stored]) -> dict[str, Any]:
    def describe(array: _Stored) -> dict[str, Any]:
        return {
            "key_metadata": [{"key": key, "key_type": 2} for key in array.path],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": array.shape,
            },
        }

    return {
        "tree_metadata": {str(array.path): describe(array) for array in arrays},
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def _run_config(folder: HFFolder) -> dict[str, Any]:
    model = folder.config.to_hf()
    if "quantization_config" in folder.hf_config:  # says how to write FP8 again
        model["quantization_config"] = folder.hf_config["quantization_config"]
    return {"stage": "convert", "model": model}


# --- source ----------------------------------------------------------------------------------


def _fingerprint(folder: HFFolder) -> str:
    """Tells whether an interrupted conversion was of these files."""
    files = sorted({info.path for info in folder.tensors.values()})
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps([folder.hf_config, stats]).encode()).hexdigest()


def _check_copies(folder: HFFolder) -> None:
    """The MTP modules' embedding and head must be the main model's, which alone is kept."""
    originals = {row.ours: row.hf for row in MODEL}
    for entry in entries(folder.config):
        if not entry.row.copy or entry.name not in folder.tensors:
            continue
        original = originals[entry.row.ours]
        for first in range(0, entry.shape[0], 4096):
            rows = slice(first, first + 4096)
            a, b = folder.read(entry.name, rows), folder.read(original, rows)
            if a.dtype != b.dtype or not np.array_equal(a.view(np.uint8), b.view(np.uint8)):
                _log.warning("%s differs from %s, which is used instead", entry.name, original)
                break
