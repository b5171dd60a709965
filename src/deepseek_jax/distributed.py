"""Several processes, one run: they find one another, agree, and end together.

JAX's coordination service brings the processes together and lets them exchange small values. Two
things it does not do. It ends a process whose peer has died by aborting it, after 100 s, with a
stack trace and without a reason; and a process that merely raises an exception leaves the others
waiting in a collective. Hence the lifeline (`lifeline.py`).
"""

import itertools
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax._src import cloud_tpu_init, clusters
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils

from deepseek_jax.lifeline import Lifeline, connect, exit_now, say
from deepseek_jax.types import UserError

_START_S = 300  # for all processes to appear; JAX's own default
_WAIT_MS = 7 * 24 * 3600 * 1000  # for ever: whoever is waited for and dies ends the wait


@dataclass(frozen=True)
class Cluster:
    """The processes that make up the run. Under SLURM, Open MPI and on TPU pods: found."""

    coordinator: str | None = None
    """HOST:PORT on the first process's host, a free port."""
    num_processes: int | None = None
    """How many train together; 1: nobody else."""
    process_id: int | None = None
    """Which of them this is, from 0."""


class Member(NamedTuple):
    """This process among those of its run."""

    count: int
    index: int
    coordinator: str | None
    """None, on TPU pods: JAX asks for it."""
    devices: tuple[int, ...] | None = None
    """The GPUs of this host that are this process's; None: all that it sees."""


# --- who is there ------------------------------------------------------------------------------


def find(cluster: Cluster) -> Member | None:
    """This process's place according to the options and its launcher; None if it is alone.

    Asks no network, except on a TPU VM, whose metadata server alone knows the pod.

    Raises:
        UserError: options that contradict one another or do not suffice.
    """
    options = (cluster.coordinator, cluster.num_processes, cluster.process_id)
    if cluster.num_processes == 1:
        return None
    launched = _slurm() or _open_mpi()
    if options == (None, None, None):
        if launched is None:
            return _tpu_pod()
        if launched.count == 1:
            return None
    given = Member(
        cluster.num_processes or 0, -1 if cluster.process_id is None else cluster.process_id, None
    )
    known = launched or given
    count = given.count or known.count
    index = given.index if cluster.process_id is not None else known.index
    coordinator = cluster.coordinator or (launched.coordinator if launched else "")
    if coordinator is None:
        raise UserError(
            "Open MPI 5 does not say on which host process 0 runs; add --coordinator HOST:PORT."
        )
    if not count or not coordinator or (launched is None and cluster.process_id is None):
        raise UserError(
            "several processes need --coordinator HOST:PORT, --num-processes N and --process-id I, "
            "all three; SLURM, Open MPI and TPU pods need none of them."
        )
    if not 0 <= index < count:
        raise UserError(f"--process-id={index} must lie between 0 and {count - 1}, one each.")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator {coordinator!r} is not HOST:PORT.")
    return Member(count, index, coordinator, known.devices)


def _slurm() -> Member | None:
    """A task of a job step. A batch script itself, or a shell inside of a job, is none."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    # SLURM_NTASKS may be the whole job's, in the one shell of an interactive allocation.
    count = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS"))
    if count is None or not all(name in os.environ for name in names):
        return None
    tasks = _expand(os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = int(os.environ.get("SLURM_NODEID", 0))
    here = tasks[node] if node < len(tasks) else None
    return Member(
        int(count),
        int(os.environ["SLURM_PROCID"]),
        clusters.SlurmCluster.get_coordinator_address(None, os.environ.get("JAX_COORDINATOR_PORT")),
        _own_gpus(int(os.environ["SLURM_LOCALID"]), here),
    )


def _open_mpi() -> Member | None:
    names = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    if not all(name in os.environ for name in names):
        return None
    count, index, local = (int(os.environ[name]) for name in names)
    here = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    address = None
    if "OMPI_MCA_orte_hnp_uri" in os.environ:  # gone since Open MPI 5
        port = os.environ.get("JAX_COORDINATOR_PORT")
        address = clusters.OmpiCluster.get_coordinator_address(None, port)
    return Member(count, index, address, _own_gpus(local, None if here is None else int(here)))


def _own_gpus(local_index: int, tasks_here: int | None) -> tuple[int, ...] | None:
    """One GPU for each of several tasks on a host, and all of them for one alone.

    JAX by itself gives one to a task whether or not there are others.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    already_divided = listed != "" and "," not in listed
    if tasks_here == 1 or already_divided or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    return (local_index,)


def _expand(tasks_per_node: str) -> list[int]:
    """``"2(x3),1"`` -> ``[2, 2, 2, 1]``."""
    counts = []
    for part in filter(None, tasks_per_node.split(",")):
        tasks, _, times = part.partition("(x")
        counts += [int(tasks)] * int(times.rstrip(")") or 1)
    return counts


def _tpu_pod() -> Member | None:
    """This host of a pod or of several slices; None on one host, and away from TPUs."""
    wanted = os.environ.get("JAX_PLATFORMS", "tpu")
    if not cloud_tpu_init.running_in_cloud_tpu_vm or "tpu" not in wanted:
        return None
    for pod in (clusters.GkeTpuCluster, clusters.GceTpuCluster):
        if pod.is_env_present():
            count = pod.get_process_count()
            return Member(count, pod.get_process_id(), None) if count > 1 else None
    return None


# --- joining and leaving -----------------------------------------------------------------------

_lifeline: Lifeline | None = None


def initialize(cluster: Cluster | None = None) -> None:
    """Joins the other processes of the run; nothing at all for a process that is alone.

    To be called before anything asks JAX for its devices. `leave` at the end, or `give_up`.

    Raises:
        UserError: see `find`; or the other processes cannot be reached.
    """
    global _lifeline
    member = find(cluster or Cluster())
    if member is None or _lifeline is not None:
        return
    # JAX aborts the process, with a stack trace, if not all of them appear in time.
    late = threading.Timer(_START_S, _nobody_came, [member])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            coordinator_address=member.coordinator,
            num_processes=member.count,
            process_id=member.index,
            local_device_ids=member.devices,
            cluster_detection_method="deactivate" if member.coordinator else None,
            initialization_timeout=_START_S + 60,
            shutdown_timeout_seconds=60,
        )
    except (RuntimeError, OSError) as error:
        if "before any JAX" in str(error) or "only be called once" in str(error):
            raise  # a mistake in the program, not in its input
        raise UserError(
            f"process {member.index} of {member.count} could not join the others: "
            f"{str(error).splitlines()[0]}; check --coordinator, and that its port is free."
        ) from error
    finally:
        late.cancel()
    host = (_state().coordinator_address or "").rpartition(":")[0].strip("[]")
    _lifeline = connect(member.index, member.count, _client(), host, _START_S)


def _nobody_came(member: Member) -> None:
    where = member.coordinator or "the first process"
    say(
        f"process {member.index} of {member.count} waited {_START_S} s at {where} and not all "
        "processes appeared; check that each was started, with its own --process-id, and that "
        "they can reach that address."
    )
    exit_now(2)


def leave() -> None:
    """The orderly end: waits until every process has come this far."""
    global _lifeline
    if _lifeline is not None:
        _client().wait_at_barrier("deepseek_jax/leave", _WAIT_MS)
        _lifeline.close()
        _lifeline = None


def give_up(status: int, reason: str, tell: Callable[[], None]) -> None:
    """Ends all processes of the run, for a reason that arose in this one.

    Does not return, unless this process is alone.

    Args:
        status: of all processes, at their exit.
        reason: a sentence; the first process prints it with the number of this one.
        tell: prints the reason here. Not called if another process gave up before.
    """
    if _lifeline is not None:
        _lifeline.give_up(status, reason, tell)


# --- agreeing ----------------------------------------------------------------------------------


def stop_agreed(step: int) -> bool:
    """Whether SIGTERM has reached any process, and all are to stop before this step.

    To be called by all processes before every step, in order. JAX takes the signal and picks a
    step that no process has begun. Always False for a process that is alone.
    """
    return _state().num_processes > 1 and multihost_utils.reached_preemption_sync_point(step)


def from_first(make: Callable[[], bytes]) -> bytes:
    """What ``make`` returns in the first process; the others wait for it, however long.

    To be called by all processes, in the same order. Not a collective of the devices, which
    would lose patience.
    """
    if _state().num_processes == 1:
        return make()
    key = f"deepseek_jax/from_first/{next(_calls)}"
    if _state().process_id == 0:
        value = make()
        _client().key_value_set_bytes(key, value)
        return value
    return _client().blocking_key_value_get_bytes(key, _WAIT_MS)


_calls = itertools.count()


def _state() -> Any:
    return jax_distributed.global_state


def _client() -> Any:
    return _state().client
