"""Pretraining end to end: interrupted runs end like uninterrupted ones, and what runs leave."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from matplotlib.image import imread

from deepseek_jax.checkpoint import claim_run_directory, load_params
from deepseek_jax.cli import main
from deepseek_jax.data.pipeline import DataConfig
from deepseek_jax.report import read_metrics
from deepseek_jax.train import run as run_module
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.optim import OptimConfig
from deepseek_jax.train.pretrain import PretrainConfig, pretrain, run_json
from deepseek_jax.types import UserError
from tests.train import runs

STEPS = 24
# Two micro-batches, one before the ramp; and Fill-in-Middle on every document.
RAMP = ["--micro-batch", "4", "--first-batch-size", "4", "--ramp-fraction", "0.5"]
ACCUMULATING = [*RAMP, "--fim-rate", "1", "--mask-documents", "--ema-decay", "0.9"]
LOOP = {"steps": STEPS, "batch_size": 8, "save_every": 4, "eval_every": 10}


class Place(NamedTuple):
    """Where the runs of this module find their input and their compiled programs."""

    root: Path
    source: Path
    model: Path
    cache: Path

    def start(self, out: Path, *extra: str) -> subprocess.Popen[str]:
        words = runs.options(out, self.source, self.model)
        return runs.start(*words, *extra, cache=self.cache)

    def finish(self, out: Path, *extra: str) -> tuple[str, str]:
        """Runs to the end; what it said on stdout and stderr."""
        process = self.start(out, *extra)
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        return stdout, stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("pretrain")
    source, model = runs.write_corpus(root / "text"), runs.write_config(root / "config.json")
    cache = root / "compiled"
    before = jax.config.jax_compilation_cache_dir
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield Place(root, source, model, cache)
    jax.config.update("jax_compilation_cache_dir", before)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def uninterrupted(place) -> Path:
    out = place.root / "uninterrupted"
    place.finish(out)
    return out


@pytest.fixture(scope="module")
def uninterrupted_accumulating(place) -> Path:
    out = place.root / "uninterrupted_accumulating"
    place.finish(out, *ACCUMULATING)
    return out


# --- interruptions ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "extra"),
    [
        pytest.param("uninterrupted", [], id="plain"),
        pytest.param(
            "uninterrupted_accumulating", ACCUMULATING, id="accumulating", marks=pytest.mark.slow
        ),
    ],
)
def test_kill_9_and_resume_ends_bit_identical(place, tmp_path, request, reference, extra):
    expected = request.getfixturevalue(reference)
    resume: list[str] = []
    # Kills lag behind by some steps, hence not up to the last. Before step 4 nothing is saved.
    kills = sorted(random.Random(reference).sample(range(1, 16), 2))
    for step in kills:
        process = place.start(tmp_path, *extra, *resume)
        runs.wait_for_step(process, tmp_path, step)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        resume = ["--resume"]
    place.finish(tmp_path, *extra, *resume)
    runs.assert_same_run(tmp_path, expected, STEPS)


def test_signals_save_and_a_truncated_checkpoint_is_passed_over(place, tmp_path, uninterrupted):
    resume: list[str] = []
    for signum, step in ((signal.SIGINT, 5), (signal.SIGTERM, 10)):
        process = place.start(tmp_path, *resume)
        runs.wait_for_step(process, tmp_path, step)
        process.send_signal(signum)
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        assert not stderr
        last = runs.lines(tmp_path)[-1]["step"]
        assert runs.saved_steps(tmp_path)[-1] == last < STEPS
        assert f"stopped and saved at step {last}; continue with --resume." in stdout
        assert not (tmp_path / "loss.png").exists()
        resume = ["--resume"]

    newest, previous = runs.saved_steps(tmp_path)[:-3:-1]
    files = (tmp_path / "checkpoints" / str(newest) / "model").rglob("*")
    victim = max((p for p in files if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(victim, victim.stat().st_size // 2)
    stdout, stderr = place.finish(tmp_path, "--resume")
    assert stderr.count("\n") == 1
    assert f"checkpoint of step {newest} is damaged: model/" in stderr
    assert (tmp_path / f"damaged-step-{newest}").is_dir()
    assert f"resuming at step {previous}" in stdout
    runs.assert_same_run(tmp_path, uninterrupted, STEPS)


def test_a_finished_run_can_be_resumed_to_no_effect(place, tmp_path, uninterrupted):
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    pictures = [(out / name).read_bytes() for name in ("loss.png", "expert_load.png")]
    place.finish(out, "--resume")
    assert runs.leaves(out, STEPS).keys() == runs.leaves(uninterrupted, STEPS).keys()
    assert read_metrics(out / "metrics.jsonl") == read_metrics(uninterrupted / "metrics.jsonl")
    assert pictures == [(out / name).read_bytes() for name in ("loss.png", "expert_load.png")]


def test_a_resume_with_other_workers_is_refused_and_leaves_the_run_as_it_was(place, tmp_path):
    """A place in the data is one for so many workers."""
    config = runs.config(tmp_path, place.source, loop=LoopConfig(**LOOP))
    claim_run_directory(tmp_path, run_json(config), resume=False)
    before = (tmp_path / "run.json").read_bytes()
    data = dataclasses.replace(config.data, num_workers=1)
    with pytest.raises(UserError, match=r"was started with data.num_workers = 0"):
        pretrain(dataclasses.replace(config, data=data, resume=True))
    assert (tmp_path / "run.json").read_bytes() == before


def test_ctrl_c_while_the_pictures_are_drawn_is_one_sentence(
    place, tmp_path, uninterrupted, monkeypatch, capsys
):
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    monkeypatch.setattr(run_module, "plot_loss", lambda *_, **__: os.kill(os.getpid(), 2))
    with pytest.raises(SystemExit) as end:
        main(["pretrain", "--out", str(out), "--resume", "--mesh", "data=8"])
    assert end.value.code == 130
    error = capsys.readouterr().err
    assert error.startswith("deepseek-jax: interrupted; ")
    assert error.count("\n") == 1
    assert runs.saved_steps(out)[-1] == STEPS


# --- what a run leaves ------------------------------------------------------------------------


def test_a_finished_run_leaves_its_files(uninterrupted):
    names = {path.name for path in uninterrupted.iterdir()}
    assert names == {
        *("checkpoints", "metrics.jsonl", "tensorboard", "tokenizer.json", "run.json"),
        *("loss.png", "expert_load.png", "sample.txt"),
    }
    for picture in ("loss.png", "expert_load.png"):
        pixels = imread(uninterrupted / picture)
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 0.01  # not blank
    assert (uninterrupted / "sample.txt").read_text(encoding="utf-8").startswith("def ")
    assert runs.saved_steps(uninterrupted) == [16, 20, 24]
    run = json.loads((uninterrupted / "run.json").read_text())["config"]
    assert run["stage"] == "pretrain"
    assert run["model"]["vocab_size"] == runs.MODEL.vocab_size
    events = list((uninterrupted / "tensorboard").iterdir())
    assert events
    written = b"".join(path.read_bytes() for path in events)
    assert all(name in written for name in (b"loss", b"grad_norm", b"eval_bits_per_byte"))


def test_metrics_have_every_step_once(uninterrupted):
    text = (uninterrupted / "metrics.jsonl").read_text()
    rows = [json.loads(row) for row in text.splitlines()]
    trained = [row for row in rows if "eval_loss" not in row]
    assert [row["step"] for row in trained] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if "eval_loss" in row] == [10, 20, STEPS]
    wanted = "loss mtp_loss balance_loss load_violation_max grad_norm learning_rate tokens_per_s"
    for row in trained:
        assert all(np.isfinite(row[name]) for name in wanted.split())
        assert row["skipped"] == 0
        assert row["tokens"] == row["step"] * 8 * 32
    assert trained[-1]["loss"] < trained[0]["loss"]


@pytest.mark.slow
def test_the_ramp_counts_its_tokens(uninterrupted_accumulating):
    tokens = [r["tokens"] for r in runs.lines(uninterrupted_accumulating) if "tokens" in r]
    rows = np.diff([0, *tokens]) // 32
    assert rows.tolist() == [4] * 16 + [8] * 8  # half of all sequences


# --- meshes -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_eight_devices_learn_what_one_does(place, tmp_path, uninterrupted):
    config = runs.config(tmp_path, place.source, loop=LoopConfig(**LOOP))
    result = pretrain(dataclasses.replace(config, mesh="data=8"))
    assert result is not None
    assert result.outcome.finished
    one, eight = (
        [row["loss"] for row in read_metrics(out / "metrics.jsonl")]
        for out in (uninterrupted, tmp_path)
    )
    np.testing.assert_allclose(eight, one, rtol=2e-5)


# --- divergence -------------------------------------------------------------------------------


def test_a_loss_that_stays_not_finite_stops_the_run(place, tmp_path):
    loop = LoopConfig(**(LOOP | {"save_every": 1, "max_skips": 3}))
    config = runs.config(tmp_path, place.source, loop=loop)
    optim = OptimConfig(peak_lr=1e15, min_lr=1e14, warmup_steps=0)
    with pytest.raises(UserError, match=r"training diverged: step \d+ .* 3 steps in a row"):
        pretrain(dataclasses.replace(config, optim=optim))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["skipped"] for row in rows][-3:] == [1, 2, 3]  # the last ended the run
    assert not np.isfinite(rows[-1]["loss"])
    assert "non_finite" in (tmp_path / "metrics.jsonl").read_text()
    newest = runs.saved_steps(tmp_path)[-1]
    assert newest == rows[-1]["step"] - 1
    params, bias_LE, _ = load_params(tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in [*jax.tree.leaves(params), bias_LE])
    assert not (tmp_path / "loss.png").exists()


def spiky(root: Path) -> PretrainConfig:
    """Text that is soon learnt, and after 40 steps of it three batches of letter salad."""
    rng = random.Random(0)
    plain = "ab" * (8 * 32 * 40 // 2)
    salad = "".join(rng.choices("cdefghijklmnopqrstuvwxyz0123456789", k=8 * 32 * 3))
    for name, text in {"0": plain, "1": salad, "2": plain, "held": "ab" * 200}.items():
        (root / f"{name}.txt").write_text(text)
    sources = tuple(str(root / f"{i}.txt") for i in range(3))
    return runs.config(
        root / "run",
        root,
        loop=LoopConfig(steps=50, batch_size=8, eval_every=0, save_every=40, max_skips=6),
        # The batch in which salad gives way to text again may pass, but then teaches little.
        optim=OptimConfig(
            peak_lr=2e-2, min_lr=1e-6, final_lr=1e-6, constant_until=0.6, cosine_until=0.7
        ),
        data=DataConfig(
            source=sources,
            held_out_source=(str(root / "held.txt"),),
            seq_len=32,
            fim_rate=0.0,
            shuffle=False,
        ),
    )


@pytest.mark.usefixtures("place")
def test_a_spike_is_skipped_and_counted(tmp_path):
    result = pretrain(spiky(tmp_path))
    assert result is not None
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    count = np.array([row["skipped"] for row in rows])
    skipped = np.flatnonzero(np.diff(count, prepend=0))
    assert 40 <= skipped.min() < skipped.max() <= 44
    assert 3 <= len(skipped) <= 5
    assert all(rows[i]["loss"] > 2 for i in skipped)
    assert all(row["loss"] < 1 for row in rows[45:])  # what was learnt is still there
    assert int(result.outcome.state.step) == 50 - len(skipped)


# --- full disk --------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path, monkeypatch) -> Iterator[tuple[Path, Callable[[], object]]]:
    """A disk of 4 MB, and what makes room on it. Only said to be one where none can be mounted."""

    def mount(how: str) -> bool:
        words = ["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(tmp_path)]
        return subprocess.run(words, capture_output=True).returncode == 0

    if mount("size=4m"):
        yield tmp_path, lambda: mount("remount,size=64m")
        subprocess.run(["umount", str(tmp_path)], check=True)
        return
    usage = shutil.disk_usage

    def small(path: Path):
        used = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
        return usage(path)._replace(free=max(4_000_000 - used, 0))

    monkeypatch.setattr(shutil, "disk_usage", small)
    yield tmp_path, lambda: monkeypatch.setattr(shutil, "disk_usage", usage)


# What TensorStore could not write it reports late, to an event loop that Orbax has closed by then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_one_sentence_and_the_run_goes_on(place, small_disk, capsys):
    disk, make_room = small_disk
    out = disk / "run"
    words = runs.options(out, place.source, place.model)
    with pytest.raises(SystemExit) as end:
        main(["pretrain", *words, "--keep-last", "100", "--save-every", "1"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("deepseek-jax: the disk is full: ")
    assert error.count("\n") == 1
    assert "make room" in error
    assert "--resume" in error
    newest = runs.saved_steps(out)[-1]
    load_params(out)
    make_room()
    main(["pretrain", *words, "--resume"])
    assert f"resuming at step {newest}" in capsys.readouterr().out
    assert runs.saved_steps(out)[-1] == STEPS
