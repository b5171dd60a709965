"""One optimizer step as transformers and torch make it, for the benchmarks that stand beside it."""

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
    remat: bool = False,
) -> Callable[[], float]:
    """A function that makes one step (forward, backward, clipping, AdamW) and returns its loss.

    Args:
        config: the model; its MTP modules are unknown to transformers and left out.
        rows_BT: tokens; each row is inputs and targets.
        experts: transformers' way to run them: eager, batched_mm, grouped_mm.
        device: where, with SDPA and a fused AdamW on a GPU.
        dtype: of parameters and moments; float32 on a GPU multiplies in BF16 (autocast).
        compiled: by torch.compile.
        remat: compute activations again in the backward pass.
    """
    on_gpu = device != "cpu"
    hf = config.to_hf()
    torch_config = AutoConfig.for_model(hf.pop("model_type"), **hf)
    torch_config._experts_implementation = experts
    more = {"attn_implementation": "sdpa"} if on_gpu else {}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(torch_config, dtype=dtype, **more)
    if remat:
        model.gradient_checkpointing_enable()
    forward = torch.compile(model) if compiled else model
    adam = torch.optim.AdamW(
        model.parameters(), 2.2e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=on_gpu
    )
    ids_BT = torch.from_numpy(rows_BT.astype(np.int64)).to(device)
    tokens, targets = ids_BT[:, :-1], ids_BT[:, 1:]

    def run() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=on_gpu and dtype == torch.float32):
            logits = forward(tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        return loss.item()

    return run
