"""Pretrain ``tiny`` on the Python standard library's source: minutes on two CPU cores."""

from pathlib import Path

from deepseek_jax.cli import run_recipe
from deepseek_jax.config import FLOAT32
from deepseek_jax.data.pipeline import DataConfig
from deepseek_jax.presets import preset
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.optim import OptimConfig
from deepseek_jax.train.pretrain import PretrainConfig, pretrain

CONFIG = PretrainConfig(
    out=Path("out/stdlib"),
    model=preset("tiny"),
    precision=FLOAT32,  # CPUs have no fast bfloat16
    # The whole corpus is one window of rows: its documents differ too much to come one by one.
    data=DataConfig(source=("stdlib",), seq_len=128, mix_tokens=5_000_000),
    loop=LoopConfig(steps=1200, batch_size=16, eval_every=200, eval_batches=None, save_every=300),
    # Narrow models want high rates: V3's 2.2e-4 goes with a width of 7168.
    optim=OptimConfig(peak_lr=4e-3, min_lr=4e-4, final_lr=1e-4),
)

if __name__ == "__main__":
    run_recipe(pretrain, CONFIG)
