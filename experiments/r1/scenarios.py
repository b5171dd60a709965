"""Stage 5: reinforcement learning for all scenarios (R1 section 2.3.4).

Sums are rewarded by rules, requests by a reward model that has learnt from pairs of the policy's
own replies which of them people prefer (here a rule, ``judge.kind``, stands for people).
"""

import itertools
import random
from collections.abc import Iterator
from typing import Any

from deepseek_jax.config import FLOAT32
from deepseek_jax.data.tasks import Task
from deepseek_jax.rewards import Completion, Sample
from deepseek_jax.train.grpo import grpo
from deepseek_jax.train.learned_reward import LearnedReward, summary
from deepseek_jax.train.optim import OptimConfig
from deepseek_jax.train.reward_model import RewardModelConfig, read_examples, train_reward_model
from deepseek_jax.train.reward_terms import RewardConfig
from experiments.r1.judge import Judge
from experiments.r1.judge import kind as judge_kind
from experiments.r1.setting import Setting, learn, reinforcing
from experiments.r1.text import World, reply, write_lines


def pairs(s: Setting, tasks: list[Task]) -> Iterator[dict[str, Any]]:
    """Replies two and two, kind and not: the policy's, and written ones lest a side be empty.

    What stands after the thinking alone is shown to the reward model.
    """
    rng = random.Random(s.seed)
    judge = Judge(s.out / "rejection", "chat", s.max_new_tokens)
    solved = judge.ask(tasks, 1.0, 16, seed=s.seed + 1)
    for row, samples in enumerate(solved.samples):
        sides: tuple[list[str], list[str]] = ([], [])
        for good, sample in zip(solved.correct_Pk[row], samples, strict=True):
            said = summary(sample)
            # What is no UTF-8, and a special token, is longer as text than it was as tokens.
            if said and len(said.encode()) <= s.max_new_tokens:
                sides[0 if good else 1].append(said)
        for _ in range(8):
            said = f"<answer>{reply(tasks[row], rng)[1]}</answer>"
            good = judge_kind(tasks[row].prompt, Completion(f"<think>-</think>{said}", 0), "")
            sides[0 if good else 1].append(said)
        kind, other = (rng.sample(side, len(side)) for side in sides)
        for chosen, rejected in itertools.islice(zip(kind, other, strict=False), 4):
            yield {"prompt": samples[0].prompt, "chosen": chosen, "rejected": rejected}


def scenarios(s: Setting, known: World) -> dict[str, float]:
    """The reward model, then GRPO; says how often the former is right on held-out pairs."""
    write_lines(s.file("pairs"), lambda: pairs(s, known.requests))
    write_lines(s.file("pairs_held_out"), lambda: pairs(s, known.held_out_requests))
    judge = s.out / "reward_model"
    count = len(read_examples(s.file("pairs"), "pairwise"))
    preferring = RewardModelConfig(
        init=s.out / "rejection",
        data=s.file("pairs"),
        out=judge,
        seq_len=88 + s.max_new_tokens,  # names of special tokens count as letters here
        batch_size=min(32, count),
        epochs=6,
        precision=FLOAT32,
        optim=OptimConfig(peak_lr=5e-4, min_lr=5e-5, final_lr=5e-5),
        seed=s.seed,
    )
    learn(train_reward_model, preferring)
    config = reinforcing(
        s,
        "scenarios",
        "rejection",
        s.scenario_steps,
        RewardConfig(language="en", reward_model=judge),
        temperature=0.7,
        peak_lr=1.5e-4,
        prompt_style="chat",
        general=s.file("requests"),
    )
    learn(grpo, config)
    return {"reward model, held-out pairs": agreement(s)}


def agreement(s: Setting) -> float:
    """Share of held-out pairs whose better reply the reward model prefers."""
    model = LearnedReward(s.out / "reward_model", precision=FLOAT32)
    found = read_examples(s.file("pairs_held_out"), "pairwise")
    said = [Sample(e.prompt, Completion(r, 0), "") for e in found for r in e.responses]
    scores = model.score(said)
    return sum(a > b for a, b in zip(scores[::2], scores[1::2], strict=True)) / len(found)
