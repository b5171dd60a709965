"""Weight gradients of the grouped matmul on Hopper: ragged along the contracted axis.

For every group, x^T dy over its rows. The block of threads is that of
`pallas_kernels.hopper.grouped_matmul`: a producer that keeps a ring of shared-memory stages full,
two consumers with 64 rows each of a tile of 128 x 256 of one group's gradient, all of the group's
rows summed in the accumulators of the tensor cores. In BF16 these read either operand transposed,
so rows are loaded as they lie in memory.

A step takes 64 rows, starting at the last multiple of 8 before the group (Mosaic tiles memory by 8
rows). Where a group begins and ends, a step holds rows of others as well; those must not be
multiplied by zero, since they may be infinite or NaN. So the first and the last 64 rows of every
group are copied with zeros in place of what is not its own, and the producer loads these steps from
the copies: two times 64 rows per group, and nothing in the loop.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper import compat
from pallas_kernels.hopper.ring import Ring

_WARPGROUPS = 2
_ROWS = 64  # of a consumer's part of a tile
_TILE = (_WARPGROUPS * _ROWS, 256)
_STEP = 64  # rows of x and dy in a stage
_ALIGNMENT = 8
_SWIZZLE = 128  # bytes
_STAGES = 4
_STORE_SLOTS = 2
_CHUNK = 8  # tiles of K that share the columns of dy before the next columns' turn
_REGISTERS_PRODUCER, _REGISTERS_CONSUMER = 40, 232


@functools.partial(jax.jit, static_argnames=("out_dtype", "interpret"))
def grouped_wgrad(
    x_MK: Float[Array, "M K"],
    dy_MN: Float[Array, "M N"],
    group_sizes: Int[Array, "G"],
    *,
    out_dtype=jnp.float32,
    interpret: bool = False,
) -> Float[Array, "G K N"]:
    """For every group, x^T dy over its rows, with FP32 sums.

    Args:
        x_MK: rows in group order, bfloat16.
        dy_MN: the gradient of the products of these rows, bfloat16.
        group_sizes: rows of each group; a group without rows gets zeros. Rows past their sum are
            not looked at.
        out_dtype: float32 or bfloat16.
        interpret: simulate on the CPU.

    Raises:
        ValueError: unless K and N are multiples of 64.
    """
    (m, k), n = x_MK.shape, dy_MN.shape[1]
    if k % 64 or n % 64:
        raise ValueError(f"K and N must be multiples of 64, not {k} and {n}")
    # A result of a single chunk of columns would be overwritten by those beyond its edge.
    n_pad = max(n, 2 * _SWIZZLE // 2)
    m_pad = max(pl.cdiv(m, _ALIGNMENT) * _ALIGNMENT, _STEP)
    x_MK = jnp.pad(x_MK, ((0, m_pad - m), (0, 0)))
    dy_MN = jnp.pad(dy_MN, ((0, m_pad - m), (0, n_pad - n)))
    first_G, steps_G = row_steps(group_sizes)
    edges = (_edges(rows, group_sizes, first_G, steps_G) for rows in (x_MK, dy_MN))
    kernel = _Kernel(len(group_sizes), k, n_pad, jnp.dtype(out_dtype))
    out = kernel.call(interpret)(first_G, steps_G, x_MK, dy_MN, *edges)
    return out[:, :, :n]


def row_steps(group_sizes: Int[Array, "G"]) -> tuple[Int[Array, "G"], Int[Array, "G"]]:
    """Where each group's first step starts, and the number of its steps of 64 rows."""
    sizes_G = group_sizes.astype(jnp.int32)
    ends_G = jnp.cumsum(sizes_G)
    first_G = (ends_G - sizes_G) // _ALIGNMENT * _ALIGNMENT
    return first_G, jnp.where(sizes_G > 0, -((first_G - ends_G) // _STEP), 0)


def _edges(rows_MX, group_sizes, first_G, steps_G) -> jax.Array:
    """The rows of each group's first and last step, zeros where they are not its own."""
    ends_G11 = jnp.cumsum(group_sizes)[:, None, None]
    starts_G11 = ends_G11 - group_sizes[:, None, None]
    last_G = first_G + jnp.maximum(steps_G - 1, 0) * _STEP
    index_G2S = jnp.stack([first_G, last_G], axis=1)[:, :, None] + jnp.arange(_STEP)
    own_G2S = (index_G2S >= starts_G11) & (index_G2S < ends_G11)
    rows = jnp.take(rows_MX, index_G2S.reshape(-1), axis=0, mode="clip")
    return jnp.where(own_G2S.reshape(-1, 1), rows, 0)


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """One compiled shape; K and N are those of the result."""

    groups: int
    k: int
    n: int
    out_dtype: jnp.dtype

    @property
    def tiles(self) -> tuple[int, int]:
        return pl.cdiv(self.k, _TILE[0]), pl.cdiv(self.n, _TILE[1])

    @property
    def store_columns(self) -> int:
        return _SWIZZLE // self.out_dtype.itemsize

    def call(self, interpret: bool):
        operand = (plgpu.TilingTransform((8, _SWIZZLE // 2)), plgpu.SwizzleTransform(_SWIZZLE))
        result = (
            plgpu.TilingTransform((8, self.store_columns)),
            plgpu.SwizzleTransform(_SWIZZLE),
        )
        scratch = dict(
            a_smem=plgpu.SMEM((_STAGES, _STEP, _TILE[0]), jnp.bfloat16, transforms=operand),
            b_smem=plgpu.SMEM((_STAGES, 2, _STEP, _TILE[1] // 2), jnp.bfloat16, transforms=operand),
            out_smem=plgpu.SMEM(
                (_WARPGROUPS, _STORE_SLOTS, _ROWS, self.store_columns),
                self.out_dtype,
                transforms=result,
            ),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
            full_second=plgpu.Barrier(num_barriers=_STAGES),
            empty=plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=_STAGES),
        )

        def body(first, steps, x, dy, x_edges, dy_edges, out, *refs):
            refs = dict(zip(scratch, refs, strict=True))
            warpgroup = lax.axis_index("warpgroup")
            k_tiles, n_tiles = self.tiles
            tiles = (self.groups * k_tiles * n_tiles,)

            def tile(info):
                """Group, tile of K, tile of N and number of steps."""
                group = lax.div(info.index[0], jnp.int32(k_tiles * n_tiles))
                within = lax.rem(info.index[0], jnp.int32(k_tiles * n_tiles))
                k_tile, n_tile = plgpu.planar_snake(within, (k_tiles, n_tiles), 0, _CHUNK)
                return group, k_tile, n_tile, steps[group]

            whole, edges = (x, dy), (x_edges, dy_edges)
            pl.when(warpgroup == _WARPGROUPS)(
                functools.partial(self.produce, tiles, tile, first, whole, edges, refs)
            )
            pl.when(warpgroup < _WARPGROUPS)(
                functools.partial(self.consume, tiles, tile, warpgroup, out, refs)
            )

        return compat.kernel(
            body,
            interpret=interpret,
            out_type=jax.ShapeDtypeStruct((self.groups, self.k, self.n), self.out_dtype),
            grid=(1 if interpret else compat.multiprocessors(),),
            grid_names=("sm",),
            num_threads=_WARPGROUPS + 1,
            thread_name="warpgroup",
            scratch_types=list(scratch.values()),
        )

    def produce(self, tiles, tile, first, whole, edges, refs):
        """Keep the ring full; dy comes in two halves, each with a barrier."""
        plgpu.set_max_registers(_REGISTERS_PRODUCER, action="decrease")
        ring, empty = Ring(_STAGES), refs["empty"]

        @plgpu.nd_loop(tiles, collective_axes="sm", init_carry=ring.start())
        def per_tile(info, carry):
            group, k_tile, n_tile, steps = tile(info)
            first_row = first[group]
            ks = pl.ds(k_tile * _TILE[0], _TILE[0])

            def step(i, position):
                ring.acquire(position, empty)
                slot = position.slot
                at_edge = (i == 0) | (i == steps - 1)

                def load(sources, row):
                    x, dy = sources
                    rows = pl.ds(pl.multiple_of(row, _ALIGNMENT), _STEP)
                    full = refs["full"].at[slot]
                    plgpu.copy_gmem_to_smem(x.at[rows, ks], refs["a_smem"].at[slot], full)
                    for half in range(2):
                        start = n_tile * _TILE[1] + half * (_TILE[1] // 2)
                        columns = pl.ds(start, _TILE[1] // 2)
                        barrier = full if half == 0 else refs["full_second"].at[slot]
                        target = refs["b_smem"].at[slot, half]
                        plgpu.copy_gmem_to_smem(dy.at[rows, columns], target, barrier)

                @pl.when(at_edge)
                def _():
                    second = lax.select(i > 0, jnp.int32(1), jnp.int32(0))
                    load(edges, (2 * group + second) * _STEP)

                @pl.when(jnp.logical_not(at_edge))
                def _():
                    load(whole, first_row + i * _STEP)

                return ring.advance(position)

            return lax.fori_loop(0, steps, step, carry)

        ring.drain(per_tile, empty)

    def consume(self, tiles, tile, warpgroup, out, refs):
        """Multiply and store one tile after the other."""
        plgpu.set_max_registers(_REGISTERS_CONSUMER, action="increase")

        @plgpu.nd_loop(tiles, collective_axes="sm", init_carry=jnp.int32(0))
        def per_tile(info, carry):
            group, k_tile, n_tile, steps = tile(info)
            slot, totals = self.sum(carry, steps, warpgroup, refs)
            self.store(group, k_tile, n_tile, warpgroup, totals, out, refs["out_smem"])
            return slot

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def sum(self, slot, steps, warpgroup, refs):
        """All rows of the group, one product always in flight."""
        own = pl.ds(warpgroup * _ROWS, _ROWS)

        def mainloop(first, second):
            def step(i, carry):
                slot, previous = carry
                for half, accumulator in enumerate((first, second)):
                    plgpu.barrier_wait(refs["full" if half == 0 else "full_second"].at[slot])
                    a, b = refs["a_smem"].at[slot, :, own], refs["b_smem"].at[slot, half]
                    plgpu.wgmma(accumulator, a.T, b)
                # Two products per stage: those of the stage before are finished.
                plgpu.wgmma_wait(2)

                @pl.when(i > 0)
                def _():
                    plgpu.barrier_arrive(refs["empty"].at[previous])

                return Ring(_STAGES).next_slot(slot), slot

            carry = lax.fori_loop(0, steps, step, (slot, slot))
            totals = first[...], second[...]

            @pl.when(steps > 0)
            def _():
                plgpu.barrier_arrive(refs["empty"].at[carry[1]])

            return carry[0], totals

        accumulator = plgpu.ACC((_ROWS, _TILE[1] // 2), jnp.float32)
        return pl.run_scoped(mainloop, accumulator, accumulator)

    def store(self, group, k_tile, n_tile, warpgroup, totals, out, out_smem):
        """Convert the totals and hand them to asynchronous stores, a chunk of columns each."""
        width, half_columns = self.store_columns, _TILE[1] // 2
        rows = pl.ds(k_tile * _TILE[0] + warpgroup * _ROWS, _ROWS)
        chunks = [(half, c) for half in range(2) for c in range(half_columns // width)]
        for index, (half, chunk) in enumerate(chunks):
            slot = index % _STORE_SLOTS
            plgpu.wait_smem_to_gmem(_STORE_SLOTS - 1, wait_read_only=True)
            values = totals[half][:, chunk * width : (chunk + 1) * width]
            out_smem[warpgroup, slot] = values.astype(self.out_dtype)
            plgpu.commit_smem()
            column = n_tile * _TILE[1] + half * half_columns + chunk * width
            plgpu.copy_smem_to_gmem(
                out_smem.at[warpgroup, slot], out.at[group, rows, pl.ds(column, width)]
            )
