"""Small models that tests share."""

from deepseek_jax.config import ModelConfig

# Every mechanism of V3 at the smallest sizes that keep them apart; no two widths are equal.
MICRO = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=2,
    q_lora_rank=20,
    kv_lora_rank=12,
    qk_nope_head_dim=10,
    qk_rope_head_dim=6,
    v_head_dim=14,
    intermediate_size=40,
    moe_intermediate_size=18,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=2,
    initializer_range=0.2,
)

MICRO_V2 = MICRO.replace(
    scoring_func="softmax",
    topk_method="group_limited_greedy",
    norm_topk_prob=False,
    num_nextn_predict_layers=0,
    aux_loss_alpha=0.003,
    device_loss_alpha=0.05,
    communication_loss_alpha=0.02,
)
