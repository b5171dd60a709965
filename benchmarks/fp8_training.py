"""The same pretraining in BF16 and in FP8: does the loss agree as the paper claims (0.25%)?

    python benchmarks/fp8_training.py --out out/fp8 --limit 560

Both runs have the same initial parameters and read the same rows in the same order: sources and
documentation of what is installed (`local_text`). Where there are enough devices each run has its
own, or several (``data=n``); otherwise runs take turns of ``--turn`` steps, so that wherever time
ends both curves are as long. Every loss is in ``losses.jsonl`` as soon as it is known; ``--report``
makes the table and the picture of it again. ``--runs bf16 fp8 control`` adds a run in BF16 whose
initial parameters are rounded to BF16 once: how far two runs part that differ in next to nothing.
With ``--seeds 1 2`` there are two of each. Text that was prepared once, which takes minutes, is
kept with ``--data FOLDER`` for further processes: one for each GPU of a machine trace in parallel.

V3 section 3.3 and appendix B.1: the relative error of the loss "remains consistently below 0.25%".
"""

import argparse
import collections
import functools
import itertools
import json
import logging
import math
import os
import re
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks import kept_activations, local_text
from benchmarks.timing import BEGAN, deadline, say
from deepseek_jax import Batch, DeepSeekV3, ModelConfig, preset, sharding
from deepseek_jax.config import Dtype, Precision, RematPolicy
from deepseek_jax.data.tokenizer import Tokenizer, train_bpe
from deepseek_jax.model.transformer import logical_axes, param_counts
from deepseek_jax.plan import training_flops_per_token
from deepseek_jax.report.hardware import peak_flops
from deepseek_jax.train import optim
from deepseek_jax.train.losses import Totals, pretrain_loss
from deepseek_jax.train.step import abstract_state, batch_specs, init_state, make_train_step

BOUND = 0.0025
MATMULS: dict[str, Literal["compute", "fp8"]] = {
    "bf16": "compute",
    "fp8": "fp8",
    "control": "compute",
}
LOSSES = "losses.jsonl"


def say_lines(what: str, lines: Sequence[str]) -> None:
    """The same with a list."""
    say("\n    ".join((what, *lines)))


# --- one run ---------------------------------------------------------------------------------


def as_batch(ids: jax.Array) -> Batch:
    """Rows of T + 1 tokens as one micro-batch ``[1, B, T]`` of whole rows (V3 section 4.1)."""
    ids = ids.astype(jnp.int32)[None]
    tokens, targets = ids[..., :-1], ids[..., 1:]
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)
    ones = jnp.ones_like(tokens)
    return Batch(tokens, targets, ones.astype(jnp.float32), positions, ones)


class Setting(NamedTuple):
    """What all runs have in common."""

    config: ModelConfig
    compute: Dtype
    remat: RematPolicy
    optimizer: optim.OptimConfig
    steps: int
    batch_size: int
    seq_len: int


class Arm:
    """One run: a precision and a seed, its batches divided over the devices of a mesh."""

    def __init__(self, name: str, seed: int, setting: Setting, mesh: Mesh):
        """Nothing is compiled or allocated yet."""
        self.name, self.seed, self.setting, self.mesh = name, seed, setting, mesh
        precision = Precision(compute=setting.compute, matmuls=MATMULS[name])
        self.model = DeepSeekV3(setting.config, precision, setting.remat, whole_rows=True)
        self.tx = optim.make_optimizer(setting.optimizer, setting.steps)
        self.done, self.seconds, self.waiting = 0, 0.0, False
        self.state: Any = None

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"

    def step_function(self) -> Callable[..., Any]:
        """``(state, ids [B, T + 1]) -> (state, metrics)``."""
        lam = optim.mtp_weight(self.setting.optimizer, self.setting.steps)
        speed = optim.bias_speed(self.setting.optimizer, self.setting.steps)

        def loss_fn(params, bias_LE, batch, totals, step):
            return pretrain_loss(self.model, params, bias_LE, batch, totals, lam(step))

        step = make_train_step(self.model, self.tx, loss_fn, speed)

        def of_rows(state, ids):
            state, metrics = step(state, as_batch(ids), jnp.float32(jnp.inf))
            return state, {k: v for k, v in metrics.items() if k != "load_LE"}

        return of_rows

    def nats(self, state: Any, ids: jax.Array) -> jax.Array:
        """Sum of the losses of held-out rows, computed in the run's own precision."""

        def local(params, bias_LE, batch_ABT):
            batch = jax.tree.map(lambda x: x[0], batch_ABT)
            one = Totals(jnp.float32(1), jnp.int32(1))
            return pretrain_loss(self.model, params, bias_LE, batch, one, None)[1].metrics["loss"]

        everywhere, batch = sharding.spec(), as_batch(ids)
        specs = sharding.param_specs(self.mesh, logical_axes(self.model), state.params)
        in_specs = (specs, everywhere, batch_specs(batch))
        run = sharding.per_device(local, in_specs, everywhere)
        return run(state.params, state.router_bias_LE, batch)

    def abstract(self) -> tuple[Any, jax.ShapeDtypeStruct]:
        """The state and the rows of a batch: shapes, and where they lie."""
        shape = (self.setting.batch_size, self.setting.seq_len + 1)
        where = sharding.sharding(self.mesh, "batch", None)
        ids = jax.ShapeDtypeStruct(shape, jnp.uint16, sharding=where)
        return abstract_state(self.model, self.tx, self.mesh), ids

    def compile(self, tracing: threading.Lock) -> None:
        """Both programs, from shapes alone; and the initial state."""
        with jax.set_mesh(self.mesh):
            with tracing:
                state, ids = self.abstract()
                where = jax.tree.map(lambda x: x.sharding, state)
                step = jax.jit(
                    self.step_function(), donate_argnums=0, out_shardings=(where, where.step)
                ).lower(state, ids)
                nats = jax.jit(self.nats, out_shardings=where.step).lower(state, ids)
            began = time.perf_counter()
            with ThreadPoolExecutor(1) as beside:
                evaluate = beside.submit(nats.compile)
                self.step = step.compile()
            memory: Any = self.step.memory_analysis()
            say(
                f"{self}: compiled in {time.perf_counter() - began:.1f} s for {self.mesh.size} "
                f"devices: state {memory.argument_size_in_bytes / 1e9:.2f} GB, temporaries "
                f"{memory.temp_size_in_bytes / 1e9:.2f} GB of each"
            )
            self.evaluate = evaluate.result()
            init = functools.partial(init_state, self.model, self.tx)
            if self.name == "control":
                init = functools.partial(_rounded_once, init)
            self.state = jax.jit(init, out_shardings=where)(jax.random.key(self.seed))

    def place(self, ids: np.ndarray) -> jax.Array:
        """Rows onto the devices."""
        return jax.device_put(ids, sharding.sharding(self.mesh, "batch", None))

    def turn(self, batches: local_text.Batches, steps: int) -> list[dict[str, Any]]:
        """So many further steps, and what each had to say; one wait, at the end."""
        began = time.perf_counter()
        metrics = []
        for step in range(self.done, self.done + steps):
            self.state, said = self.step(self.state, self.place(batches[step]))
            metrics.append(said)
        metrics = jax.device_get(metrics)
        seconds = time.perf_counter() - began
        self.seconds += seconds
        per_step = self.setting.batch_size * self.setting.seq_len
        lines = []
        for said in metrics:
            self.done += 1
            lines.append(
                {"run": self.name, "seed": self.seed, "step": self.done}
                | {"tokens": self.done * per_step, "tokens_per_s": steps * per_step / seconds}
                | {k: float(v) for k, v in said.items()}
            )
        return lines

    def held_out(self, rows: local_text.Rows, token_bytes: np.ndarray) -> tuple[float, float]:
        """Nats per token and bits per byte of held-out rows."""
        size, nats, count, total = self.setting.batch_size, 0.0, 0, 0
        for first in range(0, len(rows) - size + 1, size):
            ids = rows.take(np.arange(first, first + size))
            nats += float(self.evaluate(self.state, self.place(ids)))
            count += ids[:, 1:].size
            total += int(token_bytes[ids[:, 1:]].sum())
        return nats / count, nats / math.log(2) / total


def _rounded_once(init: Callable[[jax.Array], Any], key: jax.Array) -> Any:
    state = init(key)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), state.params)
    return state._replace(params=rounded)


# --- what was computed how -------------------------------------------------------------------


class Sayings(logging.Handler):
    """What the kernels' package logs: which implementation ``auto`` came to."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        logger = logging.getLogger("pallas_kernels")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)
        logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.lines.append(record.getMessage())


# What Pallas' kernels for GPU are called in a jaxpr, by version of jax.
_KERNELS = {"pallas_call", "mpmd_map", "core_map"}


def implementations(arm: Arm) -> list[str]:
    """Kernels of ours in a step, how often each is executed, and what is quantized without one."""
    found: collections.Counter[str] = collections.Counter()
    with jax.set_mesh(arm.mesh):
        _count(jax.make_jaxpr(arm.step_function())(*arm.abstract()).jaxpr, "product", 1, found)
    return [f"{count} x {name}" for name, count in sorted(found.items())]


def _count(jaxpr: Any, within: str, times: int, found: collections.Counter[str]) -> bool:
    """Add up a program's kernels and quantizations; whether it has any kernel."""
    any_kernel = False
    for eqn in jaxpr.eqns:
        primitive, name = eqn.primitive.name, str(eqn.params.get("name", ""))
        if primitive in _KERNELS:
            found[f"{within} by a kernel: {_shapes(eqn.outvars)}"] += times
            any_kernel = True
            continue
        inner = times * eqn.params["length"] if primitive == "scan" else times
        quantization = name.startswith(("quantize_", "swiglu_"))
        kernel = False
        for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(sub):
                scope = name if quantization else within
                kernel |= _count(getattr(sub, "jaxpr", sub), scope, inner, found)
        # What is left of one whose results are not used has none in FP8.
        if quantization and not kernel and "f8" in _shapes(eqn.outvars):
            found[f"{name} by XLA: {_shapes(eqn.outvars)}"] += inner
        any_kernel |= kernel
    return any_kernel


def _shapes(variables: Sequence[Any]) -> str:
    return ", ".join(str(v.aval.str_short(short_dtypes=True)) for v in variables)


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


def custom_calls(program: str) -> dict[str, int]:
    """What a compiled program calls, by target; one in a loop over layers is counted once."""
    return dict(collections.Counter(re.findall(r'custom_call_target="([^"]+)"', program)))


# --- all runs --------------------------------------------------------------------------------


class Data(NamedTuple):
    """What is learned from and judged by."""

    train: local_text.Rows
    held_out: local_text.Rows
    tokenizer: Tokenizer
    facts: dict[str, float]


def prepared(arguments: argparse.Namespace, setting: Setting) -> Data:
    """What is kept in ``--data``, which is for one choice of sources; or made, and kept there."""
    if arguments.data is None:
        return prepare(arguments, setting)
    wanted = [str(getattr(setting, name)) for name in ("steps", "batch_size", "seq_len")]
    folder = arguments.data / "_".join((*wanted, str(setting.config.vocab_size)))
    if not (folder / "facts.json").exists():
        data = prepare(arguments, setting)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "train.npy", data.train.ids)
        np.save(folder / "held_out.npy", data.held_out.ids)
        data.tokenizer.save(folder / "tokenizer.json")
        (folder / "facts.json").write_text(json.dumps(data.facts))  # last: the rest is there
        return data

    def rows(side: str) -> local_text.Rows:
        return local_text.Rows(np.load(folder / f"{side}.npy"), setting.seq_len)

    facts = json.loads((folder / "facts.json").read_text())
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    return Data(rows("train"), rows("held_out"), tokenizer, facts)


def prepare(arguments: argparse.Namespace, setting: Setting) -> Data:
    """Find text, train a tokenizer on its first part, encode as much as the run reads."""
    folders = [*local_text.roots(), *arguments.roots]
    text = local_text.gather(folders, arguments.text_mb * 10**6)
    size = local_text.num_bytes(text.train)
    say(f"{len(text.train)} documents of {text.files} files, {size / 1e6:.1f} MB without copies")
    sample = local_text.first_bytes(text.train, arguments.tokenizer_mb * 10**6)
    tokenizer = train_bpe(sample, setting.config.vocab_size)
    say(f"tokenizer: {tokenizer.vocab_size} tokens")
    T, B = setting.seq_len, setting.batch_size
    most = setting.steps * B * T + 1
    train = local_text.Rows(local_text.encode(tokenizer, text.train, most), T)
    held_size = arguments.held_out_batches * B * T + 1
    held_out = local_text.Rows(local_text.encode(tokenizer, text.held_out, held_size), T)
    facts = {
        "documents": len(text.train),
        "files": text.files,
        "bytes": size,
        "tokens": len(train.ids),
        "bytes_per_token": float(tokenizer.token_bytes[train.ids].mean()),
        "epochs": setting.steps * B * T / len(train.ids),
        "held_out_tokens": len(held_out.ids),
    }
    say("data:", facts)
    return Data(train, held_out, tokenizer, facts)


def work(
    arms: Sequence[Arm], data: Any, write: Callable[..., None], until: float, turn: int
) -> None:
    """Train the runs of one mesh, in turns, until all are done or time is up."""
    data = data.result()
    batches = {a.seed: local_text.Batches(data.train, a.setting.batch_size, a.seed) for a in arms}
    for arm in arms:  # program and data into place, not to be timed
        write(arm.turn(batches[arm.seed], 1))
        arm.seconds = 0.0
    turns = itertools.count(1)
    while min(a.done for a in arms) < arms[0].setting.steps:
        # Both of a pair or neither: a device does not begin a round that it cannot end.
        each = sum(a.seconds / max(a.done - 1, 1) for a in arms) * turn
        if time.perf_counter() + each > until:
            say(f"time is up at step {arms[0].done} of {arms[0].setting.steps}")
            return
        number = next(turns)
        for arm in arms:
            lines = arm.turn(batches[arm.seed], min(turn, arm.setting.steps - arm.done))
            write(lines)
            if number <= 3 or number % 10 == 0:
                loss = statistics.mean(line["loss"] for line in lines)
                rate = lines[-1]["tokens_per_s"]
                say(f"{arm}: step {arm.done}, loss {loss:.4f}, {rate:,.0f} tokens/s")


def train(arguments: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    """All runs; what is known of them beside their losses."""
    sayings, tracing, writing = Sayings(), threading.Lock(), threading.Lock()
    devices, runs = jax.devices(), list(itertools.product(arguments.seeds, arguments.runs))
    each = max(1, len(devices) // len(runs))
    meshes = [
        sharding.make_mesh(f"data={each}", devices[i : i + each])
        for i in range(0, len(devices) - each + 1, each)
    ]

    def arms_of(setting: Setting) -> list[Arm]:
        return [
            Arm(name, seed, setting, meshes[i % len(meshes)]) for i, (seed, name) in enumerate(runs)
        ]

    arms = arms_of(setting)
    file = (arguments.out / LOSSES).open("w")

    def write(lines: Sequence[dict[str, Any]]) -> None:
        with writing:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()

    def compiled(arm: Arm) -> bool:
        try:
            arm.compile(tracing)
        except Exception:
            say(f"{arm} cannot run:", traceback.format_exc())
            return False
        return True

    facts: dict[str, Any] = {"device": devices[0].device_kind, "jax": jax.__version__}
    # Half a minute stays for held-out text, the report and what is counted.
    until = BEGAN + arguments.limit - arguments.reserve
    with ThreadPoolExecutor(2 * len(arms) + 1) as pool:
        data = pool.submit(prepared, arguments, setting)
        ready = list(pool.map(compiled, arms))
        if not all(ready):
            setting = setting._replace(config=wide_heads(setting.config))
            say(f"once more with {setting.config.num_attention_heads} heads of V3's widths")
            arms = arms_of(setting)
            ready = list(pool.map(compiled, arms))
        if not all(ready):  # one curve alone compares nothing, and the devices cost
            raise SystemExit("not every run could be compiled")
        by_mesh = [[a for a in arms if a.mesh == mesh] for mesh in meshes]
        running = [
            pool.submit(work, own, data, write, until, arguments.turn) for own in by_mesh if own
        ]
        guarded("what ran how", lambda: facts.update(_how(arms, sayings)))
        for future in running:
            guarded("training", future.result)
    facts["config"] = arms[0].setting.config.to_hf() if arms else None
    guarded("data", lambda: facts.update(data=data.result().facts))
    facts["runs"] = [guarded(f"{arm}, held out", lambda a=arm: _facts(a, data)) for arm in arms]
    return facts


def wide_heads(config: ModelConfig) -> ModelConfig:
    """The same widths of products in fewer heads, each as in V3: cuDNN is known to take those."""
    values = config.num_attention_heads * config.v_head_dim
    return config.replace(
        num_attention_heads=max(1, values // 128),
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )


def _how(arms: Sequence[Arm], sayings: Sayings) -> dict[str, Any]:
    how: dict[str, Any] = {}
    for arm in arms:
        if arm.name not in how:
            how[arm.name] = implementations(arm)
            say_lines(f"{arm.name}, a step:", how[arm.name])
            say(f"{arm.name}, compiled, calls", custom_calls(arm.step.as_text() or ""))
    how["auto"] = sayings.lines
    say_lines("implementations chosen:", sayings.lines)
    return {"implementations": how}


def _facts(arm: Arm, data: Any) -> dict[str, Any]:
    setting = arm.setting
    tokens = setting.batch_size * setting.seq_len * max(arm.done - 1, 0)
    rate = tokens / max(arm.seconds, 1e-9)
    flops, peak = (
        training_flops_per_token(setting.config, setting.seq_len),
        peak_flops(jax.devices()[0]),
    )
    memory: Any = arm.step.memory_analysis()
    loss, bits = arm.held_out(data.result().held_out, data.result().tokenizer.token_bytes)
    facts = {
        "run": arm.name,
        "seed": arm.seed,
        "steps": arm.done,
        "tokens_per_s": rate,
        "mfu": flops * rate / peak / arm.mesh.size if peak else None,
        "devices": arm.mesh.size,
        "held_out_loss": loss,
        "bits_per_byte": bits,
        "state_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }
    say(facts)
    return facts


def guarded(what: str, part: Callable[[], Any]) -> Any:
    """A part of the work; should it fail, the rest goes on."""
    try:
        return part()
    except Exception:
        say(f"{what} failed:", traceback.format_exc())
        return None


# --- report ----------------------------------------------------------------------------------

Curves = dict[tuple[str, int], np.ndarray]


def read_curves(path: Path) -> Curves:
    """The loss of every step, by run and seed."""
    found: dict[tuple[str, int], list[float]] = collections.defaultdict(list)
    for line in path.read_text().splitlines():
        row = json.loads(line)
        found[row["run"], row["seed"]].append(row["loss"])
    return {key: np.array(losses) for key, losses in found.items()}


def tenths(plain: np.ndarray, other: np.ndarray) -> list[tuple[float, float, float]]:
    """Mean losses over each tenth of the steps that both made, and their relative difference."""
    steps = min(len(plain), len(other))
    means = []
    for part in np.array_split(np.arange(steps), min(10, steps)):
        a, b = plain[part].mean(), other[part].mean()
        means.append((float(a), float(b), float(b / a - 1)))
    return means


def report(out: Path) -> dict[str, Any]:
    """Print and return the comparison; draw it."""
    curves = read_curves(out / LOSSES)
    found: dict[str, Any] = {}
    seeds = sorted({seed for _, seed in curves})
    pairs = {
        f"{name} against BF16, seed {s}": (curves["bf16", s], curves[run, s])
        for run, name in (("fp8", "FP8"), ("control", "BF16 rounded once"))
        for s in seeds
        if ("bf16", s) in curves and (run, s) in curves
    }
    for a, b in itertools.combinations(seeds, 2):
        if ("bf16", a) in curves and ("bf16", b) in curves:
            pairs[f"BF16, seed {b} against {a}"] = curves["bf16", a], curves["bf16", b]
    for name, (plain, other) in pairs.items():
        means = tenths(plain, other)
        steps, last = min(len(plain), len(other)), means[-1]
        print(f"\n{name}: {steps} steps of both, loss by tenths of them")
        print("\n".join(f"    {a:.5f} {b:.5f} {difference:+.4%}" for a, b, difference in means))
        judged = "within" if abs(last[2]) < BOUND else "NOT within"
        print(f"    last tenth: {last[2]:+.4%}, {judged} {BOUND:.2%}", flush=True)
        found[name] = {"steps": steps, "tenths": means}
    guarded("drawing", lambda: draw(pairs, out / "fp8_training.png"))
    return found


def draw(pairs: dict[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Both losses of the first pair, and the relative difference of all, smoothed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, (plain, other) in pairs.items():
        steps = min(len(plain), len(other))
        width = max(1, steps // 50)
        smooth = lambda x, n=steps, w=width: np.convolve(x[:n], np.ones(w) / w, "valid")  # noqa: E731
        at = np.arange(steps - width + 1) + width / 2 + 0.5
        if name.startswith("FP8") and not left.lines:
            left.plot(at, smooth(plain), label="BF16", linewidth=1.8)
            left.plot(at, smooth(other), label="FP8", linewidth=1.0)
        right.plot(at, 100 * (smooth(other) / smooth(plain) - 1), label=name, linewidth=1.0)
    for bound in (-100 * BOUND, 100 * BOUND):
        right.axhline(bound, color="0.5", linestyle="--", linewidth=0.8)
    left.set(xlabel="step", ylabel="loss (nats per token)")
    right.set(xlabel="step", ylabel="difference of the loss (%)")
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=160)


def main() -> None:
    """Parse the arguments, train, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report", action="store_true", help="of a run that is there; no training")
    parser.add_argument("--model", default="small")
    parser.add_argument("--mtp", type=int, help="modules of multi-token prediction")
    parser.add_argument("--compute", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--remat", default="selective", choices=get_args(RematPolicy))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--tokens", type=float, default=1e8, help="of each run")
    parser.add_argument("--steps", type=int, help="instead of --tokens")
    parser.add_argument("--peak-lr", type=float, default=4e-4)
    parser.add_argument("--warmup", type=int, help="steps; default: as `OptimConfig`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", nargs="+", default=["bf16", "fp8"], choices=MATMULS)
    parser.add_argument("--turn", type=int, default=50)
    parser.add_argument("--roots", type=Path, nargs="*", default=[], help="further folders of text")
    parser.add_argument("--data", type=Path, help="keeps the prepared text, or has it")
    parser.add_argument("--text-mb", type=int, default=600)
    parser.add_argument("--tokenizer-mb", type=int, default=24)
    parser.add_argument("--held-out-batches", type=int, default=16)
    parser.add_argument("--limit", type=float, default=560, help="seconds, all in all")
    parser.add_argument("--reserve", type=float, default=30, help="of these, after training")
    arguments = parser.parse_args()
    if arguments.report:
        report(arguments.out)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    config = preset(arguments.model)
    if arguments.mtp is not None:
        config = config.replace(num_nextn_predict_layers=arguments.mtp)
    tokens = arguments.batch * arguments.seq
    steps = arguments.steps or -(-int(arguments.tokens) // tokens)
    lr = arguments.peak_lr
    optimizer = optim.OptimConfig(lr, lr / 10, lr / 30, arguments.warmup)
    setting = Setting(
        config,
        arguments.compute,
        arguments.remat,
        optimizer,
        steps,
        arguments.batch,
        arguments.seq,
    )
    counts = param_counts(config)
    say(
        f"{arguments.model}: {counts.total / 1e6:.0f}M parameters, {counts.active / 1e6:.0f}M "
        f"active, {config.num_nextn_predict_layers} MTP; {steps} steps of {tokens} tokens, "
        f"{training_flops_per_token(config, arguments.seq) / 1e9:.3f} GFLOP a token; "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}"
    )
    # Should something hang, what has been written is still there, and time to fetch it.
    with deadline(arguments.limit + 15):
        facts = train(arguments, setting)
        facts["comparison"] = report(arguments.out)
        (arguments.out / "facts.json").write_text(json.dumps(facts, indent=1))
        lines = guarded(
            "counting activations",
            lambda: kept_activations.table(config, arguments.seq, ("none", arguments.remat)),
        )
        say("activations kept for the backward pass, bytes per token and layer:")
        print("\n".join(lines or []), flush=True)


if __name__ == "__main__":
    # Two runs may share a device, and each has its state and its temporaries there.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    main()
