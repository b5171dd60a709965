"""A strict reader of safetensors headers: every byte of a file must be accounted for.

Format: 8 bytes little-endian length N; N bytes of JSON
``{name: {"dtype", "shape", "data_offsets": [begin, end]}}``; the data, without holes. A file that
bends any of this was not written by a correct program, and is refused before data is touched.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from deepseek_jax.types import UserError

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class TensorInfo(NamedTuple):
    """Where a tensor lies."""

    path: Path
    dtype: str
    """Name of the format, a key of ``DTYPES``."""
    shape: tuple[int, ...]
    offset: int
    """First byte, from the start of the file."""

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize


def read_header(path: Path) -> dict[str, TensorInfo]:
    """All tensors of a file, by name.

    Raises:
        UserError: if the file cannot be read, is truncated, or is not a safetensors file.
    """
    try:
        size = os.path.getsize(path)
        with path.open("rb") as file:
            length = int.from_bytes(_exactly(file, 8, size), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"its header claims {length:,} bytes")
            text = _exactly(file, length, size - 8)
        header = json.loads(
            text.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
        return _tensors(path, header, first=8 + length, size=size)
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(
            f"{path} is not a readable safetensors file: {reason}; download or copy it again."
        ) from error


def _exactly(file: Any, count: int, available: int) -> bytes:
    if count > available:
        raise ValueError(f"it ends after {max(available, 0):,} of {count:,} bytes (truncated)")
    data = file.read(count)
    if len(data) != count:
        raise ValueError("it became shorter while it was read")
    return data


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        key.encode()  # fails on half a surrogate pair, which JSON can spell but no text has
        if key in found:
            raise ValueError(f"its header has {key[:200]!r} twice")
        found[key] = value
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"its header contains {text}")


def _tensors(path: Path, header: Any, first: int, size: int) -> dict[str, TensorInfo]:
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise ValueError("its __metadata__ is not a table of strings")
    "".join(metadata.values()).encode()
    tensors, spans = {}, []
    for name, info in header.items():
        tensors[name], span = _tensor(path, name, info, first)
        spans.append(span)
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            raise ValueError(f"its data has {'a hole' if begin > end else 'an overlap'} at {begin}")
        end = stop
    if first + end > size:
        raise ValueError(f"it has {size:,} of {first + end:,} bytes (truncated)")
    if first + end < size:
        raise ValueError(f"it has {size - first - end:,} bytes that belong to no tensor")
    return tensors


def _tensor(path: Path, name: str, info: Any, first: int) -> tuple[TensorInfo, tuple[int, int]]:
    what = f"tensor {name[:200]!r}"
    if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{what} must have exactly dtype, shape and data_offsets")
    dtype, shape, span = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{what} has the unknown dtype {str(dtype)[:50]!r}")
    if not _naturals(shape) or not _naturals(span) or len(span) != 2:
        raise ValueError(f"{what} has a shape or data_offsets that are not whole numbers")
    begin, end = span
    found = TensorInfo(path, dtype, tuple(shape), first + begin)
    if end - begin != found.nbytes:
        raise ValueError(f"{what} is {dtype}{shape} but has {end - begin:,} bytes of data"[:500])
    return found, (begin, end)


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(x) is int and 0 <= x < 2**63 for x in values)


def make_header(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file with these tensors (dtype name, shape), in this order.

    Returns:
        The bytes, and where in the file each tensor begins.
    """
    offset, starts = 0, {}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        starts[name], offset = offset, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins on an 8-byte boundary, as the library has it
    first = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {k: first + v for k, v in starts.items()}
