"""Each kind of bad checkpoint: one sentence that says what is wrong, and nothing left behind."""

import errno
import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deepseek_jax.convert import check_hf, convert_to_hf, convert_to_orbax, export_hf, load_hf
from deepseek_jax.convert.safetensors_header import make_header, read_header
from deepseek_jax.types import UserError
from tests.convert_folders import V3, random_tensors, write_folder

CONFIG = V3.replace(num_hidden_layers=2, num_nextn_predict_layers=0)
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture
def tensors():
    return random_tensors(CONFIG, fp8=True)


@pytest.fixture
def folder(tmp_path, tensors):
    return write_folder(tmp_path / "hf", CONFIG, tensors)


def refused(folder, tmp_path, *words):
    """Every way in refuses with one sentence; no way leaves something that could be opened."""
    for read in (load_hf, lambda path: convert_to_orbax(path, tmp_path / "run")):
        with pytest.raises(UserError) as error:
            read(folder)
        for word in words:
            assert word in str(error.value)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 600
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "run.json").exists()


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_missing_shard(folder, tmp_path):
    (folder / SHARD).unlink()
    refused(folder, tmp_path, "lacks 1 of 3 shards", SHARD)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_truncated_shard(folder, tmp_path, keep):
    size = (folder / SHARD).stat().st_size
    keep = int(size * keep) if isinstance(keep, float) else keep % size
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:keep])
    refused(folder, tmp_path, SHARD, "truncated", "again")


@pytest.mark.parametrize(
    "target", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "weights.bin", "", 7]
)
def test_index_that_points_elsewhere(folder, tmp_path, target):
    edit_index(folder, lambda weight_map: weight_map.update({EXPERT: target}))
    refused(folder, tmp_path, INDEX, repr(str(target)))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000, "\xff"])
def test_index_that_is_none(folder, tmp_path, text):
    (folder / INDEX).write_text(text, encoding="latin-1")
    refused(folder, tmp_path, INDEX, "not a readable index")


def test_index_that_names_the_wrong_shard(folder, tmp_path):
    edit_index(folder, lambda weight_map: weight_map.update({"lm_head.weight": SHARD}))
    refused(folder, tmp_path, "lm_head.weight", "but it is not")


def test_tensor_in_two_shards(folder, tmp_path, tensors):
    from safetensors.numpy import save_file

    save_file({EXPERT: tensors[EXPERT][1]}, folder / "more.safetensors")
    edit_index(folder, lambda weight_map: weight_map.update({EXPERT: "more.safetensors"}))
    refused(folder, tmp_path, EXPERT, "both")


def test_tensor_missing_and_tensor_unknown(tmp_path, tensors):
    tensors["model.layers.1.mlp.experts.9.up_proj.weight"] = tensors.pop(EXPERT)
    folder = write_folder(tmp_path / "hf", CONFIG, tensors)
    refused(folder, tmp_path, EXPERT, "missing", "--check")
    found = {(problem.tensor, problem.what) for problem in check_hf(folder).problems}
    assert (EXPERT, "missing") in found
    assert ("model.layers.1.mlp.experts.9.up_proj.weight", "unexpected") in found


def test_wrong_shape(tmp_path, tensors):
    tensors["model.norm.weight"] = "BF16", np.ones(130, ml_dtypes.bfloat16)
    folder = write_folder(tmp_path / "hf", CONFIG, tensors)
    refused(folder, tmp_path, "model.norm.weight", "[130] instead of [131]")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("lm_head.weight", ml_dtypes.float8_e4m3fn),  # has no scales
        ("model.norm.weight", np.int32),
        (EXPERT, ml_dtypes.float8_e5m2),
        (EXPERT + "_scale_inv", np.float64),
    ],
)
def test_wrong_dtype(tmp_path, tensors, name, dtype):
    tensors[name] = "", np.ones(tensors[name][1].shape, dtype)
    refused(write_folder(tmp_path / "hf", CONFIG, tensors), tmp_path, name, "dtype", "instead of")


def test_fp8_without_scales(tmp_path, tensors):
    del tensors[EXPERT + "_scale_inv"]
    folder = write_folder(tmp_path / "hf", CONFIG, tensors)
    refused(folder, tmp_path, EXPERT + "_scale_inv", "missing")


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("dtype", [None, "fp8"])
def test_scale_that_is_not_a_number(tmp_path, tensors, value, dtype):
    tensors[EXPERT + "_scale_inv"][1][0, 1] = value
    folder = write_folder(tmp_path / "hf", CONFIG, tensors)
    refused(folder, tmp_path, EXPERT + "_scale_inv", "NaN")
    with pytest.raises(UserError, match="NaN"):
        convert_to_orbax(folder, tmp_path / "fp8", dtype=dtype)
    assert not (tmp_path / "fp8" / "checkpoints").exists()


def test_another_architecture(folder, tmp_path):
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 4096}')
    refused(folder, tmp_path, "llama", "deepseek_v3")


BAD_TYPE = '{"model_type": "deepseek_v3", "hidden_size": "large"}'


@pytest.mark.parametrize("text", ["", "{", "[]", '"deepseek_v3"', "null", BAD_TYPE])
def test_config_that_is_none(folder, tmp_path, text):
    (folder / "config.json").write_text(text)
    refused(folder, tmp_path, "config.json")


def test_no_config(folder, tmp_path):
    (folder / "config.json").unlink()
    refused(folder, tmp_path, "config.json")


def test_another_quantization(tmp_path, tensors):
    awq = {"quant_method": "awq", "bits": 4}
    folder = write_folder(tmp_path / "hf", CONFIG, tensors, quantization_config=awq)
    refused(folder, tmp_path, "awq")


def test_pickled_weights(folder, tmp_path):
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink()
    refused(folder, tmp_path, "neither model.safetensors nor")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(folder, tmp_path, "pytorch_model.bin", "run code", "safe_serialization=True")


def test_not_a_folder(tmp_path):
    refused(tmp_path / "nowhere", tmp_path, "not a directory")


def test_rotated_rows_in_two_fp8_blocks(tmp_path):
    """Reordering them would need other scales; as bfloat16 the model can be had."""
    config = CONFIG.replace(qk_nope_head_dim=25, qk_rope_head_dim=8)
    folder = write_folder(tmp_path / "hf", config, random_tensors(config, fp8=True))
    with pytest.raises(UserError, match="two FP8 blocks"):
        convert_to_orbax(folder, tmp_path / "run", dtype="fp8")
    load_hf(folder)


def test_output_that_is_not_empty(folder, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").write_text("data")
    config, params, bias = load_hf(folder)
    convert_to_orbax(folder, tmp_path / "run")
    for write in (
        lambda: convert_to_orbax(folder, tmp_path / "taken"),
        lambda: convert_to_hf(tmp_path / "run", tmp_path / "taken"),
        lambda: export_hf(tmp_path / "taken", config, params, bias),
    ):
        with pytest.raises(UserError, match="not an empty directory"):
            write()
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["precious"]


def test_continuing_with_another_source(folder, tmp_path, tensors, monkeypatch):
    from deepseek_jax.convert import to_orbax

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(to_orbax, "contiguous", stop)
        with pytest.raises(KeyboardInterrupt):
            convert_to_orbax(folder, tmp_path / "run")
    other = write_folder(tmp_path / "other", CONFIG, tensors, shards=2)
    with pytest.raises(UserError, match="another checkpoint"):
        convert_to_orbax(other, tmp_path / "run")
    with pytest.raises(UserError, match="other options"):
        convert_to_orbax(folder, tmp_path / "run", dtype="float32")


def test_an_interrupted_export_is_not_continued_with_other_parameters(
    folder, tmp_path, monkeypatch
):
    from deepseek_jax.convert import shards

    config, params, bias = load_hf(folder)
    out, calls = tmp_path / "out", iter(range(30))
    real = shards.ShardWriter.write

    def stop(*args):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            export_hf(out, config, params, bias, shard_size=100_000)
    assert list(out.glob("*.safetensors"))
    with pytest.raises(UserError, match="unfinished conversion"):
        export_hf(out, config, params, bias, shard_size=100_000)


def test_parameters_of_another_model(folder, tmp_path):
    config, params, bias = load_hf(folder)
    with pytest.raises(UserError, match="instead of"):
        export_hf(tmp_path / "a", config.replace(hidden_size=130), params, bias)
    del params["moe_layers"]["moe"]["w3"]
    with pytest.raises(UserError, match="params/moe_layers/moe/w3 is missing"):
        export_hf(tmp_path / "b", config, params, bias)
    assert not (tmp_path / "a").exists()


def test_full_disk(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", full)
        with pytest.raises(UserError, match=r"disk of .* is full"):
            convert_to_orbax(folder, tmp_path / "run")
    convert_to_orbax(folder, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(UserError, match=r"disk of .* is full"):
            convert_to_hf(tmp_path / "run", tmp_path / "back")
    assert not (tmp_path / "back" / "config.json").exists()


# --- headers ---------------------------------------------------------------------------------

F32_2 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file_of(header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


BAD_HEADERS = {
    "empty file": b"",
    "absurd length": struct.pack("<Q", 2**63) + b"{}",
    "length just over the limit": struct.pack("<Q", 100_000_001) + b"{}",
    "length past the end": struct.pack("<Q", 10_000) + b"{}",
    "not JSON": file_of(b"\x80\x04\x95"),
    "invalid UTF-8": file_of(b'{"\xff": 1}'),
    "not an object": file_of([F32_2]),
    "deep nesting": file_of(b"[" * 100_000),
    "number of 10,000 digits": file_of(b'{"a": ' + b"9" * 10_000 + b"}"),
    "NaN": file_of(b'{"a": NaN}'),
    "duplicate": file_of(b'{"a": %s, "a": %s}' % ((json.dumps(F32_2).encode(),) * 2)),
    "no dtype": file_of({"a": {"shape": [2], "data_offsets": [0, 8]}}),
    "unknown key": file_of({"a": F32_2 | {"strides": [1]}}),
    "unknown dtype": file_of({"a": F32_2 | {"dtype": "F31"}}),
    "dtype is a list": file_of({"a": F32_2 | {"dtype": ["F32"]}}),
    "negative shape": file_of({"a": F32_2 | {"shape": [-2]}}),
    "boolean shape": file_of({"a": F32_2 | {"shape": [True, 2]}}),
    "float shape": file_of({"a": F32_2 | {"shape": [2.0]}}),
    "shape that overflows": file_of({"a": F32_2 | {"shape": [2**62, 2**62]}}),
    "offsets reversed": file_of({"a": F32_2 | {"data_offsets": [8, 0]}}),
    "three offsets": file_of({"a": F32_2 | {"data_offsets": [0, 8, 8]}}),
    "wrong size": file_of({"a": F32_2 | {"data_offsets": [0, 7]}}),
    "past the end": file_of({"a": F32_2 | {"data_offsets": [4, 12]}}),
    "hole": file_of({"a": F32_2, "b": F32_2 | {"data_offsets": [9, 17]}}, b"\0" * 17),
    "overlap": file_of({"a": F32_2, "b": F32_2 | {"data_offsets": [4, 12]}}, b"\0" * 12),
    "left over": file_of({"a": F32_2}, b"\0" * 9),
    "truncated": file_of({"a": F32_2}, b"\0" * 7),
    # Found by fuzzing beside the safetensors library, which refuses these too.
    "length beyond 64 bits": file_of(
        {"a": {"dtype": "F32", "shape": [2**64, 0], "data_offsets": [0, 0]}}, b""
    ),
    "half a surrogate pair in metadata": file_of(b'{"__metadata__": {"a": "\\ud800"}}', b""),
    "half a surrogate pair": file_of(b'{"\\ud800": %s}' % json.dumps(F32_2).encode()),
    "metadata not strings": file_of({"__metadata__": {"n": 1}, "a": F32_2}),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_header(name, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(BAD_HEADERS[name])
    with pytest.raises(UserError, match="not a readable safetensors file") as error:
        read_header(path)
    assert len(str(error.value)) < 1000


def test_headers_agree_with_the_library(tmp_path):
    """Its files are read, and ours are read by it."""
    from safetensors import safe_open

    specs = {"a": ("BF16", (3, 5)), "b": ("F8_E4M3", (7,)), "c": ("F32", ())}
    header, starts = make_header(specs)
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + b"\0" * (30 + 7 + 4))
    assert {k: (t.dtype, t.shape, t.offset) for k, t in read_header(path).items()} == {
        k: (*spec, starts[k]) for k, spec in specs.items()
    }
    with safe_open(path, "numpy") as file:
        assert set(file.keys()) == set(specs)


GOOD = file_of(
    {"__metadata__": {"format": "pt"}, "a": F32_2, "b": F32_2 | {"data_offsets": [8, 16]}}
)


@settings(max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "300")), deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, len(GOOD) - 1), st.binary(max_size=6), st.integers(0, 6)),
        min_size=1,
        max_size=4,
    )
)
@example([(0, b"\xff" * 8, 8)])
def test_no_header_does_anything_but_load_or_be_refused(tmp_path_factory, edits):
    """Bytes replaced, inserted and removed at random; run longer with HYPOTHESIS_EXAMPLES."""
    data = GOOD + b"\0" * 8
    for at, new, removed in edits:
        data = data[:at] + new + data[at + removed :]
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(data)
    try:
        tensors = read_header(path)
    except UserError:
        return
    for info in tensors.values():
        assert info.offset + info.nbytes <= len(data)
