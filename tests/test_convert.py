"""Checkpoints come back from our layout as they went in, bit for bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.checkpoint import load_params
from deepseek_jax.convert import (
    check_hf,
    convert_to_hf,
    convert_to_orbax,
    export_hf,
    hf_from_params,
    load_hf,
    params_from_hf,
)
from deepseek_jax.convert.memory import insert, leaves
from deepseek_jax.model.transformer import DeepSeekV3, abstract_params
from deepseek_jax.presets import preset
from deepseek_jax.types import UserError
from tests.convert_folders import V2_LITE, V3, as_read, random_tensors, read_folder, write_folder

CASES = {
    "v3": (V3, "BF16", False),
    "v3_float32": (V3, "F32", False),
    "v3_fp8": (V3, "BF16", True),
    "v3_two_mtp": (V3.replace(num_nextn_predict_layers=2, first_k_dense_replace=0), "BF16", False),
    "v2_lite": (V2_LITE, "BF16", False),
    "v2_lite_fp8": (V2_LITE, "BF16", True),
    "v2_no_shared": (V2_LITE.replace(n_shared_experts=0), "F32", False),
}
ODD_SHARDS = 100_000  # bytes: many shards, some of one tensor


def export_dtype(dtype, fp8):
    return "fp8" if fp8 else {"BF16": "bf16", "F32": "fp32"}[dtype]


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    config, dtype, fp8 = CASES[request.param]
    tensors = random_tensors(config, dtype, fp8)
    folder = write_folder(tmp_path / "hf", config, tensors)
    return config, tensors, folder, export_dtype(dtype, fp8)


def test_round_trip_in_memory(case, tmp_path):
    config, tensors, folder, dtype = case
    loaded, params, router_bias = load_hf(folder, dtype="fp8" if dtype == "fp8" else None)
    assert loaded == config
    export_hf(tmp_path / "back", loaded, params, router_bias, dtype=dtype, shard_size=ODD_SHARDS)
    assert read_folder(tmp_path / "back") == as_read(tensors)
    assert check_hf(tmp_path / "back").ok


def test_round_trip_through_a_run_directory(case, tmp_path):
    _, tensors, folder, dtype = case
    kept = "fp8" if dtype == "fp8" else None
    convert_to_orbax(folder, tmp_path / "run", dtype=kept)
    params, router_bias, _ = load_params(tmp_path / "run")
    expected = load_hf(folder, dtype=kept)
    jax.tree.map(assert_same, (params, router_bias), expected[1:])

    convert_to_hf(tmp_path / "run", tmp_path / "back", dtype=dtype, shard_size=ODD_SHARDS)
    assert read_folder(tmp_path / "back") == as_read(tensors)


def assert_same(a, b):
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_streams_and_memory_agree(tmp_path):
    """The in-memory functions are the definition; files and chunks must not change anything."""
    tensors = random_tensors(V3, "F32")
    folder = write_folder(tmp_path, V3, tensors)
    params, bias = params_from_hf(V3, lambda name: tensors[name][1])
    _, loaded, loaded_bias = load_hf(folder)
    jax.tree.map(assert_same, (loaded, loaded_bias), (params, bias))
    back = hf_from_params(V3, params, bias)
    assert back.keys() == tensors.keys()
    for name, x in back.items():
        np.testing.assert_array_equal(x, tensors[name][1], err_msg=name)


@pytest.mark.parametrize("name", ["tiny", "mini", "moonlight_16b", "v2", "v3", "kimi_k2"])
def test_leaves_are_exactly_the_parameters_of_the_model(name):
    config = preset(name)
    tree = {}
    for leaf in leaves(config):
        insert(tree, leaf.path, leaf.shape)
    tree.pop("router_bias", None)
    expected = jax.tree.map(lambda x: x.shape, abstract_params(DeepSeekV3(config)))
    assert tree == {"params": expected}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_weights_are_multiplied_out(dtype, tmp_path):
    tensors = random_tensors(V3, fp8=True)
    _, params, _ = load_hf(write_folder(tmp_path, V3, tensors), dtype=dtype)
    name = "model.layers.2.mlp.experts.4.down_proj.weight"
    scale = tensors[name + "_scale_inv"][1]
    blown_up = np.kron(scale, np.ones((128, 128), np.float32))[:131, :133]
    expected = (tensors[name][1].astype(np.float32) * blown_up).T.astype(jnp.dtype(dtype))
    assert_same(params["moe_layers"]["moe"]["w2"][1, 4], expected)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_writing_fp8(scale_fmt, tmp_path):
    """A block's largest value lands on 448 (below, with power-of-two scales); errors are small."""
    tensors = random_tensors(V3, "F32")
    folder = write_folder(tmp_path / "hf", V3, tensors)
    config, params, bias = load_hf(folder)
    export_hf(tmp_path / "fp8", config, params, bias, dtype="fp8", scale_fmt=scale_fmt)
    assert check_hf(tmp_path / "fp8").ok
    _, again, _ = load_hf(tmp_path / "fp8", dtype="float32")
    a, b = params["dense_layers"]["ffn"]["w1"], again["dense_layers"]["ffn"]["w1"]
    # 3 bits of mantissa: half a step is 1/16 of the value; below 2^-6 of the range, absolute.
    assert np.all(np.abs(a - b) <= np.abs(a) / 16 + np.abs(a).max() * 2**-9)
    _, kept, _ = load_hf(tmp_path / "fp8", dtype="fp8")
    q = np.abs(np.asarray(kept["dense_layers"]["ffn"]["w1"]).astype(np.float32))
    scale = np.asarray(kept["dense_layers"]["ffn"]["w1_scale"])
    assert q.max() == 448 if scale_fmt is None else 224 < q.max() <= 448
    assert scale_fmt is None or np.all(np.frexp(scale)[0] == 0.5)


def test_power_of_two_scales_stay_what_they_are(tmp_path):
    """V3.1: the same bytes, and config.json says so again."""
    tensors = random_tensors(V3, fp8=True)
    for name, (_, x) in tensors.items():
        if name.endswith("_scale_inv"):
            x[:] = np.exp2(np.round(np.log2(x)))
    block = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    folder = write_folder(tmp_path / "hf", V3, tensors, quantization_config=block)
    convert_to_orbax(folder, tmp_path / "run", dtype="fp8")
    out = convert_to_hf(tmp_path / "run", tmp_path / "back", dtype="fp8")
    assert read_folder(out) == as_read(tensors)
    written = json.loads((out / "config.json").read_text())["quantization_config"]
    assert written["scale_fmt"] == "ue8m0"


def test_without_its_mtp_modules_a_model_is_loaded_as_one_without(tmp_path, caplog):
    """transformers drops layer 61 when it saves, but leaves num_nextn_predict_layers."""
    tensors = random_tensors(V3.replace(num_nextn_predict_layers=0))
    config, params, bias = load_hf(write_folder(tmp_path, V3, tensors))
    assert config.num_nextn_predict_layers == 0
    assert bias.shape == (3, 6)
    assert "mtp_0" not in params
    assert "no MTP modules" in caplog.text


def test_copies_of_embedding_and_head_may_be_left_out(tmp_path):
    tensors = random_tensors(V3)
    for name in ("embed_tokens", "shared_head.head"):
        del tensors[f"model.layers.4.{name}.weight"]
    assert load_hf(write_folder(tmp_path, V3, tensors))[0] == V3


def test_rotary_frequencies_in_the_file_are_ignored(tmp_path):
    """Kimi-K2 ships them."""
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", np.ones(4, np.float32))}
    assert load_hf(write_folder(tmp_path, V3, random_tensors(V3) | extra))[0] == V3


def test_small_files_are_carried_along(tmp_path):
    folder = write_folder(tmp_path / "hf", V3, random_tensors(V3))
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        (folder / name).write_text(f'{{"from": "{name}"}}')
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    convert_to_orbax(folder, tmp_path / "run")
    out = convert_to_hf(tmp_path / "run", tmp_path / "back")
    assert (out / "chat_template.jinja").read_text() == '{"from": "chat_template.jinja"}'
    assert (out / "generation_config.json").read_text() == '{"from": "generation_config.json"}'
    assert (out / "tokenizer_config.json").exists()
    assert not list(tmp_path.glob("**/back/*.py"))


def test_an_interrupted_conversion_continues(tmp_path, monkeypatch):
    """Killed after every few chunks, it ends with the same bytes; nothing looks complete before."""
    from deepseek_jax.convert import shards, to_orbax

    tensors = random_tensors(V3)
    folder = write_folder(tmp_path / "hf", V3, tensors)
    run, back = tmp_path / "run", tmp_path / "back"

    def interrupted_after(calls, module, name):
        real, count = getattr(module, name), iter(range(calls))

        def call(*args, **kwargs):
            if next(count, None) is None:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)
        return lambda: monkeypatch.setattr(module, name, real)

    for _ in range(3):
        restore = interrupted_after(25, to_orbax, "contiguous")
        with pytest.raises(KeyboardInterrupt):
            convert_to_orbax(folder, run, workers=1)
        restore()
        assert not (run / "checkpoints").exists()
    convert_to_orbax(folder, run)
    for _ in range(3):
        restore = interrupted_after(25, shards.ShardWriter, "write")
        with pytest.raises(KeyboardInterrupt):
            convert_to_hf(run, back, workers=1, shard_size=ODD_SHARDS)
        restore()
        assert not (back / "config.json").exists()
        assert not list(back.glob("*.index.json"))
    assert list(back.glob("*.safetensors")), "finished shards are kept"
    convert_to_hf(run, back, shard_size=ODD_SHARDS)
    assert read_folder(back) == as_read(tensors)
    assert not list(back.glob("*.part"))
    assert not list(run.glob("converting*"))


@pytest.mark.parametrize("devices", [1, 8])
def test_export_of_a_training_checkpoint(devices, tmp_path):
    """What the trainer saves, in Orbax's own files, in one piece or sharded over devices."""
    import optax

    from deepseek_jax.checkpoint import Checkpointer, claim_run_directory
    from deepseek_jax.sharding import make_mesh
    from deepseek_jax.types import TrainState

    config = V3.replace(vocab_size=304, hidden_size=136, n_routed_experts=8, n_group=4)
    tensors = random_tensors(config, "F32")
    mesh = make_mesh(f"fsdp={devices // 4 or 1},expert={min(devices, 4)}", jax.devices()[:devices])
    _, params, bias = load_hf(write_folder(tmp_path / "hf", config, tensors), mesh=mesh)
    claim_run_directory(tmp_path / "run", {"model": config.to_hf()}, resume=False)
    state = TrainState(jnp.int32(7), params, optax.sgd(0.1).init(params), bias)
    with Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(7, state, data_state={}, rng=jax.random.key(0))
    out = convert_to_hf(tmp_path / "run", tmp_path / "back", dtype="fp32", shard_size=ODD_SHARDS)
    assert read_folder(out) == as_read(tensors)


def test_a_damaged_chunk_is_noticed(tmp_path):
    convert_to_orbax(write_folder(tmp_path / "hf", V3, random_tensors(V3)), tmp_path / "run")
    chunk = tmp_path / "run/checkpoints/0/model/params.moe_layers.moe.w2/1.3.0.0"
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(UserError, match=r"1\.3\.0\.0 is damaged"):
        convert_to_hf(tmp_path / "run", tmp_path / "back")
    assert not (tmp_path / "back" / "config.json").exists()


@pytest.mark.parametrize("mesh", ["fsdp=2,expert=2,tensor=2", "expert=2,tensor=4", "data=8"])
@pytest.mark.parametrize("fp8", [False, True])
def test_loading_onto_a_mesh(mesh, fp8, tmp_path):
    """Sharded by the rules, and equal to the whole."""
    from deepseek_jax.model.transformer import logical_axes
    from deepseek_jax.sharding import make_mesh, param_shardings

    config = V3.replace(
        vocab_size=304,
        hidden_size=136,
        num_attention_heads=4,
        intermediate_size=264,
        moe_intermediate_size=136,
        n_routed_experts=8,
        n_group=4,
    )
    folder = write_folder(tmp_path, config, random_tensors(config, fp8=fp8))
    mesh = make_mesh(mesh)
    _, params, bias = load_hf(folder, mesh=mesh)
    expected = load_hf(folder)
    jax.tree.map(assert_same, (params, bias), expected[1:])
    wanted = param_shardings(mesh, logical_axes(DeepSeekV3(config)), params)

    def check(x, sharding):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)

    jax.tree.map(check, params, wanted)


def test_a_process_reads_only_its_own_rows(tmp_path, monkeypatch):
    """Bytes read for an expert-parallel mesh: each expert once, whole; nothing twice."""
    from deepseek_jax.convert.folder import HFFolder
    from deepseek_jax.sharding import make_mesh

    config = V3.replace(n_routed_experts=8, n_group=4)
    folder = write_folder(tmp_path, config, random_tensors(config))
    read, real = {}, HFFolder.read

    def counted(self, name, rows=slice(None), cols=slice(None)):
        x = real(self, name, rows, cols)
        read[name] = read.get(name, 0) + x.nbytes
        return x

    monkeypatch.setattr(HFFolder, "read", counted)
    load_hf(folder, mesh=make_mesh("expert=8"))
    for name, (_, x) in random_tensors(config).items():
        copy = name.startswith("model.layers.4.") and x.shape[0] == config.vocab_size
        assert read.get(name, 0) == (0 if copy else x.nbytes), name
