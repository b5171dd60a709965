"""The chunked cross-entropy against Optax, and the pretraining loss against its equations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax import Batch, DeepSeekV3, init_params, init_router_bias
from deepseek_jax.config import FLOAT32
from deepseek_jax.train import losses
from deepseek_jax.train.losses import Totals, cross_entropy, mtp_targets, pretrain_loss
from tests.configs import MICRO

N, D, V = 37, 8, 50


def inputs(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.standard_normal((N, D)), dtype)
    head = jnp.asarray(rng.standard_normal((D, V)), dtype)
    targets = jnp.asarray(rng.integers(0, V, N), jnp.int32)
    weights = jnp.asarray(rng.random(N) * (rng.random(N) > 0.3), jnp.float32)
    return hidden, head, targets, weights


def plain_rows(hidden, head, targets):
    logits = jnp.dot(hidden, head, preferred_element_type=jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def plain(hidden, head, targets, weights):
    return (plain_rows(hidden, head, targets) * weights).sum()


def total(*args):
    return cross_entropy(*args)[0]


@pytest.mark.parametrize("at_once", [V, 10 * V, 2**27])
def test_cross_entropy_equals_optax_whatever_the_chunk(at_once, monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", at_once)
    args = inputs()
    ours = jax.jit(jax.value_and_grad(lambda *a: 3 * total(*a), argnums=(0, 1)))(*args)
    expected = jax.jit(jax.value_and_grad(lambda *a: 3 * plain(*a), argnums=(0, 1)))(*args)
    assert float(ours[0]) == pytest.approx(float(expected[0]), rel=1e-5)
    for got, want in zip(ours[1], expected[1], strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    without_gradient = jax.jit(lambda *a: 3 * total(*a))(*args)
    assert float(without_gradient) == pytest.approx(float(ours[0]), rel=1e-6)
    rows = jax.jit(lambda *a: cross_entropy(*a)[1])(*args)
    np.testing.assert_allclose(rows, plain_rows(*args[:3]), rtol=1e-5, atol=1e-5)


def test_no_float32_array_of_all_logits_exists(monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 5 * V)
    args = inputs(dtype=jnp.bfloat16)
    jaxpr = str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(*args))
    assert f"f32[5,{V}]" in jaxpr
    assert f"[{N},{V}]" not in jaxpr
    assert f"[40,{V}]" not in jaxpr  # N padded to whole chunks


def test_huge_logits_do_not_overflow():
    hidden, head, targets, weights = inputs()
    value, grads = jax.value_and_grad(total, argnums=(0, 1))(hidden * 1e4, head, targets, weights)
    assert np.isfinite(float(value))
    assert all(bool(jnp.isfinite(g).all()) for g in grads)


def batch(rows=4, T=10, seed=0):
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(0, MICRO.vocab_size, (rows, T + 1)), jnp.int32)
    segments = jnp.asarray(np.sort(rng.integers(1, 3, (rows, T + 1)), -1), jnp.int32)
    same = segments[:, 1:] == segments[:, :-1]
    positions = jnp.broadcast_to(jnp.arange(T), (rows, T))
    return Batch(
        tokens[:, :-1], tokens[:, 1:], same.astype(jnp.float32), positions, segments[:, :-1]
    )


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_mtp_targets_are_tokens_further_on_in_the_same_document(depth):
    b = batch()
    targets, weights = (np.asarray(x) for x in mtp_targets(b, depth))
    # The row with its last target: token i + 1 + depth stands at index i + 1 + depth.
    row = np.concatenate([b.tokens_BT, b.targets_BT[:, -1:]], axis=1)
    segments = np.asarray(b.segment_ids_BT)
    for r in range(len(row)):
        for i in range(row.shape[1] - 1):
            j = i + depth
            whole = j < segments.shape[1] and segments[r, j] == segments[r, i]
            expected = float(whole and np.asarray(b.loss_weights_BT)[r, j])
            assert weights[r, i] == expected
            if expected:
                assert targets[r, i] == row[r, i + 1 + depth]


def setup():
    model = DeepSeekV3(MICRO, FLOAT32)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    return model, params, init_router_bias(MICRO)


def test_the_loss_is_the_sum_of_its_equations():
    model, params, bias = setup()
    b = batch()

    def by_hand(params):
        h = model.apply(
            {"params": params}, b.tokens_BT, bias, b.targets_BT, b.segment_ids_BT,
            b.positions_BT, method="hidden",
        )  # fmt: skip
        tokens = b.loss_weights_BT.sum()

        def ce(h_BTD, targets, weights):
            logits = model.apply({"params": params}, h_BTD, method="logits")
            nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return (nll * weights).sum() / tokens

        main = ce(h.main_BTD, b.targets_BT, b.loss_weights_BT)
        mtp = [ce(x, *mtp_targets(b, k + 1)) for k, x in enumerate(h.mtp_BTD)]
        return main + 0.3 / 2 * (mtp[0] + mtp[1]) + h.balance_loss

    def ours(params):
        totals = Totals(b.loss_weights_BT.sum(), jnp.int32(1))
        return pretrain_loss(model, params, bias, b, totals, 0.3)[0]

    value, grads = jax.jit(jax.value_and_grad(ours))(params)
    expected, expected_grads = jax.jit(jax.value_and_grad(by_hand))(params)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, expected_grads
    )


def test_micro_batches_add_up_to_the_whole():
    model, params, bias = setup()
    b = batch()
    weight = b.loss_weights_BT.sum()

    @jax.jit
    def loss(b, pieces):
        return pretrain_loss(model, params, bias, b, Totals(weight, pieces), 0.3)

    whole, parts = loss(b, jnp.int32(1))
    halves = [loss(Batch(*(x[i : i + 2] for x in b)), jnp.int32(2)) for i in (0, 2)]
    assert float(sum(h[0] for h in halves)) == pytest.approx(float(whole), rel=1e-5)
    np.testing.assert_array_equal(sum(h[1].load_LE for h in halves), parts.load_LE)
