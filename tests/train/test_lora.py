"""LoRA: merged equals unmerged, the base stays as it is, the adapter alone is saved."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import sharding
from deepseek_jax.checkpoint import load_params
from deepseek_jax.checkpoint.trees import flatten, stored_tree
from deepseek_jax.config import FLOAT32
from deepseek_jax.convert import convert_to_hf, convert_to_orbax, export_hf, load_hf
from deepseek_jax.data.sft import ConversationConfig
from deepseek_jax.model.transformer import DeepSeekV3, abstract_params, init_params
from deepseek_jax.plan.compile import training_step
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.lora import LoraConfig, adapters, attach, init_adapter, merge
from deepseek_jax.train.optim import OptimConfig
from deepseek_jax.train.sft import SFT_OPTIM, SftConfig, sft
from deepseek_jax.types import UserError
from tests.configs import MICRO
from tests.train import runs

LORA = LoraConfig(lora_rank=4, lora_alpha=8.0)


def random_adapter(model: DeepSeekV3, config: LoraConfig):
    adapter = init_adapter(model, config, jax.random.key(1))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), adapter)


def logits(model, params, tokens):
    bias = jnp.zeros((model.config.num_routers, model.config.n_routed_experts))
    return model.apply({"params": params}, tokens, bias)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"num_nextn_predict_layers": 0}, id="main"),
        pytest.param({"num_nextn_predict_layers": 1}, id="mtp", marks=pytest.mark.slow),
        pytest.param({"q_lora_rank": None}, id="direct_q", marks=pytest.mark.slow),
    ],
)
def test_merged_logits_are_the_unmerged_ones(changes):
    model = DeepSeekV3(MICRO.replace(**changes), FLOAT32)
    base = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    adapter = random_adapter(model, LORA)
    tokens = jax.random.randint(jax.random.key(3), (2, 9), 0, MICRO.vocab_size)
    run = jax.jit(lambda params: logits(model, params, tokens))
    plain = run(base)
    unmerged = run(attach(base, adapter, LORA.scale))
    merged = run(merge(base, adapter, LORA.scale))
    for a, b, c in zip(*map(jax.tree.leaves, (unmerged, merged, plain)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
        assert np.abs(a - c).max() > 0.01 * np.abs(c).max()  # it does something
    fresh = run(attach(base, init_adapter(model, LORA, jax.random.key(1)), LORA.scale))
    for a, c in zip(*map(jax.tree.leaves, (fresh, plain)), strict=True):
        np.testing.assert_array_equal(a, c)  # and nothing at first


@pytest.mark.parametrize(
    ("targets", "matrices"),
    [
        (("attention",), {"wq_a", "wq_b", "wkv_a", "wkv_b", "wo"}),
        (("ffn",), {"w1", "w2", "w3"}),
        (("experts",), {"w1", "w2", "w3"}),
    ],
)
def test_targets_are_what_they_say(targets, matrices):
    model = DeepSeekV3(MICRO, FLOAT32)
    shapes, axes = adapters(model, LoraConfig(lora_rank=4, lora_targets=targets))
    names = flatten(shapes)
    assert {name.rpartition("/")[2].split("_lora")[0] for name in names} == matrices
    assert ("moe/w1" in " ".join(names)) == (targets == ("experts",))
    whole = flatten(abstract_params(model))
    for name, a in names.items():
        if not name.endswith("_lora_a"):
            continue
        w, b = whole[name.removesuffix("_lora_a")], names[name[:-1] + "b"]
        lead = a.ndim + b.ndim - w.ndim - 2
        assert (*a.shape[:-1], *b.shape[lead + 1 :]) == w.shape
    for shape, own in zip(
        jax.tree.leaves(shapes),
        jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)),
        strict=True,
    ):
        assert len(shape.shape) == len(own)


def test_an_adapter_of_v2_lite_is_a_few_megabytes():
    from deepseek_jax.presets import preset

    model = DeepSeekV3(preset("v2_lite"))
    size = lambda **kw: sum(  # noqa: E731
        4 * math.prod(x.shape) for x in jax.tree.leaves(adapters(model, LoraConfig(**kw))[0])
    )
    attention = size(lora_rank=8, lora_targets=("attention",))
    assert attention < 16e6
    assert size(lora_rank=8) > 10 * attention  # 64 experts have an adapter each


def run_config(root, name, base, mesh, **changes) -> SftConfig:
    data = root / "talks.jsonl"
    lines = [{"prompt": f"what {i}", "completion": f"it {i}"} for i in range(16)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    optim = dataclasses.replace(SFT_OPTIM, peak_lr=1e-2)
    return SftConfig(
        out=root / name,
        init=base,
        mesh=mesh,
        precision=FLOAT32,
        epochs=None,
        conversations=ConversationConfig(data=(str(data),), held_out=(str(data),), seq_len=32),
        loop=LoopConfig(steps=3, batch_size=8, eval_every=0),
        optim=optim,
        lora=LORA,
        samples=0,
        **changes,
    )


@pytest.mark.slow
def test_a_run_saves_the_adapter_alone_and_exports_the_sum(tmp_path):
    base = runs.write_base(tmp_path / "base")
    before = {p: p.read_bytes() for p in base.rglob("*") if p.is_file()}
    result = sft(run_config(tmp_path, "one", base, "data=8"))
    assert result is not None
    assert before == {p: p.read_bytes() for p in base.rglob("*") if p.is_file()}
    model = DeepSeekV3(runs.MODEL, FLOAT32)
    step = tmp_path / "one/checkpoints/3"
    stored = flatten(stored_tree(step / "model")["params"])
    assert set(stored) == set(flatten(adapters(model, LORA)[0]))
    moments = [n for n in flatten(stored_tree(step / "optimizer")) if "mu" in n]
    assert len(moments) == len(stored)  # none for the base
    # What the run ends with differs from the base where it is adapted and only there.
    params, *_ = load_params(base)
    for name, leaf in flatten(params).items():
        same = np.array_equal(leaf, flatten(result.params)[name])
        assert same == (name + "_lora_a" not in stored), name
    with pytest.raises(UserError, match="a LoRA adapter and not a whole model; merge it with"):
        load_params(tmp_path / "one")
    convert_to_hf(tmp_path / "one", tmp_path / "hf", dtype="fp32")
    _, exported, exported_bias = load_hf(tmp_path / "hf")
    for (path, a), b in zip(
        jax.tree.leaves_with_path(exported), jax.tree.leaves(result.params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6, err_msg=str(path))
    np.testing.assert_array_equal(exported_bias, result.outcome.state.router_bias_LE)
    # On other meshes, and from a Hugging Face folder, the same.
    convert_to_hf(base, tmp_path / "base_hf", dtype="fp32")
    other = run_config(tmp_path, "other", tmp_path / "base_hf", "fsdp=2,expert=2,tensor=2")
    again = sft(other)
    assert again is not None
    for a, b in zip(*map(jax.tree.leaves, (again.params, result.params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-4)
    convert_to_hf(tmp_path / "other", tmp_path / "other_hf", dtype="fp32")
    _, exported, _ = load_hf(tmp_path / "other_hf")
    for a, b in zip(*map(jax.tree.leaves, (exported, again.params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_base_in_fp8_stays_as_it_is_and_is_exported_multiplied_out(tmp_path):
    """From a folder and from a run directory, on a mesh; the export is W + A B."""
    plain = runs.write_base(tmp_path / "base")
    convert_to_hf(plain, tmp_path / "hf", dtype="fp8")
    convert_to_orbax(tmp_path / "hf", tmp_path / "run", dtype="fp8")
    lora = dataclasses.replace(LORA, lora_base="fp8")
    _, base, _ = load_hf(tmp_path / "hf", dtype="fp8")
    _, wide, _ = load_hf(tmp_path / "hf", dtype="float32")
    results = []
    for name, mesh in (("hf", "data=8"), ("run", "fsdp=2,expert=2,tensor=2")):
        config = run_config(tmp_path, f"from_{name}", tmp_path / name, mesh)
        result = sft(dataclasses.replace(config, lora=lora, remat="full", samples=1))
        assert result is not None
        found = flatten(result.params)
        for path, leaf in flatten(base).items():
            assert (found[path].dtype == jnp.float8_e4m3fn) == (leaf.dtype == jnp.float8_e4m3fn)
            np.testing.assert_array_equal(
                *(np.asarray(x, np.float32) for x in (found[path], leaf)), err_msg=path
            )
        with pytest.raises(UserError, match="has an adapter beside it"):
            export_hf(tmp_path / "no", runs.MODEL, result.params, np.zeros((2, 8)))
        results.append(adapter := result.outcome.state.params)
        convert_to_hf(tmp_path / f"from_{name}", tmp_path / f"out_{name}", dtype="fp32")
        _, exported, _ = load_hf(tmp_path / f"out_{name}")
        expected = merge(wide, jax.device_get(adapter), LORA.scale)
        for a, b in zip(*map(jax.tree.leaves, (exported, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-4)


def test_what_would_undo_the_saving_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"weights in FP8 are not trained.*--lora-rank"):
        LoraConfig(lora_base="fp8")
    lora = dataclasses.replace(LORA, lora_base="fp8")
    config = dataclasses.replace(run_config(tmp_path, "a", tmp_path, "data=8"), lora=lora)
    with pytest.raises(UserError, match=r"remat=none.*choose --remat selective or full"):
        sft(config)


def test_adapters_lie_as_their_matrices_do():
    mesh = sharding.make_mesh("fsdp=2,expert=2,tensor=2")
    shapes, axes = adapters(DeepSeekV3(MICRO, FLOAT32), LORA)
    specs = flatten(sharding.param_shardings(mesh, axes, shapes))
    assert specs["moe_layers/moe/w1_lora_a"].spec[1] == "expert"
    assert specs["moe_layers/attn/wo_lora_a"].spec[1] in (
        "tensor",
        ("tensor",),
        ("tensor", "expert"),
    )
    assert "fsdp" in specs["moe_layers/attn/wkv_a_lora_a"].spec[1]


def test_a_planned_step_has_moments_for_the_adapter_alone():
    model, mesh = DeepSeekV3(MICRO, FLOAT32), sharding.make_mesh("fsdp=8")
    sizes = [
        training_step(model, OptimConfig(), mesh, 1, 8, 16, lora).arguments
        for lora in (None, LoraConfig(lora_rank=2, lora_targets=("attention",)))
    ]
    assert sizes[1] < sizes[0] / 2  # of three copies one, and little more
