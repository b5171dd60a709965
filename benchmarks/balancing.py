"""Auxiliary-loss-free balancing from a deliberately skewed router: with the bias and without.

    python benchmarks/balancing.py --steps 400 --out docs/images/balancing.png

The router starts with every token on the same K experts of each layer: all embeddings share a
component, and the gates of those experts point along it. No balance loss helps.
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax import DeepSeekV3, ModelConfig, sharding
from deepseek_jax.config import FLOAT32
from deepseek_jax.data.pipeline import DataConfig, fit_tokenizer, train_batches
from deepseek_jax.presets import preset
from deepseek_jax.train import optim
from deepseek_jax.train.loop import divide_batch, jit_step
from deepseek_jax.train.losses import pretrain_loss
from deepseek_jax.train.step import init_state, make_train_step, state_shardings

CONFIG = preset("tiny").replace(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    moe_intermediate_size=32,
    n_routed_experts=8,
    n_group=1,
    topk_group=1,
    aux_loss_alpha=0.0,
)


def skewed(params: Any, config: ModelConfig, strength: float = 4.0) -> Any:
    """Parameters whose first K experts of every MoE layer want every token."""
    D, K = config.hidden_size, config.num_experts_per_tok
    direction = jnp.ones(D) / jnp.sqrt(D)
    params = jax.tree.map(lambda x: x, params)  # new dicts, old arrays
    params["embed"] = params["embed"] + direction

    def skew(moe: Any) -> None:
        moe["gate"] = moe["gate"].at[..., :K].add(strength / D**0.5 * direction[:, None])

    skew(params["moe_layers"]["moe"])
    for k in range(config.num_nextn_predict_layers):
        skew(params[f"mtp_{k}"]["block"]["moe"])
    return params


def violations(batches: Any, bias_speed: float, steps: int) -> np.ndarray:
    """Largest load violation over the main model's layers, at every step."""
    model = DeepSeekV3(CONFIG, FLOAT32)
    tx = optim.make_optimizer(optim.OptimConfig(peak_lr=5e-4, min_lr=5e-5), steps)
    mesh = sharding.make_mesh("data=1", jax.devices()[:1])
    where = state_shardings(model, tx, mesh)
    init = functools.partial(init_state, model, tx)
    state = jax.jit(init, out_shardings=where)(jax.random.key(0))
    params = jax.device_put(skewed(state.params, CONFIG), where.params)
    state = state._replace(params=params)

    def loss_fn(params, bias, batch, totals, step):
        return pretrain_loss(model, params, bias, batch, totals, 0.3)

    step = jit_step(make_train_step(model, tx, loss_fn, lambda _: bias_speed), state, model)
    found = []
    for _ in range(steps):
        rows = next(batches)
        B, T = rows.tokens_BT.shape
        batch = divide_batch(B, T, mesh).place([rows])
        state, metrics = step(state, batch, np.float32(np.inf))
        load = np.asarray(metrics["load_LE"][: CONFIG.num_moe_layers], np.float64)
        found.append((load.max(-1) / load.mean(-1) - 1).max())
    return np.array(found)


def stdlib_batches(rows: int = 16, seq_len: int = 64) -> Any:
    """Rows of the Python standard library's source."""
    data = DataConfig(seq_len=seq_len, fim_rate=0.0)
    return train_batches(data, fit_tokenizer(data, CONFIG.vocab_size), rows)


def main() -> None:
    """Run both, print start and end, draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--bias-speed", type=float, default=0.01)
    parser.add_argument("--out", type=Path, default=Path("docs/images/balancing.png"))
    args = parser.parse_args()
    curves = {}
    for name, speed in ((f"bias on (gamma {args.bias_speed})", args.bias_speed), ("bias off", 0.0)):
        curves[name] = violations(stdlib_batches(), speed, args.steps)
        first, last = curves[name][0], curves[name][-20:].mean()
        print(f"{name}: {first:.2f} -> {last:.2f} (mean of the last 20), {first / last:.1f}x")
    _draw(curves, args.out)


def _draw(curves: dict[str, np.ndarray], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axis = figure.subplots()
    for name, curve in curves.items():
        axis.plot(np.arange(1, len(curve) + 1), curve, label=name)
    axis.set(xlabel="step", ylabel="max load / mean load - 1", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
