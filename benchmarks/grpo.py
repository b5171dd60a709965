"""Steps of GRPO: ours beside TRL's GRPOTrainer, same model, questions, batch and lengths.

    pip install trl datasets       # beside torch and transformers, as in the [test] extra
    python benchmarks/grpo.py --new 128 --steps 9
    taskset -c 0 python benchmarks/grpo.py --new 128 --steps 9 --cpu-seconds
    python benchmarks/grpo.py --new 128 --steps 9 --precision bfloat16 --ways ours bf16 compiled

Both start from one Hugging Face folder of random weights, with the same optimizer settings and a
reward that is a hash of the text, on the GPU where there is one. Nothing ends a completion but its
limit, so all are of one length. A step lasts from one judgement to the next, whatever is done
between them; medians, without the first two, which compile. Generation is timed inside each
trainer; the rest of a step is training.
"""

import argparse
import contextlib
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.timing import median_seconds
from deepseek_jax import DeepSeekV3, ModelConfig, export_hf, init_params, init_router_bias, preset
from deepseek_jax.config import FLOAT32, Precision
from deepseek_jax.data.tasks import open_tasks
from deepseek_jax.data.tokenizer import train_bpe
from deepseek_jax.generate import Sampling, text_request
from deepseek_jax.plan import training_flops_per_token
from deepseek_jax.rewards import Sample, Term
from deepseek_jax.train import rollout
from deepseek_jax.train.grpo import GrpoConfig, grpo
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.objective import ObjectiveConfig
from deepseek_jax.train.rollout import RolloutConfig

TASKS = "add:3"
PRECISIONS = {"float32": FLOAT32, "bfloat16": Precision()}


class Way(NamedTuple):
    """To run TRL's trainer."""

    experts: str = "grouped_mm"
    master: str = "float32"
    """What the optimizer works on; float32 with BF16 products is autocast, as in our trainer."""
    options: Mapping[str, Any] = MappingProxyType({})
    """Of ``GRPOConfig``."""
    compile_decoding: bool = False
    """With a static cache; TRL forbids it, so this goes beyond its options."""
    group_decoding: bool = False
    """On a GPU transformers decodes by copying each row's experts; this goes beyond it, too."""


_STATIC = {"cache_implementation": "static"}
_CONTINUOUS = {"use_transformers_continuous_batching": True}
WAYS = {
    "eager": Way("eager"),
    "grouped_mm": Way(),
    "bf16": Way(master="bfloat16"),
    "bf16_grouped": Way(master="bfloat16", group_decoding=True),
    "compiled": Way("grouped_mm", "bfloat16", _STATIC, True, True),
    "compiled_both": Way("grouped_mm", "bfloat16", _STATIC | {"torch_compile": True}, True, True),
    "continuous": Way(master="bfloat16", options=_CONTINUOUS),
}


class Judge:
    """A reward of no meaning, the same for both, that notes when it is asked."""

    def __init__(self) -> None:
        self.asked: list[float] = []

    def __call__(self, texts: Iterable[str]) -> list[float]:
        """As TRL's asks."""
        self.asked.append(time.perf_counter())
        return [hashlib.blake2b(text.encode()).digest()[0] / 255 for text in texts]

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """As our trainer asks."""
        return self(sample.completion.text for sample in samples)


class Steps(NamedTuple):
    """Of one trainer."""

    asked: list[float]
    """When each step's completions were judged."""
    generating: list[float]
    """Seconds."""
    tokens: list[float]
    """Generated."""


def ours(args: argparse.Namespace, folder: Path, out: Path) -> Steps:
    """Each step of our trainer."""
    rows, judge = args.prompts * args.group, Judge()
    config = GrpoConfig(
        out=out,
        init=folder,
        precision=PRECISIONS[args.precision],
        remat=args.remat,
        tasks=TASKS,
        prompt_style="plain",
        rollout=RolloutConfig(
            prompts=args.prompts,
            group_size=args.group,
            sampling=Sampling(args.new, temperature=1.0, top_p=1.0),
            slots=rows,
        ),
        objective=ObjectiveConfig(kl_coef=0.0),
        loop=LoopConfig(
            steps=args.steps,
            batch_size=rows,
            micro_batch=args.micro_batch,
            eval_every=0,
            save_every=args.steps,
        ),
        eval_tasks=1,
        eval_samples=1,
        show_every=1000,
    )

    def endless(*given: Any, **named: Any) -> Any:
        return text_request(*given, **named)._replace(stop_tokens=())

    with mock.patch.object(rollout, "text_request", endless):
        grpo(config, [Term("accuracy", 1.0, judge)])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "train_s" in line]
    return Steps(
        judge.asked,
        [line["generate_s"] for line in lines],
        [line["completion_tokens"] * rows for line in lines],
    )


def theirs(args: argparse.Namespace, folder: Path, out: Path, way: Way) -> Steps:
    """Each step of TRL's."""
    import torch
    from datasets import Dataset  # pyrefly: ignore [missing-import]
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer  # pyrefly: ignore [missing-import]

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<｜begin▁of▁sentence｜>",
        eos_token="<｜end▁of▁sentence｜>",
        pad_token="<｜▁pad▁｜>",
    )
    half = args.precision == "bfloat16"
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=way.master if half else "float32",
        experts_implementation=way.experts,
        attn_implementation="sdpa",
    )
    rows, micro, gpu = args.prompts * args.group, args.micro_batch, torch.cuda.is_available()
    judge, generating, tokens = Judge(), [], []

    class Timed(GRPOTrainer):
        def _generate(self, *given: Any, **named: Any) -> Any:
            if gpu:
                torch.cuda.synchronize()  # the last step's update may still be under way
            began = time.perf_counter()
            found = super()._generate(*given, **named)
            generating.append(time.perf_counter() - began)  # lists of tokens: nothing is pending
            tokens.append(sum(len(ids) for ids in found[1]))
            return found

    config = GRPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=micro or rows,
        gradient_accumulation_steps=rows // (micro or rows),
        num_generations=args.group,
        max_completion_length=args.new,
        max_steps=args.steps,
        learning_rate=3e-6,
        lr_scheduler_type="constant",
        beta=0.0,
        temperature=1.0,
        loss_type="grpo",
        bf16=half and way.master == "float32",
        gradient_checkpointing=False,
        use_cpu=not gpu,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **way.options,
    )
    prompts = [{"prompt": task.prompt} for task in open_tasks(TASKS, size=1000, seed=0)]
    trainer = Timed(
        model=model,
        reward_funcs=lambda completions, **_: judge(completions),
        args=config,
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
    )
    endless = {"eos_token_id": None}
    trainer.generation_config.update(**endless, disable_compile=not way.compile_decoding)
    trainer.generation_kwargs.update(endless)
    trainer.eos_token_ids = [-1]
    model.generation_config.update(**endless)
    if way.group_decoding:
        model._optimize_model_for_decode = contextlib.nullcontext
    trainer.train()
    return Steps(judge.asked, generating, tokens)


def report(name: str, steps: Steps) -> tuple[float, float]:
    """Print medians; tokens per second of generation, and seconds of a step."""
    whole = [b - a for a, b in zip(steps.asked[1:], steps.asked[2:], strict=False)]
    generating, tokens = steps.generating[2:], steps.tokens[2:]
    rate = statistics.median(n / s for n, s in zip(tokens, generating, strict=True))
    training = [a - b for a, b in zip(whole, generating, strict=True)]
    print(
        f"{name}: {rate:,.0f} tokens/s generated; step {statistics.median(whole):.3f} s, of which "
        f"generating {statistics.median(generating):.3f} s and the rest "
        f"{statistics.median(training):.3f} s; {statistics.mean(tokens):,.0f} tokens a step; "
        f"steps of {min(whole):.3f} to {max(whole):.3f} s",
        flush=True,
    )
    return rate, statistics.median(whole)


def of_products(config: ModelConfig, precision: Precision, rows: int, new: int) -> float:
    """Print and return the seconds of a step's products alone, at the speed of a large one.

    Training goes forward and back over whole completions, generation forward over new tokens.
    """
    side = 4096
    square = jnp.ones((side, side), precision.compute_dtype)
    seconds = median_seconds(jax.jit(jnp.dot), [(square, square)])
    prompt = len(open_tasks(TASKS, size=1, seed=0)[0].prompt)  # a byte each
    flops = training_flops_per_token(config, prompt + new) * rows * (prompt + new + new / 3)
    alone = flops / (2 * side**3 / seconds)
    print(
        f"products of a step, {flops / 1e9:.0f} GFLOP, at the {2 * side**3 / seconds / 1e9:.0f} "
        f"GFLOP/s of one of {side}^3: {alone:.3f} s",
        flush=True,
    )
    return alone


def main() -> None:
    """A line for each, the ratio to the fastest of TRL's, and the floor under both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument(
        "--micro-batch", type=int, help="completions at a time in the training half; default: all"
    )
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--remat", default="none", help="of ours; TRL's keeps all activations")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument(
        "--ways", nargs="*", choices=["ours", *WAYS], default=["ours", "eager", "grouped_mm"]
    )
    parser.add_argument(
        "--cpu-seconds",
        action="store_true",
        help="count this process's, which other jobs hardly lengthen; pin it to one core",
    )
    args = parser.parse_args()
    if args.cpu_seconds:
        with mock.patch.object(time, "perf_counter", time.process_time):
            compare(args)
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Run each way, and print."""
    precision, rows = PRECISIONS[args.precision], args.prompts * args.group
    config = preset(args.model).replace(vocab_size=266, num_nextn_predict_layers=0)
    model = DeepSeekV3(config, precision)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(params))
    print(f"{count:,} parameters on {jax.devices()[0].device_kind}; {vars(args)}", flush=True)
    alone = of_products(config, precision, rows, args.new)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "hf"
        export_hf(folder, config, params, init_router_bias(config), dtype="fp32")
        train_bpe(["0123456789+="], 266).save(folder / "tokenizer.json")
        found: dict[str, tuple[float, float]] = {}
        for name in args.ways:
            out = Path(scratch) / name
            if name == "ours":
                found[name] = report(name, ours(args, folder, out))
                continue
            try:
                found[name] = report(name, theirs(args, folder, out, WAYS[name]))
            except Exception as error:  # not every way can run every model
                print(f"{name}: failed: {error!r}", flush=True)
    if "ours" in found and len(found) > 1:
        rate, step = found.pop("ours")
        rates, theirs_s = zip(*found.values(), strict=True)
        print(
            f"ours: {rate / max(rates):.2f}x the tokens generated per second, "
            f"{min(theirs_s) / step:.2f}x the steps, of at most {min(theirs_s) / alone:.2f}x"
        )


if __name__ == "__main__":
    main()
