r"""Tokens per second of generation: ours beside transformers' on the same machine.

    python benchmarks/generate.py --model tiny --compute float32 --batch 1 8 32
    python benchmarks/generate.py --run out/stdlib --compute float32 --drafts 1 2 \
        --text src/deepseek_jax/generate/engine.py
    # On a GPU, where both want memory:
    export XLA_PYTHON_CLIENT_PREALLOCATE=false
    python benchmarks/generate.py --model small --batch 1 32 128 --peer grouped_mm
    python benchmarks/generate.py --model v3 --layers 4 --experts 16 --vocab 16384 \
        --batch 1 32 128 --peer grouped_mm

Greedy, all prompts of one length, no end of sequence: what is timed is one prefill and `new` steps
of decoding. Ours come first. Of transformers' ways to run the experts (`--peer`), the fastest is
taken. With float32 transformers has our weights, and the texts are compared too; else random ones
of the same shapes. `--drafts` adds rows with multi-token prediction, whose gain is a property of
the weights: on random ones nearly nothing is accepted.
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.timing import deadline
from benchmarks.train_step import slice_of
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


class Peer:
    """Transformers' model, with our weights (float32) or random ones."""

    def __init__(self, config: ModelConfig, params: Params, bias: Any, compute: str, experts: str):
        """Load, on the GPU if there is one."""
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, compute)
        if compute == "float32":
            with tempfile.TemporaryDirectory() as folder:
                export_hf(Path(folder) / "hf", config, params, bias, dtype="fp32")
                model: Any = AutoModelForCausalLM.from_pretrained(
                    Path(folder) / "hf", dtype=dtype, experts_implementation=experts
                )
        else:
            hf = config.to_hf()
            torch_config = AutoConfig.for_model(hf.pop("model_type"), **hf)
            torch_config._experts_implementation = experts
            with torch.device(self.device):
                model = AutoModelForCausalLM.from_config(torch_config, dtype=dtype)
        self.model = model.to(self.device).eval()

    def run(self, prompts: np.ndarray, new: int) -> Callable[[], np.ndarray]:
        """A function that generates."""
        tokens = torch.from_numpy(prompts).long().to(self.device)
        mask = torch.ones_like(tokens)
        options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}

        def generate() -> np.ndarray:
            with torch.no_grad():
                out = self.model.generate(tokens, attention_mask=mask, **options, pad_token_id=0)
            return out[:, prompts.shape[1] :].cpu().numpy()

        return generate


def drawn_prompts(args: argparse.Namespace, config: ModelConfig) -> list[np.ndarray]:
    """For every batch, rows of equal length."""
    rng = np.random.default_rng(0)
    if not args.text:
        return [rng.integers(10, config.vocab_size, (rows, args.prompt)) for rows in args.batch]
    ids = np.asarray(Tokenizer.load(args.run).encode(args.text.read_text()))
    pieces = []
    for rows in args.batch:
        starts = rng.integers(0, len(ids) - args.prompt, rows)
        pieces.append(np.stack([ids[at : at + args.prompt] for at in starts]))
    return pieces


def time_ours(
    args: argparse.Namespace, model: DeepSeekV3, weights: tuple[Params, Any], prompts: np.ndarray
) -> tuple[float, np.ndarray]:
    """Tokens a second without drafts, and the tokens; a line for each number of drafts."""
    rows, first = len(prompts), None
    for drafts in (0, *args.drafts):
        began = time.perf_counter()
        run = ours(model, weights, prompts, args.new, drafts)
        seconds, done = timed(run, args.repeats)
        rate = rows * args.new / seconds
        line = f"batch {rows}: ours, {drafts} drafts: {rate:,.0f} tokens/s"
        if drafts:
            accepted = np.sum([one.accepted for one in done], axis=0)
            mean = (accepted * np.arange(1, drafts + 2)).sum() / accepted.sum()
            at_least = accepted[::-1].cumsum()[::-1][1:] / accepted.sum()
            rates = ", ".join(f"{rate:.2f}" for rate in at_least)
            line += f"; {mean:.2f} tokens a round, drafts accepted: {rates}"
        print(f"{line} [{time.perf_counter() - began:.0f} s]", flush=True)
        if first is None:
            first = rate, np.asarray([one.tokens for one in done])
    assert first is not None
    return first


def main() -> None:
    """Print lines for ours, then for transformers' and the ratio of the two."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--layers", type=int, help="of a larger model, so many")
    parser.add_argument("--dense", type=int, default=1)
    parser.add_argument("--experts", type=int, help="of each layer")
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--text", type=Path, help="with --run: prompts are pieces of this file")
    parser.add_argument("--compute", default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--drafts", type=int, nargs="*", default=[])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer", nargs="*", default=["eager", "grouped_mm"])
    parser.add_argument("--deadline", type=float, default=3600, help="seconds, for all")
    args = parser.parse_args()
    modules = preset(args.model).num_nextn_predict_layers
    args.mtp, args.seq = modules if args.drafts else 0, args.prompt + args.new
    with deadline(args.deadline):
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Both, one after the other."""
    precision = Precision(params=args.compute, compute=args.compute)
    if args.run:
        config = ModelConfig.from_hf(read_run(args.run)["model"])
        params, bias, _ = load_params(args.run)
    else:
        config = slice_of(args)
        drawn = DeepSeekV3(config, precision)
        params = jax.jit(lambda key: init_params(drawn, key))(jax.random.key(0))
        bias = init_router_bias(config)
    model = DeepSeekV3(config, precision)
    kind = jax.devices()[0].device_kind
    print(f"{args.run or args.model}, {args.compute}, {kind}: {args.prompt} + {args.new} tokens")
    every = drawn_prompts(args, config)
    found = [time_ours(args, model, (params, bias), prompts) for prompts in every]
    best = [0.0] * len(every)
    for experts in args.peer:
        peer = Peer(config, params, bias, args.compute, experts)
        for i, (prompts, (rate, tokens)) in enumerate(zip(every, found, strict=True)):
            seconds, theirs = timed(peer.run(prompts, args.new), args.repeats)
            best[i] = max(best[i], len(prompts) * args.new / seconds)
            line = f"batch {len(prompts)}: transformers, experts {experts}: "
            line += f"{len(prompts) * args.new / seconds:,.0f} tokens/s"
            line += f"; ours are {rate / best[i]:.2f} times as many"
            if args.compute == "float32":
                line += f"; {np.mean(tokens == theirs):.1%} of tokens the same"
            print(line, flush=True)
        del peer
        gc.collect()


if __name__ == "__main__":
    main()
