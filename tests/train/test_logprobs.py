"""Log-probabilities of tokens: against plain softmax, in chunks, masked, and on eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import Batch, DeepSeekV3, init_params, init_router_bias, sharding
from deepseek_jax.config import FLOAT32
from deepseek_jax.model.transformer import logical_axes
from deepseek_jax.train import losses
from deepseek_jax.train.logprobs import policy_output, token_logprobs
from deepseek_jax.train.objective import ObjectiveConfig, policy_loss, step_totals
from deepseek_jax.types import Rollout
from tests.configs import MICRO

M, D, V = 37, 8, 50


def inputs(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.standard_normal((M, D)), dtype)
    head = jnp.asarray(rng.standard_normal((D, V)), dtype)
    targets = jnp.asarray(rng.integers(0, V, M), jnp.int32)
    kept = np.stack([rng.permutation(V)[:7] for _ in range(M)])
    kept[:, 5:] = np.where(rng.random((M, 2)) < 0.5, -1, kept[:, 5:])
    kept[0] = -1  # keeps all
    return hidden, head, targets, jnp.asarray(kept, jnp.int32)


def plain(hidden, head, targets, temperature=1.0, kept=None):
    logits = jnp.dot(hidden, head, preferred_element_type=jnp.float32) / temperature
    if kept is not None:
        logits = jnp.where(kept, logits, -1e30)
    logp = jax.nn.log_softmax(logits)
    entropy = -(jnp.exp(logp) * jnp.where(logp > -1e20, logp, 0)).sum(-1)
    return jnp.take_along_axis(logp, targets[:, None], axis=1)[:, 0], entropy, logp.max(-1)


def allowed(targets, kept):
    mask = np.zeros((M, V), bool)
    for row, ids in enumerate(np.asarray(kept)):
        ids = ids[ids >= 0]
        mask[row, ids if len(ids) else slice(None)] = True
        mask[row, int(targets[row])] = True
    return mask


@pytest.mark.parametrize("at_once", [V, 10 * V, 2**27])
@pytest.mark.parametrize(("temperature", "masked"), [(1.0, False), (0.7, False), (1.3, True)])
def test_value_gradient_and_entropy_equal_plain_softmax(at_once, temperature, masked, monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", at_once)
    hidden, head, targets, kept = inputs()
    kept, mask = (kept, allowed(targets, kept)) if masked else (None, None)
    factors = jnp.asarray(np.random.default_rng(1).standard_normal(M), jnp.float32)

    def ours(hidden, head):
        said = token_logprobs(hidden, head, targets, temperature=temperature, kept_MX=kept)
        return (jnp.exp(said.logp_M) * factors).sum(), tuple(said)

    def theirs(hidden, head):
        logp, *rest = plain(hidden, head, targets, temperature, mask)
        return (jnp.exp(logp) * factors).sum(), (logp, *rest)

    grad = functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    got, want = jax.jit(grad(ours))(hidden, head), jax.jit(grad(theirs))(hidden, head)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), got, want)


def test_no_float32_array_of_all_logits_exists(monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 5 * V)
    hidden, head, targets, kept = inputs(dtype=jnp.bfloat16)
    jaxpr = str(
        jax.make_jaxpr(
            jax.grad(lambda h, w: token_logprobs(h, w, targets, kept_MX=kept)[0].sum(), (0, 1))
        )(hidden, head)
    )
    assert f"f32[5,{V}]" in jaxpr
    for rows in (M, 40):  # 40: padded to whole chunks
        assert f"[{rows},{V}]" not in jaxpr


def test_huge_logits_do_not_overflow():
    hidden, head, targets, _ = inputs()
    value, grads = jax.value_and_grad(
        lambda h, w: token_logprobs(h, w, targets)[0].mean(), argnums=(0, 1)
    )(hidden * 1e4, head)
    assert np.isfinite(float(value))
    assert all(bool(jnp.isfinite(g).all()) for g in grads)


# --- the policy loss on a mesh ----------------------------------------------------------------

CONFIG = MICRO.replace(num_nextn_predict_layers=0, vocab_size=64, num_hidden_layers=2)
MODEL = DeepSeekV3(CONFIG, FLOAT32)
OBJECTIVE = ObjectiveConfig(
    "gspo",
    clip_low=0.2,
    clip_high=0.2,
    kl_coef=0.1,
    kl="unbiased",
    importance_cap=1.1,
    off_policy_threshold=0.01,
)
MESH = "expert=2,context=2,tensor=2"


def rollout(rows=8, length=16):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.vocab_size, (rows, length + 1)).astype(np.int32)
    mask = (np.arange(length) >= 5) & (np.arange(length) < rng.integers(7, length, (rows, 1)))
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    batch = Batch(
        tokens[:, :-1], tokens[:, 1:], mask.astype(np.float32), positions, np.ones_like(positions)
    )
    near = -4 + 0.3 * rng.standard_normal((3, rows, length)).astype(np.float32)
    kept = rng.integers(-1, CONFIG.vocab_size, (rows, length, 12)).astype(np.int32)
    return Rollout(batch, rng.standard_normal(rows).astype(np.float32), *near, kept)


def loss_and_grads(mesh_text, make, logprobs, stored):
    """As a train step does it: per device, gradients summed over replicas.

    ``make()`` gives parameters and their logical axes; ``logprobs(params, rollout)`` is
    differentiated through.
    """
    devices = jax.devices()[:1] if mesh_text == "data=1" else jax.devices()
    mesh = sharding.make_mesh(mesh_text, devices)
    data = rollout()
    rows, row = sharding.spec("batch", "sequence"), sharding.spec("batch")
    where = Rollout(Batch(*[rows] * 5), row, rows, rows, rows, rows)
    with jax.set_mesh(mesh):
        params, axes = make()
        specs = sharding.param_specs(mesh, axes, params, stored=stored)

        def gradients(params, data):
            totals = step_totals(data.batch.loss_weights_BT)
            loss, pullback, metrics = jax.vjp(
                lambda p: policy_loss(logprobs(p, data), data, totals, OBJECTIVE, 16),
                params,
                has_aux=True,
            )
            grads = pullback(jnp.full_like(loss, 1 / sharding.replicas()))[0]
            return (loss, metrics), sharding.sum_gradients(grads, specs)

        everywhere = sharding.spec()
        run = sharding.per_device(gradients, (specs, where), (everywhere, specs))
        return jax.device_get(jax.jit(run)(params, data))


def assert_eight_devices_equal_one(make, logprobs, stored=True):
    one = loss_and_grads("data=1", make, logprobs, stored)
    many = loss_and_grads(MESH, make, logprobs, stored)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), one, many)
    assert max(np.abs(g).max() for g in jax.tree.leaves(one[1])) > 1e-3


def test_eight_devices_equal_one_from_the_embedding_to_the_loss():
    """A model of an embedding and a head: all that log-probabilities and objective see of one."""
    rng = np.random.default_rng(0)
    embed, head = (rng.standard_normal((64, 12)).astype(np.float32) for _ in range(2))

    def logprobs(params, data):
        hidden_MD = params["embed"][data.batch.tokens_BT.reshape(-1)]
        logp_M, *_ = token_logprobs(
            hidden_MD,
            params["head"],
            data.batch.targets_BT.reshape(-1),
            temperature=0.9,
            kept_MX=data.kept_BTX.reshape(hidden_MD.shape[0], -1),
        )
        return logp_M.reshape(data.batch.targets_BT.shape)

    params = {"embed": embed, "head": head.T}
    axes = {"embed": (None, None), "head": (None, "vocab")}
    # The real model gathers what is stored in parts; this one has nothing that does.
    assert_eight_devices_equal_one(lambda: (params, axes), logprobs, stored=False)


@pytest.mark.slow
def test_eight_devices_equal_one_through_the_model():
    def make():
        params = jax.jit(lambda: init_params(MODEL, jax.random.key(0)))()
        return params, logical_axes(MODEL)

    def logprobs(params, data):
        bias = init_router_bias(CONFIG)
        return policy_output(
            MODEL, params, bias, data.batch, kept_BTX=data.kept_BTX, temperature=0.9
        ).logp_BT

    assert_eight_devices_equal_one(make, logprobs)
