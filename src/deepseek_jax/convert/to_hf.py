"""Our parameters -> a Hugging Face folder: shards laid out first, then filled in any order."""

import itertools
import math
import os
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from deepseek_jax.config import ModelConfig
from deepseek_jax.convert.fp8 import E4M3, blocks, check_scales, dequantize, quantize
from deepseek_jax.convert.memory import Leaf, leaves, lookup, scale_path
from deepseek_jax.convert.safetensors_header import DTYPES
from deepseek_jax.convert.shards import ShardWriter, TensorSpec
from deepseek_jax.convert.sidecars import copy_sidecars, write_configs
from deepseek_jax.convert.table import BLOCK_SIZE, SCALE, axis_sizes, entries, to_hf
from deepseek_jax.convert.transfer import Job, claim_output, disk_errors, run_all
from deepseek_jax.sharding import LORA_A
from deepseek_jax.types import Array, Params, UserError

ExportDtype = Literal["bf16", "fp32", "fp8"]
SHARD_SIZE = 5_000_000_000
_READ_BYTES = 64 << 20


def export_hf(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    router_bias: Array,
    *,
    dtype: ExportDtype = "bf16",
    shard_size: int = SHARD_SIZE,
    scale_fmt: Literal["ue8m0"] | None = None,
) -> None:
    """Write a folder that transformers' ``AutoModelForCausalLM`` and serving engines open.

    Args:
        path: the folder to make.
        config: the model.
        params: our parameters; FP8 ones with their scales beside them, as ``load_hf`` keeps them.
        router_bias: ``[L, E]``.
        dtype: of the weights. ``fp8``: linear layers in E4M3 with 128x128 scales, the rest BF16;
            parameters that are FP8 already are written as they are.
        shard_size: bytes per file, at most (one tensor may exceed it).
        scale_fmt: ``"ue8m0"`` for scales that are powers of two, as V3.1 has them.

    Raises:
        UserError: if the parameters are not of this model, or ``path`` holds anything already.
    """
    tree = {"params": params, "router_bias": router_bias}
    # Arrays in memory leave no trace by which to tell, later, that it is they again.
    once = f"memory {uuid.uuid4()}"
    export(Path(path), config, tree, Options(once, dtype, shard_size, scale_fmt))


class Options(NamedTuple):
    """What defines an export; one that was interrupted continues only with the same."""

    source: str
    dtype: ExportDtype
    shard_size: int
    scale_fmt: str | None


def export(
    out: Path,
    config: ModelConfig,
    tree: Params,
    options: Options,
    *,
    workers: int = 2,
    progress: bool = False,
    sidecars: Path | None = None,
    chunk_of: Callable[[Any], tuple[int, ...] | None] = lambda array: None,
) -> None:
    """``export_hf`` from anything that can be sliced, in memory or on disk.

    ``chunk_of`` is the shape in which an array is stored: reading less at a time is a waste.
    """
    _check_tree(config, tree)
    specs = _specs(config, options.dtype)
    with disk_errors(out):
        marker = claim_output(out, options._asdict())
        writer = ShardWriter(out, specs, options.shard_size)
        names = _names(config)
        jobs: list[tuple[int, Job]] = []
        for leaf in leaves(config):
            part = _Part(config, leaf, tree, options, names[leaf.path], writer)
            jobs += part.jobs(chunk_of(lookup(tree, leaf.path)))
        # In the order of the files, so that each is finished, and safe, before the next.
        ordered = [job for _, job in sorted(jobs, key=lambda pair: pair[0])]
        run_all(ordered, sum(spec.nbytes for spec in specs.values()), workers, progress)
        writer.finish()
        if sidecars is not None:
            copy_sidecars(sidecars, out)
        write_configs(out, config, options.dtype, options.scale_fmt)
        marker.unlink()


def _check_tree(config: ModelConfig, tree: Params) -> None:
    for leaf in leaves(config):
        name = "/".join(leaf.path)
        try:
            array = lookup(tree, leaf.path)
        except KeyError:
            raise UserError(f"{name} is missing: the parameters are not of this config.") from None
        if tuple(array.shape) != leaf.shape:
            raise UserError(
                f"{name} is {list(array.shape)} instead of {list(leaf.shape)}: the parameters are "
                "not of this config."
            )
        if leaf.path[-1] + LORA_A in lookup(tree, leaf.path[:-1]):
            raise UserError(
                f"{name} has an adapter beside it, which no file has room for; export the run that "
                "trained it with `convert`, which merges them."
            )
        if not getattr(array, "is_fully_addressable", True):
            raise UserError(
                f"{name} is spread over several processes; save a checkpoint and convert that."
            )


def _specs(config: ModelConfig, dtype: ExportDtype) -> dict[str, TensorSpec]:
    """Every tensor of the folder, in order; scales follow their weights."""
    specs = {}
    plain = "F32" if dtype == "fp32" else "BF16"
    for entry in entries(config):
        if dtype == "fp8" and entry.row.fp8:
            specs[entry.name] = TensorSpec("F8_E4M3", entry.shape)
            grid = tuple(blocks(length) for length in entry.shape)
            specs[entry.name + SCALE] = TensorSpec("F32", grid)
        else:
            is_bias = entry.path == ("router_bias",)
            specs[entry.name] = TensorSpec("F32" if is_bias else plain, entry.shape)
    return specs


def _names(config: ModelConfig) -> dict[tuple[str, ...], dict[tuple[int, ...], list[str]]]:
    """Which tensors an array's parts become: one each, or two where a copy is to be written."""
    names: dict[tuple[str, ...], dict[tuple[int, ...], list[str]]] = {}
    for entry in entries(config):
        lead = () if entry.row.copy else entry.lead
        names.setdefault(entry.path, {}).setdefault(lead, []).append(entry.name)
    return names


class _Part:
    """One of our arrays on its way out."""

    def __init__(
        self,
        config: ModelConfig,
        leaf: Leaf,
        tree: Params,
        options: Options,
        names: dict[tuple[int, ...], list[str]],
        writer: ShardWriter,
    ):
        self._leaf, self._options, self._names, self._writer = leaf, options, names, writer
        self._array = lookup(tree, leaf.path)
        self._sizes = axis_sizes(config)
        self._kept = np.dtype(self._array.dtype) == E4M3
        self._scales = lookup(tree, scale_path(leaf.path)) if self._kept else None
        self._depth = len(leaf.parts[0].lead)
        outer = leaf.layout.groups[0][0]
        self._outer = leaf.layout.ours.index(outer)
        self._head = leaf.parts[0].shape[0] // self._sizes[outer]

    def jobs(self, chunk: tuple[int, ...] | None) -> Iterator[tuple[int, Job]]:
        """Reading, converting and writing of each region, and the place of its first tensor."""
        leads = (1,) * self._depth if chunk is None else chunk[: self._depth]
        starts = [
            range(0, n, step)
            for n, step in zip(self._leaf.shape[: self._depth], leads, strict=True)
        ]
        rows = self._leaf.parts[0].shape[0]
        step = self._rows_at_a_time(chunk)
        for lead in itertools.product(*starts):
            block = tuple(
                slice(i, min(i + step, n))
                for i, step, n in zip(lead, leads, self._leaf.shape, strict=False)
            )
            for first in range(0, rows, step):
                region = slice(first, min(first + step, rows))
                order = self._writer.position(self._names[lead][0])
                yield order, partial(self._convert, block, region)

    def _rows_at_a_time(self, chunk: tuple[int, ...] | None) -> int:
        shape, layout = self._leaf.parts[0].shape, self._leaf.layout
        if len(shape) == 1 or layout.groups[0][0] == layout.rope:
            return shape[0]
        if chunk is not None:
            step = chunk[self._depth + self._outer] * self._head
            return step if step % BLOCK_SIZE == 0 else shape[0]
        step = math.lcm(self._head, BLOCK_SIZE)
        step_bytes = step * shape[1] * np.dtype(self._array.dtype).itemsize
        return min(max(_READ_BYTES // step_bytes, 1) * step, shape[0])

    def _convert(self, block: tuple[slice, ...], rows: slice) -> int:
        leads = list(itertools.product(*(range(s.start, s.stop) for s in block)))
        if all(self._writer.is_done(name) for lead in leads for name in self._names[lead]):
            return sum(self._written(name, rows) for lead in leads for name in self._names[lead])
        own = [slice(None)] * len(self._leaf.layout.ours)
        own[self._outer] = slice(rows.start // self._head, -(-rows.stop // self._head))
        array = np.asarray(self._array[(*block, *own)])
        done = 0
        for lead in leads:
            at = tuple(i - s.start for i, s in zip(lead, block, strict=True))
            x = to_hf(array[at], self._leaf.layout, self._sizes)
            for name in self._names[lead]:
                self._write(name, rows, x, lead)
                done += self._written(name, rows)
        return done

    def _write(self, name: str, rows: slice, x: np.ndarray, lead: tuple[int, ...]) -> None:
        spec = self._writer.specs[name]
        scale = None
        if self._scales is not None:
            scale = check_scales(name + SCALE, np.asarray(self._scales[lead]).T)
        if spec.dtype == "F8_E4M3":
            if scale is None:
                x, scale = quantize(x, ue8m0=self._options.scale_fmt == "ue8m0")
            else:
                scale = scale[rows.start // BLOCK_SIZE : blocks(rows.stop)]
            self._writer.write(name + SCALE, rows.start // BLOCK_SIZE, scale)
        elif scale is not None:
            x = dequantize(x, scale, rows.start)
        self._writer.write(name, rows.start, x.astype(DTYPES[spec.dtype], copy=False))

    def _written(self, name: str, rows: slice) -> int:
        """Bytes that these rows are in the folder."""
        spec = self._writer.specs[name]
        done = spec.row_bytes * (rows.stop - rows.start)
        if spec.dtype == "F8_E4M3":
            count = blocks(rows.stop) - rows.start // BLOCK_SIZE
            done += self._writer.specs[name + SCALE].row_bytes * count
        return done
