"""A run's newest checkpoint -> a Hugging Face folder, a chunk at a time."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from deepseek_jax.checkpoint.files import local_path, newest_intact
from deepseek_jax.checkpoint.run_directory import read_run
from deepseek_jax.config import ModelConfig, Yarn
from deepseek_jax.convert.memory import insert, leaves, scale_path
from deepseek_jax.convert.to_hf import SHARD_SIZE, ExportDtype, Options, export
from deepseek_jax.types import Params, UserError


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
        scale_fmt: as in ``export_hf``.
        workers: chunks in the making at a time.
        progress: show a bar.

    Returns:
        ``out_dir``.

    Raises:
        UserError: no intact checkpoint; ``out_dir`` holds something else; the disk is full.
    """
    run, out = local_path(ckpt_dir), local_path(out_dir)
    config = _model_config(run)
    step, _ = newest_intact(run / "checkpoints", prefix="model/")
    if step is None:
        raise UserError(f"{run} holds no checkpoint yet; let its run save one first.")
    model = run / "checkpoints" / str(step) / "model"
    export(
        out,
        config,
        _open_tree(model, config),
        Options(str(model), dtype, shard_size, scale_fmt),
        workers=workers,
        progress=progress,
        sidecars=run,
        chunk_of=lambda array: array.chunk,
    )
    return out


class _OnDisk:
    """An array of a checkpoint; slicing reads."""

    def __init__(self, store: Any):
        self._store = store
        self.shape, self.dtype = tuple(store.shape), np.dtype(store.dtype.numpy_dtype)
        self.chunk = tuple(store.chunk_layout.read_chunk.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self._store[index].read().result())


def _open_tree(model: Path, config: ModelConfig) -> Params:
    tree: Params = {}
    for leaf in leaves(config):
        array = _open(model, leaf.path)
        insert(tree, leaf.path, array)
        if array.dtype.name == "float8_e4m3fn":
            insert(tree, scale_path(leaf.path), _open(model, scale_path(leaf.path)))
    return tree


def _open(model: Path, path: tuple[str, ...]) -> _OnDisk:
    name, base = ".".join(path), f"file://{model}/"
    kvstore: Any = f"{base}{name}/"
    if (model / "manifest.ocdbt").exists():  # as Orbax writes; convert_to_orbax writes plain files
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    try:
        return _OnDisk(ts.open({"driver": "zarr", "kvstore": kvstore}, read=True).result())
    except ValueError as error:
        raise UserError(
            f"{model} holds no array {name}, so it is not of the model in run.json."
        ) from error


def _model_config(run: Path) -> ModelConfig:
    """The model of a run: ``config.model`` in ``run.json``, as ``dataclasses.asdict`` has it."""
    try:
        fields = dict(read_run(run)["model"])
        yarn = fields.pop("rope_scaling", None)
        return ModelConfig(**fields, rope_scaling=None if yarn is None else Yarn(**yarn))
    except (KeyError, TypeError) as error:
        raise UserError(f"{run}/run.json does not say what the model is ({error!r}).") from error
