"""The training step: accumulation, skipping, and eight devices against one."""

import functools
import re
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import profile_parts
from deepseek_jax import Batch, DeepSeekV3, sharding
from deepseek_jax.config import FLOAT32, Precision
from deepseek_jax.train import optim
from deepseek_jax.train.loop import compiler_options, divide_batch
from deepseek_jax.train.losses import pretrain_loss
from deepseek_jax.train.step import (
    init_state,
    load_violation,
    make_train_step,
    state_shardings,
)
from tests.configs import MICRO

CONFIG = MICRO.replace(num_nextn_predict_layers=1)
MODEL = DeepSeekV3(CONFIG, FLOAT32)
# Adam divides by the size of the gradient, so with its usual eps the rounding of a tiny gradient
# becomes a step as long as any, and may move a token over a tie to another expert.
TX = optim.make_optimizer(optim.OptimConfig(peak_lr=1e-2, eps=1e-2, warmup_steps=0), 100)


def loss_fn(params, bias, batch, totals, step):
    return pretrain_loss(MODEL, params, bias, batch, totals, 0.3)


STEP = make_train_step(MODEL, TX, loss_fn, lambda step: 0.01)


def rows(seed, count=8, T=12):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CONFIG.vocab_size, (count, T + 1)).astype(np.int32)
    ones = np.ones((count, T), np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (count, T))
    return Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), positions, ones)


@functools.cache
def compiled(mesh_text="data=1"):
    devices = jax.devices() if mesh_text != "data=1" else jax.devices()[:1]
    mesh = sharding.make_mesh(mesh_text, devices)
    where = state_shardings(MODEL, TX, mesh)
    init = jax.jit(functools.partial(init_state, MODEL, TX), out_shardings=where)
    return mesh, init, jax.jit(STEP, out_shardings=(where, None))


def run(mesh_text="data=1", steps=3, pieces=1):
    mesh, init, step = compiled(mesh_text)
    with jax.set_mesh(mesh):
        state, history = init(jax.random.key(0)), []
        for seed in range(steps):
            parts = [Batch(*(x[i::pieces] for x in rows(seed))) for i in range(pieces)]
            state, metrics = step(
                state,
                divide_batch(*parts[0].tokens_BT.shape, mesh).place(parts),
                np.float32(np.inf),
            )
            history.append(jax.device_get(metrics))
    return state, history


def assert_same(a, b, rtol=2e-4, atol=2e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=rtol, atol=atol),
        jax.device_get(a), jax.device_get(b),
    )  # fmt: skip


def test_the_step_learns_and_reports():
    state, history = run(steps=12)
    assert history[-1]["loss"] < history[0]["loss"]
    assert int(state.step) == 12
    first = history[0]
    assert first["load_LE"].shape == (CONFIG.num_routers, CONFIG.n_routed_experts)
    # Every token of the main layers, and of the MTP module, chose its K experts.
    assert (first["load_LE"].sum(-1) == 8 * 12 * CONFIG.num_experts_per_tok).all()
    assert first["load_violation_max"] == pytest.approx(
        float(load_violation(first["load_LE"]).max())
    )
    assert first["skipped"] == 0


@pytest.mark.parametrize("pieces", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_accumulation_equals_one_large_batch(pieces):
    whole, history = run()
    split, split_history = run(pieces=pieces)
    assert_same(whole.params, split.params)
    np.testing.assert_array_equal(whole.router_bias_LE, split.router_bias_LE)
    assert_same([h["loss"] for h in history], [h["loss"] for h in split_history])


@pytest.mark.slow
def test_optimizer_moments_live_where_their_parameters_do():
    state, _ = run("fsdp=8", steps=1)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    params = jax.tree.leaves(state.params)
    assert [m.sharding for m in moments] == [p.sharding for p in params] * 2
    assert any(not p.sharding.is_fully_replicated for p in params)


@pytest.mark.parametrize("reason", ["spike", "nan"])
def test_a_bad_step_changes_nothing(reason):
    mesh, init, step = compiled()
    state = init(jax.random.key(0))
    batch = divide_batch(8, 12, mesh).place([rows(0)])
    limit = np.float32(1.0 if reason == "spike" else np.inf)
    if reason == "nan":
        batch = batch._replace(loss_weights_BT=batch.loss_weights_BT.at[0, 0, 0].set(np.nan))
    after, metrics = step(state, batch, limit)
    assert int(metrics["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(after))


def _options(platform, **changes):
    device = types.SimpleNamespace(platform=platform, process_index=0)
    mesh = mock.create_autospec(jax.sharding.Mesh, instance=True)
    mesh.devices, mesh.shape = np.array([device]), {"data": 1}
    return compiler_options(mesh, DeepSeekV3(MICRO, **changes))


@pytest.mark.parametrize(("fraction", "percent"), [("", 94), (".92", 115)])
def test_xla_plans_with_the_memory_that_the_process_may_take(monkeypatch, fraction, percent):
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", fraction)
    assert _options("gpu")["xla_gpu_memory_limit_slop_factor"] == percent
    assert not any("memory" in name for name in _options("tpu") | _options("cpu"))


@pytest.mark.parametrize(
    ("matmuls", "remat", "in_place"),
    [
        ("fp8", "selective", True),
        ("fp8", "full", True),
        ("fp8", "none", False),
        ("compute", "selective", False),
    ],
)
def test_kernels_write_into_the_stack_of_layers_where_none_would_run_twice(
    matmuls, remat, in_place
):
    options = _options("gpu", precision=Precision(matmuls=matmuls), remat=remat)
    assert options["xla_gpu_enable_dynamic_slice_fusion"] is in_place


def test_violation_is_zero_when_balanced():
    np.testing.assert_allclose(load_violation(jnp.array([[2, 2, 2, 2], [8, 0, 0, 0]])), [0, 3])


def test_a_profile_finds_every_part_of_the_step():
    """Forward and backward: the parts that benchmarks tell apart are scopes of the model."""
    mesh, init, step = compiled()
    with jax.set_mesh(mesh):
        batch = divide_batch(8, 12, mesh).place([rows(0)])
        state = jax.eval_shape(init, jax.random.key(0))
        text = step.lower(state, batch, np.float32(np.inf)).as_text(debug_info=True)
    scopes = re.findall(r'"(jit\([^"]*)"', text)
    for backward in (False, True):
        found = {profile_parts.part_of(s) for s in scopes if ("transpose(" in s) == backward}
        # The loss makes its gradient in the forward pass; the optimizer has none.
        assert set(profile_parts.PARTS) - found <= (
            {"head_and_loss", "optimizer"} if backward else set()
        )
