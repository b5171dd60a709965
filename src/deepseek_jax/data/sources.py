"""Where documents come from: the standard library, text files, JSONL, Parquet, ArrayRecord.

Every source is a random-access sequence of texts (grain's ``RandomAccessDataSource``) that
reads a document when asked for it: offsets stay in memory, never a whole corpus.
"""

import functools
import glob
import itertools
import json
import mmap
import os
import sysconfig
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

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
        return _decode(_read(path, 0, -1), f"{path}")


class SeparatedText:
    """Documents of one plain file, cut at ``separator`` (which belongs to none of them)."""

    def __init__(self, path: Path, separator: str):
        self._path = path
        mark = separator.encode()
        self._starts, self._ends = [0], []
        with _open(path) as file:
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
        return _decode(_read(self._path, start, self._ends[index]), f"{self._path}", start)


class JsonLines:
    """One document per line: the string under ``text_field``. Blank lines are passed over."""

    def __init__(self, path: Path, text_field: str):
        self._path = path
        self._text_field = text_field
        self._offsets = _line_offsets(path)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> str:
        offset = int(self._offsets[index])
        with _open(self._path) as file:
            file.seek(offset)
            line = _decode(file.readline(), f"{self._path}", offset)
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{self._line(offset)} is not JSON ({error}): mend it") from error
        text = record.get(self._text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(
                f'{self._line(offset)} has no text under "{self._text_field}": set `text_field` '
                "to the field that holds it"
            )
        if "\\u" in line and not _is_unicode(text):
            raise UserError(f"{self._line(offset)} holds half a surrogate pair: mend it")
        return text

    def _line(self, offset: int) -> str:
        number = _read(self._path, 0, offset).count(b"\n") + 1
        return f"{self._path}, line {number}"


class ParquetFiles:
    """One document per row of a string column, over several files.

    A row group is the least that can be read, so the last ones stay in memory. Reading is fast
    as long as neighbouring indices fall into few row groups: see ``block_ends``.

    Attributes:
        block_ends: Where each row group ends, counted in documents.
        cached_groups: Row groups kept: as many as fit into 256 MB, 8 at most.
    """

    def __init__(self, paths: Sequence[Path], text_field: str):
        self._text_field = text_field
        self._groups: list[tuple[Path, int]] = []
        rows, largest = [], 1
        for path in paths:
            metadata, column = self._metadata(path)
            for i in range(metadata.num_row_groups):
                group = metadata.row_group(i)
                self._groups.append((path, i))
                rows.append(group.num_rows)
                largest = max(largest, group.column(column).total_uncompressed_size)
        self.block_ends = np.cumsum(rows, dtype=np.int64)
        self.cached_groups = max(1, min(8, 256_000_000 // largest))

    def __len__(self) -> int:
        return int(self.block_ends[-1]) if len(self.block_ends) else 0

    def __getitem__(self, index: int) -> str:
        group = int(np.searchsorted(self.block_ends, index, side="right"))
        row = index - (int(self.block_ends[group - 1]) if group else 0)
        text = self._read_group(group)[row].as_py()
        if not isinstance(text, str):
            path, first = self._groups[group]
            raise UserError(
                f"{path}, row {row + 1} of row group {first} has no text under "
                f'"{self._text_field}": drop the row or choose another column'
            )
        return text

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_read_group"}

    @functools.cached_property
    def _read_group(self) -> Any:
        """Texts of a row group; the latest results stay. Left behind when pickled."""

        @functools.lru_cache(maxsize=self.cached_groups)
        def read(group: int) -> pa.ChunkedArray:
            path, i = self._groups[group]
            with _open_parquet(path) as file:
                return file.read_row_group(i, columns=[self._text_field]).column(0)

        return read

    def _metadata(self, path: Path) -> tuple[pq.FileMetaData, int]:
        """What a file says of itself, and the number of the text column."""
        with _open_parquet(path) as file:
            names = file.schema_arrow.names
            columns = [column.path for column in file.schema]
            if self._text_field not in columns:
                raise UserError(
                    f'{path} has no column "{self._text_field}" (it has {", ".join(names)}): '
                    "set `text_field` to the one that holds the text"
                )
            return file.metadata, columns.index(self._text_field)


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
        return _decode(self._records[index], f"{self._path}, record {index + 1},")


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
        raise UserError(f"no such file or directory: {entry}; name one that exists as `source`")
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


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}): check the path and its permissions"
        ) from error


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {path} as Parquet ({error}): is it whole?") from error


def _read(path: Path, start: int, end: int) -> bytes:
    """Bytes ``start`` to ``end`` of a file; to its end if ``end`` is -1."""
    with _open(path) as file:
        file.seek(start)
        return file.read(end - start if end >= 0 else -1)


def _decode(data: bytes, name: str, offset: int = 0) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 at byte {offset + error.start}: convert it to UTF-8 or leave "
            "it out"
        ) from error


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _line_offsets(path: Path) -> Int64[np.ndarray, "n"]:
    """Byte offset of every line that is not blank."""
    offsets, offset = [], 0
    with _open(path) as file:
        for line in file:
            if not line.isspace():
                offsets.append(offset)
            offset += len(line)
    return np.array(offsets, np.int64)
