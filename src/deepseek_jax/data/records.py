"""Files of records: JSON lines and Parquet rows, each read when asked for, each with an address."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from deepseek_jax.types import UserError


class JsonRecords:
    """One record per line. Blank lines are passed over; line offsets alone stay in memory."""

    def __init__(self, path: Path):
        self._path = path
        self._offsets = _line_offsets(path)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Any:
        offset = int(self._offsets[index])
        with open_binary(self._path) as file:
            file.seek(offset)
            line = decode(file.readline(), f"{self._path}", offset)
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{self.place(index)} is not JSON ({error}): mend it") from error
        if "\\u" in line and not _is_unicode(record):
            raise UserError(f"{self.place(index)} holds half a surrogate pair: mend it")
        return record

    def place(self, index: int) -> str:
        """Where a record is, for a message."""
        number = read_bytes(self._path, 0, int(self._offsets[index])).count(b"\n") + 1
        return f"{self._path}, line {number}"


class ParquetRecords:
    """One record per row, over several files.

    A row group is the least that can be read, so the last ones stay in memory. Reading is fast
    as long as neighbouring indices fall into few row groups: see ``block_ends``.

    Args:
        paths: The files.
        columns: Those to read. Of each file, those of them that it has, at least one.
        remedy: What to do about a file that has none.

    Attributes:
        block_ends: Where each row group ends, counted in records.
        cached_groups: Row groups kept: as many as fit into 256 MB, 8 at most.
    """

    def __init__(self, paths: Sequence[Path], columns: Sequence[str], remedy: str):
        self._groups: list[tuple[Path, int, list[str]]] = []
        rows, largest = [], 1
        for path in paths:
            with _open_parquet(path) as file:
                metadata, names = file.metadata, file.schema_arrow.names
                roots = [column.path.partition(".")[0] for column in file.schema]
            present = [name for name in columns if name in names]
            if not present:
                wanted = " or ".join(f'"{name}"' for name in columns)
                raise UserError(
                    f"{path} has no column {wanted} (it has {', '.join(names)}): {remedy}"
                )
            wanted_columns = [i for i, root in enumerate(roots) if root in present]
            for i in range(metadata.num_row_groups):
                group = metadata.row_group(i)
                self._groups.append((path, i, present))
                rows.append(group.num_rows)
                size = sum(group.column(c).total_uncompressed_size for c in wanted_columns)
                largest = max(largest, size)
        self.block_ends: Int64[np.ndarray, "n"] = np.cumsum(rows, dtype=np.int64)
        self.cached_groups = max(1, min(8, 256_000_000 // largest))

    def __len__(self) -> int:
        return int(self.block_ends[-1]) if len(self.block_ends) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        group, row = self._locate(index)
        table = self._read_group(group)
        return {name: table.column(name)[row].as_py() for name in table.column_names}

    def place(self, index: int) -> str:
        """Where a record is, for a message."""
        group, row = self._locate(index)
        path, number, _ = self._groups[group]
        return f"{path}, row {row + 1} of row group {number}"

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_read_group"}

    def _locate(self, index: int) -> tuple[int, int]:
        group = int(np.searchsorted(self.block_ends, index, side="right"))
        return group, index - (int(self.block_ends[group - 1]) if group else 0)

    @functools.cached_property
    def _read_group(self) -> Any:
        """Columns of a row group; the latest results stay. Left behind when pickled."""

        @functools.lru_cache(maxsize=self.cached_groups)
        def read(group: int) -> pa.Table:
            path, i, columns = self._groups[group]
            with _open_parquet(path) as file:
                return file.read_row_group(i, columns=columns)

        return read


def open_binary(path: Path) -> BinaryIO:
    """Opens a file, or says in a sentence why not."""
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}): check the path and its permissions"
        ) from error


def read_bytes(path: Path, start: int, end: int) -> bytes:
    """Bytes ``start`` to ``end`` of a file; to its end if ``end`` is -1."""
    with open_binary(path) as file:
        file.seek(start)
        return file.read(end - start if end >= 0 else -1)


def decode(data: bytes, name: str, offset: int = 0) -> str:
    """UTF-8 to text; what is not UTF-8 is a ``UserError`` that names the byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 at byte {offset + error.start}: convert it to UTF-8 or leave "
            "it out"
        ) from error


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {path} as Parquet ({error}): is it whole?") from error


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _line_offsets(path: Path) -> Int64[np.ndarray, "n"]:
    """Byte offset of every line that is not blank."""
    offsets, offset = [], 0
    with open_binary(path) as file:
        for line in file:
            if not line.isspace():
                offsets.append(offset)
            offset += len(line)
    return np.array(offsets, np.int64)
