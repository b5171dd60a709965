"""Schedules at the report's landmarks, decay by name, the ramp, the average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax import DeepSeekV3, UserError
from deepseek_jax.model.transformer import abstract_params
from deepseek_jax.train import optim
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.optim import OptimConfig
from tests.configs import MICRO

STEPS = 148_000  # a step is 10^8 of the report's 14.8T tokens


def test_learning_rate_follows_the_report():
    rate = optim.learning_rate(OptimConfig(), STEPS)
    assert float(rate(0)) == pytest.approx(2.2e-4 / 2001, rel=1e-3)
    assert float(rate(1000)) == pytest.approx(2.2e-4 * 1001 / 2001, rel=1e-3)
    for step in (2000, 50_000, 100_000):
        assert float(rate(step)) == pytest.approx(2.2e-4, rel=1e-5)
    assert float(rate(121_500)) == pytest.approx((2.2e-4 + 2.2e-5) / 2, rel=1e-3)  # mid-cosine
    for step in (143_000, 146_000):
        assert float(rate(step)) == pytest.approx(2.2e-5, rel=1e-3)
    assert float(rate(146_331)) == pytest.approx(7.3e-6, rel=1e-3)


def test_weights_of_mtp_and_speed_of_bias_follow_the_report():
    lam, gamma = optim.mtp_weight(OptimConfig(), STEPS), optim.bias_speed(OptimConfig(), STEPS)
    assert [float(lam(s)) for s in (0, 99_999, 100_000)] == pytest.approx([0.3, 0.3, 0.1])
    assert [float(gamma(s)) for s in (0, 142_999, 143_000)] == pytest.approx([0.001, 0.001, 0])


def test_short_runs_get_a_short_warmup_and_long_ones_are_told():
    assert float(optim.learning_rate(OptimConfig(), 100)(5)) == pytest.approx(2.2e-4, rel=1e-5)
    with pytest.raises(UserError, match="warmup_steps=80"):
        optim.learning_rate(OptimConfig(warmup_steps=80), 100)


@pytest.mark.parametrize(
    "wrong",
    [{"constant_until": 0.99}, {"ema_decay": 1.0}, {"clip_norm": 0.0}, {"warmup_steps": -1}],
)
def test_contradictory_schedules_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        OptimConfig(**wrong)


def test_matrices_decay_and_gains_do_not():
    decays = optim.decays(abstract_params(DeepSeekV3(MICRO)))
    names = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(decays)}
    gains = {name for name in names if not names[name]}
    assert gains == {name for name in names if "norm" in name.split("'")[-2]}
    assert len(gains) == 2 * 4 + 2 * (4 + 3) + 1  # two stacks, two MTP modules, the final norm


def test_batch_ramp_goes_up_in_whole_micro_batches():
    ramp = optim.batch_ramp(3072, 15_360, 100, 512)
    sizes = [ramp(step) for step in range(120)]
    assert sizes[0] == 3072
    assert sizes[100:] == [15_360] * 20
    assert sizes == sorted(sizes)
    assert all(size % 512 == 0 for size in sizes)
    assert len(set(sizes)) == 9  # eight stairs, then the top: each is compiled once


def test_loop_accumulates_the_ramp():
    loop = LoopConfig(steps=10, batch_size=16, micro_batch=4, first_batch_size=4, ramp_fraction=0.4)
    assert [loop.micro_batches(step) for step in range(6)] == [1, 1, 2, 3, 4, 4]


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 10, "micro_batch": 4},
        {"batch_size": 8, "first_batch_size": 16, "micro_batch": 8},
        {"steps": 0},
    ],
)
def test_batches_that_do_not_divide_are_refused(wrong):
    with pytest.raises(UserError, match=r"batch|steps"):
        LoopConfig(**wrong)


def test_average_of_parameters_stays_out_of_the_way():
    plain = optim.make_optimizer(OptimConfig(), 10)
    averaged = optim.make_optimizer(OptimConfig(ema_decay=0.9), 10)
    params = {"w": jnp.arange(6.0).reshape(2, 3), "norm": jnp.ones(3)}
    runs = {}
    for name, tx in (("plain", plain), ("averaged", averaged)):
        p, state, ema = params, tx.init(params), params
        for step in range(3):
            grads = jax.tree.map(lambda x, s=step: jnp.sin(x + s), p)
            updates, state = tx.update(grads, state, p)
            p = optax.apply_updates(p, updates)
            ema = jax.tree.map(lambda e, x: 0.9 * e + 0.1 * x, ema, p)
        runs[name] = p, state, ema
    jax.tree.map(np.testing.assert_array_equal, runs["plain"][0], runs["averaged"][0])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        optim.ema_params(runs["averaged"][1]),
        runs["averaged"][2],
    )
    with pytest.raises(UserError, match="ema_decay"):
        optim.ema_params(runs["plain"][1])
