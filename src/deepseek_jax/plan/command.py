"""``deepseek-jax plan``: what a training or decode step costs on a slice that nobody has booked."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh
from rich.console import Console

from deepseek_jax import sharding
from deepseek_jax.config import Dtype, ModelConfig, Precision, RematPolicy
from deepseek_jax.model.dispatch import ExpertParallel
from deepseek_jax.model.transformer import DeepSeekV3, param_counts
from deepseek_jax.plan import compile as compiler
from deepseek_jax.plan.flops import training_flops_per_token
from deepseek_jax.plan.report import Plan, Routed, analyse, ranked
from deepseek_jax.plan.search import candidates
from deepseek_jax.plan.show import Stage, draw, plan_table, search_table
from deepseek_jax.plan.topology import Topology, parse_topology, topology_devices
from deepseek_jax.plan.traffic import expected_receivers
from deepseek_jax.presets import PRESETS, preset
from deepseek_jax.train.lora import LoraConfig
from deepseek_jax.train.optim import OptimConfig
from deepseek_jax.types import UserError


@dataclass(frozen=True)
class PlanConfig:
    """A step to compile ahead of time. TPU slices alone."""

    model: ModelConfig = field(default_factory=lambda: preset("v3"))
    topology: str = "v5p:8x16x16"
    """The slice, as in v5p:4x4x4, v6e:16x16, v5e:8x8 or tpu7x:4x4x4."""
    mesh: str = "fsdp=-1,expert=64"
    """Its devices over data, fsdp, expert, context and tensor, as in fsdp=32,expert=64; -1 fills
    one axis."""
    batch: int = 2048
    """Sequences per step, over all devices."""
    seq: int = 4096
    """Tokens of a sequence; of ``--decode``, slots of the cache."""
    micro_batches: int = 1
    """Into how many parts a step is divided, gradients accumulated."""
    remat: RematPolicy | None = None
    """What the backward pass computes again; default for training: full."""
    decode: bool = False
    """One token for every sequence from a full cache."""
    weights: Literal["compute", "fp8"] = "compute"
    """Of ``--decode``: in the compute format, or in FP8 as in ``generate``."""
    search: bool = False
    """Try a handful of meshes and remat policies instead of the given ones, and rank them."""
    out: Path = Path("out/plan")
    """Where plan.json and plan.png go; with ``--search``, search.json."""
    save_hlo: bool = False
    """Keep the optimized program beside them."""
    moments: Dtype = "float32"
    """Storage of Adam's moments."""
    precision: Precision = field(default_factory=Precision)
    parallel: ExpertParallel = field(default_factory=ExpertParallel)
    lora: LoraConfig = field(default_factory=LoraConfig)


def plan(config: PlanConfig, console: Console | None = None) -> list[Plan]:
    """Compile, print, and write what the configuration asks for; best first.

    Raises:
        UserError: before anything is compiled, for a topology that does not exist, a mesh or a
            batch that does not fit it, or libtpu missing.
    """
    console = console or Console()
    topology = parse_topology(config.topology)
    if config.decode and config.remat not in (None, "none"):
        raise UserError("decode has no backward pass: leave remat out.")
    if not config.decode:
        config.lora.check(config.remat or "full")
    if config.weights == "fp8" and not config.decode:
        raise UserError("weights in FP8 are not trained: add --decode, or give --lora-base fp8.")
    devices = topology_devices(topology)
    if not config.search:
        mesh = sharding.make_mesh(config.mesh, devices)
        found = plan_one(config, topology, mesh, console)
        console.print(plan_table(found))
        command = pretrain_command(config)
        if command is not None:
            console.print(f"to train so: {command}", markup=False, highlight=False, soft_wrap=True)
        written = _write(config, [found], "plan.json")
        console.print(f"wrote {written}", markup=False, highlight=False)
        return [found]
    plans = []
    tries = candidates(config.model, len(devices), config.batch, decode=config.decode)
    for number, (text, remat) in enumerate(tries, 1):
        one = dataclasses.replace(config, mesh=text, remat=remat)
        mesh = sharding.make_mesh(text, devices)
        plans.append(plan_one(one, topology, mesh, console, f"{number}/{len(tries)} "))
        _write(config, ranked(plans), "search.json")  # a search may be cut short
    console.print(search_table(ranked(plans)))
    console.print(f"wrote {config.out / 'search.json'}", markup=False, highlight=False)
    return ranked(plans)


def pretrain_command(config: PlanConfig) -> str | None:
    """`pretrain`, whose names and defaults differ, asked for the step that was planned."""
    if config.decode or config.lora.lora_rank:
        return None
    name = next((name for name, known in PRESETS.items() if known == config.model), "config.json")
    options: dict[str, Any] = {
        "model": name,
        "mesh": config.mesh,
        "batch-size": config.batch,
        "seq-len": config.seq,
        "remat": config.remat or "full",
    }
    if config.micro_batches > 1:
        options["micro-batch"] = config.batch // config.micro_batches
    if config.moments != OptimConfig().moments:
        options["moments"] = config.moments
    for given, default in ((config.precision, Precision()), (config.parallel, ExpertParallel())):
        for field_ in dataclasses.fields(given):
            value = getattr(given, field_.name)
            if value != getattr(default, field_.name):
                options[field_.name.replace("_", "-")] = value
    words = [f"--{key}" if value is True else f"--{key} {value}" for key, value in options.items()]
    return " ".join(["deepseek-jax pretrain", *words, "--source ..."])


def plan_one(
    config: PlanConfig, topology: Topology, mesh: Mesh, console: Console, prefix: str = ""
) -> Plan:
    """One mesh and one policy."""
    step, tokens, flops = _step(config, mesh)
    weights = ", weights in FP8" if config.weights == "fp8" else ""
    remat = weights if config.decode else f", remat {config.remat or 'full'}"
    if config.lora.lora_rank and not config.decode:
        remat += f", LoRA of rank {config.lora.lora_rank} on {' '.join(config.lora.lora_targets)}"
        remat += " over FP8" if config.lora.lora_base == "fp8" else ""
    title = (
        f"{_size(param_counts(config.model).total)}, "
        f"{'decode' if config.decode else 'train'}, {topology.name}, {_short(mesh)}, "
        f"batch {config.batch}, seq {config.seq}{remat}"
    )
    with Stage(console, prefix + title) as stage:
        compiled = compiler.compile_step(step, mesh, stage.say)
    if config.save_hlo and compiled.text:
        config.out.mkdir(parents=True, exist_ok=True)
        (config.out / "program.hlo.txt").write_text(compiled.text, encoding="utf-8")
    return analyse(
        compiled,
        topology,
        mesh,
        title=title,
        step="decode" if config.decode else "train",
        tokens=tokens,
        model_flops=flops,
        routed=_routed(config, mesh),
        open_trips=step.open_trips,
    )


def _routed(config: PlanConfig, mesh: Mesh) -> Routed:
    """Under balanced load and uniform routing; see ``traffic``."""
    devices = math.prod(mesh.shape[axis] for axis in sharding.COMPUTE["expert"])
    parts = sharding.batch_shards(mesh) * (1 if config.decode else sharding.sequence_shards(mesh))
    tokens = config.batch // config.micro_batches / parts * (1 if config.decode else config.seq)
    if config.parallel.overlap and devices > 1 and not config.decode:
        tokens /= 2  # a layer's two halves are dispatched one by one
    receivers = expected_receivers(config.model, devices)
    pairs = tokens * config.model.num_experts_per_tok
    return Routed(
        tokens * receivers, pairs / devices if config.parallel.dispatcher == "ring" else pairs
    )


def _step(config: PlanConfig, mesh: Mesh) -> tuple[compiler.Step, int, float]:
    """It, its tokens, and its FLOPs on paper."""
    compiler.check_rows(config.batch, config.micro_batches, config.seq, mesh)
    if config.decode:
        precision = dataclasses.replace(config.precision, params=config.precision.compute)
        fp8 = config.weights == "fp8"
        if fp8:  # what every TPU has kernels for
            precision = dataclasses.replace(precision, matmuls="fp8")
        model = DeepSeekV3(
            config.model.replace(num_nextn_predict_layers=0), precision, "none", config.parallel
        )
        # Two for every activated parameter, and both products of absorbed attention.
        c = config.model
        attention = 2 * c.num_attention_heads * (2 * c.kv_lora_rank + c.qk_rope_head_dim)
        per_token = 2.0 * param_counts(c).active + attention * config.seq * c.num_hidden_layers
        step = compiler.decode_step(model, mesh, config.batch, config.seq, fp8=fp8)
        return step, config.batch, per_token * config.batch
    model = DeepSeekV3(
        config.model,
        config.precision,
        config.remat or "full",
        config.parallel,
        whole_rows=not config.lora.lora_rank,  # pretraining's rows; fine-tuning packs its own
    )
    step = compiler.training_step(
        model,
        OptimConfig(moments=config.moments),
        mesh,
        config.micro_batches,
        config.batch // config.micro_batches,
        config.seq,
        config.lora,
    )
    tokens = config.batch * config.seq
    return step, tokens, training_flops_per_token(config.model, config.seq) * tokens


def _size(params: int) -> str:
    return f"{params / 1e9:.0f}B" if params >= 1e9 else f"{params / 1e6:.3g}M"


def _short(mesh: Mesh) -> str:
    return ",".join(f"{a}={n}" for a, n in mesh.shape.items() if n > 1) or "one device"


def _write(config: PlanConfig, plans: list[Plan], name: str) -> Path:
    config.out.mkdir(parents=True, exist_ok=True)
    records = [one.to_json() for one in plans]
    path = config.out / name
    path.write_text(
        json.dumps(records[0] if name == "plan.json" else records, indent=1), encoding="utf-8"
    )
    if plans[0].fits:
        draw(plans[0], config.out / "plan.png")
    return path
