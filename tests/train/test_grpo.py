"""GRPO end to end on a policy of random weights: what must be equal is equal."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import UserError, sharding
from deepseek_jax.cli import main
from deepseek_jax.config import FLOAT32
from deepseek_jax.generate import Sampling
from deepseek_jax.model.transformer import DeepSeekV3, init_params, init_router_bias
from deepseek_jax.train.grpo import grpo
from deepseek_jax.train.logprobs import policy_output
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.objective import ObjectiveConfig
from deepseek_jax.train.optim import OptimConfig
from deepseek_jax.train.reward_model import RewardModelConfig, train_reward_model
from deepseek_jax.train.reward_terms import RewardConfig
from deepseek_jax.types import Batch
from tests.train import policies
from tests.train.policies import PARITY, SAME, config, rollout
from tests.train.runs import MODEL, leaves

CLOCK = ("generate_s", "train_s", "generate_tokens_per_s", "train_tokens_per_s")
NO_KL = ObjectiveConfig(kl_coef=0.0)


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    return policies.write_policy(tmp_path_factory.mktemp("policy") / "init")


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A policy with little context."""
    small = MODEL.replace(max_position_embeddings=64)
    return policies.write_policy(tmp_path_factory.mktemp("short") / "init", small)


@pytest.fixture(autouse=True, scope="module")
def _small():
    """``data=1`` leaves seven of the eight devices alone; a step is compiled in a hurry."""
    make = sharding.make_mesh

    def make_mesh(text):
        return make(text, jax.devices()[:1] if text == "data=1" else None)

    def jit_step(step, state, model):
        where = jax.tree.map(lambda x: x.sharding, state)
        return jax.jit(step, donate_argnums=0, out_shardings=(where, where.step))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", make_mesh)
        patch.setattr("deepseek_jax.train.grpo.jit_step", jit_step)
        yield


def steps(count, **changes):
    return LoopConfig(**{"steps": count, "batch_size": 16, "eval_every": 0} | changes)


def metrics(out):
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def said(out):
    return [json.loads(row) for row in (out / "completions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(init, tmp_path_factory):
    """Four steps, two minibatches each, with a reference that is refreshed after the third."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert grpo(long_run(out, init), [PARITY]) is not None
    return out


def long_run(out, init):
    loop = steps(4, batch_size=8, micro_batch=4, save_every=2)
    return config(out, init, loop=loop, refresh_every=3, objective=ObjectiveConfig(kl_coef=0.1))


def test_killed_and_resumed_is_uninterrupted(init, whole, tmp_path):
    """From step 2: state, reference and all; the same questions get the same answers."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints/4")  # as if killed in step 4, all but its checkpoint written
    grpo(dataclasses.replace(long_run(out, init), resume=True), [PARITY])
    a, b = leaves(whole, 4), leaves(out, 4)
    assert any("reference" in name for name in a)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].tobytes() == b[name].tobytes(), name
    assert said(out) == said(whole)
    assert metrics(out) == metrics(whole)


def test_reference_is_refreshed_every_so_many_steps(whole):
    before, after = leaves(whole, 2), leaves(whole, 4)
    kl = [row["kl"] for row in metrics(whole) if "kl" in row]
    reference = next(name for name in before if name.endswith("reference/embed"))
    assert not np.array_equal(before[reference], after[reference])
    assert not np.array_equal(after[reference], after["model/params/embed"])  # of step 3
    assert kl[2] > kl[1] > 0  # over two minibatches, of which the first of all has none
    assert kl[3] < kl[2]


def test_what_is_logged(whole):
    rows = [row for row in metrics(whole) if "loss" in row]
    lines = said(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert len(lines) == 4 * 16
    for row in rows:
        own = [line for line in lines if line["step"] == row["step"]]
        assert row["reward"] == row["reward/accuracy"] == np.mean([x["reward"] for x in own])
        assert row["completion_tokens"] == np.mean([x["tokens"] for x in own])
        # Every minibatch is compared with the policy of the rollout, which is what sampled.
        assert row["sampler_ratio"] == pytest.approx(1, abs=1e-4)
        assert row["sampler_mismatch"] < 1e-5
        assert row["ratio"] != 1
    held_out = [row for row in metrics(whole) if "eval_greedy" in row]
    assert [row["step"] for row in held_out] == [0, 4]
    assert (whole / "rewards.png").exists()


def test_equal_rewards_change_nothing(init, tmp_path):
    """And with its experts and its cuts, the trainer's probabilities are the sampler's too."""
    cut = Sampling(6, temperature=1.0, top_p=0.9, top_k=40)
    out, how = tmp_path / "run", rollout(keep_routing=True, keep_sampling_mask=True, sampling=cut)
    result = grpo(config(out, init, loop=steps(1), objective=NO_KL, rollout=how), [SAME])
    before, after = leaves(init, 1), jax.device_get(result.state.params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(after):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert leaf.tobytes() == before[f"model/params/{name}"].tobytes()
    assert not any("reference" in name for name in leaves(out, 1))  # beta = 0: none is held
    row = metrics(out)[1]
    assert row["loss"] == row["grad_norm"] == 0
    assert row["groups_without_spread"] == 1
    assert row["ratio"] == pytest.approx(1, abs=1e-6)
    assert row["sampler_ratio"] == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_expert_parallel_rollouts_and_updates_are_those_of_one_device(init, tmp_path):
    for mesh in ("data=1", "data=2,expert=4"):
        loop = steps(2, batch_size=16, micro_batch=8)
        changes = {"loop": loop, "mesh": mesh, "rollout": rollout(keep_routing=True)}
        grpo(config(tmp_path / mesh, init, **changes), [PARITY])
    one, many = tmp_path / "data=1", tmp_path / "data=2,expert=4"
    assert said(one) == said(many)
    for a, b in zip(metrics(one), metrics(many), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=2e-6), name


def test_kept_routing_is_repeated_whatever_the_router_would_choose():
    """Other biases choose other experts; with the choices of the first they change nothing."""
    model = DeepSeekV3(MODEL, FLOAT32)
    params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 266, (2, 9)).astype(np.int32)
    ones = np.ones((2, 8), np.int32)
    positions = np.broadcast_to(np.arange(8, dtype=np.int32), (2, 8))
    arrays = tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), positions, ones
    batch = Batch(*map(jnp.asarray, arrays))
    bias = init_router_bias(MODEL)
    other = bias + rng.standard_normal(bias.shape).astype(np.float32)

    @jax.jit
    def logp(bias, experts):
        return policy_output(model, params, bias, batch, experts_BTLK=experts).logp_BT

    experts = np.full((2, 8, 1, 2), -1, np.int32)
    own, elsewhere = logp(bias, experts), logp(other, experts)
    assert jnp.abs(own - elsewhere).max() > 1e-4
    chosen = np.broadcast_to(np.array([5, 2], np.int32), experts.shape)
    np.testing.assert_array_equal(logp(bias, chosen), logp(other, chosen))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tasks": ""}, "name the questions with --tasks"),
        ({"loop": LoopConfig(batch_size=5)}, "16 completions, which batch_size=5 does not divide"),
        ({"epochs": 0}, "must be at least 1"),
        ({"tasks": "add:x"}, "needs a number of digits"),
        ({"prompt_style": "r1_zero"}, "exceed the model's context of 64; lower max_new_tokens"),
        ({"init": None}, "starts from a policy: name a run or a folder with --init"),
        ({"rewards": RewardConfig(language="xx")}, "language 'xx' is not one of"),
        ({"rewards": RewardConfig(overlong_buffer=9)}, "must lie between 1 and max_tokens=6"),
        ({"general_share": 1.0}, "general_share=1.0 must lie between 0 and 1"),
        ({"rewards": RewardConfig(reward_model=Path("nowhere"))}, "nowhere holds no run"),
    ],
)
def test_bad_input_ends_in_a_sentence(short, tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        grpo(config(tmp_path / "run", **{"init": short} | changes))
    assert not (tmp_path / "run").exists()


def test_general_prompts_and_a_reward_model_go_together(short, tmp_path):
    general = tmp_path / "general.jsonl"
    general.write_text('{"prompt": "Greet Ada."}\n')
    with pytest.raises(UserError, match="--general PROMPTS and --reward-model RUN go together"):
        grpo(config(tmp_path / "run", short, general=general))


@pytest.mark.slow
def test_general_prompts_are_judged_by_a_reward_model_and_resumed(init, tmp_path):
    general, pairs = tmp_path / "general.jsonl", tmp_path / "pairs.jsonl"
    general.write_text("".join(f'{{"prompt": "Greet {name}."}}\n' for name in "ABC"))
    pairs.write_text('{"prompt": "Greet A.", "chosen": "hi", "rejected": "?"}\n' * 8)
    judge = RewardModelConfig(
        init=init, data=pairs, out=tmp_path / "judge", seq_len=48, batch_size=4, mesh="data=1",
        precision=FLOAT32, optim=OptimConfig(peak_lr=1e-3),
    )  # fmt: skip
    train_reward_model(judge)
    changes = {
        "general": general,
        "rewards": RewardConfig(reward_model=judge.out),
        "objective": NO_KL,
    }
    grpo(config(tmp_path / "whole", init, **changes))
    grpo(config(tmp_path / "cut", init, loop=steps(2, batch_size=16), **changes))
    grpo(config(tmp_path / "cut", init, resume=True, **changes))
    assert said(tmp_path / "whole") == said(tmp_path / "cut")
    lines = [row for row in metrics(tmp_path / "whole") if "loss" in row]
    assert len(lines) == 4
    for line in lines:
        assert 0 < line["reward/preference"] < 1
        # Random weights get no sum right; half of what is asked has a right answer.
        assert line["reward"] == pytest.approx(line["reward/preference"] / 2)
    rows = said(tmp_path / "whole")
    assert {tuple(row["rewards"]) for row in rows if row["prompt"].startswith("Greet")} == {
        ("format", "preference")
    }
    assert {tuple(row["rewards"]) for row in rows if row["prompt"].endswith("=")} == {
        ("accuracy", "format")
    }


def test_rollouts_that_cannot_be_learnt_from_are_refused():
    with pytest.raises(UserError, match="sample with top_k above 0 beside top_p"):
        rollout(keep_sampling_mask=True, sampling=Sampling(6, temperature=1.0, top_p=0.9))
    with pytest.raises(UserError, match="temperature=0"):
        rollout(sampling=Sampling(6, temperature=0.0))
    with pytest.raises(UserError, match="group_size=1 must be at least 2"):
        rollout(group_size=1)


@pytest.mark.slow
def test_command_line(init, tmp_path, capsys):
    words = (
        f"grpo --init {init} --out {tmp_path / 'run'} --tasks add:1 --num-tasks 60 --compute "
        "float32 --held-out-fraction 0.2 --prompt-style plain --prompts 8 --group-size 4 "
        "--max-new-tokens 6 --batch-size 32 --brevity-weight 1 --eval-tasks 4 --save-every 1"
    )
    main([*words.split(), "--steps", "1"])
    main(["grpo", "--out", str(tmp_path / "run"), "--resume", "--steps", "2"])
    assert "resuming at step 1" in capsys.readouterr().out
    assert [row["step"] for row in metrics(tmp_path / "run") if "loss" in row] == [1, 2]
    with pytest.raises(SystemExit):
        main(["grpo", "--init", str(init)])
    assert "name the questions with --tasks" in capsys.readouterr().err
