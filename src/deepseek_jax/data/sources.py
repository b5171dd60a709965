"""Where documents come from: the standard library, text files, JSONL, Parquet, ArrayRecord.

Every source is a random-access sequence of texts (grain's ``RandomAccessDataSource``) that
reads a document when asked for it: only offsets, never a whole corpus, stay in memory.
"""

import functools
import glob
import json
import sysconfig
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deepseek_jax.types import UserError

Documents = grain.sources.RandomAccessDataSource[str]

STDLIB = "stdlib"

# Tests are more than half of the library where they are installed at all (Linux
# distributions leave them out): without them the corpus is about 13 MB everywhere.
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests"}
_ARRAY_RECORD = (".array_record", ".arrayrecord")
_IN_DIRECTORIES = (".txt", ".jsonl", ".parquet", *_ARRAY_RECORD)


def open_documents(source: Sequence[str], text_field: str = "text") -> Documents:
    """Opens sources one after the other as one sequence of texts.

    Args:
        source: Each one ``"stdlib"``, a file, a directory (every ``.txt``, ``.jsonl``,
            ``.parquet`` and ``.array_record`` under it) or a glob such as ``"src/**/*.py"``.
            Files come in sorted order. A file that is none of the record formats is one
            document.
        text_field: Field of a JSONL line, or column of a Parquet file, that holds the text.

    Raises:
        UserError: A path or glob without files, or a file that cannot be opened.
    """
    files = [path for entry in source for path in list_files(entry)]
    if not files:
        raise UserError("no source of documents: name at least one file, directory or glob")
    return _Concatenated(_open_files(files, text_field))


def list_files(entry: str) -> list[Path]:
    """The files that one entry of ``source`` stands for, sorted."""
    if entry == STDLIB:
        return _stdlib_files()
    path = Path(entry).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.is_file() and p.suffix in _IN_DIRECTORIES]
        remedy = f"it holds no {', '.join(_IN_DIRECTORIES)} file; name others by a glob"
    elif glob.has_magic(entry):
        found = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
        remedy = "no file matches"
    else:
        raise UserError(f"no such file or directory: {entry}")
    if not found:
        raise UserError(f"nothing to read in {entry}: {remedy}")
    return sorted(found)


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in root.rglob("*.py")
        # _sysconfigdata records how this interpreter was built, paths included.
        if _STDLIB_SKIPPED.isdisjoint(path.relative_to(root).parts)
        and not path.name.startswith("_sysconfigdata")
    ]
    if not files:
        raise UserError(
            f"the standard library's source is not under {root}: name text of your own as the "
            "source"
        )
    return sorted(files)


def _open_files(files: Sequence[Path], text_field: str) -> list[Documents]:
    """One reader per record file; neighbouring plain files share one."""
    readers: list[Documents] = []
    plain: list[Path] = []
    for path in files:
        suffix = path.suffix.lower()
        if suffix in (".jsonl", ".parquet", *_ARRAY_RECORD) and plain:
            readers.append(TextFiles(plain))
            plain = []
        if suffix == ".jsonl":
            readers.append(JsonLines(path, text_field))
        elif suffix == ".parquet":
            readers.append(Parquet(path, text_field))
        elif suffix in _ARRAY_RECORD:
            readers.append(ArrayRecord(path))
        else:
            plain.append(path)
    return [*readers, TextFiles(plain)] if plain else readers


class TextFiles:
    """Plain files, each one document."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = list(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> str:
        path = self._paths[index]
        return _decode(_read_bytes(path), f"{path}")


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
            line = file.readline()
        try:
            record = json.loads(line)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self._path} is not UTF-8 at byte {offset + error.start}: convert it to UTF-8"
            ) from error
        except ValueError as error:
            raise UserError(f"{self._line(offset)} is not JSON ({error}): mend it") from error
        if not isinstance(record, dict) or not isinstance(record.get(self._text_field), str):
            raise UserError(
                f'{self._line(offset)} has no text under "{self._text_field}": set `text_field` '
                "to the field that holds it"
            )
        return record[self._text_field]

    def _line(self, offset: int) -> str:
        with _open(self._path) as file:
            line_number = file.read(offset).count(b"\n") + 1
        return f"{self._path}, line {line_number}"


class Parquet:
    """One document per row of a string column; a row group is the unit of reading."""

    def __init__(self, path: Path, text_field: str):
        self._path = path
        self._text_field = text_field
        file = self._file
        if text_field not in file.schema_arrow.names:
            raise UserError(
                f'{path} has no column "{text_field}" (it has '
                f"{', '.join(file.schema_arrow.names)}): set `text_field` to the one that "
                "holds the text"
            )
        rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self._ends = np.cumsum(rows, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> str:
        group = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[group - 1]) if group else 0
        text = self._column(group)[index - start].as_py()
        if not isinstance(text, str):
            raise UserError(
                f'{self._path}, row {index + 1} has no text under "{self._text_field}": drop '
                "the row or choose another column"
            )
        return text

    def __getstate__(self) -> dict[str, Any]:
        # Neither an open file nor decoded rows travel to worker processes.
        return {k: v for k, v in self.__dict__.items() if k not in ("_file", "_column")}

    @functools.cached_property
    def _file(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self._path)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"cannot read {self._path} as Parquet ({error})") from error

    @functools.cached_property
    def _column(self) -> Any:
        """Reads the texts of a row group, the last ones kept."""

        @functools.lru_cache(maxsize=8)
        def read(group: int) -> pa.ChunkedArray:
            return self._file.read_row_group(group, columns=[self._text_field]).column(0)

        return read


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
        return _decode(self._records[index], f"{self._path}, record {index + 1}")


class _Concatenated:
    """Several sources end to end."""

    def __init__(self, parts: Sequence[Documents]):
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> str:
        part = bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]


class Selected:
    """The documents of ``documents`` at ``indices``."""

    def __init__(self, documents: Documents, indices: np.ndarray):
        self._documents = documents
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> str:
        return self._documents[int(self._indices[index])]


def _open(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}): check the path and its permissions"
        ) from error


def _read_bytes(path: Path) -> bytes:
    with _open(path) as file:
        return file.read()


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 at byte {error.start}: convert it to UTF-8 or leave it out"
        ) from error


def _line_offsets(path: Path) -> np.ndarray:
    """Byte offset of every line that is not blank."""
    offsets, offset = [], 0
    with _open(path) as file:
        for line in file:
            if not line.isspace():
                offsets.append(offset)
            offset += len(line)
    return np.array(offsets, np.int64)
