"""Fine-tuning end to end: interruptions, what a run leaves, where it starts, what it refuses."""

import dataclasses
import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from deepseek_jax.checkpoint import claim_run_directory, load_params
from deepseek_jax.cli import main
from deepseek_jax.config import FLOAT32
from deepseek_jax.convert import convert_to_hf
from deepseek_jax.data.sft import ConversationConfig, Survey
from deepseek_jax.presets import preset
from deepseek_jax.report import read_metrics
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.optim import OptimConfig
from deepseek_jax.train.run import identity, stored_config
from deepseek_jax.train.sft import (
    SFT_EPOCHS,
    SFT_OPTIM,
    SftConfig,
    _with_rows,
    _with_steps,
    sft,
)
from tests.train import runs

STEPS = 12


class Place(NamedTuple):
    """A base model, conversations, and where compiled programs are kept."""

    root: Path
    base: Path
    data: Path
    cache: Path

    def options(self, out: Path) -> list[str]:
        words = f"--out {out} --init {self.base} --data {self.data} --held-out-fraction 0.2"
        loop = "--steps 12 --batch-size 8 --save-every 4 --eval-every 5"
        rest = "--seq-len 64 --compute float32 --samples 1 --sample-tokens 4 --peak-lr 1e-2"
        return f"{words} {loop} {rest}".split()

    def start(self, out: Path, *extra: str) -> subprocess.Popen[str]:
        return runs.start(*self.options(out), *extra, cache=self.cache, stage="sft")

    def finish(self, out: Path, *extra: str) -> str:
        process = self.start(out, *extra)
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        return stdout

    def config(self, out: Path, **changes: Any) -> SftConfig:
        """What ``options`` say, for eight devices."""
        talks = ConversationConfig(data=(str(self.data),), held_out_fraction=0.2, seq_len=64)
        loop = LoopConfig(steps=STEPS, batch_size=8, save_every=4, eval_every=5)
        optim = dataclasses.replace(SFT_OPTIM, peak_lr=1e-2)
        base: dict[str, Any] = {"init": self.base, "conversations": talks, "optim": optim}
        base |= {"out": out, "loop": loop, "precision": FLOAT32, "samples": 0}
        return SftConfig(**(base | changes))


def talks(count: int = 40) -> list[dict[str, Any]]:
    return [{"prompt": f"what {i}", "completion": f"it {i}"} for i in range(count)]


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("sft")
    cache = root / "compiled"
    before = jax.config.jax_compilation_cache_dir
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    base = runs.write_base(root / "base")
    yield Place(root, base, write(root / "talks.jsonl", talks()), cache)
    jax.config.update("jax_compilation_cache_dir", before)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def uninterrupted(place) -> Path:
    out = place.root / "uninterrupted"
    place.finish(out)
    return out


# --- interruptions ----------------------------------------------------------------------------


@pytest.mark.slow
def test_kill_9_and_resume_ends_bit_identical(place, tmp_path, uninterrupted):
    process = place.start(tmp_path)
    runs.wait_for_step(process, tmp_path, 6)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    stdout = place.finish(tmp_path, "--resume")
    assert "resuming at step" in stdout
    a, b = runs.leaves(tmp_path, STEPS), runs.leaves(uninterrupted, STEPS)
    assert a.keys() == b.keys()
    assert all(a[name].tobytes() == b[name].tobytes() for name in a)
    files = (f"checkpoints/{STEPS}/host/metadata", "samples.jsonl", "tokenizer.json")
    assert [(tmp_path / f).read_text() for f in files] == [
        (uninterrupted / f).read_text() for f in files
    ]
    assert runs.lines(tmp_path) == runs.lines(uninterrupted)


# --- what a run leaves ------------------------------------------------------------------------


def test_a_finished_run_leaves_its_files(uninterrupted):
    names = {path.name for path in uninterrupted.iterdir()}
    assert names == {
        *("checkpoints", "metrics.jsonl", "tensorboard", "tokenizer.json", "run.json"),
        *("loss.png", "expert_load.png", "samples.jsonl", "chat_template.jinja"),
    }
    run = json.loads((uninterrupted / "run.json").read_text())["config"]
    assert (run["stage"], run["model"]["vocab_size"]) == ("sft", runs.MODEL.vocab_size)
    samples = [json.loads(s) for s in (uninterrupted / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [5, 10, STEPS]
    assert all(s["prompt"].startswith("what ") for s in samples)
    rows = read_metrics(uninterrupted / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval_loss" in row] == [5, 10, STEPS]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all("mtp_loss" in row for row in rows)
    rates = [row["learning_rate"] for row in rows]
    assert rates[0] == pytest.approx(1e-2)
    assert rates == sorted(rates, reverse=True)  # a cosine, from the first step on


@pytest.mark.slow
def test_eight_devices_learn_what_one_does(place, tmp_path, uninterrupted):
    meshes = {"a": "data=8", "b": "fsdp=2,expert=2,tensor=2"}
    for name, mesh in meshes.items():
        assert sft(place.config(tmp_path / name, mesh=mesh)) is not None
        one, many = (
            [row["loss"] for row in read_metrics(out / "metrics.jsonl")]
            for out in (uninterrupted, tmp_path / name)
        )
        np.testing.assert_allclose(many, one, rtol=1e-4)


@pytest.mark.slow
def test_without_mtp_and_with_a_frozen_router_bias_neither_moves(place, tmp_path):
    optim = dataclasses.replace(SFT_OPTIM, peak_lr=1e-2, bias_speed=0.0)
    config = place.config(tmp_path, mtp=False, optim=optim, mesh="data=8")
    config = dataclasses.replace(config, loop=LoopConfig(steps=2, batch_size=8, eval_every=0))
    assert sft(config) is not None
    before, after = (load_params(path)[:2] for path in (place.base, tmp_path))
    np.testing.assert_array_equal(before[1], after[1])
    same = jax.tree.map(lambda a, b: bool((a == b).all()), before[0], after[0])
    assert all(jax.tree.leaves(same["mtp_0"]))
    assert not any(jax.tree.leaves({k: v for k, v in same.items() if not k.startswith("mtp")}))


# --- where it starts --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_hugging_face_folder_is_as_good_as_a_run(place, tmp_path):
    convert_to_hf(place.base, tmp_path / "hf", dtype="fp32")
    loop = LoopConfig(steps=2, batch_size=8, eval_every=0)
    for name, init in (("run", place.base), ("folder", tmp_path / "hf")):
        sft(place.config(tmp_path / name, init=init, loop=loop))
    a, b = (load_params(tmp_path / name)[0] for name in ("run", "folder"))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_epochs_make_the_steps(place, tmp_path, capsys, monkeypatch):
    from deepseek_jax.train import sft as module

    seen = []
    monkeypatch.setattr(module, "run", lambda config, *_: seen.append(config.loop.steps))
    words = [w for w in place.options(tmp_path) if w not in ("--steps", "12")]
    main(["sft", *words, "--epochs", "30"])
    (steps,) = seen
    # About 32 conversations of 16 tokens, four to a row of 64: 8 rows an epoch, 8 a step.
    assert 22 <= steps <= 45


def test_steps_are_those_asked_for_or_make_two_epochs(tmp_path):
    survey = Survey(*range(len(Survey._fields)))._replace(rows=80)
    default, said, passes = LoopConfig(batch_size=8), LoopConfig(steps=7, batch_size=8), 3.0

    def steps(found, **options):
        return _with_steps(SftConfig(out=tmp_path, **options), found).loop.steps

    assert steps(survey, loop=said) == 7
    assert steps(survey, loop=default) == 20
    assert steps(survey, loop=default, epochs=passes) == 30
    # Resumed: those that were stored, unless others are asked for.
    stored = _with_steps(SftConfig(out=tmp_path, loop=default, epochs=passes), survey)
    claim_run_directory(tmp_path, identity(stored, runs.MODEL), resume=False)
    assert steps(None, loop=default, epochs=passes) == 30
    assert steps(None, loop=said, epochs=passes) == 7
    assert stored_config(SftConfig(out=tmp_path)) == dataclasses.replace(stored, resume=True)


# --- what it refuses --------------------------------------------------------------------------


def refusal(place: Place, tmp_path: Path, capsys, *extra: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["sft", *place.options(tmp_path / "out"), *extra])
    stdout, stderr = capsys.readouterr()
    assert end.value.code == 2
    assert not stdout
    assert stderr.startswith("deepseek-jax: ")
    assert stderr.count("\n") == 1
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    return stderr.removeprefix("deepseek-jax: ")


GOOD = {"prompt": "a", "completion": "b"}
TURN = {"role": "assistant", "content": "b"}
BAD = {
    "line 2: turn 1 has the role 'bot'": {"messages": [{"role": "bot", "content": "x"}, TURN]},
    "line 2: turn 1, the assistant's, is empty": {"messages": [TURN | {"content": ""}]},
    "line 2: the field `completion` is missing": {"prompt": "x"},
    "line 2: the conversation is ": {"prompt": "x" * 200, "completion": "y"},
    "line 2: the completion was cut off": {"prompt": "x", "completion": "y", "finish": "length"},
    "line 2: no turn is the assistant's": {"messages": [{"role": "user", "content": "x"}]},
}


@pytest.mark.parametrize("complaint", BAD)
def test_a_bad_conversation_is_one_sentence(place, tmp_path, capsys, complaint):
    data = write(tmp_path / "bad.jsonl", [GOOD, BAD[complaint]])
    held = write(tmp_path / "held.jsonl", [GOOD])
    message = refusal(place, tmp_path, capsys, "--data", str(data), "--held-out", str(held))
    assert complaint in message


def test_a_data_set_without_a_token_to_learn(place, tmp_path, capsys):
    data = write(tmp_path / "bad.jsonl", [{"prompt": "x" * 200, "completion": "y"}])
    held = write(tmp_path / "held.jsonl", [GOOD])
    words = ["--data", str(data), "--held-out", str(held), "--too-long", "drop"]
    assert "the data hold no token to learn" in refusal(place, tmp_path, capsys, *words)


def test_a_template_that_raises(place, tmp_path, capsys):
    hostile = tmp_path / "base"
    hostile.mkdir()
    for name in ("run.json", "tokenizer.json"):
        (hostile / name).write_bytes((place.base / name).read_bytes())
    (hostile / "chat_template.jinja").write_text("{{ raise_exception('not today') }}")
    message = refusal(place, tmp_path, capsys, "--init", str(hostile))
    assert "chat_template.jinja refuses the conversation: not today" in message


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        ("--init None", "fine-tuning starts from weights: name a run or a folder with --init"),
        ("--init nowhere", "nowhere is neither a run's directory (run.json) nor a Hugging Face"),
        ("--epochs 3", "epochs=3 and steps=12 both say how long the run is; give one of them"),
        ("--seq-len 8192", "seq_len=8192 exceeds the model's context of 4096; lower it"),
        ("--data gone.jsonl", "no such file or directory: gone.jsonl"),
        ("--weights 1 2", "1 entries of data have the weights [1.0, 2.0]"),
        ("--mesh data=3", "'data=3' asks for 3 devices, but there are 8"),
    ],
)
def test_options_that_cannot_be(place, tmp_path, capsys, extra, complaint):
    assert complaint in refusal(place, tmp_path, capsys, *extra.split())


# --- inspect ----------------------------------------------------------------------------------


def test_inspect_shows_tokens_weights_and_segments(place, tmp_path, capsys):
    main(["sft", *place.options(tmp_path / "out"), "--inspect"])
    shown = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert "positions used" in shown
    assert "segment 2: " in shown
    assert "<｜Assistant｜>[[it " in shown
    assert "<｜end▁of▁sentence｜>]]" in shown
    assert "tokens, " in shown.splitlines()[-1]


def test_rows_are_no_longer_than_the_models_context(place, tmp_path, capsys):
    """So that the default of V3's 4096 does for a model with less."""
    main(["sft", *place.options(tmp_path / "out"), "--inspect", "--seq-len", "None"])
    assert " of 4096 positions used" in capsys.readouterr().out
    config = SftConfig(conversations=ConversationConfig(data=(str(place.data),)))
    for context, rows in ((2048, 2048), (8192, 4096)):
        model = preset("tiny").replace(max_position_embeddings=context)
        assert _with_rows(config, model).conversations.seq_len == rows


def test_defaults_are_the_papers():
    assert (SFT_OPTIM.peak_lr, SFT_OPTIM.min_lr, SFT_EPOCHS) == (5e-6, 1e-6, 2.0)
    assert OptimConfig().peak_lr != SFT_OPTIM.peak_lr
