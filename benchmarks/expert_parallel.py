"""Expert parallelism between the GPUs of one host: the exchange alone, and a whole MoE layer.

    python benchmarks/expert_parallel.py                  # V3's layer over all GPUs
    python benchmarks/expert_parallel.py --only transfer --seconds 60

*transfer*: the rows of one dispatch, or of one combine, from device to device, at V3's shape
(4096 tokens a GPU, width 7168, 8 of 256 experts in 4 of 8 groups). A token goes once to every GPU
that has any of its experts. GB/s count what leaves a GPU, its own rows not; "as DeepEP counts"
counts them. Beside it, of as many bytes: ``all_to_all`` (equal messages), ``psum`` (bytes over
time, of the whole array) and ``ppermute``, which the ring uses.

*layer*: tokens -> dispatch -> experts -> combine -> tokens, forward and with both gradients. *one
device* computes as many pairs of as many experts without sending: what the others have above it
is the price of expert parallelism. Results and gradients are compared with those of the ring.
"""

import argparse
import concurrent.futures
import functools
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.timing import deadline
from deepseek_jax import preset, sharding
from deepseek_jax.config import ModelConfig, Precision
from deepseek_jax.model.dispatch import (
    Chosen,
    ExpertParallel,
    exchange,
    most_receivers,
    plan_exchange,
    routed_experts,
)
from deepseek_jax.model.experts import ExpertWeights, sorted_pairs, to_pairs
from deepseek_jax.model.moe import route

ALL, NONE = PartitionSpec("expert"), PartitionSpec()
# How XLA carries a ragged all-to-all within a host: its own kernel with plain peer access (rather
# than in NCCL's symmetric memory, into which it would copy), or NCCL's messages.
PEER = {
    "xla_gpu_experimental_ragged_all_to_all_use_barrier_with_nccl": False,
    "xla_gpu_allow_ragged_all_to_all_nccl_send_recv_fallback": True,
}
NCCL = PEER | {"xla_gpu_unsupported_use_ragged_all_to_all_one_shot_kernel": False}


class Program(NamedTuple):
    """Something to time."""

    name: str
    body: Callable[..., Any]
    """Of one device's parts, to be mapped over the mesh."""
    arguments: tuple[Any, ...]
    specs: Any
    options: dict[str, Any] = {}  # noqa: RUF012, never written to
    pieces: int = 256
    bytes_sent: float = 0
    """That leave a GPU, on average."""
    bytes_moved: float = 0
    """With those that it sends to itself."""
    mesh: Mesh | None = None
    """Another than all devices."""


def lowered(program: Program, mesh: Mesh) -> Any:
    """Traced; not in parallel with others, for the pieces are the module's."""
    mesh = program.mesh or mesh
    with jax.set_mesh(mesh):
        sharding.GPU_PIECES = program.pieces
        body = jax.shard_map(program.body, in_specs=program.specs, out_specs=ALL, check_vma=False)
        return jax.jit(body).lower(*program.arguments)


# --- transfers -------------------------------------------------------------------------------


def routed(config: ModelConfig, tokens: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Experts and gates of random tokens, by the model's own router."""
    E = config.n_routed_experts
    logits = jax.random.normal(jax.random.key(seed), (1, tokens, E))
    choice = jax.jit(functools.partial(route, config=config))(logits, jnp.zeros(E))
    return np.asarray(choice.experts_BTK[0]), np.asarray(choice.weights_BTK[0])


def counts_sent(experts_TK: np.ndarray, devices: int, per_device: int) -> np.ndarray:
    """Rows that each device sends to each, [sender, receiver]."""
    owner = experts_TK.reshape(devices, -1, experts_TK.shape[1]) // per_device
    return np.stack(
        [[(own == receiver).any(1).sum() for receiver in range(devices)] for own in owner]
    )


def transfers(mesh: Mesh, config: ModelConfig, tokens: int, place: "Place") -> list[Program]:
    """Rows from device to device, and what the network does with plain collectives."""
    N, D = mesh.size, config.hidden_size
    here = config.n_routed_experts // N
    most = most_receivers(config.num_experts_per_tok, N, config.n_group, config.topk_group)
    experts, _ = routed(config, N * tokens, 0)
    counts = counts_sent(experts, N, here)
    size = N * tokens  # what a device can receive at the worst
    crossing = (counts.sum() - np.trace(counts)) / N

    def plan(experts_TK):
        owner_TK = jnp.sort(experts_TK // here, axis=1)
        again_TK = jnp.pad(owner_TK[:, 1:] == owner_TK[:, :-1], ((0, 0), (1, 0)))
        rows = sorted_pairs(jnp.where(again_TK, N, owner_TK), N, tokens * most)
        return rows, plan_exchange(jnp.cumsum(rows.sizes_G) - rows.sizes_G, rows.sizes_G)

    def sent(experts_TK, x_TD):
        rows, ex = plan(experts_TK)
        return to_pairs(x_TD, rows), jax.tree.map(lambda a: a[None], ex)

    experts = place(experts.astype(np.int32), ALL)
    x = place.zeros((N * tokens, D), jnp.bfloat16, ALL)
    with jax.set_mesh(mesh):
        form = jax.jit(jax.shard_map(sent, in_specs=(ALL, ALL), out_specs=ALL, check_vma=False))
        if isinstance(x, jax.ShapeDtypeStruct):
            rows, ex = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=x.sharding),
                jax.eval_shape(form, experts, x),
            )
        else:
            rows, ex = form(experts, x)
    scales = place.zeros((rows.shape[0], D // 128), np.float32, ALL)
    eighth = place.zeros(rows.shape, jnp.float8_e4m3fn, ALL)

    def one(a):
        return jax.tree.map(lambda a: a[0], a)

    def dispatch(rows, ex):
        return exchange(rows, one(ex), size)

    def dispatch_fp8(rows, scales, ex):
        return exchange(rows, one(ex), size), exchange(scales, one(ex), size)

    def combine(received, ex):
        return exchange(received, one(ex).back(), tokens * most)

    bf16 = {"bytes_sent": crossing * D * 2, "bytes_moved": counts.sum() / N * D * 2}
    width = D + D // 128 * 4
    fp8 = {"bytes_sent": crossing * width, "bytes_moved": counts.sum() / N * width}
    received = place.zeros((N * size, D), jnp.bfloat16, ALL)
    ragged = [
        Program("dispatch BF16, XLA's kernel, 256 pieces", dispatch, (rows, ex), ALL, PEER, **bf16),
        Program(
            "dispatch FP8, XLA's kernel, 256 pieces",
            dispatch_fp8,
            (eighth, scales, ex),
            ALL,
            PEER,
            **fp8,
        ),
        Program(
            "combine BF16, XLA's kernel, 256 pieces", combine, (received, ex), ALL, PEER, **bf16
        ),
        Program("dispatch BF16, NCCL, 1 piece", dispatch, (rows, ex), ALL, NCCL, 1, **bf16),
        Program(
            "dispatch BF16, XLA's kernel, 64 pieces", dispatch, (rows, ex), ALL, PEER, 64, **bf16
        ),
        Program(
            "dispatch BF16, XLA's kernel, 512 pieces", dispatch, (rows, ex), ALL, PEER, 512, **bf16
        ),
        Program("dispatch BF16, XLA's kernel, 1 piece", dispatch, (rows, ex), ALL, PEER, 1, **bf16),
    ]
    equal = int(counts.sum() / N / N) * N  # rows of one device, in equal messages
    block = place.zeros((N * equal, D), jnp.bfloat16, ALL)
    whole = equal * D * 2
    plain = [
        Program(
            "all_to_all, as many bytes",
            lambda a: jax.lax.all_to_all(a, "expert", 0, 0, tiled=True),
            (block,),
            ALL,
            bytes_sent=whole * (N - 1) / N,
            bytes_moved=whole,
        ),
        Program(
            "psum, as many bytes",
            lambda a: jax.lax.psum(a, "expert"),
            (block,),
            ALL,
            bytes_sent=whole,
            bytes_moved=whole,
        ),
        Program(
            "ppermute, as many bytes",
            lambda a: jax.lax.ppermute(a, "expert", [(i, (i + 1) % N) for i in range(N)]),
            (block,),
            ALL,
            bytes_sent=whole,
            bytes_moved=whole,
        ),
    ]
    return [*ragged[:1], *plain[:1], *ragged[1:4], *plain[1:], *ragged[4:]]


# --- layers ----------------------------------------------------------------------------------


def layers(mesh: Mesh, config: ModelConfig, tokens: int, place: "Place") -> list[Program]:
    """A MoE layer's routed experts, forward and with gradients, by every dispatcher."""
    N, D, F = mesh.size, config.hidden_size, config.moe_intermediate_size
    E = config.n_routed_experts
    here, groups = E // N, (config.n_group, config.topk_group)
    experts, gates = routed(config, N * tokens, 1)
    one_device = config.replace(n_routed_experts=here, n_group=1, topk_group=1)
    own_experts, own_gates = routed(one_device, tokens, 2)
    first = Mesh(mesh.devices.reshape(-1)[:1].reshape((1,) * mesh.devices.ndim), mesh.axis_names)

    def random(shape, scale, spec, mesh, seed) -> Any:
        where = NamedSharding(mesh, spec)
        if place.abstract:
            return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where)
        draw = functools.partial(jax.random.normal, shape=shape, dtype=jnp.bfloat16)
        return jax.jit(lambda key: scale * draw(key), out_shardings=where)(jax.random.key(seed))

    shapes = ((E, D, F), (E, D, F), (E, F, D))
    weights = ExpertWeights(*(random(s, 0.02, ALL, mesh, i) for i, s in enumerate(shapes)))
    x, ct = (random((N * tokens, D), 1.0, ALL, mesh, seed) for seed in (3, 4))
    everyone = (
        x,
        place(experts.astype(np.int32), ALL),
        place(gates.astype(np.float32), ALL),
        weights,
        ct,
    )
    alone = (
        random((tokens, D), 1.0, ALL, first, 5),
        place(own_experts.astype(np.int32), ALL, first),
        place(own_gates.astype(np.float32), ALL, first),
        ExpertWeights(
            *(random((here, *s[1:]), 0.02, ALL, first, 6 + i) for i, s in enumerate(shapes))
        ),
        random((tokens, D), 1.0, ALL, first, 9),
    )

    def layer(x, experts, gates, weights, ct, *, matmuls, parallel, gradients):
        precision = Precision(matmuls=matmuls)

        def run(x, gates, weights):
            sizes = 2 if parallel.overlap else 1
            parts = zip(*(jnp.split(a, sizes) for a in (x, experts, gates)), strict=True)
            parts = [Chosen(*part) for part in parts]
            return jnp.concatenate(routed_experts(parts, weights, precision, parallel, groups))

        if not gradients:
            return run(x, gates, weights)
        y, pullback = jax.vjp(run, x, gates, weights)
        dx, dgates, dweights = pullback(ct)
        # A corner of each matrix is enough to compare.
        return y, dx, dgates, jax.tree.map(lambda w: w[:, :256, :256], dweights)

    def program(name, matmuls, parallel, *, gradients=True, options=PEER, mesh=None):
        body = functools.partial(layer, matmuls=matmuls, parallel=parallel, gradients=gradients)
        arguments = everyone if mesh is None else alone
        what = "forward and backward" if gradients else "forward"
        pieces = 1 if options is NCCL else 256
        return Program(f"{name}, {what}", body, arguments, ALL, options, pieces, mesh=mesh)

    ragged, ring = ExpertParallel("ragged"), ExpertParallel("ring")
    overlap = ExpertParallel("ragged", overlap=True)
    return [
        program("one device BF16", "compute", ragged, mesh=first),
        program("ring BF16", "compute", ring),
        program("ragged BF16", "compute", ragged),
        program("one device FP8", "fp8", ragged, mesh=first),
        program("ragged FP8", "fp8", ragged),
        program("ragged in halves BF16", "compute", overlap),
        program("ring FP8", "fp8", ring),
        program("ragged in halves FP8", "fp8", overlap),
        program("ragged by NCCL BF16", "compute", ragged, options=NCCL),
        program("one device BF16", "compute", ragged, gradients=False, mesh=first),
        program("ragged BF16", "compute", ragged, gradients=False),
        program("one device FP8", "fp8", ragged, gradients=False, mesh=first),
        program("ragged FP8", "fp8", ragged, gradients=False),
    ]


# --- running ---------------------------------------------------------------------------------


def seconds_per_call(call: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """Of the steady state, the median of some repeats."""
    jax.block_until_ready(call(*arguments))
    repeats, out = [], None
    start = time.perf_counter()
    jax.block_until_ready(call(*arguments))
    calls = max(2, min(20, int(0.03 / (time.perf_counter() - start))))
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            out = call(*arguments)
        jax.block_until_ready(out)
        repeats.append((time.perf_counter() - start) / calls)
    return float(np.median(repeats))


def error(got: Any, want: Any) -> str:
    """Relative RMS difference of every array."""

    @jax.jit
    def relative(a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.sqrt(jnp.sum((a - b) ** 2) / jnp.sum(b**2))

    each = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return " ".join(f"{float(relative(a, b)):.1e}" for a, b in each)


def report(program: Program, seconds: float, compiled: Any, extra: str) -> None:
    """One line."""
    line = f"{program.name}: {seconds * 1e6:,.0f} us"
    if program.bytes_sent:
        line += f", {program.bytes_sent / seconds / 1e9:,.0f} GB/s out of a GPU"
        line += f" ({program.bytes_moved / seconds / 1e9:,.0f} as DeepEP counts)"
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    print(f"{line}, temporaries {temporaries / 1e9:.2f} GB{extra}", flush=True)


def run_all(programs: list[Program], mesh: Mesh, until: float) -> None:
    """Compile in parallel, then time one after another, in the order given."""
    pool = concurrent.futures.ThreadPoolExecutor(16)
    options: dict[str, Any] = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
    compiling, start = [], time.perf_counter()
    for program in programs:
        try:
            done = pool.submit(
                lowered(program, mesh).compile, compiler_options=options | program.options
            )
            compiling.append((program, done))
        except Exception:
            print(f"{program.name}: not traced\n{traceback.format_exc(limit=-4)}", flush=True)
        if time.perf_counter() - start > 0.6 * (until - start):
            break
    print(f"(traced in {time.perf_counter() - start:.0f} s)", flush=True)
    reference = None
    for program, done in compiling:
        if time.perf_counter() > until:
            print(f"{program.name}: no time left", flush=True)
            continue
        try:
            compiled = done.result(timeout=max(until - time.perf_counter(), 1))
            seconds = seconds_per_call(compiled, program.arguments)
            extra = ""
            if program.mesh is None and "backward" in program.name:
                got = compiled(*program.arguments)
                reference = got if reference is None else reference
                extra = f", from the first of these {error(got, reference)}"
            report(program, seconds, compiled, extra)
        except Exception as failure:
            print(f"{program.name}: {type(failure).__name__}: {str(failure)[:600]}", flush=True)
    pool.shutdown(wait=False, cancel_futures=True)


class Place:
    """NumPy arrays onto a mesh; or only their shapes, to compile without devices."""

    def __init__(self, mesh: Mesh, abstract: bool = False):
        self.mesh, self.abstract = mesh, abstract

    def __call__(self, array: np.ndarray, spec: PartitionSpec, mesh: Mesh | None = None) -> Any:
        """Divided as ``spec`` says."""
        where = NamedSharding(mesh or self.mesh, spec)
        if self.abstract:
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)
        return jax.device_put(array, where)

    def zeros(self, shape: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> Any:
        """Made where they are."""
        where = NamedSharding(self.mesh, spec)
        if self.abstract:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=where)
        return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=where)()


def main() -> None:
    """Parse the arguments, time, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="on every GPU")
    parser.add_argument("--only", choices=["transfer", "layer"])
    parser.add_argument("--seconds", type=float, default=120, help="start nothing later than this")
    arguments = parser.parse_args()
    start = time.perf_counter()
    mesh = sharding.make_mesh(f"expert={jax.device_count()}")
    config = preset("v3")
    print(f"{mesh.size} x {jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    with deadline(arguments.seconds + 60):
        if arguments.only != "layer":
            programs = transfers(mesh, config, arguments.tokens, Place(mesh))
            run_all(programs, mesh, start + arguments.seconds)
            del programs
        if arguments.only != "transfer":
            programs = layers(mesh, config, arguments.tokens, Place(mesh))
            run_all(programs, mesh, start + arguments.seconds)


if __name__ == "__main__":
    main()
