"""Several processes, one run: they find one another, agree, and end together.

JAX's coordination service brings the processes together and lets them exchange small values. Two
things it does not do. It ends a process whose peer has died by aborting it, with a stack trace
and without a reason; and a process that merely raises an exception leaves the others waiting in a
collective. Hence the lifeline: a TCP connection from every process to the first. The kernel
closes it with its process, however that ends, so a death is known at once and without heartbeats
that a long compilation could delay; and a process that gives up says why before it goes.
"""

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax._src import cloud_tpu_init, clusters
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils

from deepseek_jax.types import UserError

_START_S = 300  # for all processes to appear; JAX's own default
_WAIT_MS = 7 * 24 * 3600 * 1000  # for ever: whoever is waited for and dies ends the wait
_GRACE_S = 2.0  # what looks like an error here may be the echo of a death that is on its way
_LAST_WORDS_S = 5.0


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

_lifeline: "_Lifeline | None" = None


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
    _lifeline = _Lifeline(member)


def _nobody_came(member: Member) -> None:
    where = member.coordinator or "the first process"
    _say(
        f"process {member.index} of {member.count} waited {_START_S} s at {where} and not all "
        "processes appeared; check that each was started, with its own --process-id, and that "
        "they can reach that address."
    )
    os._exit(2)


def leave() -> None:
    """The orderly end: waits until every process has come this far."""
    global _lifeline
    if _lifeline is not None:
        _client().wait_at_barrier("deepseek_jax/leave", _WAIT_MS)
        _lifeline.close()
        _lifeline = None


def give_up(status: int, reason: str, say: Callable[[], None]) -> None:
    """Ends all processes of the run, for a reason that arose in this one.

    Does not return, unless this process is alone.

    Args:
        status: of all processes, at their exit.
        reason: a sentence; the first process prints it with the number of this one.
        say: prints the reason here. Not called if another process gave up before.
    """
    if _lifeline is not None:
        _lifeline.give_up(status, reason, say)


# --- agreeing ----------------------------------------------------------------------------------


def stop_agreed(step: int) -> bool:
    """Whether SIGTERM has reached any process, and all are to stop before this step.

    To be called by all processes before every step, in order. JAX takes the signal and picks a
    step that no process has begun. Always False for a process that is alone.
    """
    return _lifeline is not None and multihost_utils.reached_preemption_sync_point(step)


def from_first(make: Callable[[], bytes]) -> bytes:
    """What ``make`` returns in the first process; the others wait for it, however long.

    To be called by all processes, in the same order. Not a collective of the devices, which
    would lose patience.
    """
    if _lifeline is None:
        return make()
    key = f"deepseek_jax/from_first/{_lifeline.next_number()}"
    if _lifeline.member.index == 0:
        value = make()
        _client().key_value_set_bytes(key, value)
        return value
    return _client().blocking_key_value_get_bytes(key, _WAIT_MS)


def _client() -> Any:
    return jax_distributed.global_state.client


# --- the lifeline ------------------------------------------------------------------------------


class _End(NamedTuple):
    """Why a run ends before its time."""

    process: int
    status: int
    reason: str


class _Peer:
    """The first process's end of a connection."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.lines = _Lines()
        self.name = ""
        self.process: int | None = None  # until it has shown the token
        self.gone = False


class _Lines:
    """Lines of JSON out of the pieces that TCP delivers."""

    def __init__(self):
        self._rest = b""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]


class _Lifeline:
    """Connections of all processes with the first, and the thread that watches them."""

    def __init__(self, member: Member):
        self.member = member
        self._calls = 0
        self._lock = threading.Lock()
        self._end: _End | None = None
        self._ended = threading.Event()
        self._giving_up = self._leaving = False
        self._peers: list[_Peer] = []
        self._complete, self._empty = threading.Event(), threading.Event()
        key = "deepseek_jax/lifeline"
        if member.index == 0:
            self._server = _listen()
            self._token = secrets.token_hex(16)
            port = self._server.getsockname()[1]
            _client().key_value_set(key, json.dumps([port, self._token]))
            threading.Thread(target=self._watch_all, daemon=True).start()
            arrived = self._complete.wait(_START_S)
        else:
            port, token = json.loads(_client().blocking_key_value_get(key, _START_S * 1000))
            self._connection = self._connect(port)
            hello = {"token": token, "process": member.index, "host": socket.gethostname()}
            _send(self._connection, hello)
            threading.Thread(target=self._watch_first, daemon=True).start()
            arrived = True
        if not arrived:
            raise UserError(
                f"not all {member.count} processes reached process 0 at its TCP port {port}; "
                "open the ports between the hosts."
            )

    def next_number(self) -> int:
        self._calls += 1
        return self._calls

    def close(self) -> None:
        """After a barrier: nobody is missed from here on."""
        if self.member.index == 0:
            self._empty.wait(_LAST_WORDS_S)
            self._leaving = True
        else:
            self._leaving = True
            with contextlib.suppress(OSError):
                _send(self._connection, {"bye": True})
                self._connection.shutdown(socket.SHUT_WR)

    def give_up(self, status: int, reason: str, say: Callable[[], None]) -> None:
        if status == 1:
            # An error nobody foresaw, such as a collective that failed, may come of the death of
            # a peer; the watcher knows by now, or will in a moment, and ends this process.
            time.sleep(_GRACE_S)
        self._giving_up = True
        end = _End(self.member.index, status, reason)
        if self.member.index == 0:
            if self._claim(end):
                say()
                self._tell_all_and_exit()
            time.sleep(2 * _LAST_WORDS_S)  # the watcher is about to end this process
        else:
            with contextlib.suppress(OSError):
                _send(self._connection, {"end": end})
            self._ended.wait(2 * _LAST_WORDS_S)
            if self._end is None or self._end.process == self.member.index:
                say()
        _exit(status)

    def _claim(self, end: _End) -> bool:
        """Whether this is the first reason; the later ones are its consequences."""
        with self._lock:
            if self._end is not None:
                return False
            self._end = end
            return True

    # In the first process.

    def _watch_all(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._server, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.data is None:
                    peer = _Peer(_kept_alive(self._server.accept()[0]))
                    selector.register(peer.connection, selectors.EVENT_READ, peer)
                elif not self._listen_to(key.data):
                    selector.unregister(key.data.connection)
                    key.data.connection.close()

    def _listen_to(self, peer: _Peer) -> bool:
        """Takes what a peer sends; False if nothing more will come."""
        try:
            data = peer.connection.recv(1 << 16)
            messages = peer.lines.feed(data)
        except (OSError, ValueError):
            data, messages = b"", []
        for message in messages:
            if peer.process is None:
                if message.get("token") != self._token:
                    return False  # a stranger
                peer.process, peer.name = message["process"], message["host"]
                self._peers.append(peer)
                if len(self._peers) == self.member.count - 1:
                    self._complete.set()
            elif "end" in message:
                end = _End(*message["end"])
                self._finish(end, f"process {end.process} of {self.member.count} ({peer.name})")
            elif "bye" in message:
                peer.gone = True
        if data:
            return True
        known = peer.process is not None
        lost = known and not peer.gone and not self._leaving
        peer.gone = True
        if known and all(p.gone for p in self._peers) and self._complete.is_set():
            self._empty.set()
        if lost and self._end is None:
            end = _End(peer.process or 0, 1, _LOST)
            self._finish(end, f"process {end.process} of {self.member.count} ({peer.name})")
        return False

    def _finish(self, end: _End, who: str) -> None:
        if self._claim(end):
            _say(f"{who} {end.reason if end.reason == _LOST else f'gave up: {end.reason}'}")
            # In a thread of its own: this one has to see the others go.
            threading.Thread(target=self._tell_all_and_exit, daemon=True).start()

    def _tell_all_and_exit(self) -> None:
        assert self._end is not None
        for peer in self._peers:
            with contextlib.suppress(OSError):
                _send(peer.connection, {"end": self._end})
        # The coordination service ends with this process, and JAX aborts who still needs it.
        self._empty.wait(_LAST_WORDS_S)
        _exit(self._end.status)

    # In the others.

    def _connect(self, port: int) -> socket.socket:
        address = jax_distributed.global_state.coordinator_address or ""
        host = address.rpartition(":")[0].strip("[]")
        try:
            return _kept_alive(socket.create_connection((host, port), timeout=60))
        except OSError as error:
            raise UserError(
                f"process {self.member.index} cannot reach process 0 at {host}, TCP port {port} "
                f"({error}); open the ports between the hosts."
            ) from error

    def _watch_first(self) -> None:
        lines = _Lines()
        while True:
            try:
                data = self._connection.recv(1 << 16)
            except OSError:
                data = b""
            for message in lines.feed(data):
                self._end = _End(*message["end"])
            if self._end is not None:
                self._ended.set()
                if not self._giving_up:
                    _exit(self._end.status)
                return
            if self._leaving:
                return
            if not data:
                _say(f"process 0 of {self.member.count} {_LOST}")
                _exit(1)


_LOST = (
    "is gone without a word: killed, out of memory, or its machine is down; "
    "continue from the last checkpoint with --resume."
)


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _kept_alive(connection: socket.socket) -> socket.socket:
    """The kernel asks after the other side: a machine that has vanished is noticed in 30 s."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return connection


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _say(sentence: str) -> None:
    print(f"deepseek-jax: {sentence.rstrip('.')}.", file=sys.stderr, flush=True)


def _exit(status: int) -> None:
    """Ends the process from any thread, whatever the others wait for."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
