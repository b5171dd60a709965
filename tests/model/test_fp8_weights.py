"""Weights kept in FP8: the same numbers as multiplied out on loading, wherever blocks are cut."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import DeepSeekV3, UserError, sharding
from deepseek_jax.config import FLOAT32
from deepseek_jax.convert import fp8_params, load_hf
from deepseek_jax.generate import Engine, EngineConfig, Request, Sampling, slots
from deepseek_jax.generate import engine as generate_engine
from deepseek_jax.generate.engine import serving_params
from deepseek_jax.model.dispatch import ExpertParallel
from deepseek_jax.model.transformer import (
    init_cache,
    logical_axes,
    serving_variables,
    sharded_params,
)
from deepseek_jax.train.lora import LoraConfig, adapters, attach, init_adapter
from deepseek_jax.train.losses import Totals, pretrain_loss
from deepseek_jax.types import Batch
from tests.convert_folders import V3, random_tensors, write_folder

E4M3 = jnp.float8_e4m3fn
# Divided by 2 or 4, every matrix is cut inside its blocks: 4 heads of 48 are a block and a half.
CONFIG = V3.replace(
    vocab_size=64,
    hidden_size=160,
    num_hidden_layers=2,
    first_k_dense_replace=0,
    num_attention_heads=4,
    q_lora_rank=136,
    kv_lora_rank=144,
    qk_nope_head_dim=40,
    v_head_dim=40,
    moe_intermediate_size=272,
    n_routed_experts=8,
    n_group=4,
    max_position_embeddings=64,
    num_nextn_predict_layers=0,
)
MESHES = ["expert=2,tensor=2,fsdp=2", "context=2,tensor=4"]
MODEL = DeepSeekV3(CONFIG, FLOAT32)
B, T = 8, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tensors = random_tensors(CONFIG, fp8=True)
    return write_folder(tmp_path_factory.mktemp("fp8"), CONFIG, tensors)


@pytest.fixture(scope="module")
def kept(folder):
    return load_hf(folder, dtype="fp8")[1:]


@pytest.fixture(scope="module")
def plain(folder):
    return load_hf(folder, dtype="float32")[1:]


@pytest.fixture(scope="module")
def expected(plain):
    return all_logits()(*plain, tokens())


def tokens(seed=0):
    return jax.random.randint(jax.random.key(seed), (B, T), 0, CONFIG.vocab_size)


def all_logits(model=MODEL, *, jitted=True):
    """Of the main head and the MTP module's; per device under a mesh, as in training."""

    def local(params, bias, tokens):
        hidden = model.apply({"params": params}, tokens, bias, tokens, method="hidden")
        states = jnp.concatenate((hidden.main_BTD, *hidden.mtp_BTD), axis=2)
        states = states.reshape(*tokens.shape, -1, CONFIG.hidden_size)
        head = model.apply({"params": params}, method="head")
        return sharding.all_gather(jnp.einsum("btkd,dv->btkv", states, head), "vocab", 3)

    def run(params, bias, tokens):
        mesh = jax.sharding.get_abstract_mesh()
        specs = sharding.param_specs(mesh, logical_axes(model), params)
        rows = sharding.spec("batch", "sequence")
        program = sharding.per_device(local, (specs, sharding.spec(), rows), rows)
        return program(params, bias, tokens)

    return jax.jit(run) if jitted else run


def test_a_quarter_of_float32_in_bytes(kept, plain):
    kept, plain = (tree[0]["moe_layers"]["moe"] for tree in (kept, plain))
    assert kept["w1"].dtype == E4M3
    assert kept["w1"].nbytes * 4 == plain["w1"].nbytes
    assert kept["w1_scale"].shape == (2, 8, 2, 3)  # layers, experts, 160 / 128, 272 / 128


def test_logits_are_those_of_weights_multiplied_out_on_loading(kept, expected):
    np.testing.assert_array_equal(all_logits()(*kept, tokens()), expected)


def test_on_gpus_the_contracted_axes_lie_last_and_nothing_else_changes(kept, expected):
    params, bias = kept
    names = sharding.axes_of(logical_axes(MODEL), params)
    laid = jax.tree.map_with_path(
        lambda path, x, axes: generate_engine._for_gpu(path[-1].key, x, axes), params, names
    )

    def order(*path):
        return functools.reduce(
            lambda tree, key: tree[key], path, laid
        ).format.layout.major_to_minor

    assert order("moe_layers", "moe", "w1") == (0, 1, 3, 2)  # layers, experts, outputs, inputs
    assert order("moe_layers", "attn", "wq_b") == (0, 2, 3, 1)
    assert order("moe_layers", "attn", "wo") == (0, 3, 1, 2)
    assert order("moe_layers", "attn", "wkv_b") == (0, 1, 2, 3)
    assert order("embed") == (0, 1)
    np.testing.assert_array_equal(all_logits()(laid, bias, tokens()), expected)


@pytest.mark.slow
def test_dense_layers_and_the_mtp_module(tmp_path):
    config = CONFIG.replace(num_nextn_predict_layers=1, first_k_dense_replace=1)
    folder = write_folder(tmp_path, config, random_tensors(config, fp8=True))
    run = all_logits(DeepSeekV3(config, FLOAT32))
    kept, plain = (load_hf(folder, dtype=dtype)[1:] for dtype in ("fp8", "float32"))
    np.testing.assert_array_equal(run(*kept, tokens()), run(*plain, tokens()))


@pytest.mark.parametrize("mesh_text", [MESHES[0], pytest.param(MESHES[1], marks=pytest.mark.slow)])
def test_every_device_takes_the_scales_of_its_own_part(mesh_text, folder, kept, expected):
    mesh = sharding.make_mesh(mesh_text)
    _, params, bias = load_hf(folder, dtype="fp8", mesh=mesh)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves(kept[0]), strict=True
    ):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path
    with jax.set_mesh(mesh):
        got = all_logits()(params, bias, tokens())
        jaxpr = str(jax.make_jaxpr(all_logits(jitted=False))(params, bias, tokens()))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    # What crosses the network of w1, of which a device has half the rows or less, is FP8.
    gathers = [line for line in jaxpr.splitlines() if "= all_gather[" in line]
    assert any("f8_e4m3fn[160," in line for line in gathers)
    assert not any("f32[160,136]" in line or "f32[160,152]" in line for line in gathers)


def test_absorbed_attention_multiplies_out_too(kept, expected):
    """Eight tokens over an empty cache, by decoding's form of attention."""
    decode = jax.jit(functools.partial(MODEL.apply, method="decode"))
    params = serving_params(MODEL, kept[0])
    logits, _ = decode({"params": params}, tokens(), kept[1], init_cache(CONFIG, B, T))
    expected = expected[:, :, 0]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("mesh_text", ["", *MESHES])
def test_the_engine_serves_fp8(mesh_text, kept, plain):
    """Greedy text is the argmax of the full forward, and what is in FP8 is not copied."""
    sizes = EngineConfig(slots=4, max_length=T, lanes=2, prefill_chunk=4, rounds=2)
    prompts = [[1 + i, 7, 3 * i, 9] for i in range(3)]
    requests = [Request(prompt, Sampling(T - 4, temperature=0.0)) for prompt in prompts]
    (params, bias), under = kept, contextlib.nullcontext()
    if mesh_text:
        mesh = sharding.make_mesh(mesh_text.replace("context", "data"))
        abstract = fp8_params(CONFIG, sharded_params(MODEL, mesh, stored=False))
        params = jax.device_put(params, jax.tree.map(lambda x: x.sharding, abstract))
        bias, under = jax.device_put(bias, sharding.sharding(mesh)), jax.set_mesh(mesh)
    with under:
        engine = Engine(MODEL, params, bias, sizes)
        found = {c.request: c.tokens for c in engine.generate(requests)}
    texts = np.zeros((B, T), np.int32)
    texts[:3] = [[*prompt, *found[i]] for i, prompt in enumerate(prompts)]
    following = np.asarray(all_logits()(*plain, jnp.asarray(texts)))[:, :, 0].argmax(-1)
    for i in range(3):
        assert found[i] == following[i, 3:-1].tolist()
    served, given = (tree["moe_layers"]["moe"] for tree in (engine._params, params))
    assert served["w1"] is given["w1"]
    assert served["w1_scale"].dtype == jnp.float32


# --- products in FP8 -------------------------------------------------------------------------

IN_FP8 = DeepSeekV3(CONFIG, dataclasses.replace(FLOAT32, matmuls="fp8"))


@pytest.mark.slow
def test_products_in_fp8_take_the_stored_weights(tmp_path):
    """Quantized from the multiplied-out ones they are the same again: 448 is in every block.

    Keys' and values' columns of ``wkv_b`` are quantized apart; here, as in V3, they are whole
    blocks. Scales may differ in the last bit.
    """
    config = CONFIG.replace(qk_nope_head_dim=128, v_head_dim=128)
    folder = write_folder(tmp_path, config, random_tensors(config, fp8=True))
    kept, plain = (load_hf(folder, dtype=dtype)[1:] for dtype in ("fp8", "float32"))
    model = dataclasses.replace(IN_FP8, config=config)
    run = all_logits(model)
    got, expected = run(*kept, tokens()), run(*plain, tokens())
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-3 * np.abs(expected).max())
    traced = all_logits(model, jitted=False)
    quantizing_wkv_b = "f8_e4m3fn[2,128,4,128] = convert_element_type"  # either half: 144 x 512
    assert quantizing_wkv_b not in str(jax.make_jaxpr(traced)(*kept, tokens()))
    assert quantizing_wkv_b in str(jax.make_jaxpr(traced)(*plain, tokens()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh_text", "dispatcher"), [("expert=4,tensor=2", "ring"), ("expert=8", "ragged")]
)
def test_products_in_fp8_on_a_mesh(mesh_text, dispatcher, folder, plain):
    """What a mesh cuts inside blocks is multiplied out first: the same by FP8's rounding."""
    expected = all_logits(IN_FP8)(*plain, tokens())
    mesh = sharding.make_mesh(mesh_text)
    _, params, bias = load_hf(folder, dtype="fp8", mesh=mesh)
    model = dataclasses.replace(IN_FP8, parallel=ExpertParallel(dispatcher))
    with jax.set_mesh(mesh):
        got = np.asarray(all_logits(model)(params, bias, tokens()))
    assert np.abs(got - expected).mean() < 0.1 * np.std(expected)


def decoded(model, variables, bias):
    """Logits by decoding's form of attention."""
    decode = functools.partial(model.apply, method="decode")
    return decode(variables, tokens(), bias, init_cache(model.config, B, T))[0]


def test_decoding_in_fp8_reads_layers_in_their_stacks(kept):
    """The same to the last bit as with every layer's own slices, none of which is cut."""
    params, bias = kept
    variables = serving_variables(IN_FP8, params)
    run = functools.partial(decoded, IN_FP8)
    got, want = (jax.jit(run)(v, bias) for v in (variables, {"params": params}))
    np.testing.assert_array_equal(got, want)
    attn = variables["params"]["moe_layers"]["attn"]
    assert attn["wo"].tolist() == [0, 1]
    assert attn["wkv_b"] is params["moe_layers"]["attn"]["wkv_b"]
    # The loop over layers takes what it slices as arrays of all layers, less an axis.
    jaxpr = jax.make_jaxpr(run)(variables, bias)
    scans = [e for e in jaxpr.eqns if e.primitive.name == "scan" and e.params["length"] == 2]
    assert scans
    for scan in scans:
        first = scan.params["num_consts"] + scan.params["num_carry"]
        sliced = [v.aval for v in scan.invars[first:] if v.aval.dtype == E4M3]
        assert [aval.shape for aval in sliced] == [(2, 144, 4, 80)], "wkv_b alone"


def test_what_has_an_adapter_is_not_left_in_its_stack(kept):
    config = LoraConfig(lora_rank=3, lora_targets=("attention",))
    params = attach(kept[0], init_adapter(IN_FP8, config, jax.random.key(0)), 1.0)
    stacks = serving_variables(IN_FP8, params)["stacks"]["moe_layers"]
    assert not stacks["attn"]
    assert "w1" in stacks["moe"]


@pytest.mark.slow
def test_the_engine_in_fp8_says_the_same_out_of_stacks(kept, monkeypatch):
    sizes = EngineConfig(slots=4, max_length=T, lanes=2, prefill_chunk=4, rounds=2)
    requests = [Request([1 + i, 7, 3 * i, 9], Sampling(T - 4, temperature=0.0)) for i in range(3)]

    def said():
        jax.clear_caches()
        return {c.request: c.tokens for c in Engine(IN_FP8, *kept, sizes).generate(requests)}

    found = said()
    monkeypatch.setattr(slots, "serving_variables", lambda _, params: {"params": params})
    assert found == said()


@pytest.mark.parametrize("name", ["wo", "wo_scale"])
def test_a_stack_of_another_shape_is_refused(name, kept):
    moe = kept[0]["moe_layers"]
    attn = moe["attn"] | {name: moe["attn"][name][..., :1]}
    params = kept[0] | {"moe_layers": moe | {"attn": attn}}
    run = functools.partial(decoded, IN_FP8)
    with pytest.raises(UserError, match=rf"attn/{name} has shape .* do the weights belong"):
        jax.eval_shape(run, serving_variables(IN_FP8, params), kept[1])


# --- LoRA ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets",
    [("attention",), pytest.param(("attention", "ffn", "experts"), marks=pytest.mark.slow)],
)
def test_gradients_of_an_adapter_are_those_over_the_multiplied_out_base(targets, kept, plain):
    model = MODEL if len(targets) == 1 else dataclasses.replace(MODEL, remat="full")
    config = LoraConfig(lora_rank=3, lora_targets=targets)

    @jax.jit
    def random_adapter(key):
        adapter = init_adapter(model, config, key)
        return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), adapter)

    adapter = random_adapter(jax.random.key(1))
    ones = jnp.ones((B, T), jnp.int32)
    batch = Batch(tokens(), tokens(1), ones.astype(jnp.float32), jnp.cumsum(ones, 1) - 1, ones)
    totals = Totals(batch.loss_weights_BT.sum(), jnp.int32(1))

    @jax.jit
    def gradients(adapter, base, bias):
        def loss(adapter):
            both = attach(base, adapter, config.scale)
            return pretrain_loss(model, both, bias, batch, totals, None)[0]

        return jax.grad(loss)(adapter)

    found, expected = gradients(adapter, *kept), gradients(adapter, *plain)
    assert jax.tree.structure(found) == jax.tree.structure(adapters(model, config)[0])
    for (path, a), b in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        assert np.abs(b).max() > 0, path
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max(), err_msg=str(path))


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh_text", "change", "said"),
    [
        ("", lambda attn: attn.pop("wo_scale"), "wo is in FP8, but wo_scale.*dtype='fp8'"),
        (MESHES[0], lambda attn: attn.pop("wo_scale"), "wo is in FP8, but wo_scale"),
        (
            "",
            lambda attn: attn.update(wo_scale=attn["wo_scale"][..., :1]),
            r"wo_scale has shape \(2, 1\), not \(2, 2\); do the weights belong to this config",
        ),
        # Without a mesh nobody looks at what nothing reads.
        (
            MESHES[0],
            lambda attn: attn.update(wx_scale=attn["wo_scale"]),
            "no parameter 'wx_scale'",
        ),
    ],
)
def test_bad_scales_are_refused(mesh_text, change, said, kept):
    moe = kept[0]["moe_layers"]
    attn = dict(moe["attn"])
    change(attn)
    params = kept[0] | {"moe_layers": moe | {"attn": attn}}
    under = jax.set_mesh(sharding.make_mesh(mesh_text)) if mesh_text else contextlib.nullcontext()
    with under, pytest.raises(UserError, match=said):
        jax.eval_shape(all_logits(jitted=False), params, kept[1], tokens())


def test_a_folder_without_fp8_has_none_to_keep(tmp_path):
    folder = write_folder(tmp_path / "bf16", CONFIG, random_tensors(CONFIG))
    with pytest.raises(UserError, match=r"holds no FP8 weights.*--dtype fp8"):
        load_hf(folder, dtype="fp8")


def test_what_is_read_and_what_a_run_directory_is_read_into_agree(kept):
    mesh = sharding.make_mesh("data=8")
    said = fp8_params(CONFIG, sharded_params(MODEL, mesh))
    for (path, a), b in zip(jax.tree.leaves_with_path(said), jax.tree.leaves(kept[0]), strict=True):
        assert a.shape == b.shape, path
        assert (a.dtype == E4M3) == (b.dtype == E4M3), path
