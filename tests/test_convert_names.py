"""Every tensor of the released 671B checkpoint, by name, shape and dtype, in both directions."""

import hashlib
import json
import math
import time

import numpy as np
import pytest

from deepseek_jax import param_counts, preset
from deepseek_jax.convert import check_hf
from deepseek_jax.convert.safetensors_header import DTYPES, make_header
from deepseek_jax.convert.to_hf import _specs

# Totals of the released index and headers (163 files). The digest is of the list below, whose
# totals are these; it pins each name, shape and dtype.
R1_TENSORS = 91_991
R1_ELEMENTS = {"F8_E4M3": 680_571_043_840, "BF16": 3_918_786_560, "F32": 41_555_600}
R1_BYTES = 688_574_839_360
R1_DIGEST = "5f2ab34f60ef0e89933bdfad87e0af7f29955cfa959f7a1eb071a0e238646a5e"


def released_tensors():
    """The checkpoint written down a second time, without the table: name -> dtype, shape."""
    D, Q, R, V, heads = 7168, 1536, 512, 129_280, 128

    def mlp(prefix, width):
        yield f"{prefix}.gate_proj", (width, D)
        yield f"{prefix}.up_proj", (width, D)
        yield f"{prefix}.down_proj", (D, width)

    tensors = {}
    for i in range(62):
        layer = f"model.layers.{i}"
        linear = [
            (f"{layer}.self_attn.q_a_proj", (Q, D)),
            (f"{layer}.self_attn.q_b_proj", (heads * 192, Q)),
            (f"{layer}.self_attn.kv_a_proj_with_mqa", (R + 64, D)),
            (f"{layer}.self_attn.kv_b_proj", (heads * 256, R)),
            (f"{layer}.self_attn.o_proj", (D, heads * 128)),
        ]
        plain = [
            (f"{layer}.self_attn.q_a_layernorm", (Q,)),
            (f"{layer}.self_attn.kv_a_layernorm", (R,)),
            (f"{layer}.input_layernorm", (D,)),
            (f"{layer}.post_attention_layernorm", (D,)),
        ]
        if i < 3:
            linear += mlp(f"{layer}.mlp", 18_432)
        else:
            for expert in [*(f"experts.{e}" for e in range(256)), "shared_experts"]:
                linear += mlp(f"{layer}.mlp.{expert}", 2048)
            plain.append((f"{layer}.mlp.gate", (256, D)))
            tensors[f"{layer}.mlp.gate.e_score_correction_bias"] = "F32", (256,)
        if i == 61:
            plain += [(f"{layer}.embed_tokens", (V, D)), (f"{layer}.shared_head.head", (V, D))]
            plain += [(f"{layer}.{norm}", (D,)) for norm in ("enorm", "hnorm", "shared_head.norm")]
            plain.append((f"{layer}.eh_proj", (D, 2 * D)))
        for name, (rows, cols) in linear:
            tensors[f"{name}.weight"] = "F8_E4M3", (rows, cols)
            tensors[f"{name}.weight_scale_inv"] = "F32", (-(-rows // 128), -(-cols // 128))
        tensors |= {f"{name}.weight": ("BF16", shape) for name, shape in plain}
    for name, shape in (("model.embed_tokens", (V, D)), ("model.norm", (D,)), ("lm_head", (V, D))):
        tensors[f"{name}.weight"] = "BF16", shape
    return tensors


@pytest.fixture(scope="module")
def released():
    return released_tensors()


def test_the_list_is_the_released_one(released):
    elements = dict.fromkeys(R1_ELEMENTS, 0)
    for dtype, shape in released.values():
        elements[dtype] += math.prod(shape)
    assert len(released) == R1_TENSORS
    assert elements == R1_ELEMENTS
    assert sum(nbytes(dtype, (n,)) for dtype, n in elements.items()) == R1_BYTES
    lines = sorted(f"{name} {dtype} {shape}" for name, (dtype, shape) in released.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == R1_DIGEST


def test_an_export_writes_exactly_these(released):
    specs = {name: tuple(spec) for name, spec in _specs(preset("v3"), "fp8").items()}
    assert specs == released


def write_sparse(folder, tensors, files=163):
    """The folder with real headers and holes for data: 0.7 TB long, some MB on disk."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(preset("v3").to_hf()))
    names, weight_map = list(tensors), {}
    for i in range(files):
        file = f"model-{i + 1:05}-of-{files:05}.safetensors"
        part = {name: tensors[name] for name in names[i::files]}
        header, starts = make_header(part)
        with (folder / file).open("wb") as handle:
            handle.write(header)
            handle.truncate(max(starts[name] + nbytes(*spec) for name, spec in part.items()))
        weight_map |= dict.fromkeys(part, file)
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def nbytes(dtype, shape):
    return math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize


def test_check_of_the_whole_folder_takes_seconds(released, tmp_path):
    folder = write_sparse(tmp_path / "whole", released)
    start = time.perf_counter()
    report = check_hf(folder)
    seconds = time.perf_counter() - start

    assert report.problems == []
    counts = param_counts(preset("v3"))
    assert (report.parameters, report.mtp_parameters) == (counts.total, counts.mtp)
    assert (report.tensors, report.bytes) == (R1_TENSORS, R1_BYTES)
    assert dict(report.elements_by_dtype) == R1_ELEMENTS
    assert seconds < 30  # about 3 on an idle core
    print(f"checked {report.tensors:,} tensors in {seconds:.1f} s")


def test_check_finds_the_one_missing_tensor(released, tmp_path):
    missing = "model.layers.60.mlp.experts.255.down_proj.weight"
    rest = {name: spec for name, spec in released.items() if name != missing}
    report = check_hf(write_sparse(tmp_path / "rest", rest))
    problems = [(problem.tensor, problem.what) for problem in report.problems]
    assert problems == [(missing, "missing"), (missing + "_scale_inv", "unexpected")]


@pytest.mark.parametrize(
    ("name", "tensors"),
    [("v2_lite", 5291), ("moonlight_16b", 5317), ("v2", 29_102), ("kimi_k2", 69_975)],
)
def test_number_of_tensors_of_the_other_models(name, tensors):
    """In BF16. K2's file holds 61 more, its rotary frequencies, which are ignored."""
    assert len(_specs(preset(name), "bf16")) == tensors
