"""The learned reward: losses by hand, and training from a policy's checkpoint to scores."""

import json
import math
import random
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import DeepSeekV3, sharding
from deepseek_jax.checkpoint import Checkpointer, claim_run_directory, load_params
from deepseek_jax.cli import main
from deepseek_jax.config import FLOAT32
from deepseek_jax.data.tokenizer import train_bpe
from deepseek_jax.model.transformer import abstract_params
from deepseek_jax.rewards import Completion, RewardSum, Sample, Term
from deepseek_jax.train import optim, reward_model
from deepseek_jax.train.learned_reward import LearnedReward
from deepseek_jax.train.loop import divide_batch
from deepseek_jax.train.reward_model import (
    HEAD,
    RewardModelConfig,
    bce_loss,
    make_loss,
    make_model,
    make_rows,
    mse_loss,
    pairwise_loss,
    read_examples,
    train_reward_model,
)
from deepseek_jax.train.run import identity
from deepseek_jax.train.step import init_state, make_train_step, state_shardings
from deepseek_jax.types import UserError
from tests.configs import MICRO
from tests.train.runs import MODEL, leaves, lines, saved_steps

OPTIM = optim.OptimConfig(peak_lr=3e-3, warmup_steps=2)


def test_losses_by_hand():
    scores, shares = [0.3, -1.2, 4.0, 5.0], [1.0, 0.0, 0.5, 0.25]
    sigmoid = [1 / (1 + math.exp(-s)) for s in scores]
    pairs = [-math.log(1 / (1 + math.exp(-(a - b)))) for a, b in ((0.3, -1.2), (4.0, 5.0))]
    bce = [
        -(t * math.log(p) + (1 - t) * math.log(1 - p)) for p, t in zip(sigmoid, shares, strict=True)
    ]
    mse = [(s - t) ** 2 for s, t in zip(scores, shares, strict=True)]
    s, t = jnp.asarray(scores), jnp.asarray(shares)
    np.testing.assert_allclose(pairwise_loss(s), pairs, rtol=1e-5)
    np.testing.assert_allclose(bce_loss(s, t), bce, rtol=1e-4)
    np.testing.assert_allclose(mse_loss(s, t), mse, rtol=1e-5)
    extreme = jnp.asarray([1e4, -1e4])
    assert np.isfinite(pairwise_loss(extreme)).all()
    assert np.isfinite(bce_loss(extreme, jnp.asarray([0.0, 1.0]))).all()


def test_rows_mark_the_last_token():
    batch = make_rows([[5, 6, 7], [8]], [1, 0], 4)
    assert batch.tokens_BT.tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
    assert batch.loss_weights_BT.tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
    assert batch.targets_BT.tolist() == [[0, 0, 1, 0], [0, 0, 0, 0]]
    assert batch.segment_ids_BT.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]


# --- from checkpoint to checkpoint ------------------------------------------------------------

SEQ = 32


def conversation(rng, good):
    return f"{rng.choice('abcd')} {'yes' if good else 'no'} {rng.choice('efgh')}"


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """The run directory of a policy that has learned nothing, MTP module and all."""
    out = tmp_path_factory.mktemp("policy") / "run"
    claim_run_directory(out, {"stage": "pretrain", "model": MODEL.to_hf()}, resume=False)
    train_bpe(["yes no a b c d e f g h"], 266).save(out / "tokenizer.json")
    model, tx = DeepSeekV3(MODEL, FLOAT32), optim.make_optimizer(OPTIM, 10)
    state = jax.jit(lambda: init_state(model, tx, jax.random.key(0)))()
    with Checkpointer(out) as saver:
        saver.save(1, state, data_state={}, rng=jax.random.key(0))
    return out


def write_examples(path, kind, count=256):
    rng = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            record = {"prompt": "Well? "}
            if kind == "pairwise":
                record |= {"chosen": conversation(rng, True), "rejected": conversation(rng, False)}
            else:
                good = rng.random() < 0.5
                record |= {"response": conversation(rng, good), "grade": int(good)}
            file.write(json.dumps(record) + "\n")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pairwise", "bce", "mse"])
def test_it_learns_a_preference_and_is_a_reward(policy, tmp_path, kind):
    data = write_examples(tmp_path / "data.jsonl", kind)
    out = tmp_path / "reward"
    config = RewardModelConfig(
        init=policy, data=data, out=out, kind=kind, seq_len=SEQ, batch_size=16, epochs=3,
        mesh="data=4,fsdp=2", precision=FLOAT32, optim=OPTIM,
    )  # fmt: skip
    train_reward_model(config)
    made = lines(out)
    first = {"pairwise": math.log(2), "bce": math.log(2), "mse": 0.5}[kind]
    assert made[0]["loss"] == pytest.approx(first, abs=0.2)  # a head of zeros prefers nothing
    assert made[-1]["accuracy"] > 0.95

    reward = LearnedReward(out, seq_len=SEQ, rows=8, precision=FLOAT32, squash=kind != "mse")
    rng = random.Random(1)
    samples = [
        Sample("Well? ", Completion(conversation(rng, good), 9), "") for good in (True, False) * 10
    ]
    report = RewardSum([Term("learned", 1.0, reward)])(samples)
    good, bad = report.total_B[::2], report.total_B[1::2]
    assert good.min() > bad.max()
    if kind != "mse":
        assert 0 <= bad.min() <= good.max() <= 1
    # As long as it was trained on, and without the thinking, if that is asked for.
    summaries = LearnedReward(out, precision=FLOAT32, squash=kind != "mse", summary=True)
    thought = Completion(f"<think>no no</think>{samples[0].completion.text}", 9)
    unended = Completion("<think>yes yes", 9)
    kept, lost = summaries.score([Sample("Well? ", thought, ""), Sample("Well? ", unended, "")])
    assert kept == pytest.approx(report.total_B[0], abs=1e-5)
    assert math.isnan(lost)
    # The same whatever is scored beside it; nothing where it does not fit.
    alone = reward.score(samples[3:4])[0]
    assert alone == pytest.approx(report.total_B[3], abs=1e-5)
    long = Sample("Well? ", Completion("yes " * 100, 9), "")
    mixed = reward.score([long, samples[3]])
    assert math.isnan(mixed[0])
    assert mixed[1] == pytest.approx(alone, abs=1e-5)


def short(policy, tmp_path, name):
    """A run of 8 steps, whose third epoch begins within a batch."""
    data = tmp_path / "data.jsonl"
    return RewardModelConfig(
        init=policy, data=data, out=tmp_path / name, seq_len=SEQ, batch_size=8, epochs=3,
        save_every=3, mesh="data=4,fsdp=2", precision=FLOAT32, optim=OPTIM,
    )  # fmt: skip


@pytest.mark.slow
def test_stopped_and_resumed_is_uninterrupted(policy, tmp_path, monkeypatch, capsys):
    write_examples(tmp_path / "data.jsonl", "pairwise", count=22)
    whole, cut = (short(policy, tmp_path, name) for name in ("whole", "cut"))
    assert train_reward_model(whole) is not None
    assert saved_steps(whole.out) == [3, 6, 8]
    assert (whole.out / "loss.png").exists()
    batches = iter(range(100))

    def rows(*args):
        if next(batches) == 5:  # made while step 5 is computed
            signal.raise_signal(signal.SIGTERM)
        return make_rows(*args)

    with monkeypatch.context() as patch:
        patch.setattr(reward_model, "make_rows", rows)
        assert train_reward_model(cut) is None
    assert "stopped and saved at step 5; continue with --resume." in capsys.readouterr().out
    assert saved_steps(cut.out) == [3, 5]
    assert lines(cut.out) == lines(whole.out)[:5]
    main(["reward-model", "--out", str(cut.out), "--resume"])
    assert lines(cut.out) == lines(whole.out)
    a, b = leaves(whole.out, 8), leaves(cut.out, 8)
    assert a.keys() == b.keys()
    assert all(a[name].tobytes() == b[name].tobytes() for name in a)
    host = "checkpoints/8/host/metadata"  # the place in the data among others
    assert (cut.out / host).read_text() == (whole.out / host).read_text()

    write_examples(tmp_path / "data.jsonl", "pairwise", count=23)
    with pytest.raises(SystemExit):
        main(["reward-model", "--out", str(cut.out), "--resume"])
    assert "the data are not those the checkpoint was written with" in capsys.readouterr().err


def test_a_resume_with_another_setting_is_refused(policy, tmp_path, capsys):
    write_examples(tmp_path / "data.jsonl", "pairwise", count=22)
    config = short(policy, tmp_path, "run")
    model = make_model(MODEL, FLOAT32).config
    claim_run_directory(config.out, identity(config, model), resume=False)
    (config.out / "tokenizer.json").write_bytes((policy / "tokenizer.json").read_bytes())
    with pytest.raises(SystemExit) as end:
        main(["reward-model", "--out", str(config.out), "--resume", "--batch-size", "4"])
    assert end.value.code == 2
    assert "was started with batch_size = 8, this resume asks for 4" in capsys.readouterr().err
    with pytest.raises(UserError, match="already holds a run; continue it with --resume"):
        train_reward_model(config)


def test_the_default_rate_is_r1s_constant_one():
    default = RewardModelConfig().optim
    rate = optim.learning_rate(default, 200)
    assert [float(rate(step)) for step in range(200)] == pytest.approx([6e-6] * 200)
    assert default.bias_speed == 0


def test_what_is_no_reward_model_is_refused(policy, tmp_path):
    with pytest.raises(UserError, match="pretrain"):
        LearnedReward(policy)
    with pytest.raises(UserError):
        LearnedReward(tmp_path)


def test_conversations_that_do_not_fit_are_named(policy, tmp_path):
    data = write_examples(tmp_path / "data.jsonl", "pairwise")
    config = RewardModelConfig(
        init=policy, data=data, out=tmp_path / "out", seq_len=8, batch_size=16, precision=FLOAT32
    )
    with pytest.raises(UserError, match="seq_len"):
        train_reward_model(config)
    assert not config.out.exists()  # so that the same command goes on once it is mended
    few = RewardModelConfig(init=policy, data=data, out=tmp_path / "out", batch_size=512)
    with pytest.raises(UserError, match="lower batch_size"):
        train_reward_model(few)


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("pairwise", '{"prompt": "p", "chosen": "a"}'),
        ("pairwise", '{"prompt": "p", "chosen": "a", "rejected": 3}'),
        ("pairwise", "{"),
        ("pairwise", "[]"),
        ("bce", '{"prompt": "p", "response": "a"}'),
        ("bce", '{"prompt": "p", "response": "a", "grade": 2}'),
        ("mse", '{"prompt": "p", "response": "a", "grade": 0.5}'),
        ("mse", '{"prompt": "p", "response": "a", "grade": true}'),
    ],
)
def test_bad_lines_are_named(tmp_path, kind, line):
    good = {
        "pairwise": '{"prompt": "p", "chosen": "a", "rejected": "b"}',
        "bce": '{"prompt": "p", "response": "a", "grade": 1}',
    }
    path = tmp_path / "data.jsonl"
    path.write_text(f"{good.get(kind, good['bce'])}\n\n{line}\n")
    with pytest.raises(UserError, match="line 3"):
        read_examples(path, kind)


CONFIG = MICRO.replace(vocab_size=64, num_hidden_layers=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pairwise", "bce"])
def test_eight_devices_and_micro_batches_equal_one(kind):
    model = make_model(CONFIG, FLOAT32)
    tx = optim.make_optimizer(optim.OptimConfig(peak_lr=1e-2, eps=1e-2, warmup_steps=0), 100)
    step = make_train_step(model, tx, make_loss(model, kind), lambda step: 0.01)
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, CONFIG.vocab_size, n).tolist() for n in rng.integers(2, 13, 16)]
    grades = rng.integers(0, 2, 16).tolist()

    def run(mesh_text, pieces):
        devices = jax.devices()[:1] if mesh_text == "data=1" else jax.devices()
        mesh = sharding.make_mesh(mesh_text, devices)
        where = state_shardings(model, tx, mesh)
        size = 16 // pieces
        parts = [
            make_rows(rows[i : i + size], grades[i : i + size], 12) for i in range(0, 16, size)
        ]
        with jax.set_mesh(mesh):
            init = jax.jit(lambda: init_state(model, tx, jax.random.key(0)), out_shardings=where)
            compiled = jax.jit(step, out_shardings=(where, None))
            batch = divide_batch(size, 12, mesh).place(parts)
            state, metrics = compiled(init(), batch, np.float32(np.inf))
        return jax.device_get((state.params, metrics["loss"], metrics["accuracy"]))

    one = run("data=1", 1)
    for other in (run("data=1", 2), run("fsdp=2,expert=2,tensor=2", 1)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-4, atol=5e-5), one, other
        )


def test_the_head_is_the_only_new_parameter(policy):
    params, _, _ = load_params(policy)
    assert HEAD not in params
    model = make_model(MODEL, FLOAT32)
    abstract = abstract_params(model)
    assert abstract[HEAD].shape == (MODEL.hidden_size, 1)
    assert set(abstract) == {HEAD} | {name for name in params if not name.startswith("mtp")}
