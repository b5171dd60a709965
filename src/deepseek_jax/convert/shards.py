"""Safetensors shards that are laid out first and then filled in any order, by several threads."""

import math
import os
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deepseek_jax.checkpoint.files import write_json
from deepseek_jax.convert.folder import INDEX, SINGLE
from deepseek_jax.convert.safetensors_header import DTYPES, make_header


class TensorSpec(NamedTuple):
    """What a tensor is going to be; ``dtype`` in safetensors' words."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * np.dtype(DTYPES[self.dtype]).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return self.shape[0] * self.row_bytes


class _Shard:
    """One file: ``<name>.part`` until every byte of it is written and on the disk."""

    def __init__(self, path: Path, names: list[str], specs: dict[str, TensorSpec]):
        self.path, self._part = path, path.with_name(path.name + ".part")
        header, self.starts = make_header({name: specs[name] for name in names})
        self._left = sum(specs[name].nbytes for name in names)
        size = len(header) + self._left
        self.done = path.exists() and path.stat().st_size == size
        self._lock = threading.Lock()
        if not self.done:
            with self._part.open("wb") as file:
                file.write(header)
                file.truncate(size)

    def write(self, offset: int, data: memoryview) -> None:
        with self._part.open("r+b", buffering=0) as file:
            done = 0
            while done < len(data):
                done += os.pwrite(file.fileno(), data[done:], offset + done)
        with self._lock:
            self._left -= len(data)
            finished = self._left == 0
        if finished:
            with self._part.open("r+b") as file:
                os.fsync(file.fileno())
            os.replace(self._part, self.path)
            self.done = True


class ShardWriter:
    """The weight files of a folder.

    Files that an interrupted run has completed are found and left as they are. The index is
    written last, so that the folder cannot be opened before it is complete.

    Args:
        out: the folder.
        specs: all tensors, in the order in which they are to be stored.
        shard_size: bytes per file; a larger tensor gets a file of its own.
    """

    def __init__(self, out: Path, specs: dict[str, TensorSpec], shard_size: int):
        self.out, self.specs = out, specs
        groups: list[list[str]] = [[]]
        filled = 0
        for name, spec in specs.items():
            if groups[-1] and filled + spec.nbytes > shard_size:
                groups.append([])
                filled = 0
            groups[-1].append(name)
            filled += spec.nbytes
        n = len(groups)
        files = [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
        self._shards: dict[str, _Shard] = {}
        for file, names in zip(files if n > 1 else [SINGLE], groups, strict=True):
            shard = _Shard(out / file, names, specs)
            self._shards |= dict.fromkeys(names, shard)
        self._order = {name: i for i, name in enumerate(specs)}

    def position(self, name: str) -> int:
        """Place of a tensor in the order of all."""
        return self._order[name]

    def is_done(self, name: str) -> bool:
        """Whether the file of a tensor is complete."""
        return self._shards[name].done

    def write(self, name: str, first_row: int, x: np.ndarray) -> None:
        """Write some rows of a tensor; each row must be written once."""
        shard, spec = self._shards[name], self.specs[name]
        if not shard.done:
            offset = shard.starts[name] + first_row * spec.row_bytes
            shard.write(offset, np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)

    def finish(self) -> None:
        """Write the index, if there is more than one file."""
        if len({shard.path for shard in self._shards.values()}) > 1:
            weight_map = {name: shard.path.name for name, shard in self._shards.items()}
            size = sum(spec.nbytes for spec in self.specs.values())
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            write_json(self.out / INDEX, index)
