"""One training step on this machine's accelerators: tokens a second, MFU, memory, compile time.

    python benchmarks/train_step.py --model v2_lite --layers 5 --batch 4 --seq 4096

``--layers``, ``--experts`` and ``--vocab`` cut a model down to what one GPU holds beside AdamW's
state; widths stay. Everything else is the real thing: the pretraining loss with balance losses,
clipping, AdamW, the router bias, donation. MFU counts model FLOPs as ``deepseek_jax.plan`` does
(causal attention, no recomputation) against the data sheet's dense BF16 peak. The first line says
how long after the process began the first step was done, and what it had waited for. ``--compare``
times other meshes or none beside the first, in turns.
"""

import argparse
import contextlib
import functools
import json
import statistics
import time
from typing import Any, get_args

import jax
import numpy as np

from benchmarks import profile_parts
from benchmarks.timing import deadline, process_age
from deepseek_jax import Batch, DeepSeekV3, ModelConfig, preset, sharding
from deepseek_jax.config import Precision, RematPolicy
from deepseek_jax.model.dispatch import ExpertParallel
from deepseek_jax.model.transformer import param_counts
from deepseek_jax.plan import training_flops_per_token
from deepseek_jax.report.hardware import peak_flops
from deepseek_jax.train import optim
from deepseek_jax.train.loop import divide_batch, jit_step
from deepseek_jax.train.losses import pretrain_loss
from deepseek_jax.train.step import abstract_state, init_state, make_train_step


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """What is trained, on how many tokens."""
    parser.add_argument("--model", default="small")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dense", type=int, default=1)
    parser.add_argument("--experts", type=int)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--mtp", type=int, default=0)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=4096)


def step_arguments(parser: argparse.ArgumentParser) -> None:
    """How it is trained."""
    parser.add_argument("--remat", default="none", choices=get_args(RematPolicy))
    parser.add_argument("--matmuls", default="compute", choices=["compute", "fp8"])
    parser.add_argument("--params", default="float32")
    parser.add_argument("--compute", default="bfloat16", help="float32 on CPUs")
    parser.add_argument("--moments", default="float32")
    parser.add_argument("--dispatcher", default="auto", choices=["auto", "ragged", "ring"])
    parser.add_argument(
        "--documents", action="store_true", help="attention as for rows of several documents"
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--xla",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="options of XLA for the step, as JSON, in place of those that training sets",
    )


def slice_of(arguments: argparse.Namespace) -> ModelConfig:
    """The named model with fewer layers, experts and tokens."""
    config = preset(arguments.model).replace(num_nextn_predict_layers=arguments.mtp)
    dense = min(config.first_k_dense_replace, arguments.dense)
    experts = arguments.experts or config.n_routed_experts
    changes: dict[str, Any] = {
        "num_hidden_layers": arguments.layers or config.num_hidden_layers,
        "first_k_dense_replace": dense,
        "n_routed_experts": experts,
        "vocab_size": arguments.vocab or config.vocab_size,
        "max_position_embeddings": max(config.max_position_embeddings, arguments.seq),
    }
    if experts < config.n_routed_experts and config.n_group > 1:
        changes |= {"n_group": 1, "topk_group": 1}
    return config.replace(**changes)


class Run:
    """A model and its step on one mesh (or none): traced, then ``compile``, then ``start``."""

    def __init__(
        self,
        config: ModelConfig,
        mesh_text: str,
        arguments: argparse.Namespace,
        devices: list[jax.Device] | None = None,
    ):
        """Trace, from shapes alone; on all devices where none are named."""
        self.name = mesh_text
        options = (option.split("=", 1) for option in arguments.xla)
        self.options = {name: json.loads(value) for name, value in options}
        precision = Precision(
            params=arguments.params, compute=arguments.compute, matmuls=arguments.matmuls
        )
        parallel = ExpertParallel(arguments.dispatcher)
        model = DeepSeekV3(
            config, precision, arguments.remat, parallel, whole_rows=not arguments.documents
        )
        tx = optim.make_optimizer(
            optim.OptimConfig(warmup_steps=0, moments=arguments.moments), 1000
        )

        def loss_fn(params, bias, batch, totals, step):
            return pretrain_loss(model, params, bias, batch, totals, 0.3)

        meshed = mesh_text != "none"
        devices = devices or jax.devices()
        devices = devices if meshed else devices[:1]
        mesh = sharding.make_mesh(mesh_text if meshed else "data=1", devices)
        start = time.perf_counter()
        rng = np.random.default_rng(0)
        shape = (arguments.batch, arguments.seq)
        rows = rng.integers(0, config.vocab_size, (shape[0], shape[1] + 1)).astype(np.int32)
        ones = np.ones(shape, np.int32)
        positions = np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1))
        parts = Batch(rows[:, :-1], rows[:, 1:], ones.astype(np.float32), positions, ones)
        self.batch = divide_batch(*shape, mesh).place([parts])
        state = abstract_state(model, tx, mesh)
        with jax.set_mesh(mesh) if meshed else contextlib.nullcontext():
            init: Any = jax.jit(
                functools.partial(init_state, model, tx),
                out_shardings=jax.tree.map(lambda x: x.sharding, state),
            )
            self.lowered_init = init.lower(jax.eval_shape(jax.random.key, 0))
            step = make_train_step(model, tx, loss_fn, lambda step: 0.001)
            jitted: Any = jit_step(step, state, model)
            self.lowered_step = jitted.lower(state, self.batch, np.float32(np.inf))
        self.trace_s = time.perf_counter() - start

    def compile(self) -> "Run":
        """The programs of the state and of the step; in any thread."""
        start = time.perf_counter()
        self.init = self.lowered_init.compile()
        self.step = self.lowered_step.compile(compiler_options=self.options or None)
        del self.lowered_init, self.lowered_step
        self.compile_s = time.perf_counter() - start
        return self

    def start(self) -> "Run":
        """Make the state and the first step."""
        start = time.perf_counter()
        self.state = self.init(jax.random.key(0))
        self.losses = [self()]
        self.start_s = time.perf_counter() - start
        return self

    def stop(self) -> None:
        """Give the state's memory back; it may be started again."""
        self.state = None

    def __call__(self) -> float:
        """One step; its loss."""
        self.state, metrics = self.step(self.state, self.batch, np.float32(np.inf))
        return float(metrics["loss"])

    def timed(self, steps: int) -> list[float]:
        """Seconds of each of so many steps."""
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            self.losses.append(self())
            seconds.append(time.perf_counter() - start)
        return seconds

    def parts(self, directory: str, steps: int = 3) -> list[profile_parts.Op]:
        """The instructions of so many steps, from a profile that is left in ``directory``."""
        with jax.profiler.trace(directory):
            for _ in range(steps):
                self()
        return profile_parts.ops(directory, self.step.as_text() or "")


def main() -> None:
    """Parse the arguments, time, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    model_arguments(parser)
    step_arguments(parser)
    parser.add_argument("--mesh", default="data=-1")
    parser.add_argument("--compare", nargs="*", default=[], help='other meshes, or "none"')
    parser.add_argument("--profile", help="directory for a profile (xprof) of 3 steps")
    arguments = parser.parse_args()
    if arguments.profile:
        profile_parts.keep_names()
    config = slice_of(arguments)
    counts = param_counts(config)
    tokens = arguments.batch * arguments.seq
    flops = training_flops_per_token(config, arguments.seq) * tokens
    peak = peak_flops(jax.devices()[0])
    print(
        f"{arguments.model}: {counts.total / 1e9:.2f}B parameters, {counts.active / 1e9:.2f}B "
        f"active, {tokens} tokens a step, remat {arguments.remat}, "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}"
    )
    with deadline(500):
        for mesh_text in (arguments.mesh, *arguments.compare):
            run = Run(config, mesh_text, arguments).compile().start()
            if mesh_text == arguments.mesh:
                print(
                    f"first step done {process_age():.1f} s after the process began: traced in "
                    f"{run.trace_s:.1f} s, compiled in {run.compile_s:.1f} s, state and step made "
                    f"in {run.start_s:.1f} s",
                    flush=True,
                )
            seconds = statistics.median(run.timed(arguments.steps))
            _report(run, seconds, tokens, flops, peak)
            if arguments.profile:
                print(profile_parts.table(run.parts(arguments.profile, 3), 3), flush=True)
            del run


def _report(run: Run, seconds: float, tokens: int, flops: float, peak: float | None) -> None:
    memory: Any = run.step.memory_analysis()
    stats = jax.devices()[0].memory_stats() or {}
    used = f", MFU {flops / seconds / peak / jax.device_count():.1%}" if peak else ""
    print(
        f"{run.name}: {seconds * 1e3:.1f} ms a step, {tokens / seconds:,.0f} tokens/s{used}, "
        f"state {memory.argument_size_in_bytes / 1e9:.1f} GB + temporaries "
        f"{memory.temp_size_in_bytes / 1e9:.1f} GB, peak "
        f"{stats.get('peak_bytes_in_use', 0) / 1e9:.1f} GB, {run.compile_s:.1f} s to compile; "
        f"losses {', '.join(f'{x:.5f}' for x in run.losses[:4])}",
        flush=True,
    )


if __name__ == "__main__":
    main()
