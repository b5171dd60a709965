"""Schedules at the report's landmarks, decay by name, the ramp, the average."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax import Batch, DeepSeekV3, Precision, UserError, sharding
from deepseek_jax.checkpoint import Checkpointer
from deepseek_jax.model.transformer import abstract_params
from deepseek_jax.train import optim
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.losses import pretrain_loss
from deepseek_jax.train.optim import OptimConfig
from deepseek_jax.train.step import abstract_state, init_state, make_train_step
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
    [
        {"constant_until": 0.99},
        {"ema_decay": 1.0},
        {"clip_norm": 0.0},
        {"warmup_steps": -1},
        {"peak_lr": 0.0},
        {"min_lr": math.nan},
        {"min_lr": 3e-4},
        {"final_lr": 3e-4},
        {"b2": 1.0},
        {"weight_decay": -0.1},
        {"mtp_weight": math.inf},
    ],
)
def test_contradictory_schedules_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        OptimConfig(**wrong)


def test_a_rate_that_would_rise_is_refused():
    both = r"would rise from peak_lr=1e-06 to min_lr=2.2e-05 and final_lr=7.3e-06; lower min_lr and"
    with pytest.raises(UserError, match=both):
        OptimConfig(peak_lr=1e-6)
    # A constant rate never comes to what follows it.
    constant = dataclasses.replace(optim.constant_rate(3e-6), peak_lr=1e-6)
    rate = optim.learning_rate(constant, 50)
    assert [float(rate(step)) for step in range(50)] == pytest.approx([1e-6] * 50)


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
    # Stairs of 4, 8 and 12 sequences: two steps of each are the nearest to 0.4 of all sequences.
    assert [loop.micro_batches(step) for step in range(10)] == [1, 1, 2, 2, 3, 3, 4, 4, 4, 4]


def test_the_report_counts_tokens_and_not_steps():
    """V3: 15,360 sequences of 4096 tokens, 3072 at first; 469B of 14.8T tokens are the ramp's."""
    loop = LoopConfig(steps=241_000, batch_size=15_360, micro_batch=512, first_batch_size=3072)
    sizes = np.array([loop.micro_batches(step) * 512 for step in range(20_000)])
    seen = np.cumsum(np.append(sizes, np.full(loop.total_steps - len(sizes), 15_360)))
    assert seen[loop.ramp_steps - 1] / seen[-1] == pytest.approx(0.469 / 14.8, rel=1e-3)
    assert sizes[loop.ramp_steps - 1] < sizes[loop.ramp_steps] == 15_360
    schedule = loop.in_steps(OptimConfig())
    for name, trillions in (("constant_until", 10), ("cosine_until", 14.3), ("min_until", 14.633)):
        step = round(getattr(schedule, name) * loop.total_steps)
        assert seen[step - 1] / seen[-1] == pytest.approx(trillions / 14.8, rel=1e-4)
    early = loop.in_steps(OptimConfig(constant_until=0.01))  # inside the ramp
    step = round(early.constant_until * loop.total_steps)
    assert seen[step - 1] / seen[-1] == pytest.approx(0.01, rel=1e-3)
    assert LoopConfig(steps=100).in_steps(OptimConfig()) == OptimConfig()


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


def test_average_of_bfloat16_parameters_is_float32():
    params = {"w": jnp.ones((2, 3), jnp.bfloat16)}
    tx = optim.params_ema(0.999)
    state = tx.init(params)
    for _ in range(100):  # each adds what bfloat16 would round away
        _, state = tx.update({"w": jnp.ones((2, 3))}, state, params)
    average = optim.ema_params(state)["w"]
    assert average.dtype == jnp.float32
    np.testing.assert_allclose(average, 2 - 0.999**100, rtol=1e-5)


# --- number formats ---------------------------------------------------------------------------


def test_moments_are_stored_as_asked_and_computed_in_float32():
    """Against Adam written out, its moments rounded to bfloat16 after every step."""
    config = OptimConfig(moments="bfloat16", weight_decay=0.0, clip_norm=1e9)
    tx = optim.scale_by_adam(config)
    rng = np.random.default_rng(0)
    params = {"w": jnp.zeros((64, 8))}
    state = tx.init(params)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.mu, state.nu))} == {
        jnp.dtype(jnp.bfloat16)
    }
    mu = nu = jnp.zeros((64, 8), jnp.bfloat16)
    for step in range(1, 6):
        grad = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
        updates, state = tx.update({"w": grad}, state, params)
        new_mu = 0.9 * mu.astype(jnp.float32) + 0.1 * grad
        new_nu = 0.95 * nu.astype(jnp.float32) + 0.05 * grad**2
        wanted = (new_mu / (1 - 0.9**step)) / (jnp.sqrt(new_nu / (1 - 0.95**step)) + 1e-8)
        assert updates["w"].dtype == jnp.float32
        # Not rounded on its way to the parameters: 1e-5, where bfloat16 would be off by 4e-3.
        np.testing.assert_allclose(updates["w"], wanted, rtol=1e-5)
        mu, nu = new_mu.astype(jnp.bfloat16), new_nu.astype(jnp.bfloat16)
        for stored, expected in ((state.mu["w"], mu), (state.nu["w"], nu)):
            assert stored.dtype == jnp.bfloat16
            # A float32 rounding apart may end in the neighbouring bfloat16.
            np.testing.assert_allclose(
                stored.astype(jnp.float32), expected.astype(jnp.float32), rtol=2**-7
            )


def test_bfloat16_parameters_get_float32_moments_and_norm():
    params = {"w": jnp.ones((300, 300), jnp.bfloat16)}
    grads = {"w": jnp.full((300, 300), 0.01, jnp.bfloat16)}
    tx = optax.chain(optim.clip(OptimConfig()), optim.scale_by_adam(OptimConfig()))
    state = tx.init(params)
    assert state[1].nu["w"].dtype == jnp.float32
    updates, state = tx.update(grads, state, params)
    assert updates["w"].dtype == jnp.float32
    # The norm is 3: gradients, and so the first moment, are scaled to a norm of 1. Summed in
    # bfloat16, 90,000 squares would stop growing at a fraction of it.
    np.testing.assert_allclose(
        np.linalg.norm(np.asarray(state[1].mu["w"], np.float64)), 0.1, rtol=1e-3
    )


def test_bfloat16_moments_come_back_from_a_checkpoint(tmp_path):
    model = DeepSeekV3(MICRO, Precision(params="bfloat16"))
    tx = optim.make_optimizer(OptimConfig(moments="bfloat16"), 10)
    mesh = sharding.make_mesh("data=1", jax.devices()[:1])
    abstract = abstract_state(model, tx, mesh)
    key = jax.random.key(0)
    state = jax.tree.map(
        lambda x: jax.random.normal(key, x.shape).astype(x.dtype) if x.shape else x.dtype.type(3),
        abstract,
    )
    state = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), state, abstract)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert {x.dtype for x in moments} == {jnp.dtype(jnp.bfloat16)}
    with Checkpointer(tmp_path) as saver:
        saver.save(1, state, data_state={}, rng=key)
        saver.wait()
        back = saver.restore_latest(abstract)
    for a, b in zip(jax.tree.leaves(back.state), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


EXACT = Precision(compute="float32")


def losses(precision: Precision, steps: int = 60, **options: str) -> np.ndarray:
    """Of a small model on four batches, which it could learn by heart: a mean for each round."""
    config = MICRO.replace(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    model = DeepSeekV3(config, precision)
    changes = {"peak_lr": 3e-3, "warmup_steps": 0, "weight_decay": 0.0}
    tx = optim.make_optimizer(OptimConfig(**(changes | options)), 1000)
    step = jax.jit(
        make_train_step(
            model,
            tx,
            lambda p, bias, b, t, _: pretrain_loss(model, p, bias, b, t, jnp.float32(0)),
            lambda _: jnp.float32(0),
        )
    )
    rng = np.random.default_rng(0)
    tokens_NBT = rng.integers(0, config.vocab_size, (4, 4, 17)).astype(np.int32)
    ones = np.ones((1, 4, 16), np.int32)
    at = np.broadcast_to(np.arange(16, dtype=np.int32), ones.shape)
    state, found = init_state(model, tx, jax.random.key(0)), []
    for tokens_BT in (tokens_NBT[i % 4][None] for i in range(steps)):
        batch = Batch(tokens_BT[..., :-1], tokens_BT[..., 1:], ones.astype(np.float32), at, ones)
        state, metrics = step(state, batch, np.float32(np.inf))
        found.append(float(metrics["loss"]))
    return np.array(found).reshape(-1, 4).mean(1)


@pytest.mark.slow
def test_bfloat16_moments_learn_like_float32_ones():
    exact, moments = losses(EXACT), losses(EXACT, moments="bfloat16")
    assert exact[-1] < 0.5 * exact[0]
    assert (moments != exact).any()
    np.testing.assert_allclose(moments, exact, rtol=0.03)


@pytest.mark.slow
def test_bfloat16_parameters_learn_too():
    """An update loses what lies below their eight bits: they lag behind (0.11 at the end)."""
    params = losses(Precision(params="bfloat16", compute="float32"), moments="bfloat16")
    np.testing.assert_allclose(params, losses(EXACT), rtol=0.15)
