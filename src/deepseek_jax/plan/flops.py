"""Model FLOPs on paper, the numerator of MFU."""

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.transformer import param_counts


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Model FLOPs of forward and backward per token, the numerator of MFU.

    Six per activated parameter (the head included, embedding look-ups not), and three times the
    forward cost of attention's two products, 2 N (H + O) per query and *visible* key, of which
    causality leaves T/2 on average. Recomputation does not count; each MTP module counts as a
    layer with its own use of the head.
    """
    counts = param_counts(config)
    depths = config.num_nextn_predict_layers
    head = config.hidden_size * config.vocab_size
    matmuls = counts.active + depths * (_active_mtp_module(config, counts.mtp) + head)
    attention = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * seq_len
    return 6.0 * matmuls + 3.0 * attention * (config.num_hidden_layers + depths)


def _active_mtp_module(config: ModelConfig, mtp_params: int) -> int:
    depths = config.num_nextn_predict_layers
    if not depths:
        return 0
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    idle = config.n_routed_experts - config.num_experts_per_tok
    return mtp_params // depths - idle * expert
