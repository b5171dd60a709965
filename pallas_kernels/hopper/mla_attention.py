"""Attention of absorbed queries over the latent cache on Hopper (FlashMLA's problem).

All heads of a token see the same keys, which are also the values: a block of 64 keys is fetched
once for 64 queries (heads, and tokens of a speculative step), and multiplied twice. The result of
64 queries is 128 KB of FP32, half of a multiprocessor's registers, so its columns are divided
between two warpgroups. The first makes the scores and their softmax, hands the weights over through
shared memory, and both multiply them with their half of the values; a third fetches. Of clusters
of two blocks, which take 64 queries each of the same row, each fetches half of every block of keys
for both.

In cycles of a multiprocessor, a block of keys takes 1152 of the tensor cores for its scores and 512
for either half of the result; its softmax about 700 of the first warpgroup alone. So the second
half is multiplied while the first warpgroup is at the softmax of the block after. Two
blocks of keys are all that shared memory holds, so nothing of a block is kept for longer than that:
the one after the next arrives meanwhile.

Where rows are few, their keys are split, and the parts summed by plain jnp (flash-decoding).

Bound, at 128 queries a row, by memory and arithmetic about alike: 2 (R + P) bytes and
2 x 128 (2 R + P) operations a slot, 242 a byte.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper import compat
from pallas_kernels.hopper.ring import Ring

R, P = 512, 64  # of DeepSeek's caches: what registers and shared memory are laid out for
_ROWS = 64  # queries of a block of threads
_KEYS = 64  # slots at a time
_STAGES = 2
_HALF = R // 2
_REGISTERS = 24, 240  # of a thread: producer, consumer
_LEAST = -1e30  # finite: what sees nothing must not become NaN
# No room is needed to reduce across warps: a row of scores lies in one.
# No warpgroup reads what it has itself written to shared memory, so none must wait for itself.
_PARAMS = {"approx_math": True, "reduction_scratch_bytes": 0, "unsafe_no_auto_barriers": True}
_START = 3  # what a block of threads costs before and after its keys, in blocks of keys
# What it costs to add up parts: two launches, and 256 KB of device memory for each.
_ADDING = 3, 0.055


@functools.partial(jax.jit, static_argnames=("scale", "splits", "interpret"))
def mla_decode(
    q_nope_BTNR: Float[Array, "B T N R"],
    q_pe_BTNP: Float[Array, "B T N P"],
    c_kv_LBSR: Float[Array, "L B S R"],
    k_pe_LBSP: Float[Array, "L B S P"],
    length_B: Int[Array, "B"],
    layer: Int[Array, ""] | int,
    *,
    scale: float,
    splits: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N R"]:
    """See `pallas_kernels.mla_attention.mla_decode`; queries and cache in bfloat16.

    Args:
        q_nope_BTNR: Absorbed queries.
        q_pe_BTNP: Rotated queries.
        c_kv_LBSR: Latents of all layers.
        k_pe_LBSP: Rotated keys, likewise.
        length_B: Query t of row b sits in slot ``length_B[b] + t``.
        layer: Which of the layers.
        scale: Of the scores.
        splits: Parts that each row's slots are divided into; default: by `choose_splits`.
        interpret: Simulate on the CPU.

    Raises:
        ValueError: unless R is 512, P is 64, S a multiple of 8 and at least 64, and everything in
            bfloat16.
    """
    (B, T, N, _), (L, _, S, _) = q_nope_BTNR.shape, c_kv_LBSR.shape
    arrays = q_nope_BTNR, q_pe_BTNP, c_kv_LBSR, k_pe_LBSP
    if (q_nope_BTNR.shape[3], q_pe_BTNP.shape[3]) != (R, P) or S < _KEYS or S % 8:
        raise ValueError(
            f"R must be {R}, P {P} and S a multiple of 8, at least {_KEYS}, not "
            f"{arrays[0].shape[3]}, {arrays[1].shape[3]} and {S}"
        )
    if any(a.dtype != jnp.bfloat16 for a in arrays):
        raise ValueError(f"everything must be bfloat16, not {[a.dtype.name for a in arrays]}")
    queries = T * N
    rows = pl.cdiv(queries, _ROWS) * _ROWS
    splits = splits or choose_splits(B, rows // _ROWS, S, compat.multiprocessors())
    q_nope, q_pe = (
        jnp.pad(q.reshape(B, queries, -1), ((0, 0), (0, rows - queries), (0, 0)))
        for q in (q_nope_BTNR, q_pe_BTNP)
    )
    kernel = _Kernel(B, rows, S, N, T, splits, scale * math.log2(math.e), interpret)
    out, *top = kernel.call()(
        length_B.astype(jnp.int32),
        jnp.asarray(layer, jnp.int32).reshape(1),
        q_nope,
        q_pe,
        c_kv_LBSR.reshape(L * B, S, R),
        k_pe_LBSP.reshape(L * B, S, P),
    )
    if top:
        weights = jax.nn.softmax(top[0] * math.log(2), axis=1)
        # Not an einsum, for which XLA would bring the parts into another order first.
        out = (weights[..., None] * out).sum(1).astype(jnp.bfloat16)
    return out[:, :queries].reshape(B, T, N, R)


def choose_splits(rows: int, row_blocks: int, slots: int, multiprocessors: int) -> int:
    """The number of parts of a row's slots that takes the least time, counted in blocks of keys.

    All multiprocessors work in turns. Parts must be added up, too: FP32, written and read.
    """
    blocks = pl.cdiv(slots, _KEYS)

    def cost(splits: int) -> float:
        turns = pl.cdiv(rows * row_blocks * splits, multiprocessors)
        adding = _ADDING[0] + _ADDING[1] * rows * row_blocks * splits if splits > 1 else 0
        return float(turns * (pl.cdiv(blocks, splits) + _START) + adding)

    return min(range(1, min(blocks, multiprocessors) + 1), key=cost)


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """One compiled shape: what the three warpgroups must agree on."""

    batch: int
    rows: int  # queries of a row of the batch, with padding
    slots: int
    heads: int
    tokens: int
    splits: int
    scale: float  # for powers of two
    interpret: bool

    @property
    def cluster(self) -> int:
        """Blocks that share the fetching; one in the simulation, which knows no other till 0.12."""
        return 1 if self.rows // _ROWS % 2 or self.interpret else 2

    def call(self):
        tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

        def operand(*shape):
            return plgpu.SMEM(shape, jnp.bfloat16, transforms=tiled)

        def free():
            if self.cluster == 1:
                return plgpu.Barrier(num_barriers=_STAGES)
            return plgpu.ClusterBarrier(collective_axes=("pair",), num_barriers=_STAGES)

        scratch: dict[str, Any] = dict(
            q_left=operand(_ROWS, _HALF),
            q_right=operand(_ROWS, _HALF),
            q_pe=operand(_ROWS, P),
            left=operand(_STAGES, _KEYS, _HALF),
            right=operand(_STAGES, _KEYS, _HALF),
            pe=operand(_STAGES, _KEYS, P),
            weights=operand(_ROWS, _KEYS),
            factors=plgpu.SMEM((_ROWS,), jnp.float32),
            q_full=plgpu.Barrier(num_arrivals=3),
            left_full=plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
            right_full=plgpu.Barrier(num_barriers=_STAGES),
            left_free=free(),
            right_free=free(),
            factors_full=plgpu.Barrier(),
            weights_full=plgpu.Barrier(),
            weights_free=plgpu.Barrier(),
            scored=plgpu.Barrier(),
        )
        shape = jax.ShapeDtypeStruct
        out: Any = (shape((self.batch, self.rows, R), jnp.bfloat16),)
        if self.splits > 1:
            parts = self.batch, self.splits, self.rows
            out = shape((*parts, R), jnp.float32), shape(parts, jnp.float32)
        in_cluster = dict(cluster=(2,), cluster_names=("pair",)) if self.cluster == 2 else {}

        def body(length, layer, q_nope, q_pe, c_kv, k_pe, *rest):
            outs = rest[: len(out)]
            refs = dict(zip(scratch, rest[len(out) :], strict=True))
            index = lax.axis_index("block")
            pairs = self.rows // _ROWS // self.cluster
            index, pair = lax.div(index, pairs), lax.rem(index, pairs)
            row, split = lax.div(index, self.splits), lax.rem(index, self.splits)
            if self.cluster == 2:
                pair = 2 * pair + lax.axis_index("pair")
            own = pl.ds(pair * _ROWS, _ROWS)
            first_token = length[row]
            end = lax.min(first_token + self.tokens, self.slots)  # of what any query sees
            blocks = lax.div(end + _KEYS - 1, _KEYS)
            first, last = (lax.div(blocks * (split + i), self.splits) for i in (0, 1))
            warpgroup = lax.axis_index("warpgroup")

            @pl.when(warpgroup == 2)
            def _():
                plgpu.set_max_registers(_REGISTERS[0], action="decrease")
                queries = q_nope.at[row, own], q_pe.at[row, own]
                held = layer[0] * self.batch + row
                self.produce(queries, c_kv.at[held], k_pe.at[held], first, last, refs)

            def store(half, total):
                columns = pl.ds(half * _HALF, _HALF)
                if self.splits > 1:
                    outs[0][row, split, own, columns] = total
                    return
                # By way of room for keys, all of which have been used, and the copy engine: stores
                # of single threads took 6% of the kernel.
                done = refs["right" if half else "left"].at[0]
                done[...] = total.astype(jnp.bfloat16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(done, outs[0].at[row, own, columns])
                plgpu.wait_smem_to_gmem(0)

            @pl.when(warpgroup == 0)
            def _():
                plgpu.set_max_registers(_REGISTERS[1], action="increase")
                total, top = self.left(first_token, end, pair, first, last, refs)
                store(0, total)
                if self.splits > 1:
                    outs[1][row, split, own] = top

            @pl.when(warpgroup == 1)
            def _():
                plgpu.set_max_registers(_REGISTERS[1], action="increase")
                store(1, self.right(end, first, last, refs))

        return compat.kernel(
            body,
            interpret=self.interpret,
            params=_PARAMS,
            out_type=out,
            grid=(self.batch * self.splits * self.rows // _ROWS // self.cluster,),
            grid_names=("block",),
            num_threads=3,
            thread_name="warpgroup",
            scratch_types=list(scratch.values()),
            **in_cluster,
        )

    def produce(self, queries, c_kv, k_pe, first, last, refs):
        """Fetch the queries, then keep two blocks of keys ahead of the products."""
        load = plgpu.copy_gmem_to_smem
        halves = pl.ds(0, _HALF), pl.ds(_HALF, _HALF)
        q_nope, q_pe = queries
        load(q_nope.at[:, halves[0]], refs["q_left"], refs["q_full"])
        load(q_nope.at[:, halves[1]], refs["q_right"], refs["q_full"])
        load(q_pe, refs["q_pe"], refs["q_full"])
        axis = "pair" if self.cluster == 2 else None
        ring = Ring(_STAGES)

        def step(block, position):
            slot, keys = position.slot, pl.ds(block * _KEYS, _KEYS)
            shared = functools.partial(load, collective_axes=axis)
            ring.acquire(position, refs["left_free"])
            full = refs["left_full"].at[slot]
            shared(c_kv.at[keys, halves[0]], refs["left"].at[slot], full)
            shared(k_pe.at[keys], refs["pe"].at[slot], full)
            ring.acquire(position, refs["right_free"])
            full = refs["right_full"].at[slot]
            shared(c_kv.at[keys, halves[1]], refs["right"].at[slot], full)
            return ring.advance(position)

        position = lax.fori_loop(first, last, step, ring.start())
        ring.drain(position, refs["left_free"])
        ring.drain(position, refs["right_free"])

    def left(self, first_token, end, pair, first, last, refs):
        """Scores, softmax, and the left half of the result; also each query's log-sum."""
        ring = Ring(_STAGES)
        shape = _ROWS, _KEYS
        plgpu.barrier_wait(refs["q_full"])

        def spread(x, like):
            return lax.broadcast_in_dim(x, like.shape, (0,))

        def step(block, carry, *, masked: bool):
            slot, total, top, below = carry
            plgpu.barrier_wait(refs["left_full"].at[slot])
            if masked:
                self._clear(refs["left"].at[slot], block, end)

            def products(scores):
                plgpu.wgmma(scores, refs["q_left"], refs["left"].at[slot].T)
                plgpu.wgmma(scores, refs["q_pe"], refs["pe"].at[slot].T)
                plgpu.barrier_wait(refs["right_full"].at[slot])
                plgpu.wgmma(scores, refs["q_right"], refs["right"].at[slot].T)
                return scores[...]

            scores = pl.run_scoped(products, plgpu.ACC(shape, jnp.float32))
            plgpu.barrier_arrive(refs["scored"])
            if masked:
                iota = functools.partial(
                    plgpu.broadcasted_iota, jnp.int32, shape, layout=plgpu.Layout.WGMMA
                )
                token = lax.div(iota(0) + pair * _ROWS, jnp.int32(self.heads))
                seen = iota(1) + block * _KEYS <= token + first_token
                scores = jnp.where(seen, scores, _LEAST)
            new_top = jnp.maximum(top, scores.max(axis=1) * self.scale)
            factor = jnp.exp2(top - new_top)
            plgpu.barrier_wait(refs["weights_free"])
            # First, for the other to apply them while the weights are made.
            refs["factors"][...] = factor
            plgpu.barrier_arrive(refs["factors_full"])
            weights = jnp.exp2(scores * self.scale - spread(new_top, scores))
            rounded = weights.astype(jnp.bfloat16)
            refs["weights"][...] = rounded
            plgpu.commit_smem()
            plgpu.barrier_arrive(refs["weights_full"])
            below = below * factor + weights.sum(axis=1)
            total = total * spread(factor, total)
            total = self._add(total, rounded, refs["left"].at[slot])
            plgpu.barrier_arrive(refs["left_free"].at[slot])
            return ring.next_slot(slot), total, new_top, below

        def row(value):
            full = jnp.full((_ROWS,), value, jnp.float32)
            return plgpu.layout_cast(full, plgpu.Layout.WGMMA.reduce(1))

        total = plgpu.layout_cast(jnp.zeros((_ROWS, _HALF), jnp.float32), plgpu.Layout.WGMMA)
        carry = jnp.int32(0), total, row(_LEAST), row(0.0)
        # What every query sees whole needs no mask.
        whole = lax.clamp(first, lax.div(first_token + 1, _KEYS), last)
        carry = lax.fori_loop(first, whole, functools.partial(step, masked=False), carry)
        carry = lax.fori_loop(whole, last, functools.partial(step, masked=True), carry)
        _, total, top, below = carry
        # Of no keys at all, the sum is zero, and so is the total.
        below = jnp.maximum(below, 1e-30)
        inverse = 1.0 / below
        plgpu.barrier_wait(refs["weights_free"])
        refs["factors"][...] = inverse
        plgpu.barrier_arrive(refs["factors_full"])
        # Not earlier: the other must have seen the one before.
        plgpu.barrier_arrive(refs["scored"])
        return total * spread(inverse, total), top + jnp.log2(below)

    def right(self, end, first, last, refs):
        """The right half of the result, with the weights of the other warpgroup."""
        ring = Ring(_STAGES)

        # Before anything is given back: the scores after the first must not come unseen.
        @pl.when(first < last)
        def _():
            plgpu.barrier_wait(refs["scored"])

        plgpu.barrier_arrive(refs["weights_free"])

        def factors():
            plgpu.barrier_wait(refs["factors_full"])
            return compat.load(refs["factors"], plgpu.Layout.WGMMA.reduce(1))

        def scaled(total, factors):
            return total * lax.broadcast_in_dim(factors, total.shape, (0,))

        def step(block, carry):
            slot, total = carry
            values = refs["right"].at[slot]
            factor = factors()
            plgpu.barrier_wait(refs["weights_full"])
            weights = compat.load(refs["weights"], plgpu.Layout.WGMMA)
            plgpu.barrier_arrive(refs["weights_free"])
            total = scaled(total, factor)
            plgpu.barrier_wait(refs["right_full"].at[slot])
            self._clear(values, block, end)
            plgpu.barrier_wait(refs["scored"])
            total = self._add(total, weights, values)
            plgpu.barrier_arrive(refs["right_free"].at[slot])
            return ring.next_slot(slot), total

        total = plgpu.layout_cast(jnp.zeros((_ROWS, _HALF), jnp.float32), plgpu.Layout.WGMMA)
        _, total = lax.fori_loop(first, last, step, (jnp.int32(0), total))
        return scaled(total, factors())

    def _clear(self, values, block, end):
        """Zeros for slots that nobody sees: their weights are zero, but zero times NaN is not."""

        @pl.when((block + 1) * _KEYS > end)
        def _():
            for first in range(0, _HALF, 64):  # in parts, for there are few registers to spare
                columns = values.at[:, pl.ds(first, 64)]
                held = compat.load(columns, plgpu.Layout.WGMMA)
                row = plgpu.broadcasted_iota(jnp.int32, held.shape, 0, layout=plgpu.Layout.WGMMA)
                columns[...] = jnp.where(row + block * _KEYS < end, held, jnp.zeros_like(held))
            plgpu.commit_smem()

    def _add(self, total, weights, values):
        if self.interpret:  # the simulation knows neither operands nor sums in registers
            return total + jnp.dot(weights, values[...], preferred_element_type=jnp.float32)

        def add(accumulator):
            plgpu.wgmma(accumulator, weights, values)

        return pl.run_state(add)(plgpu.ACC.init(total))
