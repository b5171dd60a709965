"""A step of decoding beside the time in which its bytes could be read.

    PYTHONPATH=src:. python benchmarks/decode_step.py --weights bfloat16 fp8
    PYTHONPATH=src:. python benchmarks/decode_step.py --batch 128 --profile out/profile

A slice of V3 by default: its widths and heads, few layers and experts. Every row of the cache is
filled but for the steps that are timed, with random numbers, and so are the weights. To be read:
every weight once, of experts those that a token has chosen, of the embedding the tokens' rows; the
filled slots of the cache; at what a copy reaches in the same run.
"""

import argparse
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import profile_parts
from benchmarks.mla_decode import copy_bandwidth
from benchmarks.timing import deadline
from benchmarks.train_step import slice_of
from deepseek_jax import DeepSeekV3, ModelConfig, Precision, init_params, init_router_bias
from deepseek_jax.convert import fp8_params
from deepseek_jax.generate import slots as programs
from deepseek_jax.generate.engine import serving_params
from deepseek_jax.model.transformer import abstract_params
from deepseek_jax.types import Params

ROUNDS = 16
CALLS = 6  # the first is not timed


def random_weights(config: ModelConfig, weights: str) -> tuple[DeepSeekV3, Params]:
    """The model and its parameters as serving has them; in FP8, of the same magnitude."""
    matmuls: Any = "fp8" if weights == "fp8" else "compute"
    model = DeepSeekV3(config, Precision(params="bfloat16", matmuls=matmuls))
    if weights != "fp8":
        params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
        return model, serving_params(model, params)
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    leaves, tree = jax.tree.flatten_with_path(fp8_params(config, abstract_params(model)))
    drawn: list[jax.Array] = []
    for index, (path, leaf) in enumerate(leaves):
        name, key = path[-1].key, jax.random.key(index)
        if name.endswith("_scale"):
            drawn.append(jnp.full(leaf.shape, config.initializer_range / 64, leaf.dtype))
        elif leaf.dtype == jnp.float8_e4m3fn:
            values = 64 * draw(key, leaf.shape, jnp.bfloat16)
            drawn.append(jnp.clip(values, -448, 448).astype(leaf.dtype))
        elif "norm" in name:
            drawn.append(jnp.ones(leaf.shape, leaf.dtype))
        else:
            drawn.append(config.initializer_range * draw(key, leaf.shape, leaf.dtype))
    return model, serving_params(model, jax.tree.unflatten(tree, drawn))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def running_slots(
    model: DeepSeekV3, rows: int, slots: int, length: int, key: jax.Array
) -> programs.Slots:
    """Every slot running, greedy, with so many tokens behind it."""
    empty = programs.init_slots(
        model, rows, slots, jnp.bfloat16, 0, keep_routing=True, keep_top_k=0
    )
    keys = jax.random.split(key, 3)
    cache = empty.cache._replace(
        c_kv_LBSR=jax.random.normal(keys[0], empty.cache.c_kv_LBSR.shape, jnp.bfloat16),
        k_pe_LBSP=jax.random.normal(keys[1], empty.cache.k_pe_LBSP.shape, jnp.bfloat16),
        length_B=jnp.full((rows,), length, jnp.int32),
    )
    return empty._replace(
        cache=cache,
        tokens_BS=jax.random.randint(keys[2], (rows, slots), 0, model.config.vocab_size),
        status_B=jnp.full((rows,), programs.RUNNING),
        limit_B=jnp.full((rows,), slots + 1),
    )


def weight_bytes(config: ModelConfig, params: Params, rows: int, experts: float) -> float:
    """Of one step in which every MoE layer has tokens for so many of its experts."""
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    routed = {k: v for k, v in params["moe_layers"]["moe"].items() if k[:2] in ("w1", "w2", "w3")}
    of_experts = sum(x.nbytes for x in jax.tree.leaves(routed))
    embedding = params["embed"].nbytes * (1 - rows / config.vocab_size)
    return total - embedding - of_experts * (1 - experts / config.n_routed_experts)


def measure(
    config: ModelConfig, weights: tuple[DeepSeekV3, Params], rows: int, slots: int, profile: str
) -> tuple[float, float, float]:
    """Seconds of a step, and the bytes of weights and cache that it reads."""
    model, params = weights
    first = slots - ROUNDS * (CALLS + bool(profile))
    state = running_slots(model, rows, slots, first, jax.random.key(1))
    bias_LE, none = init_router_bias(config), jnp.zeros((rows,), jnp.int32)
    lowered = programs.decode.lower(model, params, bias_LE, state, none, rounds=ROUNDS)
    decode = lowered.compile()
    times = []
    for _ in range(CALLS):
        started = time.perf_counter()
        state = jax.block_until_ready(decode(params, bias_LE, state, none))
        times.append((time.perf_counter() - started) / ROUNDS)
    last = first + ROUNDS * CALLS
    assert np.asarray(state.cache.length_B == last).all(), "some slots have stopped"
    assert state.experts_LBSK is not None
    chosen_lBtK = np.asarray(state.experts_LBSK[:, :, first:last])
    experts = np.mean([len(np.unique(chosen)) for chosen in _each_step(chosen_lBtK)])
    if profile:
        with jax.profiler.trace(profile):
            jax.block_until_ready(decode(params, bias_LE, state, none))
        found = profile_parts.ops(profile, decode.as_text() or "")
        print(profile_parts.table(found, ROUNDS, 40), flush=True)
    cache = 2 * config.num_hidden_layers * rows * (first + last) / 2
    cache *= config.kv_lora_rank + config.qk_rope_head_dim
    seconds = statistics.median(times[1:])
    return seconds, weight_bytes(config, params, rows, float(experts)), cache


def _each_step(chosen_lBtK: np.ndarray):
    for layer in chosen_lBtK:
        yield from np.moveaxis(layer, 1, 0)


def main() -> None:
    """Print a line per format and batch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="v3")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dense", type=int, default=1)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=16_384)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--cache", type=int, default=4096, help="slots of a row")
    parser.add_argument("--weights", nargs="+", default=["bfloat16"], help="bfloat16, fp8")
    parser.add_argument("--profile", default="", help="folder for a profile of each")
    parser.add_argument("--deadline", type=float, default=300, help="seconds")
    arguments = parser.parse_args()
    arguments.mtp, arguments.seq = 0, arguments.cache
    config = slice_of(arguments)
    with deadline(arguments.deadline):
        copy = copy_bandwidth()
        kind = jax.devices()[0].device_kind
        print(f"{kind}, jax {jax.__version__}, a copy {copy / 1e9:.0f} GB/s; {vars(arguments)}")
        for format in arguments.weights:
            started = time.perf_counter()
            weights = random_weights(config, format)
            jax.block_until_ready(weights[1])
            print(f"{format} weights in {time.perf_counter() - started:.0f} s", flush=True)
            for rows in arguments.batch:
                _line(config, format, weights, rows, arguments, copy)
            del weights


def _line(config, format, weights, rows, arguments, copy) -> None:
    started = time.perf_counter()
    profile = arguments.profile and f"{arguments.profile}/{format}_{rows}"
    try:
        seconds, of_weights, of_cache = measure(config, weights, rows, arguments.cache, profile)
    except Exception as problem:  # so that the others get their turn
        print(f"batch {rows}, {format}: {type(problem).__name__}: {str(problem)[:500]}", flush=True)
        return
    floor = (of_weights + of_cache) / copy
    print(
        f"batch {rows:4}, {format:8}: {seconds * 1e3:7.3f} ms a step, {rows / seconds:8,.0f} "
        f"tokens/s; floor {floor * 1e3:.3f} ms (weights {of_weights / 1e9:.2f} GB, cache "
        f"{of_cache / 1e9:.2f} GB), {floor / seconds:.0%} of its speed "
        f"[{time.perf_counter() - started:.0f} s]",
        flush=True,
    )


if __name__ == "__main__":
    main()
