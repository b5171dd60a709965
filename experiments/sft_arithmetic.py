"""Teach a small model to add in chat format: minutes on two CPU cores, accuracy before and after.

A `tiny` model without a word of chat reads text about digits (single-digit sums with their carry,
numbers spelled out), and is then fine-tuned on 8,000 conversations that add two numbers of three
digits, thinking digit by digit. Held-out sums differ by construction: a sum goes to one side or
the other by a hash of its two numbers, whichever comes first.
"""

import hashlib
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

from deepseek_jax.checkpoint import load_params
from deepseek_jax.cli import ends_in_a_sentence
from deepseek_jax.config import FLOAT32
from deepseek_jax.data.chat import ChatTemplate
from deepseek_jax.data.conversations import Message
from deepseek_jax.data.pipeline import DataConfig
from deepseek_jax.data.sft import ConversationConfig
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.generate import Sampling, complete
from deepseek_jax.model.transformer import DeepSeekV3
from deepseek_jax.presets import preset
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.optim import OptimConfig
from deepseek_jax.train.pretrain import PretrainConfig, pretrain
from deepseek_jax.train.sft import SftConfig, sft

MODEL = preset("tiny").replace(vocab_size=266, num_nextn_predict_layers=0)  # bytes, no merges


class Sum(NamedTuple):
    """A task and the test of its answer."""

    a: int
    b: int

    @property
    def held_out(self) -> bool:
        """By content, whichever number comes first."""
        digest = hashlib.blake2b(repr(sorted(self)).encode(), digest_size=1).digest()
        return digest[0] < 26  # a tenth

    @property
    def question(self) -> str:
        """What the user says."""
        return f"What is {self.a} + {self.b}?"

    @property
    def working(self) -> str:
        """Digit by digit, the last first."""
        lines, carry = [], 0
        for place in range(3):
            x, y = (n // 10**place % 10 for n in self)
            total = x + y + carry
            lines.append(f"{x}+{y}+{carry}={total}")
            carry = total // 10
        return "\n".join(lines)

    def solved_by(self, completion: str) -> bool:
        """Whether what stands after the thinking is the sum and nothing else."""
        return completion.rpartition("</think>")[2].strip() == str(self.a + self.b)


def sums(count: int, *, held_out: bool, seed: int) -> list[Sum]:
    """Different sums of one side."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        one = Sum(rng.randint(100, 999), rng.randint(100, 999))
        if one.held_out == held_out:
            found[one] = None
    return list(found)


def pages(count: int) -> Iterator[str]:
    """Text about digits, without a sum of three digits or a word of chat."""
    rng = random.Random(0)
    for _ in range(count):
        lines = []
        for _ in range(12):
            x, y, carry, n = (
                rng.randrange(10),
                rng.randrange(10),
                rng.randrange(2),
                rng.randrange(1000),
            )
            lines += [f"{x}+{y}+{carry}={x + y + carry}", f"{n:03} ends in {n % 10}."]
            lines += [f"What follows {n}? {n + 1}."]
        yield "\n".join(lines)


def write_data(folder: Path) -> None:
    """Text, and conversations of both sides."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "text.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": page}) + "\n" for page in pages(3000))
    for name, count, held_out in (("train", 8000, False), ("held_out", 400, True)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for one in sums(count, held_out=held_out, seed=count):
                answer = {"role": "assistant", "content": str(one.a + one.b)}
                answer["reasoning_content"] = one.working
                messages = [{"role": "user", "content": one.question}, answer]
                file.write(json.dumps({"messages": messages}) + "\n")


def accuracy(run: Path, tasks: list[Sum]) -> float:
    """Share of tasks solved greedily."""
    params, bias, _ = load_params(run)
    tokenizer = Tokenizer.load(run)
    template = ChatTemplate.load(run, tokenizer)
    prompts = [template.prompt_ids([Message("user", task.question)]) for task in tasks]
    model = DeepSeekV3(MODEL, FLOAT32)
    said = complete(model, params, bias, tokenizer, prompts, Sampling(64, temperature=0.0))
    return float(np.mean([task.solved_by(text) for task, text in zip(tasks, said, strict=True)]))


@dataclass(frozen=True)
class Experiment:
    """Where it happens; stopped or killed, the same command goes on."""

    out: Path = Path("out/sft_arithmetic")


def main() -> None:
    """Text, then conversations; accuracy on 400 held-out sums before and after the latter."""
    started = time.perf_counter()
    out = tyro.cli(Experiment).out
    data, base, tuned = (out / name for name in ("data", "base", "sft"))
    write_data(data)
    learnt = pretrain(
        PretrainConfig(
            out=base,
            resume=(base / "run.json").exists(),
            model=MODEL,
            precision=FLOAT32,
            data=DataConfig(source=(str(data / "text.jsonl"),), seq_len=128, fim_rate=0.0),
            loop=LoopConfig(steps=300, batch_size=16, eval_every=0, save_every=300),
            optim=OptimConfig(peak_lr=3e-3, min_lr=3e-4, final_lr=3e-4),
            prompt="3+4",
        )
    )
    if learnt is None:  # stopped, and saved
        return
    tasks = sums(400, held_out=True, seed=400)
    before = accuracy(base, tasks)
    adds = sft(
        SftConfig(
            out=tuned,
            resume=(tuned / "run.json").exists(),
            init=base,
            precision=FLOAT32,
            epochs=4.0,
            conversations=ConversationConfig(
                data=(str(data / "train.jsonl"),),
                held_out=(str(data / "held_out.jsonl"),),
                seq_len=256,
            ),
            loop=LoopConfig(batch_size=16, eval_every=200, save_every=400),
            # As in pretraining: narrow models want high rates.
            optim=OptimConfig(
                peak_lr=2e-3,
                min_lr=1e-4,
                final_lr=1e-4,
                constant_until=0.1,
                cosine_until=1.0,
                min_until=1.0,
            ),
        )
    )
    if adds is None:
        return
    after = accuracy(tuned, tasks)
    print(
        f"accuracy on {len(tasks)} held-out sums: {before:.1%} before, {after:.1%} after; "
        f"{time.perf_counter() - started:.0f} s in all"
    )


if __name__ == "__main__":
    with ends_in_a_sentence():
        main()
