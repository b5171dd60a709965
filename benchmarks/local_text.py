"""Real text that every machine with Python has: sources and documentation of what is installed.

What a training run on a machine without a network can learn from. Files are told apart by their
content, so that what several packages carry along is taken once; the hash also orders them and
holds some out, so that the same files give the same documents in the same order anywhere.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deepseek_jax.data.tokenizer import Tokenizer

# Written by people: programs and what explains them. No data, no notebooks with pictures in them.
SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("py", "pyi", "pyx", "pxd", "c", "cc", "cpp", "cxx", "cu", "cuh", "h", "hh", "hpp", "inl"),
        *("f", "f90", "pl", "pm", "rb", "js", "ts", "sh", "m4", "el", "lua", "go", "rs", "java"),
        *("md", "rst", "txt", "html", "tex", "pod", "toml", "cmake", "proto", "ipp"),
    )
)
# Tables that a program wrote are as large as a hundred sources, and repeat themselves.
MOST_BYTES = 400_000
_SKIPPED = {"__pycache__", "node_modules", ".git"}


class Text(NamedTuple):
    """Documents, in an order that is random but always the same."""

    train: list[str]
    held_out: list[str]
    files: int
    """Found, copies included."""


def roots() -> list[Path]:
    """Where this Python keeps its library and its packages."""
    names = ("stdlib", "platstdlib", "purelib", "platlib", "include")
    return [Path(sysconfig.get_path(name)) for name in names]


def gather(folders: Iterable[Path], most_bytes: int, held_out: float = 0.01) -> Text:
    """Every text file under the folders, once, up to so many bytes in all.

    Args:
        folders: May lie within one another, and need not exist.
        most_bytes: Of all documents together.
        held_out: Share of the documents that is kept from training.
    """
    paths = sorted({path for folder in folders for path in _files(folder)})
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
        found = {key: text for key, text in pool.map(_read, paths) if text}
    train, held, size = [], [], 0
    for key in sorted(found):
        size += len(found[key].encode())
        if size > most_bytes:
            break
        side = held if int.from_bytes(key[-4:], "little") < held_out * 2**32 else train
        side.append(found[key])
    return Text(train, held, len(paths))


def _files(folder: Path) -> Iterable[Path]:
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED]
        for name in names:
            if os.path.splitext(name)[1] in SUFFIXES:
                yield Path(parent, name)


def _read(path: Path) -> tuple[bytes, str]:
    """The hash and the content of a file; nothing where it is too large, or not UTF-8."""
    try:
        if path.is_symlink() or not 0 < path.stat().st_size <= MOST_BYTES:
            return b"", ""
        content = path.read_bytes()
        return hashlib.blake2b(content, digest_size=16).digest(), content.decode()
    except (OSError, UnicodeDecodeError):
        return b"", ""


def num_bytes(documents: Iterable[str]) -> int:
    """In UTF-8."""
    return sum(len(document.encode()) for document in documents)


def first_bytes(documents: Iterable[str], most: int) -> Iterable[str]:
    """Documents from the first on, until there are so many bytes."""
    for document in documents:
        if most <= 0:
            return
        most -= len(document.encode())
        yield document


def encode(tokenizer: Tokenizer, documents: Sequence[str], most_tokens: int) -> np.ndarray:
    """Documents end to end, each after the begin-of-sentence token, on all CPU cores (uint16).

    Ends after so many tokens.
    """
    if tokenizer.vocab_size > 2**16:
        raise ValueError(f"{tokenizer.vocab_size} ids do not fit 16 bits")
    parts, count, start = [], 0, 0
    while start < len(documents) and count < most_tokens:
        # Enough at a time for all cores, and not so many that objects fill the memory.
        end = min(start + 4096, len(documents))
        for ids in tokenizer.encode_batch(documents[start:end]):
            parts.append(np.array([tokenizer.bos_id, *ids], np.uint16))
            count += len(ids) + 1
        start = end
    return np.concatenate(parts)[:most_tokens]


class Rows(NamedTuple):
    """Rows of T + 1 tokens that overlap by one, so that every token is a target once."""

    ids: np.ndarray
    seq_len: int

    def __len__(self) -> int:
        return (len(self.ids) - 1) // self.seq_len

    def take(self, index: np.ndarray) -> np.ndarray:
        """``[len(index), T + 1]``."""
        at = index[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        return self.ids[at]


class Batches:
    """Batches of rows: all rows once in a random order, then all again in another."""

    def __init__(self, rows: Rows, batch_size: int, seed: int):
        """Every epoch has whole batches; what is left over waits for another order."""
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.per_epoch = len(rows) // batch_size
        if not self.per_epoch:
            raise ValueError(f"{len(rows)} rows are no batch of {batch_size}")
        self._orders: dict[int, np.ndarray] = {}

    def __getitem__(self, step: int) -> np.ndarray:
        epoch, batch = divmod(step, self.per_epoch)
        if epoch not in self._orders:
            rng = np.random.default_rng((self.seed, epoch))
            self._orders[epoch] = rng.permutation(len(self.rows))
        first = batch * self.batch_size
        return self.rows.take(self._orders[epoch][first : first + self.batch_size])
