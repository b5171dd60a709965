"""The split of a corpus into training and held-out documents."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deepseek_jax.data.sources import Documents, Selected, open_documents
from deepseek_jax.types import UserError


class Corpus(NamedTuple):
    """Documents to learn from and documents to evaluate on.

    ``fingerprint`` identifies the contents and the order of all documents of ``train``.
    """

    train: Documents
    held_out: Documents
    fingerprint: str


def open_corpus(
    source: Sequence[str],
    *,
    text_field: str = "text",
    held_out_fraction: float = 0.05,
    held_out_source: Sequence[str] = (),
) -> Corpus:
    """Opens a corpus, reads it through once, and splits it.

    A document is held out when the hash of its text falls below ``held_out_fraction``: copies
    of one text are on one side, and neither a seed nor the order of files moves a document
    across. Empty documents are left out. The pass also finds every unreadable document before
    training starts. With ``held_out_source`` nothing is held out of ``source``.

    Raises:
        UserError: Unreadable input, an empty corpus, or an empty side of the split.
    """
    documents = open_documents(source, text_field)
    hashes = _content_hashes(documents)
    present = hashes != _EMPTY
    if not present.any():
        raise UserError(f"the corpus is empty: {' '.join(source)} holds no text")
    fingerprint = hashlib.blake2b(hashes.tobytes(), digest_size=8).hexdigest()
    if held_out_source:
        held_documents = open_documents(held_out_source, text_field)
        held_present = _content_hashes(held_documents) != _EMPTY
        if not held_present.any():
            raise UserError(f"nothing is held out: {' '.join(held_out_source)} holds no text")
        train = Selected(documents, np.flatnonzero(present))
        return Corpus(train, Selected(held_documents, np.flatnonzero(held_present)), fingerprint)
    held = hashes < np.uint64(held_out_fraction * 2.0**64)
    held_out, train = np.flatnonzero(held & present), np.flatnonzero(~held & present)
    if not len(held_out) or not len(train):
        side = "held out" if not len(train) else "for training"
        raise UserError(
            f"all {int(present.sum())} documents fall on one side of the split ({side}): use "
            "more documents, another `held_out_fraction`, or name a `held_out_source`"
        )
    return Corpus(Selected(documents, train), Selected(documents, held_out), fingerprint)


_EMPTY = np.uint64(2**64 - 1)


def _content_hashes(documents: Documents) -> np.ndarray:
    """A 64-bit hash per document; ``_EMPTY`` for an empty one."""
    return np.array([_content_hash(documents[i]) for i in range(len(documents))], np.uint64)


def _content_hash(text: str) -> int:
    if not text:
        return int(_EMPTY)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
