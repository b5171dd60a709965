"""Training with the projections, feed-forward networks and experts in FP8 (V3 section 3.3)."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import kept_activations
from deepseek_jax import Batch, DeepSeekV3, preset, sharding
from deepseek_jax.config import Precision
from deepseek_jax.model.transformer import init_params, init_router_bias
from deepseek_jax.train import optim
from deepseek_jax.train.loop import divide_batch
from deepseek_jax.train.losses import Totals, pretrain_loss
from deepseek_jax.train.step import init_state, make_train_step, state_shardings

B, T, V = 8, 48, 320  # a size that nothing else has
CONFIG = preset("tiny").replace(
    vocab_size=V,
    num_hidden_layers=2,
    n_routed_experts=4,
    n_group=2,
    topk_group=1,
    num_nextn_predict_layers=0,
)
# CPUs have no fast bfloat16; what FP8 does is seen beside float32 as well.
PLAIN = Precision(compute="float32")
FP8 = Precision(compute="float32", matmuls="fp8")


def rows(seed):
    """A language of four successors to every token: something to learn in a minute."""
    rng = np.random.default_rng(seed)
    successors = np.random.default_rng(0).integers(0, V, (V, 4))
    tokens = np.zeros((B, T + 1), np.int32)
    tokens[:, 0] = rng.integers(0, V, B)
    for t in range(T):
        tokens[:, t + 1] = successors[tokens[:, t], rng.integers(0, 4, B)]
    ones = np.ones((B, T), np.int32)
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    return Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), positions, ones)


def losses(precision, mesh_text, steps, config=CONFIG, options=None):
    model = DeepSeekV3(config, precision)
    rates = optim.OptimConfig(peak_lr=3e-3, min_lr=3e-4, final_lr=1e-4, warmup_steps=2)
    tx = optim.make_optimizer(rates, steps)

    def loss_fn(params, bias, batch, totals, step):
        return pretrain_loss(model, params, bias, batch, totals, 0.0)

    devices = jax.devices()[:1] if mesh_text == "data=1" else jax.devices()[:4]
    mesh = sharding.make_mesh(mesh_text, devices)
    with jax.set_mesh(mesh):
        where = state_shardings(model, tx, mesh)
        init = jax.jit(functools.partial(init_state, model, tx), out_shardings=where)
        state, history = init(jax.random.key(0)), []
        step = make_train_step(model, tx, loss_fn, lambda _: 0.001)
        step = jax.jit(step, out_shardings=(where, None), compiler_options=options)
        for seed in range(steps):
            batch = divide_batch(B, T, mesh).place([rows(seed)])
            state, metrics = step(state, batch, np.float32(np.inf))
            history.append(float(metrics["loss"]))
    return np.array(history)


def test_fp8_learns_as_float32_does():
    """The same run in both: the mean of the last 30 losses agrees to 1%.

    The paper's 0.25% is for averages over billions of tokens; `benchmarks/fp8_training.py` asks for
    it after a hundred million. Here a step has 384 tokens, and the two losses of one differ by 1.2%
    (standard deviation, either sign). Three seeds gave +0.08%, +0.50% and +0.24%; of the last ten
    steps alone, +1.06%, +0.14% and +0.25%.
    """
    config = CONFIG.replace(first_k_dense_replace=0)  # one kind of layer: half the time to compile
    # A hundred steps are worth optimizing for.
    options = {"xla_backend_optimization_level": 3}
    expected, got = (losses(p, "data=1", 100, config, options) for p in (PLAIN, FP8))
    assert expected[-10:].mean() < 0.4 * expected[0]
    assert got[-30:].mean() == pytest.approx(expected[-30:].mean(), rel=0.01)
    assert not np.array_equal(got, expected)


@pytest.mark.slow
def test_fp8_on_a_mesh():
    """Gathered weights, experts on several devices: the same first steps, to FP8's rounding."""
    alone, spread = losses(FP8, "data=1", 4), losses(FP8, "fsdp=2,expert=2", 4)
    np.testing.assert_allclose(alone, spread, rtol=2e-3)


def test_the_projection_before_a_prediction_module_is_not_in_fp8():
    """In the released weights, too, it is in BF16. No other matrix here has a side of 640."""
    config = CONFIG.replace(num_nextn_predict_layers=1, hidden_size=320)
    batch = Batch(*(jnp.asarray(x) for x in rows(0)))
    totals = Totals(batch.loss_weights_BT.sum(), jnp.int32(1))
    model = DeepSeekV3(config, FP8)
    params = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    loss = lambda p: pretrain_loss(model, p, init_router_bias(config), batch, totals, 0.1)[0]  # noqa: E731
    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert "f32[640,320]" in jaxpr
    assert "f8_e4m3fn[320," in jaxpr
    assert re.search(r"f8_e4m3fn\[(\d+,)*640", jaxpr) is None


def test_what_is_in_fp8_and_what_is_not():
    """Gradients stay close to float32's, closest where no FP8 product stands before the loss."""
    batch = Batch(*(jnp.asarray(x) for x in rows(0)))
    totals = Totals(batch.loss_weights_BT.sum(), jnp.int32(1))
    # The same two experts for every token: FP8 moves some over a tie, and with them gradients.
    bias = init_router_bias(CONFIG).at[:, :2].set(10.0)
    params = jax.jit(functools.partial(init_params, DeepSeekV3(CONFIG)))(jax.random.key(0))

    def gradients(precision):
        model = DeepSeekV3(CONFIG, precision)
        loss = lambda p: pretrain_loss(model, p, bias, batch, totals, 0.0)[0]  # noqa: E731
        return jax.grad(loss)

    plain, fp8 = (jax.jit(gradients(p))(params) for p in (PLAIN, FP8))
    jaxpr = str(jax.make_jaxpr(gradients(FP8))(params))
    assert "f8_e4m3fn" in jaxpr
    assert f"f8_e4m3fn[{V}" not in jaxpr  # the vocabulary: neither embedding nor head
    assert "f8_e4m3fn" not in str(jax.make_jaxpr(gradients(PLAIN))(params))

    def alike(a, b):
        a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
        return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))

    cosines = jax.tree.map(alike, plain, fp8)
    assert min(jax.tree.leaves(cosines)) > 0.97
    assert cosines["head"] > 0.99


def test_activations_kept_for_the_backward_pass_shrink():
    """V3 section 3.3.3: inputs of products are kept in FP8, those of SwiGLU and not its output."""
    config = preset("small")
    c, seq_len = config, 128
    plain, fp8 = (
        kept_activations.per_layer(config, Precision(matmuls=m), "none", seq_len)
        for m in kept_activations.FORMATS
    )
    for kind in kept_activations.KINDS:
        assert plain[kind]["float8_e4m3fn"] == 0
        assert fp8[kind].total() < 0.8 * plain[kind].total()
    # A byte for every input of a product whose weight has a gradient (the latent is that of two,
    # keys and values; w2's is recomputed) and of SwiGLU.
    D, Q, R = c.hidden_size, c.q_lora_rank, c.kv_lora_rank
    attention = D + Q + 2 * R + c.num_attention_heads * c.v_head_dim
    width, K = c.moe_intermediate_size, c.num_experts_per_tok
    shared = D + 2 * c.n_shared_experts * width
    routed = K * (D + 2 * width)
    assert fp8["dense"]["float8_e4m3fn"] == attention + D + 2 * c.intermediate_size
    assert fp8["MoE"]["float8_e4m3fn"] == attention + shared + routed


@pytest.mark.slow
def test_what_selective_keeps_shrinks_too():
    """A token in FP8 instead of nothing, but SwiGLU's inputs in a byte each instead of two."""
    c, seq_len = preset("small"), 128
    plain, fp8 = (
        kept_activations.per_layer(c, Precision(matmuls=m), "selective", seq_len)
        for m in kept_activations.FORMATS
    )
    width = c.moe_intermediate_size * (c.n_shared_experts + c.num_experts_per_tok)
    assert fp8["MoE"]["float8_e4m3fn"] == c.hidden_size + 2 * width
    assert fp8["dense"]["float8_e4m3fn"] == 2 * c.intermediate_size
    for kind in kept_activations.KINDS:
        assert fp8[kind].total() < 0.8 * plain[kind].total()
