"""Where documents come from: the standard library, text files, JSONL, Parquet, ArrayRecord.

Every source is a random-access sequence of texts (grain's ``RandomAccessDataSource``) that
reads a document when asked for it: offsets stay in memory, never a whole corpus.
"""

import glob
import itertools
import mmap
import os
import sysconfig
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path

import grain
import numpy as np
from jaxtyping import Int64

from deepseek_jax.data.records import (
    JsonRecords,
    ParquetRecords,
    decode,
    open_binary,
    read_bytes,
)
from deepseek_jax.types import UserError

Documents = grain.sources.RandomAccessDataSource[str]

STDLIB = "stdlib"

# Tests are more than half of the library where they are installed at all (Linux
# distributions leave them out): without them the corpus is about 13 MB everywhere.
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests"}
_ARRAY_RECORD = (".array_record", ".arrayrecord")
_RECORDS = (".jsonl", ".parquet", *_ARRAY_RECORD)
_IN_DIRECTORIES = (".txt", *_RECORDS)


def list_files(source: Sequence[str]) -> list[Path]:
    """The files that the entries of ``source`` stand for, sorted within each entry.

    An entry is ``"stdlib"``, a file, a directory (every ``.txt``, ``.jsonl``, ``.parquet`` and
    ``.array_record`` under it) or a glob such as ``"src/**/*.py"``.

    Raises:
        UserError: A path that does not exist, or an entry without files.
    """
    if not source:
        raise UserError("no source of documents: name at least one file, directory or glob")
    return [path for entry in source for path in _list_entry(entry)]


def open_files(files: Sequence[Path], text_field: str = "text", separator: str = "") -> Documents:
    """Opens files one after the other as one sequence of texts.

    Args:
        files: Their suffix tells the format; what is not ``.jsonl``, ``.parquet`` or
            ``.array_record`` is plain text.
        text_field: Field of a JSONL line, or column of a Parquet file, that holds the text.
        separator: Where one document ends and the next begins in a plain file; without one a
            file is a document.

    Raises:
        UserError: A file that cannot be opened.
    """
    parts: list[Documents] = []
    for suffix, group in itertools.groupby(files, _format):
        paths = list(group)
        if suffix == ".parquet":
            parts.append(ParquetFiles(paths, text_field))
        elif suffix == ".jsonl":
            parts += [JsonLines(path, text_field) for path in paths]
        elif suffix in _ARRAY_RECORD:
            parts += [ArrayRecord(path) for path in paths]
        elif separator:
            parts += [SeparatedText(path, separator) for path in paths]
        else:
            parts.append(TextFiles(paths))
    return parts[0] if len(parts) == 1 else Concatenated(parts)


class TextFiles:
    """Plain files, each one document."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = list(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> str:
        path = self._paths[index]
        return decode(read_bytes(path, 0, -1), f"{path}")


class SeparatedText:
    """Documents of one plain file, cut at ``separator`` (which belongs to none of them)."""

    def __init__(self, path: Path, separator: str):
        self._path = path
        mark = separator.encode()
        self._starts, self._ends = [0], []
        with open_binary(path) as file:
            if os.fstat(file.fileno()).st_size:  # an empty file cannot be mapped
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    while (end := data.find(mark, self._starts[-1])) >= 0:
                        self._ends.append(end)
                        self._starts.append(end + len(mark))
                    self._ends.append(len(data))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._starts[index]
        return decode(read_bytes(self._path, start, self._ends[index]), f"{self._path}", start)


class JsonLines:
    """One document per line: the string under ``text_field``. Blank lines are passed over."""

    def __init__(self, path: Path, text_field: str):
        self._records = JsonRecords(path)
        self._text_field = text_field

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> str:
        record = self._records[index]
        text = record.get(self._text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(
                f'{self._records.place(index)} has no text under "{self._text_field}": set '
                "`text_field` to the field that holds it"
            )
        return text


class ParquetFiles:
    """One document per row of a string column, over several files (``ParquetRecords``)."""

    def __init__(self, paths: Sequence[Path], text_field: str):
        remedy = "set `text_field` to the one that holds the text"
        self.records = ParquetRecords(paths, [text_field], remedy)
        self._text_field = text_field

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> str:
        text = self.records[index][self._text_field]
        if not isinstance(text, str):
            raise UserError(
                f'{self.records.place(index)} has no text under "{self._text_field}": drop the '
                "row or choose another column"
            )
        return text


class ArrayRecord:
    """One document per record: its bytes are the text."""

    def __init__(self, path: Path):
        self._path = path
        try:
            self._records = grain.sources.ArrayRecordDataSource(str(path))
            self._length = len(self._records)
        except Exception as error:  # the library raises RuntimeError, ValueError and others
            raise UserError(f"cannot read {path} as ArrayRecord ({error})") from error

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> str:
        return decode(self._records[index], f"{self._path}, record {index + 1},")


class Concatenated:
    """Several sources end to end."""

    def __init__(self, parts: Sequence[Documents]):
        self.parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> str:
        part = bisect_right(self._ends, index)
        return self.parts[part][index - (self._ends[part - 1] if part else 0)]


class Selected:
    """The documents at ``indices`` (sorted) of ``documents``."""

    def __init__(self, documents: Documents, indices: Int64[np.ndarray, "n"]):
        self.documents = documents
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> str:
        return self.documents[int(self.indices[index])]


def _list_entry(entry: str) -> list[Path]:
    path = Path(entry).expanduser()
    if entry == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        # _sysconfigdata records how this interpreter was built, paths included.
        found = (p for p in _walk(root, skip=_STDLIB_SKIPPED) if p.suffix == ".py")
        found = [p for p in found if not p.name.startswith("_sysconfigdata")]
        remedy = f"no source under {root}; name text of your own"
    elif path.is_file():
        return [path]
    elif path.is_dir():
        found = [p for p in _walk(path, skip=set()) if p.suffix.lower() in _IN_DIRECTORIES]
        remedy = f"it holds no {', '.join(_IN_DIRECTORIES)} file; name others by a glob"
    elif glob.has_magic(entry):
        found = [p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file()]
        remedy = "no file matches; mend the glob"
    else:
        raise UserError(f"no such file or directory: {entry}; check the path")
    if not found:
        raise UserError(f"nothing to read in {entry}: {remedy}")
    return sorted(found)


def _walk(root: Path, skip: set[str]) -> Iterable[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skip]
        yield from (Path(folder, name) for name in names)


def _format(path: Path) -> str:
    suffix = path.suffix.lower()
    return suffix if suffix in _RECORDS else ""
