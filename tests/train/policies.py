"""A policy small enough to be rolled out, killed, continued and compared within a test."""

import functools
import hashlib
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.checkpoint import Checkpointer, claim_run_directory
from deepseek_jax.config import FLOAT32, ModelConfig
from deepseek_jax.data.tokenizer import train_bpe
from deepseek_jax.generate import Sampling
from deepseek_jax.model.transformer import DeepSeekV3
from deepseek_jax.rewards import Term
from deepseek_jax.train.grpo import GRPO_OPTIM, GrpoConfig
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.optim import OptimConfig, make_optimizer
from deepseek_jax.train.rollout import RolloutConfig
from deepseek_jax.train.run import identity
from deepseek_jax.train.sft import SftConfig
from deepseek_jax.train.step import init_state
from tests.train.runs import MODEL

PARITY = Term("accuracy", 1.0, lambda prompt, said, answer: digest(said.text) % 2)
SAME = Term("accuracy", 1.0, lambda prompt, said, answer: 1.0)


def digest(text: str) -> int:
    """A number without meaning: random rewards that are the same in every run."""
    return hashlib.blake2b(text.encode()).digest()[0]


def write_policy(folder: Path, model_config: ModelConfig = MODEL) -> Path:
    """A run's directory with random weights and a tokenizer of bytes."""
    model = DeepSeekV3(model_config, FLOAT32)
    claim_run_directory(folder, identity(SftConfig(out=folder), model_config), resume=False)
    train_bpe(["0123456789+="], 266).save(folder / "tokenizer.json")
    init = functools.partial(init_state, model, make_optimizer(OptimConfig(), 100))
    with Checkpointer(folder) as saver:
        state = jax.jit(init)(jax.random.key(0))
        saver.save(1, state, data_state={}, rng=jax.random.key(0))
    return folder


def config(out: Path, init: Path, **changes: Any) -> GrpoConfig:
    """Four questions, four completions each of at most six tokens."""
    options: dict[str, Any] = {
        "tasks": "add:1",
        "num_tasks": 60,
        "held_out_fraction": 0.2,
        "prompt_style": "plain",
        "precision": FLOAT32,
        "rollout": rollout(),
        "loop": LoopConfig(steps=4, batch_size=16, save_every=2, eval_every=0),
        "optim": OptimConfig(**vars(GRPO_OPTIM) | {"peak_lr": 1e-2}),
        "eval_tasks": 4,
        "eval_samples": 2,
        "mesh": "data=1",
    }
    return GrpoConfig(out=out, init=init, **options | changes)


def rollout(**changes: Any) -> RolloutConfig:
    """Sizes of ``config``."""
    sampling = Sampling(6, temperature=1.0, top_p=1.0)
    sizes: dict[str, Any] = {"prompts": 4, "group_size": 4, "sampling": sampling, "slots": 8}
    return RolloutConfig(**sizes | changes)
