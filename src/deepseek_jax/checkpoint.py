"""Checkpoints over Orbax, and the identity of a run directory.

::

    out/pretrain/
        run.json                 what this run is: its configuration (`claim_run_directory`)
        checkpoints/1200/        one step
            model/               params and router bias; all that generation or the next stage reads
            optimizer/           step and optimizer state
            host/                data iterators, RNG key, anything else that is JSON
            checksums.json       size and CRC-32 of every file above, written last
        damaged-step-1100/       a checkpoint that failed its checksums, moved out of the way

Orbax writes a step into a temporary directory and renames it when complete, so a killed process
leaves no half-written step behind. It does not notice damage *after* that: TensorStore checks the
index of an array but not its chunks, and a flipped bit in a chunk may well decode. Hence
``checksums.json``: it is written into the temporary directory just before the rename (a step that
is visible always has one), and a step is restored only if every file still agrees with it.

Directories must be on a POSIX file system that all processes share (local disk, NFS, Lustre,
gcsfuse). Nothing is pickled: arrays are Zarr, everything else is JSON.
"""

import base64
import errno
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from deepseek_jax.types import Array, Params, TrainState, UserError

_log = logging.getLogger(__name__)

_CHECKSUMS = "checksums.json"
_ASYNC_TIMEOUT_S = 6 * 3600  # Orbax gives up after 20 minutes by default: too short for 671B
_READ_BYTES = 1 << 22


class Restored(NamedTuple):
    """What `Checkpointer.restore_latest` found: arguments of `Checkpointer.save`, bit for bit."""

    step: int
    state: TrainState
    data_state: bytes | dict[str, Any]
    rng: Array
    extra: dict[str, Any]


class Checkpointer:
    """Saves and restores the steps of one run; a context manager.

    Args:
        directory: the run directory; steps go to ``directory/checkpoints/<step>``.
        keep_last: how many of the newest steps to keep.
        keep_every: also keep, for ever, each step that is a multiple of this.

    Raises:
        UserError: the directory cannot be created or written.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int = 3,
        keep_every: int | None = None,
    ):
        self.directory = _local(directory)
        self._steps = self.directory / "checkpoints"
        self._keep = [LatestN(keep_last)] + ([EveryNSteps(keep_every)] if keep_every else [])
        self._saving: tuple[int, int] | None = None  # step and bytes of the save under way
        self._manager = self._open()

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        data_state: bytes | dict[str, Any],
        rng: Array,
        extra: dict[str, Any] | None = None,
    ) -> None:
        """Starts saving and returns once the arrays are copied off the device.

        Waits first for a save still under way. A step that is already saved is left as it is.
        All processes call this together, each with the state of its own data iterator.

        Args:
            step: number of finished optimizer steps.
            state: the training state; its buffers may be donated as soon as this returns.
            data_state: state of the data iterator: bytes, or a dict of JSON values.
            rng: typed key or raw uint32 key data.
            extra: JSON values.

        Raises:
            UserError: the *previous* save failed, or there is no room for this one. The
                checkpoints before it are intact, and saving may be tried again.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        host = {
            "data_state": _exchange(json.dumps(_encode_data(data_state)).encode()),
            "rng": _encode_rng(rng),
            "extra": extra or {},
        }
        host["data_state"] = [json.loads(part) for part in host["data_state"]]
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = _free_bytes(self._steps)
        if free < needed:
            raise _disk_full(self._steps, step, needed, free)
        self._saving = (step, needed)
        model, optimizer = _items(state)
        self._guard(
            lambda: self._manager.save(
                step,
                args=ocp.args.Composite(
                    model=ocp.args.PyTreeSave(model),
                    optimizer=ocp.args.PyTreeSave(optimizer),
                    host=ocp.args.JsonSave(host),
                ),
                force=True,
            )
        )

    def wait(self) -> None:
        """Blocks until the save under way is complete.

        Raises:
            UserError: it failed; the checkpoints before it are intact.
        """
        if self._saving is not None:
            self._guard(self._manager.wait_until_finished)
            self._saving = None

    def close(self) -> None:
        """Waits for the save under way and releases Orbax's threads. Raises like `wait`."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def restore_latest(self, abstract_state: TrainState) -> Restored | None:
        """Restores the newest checkpoint whose every file agrees with its checksum.

        Damaged ones are reported through ``logging`` and, once an intact one is found, moved
        to ``damaged-step-<step>`` so that training can write these steps again.

        Args:
            abstract_state: the tree to fill, of `jax.ShapeDtypeStruct`; each leaf goes to the
                sharding it names (any mesh, not only the one that saved), else to one device.

        Returns:
            None if nothing has been saved yet.

        Raises:
            UserError: no checkpoint is intact; or the newest intact one has other leaves,
                shapes or dtypes than ``abstract_state``, or was saved by another number of
                processes.
        """
        step, damaged = _newest_intact(self._steps)
        if step is None:
            return None
        self._set_aside(damaged)
        folder = self._steps / str(step)
        model, optimizer = _items(abstract_state)
        _check_fits(folder / "model", model, same_dtype=True)
        _check_fits(folder / "optimizer", optimizer, same_dtype=True)
        host = _read_host(folder)
        model = _restore_tree(folder / "model", model)
        optimizer = _restore_tree(folder / "optimizer", optimizer)
        opt_leaves = [optimizer[name] for name in _flatten(abstract_state.opt_state, "opt_state")]
        state = TrainState(
            step=optimizer["step"],
            params=model["params"],
            opt_state=jax.tree.unflatten(jax.tree.structure(abstract_state.opt_state), opt_leaves),
            router_bias_LE=model["router_bias"],
        )
        data = _own_share(host["data_state"], folder)
        return Restored(step, state, data, _decode_rng(host["rng"]), host["extra"])

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except UserError as failed_save:
            if error is None:
                raise
            # What ended the run matters more than the save that failed on the way out.
            _log.warning("%s", failed_save)

    def _open(self) -> ocp.CheckpointManager:
        try:
            self._steps.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot create {self._steps}: {error.strerror}; choose another output directory."
            ) from error
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(self._keep),
            cleanup_tmp_directories=True,  # what a killed or failed save left behind
            async_options=ocp.AsyncOptions(
                timeout_secs=_ASYNC_TIMEOUT_S, post_finalization_callback=self._seal
            ),
        )
        names = ("model", "optimizer", "host")
        return ocp.CheckpointManager(self._steps, item_names=names, options=options)

    def _seal(self) -> None:
        """Writes the checksums: Orbax calls this when all is on disk, before the rename."""
        assert self._saving is not None
        step = self._saving[0]
        (folder,) = self._steps.glob(f"{step}.orbax-checkpoint-tmp*")
        files = {str(path.relative_to(folder)): path for path in _item_files(folder)}
        with ThreadPoolExecutor() as pool:
            sums = dict(zip(files, pool.map(_size_and_crc, files.values()), strict=True))
        write_json(folder / _CHECKSUMS, {"step": step, "files": sums})

    def _guard(self, action: Callable[[], object]) -> None:
        """Runs one call of Orbax; a failure becomes a UserError and a manager fit for use."""
        try:
            action()
        except Exception as error:
            assert self._saving is not None
            step, needed = self._saving
            self._saving = None
            free = _free_bytes(self._steps)
            try:
                self._manager.close()
            except Exception as again:
                _log.debug("closing after a failed save: %s", again)
            # A new manager removes the unfinished directory (which frees the disk) and reads
            # the list of steps again: the old one has already forgotten those it would delete.
            self._manager = self._open()
            if _is_disk_full(error):
                raise _disk_full(self._steps, step, needed, free) from error
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise UserError(
                f"saving step {step} to {self._steps} failed ({reason}); "
                "earlier checkpoints are intact: fix the cause and continue with --resume."
            ) from error

    def _set_aside(self, damaged: Mapping[int, str]) -> None:
        for step, problem in damaged.items():
            target = self.directory / f"damaged-step-{step}"
            while target.exists():
                target = target.with_name(target.name + "x")
            if jax.process_index() == 0:
                os.replace(self._steps / str(step), target)
            _log.warning("checkpoint of step %d is damaged: %s; moved to %s", step, problem, target)
        if damaged:
            _exchange(b"")  # nobody reads the list before the first process has moved them
            self._manager.reload()


def load_params(
    directory: str | os.PathLike[str], abstract_params: Params | None = None
) -> tuple[Params, Array, dict[str, Any]]:
    """Reads the weights of the newest intact checkpoint; the optimizer state stays on disk.

    Args:
        directory: a run directory.
        abstract_params: the tree to fill, of `jax.ShapeDtypeStruct` with shardings; leaves are
            cast to its dtypes. Without it all arrays go, as saved, to the first device.

    Returns:
        The parameters, the router bias (float32 ``[L, E]``) and the run's configuration.

    Raises:
        UserError: the directory holds no run or no intact checkpoint, or the parameters differ
            in names or shapes from ``abstract_params``.
    """
    directory = _local(directory)
    config = _read_run(directory)
    step, damaged = _newest_intact(directory / "checkpoints", item="model")
    if step is None:
        raise UserError(f"{directory} holds no checkpoint yet; let its run save one first.")
    for bad, problem in damaged.items():
        _log.warning("skipped the damaged checkpoint of step %d: %s", bad, problem)
    folder = directory / "checkpoints" / str(step) / "model"
    abstract = _stored(folder)
    if abstract_params is not None:
        abstract["params"] = abstract_params
        _check_fits(folder, abstract, same_dtype=False)
    model = _restore_tree(folder, abstract)
    return model["params"], model["router_bias"], config


def claim_run_directory(
    path: str | os.PathLike[str],
    config_json: dict[str, Any],
    *,
    resume: bool,
    may_change: Collection[str] = (),
) -> None:
    """Makes ``path`` the directory of this run: creates it and writes ``run.json``.

    Args:
        path: the run directory.
        config_json: everything that defines the run, as nested dicts of JSON values.
        resume: continue the run that is there, instead of starting one.
        may_change: dotted names (``"train.total_steps"``) of fields, or of groups of fields,
            that may differ on resume; the new values are stored.

    Raises:
        UserError: a fresh run into the directory of another; a resume where there is no run,
            or with a field that contradicts the stored one.
    """
    directory = _local(path)

    def claim() -> bytes:
        try:
            _claim(directory, json.loads(json.dumps(config_json)), resume, may_change)
        except UserError as error:
            return str(error).encode()
        return b""

    # One process decides for all: the others would find the file that it has just written.
    message = _exchange(claim() if jax.process_index() == 0 else b"")[0]
    if message:
        raise UserError(message.decode())


def write_json(path: Path, value: object) -> None:
    """Writes ``value`` so that ``path`` holds the old or the new text, never a part of it."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    handle = os.open(path.parent, os.O_RDONLY)  # the rename itself must reach the disk too
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _claim(directory: Path, config: dict, resume: bool, may_change: Collection[str]) -> None:
    taken = (directory / "run.json").exists() or any((directory / "checkpoints").glob("*"))
    if taken and not resume:
        raise UserError(
            f"{directory} already holds a run; continue it with --resume, "
            "or choose another output directory."
        )
    if resume:
        stored = dict(_leaves(_read_run(directory)))
        wanted = dict(_leaves(config))
        for name in sorted(stored.keys() | wanted.keys()):
            old, new = stored.get(name, "absent"), wanted.get(name, "absent")
            free = any(name == field or name.startswith(field + ".") for field in may_change)
            if old != new and not free:
                raise UserError(
                    f"{directory} was started with {name} = {old!r}, this resume asks for "
                    f"{new!r}; resume with the stored value, or choose another output directory."
                )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "run.json", {"config": config})
    except OSError as error:
        raise UserError(
            f"cannot write to {directory}: {error.strerror}; choose another output directory."
        ) from error


def _read_run(directory: Path) -> dict[str, Any]:
    path = directory / "run.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["config"]
    except FileNotFoundError:
        raise UserError(
            f"{directory} holds no run (no run.json); check the path, or start without --resume."
        ) from None
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


# --- which files are intact -------------------------------------------------------------------


def _newest_intact(steps: Path, item: str = "") -> tuple[int | None, dict[int, str]]:
    """The newest step whose files (of one item, or all) are intact, and what ails newer ones."""
    found = [int(path.name) for path in steps.glob("*") if path.name.isdecimal()]
    damaged: dict[int, str] = {}
    for step in sorted(found, reverse=True):
        problem = _problem(steps / str(step), item)
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


def _problem(folder: Path, item: str) -> str | None:
    """What is wrong with a step, or None. The processes share the reading between them."""
    try:
        expected = json.loads((folder / _CHECKSUMS).read_text(encoding="utf-8"))["files"]
        names = sorted(name for name in expected if name.startswith(item))
        mine = names[jax.process_index() :: jax.process_count()]
        with ThreadPoolExecutor() as pool:
            checks = pool.map(lambda name: _mismatch(folder / name, expected[name]), mine)
            mistakes = [check for check in checks if check]
    except (OSError, ValueError, KeyError, TypeError) as error:
        mistakes = [f"{_CHECKSUMS} is missing or unreadable ({type(error).__name__})"]
    everyone = [part.decode() for part in _exchange("".join(mistakes[:1]).encode())]
    return next((mistake for mistake in everyone if mistake), None)


def _mismatch(path: Path, expected: list[int]) -> str | None:
    name = f"{path.parent.name}/{path.name}"
    try:
        size = path.stat().st_size
        if size != expected[0]:
            return f"{name} has {size} bytes instead of {expected[0]}"
        return None if _size_and_crc(path) == expected else f"{name} fails its checksum"
    except FileNotFoundError:
        return f"{name} is missing"


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


# --- trees of arrays --------------------------------------------------------------------------


def _items(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two trees on disk. The optimizer's is flat: its NamedTuples are Optax's business."""
    optimizer = {"step": state.step, **_flatten(state.opt_state, "opt_state")}
    return {"params": state.params, "router_bias": state.router_bias_LE}, optimizer


def _flatten(tree: object, prefix: str = "") -> dict[str, Any]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    name = jax.tree_util.keystr
    return {
        f"{prefix}/{name(path, simple=True, separator='/')}".strip("/"): leaf
        for path, leaf in paths
    }


def _stored(folder: Path) -> dict[str, Any]:
    """The abstract tree of a stored item, every leaf on the first device."""
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    tree = ocp.PyTreeCheckpointHandler().metadata(folder).tree
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one_device), tree
    )


def _check_fits(folder: Path, wanted: dict[str, Any], *, same_dtype: bool) -> None:
    stored, expected = _flatten(_stored(folder)), _flatten(wanted)
    for name in list(expected) + [name for name in stored if name not in expected]:
        old, new = (_describe(tree.get(name), same_dtype) for tree in (stored, expected))
        if old != new:
            raise UserError(
                f"the checkpoint {folder.parent} does not fit this configuration: {name} is {old} "
                f"in the checkpoint and {new} here; use the configuration it was saved with "
                "(vocabulary, layers, widths, optimizer), or start anew in another directory."
            )


def _describe(leaf: Any, with_dtype: bool) -> str:
    if leaf is None:
        return "absent"
    return f"{jnp.dtype(leaf.dtype).name if with_dtype else ''}{list(leaf.shape)}"


def _restore_tree(folder: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def place(leaf: Any) -> ocp.ArrayRestoreArgs:
        sharding = getattr(leaf, "sharding", None) or one_device
        return ocp.ArrayRestoreArgs(sharding=sharding, dtype=leaf.dtype, global_shape=leaf.shape)

    args = ocp.args.PyTreeRestore(item=abstract, restore_args=jax.tree.map(place, abstract))
    return ocp.PyTreeCheckpointHandler().restore(folder, args=args)


# --- what is not a tree of arrays -------------------------------------------------------------


def _encode_data(state: bytes | dict[str, Any]) -> dict[str, Any]:
    if isinstance(state, bytes):
        return {"base64": base64.b64encode(state).decode()}
    return {"json": state}


def _own_share(parts: list[dict[str, Any]], folder: Path) -> bytes | dict[str, Any]:
    if len(parts) != jax.process_count():
        raise UserError(
            f"{folder} was saved by {len(parts)} processes, each with its share of the data; "
            f"resume it with {len(parts)} instead of {jax.process_count()}."
        )
    mine = parts[jax.process_index()]
    return mine["json"] if "json" in mine else base64.b64decode(mine["base64"])


def _encode_rng(rng: Array) -> dict[str, Any]:
    typed = jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)
    data = np.asarray(jax.random.key_data(rng) if typed else rng)
    return {"impl": str(jax.random.key_impl(rng)) if typed else None, "uint32": data.tolist()}


def _decode_rng(stored: dict[str, Any]) -> Array:
    data = jnp.asarray(np.array(stored["uint32"], np.uint32))
    return jax.random.wrap_key_data(data, impl=stored["impl"]) if stored["impl"] else data


def _read_host(folder: Path) -> dict[str, Any]:
    return ocp.JsonCheckpointHandler().restore(folder / "host", args=ocp.args.JsonRestore())


def _exchange(message: bytes) -> list[bytes]:
    """The messages of all processes, in order; also a barrier."""
    if jax.process_count() == 1:
        return [message]
    length = max(int(n) for n in multihost_utils.process_allgather(np.int32(len(message))))
    padded = np.zeros(4 + length, np.uint8)
    padded[:4] = np.frombuffer(len(message).to_bytes(4, "little"), np.uint8)
    padded[4 : 4 + len(message)] = np.frombuffer(message, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row[4 : 4 + int.from_bytes(bytes(row[:4]), "little")]) for row in rows]


# --- disk -------------------------------------------------------------------------------------


def _local(directory: str | os.PathLike[str]) -> Path:
    if "://" in os.fspath(directory):
        raise UserError(
            f"{directory} is not a path of a file system; mount the bucket (gcsfuse) and give "
            "the path where it is mounted."
        )
    return Path(directory).absolute()


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _is_disk_full(error: BaseException | None) -> bool:
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


def _disk_full(folder: Path, step: int, needed: int, free: int) -> UserError:
    return UserError(
        f"the disk is full: {folder} needs {needed:,} bytes for the checkpoint of step {step} and "
        f"has {free:,} free; make room or keep fewer checkpoints, then continue with --resume "
        "(earlier checkpoints are intact)."
    )
