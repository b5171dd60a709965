"""The step of ``train_step.py`` as transformers and torch make it, on the same GPU.

    python benchmarks/train_step_peer.py --model v3 --layers 3 --experts 16 --vocab 16384 --batch 2

The same slice, batch and sequence; grouped matmuls for the experts, SDPA, fused AdamW, with and
without ``torch.compile``; parameters and moments in BF16 (ours keep FP32 parameters), or FP32
under autocast. What runs out of memory is tried again with recomputation.
"""

import argparse
import gc
import statistics
import time

import numpy as np
import torch

from benchmarks.torch_step import torch_step
from benchmarks.train_step import model_arguments, slice_of
from deepseek_jax.plan import training_flops_per_token


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model_arguments(parser)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--ways", nargs="*", default=["bfloat16", "bfloat16-compiled"])
    arguments = parser.parse_args()
    config = slice_of(arguments)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, config.vocab_size, (arguments.batch, arguments.seq + 1))
    tokens = arguments.batch * arguments.seq
    flops = training_flops_per_token(config, arguments.seq) * tokens
    print(f"transformers, {torch.cuda.get_device_name()}, torch {torch.__version__}")
    for way in arguments.ways:
        dtype, _, compiled = way.partition("-")
        for remat in (False, True):
            name = f"{way}{', recomputed' if remat else ''}"
            try:
                run = torch_step(
                    config,
                    rows,
                    "grouped_mm",
                    device="cuda",
                    dtype=getattr(torch, dtype),
                    compiled=bool(compiled),
                    remat=remat,
                )
                losses = [run(), run()]
                times = []
                for _ in range(arguments.steps):
                    started = time.perf_counter()
                    losses.append(run())
                    times.append(time.perf_counter() - started)
            except torch.cuda.OutOfMemoryError:
                run = None
                gc.collect()
                torch.cuda.empty_cache()
                print(f"{name}: out of memory", flush=True)
                continue
            took = statistics.median(times)
            print(
                f"{name}: {took * 1e3:.1f} ms a step, {tokens / took:,.0f} tokens/s, "
                f"MFU {flops / took / 989e12:.1%}, "
                f"peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB; losses "
                f"{', '.join(f'{x:.4f}' for x in losses[:3])}",
                flush=True,
            )
            break


if __name__ == "__main__":
    main()
