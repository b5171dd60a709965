"""Files of a checkpoint: written whole or not at all, checked before they are believed."""

import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from deepseek_jax.types import UserError

_CHECKSUMS = "checksums.json"
_READ_BYTES = 1 << 22


def local_path(directory: str | os.PathLike[str]) -> Path:
    """The directory as an absolute path; a UserError if it is the address of a bucket."""
    if "://" in os.fspath(directory):
        raise UserError(
            f"{directory} is not a path of a file system; mount the bucket (gcsfuse) and give "
            "the path where it is mounted."
        )
    return Path(directory).absolute()


def write_json(path: Path, value: object) -> None:
    """``write_text`` of ``value`` as JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_json_lines(path: Path, records: Iterable[object]) -> None:
    """``write_text`` of a line of JSON for each record."""
    write_text(path, "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records))


def write_text(path: Path, text: str) -> None:
    """Writes so that ``path`` holds the old or the new text, never a part of it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # a full disk, or Ctrl-C
        temporary.unlink(missing_ok=True)
        raise
    handle = os.open(path.parent, os.O_RDONLY)  # the rename itself must reach the disk too
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_checksums(folder: Path) -> None:
    """Records size and CRC-32 of every file of a step."""
    files = {str(path.relative_to(folder)): path for path in _item_files(folder)}
    with ThreadPoolExecutor() as pool:
        sums = dict(zip(files, pool.map(_size_and_crc, files.values()), strict=True))
    write_json(folder / _CHECKSUMS, {"files": sums})


def newest_intact(steps: Path, prefix: str = "") -> tuple[int | None, dict[int, str]]:
    """The newest step whose files are intact, and what ails those after it.

    Args:
        steps: the directory of the steps.
        prefix: check only files whose name in the step starts so: ``"model/"``.

    Returns:
        The step, or None if there is none at all; and the damage by step.

    Raises:
        UserError: there are steps, but all are damaged.
    """
    found = [int(path.name) for path in steps.glob("*") if path.name.isdecimal()]
    damaged: dict[int, str] = {}
    for step in sorted(found, reverse=True):
        problem = _problem(steps / str(step), prefix)
        if problem is None:
            return step, damaged
        damaged[step] = problem
    if damaged:
        reasons = "; ".join(f"step {step}: {problem}" for step, problem in damaged.items())
        raise UserError(
            f"no checkpoint in {steps} is intact ({reasons}); "
            "restore one from a copy, or start anew in another output directory."
        )
    return None, damaged


def _problem(folder: Path, prefix: str) -> str | None:
    """What is wrong with a step, or None. The processes share the reading between them."""
    try:
        expected = json.loads((folder / _CHECKSUMS).read_text(encoding="utf-8"))["files"]
        names = sorted(name for name in expected if name.startswith(prefix))
        if not names:
            raise KeyError(prefix)
        mine = names[jax.process_index() :: jax.process_count()]
        with ThreadPoolExecutor() as pool:
            checks = pool.map(lambda name: _mismatch(folder, name, expected[name]), mine)
            mistakes = [check for check in checks if check]
    except (OSError, ValueError, KeyError, TypeError) as error:
        mistakes = [f"{_CHECKSUMS} is missing or unreadable ({type(error).__name__})"]
    everyone = [part.decode() for part in exchange("".join(mistakes[:1]).encode())]
    return next((mistake for mistake in everyone if mistake), None)


def _mismatch(folder: Path, name: str, expected: list[int]) -> str | None:
    path = folder / name
    try:
        size = path.stat().st_size
        if size != expected[0]:
            return f"{name} has {size} bytes instead of {expected[0]}"
        return None if _size_and_crc(path) == expected else f"{name} fails its checksum"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"


def _item_files(folder: Path) -> Iterator[Path]:
    # Files directly in the folder are Orbax's notes on the step; it still writes to them while
    # it renames, and a restore does not need them.
    return (path for path in sorted(folder.glob("*/**/*")) if path.is_file())


def _size_and_crc(path: Path) -> list[int]:
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def exchange(message: bytes) -> list[bytes]:
    """The messages of all processes, in order; also a barrier."""
    if jax.process_count() == 1:
        return [message]
    longest = max(int(n) for n in multihost_utils.process_allgather(np.int32(len(message))))
    length = 1 << longest.bit_length()  # each length is compiled once: few, then
    padded = np.zeros(4 + length, np.uint8)
    padded[:4] = np.frombuffer(len(message).to_bytes(4, "little"), np.uint8)
    padded[4 : 4 + len(message)] = np.frombuffer(message, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row[4 : 4 + int.from_bytes(bytes(row[:4]), "little")]) for row in rows]


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write to the file system."""
    return shutil.disk_usage(folder).free


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an exception, or what caused it, is a full disk or an exhausted quota."""
    # TensorStore reports errno only as text inside a ValueError.
    seen = []
    while error is not None and error not in seen:
        text = str(error)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in text or "Disk quota exceeded" in text:
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def disk_full(folder: Path, step: int, needed: int, free: int) -> UserError:
    """The error to raise, with sizes in bytes."""
    return UserError(
        f"the disk is full: {folder} needs {needed:,} bytes for the checkpoint of step {step} and "
        f"has {free:,} free; make room or keep fewer checkpoints, then continue with --resume "
        "(earlier checkpoints are intact)."
    )
