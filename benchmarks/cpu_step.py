"""One optimizer step on CPU: ours beside transformers' on torch, same model, batch and threads.

    python benchmarks/cpu_step.py --model tiny --batch 16 --seq 128

Both do forward, backward, clipping and AdamW in float32. transformers has no MTP module and no
router-bias update; MTP is left out of ours too, the bias update is not. Of transformers' ways to
run the experts, each that works on CPU is timed and the fastest is taken.
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
import torch

from benchmarks.torch_step import torch_step
from deepseek_jax import Batch, DeepSeekV3, ModelConfig, preset, sharding
from deepseek_jax.config import FLOAT32
from deepseek_jax.train import optim
from deepseek_jax.train.loop import divide_batch, jit_step
from deepseek_jax.train.losses import pretrain_loss
from deepseek_jax.train.step import init_state, make_train_step, state_shardings


def ours(config: ModelConfig, rows: np.ndarray) -> Callable[[], float]:
    """A function that makes one step and returns its loss."""
    model = DeepSeekV3(config, FLOAT32)
    tx = optim.make_optimizer(optim.OptimConfig(warmup_steps=0), 1000)
    mesh = sharding.make_mesh("data=1", jax.devices()[:1])
    where = state_shardings(model, tx, mesh)
    state = jax.jit(functools.partial(init_state, model, tx), out_shardings=where)(
        jax.random.key(0)
    )

    def loss_fn(params, bias, batch, totals, step):
        return pretrain_loss(model, params, bias, batch, totals, 0.0)

    step = jit_step(make_train_step(model, tx, loss_fn, lambda step: 0.001), state, model)
    B, T = rows[:, 1:].shape
    ones = np.ones((B, T), np.int32)
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    parts = Batch(rows[:, :-1], rows[:, 1:], ones.astype(np.float32), positions, ones)
    batch = divide_batch(B, T, mesh).place([parts])

    def run() -> float:
        nonlocal state
        state, metrics = step(state, batch, np.float32(np.inf))
        return float(metrics["loss"])

    return run


def seconds(run: Callable[[], float], repeats: int) -> float:
    """Median of so many steps, after two that compile and warm up."""
    run(), run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    """Print a line for each, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    config = preset(args.model).replace(num_nextn_predict_layers=0)
    rng = np.random.default_rng(0)
    shape = (args.batch, args.seq + 1)
    rows = rng.integers(0, config.vocab_size, shape).astype(np.int32)
    tokens = args.batch * args.seq
    print(f"{args.model} without MTP, float32, {tokens} tokens a step, {threads} threads")
    mine = seconds(ours(config, rows), args.repeats)
    print(f"deepseek_jax (jax {jax.__version__}): {mine:.4f} s, {tokens / mine:,.0f} tokens/s")
    others = {}
    for experts in ("eager", "batched_mm", "grouped_mm"):
        try:
            others[experts] = seconds(torch_step(config, rows, experts), args.repeats)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            print(f"transformers, experts {experts}: {str(error).splitlines()[0]}")
            continue
        rate = tokens / others[experts]
        print(f"transformers, experts {experts}: {others[experts]:.4f} s, {rate:,.0f} tokens/s")
    print(f"ratio to transformers' fastest: {min(others.values()) / mine:.2f}x")


if __name__ == "__main__":
    main()
