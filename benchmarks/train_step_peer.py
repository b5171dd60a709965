"""The step of ``train_step.py`` as transformers or torchtitan make it, on the same GPU.

    python benchmarks/train_step_peer.py --model v3 --layers 3 --experts 16 --vocab 16384 --batch 2
    python benchmarks/train_step_peer.py ... --batch 8 --peer torchtitan --checkout ~/torchtitan

The same slice, batch and sequence; grouped matmuls for the experts, SDPA, fused AdamW, with and
without ``torch.compile``; parameters and moments in BF16 (ours keep FP32 parameters), or FP32
under autocast. What runs out of memory is tried again with more recomputation.

torchtitan (v0.2.2) is read from a checkout and needs datasets, torchdata and tyro. Its compilation
replaces a function of its module for good: a way that is not compiled has to come before.
"""

import argparse
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.torch_step import torch_step
from benchmarks.train_step import model_arguments, slice_of
from deepseek_jax.plan import training_flops_per_token


def timed(make: Callable[[], Callable[[], float]], steps: int) -> tuple[float, list[float]] | None:
    """Median seconds of a step, and the losses from the first on; None: out of memory."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        run = make()
        losses = [run(), run()]
        times = []
        for _ in range(steps):
            started = time.perf_counter()
            losses.append(run())
            times.append(time.perf_counter() - started)
    except torch.cuda.OutOfMemoryError:
        return None
    return statistics.median(times), losses


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model_arguments(parser)
    parser.add_argument("--peer", default="transformers", choices=["transformers", "torchtitan"])
    parser.add_argument("--checkout", help="torchtitan's directory")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--ways", nargs="*", default=["bfloat16", "bfloat16-compiled"])
    parser.add_argument("--remat", nargs="*", help="what is kept, in the order to be tried in")
    arguments = parser.parse_args()
    config = slice_of(arguments)
    if arguments.peer == "torchtitan":
        sys.path.insert(0, arguments.checkout)
        from benchmarks.torchtitan_step import torchtitan_step as step

        remats = ["none", "selective", "full"]
    else:
        step = functools.partial(torch_step, experts="grouped_mm")
        remats = ["none", "full"]
    rng = np.random.default_rng(0)
    rows = rng.integers(0, config.vocab_size, (arguments.batch, arguments.seq + 1))
    tokens = arguments.batch * arguments.seq
    flops = training_flops_per_token(config, arguments.seq) * tokens
    print(
        f"{arguments.peer}, {torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"{tokens} tokens a step"
    )
    for way in arguments.ways:
        dtype, _, compiled = way.partition("-")
        how = {"device": "cuda", "dtype": getattr(torch, dtype), "compiled": bool(compiled)}
        for remat in arguments.remat or remats:
            outcome = timed(
                functools.partial(step, config, rows, remat=remat, **how), arguments.steps
            )
            peak = torch.cuda.max_memory_allocated() / 1e9
            name = f"{way}, recomputed: {remat}"
            if outcome is None:
                print(f"{name}: out of memory at {peak:.1f} GB", flush=True)
                continue
            took, losses = outcome
            print(
                f"{name}: {took * 1e3:.1f} ms a step, {tokens / took:,.0f} tokens/s, "
                f"MFU {flops / took / 989e12:.1%}, peak {peak:.1f} GB; losses "
                f"{', '.join(f'{x:.4f}' for x in losses[:3])}",
                flush=True,
            )
            break


if __name__ == "__main__":
    main()
