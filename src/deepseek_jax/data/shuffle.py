"""A random order that reads block by block, for formats where a document is not the unit."""

import functools
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int64

from deepseek_jax.data.records import ParquetRecords
from deepseek_jax.data.sources import Concatenated, ParquetFiles, Selected


class Blocks(NamedTuple):
    """Runs of documents that are read together; ``window`` of them fit into the cache."""

    ends: Int64[np.ndarray, "n"]
    window: int


def shuffled(elements: grain.MapDataset, documents: Any, seed: int) -> grain.MapDataset:
    """``elements``, made from ``documents`` one to one, in a new random order each epoch.

    Grain shuffles epoch e with seed + e: seeds of neighbouring uses must not be neighbours.
    """
    blocks = find_blocks(documents)
    return elements.shuffle(seed) if blocks is None else BlockShuffle(elements, blocks, seed)


def find_blocks(documents: Any) -> Blocks | None:
    """The row groups of ``documents``, or None where every document is read by itself."""
    if isinstance(documents, ParquetFiles):
        return find_blocks(documents.records)
    if isinstance(documents, ParquetRecords):
        return Blocks(documents.block_ends, documents.cached_groups)
    if isinstance(documents, Selected):
        blocks = find_blocks(documents.documents)
        if blocks is None:
            return None
        ends = np.unique(np.searchsorted(documents.indices, blocks.ends))
        return Blocks(ends[ends > 0].astype(np.int64), blocks.window)
    if isinstance(documents, Concatenated):
        return _join(documents)
    return None


def _join(documents: Concatenated) -> Blocks | None:
    parts = [(find_blocks(part), len(part)) for part in documents.parts]
    windows = [blocks.window for blocks, _ in parts if blocks is not None]
    if not windows:
        return None
    starts = np.cumsum([0, *(length for _, length in parts)])
    ends = [
        start + (np.arange(1, length + 1) if blocks is None else blocks.ends)
        for start, (blocks, length) in zip(starts, parts, strict=False)
    ]
    return Blocks(np.concatenate(ends).astype(np.int64), min(windows))


class _Order(NamedTuple):
    """The blocks of one epoch, shuffled and laid end to end."""

    firsts: Int64[np.ndarray, "n"]  # first document of each block
    ends: Int64[np.ndarray, "n"]  # where each block ends in this order
    window_ends: Int64[np.ndarray, "m"]


class BlockShuffle(grain.MapDataset):
    """Visits every element once an epoch: blocks in random order, shuffled window by window.

    A window is ``blocks.window`` blocks that follow each other in the epoch's order; its
    elements come in random order, so each block is read once per window. Memory is that of the
    block boundaries.
    """

    def __init__(self, parent: grain.MapDataset, blocks: Blocks, seed: int):
        super().__init__(parent)
        self._blocks = blocks
        self._seed = seed

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, len(self))
        order = self._order(epoch)
        window = int(np.searchsorted(order.window_ends, place, side="right"))
        start = int(order.window_ends[window - 1]) if window else 0
        place = start + grain.experimental.index_shuffle(
            place - start,
            max_index=int(order.window_ends[window]) - start - 1,
            seed=_seed(self._seed, epoch, window + 1),
            rounds=4,
        )
        block = int(np.searchsorted(order.ends, place, side="right"))
        before = int(order.ends[block - 1]) if block else 0
        return self._parent[epoch * len(self) + int(order.firsts[block]) + place - before]

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_order"}

    @functools.cached_property
    def _order(self):
        @functools.lru_cache(maxsize=2)
        def order(epoch: int) -> _Order:
            ends, window = self._blocks
            firsts = np.concatenate([[0], ends[:-1]])
            shuffled = np.random.default_rng((self._seed, epoch)).permutation(len(ends))
            new_ends = np.cumsum((ends - firsts)[shuffled])
            last = np.minimum(np.arange(window, len(ends) + window, window), len(ends)) - 1
            return _Order(firsts[shuffled], new_ends, new_ends[last])

        return order


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
