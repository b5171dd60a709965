"""Who reads what: the rows of a global batch that each process feeds to its devices.

The order of the data does not depend on who reads them. A run has a number of *streams*, fixed
when it starts; each has its own documents and supplies its own rows of every batch. A process
reads the streams of the rows that its devices hold, and of these only the rows. So processes
whose devices hold the same rows (a tensor or context axis across hosts) read the same, and a run
may be continued by any number of processes.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Int

from deepseek_jax.types import Batch, UserError


class Stream(Protocol):
    """What a stream is opened as: what grain's iterators can do, without an import of grain."""

    def __next__(self) -> Batch:
        """The stream's rows of the next batch."""
        ...

    def get_state(self) -> dict[str, Any]:
        """Its place, to continue from."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a place."""
        ...

    def close(self) -> None:
        """Ends the processes that prepare data, if there are any."""
        ...


OpenStream = Callable[..., Stream]
Rows = TypeVar("Rows")  # a Batch, or another tree of arrays by rows


class Feed(NamedTuple):
    """The rows of a batch ``[A, B, T]`` that this process holds, and where they go."""

    where: NamedSharding
    total: int
    """B over all processes."""
    rows: Int[np.ndarray, "B_here"]
    """Ascending."""
    streams: int
    """As many as a new run takes."""

    def place(self, batches: Sequence[Rows]) -> Rows:
        """This process's rows of the micro-batches, to be one global ``[A, B, T]`` batch.

        Any tree of arrays that begin with the axes B, T (as far as they have any) will do.
        """
        return jax.tree.map(lambda *x: self._place(np.stack(x)), *batches)

    def own(self, batch: Rows) -> Rows:
        """This process's rows of a whole batch."""
        return jax.tree.map(lambda x: x[self.rows], batch)

    def part(self, local_ABT: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        """Out of this process's rows, those at an index of the global batch."""
        micro, rows, *rest = index
        start, stop, _ = rows.indices(self.total)
        first = int(np.searchsorted(self.rows, start))
        return local_ABT[(micro, slice(first, first + stop - start), *rest)]

    def _place(self, local_ABT: np.ndarray) -> jax.Array:
        shape = (local_ABT.shape[0], self.total, *local_ABT.shape[2:])
        spec = PartitionSpec(*self.where.spec[: local_ABT.ndim])
        return jax.make_array_from_callback(
            shape,
            NamedSharding(self.where.mesh, spec),
            lambda index: self.part(local_ABT, index or ()),
        )


def make_feed(where: NamedSharding, rows: int, seq_len: int) -> Feed:
    """The share of this process in batches of ``rows`` rows.

    Args:
        where: the sharding of a batch ``[A, B, T]``.
        rows: B over all processes; the sharding must divide it, and ``seq_len``.
        seq_len: T.
    """
    blocks: dict[int, set[tuple[int, int]]] = {}
    for device, index in where.devices_indices_map((1, rows, seq_len)).items():
        blocks.setdefault(device.process_index, set()).add(index[1].indices(rows)[:2])
    return Feed(where, rows, rows_of(blocks[jax.process_index()]), streams_of(blocks, rows))


def rows_of(blocks: set[tuple[int, int]]) -> Int[np.ndarray, "B_here"]:
    """The rows in these disjoint ranges, ascending."""
    return np.concatenate([np.arange(*block) for block in sorted(blocks)])


def streams_of(blocks_of: dict[int, set[tuple[int, int]]], rows: int) -> int:
    """One per group of processes that hold the same rows, if each holds one run of them.

    Otherwise one per part of the batch: rows scattered over the batch are then not read by
    processes that do not want them.
    """
    groups = {tuple(sorted(blocks)) for blocks in blocks_of.values()}
    for blocks in groups:
        adjacent = all(a[1] == b[0] for a, b in itertools.pairwise(blocks))
        first, size = blocks[0][0], blocks[-1][1] - blocks[0][0]
        if not adjacent or size * len(groups) != rows or first % size:
            return len(set().union(*groups))
    return len(groups)


class TrainRows(Iterator[Batch]):
    """Endless batches ``[B here, T]`` of the rows that this process holds.

    Args:
        open_stream: Makes a stream, as ``pipeline.train_batches`` does of its configuration:
            ``open_stream(rows, stream=i, streams=n)``.
        feed: Which rows are this process's.
        streams: Into how many the data are divided; 0: as the feed suggests.

    Raises:
        UserError: see ``open_stream``.
    """

    def __init__(self, open_stream: OpenStream, feed: Feed, streams: int = 0):
        self._open_stream, self._feed = open_stream, feed
        self._open(streams or feed.streams)

    def __next__(self) -> Batch:
        parts = []
        for stream, wanted in self._wanted.items():
            batch = next(self._iterators[stream])
            parts.append(batch if len(wanted) == self._size else Batch(*(x[wanted] for x in batch)))
        return (
            parts[0] if len(parts) == 1 else Batch(*map(np.concatenate, zip(*parts, strict=True)))
        )

    def get_state(self) -> dict[str, Any]:
        """Position in the streams that this process reads; JSON values."""
        states = {str(stream): it.get_state() for stream, it in self._iterators.items()}
        return {"streams": self._streams, "states": states}

    def set_state(self, states: Sequence[dict[str, Any]]) -> None:
        """Continues from what ``get_state`` returned in all processes of the run so far.

        Raises:
            UserError: the data are not those that the states were written with.
        """
        found: dict[str, Any] = {}
        for state in states:
            found |= state["states"]
        if states[0]["streams"] != self._streams:
            self._open(states[0]["streams"])
        for stream, iterator in self._iterators.items():
            iterator.set_state(found[str(stream)])

    def close(self) -> None:
        """Ends the processes that prepare data, if there are any."""
        for iterator in self._iterators.values():
            iterator.close()

    def _open(self, streams: int) -> None:
        if self._feed.total % streams:
            raise UserError(
                f"{self._feed.total} sequences at a time cannot be taken evenly from {streams} "
                f"streams of data; make micro_batch a multiple of {streams}."
            )
        self._streams, self._size = streams, self._feed.total // streams
        of_row = self._feed.rows // self._size
        self._wanted = {
            int(stream): self._feed.rows[of_row == stream] % self._size
            for stream in np.unique(of_row)
        }
        self._iterators = {
            stream: self._open_stream(self._size, stream=stream, streams=streams)
            for stream in self._wanted
        }
