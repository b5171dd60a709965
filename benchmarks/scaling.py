"""Training steps on several GPUs of one host against one: tokens/s per GPU, and equal losses.

    python benchmarks/scaling.py --seconds 170 --only v2_lite

Weak scaling: the tokens of one GPU are fixed, and the whole batch grows with the GPUs. Two slices:

* V2-Lite's, of 64 experts whatever the mesh: one and the same model. Its losses are checked: where
  every GPU has rows of its own, the first step's loss is the mean of what one GPU has for each
  GPU's rows; where all have the same rows, the losses of the first steps are one GPU's.
* V3's, of 16 experts a GPU: expert parallelism brings more experts, and a GPU's work is the same.
  It is another model, so no losses are compared; the router's bias must be the same bit for bit on
  every GPU. With ``v3 same`` 16 experts are divided instead, and losses and bias checked.

Programs compile in parallel, and without autotuning (of either side): it would take most of the
time, and run into the timing of others. Every line is printed as it comes.
"""

import argparse
import concurrent.futures
import functools
import os
import re
import time
import traceback
from typing import Any, NamedTuple, get_args

import jax
import numpy as np

from benchmarks import profile_parts
from benchmarks.expert_parallel import NCCL, PEER
from benchmarks.timing import deadline
from deepseek_jax import Batch, DeepSeekV3, ModelConfig, preset, sharding
from deepseek_jax.config import Precision, RematPolicy
from deepseek_jax.model.dispatch import ExpertParallel
from deepseek_jax.plan import training_flops_per_token
from deepseek_jax.report.hardware import peak_flops
from deepseek_jax.train import optim
from deepseek_jax.train.loop import compiler_options, divide_batch
from deepseek_jax.train.losses import pretrain_loss
from deepseek_jax.train.step import init_state, make_train_step, state_shardings
from deepseek_jax.types import TrainState

QUICK: dict[str, Any] = {
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,
}
HIDDEN = {"xla_gpu_enable_latency_hiding_scheduler": True}
LIMIT = np.float32(np.inf)
CHECKED_STEPS = 3


class Variant(NamedTuple):
    """One way of training a slice."""

    slice: str
    """v2_lite, v3, or ``v3 same``."""
    mesh: str
    matmuls: Any = "compute"
    parallel: ExpertParallel = ExpertParallel()
    options: dict[str, Any] = PEER
    devices: int = 0
    """0: all."""
    pieces: int = 256
    note: str = ""

    def gpus(self) -> int:
        """GPUs that take part."""
        return self.devices or jax.device_count()

    def name(self) -> str:
        """As printed."""
        how = f", {self.parallel.dispatcher}" if "expert" in self.mesh else ""
        halves = " in halves" if self.parallel.overlap else ""
        products = "FP8" if self.matmuls == "fp8" else "BF16"
        return f"{self.slice} {products} {self.mesh}{how}{halves}{self.note}"


def variants(gpus: int) -> list[Variant]:
    """In the order of their importance; each after the one GPU that it is compared with."""
    ragged, ring = ExpertParallel("ragged"), ExpertParallel("ring")
    halves, everywhere = ExpertParallel("ragged", overlap=True), f"expert={gpus}"
    lite = functools.partial(Variant, "v2_lite")
    v3 = functools.partial(Variant, "v3")
    found = [
        lite("data=1", devices=1),
        lite(everywhere, parallel=ragged),
        lite(f"data={gpus}"),
        v3("data=1", "fp8", devices=1),
        v3(everywhere, "fp8", ragged),
        lite(everywhere, parallel=ring),
        v3("data=1", devices=1),
        v3(everywhere, parallel=ragged),
        v3(everywhere, "fp8", halves, PEER | HIDDEN, note=", latency-hiding scheduler"),
        Variant("v3 same", everywhere, parallel=ragged),
        v3("fsdp=2,expert=-1", parallel=ragged),
        v3("fsdp=2,expert=-1", "fp8", ragged),
        v3("data=2,expert=-1", parallel=ragged),
        v3("data=2,expert=-1", "fp8", ragged),
        lite(f"fsdp={gpus}"),
        lite("fsdp=2,expert=-1", parallel=ragged),
        lite("data=2,expert=-1", parallel=ragged),
        v3(everywhere, "fp8", ring),
        lite("data=2", devices=2),
        lite("expert=2", parallel=ragged, devices=2),
        lite(everywhere, parallel=ragged, options=NCCL, pieces=1, note=", by NCCL"),
        lite(everywhere, parallel=halves),
        v3(everywhere, "fp8", halves),
        lite(f"data={gpus}", options=HIDDEN, note=", latency-hiding scheduler"),
    ]
    return found if gpus > 2 else [v for v in found if v.devices != 2 and "=2," not in v.mesh]


def slice_of(name: str, parts: int) -> ModelConfig:
    """Layers, vocabulary and experts, in so many parts, that one GPU holds beside its optimizer."""
    if name == "v2_lite":
        return preset("v2_lite").replace(num_hidden_layers=4)
    experts = 16 * (parts if name == "v3" else 1)
    return preset("v3").replace(
        num_hidden_layers=3,
        first_k_dense_replace=1,
        n_routed_experts=experts,
        n_group=1,
        topk_group=1,
        vocab_size=16_384,
        num_nextn_predict_layers=0,
    )


class Setup:
    """A variant's programs, traced; ``compile`` is for another thread."""

    def __init__(self, variant: Variant, rows: int, seq: int, remat: Any, devices: list[Any]):
        self.variant, self.rows, self.seq, self.gpus = variant, rows, seq, variant.gpus()
        self.mesh = sharding.make_mesh(variant.mesh, devices[: self.gpus])
        self.config = slice_of(variant.slice, self.mesh.shape["expert"])
        sharding.GPU_PIECES = variant.pieces
        precision = Precision(matmuls=variant.matmuls)
        self.model = model = DeepSeekV3(
            self.config, precision, remat, variant.parallel, whole_rows=True
        )
        tx = optim.make_optimizer(optim.OptimConfig(warmup_steps=0, moments="bfloat16"), 1000)

        def loss_fn(params, bias, batch, totals, step):
            return pretrain_loss(model, params, bias, batch, totals, 0.3)

        where = state_shardings(model, tx, self.mesh)
        with jax.set_mesh(self.mesh):
            init = jax.jit(functools.partial(init_state, model, tx), out_shardings=where)
            key = jax.eval_shape(jax.random.key, 0)
            self.lowered_init = init.lower(key)
            state = jax.tree.map(
                lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                jax.eval_shape(init, key),
                where,
            )
            self.feed = divide_batch(rows * self.gpus, seq, self.mesh)
            place = sharding.sharding(self.mesh, "accumulate", "batch", "sequence")
            batch = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype, sharding=place),
                self.batch_of([0] * self.gpus),
            )
            step = make_train_step(model, tx, loss_fn, lambda step: 0.001)
            jitted = jax.jit(step, donate_argnums=0, out_shardings=(where, None))
            self.lowered_step = jitted.lower(state, batch, LIMIT)

    def compile(self) -> "Setup":
        """Both programs."""
        start = time.perf_counter()
        self.init = self.lowered_init.compile()
        options = compiler_options(self.mesh, self.model) | QUICK | self.variant.options
        self.step = self.lowered_step.compile(compiler_options=options)
        self.compile_s = time.perf_counter() - start
        return self

    def batch_of(self, seeds: list[int]) -> Batch:
        """Random rows, from one seed for every GPU."""
        each = [
            np.random.default_rng(seed).integers(
                0, self.config.vocab_size, (self.rows, self.seq + 1), np.int32
            )
            for seed in seeds
        ]
        tokens = np.concatenate(each)
        ones = np.ones((len(tokens), self.seq), np.int32)
        positions = np.tile(np.arange(self.seq, dtype=np.int32), (len(tokens), 1))
        return Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), positions, ones)

    def placed(self, seeds: list[int]) -> Any:
        """The same on the GPUs."""
        return self.feed.place([self.batch_of(seeds)])

    def losses(self, seeds: list[int], steps: int) -> tuple[list[float], TrainState]:
        """Of the first steps from fresh weights; and the state after them."""
        state, batch, losses = self.init(jax.random.key(0)), self.placed(seeds), []
        for _ in range(steps):
            state, metrics = self.step(state, batch, LIMIT)
            losses.append(float(metrics["loss"]))
        return losses, state


def copies_of_bias(state: TrainState) -> list[np.ndarray]:
    """What every GPU holds."""
    return [np.asarray(shard.data) for shard in state.router_bias_LE.addressable_shards]


class Alone(NamedTuple):
    """What one GPU came to."""

    tokens_per_s: float
    losses: list[float]
    """Of the first steps, with the rows of seed 0."""
    first_losses: list[float]
    """Of the first step, with the rows of every seed."""
    bias_LE: np.ndarray


def profile(setup: Setup, state: TrainState, batch: Any, directory: str) -> None:
    """Where two more steps go, milliseconds of one GPU by part of the model."""
    kept = os.path.join(directory, re.sub(r"\W+", "_", setup.variant.name()))
    steps = 2
    with jax.profiler.trace(kept):
        for _ in range(steps):
            state, metrics = setup.step(state, batch, LIMIT)
            float(metrics["loss"])
    found = profile_parts.ops(kept, setup.step.as_text() or "")
    print(profile_parts.table(found, steps * setup.gpus, 40), flush=True)


def run(setup: Setup, seconds: float, alone: dict[str, Alone], directory: str = "") -> None:
    """Check, time, print; profile where a directory is named."""
    variant, gpus = setup.variant, setup.gpus
    key = f"{variant.slice.split()[0]} {variant.matmuls}"
    checked = variant.slice != "v3" or gpus == 1
    firsts: list[float] = []
    if gpus == 1 and checked:
        firsts = [setup.losses([seed], 1)[0][0] for seed in range(1, jax.device_count())]
    notes = []
    same, state = setup.losses([0] * gpus, CHECKED_STEPS)
    copies = copies_of_bias(state)
    if variant.slice != "v2_lite":
        equal = all(np.array_equal(copy, copies[0]) for copy in copies)
        notes.append(
            f"bias of {len(copies)} GPUs equal: {equal}, largest {np.abs(copies[0]).max()}"
        )
    reference = alone.get(key)
    if reference and checked and gpus > 1:
        worst = max(abs(a - b) for a, b in zip(same, reference.losses, strict=True))
        notes.append(f"same rows everywhere: losses within {worst:.1e} of one GPU's")
        if variant.slice != "v2_lite":
            other = int((copies[0] != reference.bias_LE).sum())
            notes.append(f"{other} of {copies[0].size} biases differ from one GPU's")
    del state
    own, state = setup.losses(list(range(gpus)), 2)
    if reference and checked and gpus > 1:
        mean = float(np.mean(reference.first_losses[:gpus]))
        notes.append(f"own rows: first loss {own[0]:.6f}, mean of one GPU's {mean:.6f}")
    batch, times = setup.placed(list(range(gpus))), []
    began = time.perf_counter()
    while len(times) < 8 and time.perf_counter() - began < seconds:
        start = time.perf_counter()
        state, metrics = setup.step(state, batch, LIMIT)
        float(metrics["loss"])
        times.append(time.perf_counter() - start)
    median = float(np.median(times))
    each = setup.rows * setup.seq / median
    if gpus == 1:
        alone[key] = Alone(each, same, [same[0], *firsts], copies[0])
    against = alone.get(key)
    ratio = f" ({each / against.tokens_per_s:.1%} of one)" if against and gpus > 1 else ""
    flops = training_flops_per_token(setup.config, setup.seq) * each
    peak = peak_flops(jax.devices()[0])
    mfu = f", MFU {flops / peak:.1%}" if peak else ""
    memory: Any = setup.step.memory_analysis()
    print(
        f"{variant.name()}: {median * 1e3:.1f} ms, {each:,.0f} tokens/s per GPU{ratio}{mfu}, "
        f"state {memory.argument_size_in_bytes / 1e9:.1f} GB + temporaries "
        f"{memory.temp_size_in_bytes / 1e9:.1f} GB, {setup.compile_s:.0f} s to compile; "
        f"losses {', '.join(f'{x:.5f}' for x in same)}; {'; '.join(notes)}",
        flush=True,
    )
    if directory:
        profile(setup, state, batch, directory)


def main() -> None:
    """Parse the arguments, time, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[""], help="variants so named, or in part")
    parser.add_argument("--lite-rows", type=int, default=8, help="sequences a GPU, V2-Lite")
    parser.add_argument("--v3-rows", type=int, default=2, help="sequences a GPU, V3")
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--remat", default="full", choices=get_args(RematPolicy))
    parser.add_argument("--seconds", type=float, default=170, help="start nothing later than this")
    parser.add_argument("--compilers", type=int, default=16)
    parser.add_argument("--after", help="a file: compile at once, but run when it is there")
    parser.add_argument("--profile", default="", help="a folder for a profile (xprof) of each")
    arguments = parser.parse_args()
    if arguments.profile:
        profile_parts.keep_names()
    began = time.perf_counter()
    print(
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True
    )
    chosen = [
        v for v in variants(jax.device_count()) if any(part in v.name() for part in arguments.only)
    ]
    pool = concurrent.futures.ThreadPoolExecutor(arguments.compilers)
    pending: list[tuple[Variant, concurrent.futures.Future[Setup]]] = []
    alone: dict[str, Alone] = {}

    def left() -> float:
        return arguments.seconds - (time.perf_counter() - began)

    with deadline(arguments.seconds + 45):
        for variant in chosen:
            rows = arguments.lite_rows if variant.slice == "v2_lite" else arguments.v3_rows
            try:
                setup = Setup(variant, rows, arguments.seq, arguments.remat, jax.devices())
                pending.append((variant, pool.submit(setup.compile)))
            except Exception:
                print(f"{variant.name()}: not traced\n{traceback.format_exc(limit=-3)}", flush=True)
            if left() < 0.5 * arguments.seconds:
                break
        print(f"({len(pending)} traced in {time.perf_counter() - began:.0f} s)", flush=True)
        while arguments.after and not os.path.exists(arguments.after) and left() > 0:
            time.sleep(0.2)
        print(f"(first run after {time.perf_counter() - began:.0f} s)", flush=True)
        while pending:
            variant, done = pending.pop(0)
            if left() < 0:
                print(f"{variant.name()}: no time left", flush=True)
                continue
            try:
                setup = done.result(timeout=max(left(), 1))
                run(setup, left(), alone, arguments.profile)
            except Exception as failure:
                print(
                    f"{variant.name()}: {type(failure).__name__}: {str(failure)[:600]}", flush=True
                )
            del done
    pool.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    main()
