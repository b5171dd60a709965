"""The launch scripts, with the cluster's commands replaced by ones that write down their words."""

import math
import os
import re
import shlex
import subprocess
from pathlib import Path

import jax
import pytest
import yaml

from deepseek_jax import sharding
from deepseek_jax.presets import preset

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


# --- do the commands that are shipped go together? ----------------------------------------------

# Devices that a script is written for, and where its command stands.
SLURM_DEVICES = 4 * 8
TPU_VM_DEVICES = 64
COMMANDS = {
    "slurm.sbatch": (SLURM_DEVICES, r"sbatch --nodes=4 \S+slurm\.sbatch (.*)"),
    "tpu_vm.sh": (TPU_VM_DEVICES, r"tpu_vm\.sh run (--.*)"),
    "gke_jobset.yaml": (2 * 4 * 4 * 8, r"exec deepseek-jax pretrain (.*)"),
    "../../docs/launch.md": (SLURM_DEVICES, r"`sbatch --nodes=4 \S+slurm\.sbatch ([^`]*)`"),
    "../../docs/launch.md, TPU": (TPU_VM_DEVICES, r"`run (--mesh [^`]*)`"),
}


def shipped(name: str) -> tuple[int, dict[str, str]]:
    """Devices, and the options of the command, continued lines joined."""
    devices, pattern = COMMANDS[name]
    text = (LAUNCH / name.removesuffix(", TPU")).read_text()
    lines = re.sub(r" *\\\n#? *", " ", text)
    (found,) = re.findall(pattern, lines)
    words = shlex.split(found.replace("$resume", ""))
    assert all(word.startswith("--") for word in words[::2]), words
    return devices, dict(zip(words[::2], words[1::2], strict=True))


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_shipped_can_be_divided_over_its_devices(name):
    devices, options = shipped(name)
    sizes = sharding.parse_mesh(options["--mesh"])
    known = math.prod(size for size in sizes.values() if size != -1)
    sizes = {axis: devices // known if size == -1 else size for axis, size in sizes.items()}
    assert math.prod(sizes.values()) == devices
    axes = sharding.MESH_AXES
    mesh = jax.sharding.AbstractMesh(tuple(sizes.get(axis, 1) for axis in axes), axes)
    assert int(options["--batch-size"]) % sharding.batch_shards(mesh) == 0
    assert int(options["--seq-len"]) % sharding.sequence_shards(mesh) == 0
    if "--model" in options:
        assert int(options["--seq-len"]) <= preset(options["--model"]).max_position_embeddings
    assert not {"--source", "--out"} - options.keys() or "docs" in name


def test_the_scripts_say_how_many_devices_they_are_for():
    slurm_text = (LAUNCH / "slurm.sbatch").read_text()
    assert "#SBATCH --ntasks-per-node=8\n#SBATCH --gpus-per-node=8" in slurm_text
    assert f"{TPU_VM_DEVICES} chips" in (LAUNCH / "tpu_vm.sh").read_text()


def test_another_stage_than_pretraining(stubs):
    _, log = slurm(stubs, "--init", "out/sft", STAGE="grpo")
    assert log[3:] == ["/venv/bin/deepseek-jax", "grpo", "--init", "out/sft"]
    _, log = run(stubs, "tpu_vm.sh", "run", "--init", "out/sft", **SLICE, STAGE="sft")
    assert any("deepseek-jax sft --init out/sft" in word for word in log)


def test_slurm_knows_a_finished_run_of_grpo(stubs):
    (stubs.parent / "out").mkdir()
    for name in ("run.json", "rewards.png"):
        (stubs.parent / "out" / name).touch()
    _, log = slurm(stubs, "--out", "out", STAGE="grpo")
    assert log[-1] == "--resume"
