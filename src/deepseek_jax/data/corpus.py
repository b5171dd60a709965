"""The split of a corpus into training and held-out documents."""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt64

from deepseek_jax.data.sources import Documents, Selected, list_files, open_files
from deepseek_jax.types import UserError


class Corpus(NamedTuple):
    """Documents to learn from and documents to evaluate on.

    ``fingerprint`` identifies the documents of the source and their order: by their contents,
    or with a ``held_out_source`` by the sizes of the files.
    """

    train: Selected
    held_out: Selected
    fingerprint: str


class _Stamped(NamedTuple):
    """A file in the state that it was found in."""

    path: Path
    size: int
    modified_ns: int


def open_corpus(
    source: Sequence[str],
    *,
    text_field: str = "text",
    separator: str = "",
    held_out_fraction: float = 0.05,
    held_out_source: Sequence[str] = (),
) -> Corpus:
    """Opens a corpus, reads it through once, and splits it.

    A document is held out when the hash of its text falls below ``held_out_fraction``: copies
    of one text are on one side, and neither a seed nor the order of files moves a document
    across. Empty documents are left out. The pass also finds every unreadable document before
    training starts.

    With ``held_out_source`` nothing is held out of ``source``, and only the documents held out
    are read beforehand: the way for a corpus too large to read through at every start (about
    50 MB/s). An unreadable document then stops the run when it is met.

    Opening the same files again costs nothing as long as they have not changed.

    Args:
        source: As ``sources.list_files``.
        text_field: As ``sources.open_files``.
        separator: As ``sources.open_files``.
        held_out_fraction: Share of documents to evaluate on.
        held_out_source: Documents to evaluate on instead.

    Raises:
        UserError: Unreadable input, an empty corpus, or an empty side of the split.
    """
    files = _stamp(list_files(source))
    if held_out_source:
        held_files = _stamp(list_files(held_out_source))
        return _open_pair(files, held_files, text_field, separator)
    return _open_split(files, text_field, separator, held_out_fraction)


@functools.lru_cache(maxsize=2)
def _open_split(
    files: tuple[_Stamped, ...], text_field: str, separator: str, held_out_fraction: float
) -> Corpus:
    documents, hashes = _read_through(files, text_field, separator)
    held = hashes < np.uint64(held_out_fraction * 2.0**64)
    train = Selected(documents, np.flatnonzero(~held & (hashes != _EMPTY)))
    held_out = Selected(documents, np.flatnonzero(held))
    for side, name in ((train, "held out"), (held_out, "for training")):
        if not len(side):
            raise UserError(
                f"all {len(train) + len(held_out)} documents are {name}: use more documents (or "
                "a `separator` within files), another `held_out_fraction`, or a `held_out_source`"
            )
    return Corpus(train, held_out, _fingerprint(hashes))


@functools.lru_cache(maxsize=2)
def _open_pair(
    files: tuple[_Stamped, ...],
    held_out_files: tuple[_Stamped, ...],
    text_field: str,
    separator: str,
) -> Corpus:
    documents = open_files([file.path for file in files], text_field, separator)
    if not len(documents) or not any(file.size for file in files):
        raise _empty(files)
    held_documents, hashes = _read_through(held_out_files, text_field, separator)
    sizes = np.array([len(documents), *(file.size for file in files)], np.uint64)
    train = Selected(documents, np.arange(len(documents)))
    held_out = Selected(held_documents, np.flatnonzero(hashes != _EMPTY))
    return Corpus(train, held_out, _fingerprint(sizes))


_EMPTY = np.uint64(2**64 - 1)


def _read_through(
    files: Sequence[_Stamped], text_field: str, separator: str
) -> tuple[Documents, UInt64[np.ndarray, "n"]]:
    """The documents of ``files`` and a 64-bit hash of each; ``_EMPTY`` for an empty one."""
    documents = open_files([file.path for file in files], text_field, separator)
    texts = (documents[i] for i in range(len(documents)))
    hashes = np.fromiter((_content_hash(text) for text in texts), np.uint64, len(documents))
    if (hashes == _EMPTY).all():
        raise _empty(files)
    return documents, hashes


def _empty(files: Sequence[_Stamped]) -> UserError:
    names = ", ".join(str(file.path) for file in files[:3])
    more = f" and {len(files) - 3} more files" if len(files) > 3 else ""
    return UserError(f"the corpus is empty: no text in {names}{more}; name another source")


def _content_hash(text: str) -> int:
    if not text:
        return int(_EMPTY)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _fingerprint(numbers: UInt64[np.ndarray, "n"]) -> str:
    return hashlib.blake2b(numbers.tobytes(), digest_size=8).hexdigest()


def _stamp(files: Sequence[Path]) -> tuple[_Stamped, ...]:
    stats = ((path, path.stat()) for path in files)
    return tuple(_Stamped(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats)
