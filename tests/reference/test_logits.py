"""Logits equal those of transformers' DeepseekV3ForCausalLM and DeepseekV2ForCausalLM."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from deepseek_jax import forward, preset  # noqa: E402
from deepseek_jax.config import Yarn  # noqa: E402
from tests.reference.torch_models import our_params, torch_model  # noqa: E402

# transformers 5 on Python 3.11 with torch 2.13
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

# No dimension equals another, and most are odd, so that no transposition goes unnoticed.
V3 = preset("tiny").replace(
    vocab_size=97,
    hidden_size=51,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=3,
    q_lora_rank=29,
    kv_lora_rank=23,
    qk_nope_head_dim=11,
    qk_rope_head_dim=6,
    v_head_dim=13,
    intermediate_size=67,
    moe_intermediate_size=19,
    n_routed_experts=12,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=0,
    max_position_embeddings=256,
)
V2 = V3.replace(
    # Its RoPE views rows as complex numbers in place, which wants even strides.
    kv_lora_rank=22,
    qk_nope_head_dim=10,
    scoring_func="softmax",
    topk_method="group_limited_greedy",
    norm_topk_prob=False,
    routed_scaling_factor=4.0,
    n_shared_experts=2,
)
V2_LITE = V2.replace(
    topk_method="greedy", n_group=1, topk_group=1, q_lora_rank=None, routed_scaling_factor=1.0
)


def yarn(**changes) -> Yarn:
    """Context extended from 16 positions, so that a row of 40 lies beyond the original."""
    return Yarn(**({"factor": 8.0, "original_max_position_embeddings": 16} | changes))


CONFIGS = {
    "v3": V3,
    "v3_direct_q": V3.replace(q_lora_rank=None),
    "v3_no_groups": V3.replace(n_group=1, topk_group=1),
    "v3_all_groups": V3.replace(topk_group=4),
    "v3_unnormalised": V3.replace(norm_topk_prob=False),
    "v3_top_1": V3.replace(num_experts_per_tok=1),
    "v3_two_shared": V3.replace(n_shared_experts=2),
    "v3_no_dense_layer": V3.replace(first_k_dense_replace=0),
    "v3_two_dense_layers": V3.replace(first_k_dense_replace=2),
    "v3_yarn": V3.replace(rope_scaling=yarn()),
    "v3_yarn_wide_ramp": V3.replace(
        qk_rope_head_dim=16, rope_scaling=yarn(beta_fast=4.0, beta_slow=0.5)
    ),
    "v3_yarn_no_mscale_all_dim": V3.replace(rope_scaling=yarn(mscale_all_dim=0.0)),
    "v3_yarn_unequal_mscales": V3.replace(rope_scaling=yarn(mscale=0.9, mscale_all_dim=0.6)),
    "kimi_k2": V3.replace(
        n_group=1,
        topk_group=1,
        rope_theta=50_000.0,
        qk_rope_head_dim=16,
        rope_scaling=yarn(factor=32.0, beta_fast=1.0, beta_slow=1.0),
        routed_scaling_factor=2.827,
    ),
    # rms_norm_eps does not reach the two latent norms; a large value tells the two apart.
    "moonlight": V3.replace(
        q_lora_rank=None, n_group=1, topk_group=1, n_shared_experts=2, rms_norm_eps=1e-5
    ),
    "latent_norm_eps": V3.replace(rms_norm_eps=0.3),
    "v2": V2,
    "v2_yarn": V2.replace(rope_scaling=yarn(mscale=0.707, mscale_all_dim=0.707)),
    "v2_no_dense_layer": V2.replace(first_k_dense_replace=0, n_shared_experts=1),
    "v2_lite": V2_LITE.replace(rope_scaling=yarn(mscale=0.707, mscale_all_dim=0.707)),
    "v2_lite_low_rank_q": V2_LITE.replace(q_lora_rank=29, rms_norm_eps=0.3),
}


# Small variations of others; they run with `-m slow`.
SLOW = {"v3_unnormalised", "v3_top_1", "v3_all_groups", "v3_two_dense_layers", "v2_no_dense_layer"}


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW)) for x in CONFIGS]
)
def test_logits_equal_those_of_transformers(name, tmp_path):
    config = CONFIGS[name]
    model = torch_model(config)
    params, router_bias = our_params(config, model, tmp_path)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 40))

    compiled = jax.jit(forward, static_argnums=0)
    ours = np.asarray(compiled(config, params, router_bias, tokens))
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()

    assert 0.3 < theirs.std() < 3
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)  # the worst is 6e-6
