"""The published models, and four of our own from laptop to one large GPU. Each is complete.

Sizes from the released ``config.json`` files; losses and initialisation from the reports.
"""

from deepseek_jax.config import ModelConfig, Yarn
from deepseek_jax.types import UserError

_V3 = ModelConfig(
    vocab_size=129_280,
    hidden_size=7168,
    num_hidden_layers=61,
    first_k_dense_replace=3,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=18_432,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
    rope_scaling=Yarn(),
    max_position_embeddings=163_840,
)

_V2 = _V3.replace(
    vocab_size=102_400,
    hidden_size=5120,
    num_hidden_layers=60,
    first_k_dense_replace=1,
    intermediate_size=12_288,
    moe_intermediate_size=1536,
    n_routed_experts=160,
    n_shared_experts=2,
    num_experts_per_tok=6,
    topk_group=3,
    scoring_func="softmax",
    topk_method="group_limited_greedy",
    norm_topk_prob=False,
    routed_scaling_factor=16.0,
    aux_loss_alpha=0.003,
    device_loss_alpha=0.05,
    communication_loss_alpha=0.02,
    num_nextn_predict_layers=0,
    rope_scaling=Yarn(mscale=0.707, mscale_all_dim=0.707),
    bos_token_id=100_000,
    eos_token_id=100_001,
)

_V2_LITE = _V2.replace(
    hidden_size=2048,
    num_hidden_layers=27,
    num_attention_heads=16,
    q_lora_rank=None,
    intermediate_size=10_944,
    moe_intermediate_size=1408,
    n_routed_experts=64,
    n_group=1,
    topk_group=1,
    topk_method="greedy",
    routed_scaling_factor=1.0,
    aux_loss_alpha=0.001,
    device_loss_alpha=0.0,
    communication_loss_alpha=0.0,
)

_MOONLIGHT_16B = _V2_LITE.replace(
    vocab_size=163_840,
    intermediate_size=11_264,
    scoring_func="sigmoid",
    topk_method="noaux_tc",
    norm_topk_prob=True,
    routed_scaling_factor=2.446,
    aux_loss_alpha=1e-4,
    rope_theta=50_000.0,
    rope_scaling=None,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    bos_token_id=163_584,
    eos_token_id=163_586,
)

_KIMI_K2 = _V3.replace(
    vocab_size=163_840,
    first_k_dense_replace=1,
    num_attention_heads=64,
    n_routed_experts=384,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=2.827,
    num_nextn_predict_layers=0,
    rope_theta=50_000.0,
    rope_scaling=Yarn(factor=32.0, beta_fast=1.0, beta_slow=1.0),
    max_position_embeddings=131_072,
    bos_token_id=163_584,
    eos_token_id=163_585,
)

# The teaching example: V3's mechanism at a size that one machine's memory holds.
_MINI = _V3.replace(
    vocab_size=32_000,
    hidden_size=1024,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    num_attention_heads=16,
    q_lora_rank=None,
    kv_lora_rank=1024,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    intermediate_size=4096,
    moe_intermediate_size=4096,
    n_routed_experts=64,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=1.0,
    rope_scaling=None,
    max_position_embeddings=4096,
)

# One GPU, minutes. Widths are multiples of 128 but for what `wkv_a` makes, 256 of the latent and 32
# rotated: there the last of FP8's blocks is a quarter full.
_SMALL = _V3.replace(
    vocab_size=16_384,
    hidden_size=768,
    num_hidden_layers=12,
    first_k_dense_replace=1,
    num_attention_heads=12,
    q_lora_rank=384,
    kv_lora_rank=256,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    intermediate_size=2048,
    moe_intermediate_size=512,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    rope_scaling=None,
    max_position_embeddings=4096,
)

# Two CPU cores, minutes; every mechanism of V3 is on. Two heads and two experts per token
# because on a CPU it is the traffic of activations that takes the time, not the products.
_TINY = _SMALL.replace(
    vocab_size=2048,
    hidden_size=128,
    num_hidden_layers=3,
    num_attention_heads=2,
    q_lora_rank=64,
    kv_lora_rank=64,
    qk_nope_head_dim=48,
    qk_rope_head_dim=16,
    v_head_dim=64,
    intermediate_size=384,
    moe_intermediate_size=128,
    num_experts_per_tok=2,
    max_position_embeddings=2048,
    # 0.006 belongs to a width of 7168; a narrower model needs larger weights for the same signal.
    initializer_range=0.04,
)

PRESETS: dict[str, ModelConfig] = {
    "tiny": _TINY,
    "small": _SMALL,
    "mini": _MINI,
    "moonlight_16b": _MOONLIGHT_16B,
    "v2_lite": _V2_LITE,
    "v2": _V2,
    "v3": _V3,
    "r1": _V3,
    "kimi_k2": _KIMI_K2,
}


def preset(name: str) -> ModelConfig:
    """A complete published or teaching model by name (see ``PRESETS``).

    Raises:
        UserError: for an unknown name, listing the known ones.
    """
    if name not in PRESETS:
        raise UserError(f"no preset {name!r}; choose from {', '.join(PRESETS)}.")
    return PRESETS[name]
