"""Two real processes on this machine: they train as one does, and end together."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax._src import cloud_tpu_init
from jax._src.clusters import cloud_tpu_cluster

from deepseek_jax import distributed
from deepseek_jax.distributed import Cluster, Member, find
from deepseek_jax.types import UserError
from tests.train import runs

STEPS = 80
# One layer: what takes the time is to trace and compile it in every process.
MODEL = runs.MODEL.replace(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Ended(NamedTuple):
    """How a process ended."""

    status: int
    stdout: str
    stderr: str

    def said(self) -> list[str]:
        """Its lines on stdout, without the one that Gloo writes."""
        return [line for line in self.stdout.splitlines() if not line.startswith("[Gloo]")]


class Place(NamedTuple):
    """Where the runs find their input and their compiled programs."""

    root: Path
    source: Path
    model: Path

    def start(
        self, out: Path, *extra: str, count: int = 2, devices: int = 1
    ) -> list[subprocess.Popen[str]]:
        """``deepseek-jax pretrain`` in ``count`` processes of ``devices`` devices each."""
        number = "--xla_force_host_platform_device_count="
        flags = re.sub(rf"{number}\d+", f"{number}{devices}", os.environ["XLA_FLAGS"])
        environment = os.environ | {
            "XLA_FLAGS": flags,
            "JAX_PLATFORMS": "cpu",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        words = runs.options(out, self.source, self.model)
        words += ["--steps", str(STEPS), "--save-every", "5", "--eval-every", "30"]
        words += ["--mesh", "data=-1", "--compilation-cache", str(self.root / "compiled"), *extra]
        port, started = free_port(), []
        for process in range(count):
            where = f"--coordinator localhost:{port} --num-processes {count}".split()
            where += ["--process-id", str(process)]
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "deepseek_jax.cli", "pretrain", *words]
                    + (where if count > 1 else []),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
            )
        return started

    def finish(self, out: Path, *extra: str, count: int = 2, devices: int = 1) -> list[Ended]:
        ended = wait(self.start(out, *extra, count=count, devices=devices))
        assert [e.status for e in ended] == [0] * count, ended
        return ended


def wait(processes: list[subprocess.Popen[str]], timeout: float = 300) -> list[Ended]:
    ended = []
    for process in processes:
        try:
            said = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            for other in processes:
                other.kill()
            raise
        ended.append(Ended(process.returncode, *said))
    return ended


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    root = tmp_path_factory.mktemp("distributed")
    model = runs.write_config(root / "config.json", MODEL)
    return Place(root, runs.write_corpus(root / "text"), model)


@pytest.fixture(scope="module")
def uninterrupted(place) -> Path:
    """What two processes do that nothing disturbs."""
    first, second = place.finish(place.root / "uninterrupted")
    assert "first step done" in first.stdout
    assert "bits per byte" in first.stdout
    assert not first.stderr
    assert not second.said()  # only the first process prints
    assert not second.stderr
    return place.root / "uninterrupted"


def losses(out: Path, since: int = 0) -> np.ndarray:
    """Training and held-out losses of the steps after ``since``."""
    return np.array(
        [row.get("loss", row.get("eval_loss")) for row in runs.lines(out) if row["step"] > since]
    )


# --- training together ------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_then_stopped_then_resumed_by_two_and_by_one(place, uninterrupted):
    """The life of a run on a cluster, each of its ends a different one."""
    out = place.root / "interrupted"

    # A process is killed: the other ends at once and says why.
    processes = place.start(out)
    runs.wait_for_step(processes[0], out, 7)
    processes[1].kill()
    killed = time.monotonic()
    first, _ = wait(processes)
    assert time.monotonic() - killed < 10
    assert first.status == 1
    assert first.stderr.startswith("deepseek-jax: process 1 of 2 (")
    assert "is gone without a word" in first.stderr
    assert first.stderr.count("\n") == 1

    # SIGTERM to one: both save the same step and end well.
    processes = place.start(out, "--resume")
    runs.wait_for_step(processes[0], out, 12)
    processes[1].send_signal(signal.SIGTERM)
    first, second = wait(processes)
    assert (first.status, second.status) == (0, 0), (first, second)
    assert not second.said()
    stopped = runs.saved_steps(out)[-1]
    assert 12 <= stopped < STEPS
    assert runs.lines(out)[-1]["step"] == stopped
    assert f"stopped and saved at step {stopped}; continue with --resume." in first.stdout
    for line in (first.stderr + second.stderr).splitlines():
        assert "SIGTERM caught" in line  # that much JAX says

    # One process continues, on as many devices: the same data, and sums in another order.
    alone = shutil.copytree(out, place.root / "alone")
    place.finish(alone, "--resume", count=1, devices=2)
    assert len(losses(alone, stopped)) > STEPS - stopped
    np.testing.assert_allclose(losses(alone), losses(uninterrupted), rtol=2e-5)

    # So do two: bit for bit as if nothing had happened.
    place.finish(out, "--resume")
    assert runs.lines(out) == runs.lines(uninterrupted)
    ours, theirs = runs.leaves(out, STEPS), runs.leaves(uninterrupted, STEPS)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


def test_bad_input_in_one_process_ends_both_with_status_2(place, tmp_path):
    """As when a file is missing on one host."""
    source = shutil.copytree(place.source, tmp_path / "text")
    port, processes = free_port(), []
    for process, folder in enumerate((source, tmp_path / "nowhere")):
        words = runs.options(tmp_path / "out", folder, place.model)
        words += f"--coordinator localhost:{port} --num-processes 2 --process-id {process}".split()
        processes.append(runs.start(*words, cache=place.root / "compiled"))
    first, second = wait(processes, timeout=60)
    assert (first.status, second.status) == (2, 2)
    assert second.stderr.startswith("deepseek-jax: no such file or directory: ")
    assert first.stderr.startswith("deepseek-jax: process 1 of 2 (")
    assert "gave up: no such file or directory: " in first.stderr
    for ended in (first, second):
        assert ended.stderr.count("\n") == 1
        assert "nowhere" in ended.stderr
        assert not ended.said()
    assert not list((tmp_path / "out").rglob("*.json"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "streams"),
    [
        # Both processes hold the same rows, and read the same.
        ("tensor=2", 1),
        ("context=2", 1),
        ("fsdp=2", 2),
        ("expert=2", 2),
        ("data=2,context=2", 2),  # two devices each
    ],
)
def test_axes_that_cross_processes(place, tmp_path, mesh, streams):
    """Two processes do what one does with as many devices."""
    each = 2 if "," in mesh else 1
    extra = ["--steps", "12", "--mesh", mesh]
    place.finish(tmp_path / "two", *extra, devices=each)
    place.finish(tmp_path / "one", *extra, "--streams", str(streams), count=1, devices=2 * each)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=2e-5)


@pytest.mark.slow
def test_two_processes_start_from_the_weights_of_another_run(place, uninterrupted, tmp_path):
    extra = ["--steps", "12", "--init", str(uninterrupted)]
    place.finish(tmp_path / "two", *extra)
    place.finish(tmp_path / "one", *extra, "--streams", "2", count=1, devices=2)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=2e-5)
    assert losses(tmp_path / "two")[0] < losses(uninterrupted)[0] - 0.01


# --- ending together --------------------------------------------------------------------------

ALONE = """
    import os, sys, time
    from deepseek_jax import cli, distributed
    from deepseek_jax.types import UserError

    process, port, victim, how = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    with cli.ends_in_a_sentence():
        distributed.initialize(distributed.Cluster(f"localhost:{port}", 2, process))
        shared = distributed.from_first(lambda: b"made by %d" % process)
        assert shared == b"made by 0", shared
        print("ready", flush=True)
        if process == victim:
            time.sleep(0.5)
            if how == "error":
                raise ZeroDivisionError("a bug")
            if how == "bad input":
                raise UserError("the input is bad; mend it.")
            if how == "ctrl-c":
                raise KeyboardInterrupt
            os.kill(os.getpid(), 9)
        elif how != "fine":
            time.sleep(300)
"""


SAVING = """
    import sys
    from deepseek_jax import cli, distributed

    process, port, victim, out = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    with cli.ends_in_a_sentence():
        distributed.initialize(distributed.Cluster(f"localhost:{port}", 2, process))
        import jax, numpy as np
        import jax.numpy as jnp
        from jax.sharding import Mesh, NamedSharding, PartitionSpec
        from orbax.checkpoint._src.checkpointers import async_checkpointer
        from deepseek_jax.checkpoint import Checkpointer
        from deepseek_jax.types import TrainState

        def fail(*_, **__):
            raise OSError(5, "Input/output error")

        if process == victim:
            async_checkpointer._background_wait_for_commit_futures = fail
        mesh = Mesh(np.array(jax.devices()), ("data",))
        where = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
        w = jax.jit(lambda: jnp.arange(64.0), out_shardings=where[0])()
        step, bias = jax.device_put((np.int32(1), np.ones((1, 2), np.float32)), where[1])
        print("ready", flush=True)
        with jax.set_mesh(mesh), Checkpointer(out) as saver:
            state = TrainState(step, {"w": w}, (), bias)
            saver.save(1, state, data_state={}, rng=jax.random.key(0))
            saver.wait()
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_a_save_that_fails_in_one_process_ends_both(tmp_path, victim):
    """Orbax lets the others wait at a barrier, for hours."""
    ended, _ = end_of(str(tmp_path / "run"), victim, SAVING)
    assert [e.status for e in ended] == [2, 2]
    assert not runs.saved_steps(tmp_path / "run")
    for message in [e.stderr for e in ended][: victim + 1]:
        assert "saving step 1 to " in message
        assert "Input/output error" in message
        assert message.count("\n") == 1
    assert ended[0].stderr.startswith("deepseek-jax: process 1 of 2 (") == (victim == 1)


def end_of(how: str, victim: int, script: str = ALONE) -> tuple[list[Ended], float]:
    """Both processes' ends, and the seconds from the start of the last to both of them."""
    port = str(free_port())
    command = [sys.executable, "-c", textwrap.dedent(script)]
    processes = [
        subprocess.Popen(
            [*command, str(i), port, str(victim), how],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        )
        for i in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        while (line := process.stdout.readline()) != "ready\n":
            assert line.startswith("[Gloo]"), process.communicate()
    began = time.monotonic()
    ended = wait(processes, timeout=60)
    return ended, time.monotonic() - began


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("how", "status", "reason"),
    [
        ("error", 1, "ZeroDivisionError: a bug"),
        ("bad input", 2, "the input is bad; mend it."),
        ("ctrl-c", 130, "interrupted"),
    ],
)
def test_what_ends_one_ends_the_other_and_is_said(how, status, reason, victim):
    ended, seconds = end_of(how, victim)
    assert seconds < 10
    assert [e.status for e in ended] == [status, status]
    own, other = ended[victim], ended[1 - victim]
    assert reason in own.stderr
    assert ("Traceback" in own.stderr) == (how == "error")
    if victim == 1:
        assert other.stderr.startswith("deepseek-jax: process 1 of 2 (")
        assert f"gave up: {reason}" in other.stderr
        assert other.stderr.count("\n") == 1
    else:
        assert not other.stderr  # the first process has said it for all


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_is_named_at_once(victim):
    ended, seconds = end_of("kill", victim)
    assert seconds < 10
    assert ended[victim].status == -signal.SIGKILL
    survivor = ended[1 - victim]
    # JAX notices the end of process 0 in the same instant; it may have its say, too, and abort.
    said = [x for x in survivor.stderr.splitlines() if x.startswith("deepseek-jax: ")]
    assert len(said) == 1, survivor.stderr
    assert f"process {victim} of 2" in said[0]
    assert "is gone without a word: killed, out of memory" in said[0]
    assert survivor.status == 1 or (victim == 0 and survivor.status == -signal.SIGABRT)


def test_an_orderly_end_is_no_alarm():
    ended, _ = end_of("fine", 9)
    assert [(e.status, e.stderr) for e in ended] == [(0, ""), (0, "")]


def test_processes_that_do_not_appear_are_waited_for_and_then_reported(monkeypatch):
    script = """
        from deepseek_jax import cli, distributed
        distributed._START_S = 2
        with cli.ends_in_a_sentence():
            distributed.initialize(distributed.Cluster("localhost:%d", 3, 0))
    """
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script) % free_port()],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == 2
    assert "process 0 of 3 waited 2 s" in process.stderr
    assert "check that each was started" in process.stderr
    assert process.stderr.count("\n") == 1


# --- who is there -----------------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_NODELIST": "gpu[007-010]",
    "SLURM_NTASKS": "32",
    "SLURM_STEP_NUM_TASKS": "32",
    "SLURM_STEP_TASKS_PER_NODE": "8(x4)",
    "SLURM_NODEID": "2",
    "SLURM_PROCID": "19",
    "SLURM_LOCALID": "3",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}


@pytest.fixture
def surroundings(monkeypatch) -> pytest.MonkeyPatch:
    """Nothing of the launcher, if any, under which the tests themselves run."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "CUDA_", "JAX_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(cloud_tpu_init, "running_in_cloud_tpu_vm", False)
    return monkeypatch


def set_all(patch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        patch.setenv(name, value)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        # A batch script that starts Python without srun; a shell inside of an allocation; one task.
        {k: v for k, v in SLURM.items() if not k.startswith("SLURM_STEP")},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # a pod by itself
    ],
)
def test_a_process_that_is_alone_joins_nobody_and_asks_no_network(surroundings, variables):
    def no(*_, **__):
        raise AssertionError("a process that is alone has asked the network")

    set_all(surroundings, variables)
    surroundings.setattr(jax.distributed, "initialize", no)
    surroundings.setattr(socket, "socket", no)
    surroundings.setattr(socket, "getaddrinfo", no)
    began = time.monotonic()
    distributed.initialize()
    assert time.monotonic() - began < 0.1
    assert distributed.from_first(lambda: b"mine") == b"mine"
    assert not distributed.stop_agreed(1)
    distributed.give_up(2, "", lambda: None)  # returns: there is nobody to end
    distributed.leave()


def test_num_processes_1_is_alone_whatever_the_surroundings_say(surroundings):
    set_all(surroundings, SLURM)
    assert find(Cluster(num_processes=1)) is None


def test_a_slurm_step(surroundings):
    set_all(surroundings, SLURM)
    port = 4242 % 4096 + 61440
    assert find(Cluster()) == Member(32, 19, f"gpu007:{port}", (3,))
    # Each task sees only its own GPU already; then, all of those of the host for one task.
    surroundings.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert find(Cluster()) == Member(32, 19, f"gpu007:{port}", None)
    surroundings.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    assert find(Cluster()) == Member(32, 19, f"gpu007:{port}", (3,))
    alone = {"STEP_TASKS_PER_NODE": "2(x2),1", "LOCALID": "0", "PROCID": "4", "STEP_NUM_TASKS": "5"}
    set_all(surroundings, {f"SLURM_{name}": value for name, value in alone.items()})
    assert find(Cluster()) == Member(5, 4, f"gpu007:{port}", None)


def test_open_mpi(surroundings):
    set_all(surroundings, OPEN_MPI)
    member = find(Cluster())
    assert member is not None
    assert member._replace(coordinator=None) == Member(4, 2, None, (0,))
    assert member.coordinator is not None
    assert member.coordinator.startswith("10.96.0.1:")
    surroundings.delenv("OMPI_MCA_orte_hnp_uri")  # Open MPI 5
    with pytest.raises(UserError, match="add --coordinator HOST:PORT"):
        find(Cluster())
    assert find(Cluster("10.0.0.1:9000")) == Member(4, 2, "10.0.0.1:9000", (0,))


def test_a_tpu_pod(surroundings):
    for module in (cloud_tpu_init, cloud_tpu_cluster):
        surroundings.setattr(module, "running_in_cloud_tpu_vm", True)
    hosts = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2", "TPU_SKIP_MDS_QUERY": "1"}
    slices = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
    set_all(surroundings, hosts | slices | {"MEGASCALE_COORDINATOR_ADDRESS": "a"})
    assert find(Cluster()) == Member(8, 6, None, None)
    set_all(surroundings, slices | {"MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"})
    assert find(Cluster()) == Member(4, 2, None, None)
    surroundings.setenv("TPU_WORKER_HOSTNAMES", "localhost")  # one host
    surroundings.setenv("TPU_WORKER_ID", "0")
    assert find(Cluster()) is None


@pytest.mark.parametrize(
    ("cluster", "complaint"),
    [
        (Cluster("host:1"), "all three"),
        (Cluster("host:1", 2), "all three"),
        (Cluster(None, 2, 0), "all three"),
        (Cluster("host:1", 2, 2), r"--process-id=2 must lie between 0 and 1"),
        (Cluster("host:1", 2, -1), r"--process-id=-1 must lie between 0 and 1"),
        (Cluster("host", 2, 0), "'host' is not HOST:PORT"),
        (Cluster("host:port", 2, 0), "'host:port' is not HOST:PORT"),
        (Cluster("host:70000", 2, 0), "is not HOST:PORT"),
    ],
)
def test_options_that_do_not_suffice(surroundings, cluster, complaint):
    with pytest.raises(UserError, match=complaint):
        find(cluster)


def test_options_complete_what_the_launcher_says(surroundings):
    set_all(surroundings, SLURM)
    assert find(Cluster("gpu007:9000")) == Member(32, 19, "gpu007:9000", (3,))
    assert find(Cluster("gpu007:9000", 4, 1)) == Member(4, 1, "gpu007:9000", (3,))


def test_importing_the_command_line_leaves_the_backend_alone():
    """Else a process could not join the others any more."""
    script = (
        "import deepseek_jax.cli, deepseek_jax.train.pretrain\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_metrics_are_json(uninterrupted):
    rows = [json.loads(row) for row in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, STEPS + 1))
    assert losses(uninterrupted)[-2] < losses(uninterrupted)[0]
