"""The engine: against the full forward, alone and in company, on one device and on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax import DeepSeekV3, UserError, forward, init_params, init_router_bias, sharding
from deepseek_jax.config import FLOAT32
from deepseek_jax.generate import Engine, EngineConfig, Request, Sampling
from deepseek_jax.generate import engine as engine_module
from deepseek_jax.generate.slots import _STARTED_AT_ONCE
from deepseek_jax.model import attention
from deepseek_jax.model.transformer import init_cache
from tests.configs import MICRO

CONFIG = MICRO.replace(vocab_size=62, num_hidden_layers=2, max_position_embeddings=64)
LENGTH = 32
SIZES = EngineConfig(slots=4, lanes=2, max_length=LENGTH, prefill_chunk=8, rounds=3)
DRAFTING = EngineConfig(4, LENGTH, lanes=2, prefill_chunk=8, rounds=2, drafts=3)
GREEDY = Sampling(max_new_tokens=6, temperature=0.0)


@functools.cache
def setup():
    model = DeepSeekV3(CONFIG, FLOAT32)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    return model, params, init_router_bias(CONFIG)


@functools.cache
def full_forward():
    _, params, bias = setup()
    return jax.jit(lambda tokens: forward(CONFIG, params, bias, tokens))


def logits_of(tokens):
    """By the full forward, padded: the model is causal."""
    padded = jnp.zeros((1, LENGTH), jnp.int32).at[0, : len(tokens)].set(jnp.asarray(tokens))
    return np.asarray(full_forward()(padded))[0, : len(tokens)]


def prompts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in rng.integers(1, 21, count)]


def check_greedy(prompt, completion):
    logits = logits_of([*prompt, *completion.tokens])[len(prompt) - 1 : -1]
    np.testing.assert_array_equal(completion.tokens, logits.argmax(-1))
    picked = jax.nn.log_softmax(logits)[np.arange(len(logits)), completion.tokens]
    np.testing.assert_allclose(completion.log_probs, picked, atol=2e-5)
    np.testing.assert_array_equal(completion.sampling_log_probs, 0)


@pytest.mark.parametrize("config", [SIZES, DRAFTING], ids=["plain", "drafting"])
def test_greedy_is_the_argmax_of_the_full_forward(config):
    """More prompts than slots and lanes, two samples of each."""
    engine, each = Engine(*setup(), config), prompts(7)
    found = list(engine.generate([Request(p, GREEDY, samples=2) for p in each]))
    assert sorted((c.request, c.sample) for c in found) == [
        (i, s) for i in range(7) for s in (0, 1)
    ]
    for completion in found:
        assert completion.finish == "length"
        assert len(completion.tokens) == 6
        check_greedy(each[completion.request], completion)


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 25), st.integers(1, 9)), min_size=1, max_size=7),
    order=st.randoms(use_true_random=False),
    drafts=st.booleans(),
)
def test_a_text_depends_on_its_own_prompt_and_seed_alone(lengths, order, drafts):
    """In company, in any order, and one at a time: the same tokens and log-probabilities."""
    engine = Engine(*setup(), DRAFTING if drafts else SIZES)
    rng = np.random.default_rng(len(lengths))
    requests = [
        Request(
            rng.integers(0, CONFIG.vocab_size, n).tolist(),
            Sampling(new, temperature=1.0, top_p=0.9, seed=i),
            samples=1 + i % 2,
        )
        for i, (n, new) in enumerate(lengths)
    ]
    alone = {}
    for i, request in enumerate(requests):
        alone |= {(i, c.sample): c for c in engine.generate([request])}
    places = list(range(len(requests)))
    order.shuffle(places)
    together = list(engine.generate(iter([requests[i] for i in places])))
    assert len(together) == len(alone)
    for completion in together:
        expected = alone[places[completion.request], completion.sample]
        assert completion.tokens == expected.tokens
        np.testing.assert_allclose(completion.log_probs, expected.log_probs, atol=1e-5)


def test_more_sequences_start_at_once_than_are_copied_at_a_time():
    """A rollout's beginning: all slots free, few lanes, every sample's own stream of randomness."""
    drawn = Sampling(max_new_tokens=4, temperature=1.0, top_p=1.0, seed=3)
    each = prompts(5)
    requests = [Request(prompt, drawn, samples=9) for prompt in each]
    texts = []
    for slots in (2 * _STARTED_AT_ONCE + 5, 3):
        sizes = EngineConfig(slots, LENGTH, lanes=5, prefill_chunk=32, rounds=3)
        found = Engine(*setup(), sizes).generate(requests)
        texts.append({(c.request, c.sample): c.tokens for c in found})
    assert len(texts[0]) == 45
    assert texts[0] == texts[1]
    assert len({tuple(tokens) for tokens in texts[0].values()}) > 30


def test_seeds_samples_and_the_reported_log_probabilities():
    engine, prompt = Engine(*setup(), SIZES), prompts(1)[0]
    how = Sampling(8, temperature=0.7, top_p=0.8, seed=3)
    first, second = sorted(engine.generate([Request(prompt, how, 2)]), key=lambda c: c.sample)
    (other,) = engine.generate([Request(prompt, Sampling(8, 0.7, 0.8, seed=4))])
    assert first.tokens != second.tokens != other.tokens
    logits = logits_of([*prompt, *first.tokens])[len(prompt) - 1 : -1]
    picked = jax.nn.log_softmax(logits)[np.arange(8), first.tokens]
    np.testing.assert_allclose(first.log_probs, picked, atol=2e-5)
    probs = np.sort(np.asarray(jax.nn.softmax(logits / 0.7)), -1)[:, ::-1]
    kept = np.where(probs.cumsum(-1) - probs < 0.8, probs, 0).sum(-1)
    own = np.asarray(jax.nn.softmax(logits / 0.7))[np.arange(8), first.tokens]
    np.testing.assert_allclose(first.sampling_log_probs, np.log(own / kept), atol=1e-4)


def test_drafts_are_what_the_training_forward_predicts():
    """Accepted are exactly those rounds in which the MTP head of the full model was right."""
    model, params, bias = setup()
    # Among few tokens an untrained drafter is right now and then.
    params = params | {"head": params["head"].at[:, 4:].set(0)}
    engine = Engine(model, params, bias, EngineConfig(4, LENGTH, 4, 8, rounds=1, drafts=2))

    @jax.jit
    def logits(tokens):
        out = model.apply({"params": params}, tokens, bias)
        return [x[0].argmax(-1) for x in (out.logits_BTV, *out.mtp_logits)]

    def next_tokens(known):
        """By the main head and by the two of the modules, each of its own last position."""
        padded = jnp.zeros((1, LENGTH), jnp.int32).at[0, : len(known)].set(jnp.asarray(known))
        heads = zip(logits(padded), range(1, 4), strict=True)
        return [int(head[len(known) - depth]) for head, depth in heads]

    requests = [Request(p[:6], Sampling(20, temperature=0.0)) for p in prompts(4, seed=2)]
    total = np.zeros(3, int)
    for done in engine.generate(requests):
        tokens = [*requests[done.request].prompt, *done.tokens]
        counts, known = np.zeros(3, int), len(requests[done.request].prompt) + 1
        while known < len(tokens):
            right, draft, _ = next_tokens(tokens[:known])
            accepted = 0
            if draft == right:
                right, _, second = next_tokens([*tokens[:known], draft])
                accepted = 1 + (second == right)
            counts[accepted] += 1
            known += accepted + 1
        np.testing.assert_array_equal(done.accepted, counts)
        total += counts
    assert total.min() > 0


@pytest.mark.parametrize("config", [SIZES, DRAFTING], ids=["plain", "drafting"])
def test_completions_end_at_stop_tokens_and_limits(config):
    engine, prompt = Engine(*setup(), config), prompts(1)[0]
    (free,) = engine.generate([Request(prompt, Sampling(10, temperature=0.0))])
    stop = free.tokens[4]
    first = free.tokens.index(stop) + 1
    (ended,) = engine.generate([Request(prompt, Sampling(10, 0.0), stop_tokens=[60, stop])])
    assert (ended.tokens, ended.finish) == (free.tokens[:first], "stop")

    def third(tokens):
        return 3 if len(tokens) >= 3 else None

    (cut,) = engine.generate([Request(prompt, Sampling(10, 0.0), stopped=third)])
    assert (cut.tokens, cut.finish) == (free.tokens[:3], "stop")
    (full,) = engine.generate([Request(prompt, Sampling(500, 0.0))])
    assert (len(full.tokens), full.finish) == (LENGTH - len(prompt), "length")
    (one,) = engine.generate([Request(prompt, Sampling(1, 0.0))])
    assert one.tokens == free.tokens[:1]


def test_an_interrupted_stream_leaves_the_engine_usable():
    engine, each = Engine(*setup(), SIZES), prompts(6)
    requests, seen = [Request(p, GREEDY) for p in each], []
    whole = {c.request: c.tokens for c in engine.generate(requests)}
    stream = engine.generate(requests, on_tokens=lambda *what: seen.append(what))
    next(stream)
    stream.close()
    assert all(tokens == whole[request][: len(tokens)] for request, _, tokens in seen)
    assert {c.request: c.tokens for c in engine.generate(requests)} == whole


@pytest.mark.parametrize(
    ("drafts", "mesh"),
    [
        (2, "expert=2,tensor=2,fsdp=2"),
        pytest.param(0, "expert=2,tensor=2,fsdp=2", marks=pytest.mark.slow),
        pytest.param(0, "data=2,expert=4", marks=pytest.mark.slow),
        pytest.param(2, "data=2,expert=4", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_generate_what_one_does(mesh, drafts):
    model, params, bias = setup()
    config = EngineConfig(5, LENGTH, lanes=3, prefill_chunk=8, rounds=3, drafts=drafts)
    requests = [
        Request(p, Sampling(5, temperature=1.0, seed=i), samples=1 + i % 2)
        for i, p in enumerate(prompts(6))
    ]

    def run():
        done = Engine(model, params, bias, config).generate(requests)
        return {(c.request, c.sample): c for c in done}

    alone = run()
    with jax.set_mesh(sharding.make_mesh(mesh)):
        together = run()
    assert alone.keys() == together.keys()
    for which, completion in together.items():
        assert completion.tokens == alone[which].tokens
        np.testing.assert_allclose(completion.log_probs, alone[which].log_probs, atol=2e-5)


def test_routing_is_reported_as_it_was():
    """Fed back to the training forward, the kept choices give the engine's own states."""
    model, params, bias = setup()
    engine = Engine(model, params, bias, EngineConfig(4, LENGTH, 2, 8, keep_routing=True))
    prompt = prompts(1)[0]
    (completion,) = engine.generate([Request(prompt, GREEDY)])
    tokens = jnp.asarray([[*prompt, *completion.tokens[:-1]]], jnp.int32)
    assert completion.experts_lTK.shape == (1, tokens.shape[1], CONFIG.num_experts_per_tok)
    kept = jnp.asarray(completion.experts_lTK[:, None], jnp.int32)
    other_bias = bias + 10 * jax.random.normal(jax.random.key(1), bias.shape)

    @jax.jit
    def logits(bias, experts):
        hidden = model.apply(
            {"params": params}, tokens, bias, experts_LBTK=experts, method="hidden"
        )
        return model.apply({"params": params}, hidden.main_BTD, method="logits")

    replayed = logits(other_bias, kept)
    np.testing.assert_allclose(replayed, logits(bias, None), atol=1e-5)
    assert np.abs(replayed - logits(other_bias, jnp.full_like(kept, -1))).max() > 1e-3


@pytest.mark.parametrize("drafts", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_what_could_have_been_drawn_is_reported(drafts):
    """Log-probabilities over the kept tokens alone are the sampler's."""
    model, params, bias = setup()
    sizes = EngineConfig(4, LENGTH, 2, 8, drafts=drafts, keep_top_k=9)
    engine = Engine(model, params, bias, sizes)
    cut = Sampling(8, temperature=1.3, top_k=7, top_p=0.8, min_p=0.02)
    first, second = prompts(2)
    requests = [Request(first, cut, samples=3), Request(second, Sampling(3, 1.0, top_p=1.0))]
    found = list(engine.generate(requests))
    assert len(found) == 4
    counts = set()
    for completion in found:
        assert completion.kept_TX.shape == (len(completion.tokens), 9)
        if completion.request == 1:
            assert (completion.kept_TX == -1).all()
            continue
        logits_TV = logits_of([*first, *completion.tokens])[len(first) - 1 : -1] / 1.3
        for logits_V, kept_X, token, log_prob in zip(
            logits_TV,
            completion.kept_TX,
            completion.tokens,
            completion.sampling_log_probs,
            strict=True,
        ):
            ids = kept_X[kept_X >= 0].tolist()
            counts.add(len(ids))
            assert set(ids) <= set(np.argsort(-logits_V)[:7].tolist())
            own = logits_V[token] - np.log(np.exp(logits_V[ids]).sum())
            assert log_prob == pytest.approx(own, abs=2e-5)
    assert len(counts) > 1
    assert max(counts) <= 7
    with pytest.raises(UserError, match="may be one of more than the keep_top_k=9"):
        engine.check(Request(first, Sampling(3, top_p=0.9)))


def test_absorbed_and_expanded_attention_agree_over_several_blocks(monkeypatch):
    """The last block overlaps the one before; lengths differ; one row has seen nothing."""
    monkeypatch.setattr(attention, "KEY_BLOCK", 8)
    rng = np.random.default_rng(0)
    B, T, N, R, C, P, S = 3, 4, 2, 12, 10, 6, 27
    cache = init_cache(CONFIG, B, S)._replace(length_B=jnp.array([0, 9, 23]))
    cache = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype) if x.ndim > 1 else x, cache
    )
    q, q_pe = (jnp.asarray(rng.standard_normal((B, T, N, d)), jnp.float32) for d in (C, P))
    w = jnp.asarray(rng.standard_normal((R, N, C + 14)), jnp.float32)

    def expand(c_kv):
        return jnp.split(jnp.einsum("bsr,rnx->bsnx", c_kv, w), [C], axis=-1)

    expanded = attention.attend_expanded(q, q_pe, cache, 1, 0.3, expand)
    q_nope = jnp.einsum("btnc,rnc->btnr", q, w[..., :C])
    absorbed = attention.attend_absorbed(q_nope, q_pe, cache, 1, 0.3)
    absorbed = jnp.einsum("btnr,rno->btno", absorbed, w[..., C:])
    np.testing.assert_allclose(absorbed, expanded, atol=1e-4)
    # By the definition.
    kv = jnp.einsum("bsr,rnx->bsnx", cache.c_kv_LBSR[1], w)
    scores = jnp.einsum("btnc,bsnc->bnts", q, kv[..., :C])
    scores += jnp.einsum("btnp,bsp->bnts", q_pe, cache.k_pe_LBSP[1])
    seen = jnp.arange(S) <= (cache.length_B[:, None] + jnp.arange(T))[..., None]
    probs = jax.nn.softmax(jnp.where(seen[:, None], scores * 0.3, -jnp.inf), -1)
    defined = jnp.einsum("bnts,bsno->btno", probs, kv[..., C:])
    np.testing.assert_allclose(expanded, defined, atol=1e-4)


def test_bytes_of_the_cache():
    """SPEC: 576 values a token and layer for V3; here R + P, and 656 bytes of V3's in FP8."""
    model, params, bias = setup()
    assert Engine(model, params, bias, SIZES).cache_bytes_per_token == 2 * (12 + 6) * 4
    fp8 = EngineConfig(4, LENGTH, 2, 8, cache_dtype="fp8")
    assert Engine(model, params, bias, fp8).cache_bytes_per_token == 2 * (12 + 6 * 2 + 4)
    from deepseek_jax import preset

    v3 = preset("v3")
    for dtype, expected in ((jnp.bfloat16, 576 * 2), (jnp.float8_e4m3fn, 512 + 4 * 4 + 64 * 2)):
        cache = jax.eval_shape(lambda dtype=dtype: init_cache(v3, 1, 1, dtype))
        bytes_ = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache) if x.ndim > 1)
        assert bytes_ == 61 * expected


def test_an_fp8_cache_changes_log_probabilities_a_little():
    model, params, bias = setup()
    prompt = prompts(1)[0]
    (exact,) = Engine(model, params, bias, SIZES).generate([Request(prompt, GREEDY)])
    fp8 = EngineConfig(4, LENGTH, 2, 8, cache_dtype="fp8")
    (rough,) = Engine(model, params, bias, fp8).generate([Request(prompt, GREEDY)])
    error = abs(exact.log_probs[0] - rough.log_probs[0])
    assert 0 < error < 0.2  # E4M3 has 4 bits of mantissa: 2^-5 at the most, per value


@pytest.mark.parametrize(
    ("prompt", "named"),
    [([], "empty"), ([62], "62"), ([-1], "vocabulary"), ([1] * 32, "32 tokens")],
)
def test_bad_prompts_are_refused_before_anything_is_generated(prompt, named):
    engine = Engine(*setup(), SIZES)
    with pytest.raises(UserError, match=named):
        engine.generate([Request([1], GREEDY), Request(prompt, GREEDY)])


def test_bad_settings_are_refused():
    for options in ({"temperature": -1.0}, {"top_p": 0.0}, {"min_p": 2.0}, {"max_new_tokens": 0}):
        with pytest.raises(UserError, match=next(iter(options))):
            Sampling(**options)
    model, params, bias = setup()
    with pytest.raises(UserError, match="max_position_embeddings=64"):
        Engine(model, params, bias, EngineConfig(max_length=65))
    without = DeepSeekV3(CONFIG.replace(num_nextn_predict_layers=0), FLOAT32)
    with pytest.raises(UserError, match="no MTP module"):
        Engine(without, params, bias, DRAFTING)


@pytest.mark.parametrize("config", [SIZES, DRAFTING], ids=["plain", "drafting"])
def test_logits_that_are_not_finite_are_an_error(config):
    model, params, bias = setup()
    engine = Engine(model, params | {"norm": params["norm"] * jnp.nan}, bias, config)
    with pytest.raises(UserError, match="not finite"):
        list(engine.generate([Request([1, 2], GREEDY)]))


def test_what_gathers_the_slots_is_compiled_once():
    """Of several processes; an equal sharding is the same."""
    first, again = (sharding.sharding(sharding.make_mesh("data=8")) for _ in range(2))
    assert engine_module._gather(first) is engine_module._gather(again)
    np.testing.assert_array_equal(engine_module._gather(first)(jnp.arange(3)), [0, 1, 2])
