"""Saving and restoring the steps of a run."""

import base64
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from deepseek_jax import distributed
from deepseek_jax.checkpoint.files import (
    disk_full,
    exchange,
    free_bytes,
    is_disk_full,
    local_path,
    newest_intact,
    write_checksums,
)
from deepseek_jax.checkpoint.run_directory import hold, read_run
from deepseek_jax.checkpoint.trees import check_fits, flatten, items, restore_tree, stored_tree
from deepseek_jax.lifeline import say
from deepseek_jax.types import Array, Params, TrainState, UserError

_log = logging.getLogger(__name__)


class _OneSentence(logging.Filter):
    """Orbax logs each failure of a save, with its traceback, and raises it too: once is enough.

    Where several processes save, it raises only after a barrier that the others, who wait at an
    earlier one for this process, never come to. There the record is the only news.
    """

    def __init__(self):
        super().__init__()
        self.savers: dict[int, Checkpointer] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.exc_info or "orbax" not in record.pathname:
            return True
        error = record.exc_info[1]
        if error is not None and threading.current_thread() is not threading.main_thread():
            for saver in self.savers.values():
                saver.end_all(error)
        return False


_failures = _OneSentence()
logging.getLogger("absl").addFilter(_failures)

_UNFINISHED = "orbax-checkpoint-tmp*"
_ASYNC_TIMEOUT_S = 3 * 3600  # Orbax gives up after 20 minutes by default: too short for 671B


class Restored(NamedTuple):
    """What `Checkpointer.restore_latest` found: arguments of `Checkpointer.save`, bit for bit."""

    step: int
    state: TrainState
    data_states: list[Any]
    """Of every process that saved, in order; there may be more or fewer of them now."""
    rng: Array
    extra: dict[str, Any]


class _Manager(ocp.CheckpointManager):
    """Leaves SIGTERM to the training loop.

    JAX counts the steps at which it is asked for a sign to stop. Orbax asks too, one process
    from a thread and for a step long past, upon which the processes could stop apart.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpointer:
    """Saves and restores the steps of one run; a context manager.

    Args:
        directory: the run directory; steps go to ``directory/checkpoints/<step>``.
        keep_last: how many of the newest steps to keep.
        keep_every: also keep, for ever, each step that is a multiple of this.

    Raises:
        UserError: the directory cannot be created or written, or another process writes to it.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int = 3,
        keep_every: int | None = None,
    ):
        self.directory = local_path(directory)
        self._steps = self.directory / "checkpoints"
        self._keep = [LatestN(keep_last)] + ([EveryNSteps(keep_every)] if keep_every else [])
        self._saving: tuple[int, int] | None = None  # step and bytes of the save under way
        self._held: int | None = None
        self._manager = self._open()
        _failures.savers[id(self)] = self

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
                checkpoints before it are intact, and one process may try again.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        shares = exchange(json.dumps(_encode_data(data_state)).encode())
        host = {
            "data_state": [json.loads(share) for share in shares],
            "rng": _encode_rng(rng),
            "extra": extra or {},
        }
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        # One answer for all processes: if only some raised, the others would wait for ever.
        free = int(exchange(str(free_bytes(self._steps)).encode())[0])
        if free < needed:
            raise disk_full(self._steps, step, needed, free)
        self._saving = (step, needed)
        model, optimizer = items(state)
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
            _failures.savers.pop(id(self), None)
            self._manager.close()
            if self._held is not None:
                os.close(self._held)
                self._held = None

    def end_all(self, error: BaseException) -> None:
        """A save has failed in the background: ends all processes, if there are several."""
        if self._saving is not None and jax.process_count() > 1:
            reason = str(self._explain(error))
            distributed.give_up(2, reason, lambda: say(reason))

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
                shapes or dtypes than ``abstract_state``.
        """
        step, damaged = newest_intact(self._steps)
        if step is None:
            return None
        self._set_aside(damaged)
        folder = self._steps / str(step)
        model, optimizer = items(abstract_state)
        check_fits(folder / "model", model, same_dtype=True)
        check_fits(folder / "optimizer", optimizer, same_dtype=True)
        host = _read_host(folder)
        data = [_decode_data(share) for share in host["data_state"]]
        model = restore_tree(folder / "model", model)
        optimizer = restore_tree(folder / "optimizer", optimizer)
        opt_leaves = [optimizer[name] for name in flatten(abstract_state.opt_state, "opt_state")]
        state = TrainState(
            step=optimizer["step"],
            params=model["params"],
            opt_state=jax.tree.unflatten(jax.tree.structure(abstract_state.opt_state), opt_leaves),
            router_bias_LE=model["router_bias"],
        )
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
            if jax.process_index() == 0:
                if self._held is None:
                    self._held = hold(self.directory)
                # What a killed or failed save left behind. Orbax would remove it too, but in the
                # background: later than the next look at the free space.
                for unfinished in self._steps.glob(f"*.{_UNFINISHED}"):
                    shutil.rmtree(unfinished, ignore_errors=True)
        except OSError as error:
            raise UserError(
                f"cannot create {self._steps}: {error.strerror}; choose another output directory."
            ) from error
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(self._keep),
            lightweight_initialize=True,  # do not read old steps, which may be damaged
            async_options=ocp.AsyncOptions(
                timeout_secs=_ASYNC_TIMEOUT_S, post_finalization_callback=self._seal
            ),
        )
        names = ("model", "optimizer", "host")
        return _Manager(self._steps, item_names=names, options=options)

    def _seal(self) -> None:
        """Writes the checksums: Orbax calls this when all is on disk, before the rename."""
        assert self._saving is not None
        step = self._saving[0]
        (folder,) = self._steps.glob(f"{step}.{_UNFINISHED}")
        write_checksums(folder)

    def _guard(self, action: Callable[[], object]) -> None:
        """Runs one call of Orbax; a failure becomes a UserError and a manager fit for use."""
        try:
            action()
        except Exception as error:
            explained = self._explain(error)
            self._saving = None
            if jax.process_count() == 1:  # several end here: not all of them see the error
                self._recover()
            raise explained from error

    def _explain(self, error: BaseException) -> UserError:
        """What a failed save means to the owner of the run."""
        assert self._saving is not None
        step, needed = self._saving
        if is_disk_full(error):
            return disk_full(self._steps, step, needed, free_bytes(self._steps))
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        return UserError(
            f"saving step {step} to {self._steps} failed ({reason}); "
            "earlier checkpoints are intact: fix the cause and continue with --resume."
        )

    def _recover(self) -> None:
        """Replaces the manager after a failed save.

        The old one has already forgotten the steps that it would have deleted, and its unfinished
        directory occupies the disk; opening a new one sets both right.
        """
        try:
            self._manager.close()
        except Exception as error:
            _log.debug("closing after a failed save: %s", error)
        self._manager = self._open()

    def _set_aside(self, damaged: Mapping[int, str]) -> None:
        for step, problem in damaged.items():
            target = self.directory / f"damaged-step-{step}"
            if jax.process_index() == 0:
                while target.exists():  # the same step was damaged before
                    target = target.with_name(target.name + "-again")
                os.replace(self._steps / str(step), target)
                _log.warning(
                    "checkpoint of step %d is damaged: %s; moved to %s", step, problem, target
                )
        if damaged:
            exchange(b"")  # nobody reads the list before the first process has moved them
            self._manager.close()
            self._manager = self._open()


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
    directory = local_path(directory)
    config = read_run(directory)
    if (config.get("lora") or {}).get("lora_rank"):
        raise UserError(
            f"{directory} holds a LoRA adapter and not a whole model; merge it with `convert`, and "
            "use what that writes."
        )
    step, damaged = newest_intact(directory / "checkpoints", prefix="model/")
    if step is None:
        raise UserError(f"{directory} holds no checkpoint yet; let its run save one first.")
    for bad, problem in damaged.items() if jax.process_index() == 0 else ():
        _log.warning("skipped the damaged checkpoint of step %d: %s", bad, problem)
    folder = directory / "checkpoints" / str(step) / "model"
    abstract = stored_tree(folder)
    if abstract_params is not None:
        abstract["params"] = abstract_params
        check_fits(folder, abstract, same_dtype=False)
    model = restore_tree(folder, abstract)
    return model["params"], model["router_bias"], config


def _encode_data(state: bytes | dict[str, Any]) -> dict[str, Any]:
    if isinstance(state, bytes):
        return {"base64": base64.b64encode(state).decode()}
    return {"json": state}


def _decode_data(stored: dict[str, Any]) -> bytes | dict[str, Any]:
    return stored["json"] if "json" in stored else base64.b64decode(stored["base64"])


def _encode_rng(rng: Array) -> dict[str, Any]:
    typed = jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)
    data = np.asarray(jax.random.key_data(rng) if typed else rng)
    return {"impl": str(jax.random.key_impl(rng)) if typed else None, "uint32": data.tolist()}


def _decode_rng(stored: dict[str, Any]) -> Array:
    data = jnp.asarray(np.array(stored["uint32"], np.uint32))
    return jax.random.wrap_key_data(data, impl=stored["impl"]) if stored["impl"] else data


def _read_host(folder: Path) -> dict[str, Any]:
    reader: Any = ocp.JsonCheckpointHandler()  # Any: see `trees.reader`
    return reader.restore(folder / "host", args=ocp.args.JsonRestore())
