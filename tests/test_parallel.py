"""Eight devices against one: every axis, mixed axes, both dispatchers, any skew of the routing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from deepseek_jax import Batch, DeepSeekV3, UserError, sharding
from deepseek_jax.config import FLOAT32, Precision
from deepseek_jax.model.dispatch import Chosen, ExpertParallel, most_receivers, routed_experts
from deepseek_jax.model.experts import ExpertWeights, local_experts
from deepseek_jax.model.transformer import (
    abstract_params,
    decode_step,
    init_cache,
    init_params,
    init_router_bias,
    sharded_params,
)
from deepseek_jax.train import optim
from deepseek_jax.train.loop import divide_batch
from deepseek_jax.train.losses import pretrain_loss
from deepseek_jax.train.step import init_state, make_train_step, state_shardings
from tests.configs import MICRO, MICRO_V2

# Two heads, 64 tokens and 8 experts: what tensor=2 and expert=8 can divide.
V3 = MICRO.replace(vocab_size=64, moe_intermediate_size=20, num_nextn_predict_layers=1)
V2 = MICRO_V2.replace(vocab_size=64, moe_intermediate_size=20)
# A large eps, or Adam would make whole steps of the rounding of tiny gradients.
TX = optim.make_optimizer(optim.OptimConfig(peak_lr=1e-2, eps=1e-2, warmup_steps=0), 100)
RAGGED, RING = ExpertParallel("ragged", 1.0), ExpertParallel("ring")
B, T = 8, 12


def rows(seed):
    """Packed rows: two documents each, one row padded at its end."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 64, (B, T + 1)).astype(np.int32)
    segments = np.where(np.arange(T) < rng.integers(3, T - 2, (B, 1)), 1, 2).astype(np.int32)
    segments[3, -4:] = 0
    positions = np.where(segments == 2, np.arange(T) - (segments == 1).sum(1)[:, None], 0)
    positions = np.where(segments == 1, np.arange(T), positions).astype(np.int32)
    weights = (segments > 0).astype(np.float32) * rng.random((B, T)).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, positions, segments)


@functools.cache
def train(config, mesh_text, parallel=ExpertParallel(), pieces=1, remat="none"):  # noqa: B008
    """State after 3 steps from one seed, the metrics of each, and the first gradient."""
    model = DeepSeekV3(config, FLOAT32, remat, parallel)

    def loss_fn(params, bias, batch, totals, step):
        return pretrain_loss(model, params, bias, batch, totals, 0.3)

    devices = jax.devices()[:1] if mesh_text == "data=1" else jax.devices()
    mesh = sharding.make_mesh(mesh_text, devices)
    with jax.set_mesh(mesh):
        where = state_shardings(model, TX, mesh)
        init = functools.partial(init_state, model, TX)
        state = jax.jit(init, out_shardings=where)(jax.random.key(0))
        step = make_train_step(model, TX, loss_fn, lambda step: 0.01)
        step = jax.jit(step, out_shardings=(where, None))
        history = []
        for seed in range(3):
            parts = [Batch(*(x[i::pieces] for x in rows(seed))) for i in range(pieces)]
            state, metrics = step(
                state,
                divide_batch(*parts[0].tokens_BT.shape, mesh).place(parts),
                np.float32(np.inf),
            )
            history.append(jax.device_get(metrics))
    return state, history


def check(config, mesh_text, parallel=ExpertParallel(), **kwargs):  # noqa: B008
    one, one_history = train(config, "data=1")
    many, history = train(config, mesh_text, parallel, **kwargs)
    for expected, got in zip(one_history, history, strict=True):
        np.testing.assert_array_equal(expected["load_LE"], got["load_LE"])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), expected, got
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6),
        *jax.device_get((one.params, many.params)),
    )
    # Adam's first moment is the gradient, averaged: equal moments are equal gradients.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        *jax.device_get((one.opt_state, many.opt_state)),
    )
    assert float(jnp.abs(many.router_bias_LE).max()) > 0
    copies = [np.asarray(shard.data) for shard in many.router_bias_LE.addressable_shards]
    assert len(copies) == 8
    for copy in copies:  # every device holds the same bias
        np.testing.assert_array_equal(copy, np.asarray(one.router_bias_LE))


@pytest.mark.parametrize(
    ("mesh", "parallel"),
    [
        pytest.param("expert=8", RAGGED, marks=pytest.mark.slow),
        ("fsdp=2,expert=2,tensor=2", RING),
        ("expert=2,context=2,tensor=2", RAGGED),
    ],
)
def test_eight_devices_train_as_one(mesh, parallel):
    check(V3, mesh, parallel)


@pytest.mark.slow
def test_interleaved_halves_train_as_one():
    """Two rows per device, each a half."""
    config = V3.replace(num_hidden_layers=2, num_nextn_predict_layers=0)
    check(config, "expert=4,tensor=2", ExpertParallel("ragged", overlap=True))


def test_halves_need_an_even_number_of_rows():
    with pytest.raises(UserError, match="even number of rows on every device, not 1"):
        train(V3, "expert=8", ExpertParallel("ragged", overlap=True))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [RAGGED, RING])
@pytest.mark.parametrize("config", [V3, V2, V2.replace(seq_aux=False)])
@pytest.mark.parametrize(
    "mesh",
    [
        "expert=8",
        "data=8",
        "fsdp=8",
        "data=4,tensor=2",
        "fsdp=2,context=4",
        "data=2,context=4",
        "expert=4,context=2",
        "data=2,expert=2,context=2",
        "data=2,fsdp=2,expert=2",
        "expert=4,tensor=2",
    ],
)
def test_eight_devices_train_as_one_on_every_mesh(mesh, config, parallel):
    check(config, mesh, parallel)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "selective"])
def test_with_accumulation_and_rematerialisation(remat):
    check(V3, "data=2,fsdp=2,context=2", pieces=2, remat=remat)


def test_random_parameters_are_the_same_on_any_mesh():
    model = DeepSeekV3(V3, FLOAT32)
    init = functools.partial(init_params, model)
    whole = jax.jit(init)(jax.random.key(0))
    mesh = sharding.make_mesh("fsdp=2,expert=2,tensor=2")
    where = jax.tree.map(lambda x: x.sharding, sharded_params(model, mesh))
    with jax.set_mesh(mesh):
        sharded = jax.jit(init, out_shardings=where)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((whole, sharded)))
    experts = np.asarray(whole["moe_layers"]["moe"]["w1"]).reshape(-1, 24 * 20)
    assert len(np.unique(experts[:, 0])) == len(experts)  # no two from one key
    assert experts.std() == pytest.approx(V3.initializer_range, rel=0.02)


# --- the dispatchers alone -------------------------------------------------------------------

E, D, F, K = 8, 16, 12, 3


def routing(kind, tokens):
    rng = np.random.default_rng(0)
    if kind == "even":
        return np.stack([rng.permutation(E)[:K] for _ in range(tokens)])
    if kind == "one device":  # all to the first experts; six of eight devices get nothing
        return np.tile(np.arange(K), (tokens, 1))
    if kind == "last":  # one expert takes every token
        others = np.stack([rng.permutation(E - 1)[: K - 1] for _ in range(tokens)])
        return np.concatenate([others, np.full((tokens, 1), E - 1)], axis=1)
    return np.where(np.arange(tokens)[:, None] < tokens // 2, np.arange(K), E - 1 - np.arange(K))


@pytest.mark.parametrize("kind", ["even", "one device", "last", "halves"])
@pytest.mark.parametrize("mesh_text", ["expert=8", "expert=4,tensor=2", "data=4,expert=2"])
def test_dispatchers_agree_with_one_device(kind, mesh_text):
    """Value and every gradient, with one round and with several."""
    tokens = 48
    rng = np.random.default_rng(1)
    x = rng.standard_normal((tokens, D)).astype(np.float32)
    gates = rng.random((tokens, K)).astype(np.float32)
    experts = routing(kind, tokens).astype(np.int32)
    weights = ExpertWeights(
        *(rng.standard_normal(s).astype(np.float32) for s in ((E, D, F), (E, D, F), (E, F, D)))
    )
    ct = rng.standard_normal((tokens, D)).astype(np.float32)

    def run(fn):
        def value(x, gates, weights):
            return fn(x, jnp.asarray(experts), gates, weights)

        y, pullback = jax.vjp(value, x, gates, weights)
        return y, pullback(ct)

    def alone(*args):
        return local_experts(*args, FLOAT32).y_TD

    expected = jax.jit(lambda: run(alone))()
    mesh = sharding.make_mesh(mesh_text)
    names = ("expert", None, "expert_mlp"), ("expert", None, "expert_mlp")
    specs = ExpertWeights(*(sharding.spec(*n) for n in (*names, ("expert", "expert_mlp_in", None))))
    rows = sharding.spec("batch", None)
    for parallel in (RAGGED, ExpertParallel("ragged", 100.0), RING):

        def sharded(x, experts, gates, weights, parallel=parallel):
            return sharding.per_device(
                lambda x, experts, gates, weights: routed_experts(
                    [Chosen(x, experts, gates)], weights, FLOAT32, parallel
                )[0],
                in_specs=(rows, rows, rows, specs),
                out_specs=rows,
            )(x, experts, gates, weights)

        with jax.set_mesh(mesh):
            got = jax.jit(lambda sharded=sharded: run(sharded))()
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), expected, got
        )


def test_a_small_buffer_means_more_rounds_and_not_fewer_tokens():
    """All tokens to three devices of eight, with room for a fraction of them at a time."""
    from deepseek_jax.model import dispatch

    seen = []

    def spy(one_round):
        run = original(one_round)

        def wrapped(x, gates, weights, out):
            jax.debug.callback(lambda n: seen.append(int(n)), out[0].rounds)
            return run(x, gates, weights, out)

        return wrapped

    original = dispatch._all_rounds
    dispatch._all_rounds = spy
    try:
        test_dispatchers_agree_with_one_device("one device", "expert=8")
    finally:
        dispatch._all_rounds = original
    # Each of the three gets 48 pairs, and the 18 of perfect balance fit at a time.
    assert max(seen) == 3


def test_node_limits_bound_the_receivers():
    assert most_receivers(8, 8, 8, 4) == 4  # V3 on 8 devices, one group each
    assert most_receivers(8, 4, 8, 4) == 4  # two groups each
    assert most_receivers(8, 2, 8, 4) == 2
    assert most_receivers(8, 64, 8, 4) == 8
    assert most_receivers(6, 64, 1, 1) == 6
    assert most_receivers(8, 16, 8, 2) == 4
    assert most_receivers(8, 6, 8, 2) == 6  # groups lie across devices: no use


def test_bfloat16_combines_as_one_device_does():
    """Dispatched in BF16 and summed in float32: within a rounding of the one-device result."""
    tokens, mesh = 64, sharding.make_mesh("expert=8")
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((tokens, D)), jnp.bfloat16)
    gates = jnp.asarray(rng.random((tokens, K)), jnp.float32)
    experts = jnp.asarray(routing("even", tokens), jnp.int32)
    weights = ExpertWeights(
        *(
            jnp.asarray(rng.standard_normal(s) / 4, jnp.bfloat16)
            for s in ((E, D, F), (E, D, F), (E, F, D))
        )
    )
    precision = Precision()
    expected = jax.jit(lambda: local_experts(x, experts, gates, weights, precision).y_TD)()
    rows, own = sharding.spec("batch", None), sharding.spec("expert")
    for parallel in (RAGGED, RING):
        with jax.set_mesh(mesh):
            got = jax.jit(
                sharding.per_device(
                    lambda x, experts, gates, weights, parallel=parallel: routed_experts(
                        [Chosen(x, experts, gates)], weights, precision, parallel
                    )[0],
                    in_specs=(rows, rows, rows, ExpertWeights(own, own, own)),
                    out_specs=rows,
                )
            )(x, experts, gates, weights)
        assert got.dtype == jnp.bfloat16
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(got.astype(np.float32), expected, atol=2**-7 * scale)


# --- tokens in FP8 ---------------------------------------------------------------------------


def fp8_layer(parallel, mesh_text="expert=4", skew="even", matmuls="fp8"):
    """A function of (x, gates, weights) -> the layer's output; and arguments for it."""
    width, inner, tokens = 256, 128, 32
    rng = np.random.default_rng(3)
    # Rows of very different size, which a scale a tile must meet.
    x = rng.standard_normal((tokens, width)) * 10.0 ** rng.integers(-3, 2, (tokens, 1))
    shapes = (E, width, inner), (E, width, inner), (E, inner, width)
    weights = (jnp.asarray(rng.standard_normal(s) / 12, jnp.float32) for s in shapes)
    gates = jnp.asarray(rng.random((tokens, K)), jnp.float32)
    args = jnp.asarray(x, jnp.bfloat16), gates, ExpertWeights(*weights)
    experts = jnp.asarray(routing(skew, tokens), jnp.int32)
    precision = Precision(matmuls=matmuls)
    if parallel is None:

        def alone(x, gates, weights):
            out = local_experts(x, experts, gates, weights, precision)
            return out.with_gradient(jnp.bfloat16).astype(jnp.bfloat16)

        return args, alone
    rows, own = sharding.spec("batch", None), sharding.spec("expert")

    def layer(x, gates, weights):
        return sharding.per_device(
            lambda x, experts, gates, weights: routed_experts(
                [Chosen(x, experts, gates)], weights, precision, parallel
            )[0],
            in_specs=(rows, rows, rows, ExpertWeights(own, own, own)),
            out_specs=rows,
        )(x, experts, gates, weights)

    return args, layer


def with_gradients(layer, args):
    def run(args):
        y, pullback = jax.vjp(layer, *args)
        # As a loss has it: of another size for every row.
        return y, pullback(jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype))

    return jax.jit(run)(args)


def relative(got, want):
    got, want = (np.asarray(a, np.float32) for a in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def four_devices():
    return sharding.make_mesh("expert=4", jax.devices()[:4])


@pytest.mark.parametrize("skew", ["even", "one device"])
def test_fp8_dispatchers_agree_with_one_device(skew):
    args, alone = fp8_layer(None, skew=skew)
    expected = with_gradients(alone, args)
    for parallel in (ExpertParallel("ragged", 100.0), RAGGED, RING):
        _, layer = fp8_layer(parallel, skew=skew)
        with jax.set_mesh(four_devices()):
            got = with_gradients(layer, args)
        assert got[1][0].dtype == jnp.bfloat16
        # Values and scales arrive as they left. In one round only sums are rounded otherwise;
        # several rounds, like the ring, give the weight gradient other tiles along the rows.
        bound = 4e-3 if parallel.receive_factor == 100 else 4e-2
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert relative(a, b) < bound


def test_fp8_tokens_are_close_to_bfloat16_ones():
    """Also their gradients: straight through the rounding."""
    args, in_bf16 = fp8_layer(None, matmuls="compute")
    expected = with_gradients(in_bf16, args)
    _, layer = fp8_layer(ExpertParallel("ragged", 100.0))
    with jax.set_mesh(four_devices()):
        got = with_gradients(layer, args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert 1e-3 < relative(a, b) < 0.1  # E4M3 rounds by 2^-4 at most, 2.6% RMS


def sent_by(layer, args, width):
    """How many of the widest arrays each collective of a program has, by dtype."""
    counts: dict[str, int] = {}

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            # On CPU ragged messages are gathered.
            if eqn.primitive.name in ("ppermute", "all_gather"):
                for v in eqn.invars:
                    if v.aval.ndim == 2 and v.aval.shape[1] == width:
                        counts[str(v.aval.dtype)] = counts.get(str(v.aval.dtype), 0) + 1
            for inner in jaxprs_in_params(eqn.params):
                visit(inner)

    visit(jax.make_jaxpr(layer)(*args).jaxpr)
    return counts


def test_tokens_leave_in_fp8_and_come_back_in_bfloat16():
    args, layer = fp8_layer(ExpertParallel("ragged", 100.0))
    with jax.set_mesh(four_devices()):
        assert sent_by(layer, args, 256) == {"uint8": 1, "bfloat16": 1}
        # Backward: the gradients of what came back go out, and those of the tokens come home.
        both = sent_by(lambda *a: jax.vjp(layer, *a)[1](jnp.ones_like(a[0])), args, 256)
        assert both == {"uint8": 2, "bfloat16": 2}
        _, ring = fp8_layer(RING)
        assert sent_by(ring, args, 256) == {"uint8": 1, "float32": 1}
        both = sent_by(lambda *a: jax.vjp(ring, *a)[1](jnp.ones_like(a[0])), args, 256)
        assert both == {"uint8": 2, "float8_e4m3fn": 1, "float32": 2}


def test_a_buffer_too_small_for_balance_is_refused():
    with pytest.raises(UserError, match=r"receive_factor=0\.5"):
        ExpertParallel(receive_factor=0.5)


# --- decoding --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh_text", "parallel"), [("fsdp=2,expert=4", RAGGED), ("expert=4,tensor=2", RING)]
)
def test_decoding_per_device_equals_one_device(mesh_text, parallel):
    """From a filled cache, with weights placed as serving has them."""
    model = DeepSeekV3(V3, FLOAT32, parallel=parallel)
    params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
    bias, held = init_router_bias(V3), jnp.arange(8, dtype=jnp.int32)
    cache = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(1), x.shape), init_cache(V3, 8, 12)
    )
    cache = cache._replace(length_B=held)
    tokens = jax.random.randint(jax.random.key(2), (8, 1), 0, V3.vocab_size)
    step = functools.partial(decode_step, model)
    logits, after = jax.jit(step)(params, bias, tokens, cache)
    mesh = sharding.make_mesh(mesh_text)
    where = jax.tree.map(lambda x: x.sharding, sharded_params(model, mesh, stored=False))
    with jax.set_mesh(mesh):
        found, found_after = jax.jit(step)(jax.device_put(params, where), bias, tokens, cache)
    np.testing.assert_allclose(found, logits, atol=2e-5)
    np.testing.assert_allclose(found_after.c_kv_LBSR, after.c_kv_LBSR, atol=2e-5)
    np.testing.assert_array_equal(found_after.length_B, held + 1)


def test_a_weight_of_another_shape_is_named():
    model = DeepSeekV3(V3, FLOAT32)
    params = abstract_params(model)
    params["norm"] = jax.ShapeDtypeStruct((23,), jnp.float32)
    tokens = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(UserError, match=r"parameter norm has shape \(23,\), not \(24,\)"):
        jax.eval_shape(lambda p: model.apply({"params": p}, tokens, init_router_bias(V3)), params)
