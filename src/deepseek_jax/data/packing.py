"""Token ids of documents -> fixed rows -> ``Batch`` (V3 section 4.1).

Documents are laid end to end and cut at row ends, so nothing is dropped and no row is padded
but the last of a finite pass.

Grain's ``ConcatThenSplitIterDataset`` cuts disjoint rows, in which the first token of a row is
never a target, and its state does not survive JSON. Hence the small iterator here: rows of
T + 1 tokens that overlap by one, so that every token after the first is a target exactly once.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int32

from deepseek_jax.types import Batch


class Row(NamedTuple):
    """T + 1 consecutive tokens; ``segments`` numbers the documents 1, 2, ... (0 is padding)."""

    ids: Int32[np.ndarray, "T+1"]
    segments: Int32[np.ndarray, "T+1"]


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
        return Row(ids, segments)

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
    weights = (ahead > 0) & (ahead == inside)
    return Batch(
        tokens_BT=np.ascontiguousarray(ids[:, :-1]),
        targets_BT=np.ascontiguousarray(ids[:, 1:]),
        loss_weights_BT=weights.astype(np.float32),
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
