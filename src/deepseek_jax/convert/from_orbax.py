"""A run's newest checkpoint -> a Hugging Face folder, a chunk at a time."""

import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from deepseek_jax.checkpoint.files import local_path, newest_intact
from deepseek_jax.checkpoint.run_directory import read_run
from deepseek_jax.checkpoint.trees import flatten, stored_tree
from deepseek_jax.config import ModelConfig
from deepseek_jax.convert.adapter import Merged, adapted_paths
from deepseek_jax.convert.folder import HFFolder
from deepseek_jax.convert.fp8 import E4M3
from deepseek_jax.convert.load import open_folder
from deepseek_jax.convert.memory import insert, leaves, lookup, scale_path
from deepseek_jax.convert.to_hf import SHARD_SIZE, ExportDtype, Options, export
from deepseek_jax.sharding import LORA_A, LORA_B
from deepseek_jax.types import Params, UserError

_OCDBT = "manifest.ocdbt"  # there if Orbax has written the checkpoint
_ZARR_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn}


def convert_to_hf(
    ckpt_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    dtype: ExportDtype = "bf16",
    shard_size: int = SHARD_SIZE,
    scale_fmt: Any = None,
    workers: int = 4,
    progress: bool = False,
) -> Path:
    """Convert the newest intact checkpoint of a run to a folder in Hugging Face's layout.

    Interrupted, it continues when called again in the same way. Tokenizer, chat template and
    generation settings that lie in the run directory are carried along.

    Args:
        ckpt_dir: a run directory.
        out_dir: the folder to make.
        dtype: as in ``export_hf``.
        shard_size: as in ``export_hf``.
        scale_fmt: as in ``export_hf``; by default what the original had, for a run directory that
            ``convert_to_orbax`` made.
        workers: chunks in the making at a time.
        progress: show a bar.

    Returns:
        ``out_dir``.

    Raises:
        UserError: no intact checkpoint; ``out_dir`` holds something else; the disk is full.
    """
    run, out = local_path(ckpt_dir), local_path(out_dir)
    hf_config = _hf_config(run)
    config = ModelConfig.from_hf(hf_config)
    quantization = hf_config.get("quantization_config") or {}
    if dtype == "fp8" and scale_fmt is None:  # as the checkpoint had it that this came from
        scale_fmt = quantization.get("scale_fmt")
    model = _newest_model(run / "checkpoints")
    tree, fingerprint = _open_run(run, model, config)
    export(
        out,
        config,
        tree,
        Options(fingerprint, dtype, shard_size, scale_fmt),
        workers=workers,
        progress=progress,
        sidecars=run,
        chunk_of=lambda array: array.chunk,
    )
    return out


def _newest_model(steps: Path) -> Path:
    """The newest checkpoint that is intact, as far as it pays to know before reading it."""
    found = [int(path.name) for path in steps.glob("*") if path.name.isdecimal()]
    if not found:
        raise UserError(f"{steps.parent} holds no checkpoint yet; let its run save one first.")
    model = steps / str(max(found)) / "model"
    if (model / _OCDBT).exists():
        step, _ = newest_intact(steps, prefix="model/")
        return steps / str(step) / "model"
    return model  # plain chunks, whose checksums are looked at as each is read


def _fingerprint(model: Path) -> str:
    """Tells whether an interrupted conversion was of this checkpoint."""
    return hashlib.sha256(json.dumps(_checksums(model.parent), sort_keys=True).encode()).hexdigest()


def _open_run(run: Path, model: Path, config: ModelConfig) -> tuple[Params, str]:
    """The parameters of a run and what tells them from others; an adapter's merged."""
    record = read_run(run)
    lora = record.get("lora") or {}
    if not lora.get("lora_rank"):
        return _open_tree(model, config), _fingerprint(model)
    base = local_path(record["init"])
    if (base / "run.json").exists():
        start = _newest_model(base / "checkpoints")
        tree, source = _open_tree(start, config), _fingerprint(start)
    elif (base / "config.json").exists():
        tree, source = open_folder(HFFolder(base)), str(base)
    else:
        raise UserError(f"{run} is an adapter of {base}, which is not there; put it back.")
    opened = _opener(model)
    tree["router_bias"] = opened(("router_bias",))
    scale = lora["lora_alpha"] / lora["lora_rank"]
    for path in adapted_paths(_stored_names(model)):
        a, b = (opened((*path[:-1], path[-1] + end)) for end in (LORA_A, LORA_B))
        matrix = lookup(tree, path)
        blocks = lookup(tree, scale_path(path)) if matrix.dtype == E4M3 else None
        insert(tree, path, Merged(matrix, a, b, scale, blocks))
    return tree, f"{source} {_fingerprint(model)}"


def _stored_names(model: Path) -> list[str]:
    return list(flatten(stored_tree(model)))


def _opener(model: Path) -> Callable[[tuple[str, ...]], Any]:
    if (model / _OCDBT).exists():
        return partial(_OrbaxArray, model)
    return partial(_PlainArray, model, _checksums(model.parent))


def _open_tree(model: Path, config: ModelConfig) -> Params:
    tree: Params = {}
    open_array = _opener(model)
    for leaf in leaves(config):
        insert(tree, leaf.path, array := open_array(leaf.path))
        if array.dtype == E4M3:
            scales = open_array(scale_path(leaf.path))
            insert(tree, scale_path(leaf.path), scales[...])
    return tree


class _OrbaxArray:
    """An array as Orbax writes it; slicing reads."""

    def __init__(self, model: Path, path: tuple[str, ...]):
        name = ".".join(path)
        kvstore = {"driver": "ocdbt", "base": f"file://{model}/", "path": f"{name}/"}
        try:
            self._store: Any = ts.open({"driver": "zarr", "kvstore": kvstore}, read=True).result()
        except ValueError as error:
            raise _no_array(model, name) from error
        self.shape, self.dtype = tuple(self._store.shape), np.dtype(self._store.dtype.numpy_dtype)
        layout: Any = self._store.chunk_layout
        self.chunk = tuple(layout.read_chunk.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self._store[index].read().result())


class _PlainArray:
    """An array as ``convert_to_orbax`` writes it, one file per chunk; slicing reads.

    Each file is read once and checked against its checksum then, not in a pass of its own.
    """

    def __init__(self, model: Path, checksums: dict[str, list[int]], path: tuple[str, ...]):
        name = ".".join(path)
        self._folder, self._checksums = model / name, checksums
        try:
            zarray = json.loads((self._folder / ".zarray").read_text())
        except (OSError, ValueError) as error:
            raise _no_array(model, name) from error
        self.shape, self.chunk = tuple(zarray["shape"]), tuple(zarray["chunks"])
        self.dtype = np.dtype(_ZARR_DTYPES.get(zarray["dtype"], zarray["dtype"]))

    def __getitem__(self, index: Any) -> np.ndarray:
        if index is Ellipsis:
            index = tuple(slice(None) for _ in self.shape)
        ranges = [range(*s.indices(n)) for s, n in zip(index, self.shape, strict=True)]
        grid = [
            range(r.start // c, -(-r.stop // c)) for r, c in zip(ranges, self.chunk, strict=True)
        ]
        if all(len(places) == 1 for places in grid):
            return self._part(tuple(places[0] for places in grid), ranges)[1]
        out = np.empty([len(r) for r in ranges], self.dtype)
        for place in itertools.product(*grid):
            where, x = self._part(place, ranges)
            out[where] = x
        return out

    def _part(
        self, place: tuple[int, ...], ranges: list[range]
    ) -> tuple[tuple[slice, ...], np.ndarray]:
        """What a chunk has of the ranges, and where in them that is."""
        starts = [i * c for i, c in zip(place, self.chunk, strict=True)]
        both = [
            (max(s, r.start), min(s + c, r.stop))
            for s, c, r in zip(starts, self.chunk, ranges, strict=True)
        ]
        inside = tuple(slice(a - s, b - s) for (a, b), s in zip(both, starts, strict=True))
        where = tuple(
            slice(a - r.start, b - r.start) for (a, b), r in zip(both, ranges, strict=True)
        )
        return where, self._read(".".join(map(str, place)))[inside]

    def _read(self, file: str) -> np.ndarray:
        path = self._folder / file
        try:
            data: Any = np.fromfile(path, np.uint8)
        except OSError:
            data = np.empty(0, np.uint8)
        expected = self._checksums.get(f"model/{self._folder.name}/{file}")
        if [data.size, zlib.crc32(data.data)] != expected:
            raise UserError(f"{path} is damaged or missing; convert the original again.")
        return data.view(self.dtype).reshape(self.chunk)


def _checksums(step: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file, as ``checkpoint`` writes them."""
    try:
        return json.loads((step / "checksums.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{step}/checksums.json is missing or unreadable.") from error


def _no_array(model: Path, name: str) -> UserError:
    return UserError(f"{model} holds no array {name}, so it is not of the model in run.json.")


def _hf_config(run: Path) -> dict[str, Any]:
    """``config.model`` in ``run.json``: the model as a ``config.json`` of Hugging Face's."""
    try:
        return dict(read_run(run)["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run}/run.json does not say what the model is ({error!r}).") from error
