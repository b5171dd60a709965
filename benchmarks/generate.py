r"""Tokens per second of generation: ours beside transformers' on the same machine and weights.

    python benchmarks/generate.py --model tiny --compute float32 --batch 1 8 32
    python benchmarks/generate.py --run out/stdlib --compute float32 --drafts 1 2 \
        --text src/deepseek_jax/generate/engine.py
    python benchmarks/generate.py --model small --batch 1 32 128      # on a GPU

Greedy, all prompts of one length, no end of sequence: what is timed is `new` steps of decoding
after one prefill. Of transformers' ways to run the experts, the fastest is taken. With float32
the texts are compared too. `--drafts` adds rows with multi-token prediction, whose gain is a
property of the weights: on random ones nearly nothing is accepted.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from deepseek_jax import (
    DeepSeekV3,
    ModelConfig,
    Precision,
    export_hf,
    init_params,
    init_router_bias,
    preset,
)
from deepseek_jax.checkpoint import load_params
from deepseek_jax.checkpoint.run_directory import read_run
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.generate import Engine, EngineConfig, Request, Sampling
from deepseek_jax.types import Params


def timed(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median seconds of ``run`` after one call to warm up, and what it returned."""
    result, seconds = run(), []
    for _ in range(repeats):
        started = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), result


def ours(
    model: DeepSeekV3, weights: tuple[Params, Any], prompts: np.ndarray, new: int, drafts: int
) -> Any:
    """A function that generates, and its engine's completions."""
    rows, length = prompts.shape
    sizes = EngineConfig(
        slots=rows,
        lanes=min(rows, 16),
        max_length=length + new,
        prefill_chunk=length,
        rounds=16,
        drafts=drafts,
    )
    engine = Engine(model, *weights, sizes)
    requests = [Request(row.tolist(), Sampling(new, temperature=0.0)) for row in prompts]

    def run() -> list[Any]:
        return sorted(engine.generate(requests), key=lambda done: done.request)

    return run


def theirs(folder: Path, dtype: str, prompts: np.ndarray, new: int, experts: str) -> Any:
    """The same with transformers and torch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), experts_implementation=experts
    )
    model = model.to(device).eval()
    tokens = torch.from_numpy(prompts).long().to(device)
    mask = torch.ones_like(tokens)
    options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}

    def run() -> np.ndarray:
        with torch.no_grad():
            out = model.generate(tokens, attention_mask=mask, **options, pad_token_id=0)
        return out[:, prompts.shape[1] :].cpu().numpy()

    return run


def main() -> None:
    """Print a line per batch size."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--text", type=Path, help="with --run: prompts are pieces of this file")
    parser.add_argument("--layers", type=int, help="of a larger model, so many")
    parser.add_argument("--compute", default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--drafts", type=int, nargs="*", default=[])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--experts", nargs="*", default=["eager", "grouped_mm"])
    args = parser.parse_args()
    precision = Precision(params=args.compute, compute=args.compute)
    if args.run:
        config = ModelConfig.from_hf(read_run(args.run)["model"])
        params, bias, _ = load_params(args.run)
    else:
        config = preset(args.model)
        if args.layers:
            config = config.replace(num_hidden_layers=args.layers)
        model = DeepSeekV3(config, precision)
        params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
        bias = init_router_bias(config)
    model = DeepSeekV3(config, precision)
    rng = np.random.default_rng(0)
    kind = jax.devices()[0].device_kind
    print(f"{args.run or args.model}, {args.compute}, {kind}: {args.prompt} + {args.new} tokens")
    with tempfile.TemporaryDirectory() as folder:
        if args.experts:
            dtype: Any = {"float32": "fp32", "bfloat16": "bf16"}[args.compute]
            export_hf(Path(folder) / "hf", config, params, bias, dtype=dtype)
        for rows in args.batch:
            prompts = rng.integers(10, config.vocab_size, (rows, args.prompt))
            if args.text:
                ids = np.asarray(Tokenizer.load(args.run).encode(args.text.read_text()))
                starts = rng.integers(0, len(ids) - args.prompt, rows)
                prompts = np.stack([ids[at : at + args.prompt] for at in starts])
            tokens = rows * args.new
            reference = None
            best = 0.0
            for experts in args.experts:
                run = theirs(Path(folder) / "hf", args.compute, prompts, args.new, experts)
                seconds, reference = timed(run, args.repeats)
                best = max(best, tokens / seconds)
                print(f"batch {rows}: transformers, experts {experts}: {tokens / seconds:,.0f}/s")
            for drafts in (0, *args.drafts):
                run = ours(model, (params, bias), prompts, args.new, drafts)
                seconds, done = timed(run, args.repeats)
                line = f"batch {rows}: ours, {drafts} drafts: {tokens / seconds:,.0f} tokens/s"
                if best:
                    line += f", {tokens / seconds / best:.2f}x transformers"
                if drafts:
                    accepted = np.sum([one.accepted for one in done], axis=0)
                    mean = (accepted * np.arange(1, drafts + 2)).sum() / accepted.sum()
                    at_least = accepted[::-1].cumsum()[::-1][1:] / accepted.sum()
                    rates = ", ".join(f"{rate:.2f}" for rate in at_least)
                    line += f"; {mean:.2f} tokens a round, drafts accepted: {rates}"
                if reference is not None and args.compute == "float32":
                    same = np.mean([one.tokens for one in done] == reference)
                    line += f"; {same:.1%} of tokens the same"
                print(line, flush=True)


if __name__ == "__main__":
    main()
