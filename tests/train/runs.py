"""A pretraining run small enough to be killed, continued and compared within a test."""

import functools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deepseek_jax.checkpoint import Checkpointer, claim_run_directory
from deepseek_jax.checkpoint.trees import flatten, restore_tree, stored_tree
from deepseek_jax.config import FLOAT32, ModelConfig
from deepseek_jax.data.pipeline import DataConfig
from deepseek_jax.data.tokenizer import train_bpe
from deepseek_jax.model.transformer import DeepSeekV3
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.optim import OptimConfig, make_optimizer
from deepseek_jax.train.pretrain import PretrainConfig, run_json
from deepseek_jax.train.step import init_state

# 266 is the least that byte-level BPE can have: the bytes and the special tokens, no merges.
MODEL = ModelConfig(
    vocab_size=266,
    hidden_size=32,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    num_attention_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    intermediate_size=48,
    moe_intermediate_size=16,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    num_nextn_predict_layers=1,
    initializer_range=0.02,
)
WORDS = ["the", "cat", "sat", "on", "a", "mat", "def", "return", "if", "for", "x", "y", "=", "+"]


def write_corpus(folder: Path, documents: int = 60) -> Path:
    """Documents of random words, one a file."""
    rng = random.Random(0)
    folder.mkdir(parents=True)
    for i in range(documents):
        lines = (" ".join(rng.choices(WORDS, k=8)) for _ in range(8))
        (folder / f"{i}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def write_config(path: Path, model: ModelConfig = MODEL, **changes: Any) -> Path:
    """A ``config.json``; ``changes`` are made in the file, unchecked."""
    path.write_text(json.dumps(model.to_hf() | changes), encoding="utf-8")
    return path


def config(out: Path, source: Path, *, loop: LoopConfig, **changes: Any) -> PretrainConfig:
    """For ``pretrain``: the run that ``options`` is the command line of."""
    data = DataConfig((str(source),), seq_len=32, held_out_fraction=0.1, mix_tokens=2_000)
    base = {"model": MODEL, "precision": FLOAT32, "data": data, "sample_tokens": 4}
    return PretrainConfig(out=out, loop=loop, **(base | changes))


def options(out: Path, source: Path, model: Path) -> list[str]:
    """The command line of ``config``, for 24 steps of 8 sequences."""
    words = f"--out {out} --source {source} --model {model} --compute float32 --sample-tokens 4"
    loop = "--steps 24 --batch-size 8 --save-every 4 --eval-every 10"
    return f"{words} --seq-len 32 --held-out-fraction 0.1 --mix-tokens 2000 {loop}".split()


def start(*words: str, cache: Path | None = None, stage: str = "pretrain") -> subprocess.Popen[str]:
    """``deepseek-jax pretrain`` (or another stage) in its own process, on one CPU device."""
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "COLUMNS": "100"}
    if cache is not None:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
    return subprocess.Popen(
        [sys.executable, "-m", "deepseek_jax.cli", stage, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def wait_for_step(process: subprocess.Popen[str], out: Path, step: int) -> None:
    """Returns as soon as the run has made ``step``."""
    path = out / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (path.exists() and f'\n{{"step": {step},' in "\n" + path.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def saved_steps(out: Path) -> list[int]:
    """The steps with a complete checkpoint."""
    return sorted(int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdecimal())


def leaves(out: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path."""
    folder = out / "checkpoints" / str(step)
    return {
        f"{item}/{name}": np.asarray(leaf)
        for item in ("model", "optimizer")
        for name, leaf in flatten(restore_tree(folder / item, stored_tree(folder / item))).items()
    }


def lines(out: Path) -> list[dict[str, Any]]:
    """``metrics.jsonl`` without what depends on the clock."""
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows]


def assert_same_run(left: Path, right: Path, step: int) -> None:
    """Checkpoint of ``step`` and metrics agree bit for bit."""
    a, b = leaves(left, step), leaves(right, step)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].tobytes() == b[name].tobytes(), name
    # Position in the data, RNG, loss monitor, tokens seen.
    host = (f"checkpoints/{step}/host/metadata", "tokenizer.json", "sample.txt")
    assert [(left / f).read_text() for f in host] == [(right / f).read_text() for f in host]
    assert lines(left) == lines(right)


def write_base(out: Path, **changes: Any) -> Path:
    """A run of random weights, as ``pretrain`` would leave it, with a tokenizer of bytes."""
    model = MODEL.replace(**changes)
    run = PretrainConfig(out=out, model=model, precision=FLOAT32, loop=LoopConfig(steps=1))
    claim_run_directory(out, run_json(run), resume=False)
    train_bpe(WORDS, model.vocab_size).save(out / "tokenizer.json")
    tx = make_optimizer(OptimConfig(), 1)
    state = jax.jit(functools.partial(init_state, DeepSeekV3(model, FLOAT32), tx))(
        jax.random.key(0)
    )
    with Checkpointer(out) as checkpointer:
        checkpointer.save(1, state, data_state={}, rng=jax.random.key(0))
    return out
