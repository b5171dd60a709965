"""Routing, balancing and dispatch against the papers' formulas written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax import sharding
from deepseek_jax.config import FLOAT32
from deepseek_jax.model.experts import take_rows
from deepseek_jax.model.moe import MoE, balance, route, updated_bias
from tests.configs import MICRO, MICRO_V2

E, K, G = MICRO.n_routed_experts, MICRO.num_experts_per_tok, MICRO.n_group
B, T = 2, 9


def logits(seed=0, shape=(B, T, E)):
    return np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def route_one_v3(u, bias, config):
    """V3 Eqs. 12-16 for one token, by sorting."""
    s = sigmoid(u)
    choice = s + bias
    size = E // config.n_group
    group_score = [np.sort(choice[g * size : (g + 1) * size])[-2:].sum() for g in range(G)]
    kept = np.argsort(group_score)[-config.topk_group :]
    allowed = [e for g in kept for e in range(g * size, (g + 1) * size)]
    chosen = sorted(allowed, key=lambda e: -choice[e])[:K]
    gates = s[chosen] / s[chosen].sum() * config.routed_scaling_factor
    return dict(zip(chosen, gates, strict=True))


def route_one_v2(u, config):
    s = softmax(u)
    size = E // config.n_group
    kept = np.argsort([s[g * size : (g + 1) * size].max() for g in range(G)])[-config.topk_group :]
    allowed = [e for g in kept for e in range(g * size, (g + 1) * size)]
    chosen = sorted(allowed, key=lambda e: -s[e])[:K]
    return {e: s[e] * config.routed_scaling_factor for e in chosen}


ROUTE = jax.jit(route, static_argnums=2)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.booleans())
def test_routing_is_the_papers(seed, v3):
    u = logits(seed)
    bias = np.random.default_rng(seed + 1).normal(0, 0.3, E).astype(np.float32)
    config = MICRO if v3 else MICRO_V2
    routing = ROUTE(jnp.asarray(u), jnp.asarray(bias), config)
    for b in range(B):
        for t in range(T):
            got = dict(
                zip(
                    np.asarray(routing.experts_BTK[b, t]).tolist(),
                    np.asarray(routing.weights_BTK[b, t]).tolist(),
                    strict=True,
                )
            )
            expected = route_one_v3(u[b, t], bias, config) if v3 else route_one_v2(u[b, t], config)
            assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("config", [MICRO, MICRO_V2])
def test_no_token_reaches_more_groups_than_allowed(config):
    # Biases far below any affinity: a dropped group must stay dropped (Hugging Face once masked
    # with 0, which such biases get past).
    u = logits(3, (4, 50, E))
    routing = route(jnp.asarray(u), jnp.full((E,), -5.0), config)
    groups = np.asarray(routing.experts_BTK) // (E // G)
    assert max(len(set(row)) for row in groups.reshape(-1, K).tolist()) <= config.topk_group


def test_bias_changes_the_choice_and_never_the_gate():
    u = jnp.asarray(logits(1))
    config = MICRO.replace(n_group=1, topk_group=1)
    free, pushed = (route(u, bias, config) for bias in (jnp.zeros(E), jnp.zeros(E).at[5].set(9.0)))
    assert bool((pushed.experts_BTK == 5).any(-1).all())
    assert not bool((free.experts_BTK == 5).any(-1).all())
    s = sigmoid(np.asarray(u))
    chosen = np.take_along_axis(s, np.asarray(pushed.experts_BTK), -1)
    expected = chosen / chosen.sum(-1, keepdims=True) * config.routed_scaling_factor
    np.testing.assert_allclose(pushed.weights_BTK, expected, rtol=1e-5)


def test_bias_step_opposes_the_load():
    load = jnp.array([[0, 4, 4, 8], [1, 1, 1, 1]], jnp.int32)
    bias = updated_bias(jnp.zeros((2, 4)), load, 0.5)
    np.testing.assert_array_equal(bias, [[0.5, 0, 0, -0.5], [0, 0, 0, 0]])


def test_sequence_loss_is_eqs_17_to_20():
    u = logits(2)
    bias = np.random.default_rng(5).normal(0, 1, E).astype(np.float32)
    routing = route(jnp.asarray(u), jnp.asarray(bias), MICRO)
    per_sequence = []
    for b in range(B):
        s = sigmoid(u[b])
        top = np.argsort(s, -1)[:, -K:]  # of the unbiased affinities, whatever was chosen
        f = np.array([E / (K * T) * (top == i).any(-1).sum() for i in range(E)])
        P = (s / s.sum(-1, keepdims=True)).mean(0)
        per_sequence.append((f * P).sum())
    got = balance(routing, jnp.ones((B, T), bool), MICRO).loss
    assert float(got) == pytest.approx(MICRO.aux_loss_alpha * np.mean(per_sequence), rel=1e-5)


def test_v2_losses_are_eqs_23_to_31():
    u = logits(4)
    routing = route(jnp.asarray(u), jnp.zeros(E), MICRO_V2)
    D, M = MICRO_V2.n_group, MICRO_V2.topk_group
    expert = device = communication = 0.0
    for b in range(B):
        s, chosen = softmax(u[b]), np.asarray(routing.experts_BTK[b])
        f = np.array([E / (K * T) * (chosen == i).any(-1).sum() for i in range(E)])
        P = s.mean(0)
        expert += (f * P).sum() / B
        f_device = f.reshape(D, -1).mean(-1)
        P_device = P.reshape(D, -1).sum(-1)
        device += (f_device * P_device).sum() / B
        sent = np.array([D / (M * T) * (chosen // (E // D) == d).any(-1).sum() for d in range(D)])
        communication += (sent * P_device).sum() / B
    expected = 0.003 * expert + 0.05 * device + 0.02 * communication
    got = balance(routing, jnp.ones((B, T), bool), MICRO_V2).loss
    assert float(got) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("config", [MICRO, MICRO_V2])
def test_batchwise_loss_takes_the_batch_for_one_sequence(config):
    u = logits(6)
    routing = route(jnp.asarray(u), jnp.zeros(E), config)
    whole = route(jnp.asarray(u.reshape(1, B * T, E)), jnp.zeros(E), config)
    batchwise = balance(routing, jnp.ones((B, T), bool), config.replace(seq_aux=False)).loss
    one_row = balance(whole, jnp.ones((1, B * T), bool), config).loss
    assert float(batchwise) == pytest.approx(float(one_row), rel=1e-5)


@pytest.mark.parametrize("config", [MICRO, MICRO_V2])
def test_padding_is_not_counted(config):
    u = jnp.asarray(logits(7))
    valid = jnp.arange(T) < 6
    padded = balance(route(u, jnp.zeros(E), config), jnp.broadcast_to(valid, (B, T)), config)
    cut = balance(route(u[:, :6], jnp.zeros(E), config), jnp.ones((B, 6), bool), config)
    np.testing.assert_array_equal(padded.load_E, cut.load_E)
    assert int(cut.load_E.sum()) == B * 6 * K
    assert float(padded.loss) == pytest.approx(float(cut.loss), rel=1e-5)


@pytest.mark.parametrize("config", [MICRO, MICRO_V2])
def test_balance_loss_pushes_down_the_overloaded_expert(config):
    u = jnp.asarray(logits(8)).at[..., 2].add(3.0)

    def of(u):
        routing = route(u, jnp.zeros(E), config)
        return balance(routing, jnp.ones((B, T), bool), config).loss

    mean_gradient = np.asarray(jax.grad(of)(u)).mean((0, 1))
    assert mean_gradient[2] > 0
    assert mean_gradient.argmax() == 2


def moe_params(config, key=0):
    module = MoE(config, FLOAT32)
    x = jax.random.normal(jax.random.key(key), (B, T, config.hidden_size))
    variables = jax.jit(module.init)(jax.random.key(key + 1))
    params = jax.tree.map(
        lambda box: box.value, variables["params"], is_leaf=lambda v: hasattr(v, "value")
    )
    return module, params, x


def dense_moe(params, x, routing, config):
    """Every expert on every token, weighted: V3 Eq. 12 without any dispatch."""

    def mlp(p, x):
        return (jax.nn.silu(x @ p["w1"]) * (x @ p["w3"])) @ p["w2"]

    experts = {name: params[name] for name in ("w1", "w2", "w3")}
    every = jax.vmap(mlp, in_axes=(0, None))(experts, x)  # E B T D
    gates = (jax.nn.one_hot(routing.experts_BTK, E) * routing.weights_BTK[..., None]).sum(-2)
    out = jnp.einsum("ebtd,bte->btd", every, gates)
    return out + mlp(params["shared_experts"], x) if config.n_shared_experts else out


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("skew", [0.0, 100.0])
def test_dispatch_drops_no_token(shared, skew):
    """Output and gradients equal the sum over all experts, with all tokens on few experts too."""
    config = MICRO.replace(n_shared_experts=shared, n_group=1, topk_group=1)
    module, params, x = moe_params(config)
    bias = jnp.zeros(E).at[:K].set(skew)

    def ours(params, x):
        (out,), routing = module.apply({"params": params})(bias, [x], [None])
        return (out**2).sum(), balance(routing, jnp.ones((B, T), bool), config)

    def dense(params, x):
        routing = route(jnp.einsum("btd,de->bte", x, params["gate"]), bias, config)
        return (dense_moe(params, x, routing, config) ** 2).sum()

    (value, stats), grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(
        params, x
    )
    expected, expected_grads = jax.jit(jax.value_and_grad(dense, argnums=(0, 1)))(params, x)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected_grads))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), grads, expected_grads
    )
    if skew:
        np.testing.assert_array_equal(stats.load_E, [B * T] * K + [0] * (E - K))


def test_gate_is_float32_under_bfloat16():
    """Two experts whose affinities differ by less than bfloat16 resolves are told apart."""
    u = jnp.full((1, 1, E), -3.0).at[0, 0, 4].set(1.0).at[0, 0, 5].set(1.001)
    config = MICRO.replace(num_experts_per_tok=1, n_group=1, topk_group=1)
    assert int(route(u, jnp.zeros(E), config).experts_BTK[0, 0, 0]) == 5
    assert jnp.bfloat16(1.0) == jnp.bfloat16(1.001)


def equations(jaxpr):
    """Of a jaxpr and of those within it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_the_gates_products_are_float32_wherever_they_run():
    """Forward and both gradients: by default they are TF32 on GPUs and bfloat16 on TPUs."""
    module, params, x = moe_params(MICRO.replace(n_shared_experts=0))

    def gates(params, x):
        return module.apply({"params": params})(jnp.zeros(E), [x], [None])[1].weights_BTK.sum()

    jaxpr = jax.make_jaxpr(jax.grad(gates, argnums=(0, 1)))(params, x).jaxpr
    dots = [
        e
        for e in equations(jaxpr)
        if e.primitive.name == "dot_general"
        and (B, T) in {v.aval.shape[:2] for v in e.invars}  # the experts' rows are flat
    ]
    assert len(dots) == 3
    highest = jax.lax.Precision.HIGHEST
    assert all(dot.params["precision"] == (highest, highest) for dot in dots)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.uint8, jnp.float32])
@pytest.mark.parametrize("D", [8, 9])
def test_rows_taken_as_words_are_the_rows(monkeypatch, dtype, D):
    monkeypatch.setattr(sharding, "on_gpu", lambda: True)
    x_TD = jnp.arange(5 * D).reshape(5, D).astype(dtype)
    rows_M = jnp.array([4, 0, 0, 3])
    np.testing.assert_array_equal(take_rows(x_TD, rows_M), x_TD[rows_M])
    in_words = "u32" in str(jax.make_jaxpr(take_rows)(x_TD, rows_M))
    assert in_words == (dtype != jnp.float32 and D * x_TD.dtype.itemsize % 4 == 0)
