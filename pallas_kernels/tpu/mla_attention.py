"""Attention over the latent cache on TPU: blocks of slots, with a running softmax.

A step of the grid takes one block of one row's slots to all of the row's queries (or 512 of them,
where there are more), so the cache is read once, and only as far as it is filled: which block of
which row is next comes from lists that are known before (scalar prefetch).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

# Slots per step: a step has a cost of its own, about a third of a microsecond.
_BLOCK = 1024
_QUERIES = 512  # rows of queries per step: two sums of 512 in FP32 are 2 MiB of VMEM
# Some chips have two cores, which share the first axis of the grid.
_CORES = 2
# The score of what is not seen. Finite: a block may hold nothing that a query sees.
_LEAST = -1e30


def mla_decode(
    q_nope_BTNR: Float[Array, "B T N R"],
    q_pe_BTNP: Float[Array, "B T N P"],
    c_kv_LBSR: Float[Array, "L B S R"],
    k_pe_LBSP: Float[Array, "L B S P"],
    length_B: Int[Array, "B"],
    layer: Int[Array, ""] | int,
    *,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B T N R"]:
    """See `pallas_kernels.mla_attention.mla_decode`; R is a multiple of 128 and P of 16."""
    B, T, N, R = q_nope_BTNR.shape
    P, S = q_pe_BTNP.shape[3], c_kv_LBSR.shape[2]
    M = T * N
    block, queries = min(_BLOCK, S), min(_QUERIES, M)
    length_B = length_B.astype(jnp.int32)
    bounds, row_V, block_V = visits(length_B + (T - 1), S, block)

    def at(part, v, bounds):
        """The visit of a step. A core that has done all of its own stays at the last."""
        return lax.min(bounds[part] + v, bounds[part + 1] - 1)

    def query_block(part, i, v, layer, length, bounds, row, block):
        return row[at(part, v, bounds)], i, 0

    def latent_block(part, i, v, layer, length, bounds, row, block):
        v = at(part, v, bounds)
        return layer[0], row[v], block[v], 0

    def rotary_block(part, i, v, layer, length, bounds, row, block):
        v = at(part, v, bounds)
        return layer[0], row[v], 0, block[v]

    out_BMR = pl.pallas_call(
        functools.partial(_kernel, T=T, N=N, S=S, scale=scale),
        out_shape=jax.ShapeDtypeStruct((B, M, R), q_nope_BTNR.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(len(bounds) - 1, pl.cdiv(M, queries), jnp.max(jnp.diff(bounds))),
            in_specs=[
                pl.BlockSpec((None, queries, R), query_block),
                pl.BlockSpec((None, queries, P), query_block),
                pl.BlockSpec((None, None, block, R), latent_block),
                pl.BlockSpec((None, None, P, block), rotary_block),
            ],
            out_specs=pl.BlockSpec((None, queries, R), query_block),
            scratch_shapes=[
                pltpu.VMEM((queries, 1), jnp.float32),
                pltpu.VMEM((queries, 1), jnp.float32),
                pltpu.VMEM((queries, R), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        # Of a full cache; of it once, though every block of queries reads it.
        cost_estimate=pl.CostEstimate(
            flops=2 * B * M * S * (2 * R + P),
            transcendentals=B * M * S,
            bytes_accessed=2 * B * (S * (R + P) + M * (2 * R + P)),
        ),
        interpret=interpret,
        name="mla_decode",
    )(
        jnp.asarray(layer, jnp.int32)[None],
        length_B,
        bounds,
        row_V,
        block_V,
        q_nope_BTNR.reshape(B, M, R),
        q_pe_BTNP.reshape(B, M, P),
        c_kv_LBSR,
        # Narrower than a register, the rotary part lies transposed in memory: XLA's choice, which
        # makes this a view. As it is, the stack would be copied for every layer.
        k_pe_LBSP.swapaxes(2, 3),
    )
    return out_BMR.reshape(B, T, N, R)


def visits(
    last_B: Int[Array, "B"], S: int, block: int
) -> tuple[Int[Array, "C"], Int[Array, "V"], Int[Array, "V"]]:
    """Which row and which of its blocks each step takes, and the bounds of each core's steps.

    Every row has one block at least, all that reach up to slot ``last_B``, and one core alone.
    """
    B = len(last_B)
    blocks_B = jnp.clip(last_B, 0, S - 1) // block + 1
    ends_B = jnp.cumsum(blocks_B)
    index_V = jnp.arange(B * pl.cdiv(S, block), dtype=jnp.int32)
    row_V = jnp.sum(index_V[:, None] >= ends_B, axis=1, dtype=jnp.int32)
    row_V = jnp.minimum(row_V, B - 1)
    block_V = jnp.minimum(index_V - (ends_B - blocks_B)[row_V], blocks_B[row_V] - 1)
    bounds = [jnp.zeros((1,), jnp.int32), ends_B[-1:]]
    if B >= _CORES:
        # The row after which about half of the work is done, but not after the last.
        half = jnp.argmin(jnp.abs(2 * ends_B[:-1] - ends_B[-1]))
        bounds.insert(1, ends_B[half][None])
    return jnp.concatenate(bounds), row_V, block_V


def _kernel(
    layer,
    length,
    bounds,
    row,
    block,
    q_nope,
    q_pe,
    c_kv,
    k_pe,
    out,
    top,
    total,
    sums,
    *,
    T,
    N,
    S,
    scale,
):
    del layer
    part, i, v = pl.program_id(0), pl.program_id(1), bounds[pl.program_id(0)] + pl.program_id(2)
    queries, size = q_nope.shape[0], c_kv.shape[0]
    own = v < bounds[part + 1]
    v = lax.min(v, bounds[part + 1] - 1)
    filled = length[row[v]]
    start = block[v] * size

    def last_of(query):
        """The last slot that a query sees."""
        return lax.min(filled + lax.div(query, N), S - 1)

    first_query = i * queries
    least_seen = last_of(first_query)
    most_seen = last_of(lax.min(first_query + queries, T * N) - 1)

    @pl.when(own & (start == 0))
    def _():
        top[...] = jnp.full_like(top, _LEAST)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    def add(latent, seen):
        """The block, of which ``seen`` tells what each query sees; None: all of it."""
        scores = lax.dot_general(
            q_nope[...], latent, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        scores += jnp.dot(q_pe[...], k_pe[...], preferred_element_type=jnp.float32)
        scores *= scale
        if seen is not None:
            scores = jnp.where(seen, scores, _LEAST)
        now = jnp.maximum(top[...], scores.max(axis=1, keepdims=True))
        weights = jnp.exp(scores - now)
        if seen is not None:
            weights = jnp.where(seen, weights, 0.0)  # a query that sees nothing has no weights
        before = jnp.exp(top[...] - now)
        top[...] = now
        total[...] = total[...] * before + weights.sum(axis=1, keepdims=True)
        more = jnp.dot(weights.astype(latent.dtype), latent, preferred_element_type=jnp.float32)
        sums[...] = sums[...] * before + more

    whole = start + size - 1 <= least_seen

    @pl.when(own & whole)
    def _():
        add(c_kv[...], None)

    @pl.when(own & ~whole & (start <= most_seen))
    def _():
        query = first_query + lax.broadcasted_iota(jnp.int32, (queries, 1), 0)
        slot = start + lax.broadcasted_iota(jnp.int32, (1, size), 1)
        # What nobody sees, or lies past the array, may be NaN, which times zero is NaN.
        slot_down = start + lax.broadcasted_iota(jnp.int32, (size, 1), 0)
        latent = jnp.where(slot_down <= most_seen, c_kv[...], 0)
        add(latent, slot <= last_of(query))

    last = lax.max(lax.min(filled + T - 1, S - 1), 0)

    @pl.when(own & (block[v] == lax.div(last, size)))
    def _():
        # Where anything is seen, the largest weight is one.
        out[...] = (sums[...] / jnp.maximum(total[...], 1.0)).astype(out.dtype)
