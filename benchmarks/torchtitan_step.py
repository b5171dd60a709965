"""One optimizer step as torchtitan makes it; to be imported with its checkout on the path.

Written for v0.2.2, the newest release; not yet run on a GPU. Everything but the step itself is
torchtitan's own: model, recomputation and compilation (``parallelize_fn``), loss, fused AdamW and
the router bias's update.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torchtitan.config import JobConfig  # pyrefly: ignore
from torchtitan.distributed import ParallelDims  # pyrefly: ignore
from torchtitan.distributed.utils import init_fake_mode  # pyrefly: ignore
from torchtitan.models.deepseek_v3 import (  # pyrefly: ignore
    DeepSeekV3ModelArgs,
    get_train_spec,
)
from torchtitan.models.moe import MoEArgs  # pyrefly: ignore

from benchmarks.torch_step import stepper
from deepseek_jax import ModelConfig

ONE_DEVICE = ParallelDims(1, 1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)


def model_args(config: ModelConfig) -> DeepSeekV3ModelArgs:
    """The same model in torchtitan's names; attention by SDPA, which tries cuDNN's first."""
    groups = {"num_expert_groups": config.n_group, "num_limited_groups": config.topk_group}
    return DeepSeekV3ModelArgs(
        vocab_size=config.vocab_size,
        dim=config.hidden_size,
        inter_dim=config.intermediate_size,
        moe_inter_dim=config.moe_intermediate_size,
        n_layers=config.num_hidden_layers,
        n_dense_layers=config.first_k_dense_replace,
        n_heads=config.num_attention_heads,
        norm_eps=config.rms_norm_eps,
        moe_args=MoEArgs(
            num_experts=config.n_routed_experts,
            num_shared_experts=config.n_shared_experts,
            top_k=config.num_experts_per_tok,
            score_func=config.scoring_func,
            route_norm=config.norm_topk_prob,
            route_scale=config.routed_scaling_factor,
            score_before_experts=False,
            **(groups if config.n_group > 1 else {}),
        ),
        q_lora_rank=config.q_lora_rank or 0,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        attn_type="sdpa",
    )


def build(config: ModelConfig, dtype: torch.dtype, job: JobConfig) -> Any:
    """The model on no device, its layers wrapped as the job asks for."""
    spec, args = get_train_spec(), model_args(config)
    args.update_from_config(job)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device("meta"):
        model = spec.model_cls(args)
    torch.set_default_dtype(usual)
    return spec.parallelize_fn(model, ONE_DEVICE, job)


def torchtitan_step(
    config: ModelConfig,
    rows_BT: np.ndarray,
    *,
    device: str,
    dtype: torch.dtype,
    compiled: bool,
    remat: str,
) -> Callable[[], float]:
    """A function that makes one step of torchtitan's model and returns its loss.

    Args:
        config: the model, without MTP modules.
        rows_BT: tokens; each row is inputs and targets.
        device: where.
        dtype: of parameters and moments; float32 on a GPU multiplies in BF16 (autocast).
        compiled: each layer and the loss by torch.compile.
        remat: none, full, or selective (by operation, as its preset of 671B has it).
    """
    job = JobConfig()
    job.training.seq_len = rows_BT.shape[1] - 1
    job.compile.enable = compiled
    job.activation_checkpoint.mode = remat
    job.activation_checkpoint.selective_ac_option = "op"
    job.optimizer.lr = 2.2e-4
    if not torch.distributed.is_initialized():
        init_fake_mode(1)
    model = build(config, dtype, job)
    model.to_empty(device=device)
    with torch.no_grad():
        model.init_weights()
    spec = get_train_spec()
    sum_loss = spec.build_loss_fn(job)

    def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return sum_loss(logits, targets) / targets.numel()

    adam = spec.build_optimizers_fn([model], job.optimizer, ONE_DEVICE)
    return stepper(model, model, loss_of, adam, rows_BT, device, dtype)
