"""One optimizer step as torch makes it, for the benchmarks that stand beside it."""

from collections.abc import Callable

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deepseek_jax import ModelConfig


def torch_step(
    config: ModelConfig,
    rows_BT: np.ndarray,
    experts: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    remat: str = "none",
) -> Callable[[], float]:
    """A function that makes one step of transformers' model and returns its loss.

    Args:
        config: the model; its MTP modules are unknown to transformers and left out.
        rows_BT: tokens; each row is inputs and targets.
        experts: transformers' way to run them: eager, batched_mm, grouped_mm.
        device: where, with SDPA and a fused AdamW on a GPU.
        dtype: of parameters and moments; float32 on a GPU multiplies in BF16 (autocast).
        compiled: by torch.compile.
        remat: none, or full: activations are computed again in the backward pass.
    """
    on_gpu = device != "cpu"
    hf = config.to_hf()
    torch_config = AutoConfig.for_model(hf.pop("model_type"), **hf)
    torch_config._experts_implementation = experts
    more = {"attn_implementation": "sdpa"} if on_gpu else {}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(torch_config, dtype=dtype, **more)
    if remat == "full":
        model.gradient_checkpointing_enable()
    forward = torch.compile(model) if compiled else model
    adam = torch.optim.AdamW(
        model.parameters(), 2.2e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=on_gpu
    )

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        return forward(tokens, use_cache=False).logits

    return stepper(model, logits, mean_loss, adam, rows_BT, device, dtype)


def mean_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in float32."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def stepper(
    model: torch.nn.Module,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    adam: torch.optim.Optimizer,
    rows_BT: np.ndarray,
    device: str,
    dtype: torch.dtype,
) -> Callable[[], float]:
    """The step that peers share: forward, backward, clipping, AdamW; it returns the loss."""
    ids_BT = torch.from_numpy(rows_BT.astype(np.int64)).to(device)
    tokens, targets = ids_BT[:, :-1], ids_BT[:, 1:]
    mixed = device != "cpu" and dtype == torch.float32

    def run() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=mixed):
            logits = logits_of(tokens)
        loss = loss_of(logits, targets)
        del logits
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        return loss.item()

    return run
