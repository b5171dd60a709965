"""A step of GRPO: ours beside TRL's GRPOTrainer, same model, questions, batch and lengths.

    pip install trl datasets       # beside torch and transformers, as in the [test] extra
    python benchmarks/grpo.py --prompts 16 --group 8 --new 64

Both start from one Hugging Face folder of random weights, in float32, with the same optimizer
settings and a reward that is a hash of the text; completions end by chance (rarely) or at the
limit. Medians over steps, without the first two, which compile. Generation is timed inside each
trainer; the rest of a step is training.
"""

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.timing import median_seconds
from deepseek_jax import DeepSeekV3, ModelConfig, export_hf, init_params, init_router_bias, preset
from deepseek_jax.config import FLOAT32
from deepseek_jax.data.tasks import open_tasks
from deepseek_jax.data.tokenizer import train_bpe
from deepseek_jax.generate import Sampling
from deepseek_jax.plan import training_flops_per_token
from deepseek_jax.rewards import Term
from deepseek_jax.train.grpo import GrpoConfig, grpo
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.objective import ObjectiveConfig
from deepseek_jax.train.rollout import RolloutConfig

TASKS = "add:3"
Times = tuple[float, float, float]  # seconds generating, seconds of the step, tokens generated


def worth(text: str) -> float:
    """Of no meaning, and the same for both."""
    return hashlib.blake2b(text.encode()).digest()[0] / 255


def ours(args: argparse.Namespace, folder: Path, out: Path) -> list[Times]:
    """Each step of our trainer."""
    rows = args.prompts * args.group
    config = GrpoConfig(
        out=out,
        init=folder,
        precision=FLOAT32,
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
    grpo(config, [Term("accuracy", 1.0, lambda prompt, said, answer: worth(said.text))])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        (
            line["generate_s"],
            line["generate_s"] + line["train_s"],
            line["completion_tokens"] * rows,
        )
        for line in lines
        if "train_s" in line
    ]


def theirs(args: argparse.Namespace, folder: Path, out: Path, experts: str) -> list[Times]:
    """Each step of TRL's."""
    import torch
    from datasets import Dataset  # pyrefly: ignore [missing-import]
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer  # pyrefly: ignore [missing-import]

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<｜begin▁of▁sentence｜>",
        eos_token="<｜end▁of▁sentence｜>",
        pad_token="<｜▁pad▁｜>",
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation=experts
    )
    rows = args.prompts * args.group
    steps: list[Times] = []
    generating, tokens = [0.0], [0.0]

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began, generating[0], tokens[0] = time.perf_counter(), 0.0, 0.0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps.append((generating[0], time.perf_counter() - self.began, tokens[0]))

    class Timed(GRPOTrainer):
        def _generate(self, *given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            found = super()._generate(*given, **named)
            generating[0] += time.perf_counter() - began
            tokens[0] += sum(len(ids) for ids in found[1])
            return found

    config = GRPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=rows,
        num_generations=args.group,
        max_completion_length=args.new,
        max_steps=args.steps,
        learning_rate=3e-6,
        lr_scheduler_type="constant",
        beta=0.0,
        temperature=1.0,
        loss_type="grpo",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    prompts = [{"prompt": task.prompt} for task in open_tasks(TASKS, size=1000, seed=0)]
    trainer = Timed(
        model=model,
        reward_funcs=lambda completions, **_: [worth(text) for text in completions],
        args=config,
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    return steps


def report(name: str, steps: list[Times]) -> tuple[float, float]:
    """Print medians; tokens per second of generation, and seconds of a step."""
    generating, whole, tokens = zip(*steps[2:], strict=True)
    rate = statistics.median(n / s for n, s in zip(tokens, generating, strict=True))
    step = statistics.median(whole)
    print(
        f"{name}: {rate:,.0f} tokens/s generated; step {step:.2f} s, of which generating "
        f"{statistics.median(generating):.2f} s; {statistics.mean(tokens):,.0f} tokens a step",
        flush=True,
    )
    return rate, step


def of_products(config: ModelConfig, rows: int, new: int) -> float:
    """Print and return the seconds of a step's products alone, at the speed of a large one.

    Training goes forward and back over whole completions, generation forward over new tokens.
    """
    side = 4096
    seconds = median_seconds(jax.jit(jnp.dot), [(jnp.ones((side, side)),) * 2])
    prompt = len(open_tasks(TASKS, size=1, seed=0)[0].prompt)  # a byte each
    flops = training_flops_per_token(config, prompt + new) * rows * (prompt + new + new / 3)
    alone = flops / (2 * side**3 / seconds)
    print(
        f"products of a step, {flops / 1e9:.0f} GFLOP, at the {2 * side**3 / seconds / 1e9:.0f} "
        f"GFLOP/s of one of {side}^3: {alone:.2f} s",
        flush=True,
    )
    return alone


def main() -> None:
    """Print a line for each, the ratio to the faster of TRL's, and the floor under both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument(
        "--micro-batch", type=int, help="completions at a time in our training half; default: all"
    )
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--experts", nargs="*", default=["eager", "grouped_mm"])
    args = parser.parse_args()
    model_config = preset(args.model).replace(vocab_size=266, num_nextn_predict_layers=0)
    model = DeepSeekV3(model_config, FLOAT32)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    alone = of_products(model_config, args.prompts * args.group, args.new)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "hf"
        export_hf(folder, model_config, params, init_router_bias(model_config), dtype="fp32")
        train_bpe(["0123456789+="], 266).save(folder / "tokenizer.json")
        found = []
        for experts in args.experts:
            steps = theirs(args, folder, Path(scratch) / experts, experts)
            found.append(report(f"TRL, experts {experts}", steps))
        rate, step = report("ours", ours(args, folder, Path(scratch) / "ours"))
        if found:
            rates, theirs_s = zip(*found, strict=True)
            print(
                f"ours: {rate / max(rates):.2f}x the tokens generated per second, "
                f"{min(theirs_s) / step:.2f}x the steps, of at most {min(theirs_s) / alone:.2f}x"
            )


if __name__ == "__main__":
    main()
