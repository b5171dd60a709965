"""Reward turns a habit around: addition with working, 80% of whose demonstrations drop the carry.

A small MLA+MoE model first imitates demonstrations of two-digit sums, worked digit by digit. Four
fifths of them take every carry as 0, so imitation's likeliest answer is wrong wherever there is
one, and more imitation cannot mend that. Then GRPO rewards right answers. It selects a behaviour
that a fifth of the demonstrations showed; it does not invent one.

Three controls go the same way with a reward for form alone, with random rewards, and with more
imitation at the same cost. Every figure is of held-out sums, by a judge that the rewards do not
share code with.
"""

import dataclasses
import hashlib
import json
import re
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

from deepseek_jax.checkpoint import load_params
from deepseek_jax.config import FLOAT32
from deepseek_jax.data.pipeline import DataConfig
from deepseek_jax.data.prompts import Prompter
from deepseek_jax.data.tasks import Split, addition_demonstration, open_tasks, split
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.evaluate import solve
from deepseek_jax.generate import Engine, EngineConfig, Sampling
from deepseek_jax.model.transformer import DeepSeekV3
from deepseek_jax.presets import preset
from deepseek_jax.report import Progress, summary_table
from deepseek_jax.rewards import Completion, Term, numeric
from deepseek_jax.train.grpo import GRPO_OPTIM, GrpoConfig, grpo
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.objective import ObjectiveConfig
from deepseek_jax.train.optim import OptimConfig
from deepseek_jax.train.pretrain import PretrainConfig, pretrain
from deepseek_jax.train.reward_terms import RewardConfig
from deepseek_jax.train.rollout import RolloutConfig

Way = Literal["accuracy", "format", "random", "imitation"]
MODEL = preset("tiny").replace(vocab_size=266, num_nextn_predict_layers=0)  # bytes, no merges
P, G, HELD_OUT = 32, 8, 0.05


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What to run."""

    out: Path = Path("out/grpo_addition")
    digits: int = 2
    seeds: tuple[int, ...] = (0,)
    ways: tuple[Way, ...] = ("accuracy", "format", "random", "imitation")
    cold_steps: int = 500
    steps: int = 40
    peak_lr: float = 5e-4

    @property
    def tasks(self) -> str:
        """Where questions come from."""
        return f"add:{self.digits}"

    @property
    def max_new_tokens(self) -> int:
        """A demonstration and its end, with room to ramble."""
        return 14 * self.digits + 45


def demonstrations(path: Path, tasks: Split, seed: int) -> None:
    """Of the tasks to learn from; which ones are wrong depends on the seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for task in tasks.train:
            text = task.prompt + addition_demonstration(task, wrong_share=0.8, seed=seed)
            file.write(json.dumps({"text": text}) + "\n")


def imitate(run: Experiment, out: Path, init: Path | None, steps: int, seed: int) -> None:
    """Train on the demonstrations."""
    pretrain(
        PretrainConfig(
            out=out,
            init=init,
            model=MODEL,
            precision=FLOAT32,
            data=DataConfig(
                source=(str(run.out / f"demonstrations_{seed}.jsonl"),),
                seq_len=256,
                fim_rate=0.0,
                mask_documents=True,
                held_out_fraction=0.02,
                seed=seed,
            ),
            loop=LoopConfig(
                steps=steps, batch_size=16, eval_every=0, save_every=steps, init_seed=seed
            ),
            optim=OptimConfig(peak_lr=2e-3, min_lr=2e-4, final_lr=2e-4),
            prompt="47+85=",
        )
    )


def reinforce(run: Experiment, out: Path, init: Path, way: Way, seed: int) -> None:
    """GRPO with one of three rewards."""

    def random(prompt: str, said: Completion, answer: str) -> float:
        return hashlib.blake2b(f"{seed}{prompt}{said.text}".encode()).digest()[0] / 255

    config = GrpoConfig(
        out=out,
        init=init,
        precision=FLOAT32,
        tasks=run.tasks,
        task_seed=seed,
        held_out_fraction=HELD_OUT,
        prompt_style="plain",
        rewards=RewardConfig(accuracy_weight=float(way == "accuracy")),
        rollout=RolloutConfig(
            prompts=P,
            group_size=G,
            sampling=Sampling(run.max_new_tokens, temperature=1.0, top_p=1.0, seed=seed),
            slots=P * G,
        ),
        objective=ObjectiveConfig(kl_coef=0.0),
        loop=LoopConfig(steps=run.steps, batch_size=P * G, eval_every=10, save_every=run.steps),
        optim=dataclasses.replace(
            GRPO_OPTIM,
            constant_until=0.0,
            peak_lr=run.peak_lr,
            min_lr=run.peak_lr / 10,
            final_lr=run.peak_lr / 10,
        ),
        eval_tasks=200,
        show_every=20,
    )
    terms = [Term("accuracy", 0.0, numeric), Term("random", 1.0, random)]
    grpo(config, terms if way == "random" else None)


def judge(prompt: str, said: Completion, answer: str) -> float:
    """1 for the right sum in the right form; written apart from the rewards."""
    match = re.fullmatch(r"<think>[^<]+</think><answer>([0-9]+)</answer>", said.text)
    a, b = prompt.removesuffix("=").split("+")
    return float(match is not None and int(match[1]) == int(a) + int(b))


def figures(run: Experiment, folder: Path, tasks: Split) -> dict[str, float]:
    """Held-out accuracy: greedy, and of 4 samples at temperature 1."""
    params, bias, _ = load_params(folder)
    prompter = Prompter("plain", Tokenizer.load(folder))
    length = run.max_new_tokens + 2 * run.digits + 3
    sizes = EngineConfig(slots=128, max_length=length, lanes=32, prefill_chunk=16)
    engine = Engine(DeepSeekV3(MODEL, FLOAT32), params, bias, sizes)
    attempt = partial(solve, engine, prompter, tasks.held_out, judge)
    greedy = attempt(Sampling(run.max_new_tokens, temperature=0.0)).scalars()
    drawn = attempt(Sampling(run.max_new_tokens, temperature=1.0, top_p=1.0), 4).scalars()
    names = ("pass@1", "pass@4", "format", "truncated", "tokens", "groups_without_spread")
    return {"greedy": greedy["pass@1"]} | {name: drawn[name] for name in names}


def main() -> None:
    """Every seed: the cold start, then every way from it."""
    run = tyro.cli(Experiment)
    rows: list[dict[str, Any]] = []
    for seed in run.seeds:
        # Tasks come in another order for another seed; which are held out does not change.
        tasks = split(open_tasks(run.tasks, seed=seed), HELD_OUT)
        demonstrations(run.out / f"demonstrations_{seed}.jsonl", tasks, seed)
        cold = run.out / f"cold_{seed}"
        if not cold.exists():
            imitate(run, cold, None, run.cold_steps, seed)
        rows.append({"way": "cold start", "seed": seed} | figures(run, cold, tasks))
        for way in run.ways:
            out, began = run.out / f"{way}_{seed}", time.perf_counter()
            if way == "imitation":
                # As many tokens trained on; a third more for those that GRPO generated.
                tokens = run.steps * P * G * (run.max_new_tokens + 8) * 4 // 3
                imitate(run, out, cold, max(1, tokens // (16 * 256)), seed)
            else:
                reinforce(run, out, cold, way, seed)
            took = {"seconds": time.perf_counter() - began}
            rows.append({"way": way, "seed": seed} | figures(run, out, tasks) | took)
            (run.out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    with Progress(1) as console:
        console.console.print(summary_table(rows))


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache/deepseek_jax/recipe"))
    main()
