"""What both directions share: an output directory claimed, jobs run in parallel, a full disk."""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from deepseek_jax.checkpoint.files import is_disk_full, write_json
from deepseek_jax.types import UserError

Job = Callable[[], int]
"""Writes something, and returns how many bytes."""
_MARKER = "converting.json"


def claim_output(out: Path, what: dict[str, Any]) -> Path:
    """Make ``out`` the place of this conversion, or find in it the same one, interrupted.

    Returns:
        The file that marks the conversion as unfinished, to be removed at its end.

    Raises:
        UserError: if ``out`` holds anything else.
    """
    marker = out / _MARKER
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = None
    except ValueError:
        found = "unreadable"
    if found is not None and found != what:
        raise UserError(
            f"{out} holds an unfinished conversion of another checkpoint or with other options; "
            "remove it or choose another output directory."
        )
    if found is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty directory; choose another output directory.")
    out.mkdir(parents=True, exist_ok=True)
    write_json(marker, what)
    return marker


def run_all(jobs: Sequence[Job], total: int, workers: int, progress: bool) -> None:
    """Run jobs that each return how many bytes they wrote; the first failure stops the rest."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    pool = ThreadPoolExecutor(workers)
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("converting", total=total)
        try:
            for written in pool.map(lambda job: job(), jobs):
                bar.advance(task, written)
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Failures of the file system as one sentence."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise UserError(
                f"the disk of {out} is full; make room and run the same command again, it will "
                "continue where it stopped."
            ) from error
        raise UserError(f"cannot write {error.filename or out}: {error.strerror}.") from error
