"""The command line: --help, and bad input that ends with one sentence and status 2."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax import cli, sharding
from deepseek_jax.checkpoint import Checkpointer, claim_run_directory
from deepseek_jax.cli import main
from deepseek_jax.cli.evaluate import EvalConfig, asked_tasks
from deepseek_jax.cli.generate import ChatConfig, chat
from deepseek_jax.data.conversations import parse_record
from deepseek_jax.data.tasks import open_tasks, split
from deepseek_jax.data.tokenizer import train_bpe
from deepseek_jax.generate import Engine, Sampling
from deepseek_jax.model.transformer import DeepSeekV3
from deepseek_jax.train import pretrain
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.optim import OptimConfig, make_optimizer
from deepseek_jax.train.pretrain import run_json
from deepseek_jax.train.step import abstract_state
from tests.train import runs


class Folder(NamedTuple):
    """Good input, for a test to spoil."""

    root: Path
    source: Path
    model: Path
    out: Path


@pytest.fixture
def folder(tmp_path) -> Folder:
    source = runs.write_corpus(tmp_path / "text", documents=20)
    return Folder(tmp_path, source, runs.write_config(tmp_path / "config.json"), tmp_path / "out")


def refusal(folder: Folder, capsys, *extra: str, source: Path | None = None) -> str:
    """The sentence with which the run is refused."""
    words = runs.options(folder.out, source or folder.source, folder.model)
    with pytest.raises(SystemExit) as end:
        main(["pretrain", *words, *extra])
    stdout, stderr = capsys.readouterr()
    assert end.value.code == 2
    assert not stdout
    assert stderr.startswith("deepseek-jax: ")
    assert stderr.endswith(".\n")
    assert stderr.count("\n") == 1
    assert "Traceback" not in stderr
    return stderr.removeprefix("deepseek-jax: ")


def assert_nothing_left(folder: Folder) -> None:
    """No file, so that the same command goes on once the mistake is mended."""
    assert not [path for path in folder.out.rglob("*") if path.is_file()]


# --- documents --------------------------------------------------------------------------------


def test_a_file_that_is_not_utf8(folder, capsys):
    (folder.source / "7.txt").write_bytes("naïve".encode("latin-1"))
    message = refusal(folder, capsys)
    assert "7.txt is not UTF-8 at byte 2: convert it to UTF-8 or leave it out" in message
    assert_nothing_left(folder)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"text": "cut o', "is not JSON"),
        ('{"body": "x"}', 'has no text under "text": set `text_field`'),
        ('{"text": 3}', 'has no text under "text"'),
    ],
)
def test_a_malformed_line_is_named_by_its_number(folder, capsys, line, complaint):
    source = folder.root / "corpus.jsonl"
    good = [json.dumps({"text": f"line {i}"}) for i in range(5)]
    source.write_text("\n".join([*good[:3], line, *good[3:]]))
    message = refusal(folder, capsys, source=source)
    assert "corpus.jsonl, line 4 " in message
    assert complaint in message
    assert_nothing_left(folder)


def test_an_empty_corpus(folder, capsys):
    (folder.root / "void.txt").touch()
    message = refusal(folder, capsys, source=folder.root / "void.txt")
    assert "the corpus is empty: no text in " in message
    assert "name another source" in message
    assert_nothing_left(folder)


def test_a_path_that_is_not_there_and_a_second_try(folder, capsys):
    message = refusal(folder, capsys, source=folder.root / "nowhere")
    assert "no such file or directory: " in message
    assert "nowhere" in message
    assert_nothing_left(folder)
    # Mended, but with another mistake: the first try has not left a run behind.
    assert "already holds a run" not in refusal(folder, capsys, "--mesh", "data=3")


def test_a_corpus_of_one_document(folder, capsys):
    message = refusal(folder, capsys, source=folder.source / "0.txt")
    assert "use more documents" in message
    assert_nothing_left(folder)


# --- vocabulary and model ---------------------------------------------------------------------


def old_run(folder: Folder, **changes: int) -> Path:
    """A run of one saved step, as ``pretrain`` would leave it."""
    directory = folder.root / "old"
    model = runs.MODEL.replace(**changes)
    loop = LoopConfig(steps=24, batch_size=8, save_every=4, eval_every=10)
    config = runs.config(directory, folder.source, loop=loop, model=model)
    claim_run_directory(directory, run_json(config), resume=False)
    texts = (path.read_text() for path in sorted(folder.source.iterdir()))
    train_bpe(texts, model.vocab_size).save(directory / "tokenizer.json")
    tx = make_optimizer(OptimConfig(), 24)
    abstract = abstract_state(DeepSeekV3(model, config.precision), tx, sharding.make_mesh())
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(4, state, data_state={}, rng=jax.random.key(0))
    return directory


def test_init_from_a_run_with_another_vocabulary(folder, capsys):
    old = old_run(folder)
    larger = runs.write_config(folder.model, vocab_size=280)
    message = refusal(folder, capsys, "--init", str(old), "--model", str(larger))
    assert "does not fit this configuration" in message
    assert "[266, 32] in the checkpoint and [280, 32] here" in message
    assert_nothing_left(folder)


def test_init_with_more_tokens_than_the_model_has(folder, capsys):
    old = old_run(folder, vocab_size=280)
    message = refusal(folder, capsys, "--init", str(old))
    assert "the tokenizer has 280 tokens and the model a vocabulary of 266" in message
    assert "raise vocab_size" in message
    assert_nothing_left(folder)


def test_init_from_where_there_is_no_run(folder, capsys):
    message = refusal(folder, capsys, "--init", str(folder.root))
    assert f"no tokenizer at {folder.root}" in message
    assert_nothing_left(folder)


def test_resume_with_another_model(folder, capsys):
    old = old_run(folder)
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    runs.write_config(folder.model, vocab_size=280)
    message = refusal(folder._replace(out=old), capsys, "--resume")
    assert "was started with model.vocab_size = 266, this resume asks for 280" in message
    assert before == {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}


def test_a_tokenizer_larger_than_the_vocabulary(folder, capsys):
    tokenizer = folder.root / "tokenizer.json"
    texts = (path.read_text() for path in sorted(folder.source.iterdir()))
    train_bpe(texts, 300).save(tokenizer)
    message = refusal(folder, capsys, "--tokenizer", str(tokenizer))
    assert "tokens and the model a vocabulary of 266" in message
    assert_nothing_left(folder)


def test_a_vocabulary_too_small_for_bytes(folder, capsys):
    runs.write_config(folder.model, vocab_size=200)
    message = refusal(folder, capsys)
    assert "a vocabulary of 200 is too small" in message
    assert_nothing_left(folder)


# --- configuration ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"n_group": 3, "topk_group": 1}, "n_group=3 must divide n_routed_experts=8"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 exceeds n_routed_experts=8"),
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim=3 must be even"),
        ({"model_type": "llama"}, "model_type='llama' is not of this family"),
        ({"hidden_act": "gelu"}, "config.json says hidden_act='gelu'; only 'silu' is supported"),
    ],
)
def test_a_contradictory_config_json(folder, capsys, changes, complaint):
    runs.write_config(folder.model, **changes)
    assert complaint in refusal(folder, capsys)
    assert_nothing_left(folder)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "config.json could not be read as a config.json"),
        ("[]", "config.json is not a config.json: it holds a JSON list instead of an object"),
        ("3", "it holds a JSON int instead of an object"),
        ("null", "it holds a JSON NoneType instead of an object"),
        ("{}", "model_type=None is not of this family"),
    ],
)
def test_a_config_json_that_is_none(folder, capsys, content, complaint):
    folder.model.write_text(content)
    assert complaint in refusal(folder, capsys)
    assert_nothing_left(folder)


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        ("--model v4", "no preset 'v4'; choose from tiny, small, "),
        ("--model v4/config.json", "or name a config.json that exists"),
        ("--seq-len 8192", "seq_len=8192 exceeds the model's context of 4096"),
        ("--sample-tokens -1", "sample_tokens=-1 must not be negative"),
        ("--mesh pod=2", "unknown mesh axis 'pod'; the axes are data, fsdp, expert,"),
        ("--mesh data=3", "'data=3' asks for 3 devices, but there are 8; change a size"),
        ("--mesh data=two", "mesh axis 'data=two' needs a whole number, as in data=2"),
        ("--mesh data=2,data=4", "mesh axis 'data' is given twice"),
        ("--mesh data=-1,fsdp=-1", "only one axis of 'data=-1,fsdp=-1' can be -1"),
        (
            "--mesh data=4,context=2 --seq-len 33",
            "sequences of 33 tokens cannot be divided into 2 parts",
        ),
        ("--streams 3", "8 sequences at a time cannot be taken evenly from 3 streams"),
        ("--coordinator localhost:1", "several processes need --coordinator HOST:PORT, --num-pr"),
        ("--coordinator here --num-processes 2 --process-id 0", "'here' is not HOST:PORT"),
        ("--micro-batch 3", "batch_size=8 must be a multiple of micro_batch=3"),
        ("--micro-batch -8", "micro_batch must be at least 1, not -8"),
        ("--batch-size 0", "batch_size must be at least 1, not 0"),
        ("--eval-batches 0", "eval_batches must be at least 1, not 0"),
        ("--keep-every 0", "keep_every must be at least 1, not 0"),
        ("--eval-every -1", "eval_every=-1 must not be negative"),
        ("--peak-lr nan", "peak_lr=nan must be a positive number"),
        ("--b1 1", "b1=1.0 must be at least 0 and less than 1"),
        ("--batch-size 12", "12 sequences cannot be divided over 8 batch shards"),
        ("--first-batch-size 16 --micro-batch 8", "the ramp goes up: first_batch_size=16 exceeds"),
        ("--warmup-steps 20", "warmup_steps=20 runs past step 16, where the cosine begins"),
        ("--constant-until 0.99", "the schedule needs 0 <= constant_until <= cosine_until"),
        ("--steps 0", "steps, save_every, keep_last and max_skips must be at least 1"),
        ("--held-out-fraction 1", "`held_out_fraction` is a share between 0 and 1"),
        ("--resume", "holds no run (no run.json); check the path, or start without --resume"),
    ],
)
def test_options_that_cannot_be(folder, capsys, extra, complaint):
    assert complaint in refusal(folder, capsys, *extra.split())
    assert_nothing_left(folder)


# --- output directory -------------------------------------------------------------------------


def test_a_directory_that_holds_another_run(folder, capsys):
    old = old_run(folder)
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    message = refusal(folder._replace(out=old), capsys)
    assert "already holds a run; continue it with --resume, or choose another" in message
    assert before == {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}


def test_an_output_directory_that_cannot_be_made(folder, capsys):
    (folder.root / "file").touch()
    message = refusal(folder._replace(out=folder.root / "file" / "out"), capsys)
    assert "choose another output directory" in message


def test_a_resume_that_asks_for_fewer_steps_than_are_made(folder, capsys):
    old = old_run(folder)
    before = (old / "run.json").read_bytes()
    message = refusal(folder._replace(out=old), capsys, "--resume", "--steps", "3")
    assert "has made 4 steps already, more than steps=3" in message
    assert (old / "run.json").read_bytes() == before


def test_a_run_may_be_named_for_its_model(folder):
    assert cli._read_model([str(old_run(folder, vocab_size=280))]).vocab_size == 280


# --- a real process ---------------------------------------------------------------------------


def test_a_process_says_one_sentence_and_exits_2(folder):
    (folder.source / "7.txt").write_bytes(b"\xff")
    process = runs.start(*runs.options(folder.out, folder.source, folder.model))
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert not stdout
    assert stderr.startswith("deepseek-jax: ")
    assert stderr.count("\n") == 1
    assert_nothing_left(folder)


@pytest.mark.parametrize("words", [["--help"], ["pretrain", "--help"]])
def test_a_reader_that_goes_early_is_no_error(words):
    """As with ``| head``: the end of the text may be in a buffer yet, or on its way."""
    process = runs.start(*words[1:], stage=words[0])
    assert process.stdout is not None
    process.stdout.close()
    _, stderr = process.communicate(timeout=120)
    assert (process.returncode, stderr) == (1, "")


def test_out_of_memory_is_one_sentence(folder, capsys, monkeypatch):
    def too_much(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(pretrain, "fit_tokenizer", too_much)
    message = refusal(folder, capsys)
    assert message.startswith("out of memory: Out of memory allocating 9 bytes; take fewer")


def test_version(capsys):
    main(["--version"])
    assert f", jax {jax.__version__}\n" in capsys.readouterr().out


def test_ctrl_c_before_training_is_one_sentence(folder, capsys, monkeypatch):
    """While the tokenizer is trained, say; in the loop Ctrl-C saves."""
    monkeypatch.setattr(pretrain, "fit_tokenizer", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as end:
        main(["pretrain", *runs.options(folder.out, folder.source, folder.model)])
    assert end.value.code == 130
    error = capsys.readouterr().err
    assert error.startswith("deepseek-jax: interrupted; ")
    assert error.count("\n") == 1
    assert_nothing_left(folder)


# --- compiled programs ------------------------------------------------------------------------


@pytest.fixture
def no_cache():
    """As for a user: the tests' own cache, which conftest.py chose, is forgotten for a while."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def cache_seen(words: list[str], monkeypatch, command: str = "pretrain") -> Path | None:
    """Where compiled programs are kept while the command runs."""
    seen = []

    def look(_):
        seen.append(jax.config.jax_compilation_cache_dir)

    monkeypatch.setattr(cli, command, look)
    main([command, *words])
    assert jax.config.jax_compilation_cache_dir is None  # as before
    return Path(seen[0]) if seen[0] else None


@pytest.mark.usefixtures("no_cache")
def test_compiled_programs_are_kept_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cache_seen([], monkeypatch)
    assert folder is not None
    assert folder.is_dir()
    assert folder.parent == tmp_path / "deepseek_jax"
    assert cache_seen(["x", "--run", "nowhere"], monkeypatch, "generate") == folder


@pytest.mark.usefixtures("no_cache")
def test_compiled_programs_are_kept_where_asked_or_not_at_all(monkeypatch, tmp_path):
    chosen = tmp_path / "chosen"
    assert cache_seen(["--compilation-cache", str(chosen)], monkeypatch) == chosen
    assert cache_seen(["--compilation-cache", "None"], monkeypatch) is None


@pytest.mark.usefixtures("no_cache")
def test_a_cache_that_cannot_be_is_refused_if_it_was_asked_for(
    monkeypatch, tmp_path, folder, capsys
):
    (tmp_path / "file").touch()
    message = refusal(folder, capsys, "--compilation-cache", str(tmp_path / "file" / "cache"))
    assert "choose another --compilation-cache, or None" in message
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_seen([], monkeypatch) is None


@pytest.mark.usefixtures("no_cache")
def test_a_cache_chosen_through_jax_stays(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "pretrain", lambda _: None)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    main(["pretrain"])
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


def test_help_fits_on_three_screens():
    process = runs.start("--help")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0
    assert not stderr
    lines = stdout.splitlines()
    assert len(lines) <= 165
    assert max(map(len, lines)) <= 100
    assert "dummy" not in stdout  # tyro's inner names
    for option in ("--source", "--model", "--mesh", "--resume", "--steps", "--peak-lr"):
        assert option in stdout


# --- convert and generate ---------------------------------------------------------------------


@pytest.fixture
def run_directory(folder) -> Path:
    """A run of random weights, with its tokenizer."""
    config = runs.config(folder.out, folder.source, loop=LoopConfig(steps=2, batch_size=4))
    claim_run_directory(folder.out, run_json(config), resume=False)
    texts = (path.read_text() for path in sorted(folder.source.iterdir()))
    train_bpe(texts, config.model.vocab_size).save(folder.out / "tokenizer.json")
    model = DeepSeekV3(config.model, config.precision)
    tx = make_optimizer(OptimConfig(), 2)
    mesh = sharding.make_mesh("data=1", jax.devices()[:1])
    random = jax.tree.map(
        lambda x: jnp.full(x.shape, 0.01, x.dtype), abstract_state(model, tx, mesh)
    )
    with Checkpointer(folder.out) as saver:
        saver.save(2, random, data_state={}, rng=jax.random.key(0))
    return folder.out


def test_convert_there_and_generate_from_both_sides(run_directory, tmp_path, capsys):
    main(["convert", str(run_directory), str(tmp_path / "hf"), "--dtype", "fp32"])
    main(["convert", "--check", str(tmp_path / "hf")])
    assert "complete" in capsys.readouterr().out
    options = ["--max-new-tokens", "4", "--temperature", "0", "--compute", "float32"]
    texts = []
    for source in (["--run", str(run_directory)], ["--hf", str(tmp_path / "hf")]):
        main(["generate", "the", *source, *options])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("the")


@pytest.mark.slow
def test_fp8_is_served_as_fp8(run_directory, tmp_path, capsys):
    """From a folder and from a run directory the text is that of the weights multiplied out."""
    hf, run = str(tmp_path / "hf"), str(tmp_path / "run")
    main(["convert", str(run_directory), hf, "--dtype", "fp8"])
    main(["convert", hf, run, "--dtype", "fp8"])
    capsys.readouterr()
    options = ["--max-new-tokens", "4", "--temperature", "0", "--compute", "float32"]
    kept = ["--weights", "fp8"]
    texts = []
    for source in (["--hf", hf], ["--hf", hf, *kept], ["--run", run, *kept]):
        main(["generate", "the", *source, *options])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    figures = []
    for more in ([], kept):
        out = tmp_path / f"{len(more)}.json"
        words = ["--text", str(run_directory / "run.json"), "--seq-len", "32", "--out", str(out)]
        main(["eval", "--hf", hf, "--compute", "float32", *words, *more])
        figures.append(json.loads(out.read_text()))
    assert figures[0] == pytest.approx(figures[1])
    for words, said in (
        (["--run", str(run_directory), *kept], "holds no FP8 weights to keep"),
        (["--run", run], "has its weights in FP8"),
    ):
        with pytest.raises(SystemExit):
            main(["generate", "the", *words, *options])
        assert said in " ".join(capsys.readouterr().err.split())


def test_a_task_of_the_harness_from_the_command_line(run_directory, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    rows = [{"question": "the", "choices": [" a", " b"], "answer": i % 2} for i in range(4)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "ours.yaml").write_text(
        "task: ours\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        f"{data}\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text: question\n"
        "doc_to_choice: choices\ndoc_to_target: answer\nmetric_list:\n  - metric: acc\n"
    )
    words = ["harness", "--run", str(run_directory), "--compute", "float32", "--include"]
    words += [str(folder), "--out", str(tmp_path / "out.json"), "--tasks"]
    main([*words, "ours"])
    assert json.loads((tmp_path / "out.json").read_text())["results"]["ours"]["acc,none"] == 0.5
    assert "ours" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*words[:-3], "--tasks", "nothing_of_the_kind"])
    assert "knows no task nothing_of_the_kind" in capsys.readouterr().err


def test_a_file_of_prompts_and_conversations(run_directory, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "the", "id": 7},
        {"messages": [{"role": "user", "content": "a"}], "answer": "b"},
        {"prompt": "a longer one of them"},
    ]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["generate", "--run", str(run_directory), "--prompts", str(prompts), "--samples", "2"]
    words += ["--max-new-tokens", "3", "--compute", "float32", "--slots", "4", "--out"]
    main([*words, str(tmp_path / "a.jsonl")])
    main([*words, str(tmp_path / "b.jsonl"), "--mesh", "data=4,fsdp=2"])
    found = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["sample"] for line in found] == [0, 1] * 3
    assert [{k: line[k] for k in lines[i // 2]} for i, line in enumerate(found)] == [
        lines[i // 2] for i in range(6)
    ]
    assert all(line["num_tokens"] <= 3 for line in found)
    elsewhere = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert [line["completion"] for line in found] == [line["completion"] for line in elsewhere]
    # What is written is conversations, for fine-tuning.
    assert len([parse_record(line) for line in found]) == 6
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(SystemExit):
        main([*words, str(tmp_path / "a.jsonl")])
    assert "exists; choose another --out" in capsys.readouterr().err
    prompts.write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    with pytest.raises(SystemExit):
        main([*words, str(tmp_path / "c.jsonl")])
    assert "prompts.jsonl, line 2: has neither a text" in capsys.readouterr().err
    assert not (tmp_path / "c.jsonl").exists()


def test_bytes_that_are_no_text(run_directory, capsys, monkeypatch):
    words = ["generate", "--run", str(run_directory), "--compute", "float32"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"na\xefve")))
    for prompt, said in (("-", "standard input is not UTF-8 at byte 2"), ("\udcef", "is not Unic")):
        with pytest.raises(SystemExit):
            main([*words, prompt])
        assert said in capsys.readouterr().err

    def ask(_):
        monkeypatch.setattr("builtins.input", lambda _: "/exit")
        raise UnicodeDecodeError("utf-8", b"\xef", 0, 1, "invalid")

    monkeypatch.setattr("builtins.input", ask)
    chat(ChatConfig(run=run_directory, compute="float32"), lambda prompt: input(prompt))
    assert "that is not UTF-8; say it again" in capsys.readouterr().out


def test_chat_keeps_history_and_survives_an_interruption(run_directory, capsys, monkeypatch):
    said = iter(["hello", "/reset", "", "a b " * 9000, "again", "/exit"])
    asked = []

    def ask(_):
        asked.append(next(said))
        return asked[-1]

    config = ChatConfig(run=run_directory, compute="float32", sampling=Sampling(3), slots=1)
    chat(config, ask)
    out = capsys.readouterr().out
    assert asked[-1] == "/exit"
    assert "a new conversation" in out
    assert "/reset begins anew" in out  # the prompt that is too long
    original = Engine.generate

    def interrupted(self, *args):
        for _ in original(self, *args):
            raise KeyboardInterrupt
        yield

    monkeypatch.setattr(Engine, "generate", interrupted)
    said = iter(["hello", "/exit"])
    chat(config, ask)
    assert "[stopped]" in capsys.readouterr().out


def test_eval_of_tasks_and_of_text(run_directory, folder, tmp_path, capsys):
    words = ["eval", "--run", str(run_directory), "--compute", "float32", "--max-new-tokens", "4"]
    out = tmp_path / "scores.json"
    main([*words, "--tasks", "add:1", "--limit", "3", "--samples", "2", "--out", str(out)])
    scores = json.loads(out.read_text())
    assert scores["pass@1"] == scores["pass@2"] == scores["maj@2"] == 0
    assert scores["truncated"] > 0
    assert len(out.with_suffix(".jsonl").read_text().splitlines()) == 6
    main([*words, "--text", str(folder.source), "--seq-len", "32"])
    assert "bits_per_byte" in capsys.readouterr().out


def test_eval_asks_what_grpo_holds_out(tmp_path):
    """By the same split, whatever the seed; none of it is what GRPO or rejection sampling ask."""
    for seed in (0, 1):
        of_grpo = split(open_tasks("add:2", size=10_000, seed=seed), 0.05)
        config = EvalConfig(
            run=tmp_path, tasks="add:2", limit=50, task_seed=seed, held_out_fraction=0.05
        )
        asked = asked_tasks(config)
        assert asked == of_grpo.held_out[:50]
        assert not {task.prompt for task in asked} & {task.prompt for task in of_grpo.train}
    every = EvalConfig(run=tmp_path, tasks="add:2", limit=50, task_seed=1)
    assert asked_tasks(every) == open_tasks("add:2", size=50, seed=1)


def test_generate_refuses_before_it_prints_the_prompt(run_directory, capsys):
    words = ["generate", "the the the the", "--run", str(run_directory), "--compute", "float32"]
    with pytest.raises(SystemExit) as end:
        main([*words, "--max-length", "1"])
    stdout, stderr = capsys.readouterr()
    assert end.value.code == 2
    assert not stdout
    assert "leaves no room in max_length=1" in stderr


@pytest.mark.parametrize("stage", ["pretrain", "generate"])
def test_a_platform_that_is_not_there(stage, folder, run_directory):
    """In another process, as JAX looks for its devices once."""
    words = ["x", "--run", str(run_directory)]
    if stage == "pretrain":
        words = runs.options(folder.root / "new", folder.source, folder.model)
    ended = subprocess.run(
        [sys.executable, "-m", "deepseek_jax.cli", stage, *words],
        env=os.environ | {"JAX_PLATFORMS": "nowhere"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 2
    assert not ended.stdout
    assert ended.stderr.startswith("deepseek-jax: JAX can use no device of JAX_PLATFORMS=nowhere (")
    assert ended.stderr.endswith("or set JAX_PLATFORMS=cpu.\n")
    assert ended.stderr.count("\n") == 1


def test_convert_needs_no_accelerator(run_directory, tmp_path):
    words = ["convert", str(run_directory), str(tmp_path / "hf")]
    ended = subprocess.run(
        [sys.executable, "-m", "deepseek_jax.cli", *words],
        env=os.environ | {"JAX_PLATFORMS": "nowhere"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "hf" / "config.json").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["convert"], "SOURCE and TARGET"),
        (["convert", "--check", "nowhere"], "nowhere is not a directory"),
        (["convert", "--check", "run"], "make a folder of it: `deepseek-jax convert run FOLDER`"),
        (["convert", "a", "b", "--check", "nowhere"], "--check DIR converts nothing; leave out"),
        (["convert", "--check", "nowhere", "--dtype", "fp8"], "--check DIR converts nothing"),
        (["convert", "--check", "x", "--shard-size", "9"], "--check DIR converts nothing"),
        (["convert", "run", "there", "--scale-fmt", "ue8m0"], "; add --dtype fp8"),
        (["convert", "folder", "there", "--shard-size", "9"], "--shard-size are for a"),
        (["convert", "folder", "there", "--scale-fmt", "ue8m0"], "there becomes a run directory"),
        (["convert", "nowhere", "there"], "nowhere is not a directory"),
        (["convert", "nowhere", "there", "--workers", "0"], "must be at least 1"),
        (["generate", "x"], "--hf DIR or --run DIR"),
        (["generate", "--run", "nowhere"], "a prompt or --prompts FILE"),
        (["generate", "--run", "nowhere", "--prompts", "a.jsonl"], "go together"),
        (["generate", "x", "--run", "nowhere", "--samples", "0"], "samples=0 must be at least 1"),
        (
            ["generate", "--run", "nowhere", "--prompts", "a.jsonl", "--out", "file/b.jsonl"],
            "cannot write file/b.jsonl into ",
        ),
        (["eval", "--run", "nowhere", "--tasks", "add:1", "--samples", "0"], "samples=0 must be"),
        (["eval", "--run", "nowhere", "--tasks", "add:1", "--limit", "0"], "limit=0 must be at"),
        (["eval", "--run", "nowhere", "--tasks", "add:1", "--out", "x.jsonl"], "in .json"),
        (["eval", "--run", "nowhere", "--tasks", "add:1", "--out", "there.json"], "jsonl exists;"),
        (["chat", "--run", "nowhere"], "holds no run"),
        (["rejection-sample", "--run", "nowhere"], "takes --tasks and --out FILE"),
        (["rejection-sample", "--hf", "x", "--tasks", "add:1", "--out", "y"], "x is not a"),
        (["reward-model", "--init", "x"], "--data FILE"),
        (["reward-model", "--out", "y", "--resume"], "holds no run (no run.json)"),
        (["reward-model", "--init", "x", "--data", "nowhere", "--out", "y"], "cannot read nowhere"),
        (["eval", "--run", "nowhere"], "--tasks or --text"),
        (
            ["eval", "--run", "nowhere", "--text", "a", "--held-out-fraction", "0.1"],
            "--held-out-fraction divides tasks",
        ),
        (
            ["eval", "--run", "nowhere", "--tasks", "add:1", "--held-out-fraction", "1"],
            "`held_out_fraction` is a share between 0 and 1",
        ),
        (["eval", "--run", "nowhere", "--tasks", "add:2"], "holds no run"),
        (["generate", "x", "--run", "folder"], "a Hugging Face folder is given as --hf"),
        (["generate", "x", "--hf", "run"], "run is a run and not a Hugging Face folder; give it"),
        (["generate", "x", "--hf", "y", "--max-length", "0"], "max_length=0 must be at least 1"),
        (["generate", "x", "--run", "nowhere"], "holds no run"),
        (["generate", "x", "--hf", "nowhere"], "nowhere is not a directory"),
    ],
)
def test_convert_and_generate_refuse_in_one_sentence(words, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("folder/config.json", "run/run.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    (tmp_path / "file").touch()
    (tmp_path / "there.jsonl").touch()
    with pytest.raises(SystemExit) as end:
        main(words)
    stderr = capsys.readouterr().err
    assert end.value.code == 2
    assert named in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "there").exists()
