"""The launch scripts, with the cluster's commands replaced by ones that write down their words."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[1] / "experiments" / "launch"


@pytest.fixture
def stubs(tmp_path) -> Path:
    """A PATH on which srun and the others only say what they were asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("srun", "scontrol", "gcloud"):
        script = folder / name
        script.write_text(
            f'#!/bin/sh\nprintf "%s\\n" {name} "$@" >> "$LOG"\nexit "${{STATUS:-0}}"\n'
        )
        script.chmod(0o755)
    return folder


def run(stubs: Path, script: str, *words: str, status: int = 0, **environ: str):
    """Exit status and the words of every command called."""
    log = stubs.parent / "log"
    environment = os.environ | {
        "PATH": f"{stubs}:{os.environ['PATH']}",
        "LOG": str(log),
        "STATUS": str(status),
        "SLURM_JOB_ID": "17",
        "VENV": "/venv",
        **environ,
    }
    ended = subprocess.run(
        ["bash", str(LAUNCH / script), *words],
        env=environment,
        cwd=stubs.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return ended, log.read_text().splitlines() if log.exists() else []


def slurm(stubs: Path, *words: str, status: int = 0, **environ: str):
    return run(stubs, "slurm.sbatch", *words, status=status, **environ)


def test_slurm_starts_one_process_per_task(stubs):
    ended, log = slurm(stubs, "--model", "small", "--out", "out", "--prompt", "a b")
    assert ended.returncode == 0, ended.stderr
    expected = ["/venv/bin/deepseek-jax", "pretrain", "--model", "small", "--out", "out"]
    assert log == ["srun", "--kill-on-bad-exit=1", "--label", *expected, "--prompt", "a b"]


def test_slurm_runs_recipes(stubs):
    _, log = slurm(stubs, "--steps", "5", RECIPE="experiments/mine.py")
    assert log[3:] == ["/venv/bin/python", "experiments/mine.py", "--steps", "5"]


@pytest.mark.parametrize("words", [["--out", "out"], ["--out=out"], ["--out", "x", "--out", "out"]])
def test_slurm_resumes_what_is_there_and_requeues_what_is_not_finished(stubs, words):
    out = stubs.parent / "out"
    out.mkdir()
    (out / "run.json").touch()
    ended, log = slurm(stubs, *words)
    assert ended.returncode == 0
    assert log[-4:] == ["--resume", "scontrol", "requeue", "17"]
    (out / "loss.png").touch()
    _, log = slurm(stubs, *words)
    assert log[-1] == "--resume"  # it is finished: not again


def test_slurm_does_not_requeue_a_failure(stubs):
    (stubs.parent / "out").mkdir()
    (stubs.parent / "out" / "run.json").touch()
    ended, log = slurm(stubs, "--out", "out", status=2)
    assert ended.returncode == 2
    assert "scontrol" not in log


SLICE = {"TPU_NAME": "pod", "ZONE": "us-east5-a", "PROJECT": "mine"}


def test_tpu_vm_runs_on_all_hosts_with_the_words_intact(stubs):
    ended, log = run(stubs, "tpu_vm.sh", "run", "--prompt", "it's a b", "--out", "/x", **SLICE)
    assert ended.returncode == 0, ended.stderr
    assert log[:7] == [*["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"], "--zone=us-east5-a"]
    assert "--worker=all" in log
    (command,) = [word for word in log if word.startswith("--command=")]
    words = subprocess.run(
        [
            "bash",
            "-c",
            command.removeprefix("--command=").replace("cd deepseek_jax && exec", "printf '%s\\n'"),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert words == [".venv/bin/deepseek-jax", "pretrain", "--prompt", "it's a b", "--out", "/x"]


def test_tpu_vm_stops_through_one_host(stubs):
    _, log = run(stubs, "tpu_vm.sh", "stop", **SLICE)
    assert "--worker=0" in log
    assert any("TERM" in word for word in log)


def test_tpu_vm_says_what_it_needs(stubs):
    ended, log = run(stubs, "tpu_vm.sh", "run")
    assert ended.returncode != 0
    assert "TPU_NAME" in ended.stderr
    assert not log
    ended, _ = run(stubs, "tpu_vm.sh", **SLICE)
    assert ended.returncode == 2
    assert "usage" in ended.stderr


def test_the_jobset_is_consistent():
    (job,) = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())["spec"]["replicatedJobs"]
    slices, spec = job["replicas"], job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    x, y, z = map(int, topology.split("x"))
    chips = x * y * z
    assert spec["parallelism"] == spec["completions"]
    assert spec["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == chips
    assert f"data={slices}," in container["args"][0]
    subprocess.run(["bash", "-n", "-c", container["args"][0]], check=True)
