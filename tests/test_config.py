"""Presets against the published figures, config.json both ways, contradictions refused."""

import json

import pytest

from deepseek_jax import ModelConfig, UserError, param_counts, preset
from deepseek_jax.presets import PRESETS
from tests.configs import MICRO

# SPEC: the totals of V3 and K2 are those of the released tensor maps, to the parameter.
PUBLISHED = {
    "v3": (671_026_404_352, 36_625_603_584),
    "r1": (671_026_404_352, 36_625_603_584),
    "v2": (235_741_434_880, 20_851_512_320),
    "v2_lite": (15_706_484_224, 2_451_435_008),
    "moonlight_16b": (15_960_108_544, 2_579_230_208),
    "kimi_k2": (1_026_408_209_408, 31_687_072_768),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    counts = param_counts(preset(name))
    assert (counts.total, counts.active) == PUBLISHED[name]


def test_mtp_module_has_the_released_size():
    # One MoE layer, eh_proj and three norms; the released file adds 256 selection biases.
    assert param_counts(preset("v3")).mtp == 11_507_286_016 + 102_760_448 + 21_504
    assert param_counts(preset("v2")).mtp == 0


def test_the_active_count_is_what_one_token_touches():
    dense = MICRO.replace(num_experts_per_tok=8, topk_group=4)
    all_but_embedding = param_counts(dense).total - dense.vocab_size * dense.hidden_size
    assert param_counts(dense).active == all_but_embedding
    expert = 3 * MICRO.hidden_size * MICRO.moe_intermediate_size
    idle = (8 - 3) * MICRO.num_moe_layers * expert
    assert param_counts(MICRO).active == all_but_embedding - idle


def test_own_presets_have_their_advertised_sizes():
    assert param_counts(preset("tiny")).total < 10e6
    assert 100e6 < param_counts(preset("small")).total < 300e6
    mini = preset("mini")
    assert (mini.hidden_size, mini.num_attention_heads, mini.kv_lora_rank) == (1024, 16, 1024)
    assert (mini.n_routed_experts, mini.moe_intermediate_size) == (64, 4096)
    assert (mini.num_experts_per_tok, mini.num_hidden_layers, mini.vocab_size) == (2, 4, 32_000)
    assert mini.num_nextn_predict_layers == 1


@pytest.mark.parametrize(
    ("name", "scale"), [("v3", 0.1352337789), ("v2_lite", 0.1147213868), ("kimi_k2", 0.1308607999)]
)
def test_softmax_scale_includes_the_temperature_of_yarn(name, scale):
    assert preset(name).softmax_scale == pytest.approx(scale, abs=1e-10)


@pytest.mark.parametrize("name", PRESETS)
def test_config_json_and_back(name, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(preset(name).to_hf()))
    assert ModelConfig.from_hf(path) == preset(name)


def test_config_json_of_newer_transformers_is_read():
    hf = preset("v3").to_hf()
    yarn = hf.pop("rope_scaling")
    hf["rope_parameters"] = yarn | {"rope_type": "yarn", "rope_theta": hf.pop("rope_theta")}
    assert ModelConfig.from_hf(hf) == preset("v3")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_group": 3}, "n_group=3"),
        ({"topk_group": 5}, "topk_group=5"),
        ({"topk_group": 1}, "num_experts_per_tok=3"),
        ({"num_experts_per_tok": 9}, "n_routed_experts=8"),
        ({"first_k_dense_replace": 4}, "num_hidden_layers=3"),
        ({"first_k_dense_replace": 3}, "num_nextn_predict_layers"),
        ({"qk_rope_head_dim": 5}, "qk_rope_head_dim=5"),
        ({"scoring_func": "softmax"}, "scoring_func='sigmoid'"),
        ({"topk_method": "greedy"}, "n_group=1"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"q_lora_rank": 0}, "q_lora_rank=0"),
    ],
)
def test_contradictions_are_one_sentence(changes, named):
    with pytest.raises(UserError, match=named) as error:
        MICRO.replace(**changes)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
    ],
)
def test_foreign_config_json_is_refused(changes, named):
    with pytest.raises(UserError, match=named):
        ModelConfig.from_hf(preset("v3").to_hf() | changes)


def test_config_json_without_a_field_names_it():
    hf = preset("v3").to_hf()
    del hf["kv_lora_rank"]
    with pytest.raises(UserError, match="kv_lora_rank"):
        ModelConfig.from_hf(hf)


def test_unreadable_config_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        ModelConfig.from_hf(tmp_path / "config.json")


def test_unknown_preset_lists_the_known():
    with pytest.raises(UserError, match="v2_lite"):
        preset("v9")
