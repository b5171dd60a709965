"""Token ids -> fixed rows -> ``Batch``: documents (V3 section 4.1) and samples (section 5.1).

Documents are laid end to end and cut at row ends, so nothing is dropped and no row is padded
but the last of a finite pass. Samples are whole: an answer cut off from its question would be
learnt without it.

Grain's ``ConcatThenSplitIterDataset`` cuts disjoint rows, in which the first token of a row is
never a target, and its state does not survive JSON. Hence the small iterator here: rows of
T + 1 tokens that overlap by one, so that every token after the first is a target exactly once.
"""

import itertools
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Float32, Int32

from deepseek_jax.types import Batch

PACKED_TOGETHER = 512
"""Conversations whose samples may share a row."""


class Row(NamedTuple):
    """T + 1 consecutive tokens; ``segments`` numbers the documents 1, 2, ... (0 is padding)."""

    ids: Int32[np.ndarray, "T+1"]
    segments: Int32[np.ndarray, "T+1"]
    weights: Float32[np.ndarray, "T+1"]
    """1 where the token is to be learnt, as a target."""


def padding_row(seq_len: int) -> Row:
    """A row of nothing."""
    zeros = np.zeros(seq_len + 1, np.int32)
    return Row(zeros, zeros.copy(), np.zeros(seq_len + 1, np.float32))


class Sample(NamedTuple):
    """Tokens that belong together, and which of them are to be learnt (weight 1)."""

    ids: Int32[np.ndarray, "n"]
    weights: Float32[np.ndarray, "n"]


class PackRows(grain.IterDataset[Row]):
    """Rows of ``seq_len + 1`` tokens from a stream of documents (arrays of token ids).

    Consecutive rows share one token: the last target of a row is the first input of the next.

    Args:
        documents: The token ids of each document.
        seq_len: T, targets in a row.
    """

    def __init__(self, documents: grain.IterDataset[np.ndarray], seq_len: int):
        super().__init__(documents)
        self._seq_len = seq_len

    def __iter__(self) -> grain.DatasetIterator[Row]:
        return _PackRowsIterator(iter(self._parent), self._seq_len)


class _Piece(NamedTuple):
    state: dict[str, Any]  # of the parent, just before this document
    ids: np.ndarray


class _PackRowsIterator(grain.DatasetIterator[Row]):
    def __init__(self, parent: grain.DatasetIterator, seq_len: int):
        super().__init__(parent)
        self._seq_len = seq_len
        self._pieces: deque[_Piece] = deque()
        self._offset = 0  # tokens of the first piece that earlier rows have used up
        self._available = 0

    def __next__(self) -> Row:
        self._fill()
        if self._available < 2:  # one token alone has no target
            raise StopIteration
        ids = np.zeros(self._seq_len + 1, np.int32)
        segments = np.zeros(self._seq_len + 1, np.int32)
        start, skip = 0, self._offset
        for number, piece in enumerate(self._pieces, 1):
            part = piece.ids[skip : skip + len(ids) - start]
            ids[start : start + len(part)] = part
            segments[start : start + len(part)] = number
            start, skip = start + len(part), 0
        self._advance(self._seq_len)
        return Row(ids, segments, np.ones(len(ids), np.float32))

    def get_state(self) -> dict[str, Any]:
        """Where the next row starts: the parent at its first document, and an offset into it."""
        parent = self._pieces[0].state if self._pieces else self._parent.get_state()
        return {"parent": parent, "offset": self._offset}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._pieces.clear()
        self._available = -state["offset"]
        self._offset = state["offset"]

    def _fill(self) -> None:
        while self._available <= self._seq_len:
            state = self._parent.get_state()
            try:
                ids = next(self._parent)
            except StopIteration:
                return
            self._pieces.append(_Piece(state, ids))
            self._available += len(ids)

    def _advance(self, count: int) -> None:
        count = min(count, self._available)
        self._available -= count
        self._offset += count
        while self._pieces and self._offset >= len(self._pieces[0].ids):
            self._offset -= len(self._pieces.popleft().ids)


def pack_samples(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which samples share a row of ``size`` tokens: longest first, each into the fullest that fits.

    Rows, and samples within a row, are in the order of arrival.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [row for row, room in enumerate(free) if room >= lengths[index]]
        if fits:
            row = min(fits, key=free.__getitem__)
        else:
            row = len(rows)
            rows.append([])
            free.append(size)
        rows[row].append(index)
        free[row] -= lengths[index]
    return sorted(sorted(row) for row in rows)


def fill_row(samples: Sequence[Sample], seq_len: int) -> Row:
    """A row of whole samples, each a segment of its own, and padding."""
    row, start = padding_row(seq_len), 0
    for number, sample in enumerate(samples, 1):
        place = slice(start, start + len(sample.ids))
        row.ids[place], row.segments[place], row.weights[place] = sample.ids, number, sample.weights
        start = place.stop
    return row


class PackSamples(grain.IterDataset[Row]):
    """Rows of ``seq_len + 1`` tokens from a stream of lists of samples, none of them longer.

    So many lists at a time (``window``) are packed by ``pack_samples``, never those of two epochs:
    packing changes the order, and everything is to be seen once before anything is seen twice. A
    position is where its window begins and the rows already given, as small as the stream's own.

    Args:
        samples: The lists; endless, or one epoch.
        seq_len: T, targets in a row.
        epoch: Lists in an epoch of the stream.
        window: Lists at a time.
    """

    def __init__(
        self,
        samples: grain.IterDataset[list[Sample]],
        seq_len: int,
        epoch: int,
        window: int = PACKED_TOGETHER,
    ):
        super().__init__(samples)
        self._sizes = seq_len, epoch, window

    def __iter__(self) -> grain.DatasetIterator[Row]:
        return _PackSamplesIterator(iter(self._parent), *self._sizes)


class _PackSamplesIterator(grain.DatasetIterator[Row]):
    def __init__(self, parent: grain.DatasetIterator, seq_len: int, epoch: int, window: int):
        super().__init__(parent)
        self._seq_len, self._epoch, self._window = seq_len, epoch, window
        self._before, self._place = parent.get_state(), 0  # of this window
        self._rows: list[list[Sample]] = []
        self._taken = self._given = 0

    def __next__(self) -> Row:
        while self._given == len(self._rows):
            self._before = self._parent.get_state()
            self._place, self._given = (self._place + self._taken) % self._epoch, 0
            self._fill()
            if not self._taken:
                raise StopIteration
        row = fill_row(self._rows[self._given], self._seq_len)
        self._given += 1
        return row

    def get_state(self) -> dict[str, Any]:
        """Where this window begins, in the stream and in the epoch, and how many rows are given."""
        # Nothing is taken yet where no window has begun.
        return {"parent": self._before, "place": self._place, "given": self._given}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._before, self._place, self._given = state["parent"], state["place"], state["given"]
        self._rows, self._taken = [], 0
        if self._given:
            self._fill()

    def _fill(self) -> None:
        """Packs the next window."""
        count = min(self._window, self._epoch - self._place)
        lists = list(itertools.islice(self._parent, count))
        samples = [sample for each in lists for sample in each]
        packed = pack_samples([len(sample.ids) for sample in samples], self._seq_len + 1)
        self._rows, self._taken = [[samples[i] for i in row] for row in packed], len(lists)


def rows_to_batch(rows: Sequence[Row], *, mask_documents: bool) -> Batch:
    """Stacks B rows into a ``Batch`` of [B, T].

    With ``mask_documents`` every document of a row is a segment of its own, its positions
    start at 0, and the target across a boundary has weight 0. Without (the paper: "we do not
    incorporate cross-sample attention masking"), a row is one segment: positions run through
    it and the first token of the next document is learnt from the end of the last.
    """
    ids = np.stack([row.ids for row in rows])
    documents = np.stack([row.segments for row in rows])
    segments = documents if mask_documents else (documents > 0).astype(np.int32)
    inside, ahead = segments[:, :-1], segments[:, 1:]
    learnt = np.stack([row.weights for row in rows])[:, 1:]
    weights = learnt * ((ahead > 0) & (ahead == inside))
    return Batch(
        tokens_BT=np.ascontiguousarray(ids[:, :-1]),
        targets_BT=np.ascontiguousarray(ids[:, 1:]),
        loss_weights_BT=weights,
        positions_BT=_positions(inside),
        segment_ids_BT=np.ascontiguousarray(inside),
    )


def _positions(segments_BT: Int32[np.ndarray, "B T"]) -> Int32[np.ndarray, "B T"]:
    """Distance of each token from the start of its segment; 0 on padding."""
    column_T = np.arange(segments_BT.shape[1], dtype=np.int32)
    starts_BT = np.zeros_like(segments_BT, dtype=bool)
    starts_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    start_BT = np.maximum.accumulate(np.where(starts_BT, column_T, 0), axis=1)
    return np.where(segments_BT > 0, column_T - start_BT, 0).astype(np.int32)
