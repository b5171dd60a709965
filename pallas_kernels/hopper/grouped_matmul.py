"""Grouped (per-expert) matmul on Hopper: ragged rows, one weight matrix per group.

The block of threads is that of `pallas_kernels.hopper.matmul`: a producer warpgroup that keeps a
ring of shared-memory stages full, and two consumers with 64 rows each, which multiply twice per
stage. Either the tile is wide, 128 rows by 256 columns, in two halves of the columns: short,
because a group ends inside a tile. Or it is tall, 256 rows by 128 columns, in two waves of rows: a
shorter loop in FP8, because the compiler then clears no accumulator (docs/performance.md), and
worth the rows that are wasted where groups have many.

No row is moved or padded. A tile starts at the last multiple of 8 rows before its group (Mosaic
tiles memory by 8 rows), computes a few rows of a neighbouring group where it must, and stores only
its own. The list of tiles is made from the group sizes on the device, so work is proportional to
the rows that are there and nothing is recompiled when they move between groups. Rows past the last
group have tiles too, which load nothing and store zeros.
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
from pallas_kernels.reference import TILE, Quantized

_WARPGROUPS = 2
_ROWS = 64
_PART = (_WARPGROUPS * _ROWS, 128)  # of a tile: what is multiplied at a time
_TALL_FROM = 2048  # rows per group, on average, from which FP8 tiles are tall
_ALIGNMENT = 8  # rows
_STORE_COLUMNS = 64  # 128 bytes of bfloat16: the alignment that TMA asks of a row stored by itself
_STEP_BYTES = 128  # of K in a stage: 64 bfloat16 or 128 E4M3
_STAGES = 4
_CHUNK = 16  # wide tiles of M that share the columns of a weight before the next columns' turn
_REGISTERS_PRODUCER, _REGISTERS_CONSUMER = 40, 232


def row_tiles(group_sizes: Int[Array, "G"], m: int, rows: int = _PART[0]) -> tuple[jax.Array, ...]:
    """The tiles of M that the groups need, and then those of the rows past the last group.

    Args:
        group_sizes: rows of each group.
        m: rows of all groups together and past the last.
        rows: rows of a tile.

    Returns:
        Five int32 arrays: the number of tiles [1], and for each tile its group (G past the last
        one), its first row, and the range of rows that it may store. Entries past the number of
        tiles are not used.
    """
    sizes = group_sizes.astype(jnp.int32)
    sizes = jnp.append(sizes, m - jnp.sum(sizes))
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    first = starts // _ALIGNMENT * _ALIGNMENT
    tiles = jnp.where(sizes > 0, -((first - ends) // rows), 0)
    tile_ends = jnp.cumsum(tiles)
    most = (m + (_ALIGNMENT - 1) * len(sizes)) // rows + len(sizes)
    index = jnp.arange(most, dtype=jnp.int32)
    group = jnp.sum(index[:, None] >= tile_ends, axis=1, dtype=jnp.int32)
    group = jnp.minimum(group, len(sizes) - 1)
    row = first[group] + (index - (tile_ends - tiles)[group]) * rows
    low = jnp.maximum(row, starts[group])
    high = jnp.minimum(row + rows, ends[group])
    return tile_ends[-1:], group, row, low, high


@functools.partial(jax.jit, static_argnames=("transpose_w", "interpret"))
def grouped_matmul(
    x_MK: Float[Array, "M K"],
    w: Float[Array, "G _ _"],
    group_sizes: Int[Array, "G"],
    *,
    transpose_w: bool = False,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """Each row times its group's matrix, or its transpose, in BF16 with FP32 sums.

    Args:
        x_MK: rows in group order, bfloat16.
        w: [G, K, N], a matrix per group, bfloat16; [G, N, K] with ``transpose_w``, as the input
            gradient needs it.
        group_sizes: rows of each group, 0 allowed; rows past their sum come out as zeros.
        transpose_w: whether the last axis of ``w`` is the contracted one.
        interpret: simulate on the CPU.

    Raises:
        ValueError: unless K and N are multiples of 64.
    """
    (m, k), n = x_MK.shape, w.shape[1 if transpose_w else 2]
    if k % 64 or n % 64:
        raise ValueError(f"K and N must be multiples of 64, not {k} and {n}")
    kernel = _Kernel(_aligned(m), _wide(n), k, jnp.dtype(x_MK.dtype), transpose_w, False, interpret)
    x_MK = jnp.pad(x_MK, ((0, kernel.m - m), (0, 0)))
    columns = (0, kernel.n - n)
    w = jnp.pad(w, ((0, 0), columns, (0, 0)) if transpose_w else ((0, 0), (0, 0), columns))
    tiles = row_tiles(group_sizes, kernel.m, kernel.tile[0])
    return kernel.call()(*tiles, x_MK, w)[:m, :n]


@functools.partial(jax.jit, static_argnames=("tall", "interpret"))
def fp8_grouped_matmul(
    a: Quantized,
    b: Quantized,
    group_sizes: Int[Array, "G"],
    *,
    tall: bool | None = None,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """The grouped form of the block-scaled FP8 matmul, with a BF16 result.

    Args:
        a: [M, K] values with 1x128 tile scales, rows in group order.
        b: [G, N, K] values with 128x128 block scales, or one of a stack, [L, G, N, K].
        group_sizes: rows of each group, 0 allowed; rows past their sum come out as zeros.
        tall: whether tiles are tall; by default, where groups have many rows on average.
        interpret: simulate on the CPU.

    Raises:
        ValueError: unless K is a multiple of 128 and N of 64.
    """
    (m, k), (groups, n, _) = a.values.shape, b.shape
    if k % TILE or n % 64:
        raise ValueError(f"K must be a multiple of 128 and N of 64, not {k} and {n}")
    if tall is None:
        tall = m >= _TALL_FROM * groups
    kernel = _Kernel(_aligned(m), _wide(n), k, jnp.dtype(a.values.dtype), True, tall, interpret)
    a_values = jnp.pad(a.values, ((0, kernel.m - m), (0, 0)))
    a_scale = jnp.pad(a.scale, ((0, 0), (0, kernel.m - m)))
    count, group, *rows = row_tiles(group_sizes, kernel.m, kernel.tile[0])
    if kernel.n != n:
        b = b.cut_out()  # and not all of its stack padded
    # The groups of all layers as one list, in which this layer's begin somewhere.
    b_values, b_scale = (x.reshape(-1, *x.shape[-2:]) for x in b[:2])
    if b.layer is not None:
        group = jnp.where(group < groups, b.layer * groups + group, len(b_values))
    b_values = jnp.pad(b_values, ((0, 0), (0, kernel.n - n), (0, 0)))
    return kernel.call()(count, group, *rows, a_values, b_values, a_scale, b_scale)[:m, :n]


def _aligned(rows: int) -> int:
    return pl.cdiv(rows, _ALIGNMENT) * _ALIGNMENT


def _wide(columns: int) -> int:
    """At least two stores: Mosaic would put those beyond a single one on top of it."""
    return max(columns, 2 * _STORE_COLUMNS)


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """One compiled shape."""

    m: int
    n: int
    k: int
    dtype: jnp.dtype
    transpose_w: bool
    tall: bool
    interpret: bool

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of a tile: two parts, below each other or side by side."""
        return (2 * _PART[0], _PART[1]) if self.tall else (_PART[0], 2 * _PART[1])

    @property
    def fp8(self) -> bool:
        return self.dtype.itemsize == 1

    @property
    def staged_columns(self) -> int:
        """Columns of a whole part on its way out; the scales of a tall tile leave no more room."""
        return _STORE_COLUMNS // 2 if self.tall else _STORE_COLUMNS

    @property
    def k_tile(self) -> int:
        return _STEP_BYTES // self.dtype.itemsize

    @property
    def k_steps(self) -> int:
        return self.k // self.k_tile

    @property
    def n_tiles(self) -> int:
        return pl.cdiv(self.n, self.tile[1])

    def call(self):
        operand = (plgpu.TilingTransform((8, self.k_tile)), plgpu.SwizzleTransform(128))
        result = (
            plgpu.TilingTransform((8, self.staged_columns)),
            plgpu.SwizzleTransform(2 * self.staged_columns),
        )
        columns = (_PART[1], self.k_tile) if self.transpose_w else (self.k_tile, _PART[1])
        a_parts, b_parts = (2, 1) if self.tall else (1, 2)
        edge = (_WARPGROUPS, _ROWS, _STORE_COLUMNS)
        staged = (_WARPGROUPS, _ROWS, self.staged_columns)
        scratch = dict(
            a_smem=plgpu.SMEM(
                (_STAGES, a_parts, _PART[0], self.k_tile), self.dtype, transforms=operand
            ),
            b_smem=plgpu.SMEM((_STAGES, b_parts, *columns), self.dtype, transforms=operand),
            a_scale_smem=plgpu.SMEM((_STAGES, self.tile[0]), jnp.float32) if self.fp8 else None,
            out_smem=plgpu.SMEM(staged, jnp.bfloat16, transforms=result),
            # Rows are stored from here one by one, which a swizzle does not allow.
            edge_smem=plgpu.SMEM(edge, jnp.bfloat16),
            full=plgpu.Barrier(num_arrivals=2 + self.fp8, num_barriers=_STAGES),
            full_second=plgpu.Barrier(num_barriers=_STAGES),
            empty=plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=_STAGES),
        )
        names = [name for name, spec in scratch.items() if spec is not None]

        def body(count, group, row, low, high, a, b, *refs):
            scales, (out, *refs) = (refs[:2], refs[2:]) if self.fp8 else ((None, None), refs)
            refs = dict.fromkeys(scratch) | dict(zip(names, refs, strict=True))
            warpgroup = lax.axis_index("warpgroup")

            def tile(info):
                """Entries of the list of tiles, the column, and how much of K is to be summed."""
                chunk = _CHUNK * _PART[0] // self.tile[0]
                t, n_tile = plgpu.planar_snake(info.index[0], (count[0], self.n_tiles), 0, chunk)
                k_steps = lax.select(group[t] < b.shape[0], jnp.int32(self.k_steps), jnp.int32(0))
                first = pl.multiple_of(row[t], _ALIGNMENT)
                return group[t], first, low[t], high[t], n_tile, k_steps

            steps = (count[0] * self.n_tiles,)
            pl.when(warpgroup == _WARPGROUPS)(
                functools.partial(self.produce, steps, tile, a, b, scales[0], refs)
            )
            pl.when(warpgroup < _WARPGROUPS)(
                functools.partial(self.consume, steps, tile, warpgroup, scales[1], out, refs)
            )

        return compat.kernel(
            body,
            interpret=self.interpret,
            out_type=jax.ShapeDtypeStruct((self.m, self.n), jnp.bfloat16),
            grid=(1 if self.interpret else compat.multiprocessors(),),
            grid_names=("sm",),
            num_threads=_WARPGROUPS + 1,
            thread_name="warpgroup",
            scratch_types=[scratch[name] for name in names],
        )

    def produce(self, steps, tile, a, b, a_scale, refs):
        """Keep the ring full; what the second part needs has a barrier of its own."""
        plgpu.set_max_registers(_REGISTERS_PRODUCER, action="decrease")
        load = plgpu.copy_gmem_to_smem

        ring, empty = Ring(_STAGES), refs["empty"]

        @plgpu.nd_loop(steps, collective_axes="sm", init_carry=ring.start())
        def per_tile(info, carry):
            group, row, _, _, n_tile, k_steps = tile(info)

            def step(k, position):
                ring.acquire(position, empty)
                slot = position.slot
                ks = pl.ds(k * self.k_tile, self.k_tile)
                full, second = refs["full"].at[slot], refs["full_second"].at[slot]

                def rows(part):
                    source = a.at[pl.ds(row + part * _PART[0], _PART[0]), ks]
                    load(source, refs["a_smem"].at[slot, part], second if part else full)

                def columns(part):
                    wanted = pl.ds(n_tile * self.tile[1] + part * _PART[1], _PART[1])
                    source = (
                        b.at[group, wanted, ks] if self.transpose_w else b.at[group, ks, wanted]
                    )
                    load(source, refs["b_smem"].at[slot, part], second if part else full)

                rows(0)
                if self.fp8:
                    scales = a_scale.at[k, pl.ds(row, self.tile[0])]
                    load(scales, refs["a_scale_smem"].at[slot], full)
                columns(0)
                rows(1) if self.tall else columns(1)
                return ring.advance(position)

            return lax.fori_loop(0, k_steps, step, carry)

        ring.drain(per_tile, empty)

    def consume(self, steps, tile, warpgroup, b_scale, out, refs):
        """Multiply and store one tile after the other."""
        plgpu.set_max_registers(_REGISTERS_CONSUMER, action="increase")
        mainloop = self.sum_fp8 if self.fp8 else self.sum_bf16

        @plgpu.nd_loop(steps, collective_axes="sm", init_carry=jnp.int32(0))
        def per_tile(info, carry):
            group, row, low, high, n_tile, k_steps = tile(info)
            slot, totals = mainloop(carry, group, n_tile, k_steps, warpgroup, b_scale, refs)
            first = pl.multiple_of(row + warpgroup * _ROWS, _ALIGNMENT)
            self.store(warpgroup, first, low, high, n_tile, totals, out, refs)
            return slot

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def operands(self, slot, part, warpgroup, refs):
        a_part, b_part = (part, 0) if self.tall else (0, part)
        a = refs["a_smem"].at[slot, a_part, pl.ds(warpgroup * _ROWS, _ROWS)]
        b = refs["b_smem"].at[slot, b_part]
        return a, b.T if self.transpose_w else b

    def sum_bf16(self, slot, group, n_tile, k_steps, warpgroup, b_scale, refs):
        """All of K in the accumulators of the tensor cores, one product always in flight."""
        del group, n_tile, b_scale
        shape = (_ROWS, _PART[1])

        def mainloop(first, second):
            def step(k, carry):
                slot, previous = carry
                for part, accumulator in enumerate((first, second)):
                    plgpu.barrier_wait(refs["full" if part == 0 else "full_second"].at[slot])
                    plgpu.wgmma(accumulator, *self.operands(slot, part, warpgroup, refs))
                # Two products per stage: those of the stage before are finished.
                plgpu.wgmma_wait(2)

                @pl.when(k > 0)
                def _():
                    plgpu.barrier_arrive(refs["empty"].at[previous])

                return Ring(_STAGES).next_slot(slot), slot

            carry = lax.fori_loop(0, k_steps, step, (slot, slot))
            totals = first[...], second[...]

            @pl.when(k_steps > 0)
            def _():
                plgpu.barrier_arrive(refs["empty"].at[carry[1]])

            return carry[0], totals

        accumulator = plgpu.ACC(shape, jnp.float32)
        return pl.run_scoped(mainloop, accumulator, accumulator)

    def sum_fp8(self, slot, group, n_tile, k_steps, warpgroup, b_scale, refs):
        """Every 128 of K promoted into FP32 registers, as in `pallas_kernels.hopper.matmul`."""
        shape = (_ROWS, _PART[1])
        group = lax.min(group, jnp.int32(b_scale.shape[0] - 1))
        blocks = self.tile[1] // _PART[1]

        def block_scales(k):
            """Of each of the tile's blocks of 128 columns; those past the edge do not matter."""
            k = lax.min(k, jnp.int32(self.k_steps - 1))
            last = jnp.int32(b_scale.shape[1] - 1)
            return tuple(
                b_scale[group, lax.min(blocks * n_tile + block, last), k] for block in range(blocks)
            )

        def step(k, carry):
            slot, scales_b, totals = carry
            next_scales_b = block_scales(k + 1)
            new_totals = []
            scale = None
            for part, total in enumerate(totals):
                plgpu.barrier_wait(refs["full" if part == 0 else "full_second"].at[slot])
                if part == 0 or self.tall:
                    first = (part * _PART[0] if self.tall else 0) + warpgroup * _ROWS
                    scale = refs["a_scale_smem"][slot, pl.ds(first, _ROWS)]
                scale_b = scales_b[0 if self.tall else part]
                scale_part = lax.broadcast_in_dim(scale * scale_b, shape, (0,))

                def multiply(accumulator, part=part):
                    plgpu.wgmma(accumulator, *self.operands(slot, part, warpgroup, refs))
                    return accumulator[...]

                partial = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
                if part == 1:
                    plgpu.barrier_arrive(refs["empty"].at[slot])
                    if not self.interpret:
                        compat.use_zero()
                new_totals.append(total + partial * scale_part)
            return Ring(_STAGES).next_slot(slot), next_scales_b, tuple(new_totals)

        zeros = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
        start = slot, block_scales(jnp.int32(0)), zeros
        slot, _, totals = lax.fori_loop(0, k_steps, step, start)
        return slot, totals

    def store(self, warpgroup, first, low, high, n_tile, totals, out, refs):
        """Store what lies in the rows [low, high), of each part the 64 from its ``first`` on."""
        for part, total in enumerate(totals):
            row, column = (part * _PART[0], 0) if self.tall else (0, part * _PART[1])
            own = first + row
            whole = (low <= own) & (own + _ROWS <= high)
            for chunk in range(_PART[1] // _STORE_COLUMNS):
                start = chunk * _STORE_COLUMNS
                values = total[:, start : start + _STORE_COLUMNS].astype(jnp.bfloat16)
                columns = pl.ds(n_tile * self.tile[1] + column + start, _STORE_COLUMNS)

                @pl.when(whole)
                def _(values=values, columns=columns, own=own):
                    self.store_whole(warpgroup, own, columns, values, out, refs)

                @pl.when(jnp.logical_not(whole))
                def _(values=values, columns=columns, own=own):
                    self.store_rows(warpgroup, own, low, high, columns, values, out, refs)

    def store_whole(self, warpgroup, own, columns, values, out, refs):
        """Store 64 rows, of which the first is ``own``."""
        staged, width = refs["out_smem"].at[warpgroup], self.staged_columns
        for start in range(0, _STORE_COLUMNS, width):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            staged[...] = values[:, start : start + width]
            plgpu.commit_smem()
            target = out.at[pl.ds(own, _ROWS), pl.ds(columns.start + start, width)]
            plgpu.copy_smem_to_gmem(staged, target)

    def store_rows(self, warpgroup, own, low, high, columns, values, out, refs):
        """Store those of 64 rows, of which the first is ``own``, that lie in [low, high)."""
        staged = refs["edge_smem"].at[warpgroup]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staged[...] = values
        plgpu.commit_smem()
        # The size of a copy is fixed, so any number of rows is a sum of powers of two.
        start = lax.clamp(jnp.int32(0), low - own, jnp.int32(_ROWS))
        end = lax.clamp(jnp.int32(0), high - own, jnp.int32(_ROWS))
        rows = lax.max(end - start, jnp.int32(0))
        for bit in (32, 16, 8, 4, 2, 1):

            @pl.when(rows & bit != 0)
            def _(bit=bit, start=start):
                source = staged.at[pl.ds(start, bit)]
                plgpu.copy_smem_to_gmem(source, out.at[pl.ds(own + start, bit), columns])

            start = start + (rows & bit)
