"""Which run a directory belongs to."""

import fcntl
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.checkpoint.files import exchange, local_path, write_json
from deepseek_jax.types import UserError


def claim_run_directory(
    path: str | os.PathLike[str],
    config_json: dict[str, Any],
    *,
    resume: bool,
    may_change: Collection[str] = (),
    dry_run: bool = False,
) -> None:
    """Makes ``path`` the directory of this run: creates it and writes ``run.json``.

    Args:
        path: the run directory.
        config_json: everything that defines the run, as nested dicts of JSON values.
        resume: continue the run that is there, instead of starting one.
        may_change: dotted names (``"train.total_steps"``) of fields, or of groups of fields,
            that may differ on resume; the new values are stored.
        dry_run: only raise what there is to raise. A run whose other input may still turn out
            bad claims the directory when it is about to begin: a mistake leaves no run behind.

    Raises:
        UserError: a fresh run into the directory of another; a resume where there is no run,
            or with a field that contradicts the stored one.
    """
    directory = local_path(path)

    def claim() -> bytes:
        try:
            config = json.loads(json.dumps(config_json))
            _check(directory, config, resume, may_change)
            if not dry_run:
                _write(directory, config)
        except UserError as error:
            return str(error).encode()
        return b""

    # One process decides for all: the others would find the file that it has just written.
    message = exchange(claim() if jax.process_index() == 0 else b"")[0]
    if message:
        raise UserError(message.decode())


def hold(directory: Path) -> int:
    """Keeps other processes from writing to a run directory; a descriptor, to be closed.

    Two that save at once take each other's unfinished steps for what a dead one has left. The
    kernel lets go with the process, however that ends, so a killed run is continued at once. File
    systems without such locks on directories (NFS) let everybody in.

    Raises:
        UserError: another process holds it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"{directory} is in use by another process; wait for it to end, stop it, or choose "
            "another output directory."
        ) from None
    except OSError:
        pass
    return descriptor


def _check(directory: Path, config: dict, resume: bool, may_change: Collection[str]) -> None:
    taken = (directory / "run.json").exists() or any((directory / "checkpoints").glob("*"))
    if taken and not resume:
        raise UserError(
            f"{directory} already holds a run; continue it with --resume, "
            "or choose another output directory."
        )
    if resume:
        stored = dict(_leaves(read_run(directory, NO_RESUME)))
        wanted = dict(_leaves(config))
        for name in sorted(stored.keys() | wanted.keys()):
            old, new = stored.get(name, "absent"), wanted.get(name, "absent")
            free = any(name == field or name.startswith(field + ".") for field in may_change)
            if old != new and not free:
                raise UserError(
                    f"{directory} was started with {name} = {old!r}, this resume asks for "
                    f"{new!r}; resume with the stored value, or choose another output directory."
                )


def _write(directory: Path, config: dict) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "run.json", {"config": config})
    except OSError as error:
        raise UserError(
            f"cannot write to {directory}: {error.strerror}; choose another output directory."
        ) from error


NO_RESUME = "check the path, or start without --resume"


def read_run(directory: Path, remedy: str = "check the path") -> dict[str, Any]:
    """The configuration stored in ``run.json``; a UserError if there is none."""
    path = directory / "run.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["config"]
    except FileNotFoundError:
        raise UserError(f"{directory} holds no run (no run.json); {remedy}.") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"{path} is not readable as the record of a run ({error}); restore it from a copy."
        ) from error


def _leaves(tree: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted names and values of nested dicts; an empty dict counts as a value."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree
