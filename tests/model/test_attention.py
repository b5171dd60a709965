"""Properties of MLA inside the whole model: cache, absorption, packing, chunking, remat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import DeepSeekV3, init_params, init_router_bias
from deepseek_jax.config import FLOAT32, Precision, Yarn
from deepseek_jax.model import attention
from deepseek_jax.model.transformer import init_cache
from tests.configs import MICRO

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, MICRO.vocab_size, (2, 12)), jnp.int32)


def make(config=MICRO, **options):
    model = DeepSeekV3(config, **({"precision": FLOAT32} | options))
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    bias = jax.random.normal(jax.random.key(1), init_router_bias(config).shape) * 0.1
    return model, params, bias


def apply(model, params, *args, **options):
    return jax.jit(lambda p, args: model.apply({"params": p}, *args, **options))(params, args)


@pytest.mark.parametrize(
    "config",
    [MICRO, MICRO.replace(q_lora_rank=None, rope_scaling=Yarn(original_max_position_embeddings=8))],
    ids=["v3", "direct_queries_yarn"],
)
@pytest.mark.parametrize(
    "pieces", [[12], pytest.param([1] * 12, marks=pytest.mark.slow), [5, 1, 4, 2]]
)
def test_absorbed_decoding_over_the_latent_cache_equals_the_expanded_forward(config, pieces):
    model, params, bias = make(config)
    full = apply(model, params, TOKENS, bias).logits_BTV
    cache = init_cache(config, 2, 16)
    assert cache.c_kv_LBSR.shape[-1] + cache.k_pe_LBSP.shape[-1] == 12 + 6  # nothing per head
    logits = []
    for piece in jnp.split(TOKENS, np.cumsum(pieces)[:-1], axis=1):
        part, cache = apply(model, params, piece, bias, cache, method="decode")
        logits.append(part)
    np.testing.assert_allclose(np.concatenate(logits, 1), full, atol=1e-4)
    np.testing.assert_array_equal(cache.length_B, [12, 12])


def test_rows_of_different_lengths_share_a_cache():
    model, params, bias = make()
    full = apply(model, params, TOKENS, bias).logits_BTV
    cache = init_cache(MICRO, 2, 16)
    _, cache = apply(model, params, TOKENS[:, :7], bias, cache, method="decode")
    cache = cache._replace(length_B=jnp.array([7, 4], jnp.int32))  # row 1 forgets three tokens
    step = jnp.stack([TOKENS[0, 7:9], TOKENS[1, 4:6]])
    logits, _ = apply(model, params, step, bias, cache, method="decode")
    np.testing.assert_allclose(logits[0], full[0, 7:9], atol=1e-4)
    np.testing.assert_allclose(logits[1], full[1, 4:6], atol=1e-4)


def test_packed_documents_equal_separate_ones():
    model, params, bias = make()
    a, b = TOKENS[:1, :5], TOKENS[1:, :7]
    packed = jnp.concatenate([a, b], axis=1)
    segments = jnp.array([[1] * 5 + [2] * 7], jnp.int32)
    positions = jnp.array([[*range(5), *range(7)]], jnp.int32)
    out = apply(model, params, packed, bias, segments, positions)
    alone = [apply(model, params, x, bias).logits_BTV for x in (a, b)]
    np.testing.assert_allclose(out.logits_BTV, np.concatenate(alone, 1), atol=1e-4)


def test_whole_rows_need_no_segments():
    model, params, bias = make()
    whole = make(whole_rows=True)[0]
    segments = jnp.array([[1] * 12, [1] * 7 + [0] * 5], jnp.int32)
    each = [apply(m, params, TOKENS, bias, segments) for m in (model, whole)]
    for expected, out in zip(*[(o.logits_BTV, o.mtp_logits[0][:, :6]) for o in each], strict=True):
        np.testing.assert_allclose(out[0], expected[0], atol=1e-5)
        np.testing.assert_allclose(out[1, :6], expected[1, :6], atol=1e-5)
    # And padding still counts for no expert.
    loads = [
        apply(m, params, TOKENS, bias, None, segments, method="hidden").load_LE
        for m in (model, whole)
    ]
    np.testing.assert_array_equal(loads[0][:-1].sum(-1), loads[1][:-1].sum(-1))


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
def test_cudnn_equals_the_portable_attention(masked, monkeypatch):
    B, T, N, H, O = 2, 768, 4, 192, 128
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, ct = (
        jax.random.normal(key, (B, T, N, d), jnp.bfloat16)
        for key, d in zip(keys, (H, H, O, O), strict=True)
    )
    ids = jnp.where(jnp.arange(T) < 300, 1, 2) * jnp.ones((B, 1), jnp.int32)
    segments = (ids, ids) if masked else None

    def run():
        out, pullback = jax.vjp(lambda *a: attention.attend(*a, segments, 0, 0.07), q, k, v)
        return (out, *pullback(ct))

    fast = jax.jit(run)()
    monkeypatch.setattr(attention.sharding, "platform", lambda: "cpu")
    for a, b in zip(fast, jax.jit(lambda: run())(), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.abs(a - b).max() < 0.02 * np.abs(b).max()


@pytest.mark.parametrize("T", [3, 8, 9, 23])
def test_query_chunks_change_nothing(T, monkeypatch):
    rng = np.random.default_rng(T)
    q, k, v = (jnp.asarray(rng.standard_normal((2, T, 3, d)), jnp.float32) for d in (5, 5, 4))
    segments = jnp.asarray(np.sort(rng.integers(1, 3, (2, T)), -1))

    def run(q, k, v):
        return attention.attend(q, k, v, (segments, segments), 0, 0.4)

    def gradients():  # a new function: jit would remember the chunk size it saw
        return jax.jit(jax.value_and_grad(lambda *a: (run(*a) ** 2).sum(), argnums=(0, 1, 2)))

    whole = gradients()(q, k, v)
    monkeypatch.setattr(attention, "QUERY_CHUNK", 4)
    chunked = gradients()(q, k, v)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), whole, chunked
    )


def gradients(model, params, bias):
    def loss(params):
        out = model.apply({"params": params}, TOKENS, bias)
        return sum((x**2).mean() for x in (out.logits_BTV, *out.mtp_logits))

    return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize("remat", ["full", pytest.param("selective", marks=pytest.mark.slow)])
def test_recomputation_changes_no_gradient(remat):
    model, params, bias = make()
    kept = gradients(model, params, bias)
    again = gradients(DeepSeekV3(MICRO, FLOAT32, remat), params, bias)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), kept, again)


def test_recomputation_keeps_less():
    """Bytes kept for the backward pass: full < selective < none."""
    tokens = jnp.zeros((4, 64), jnp.int32)
    config = MICRO.replace(num_nextn_predict_layers=0)
    _, params, bias = make(config)

    def kept(remat):
        model = DeepSeekV3(config, FLOAT32, remat)

        def residuals(params):
            return jax.vjp(lambda p: model.apply({"params": p}, tokens, bias).logits_BTV, params)[1]

        return sum(
            x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(residuals, params))
        )

    assert kept("full") < kept("selective") < kept("none")


def test_bfloat16_stays_near_float32():
    model, params, bias = make(MICRO.replace(num_nextn_predict_layers=0))
    exact = apply(model, params, TOKENS, bias * 10).logits_BTV
    half = DeepSeekV3(model.config, Precision(compute="bfloat16"))
    rough = apply(half, params, TOKENS, bias * 10).logits_BTV
    assert rough.dtype == jnp.float32  # logits
    error = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
    # About 2^-9 per rounding, three layers; an expert chosen otherwise shows as more than that.
    assert 1e-4 < error < 0.1
