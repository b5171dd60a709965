"""Grouped (per-expert) matmul on Hopper: ragged rows, one weight matrix per group.

The block of threads is that of `pallas_kernels.hopper.matmul`: a producer warpgroup that keeps a
ring of shared-memory stages full, and consumers with 64 rows each. Two of them multiply twice per
stage. Either their tile is wide, 128 rows by 256 columns, in two halves of the columns: short,
because a group ends inside a tile. Or it is tall, 256 rows by 128 columns, in two waves of rows: a
shorter loop in FP8, because the compiler then clears no accumulator (docs/performance.md), and
worth the rows that are wasted where groups have many. Three of them multiply once per stage, 192
rows by 128 columns: two promote while the third multiplies. There a cluster of two blocks loads the
rows once for both, for columns side by side.

No row is moved or padded. A tile starts at the last multiple of 8 rows before its group (Mosaic
tiles memory by 8 rows), computes a few rows of a neighbouring group where it must, and stores only
its own. The list of tiles is made from the group sizes on the device, so work is proportional to
the rows that are there and nothing is recompiled when they move between groups. Rows past the last
group have tiles too, which load nothing and store zeros.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper import compat
from pallas_kernels.hopper.ring import REGISTERS, Ring, empty_barriers, in_cluster
from pallas_kernels.reference import TILE, Quantized

_ROWS = 64  # of a consumer, in each part of a tile
_COLUMNS = 128  # of a part, which is what all consumers multiply at a time
_MANY_ROWS = 2048  # per group, on average, from which FP8 tiles are not wide
_LONG_K = 4096  # beyond which they are tall then, and not by three consumers
_ALIGNMENT = 8  # rows
_STORE_COLUMNS = 64  # 128 bytes of bfloat16: the alignment that TMA asks of a row stored by itself
_STEP_BYTES = 128  # of K in a stage: 64 bfloat16 or 128 E4M3
_STAGES = 4
_CHUNK_ROWS = 2048  # whose tiles share the columns of a weight before the next columns' turn


class Form(NamedTuple):
    """How a tile is divided: consumers with 64 rows each, in parts below or beside one another."""

    warpgroups: int
    row_parts: int
    column_parts: int
    cluster: int = 1  # blocks that share rows, for tiles side by side

    @property
    def part_rows(self) -> int:
        """Rows of a part, of all consumers together."""
        return self.warpgroups * _ROWS

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.row_parts * self.part_rows, self.column_parts * _COLUMNS

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """Which of the rows' and which of the columns' parts each part is."""
        return tuple((i, j) for i in range(self.row_parts) for j in range(self.column_parts))


WIDE, TALL, THREE = Form(2, 1, 2), Form(2, 2, 1), Form(3, 1, 1, cluster=2)


def row_tiles(group_sizes: Int[Array, "G"], m: int, rows: int) -> tuple[jax.Array, ...]:
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
    kernel = _Kernel(_aligned(m), _wide(n), k, jnp.dtype(x_MK.dtype), transpose_w, WIDE, interpret)
    x_MK = jnp.pad(x_MK, ((0, kernel.m - m), (0, 0)))
    columns = (0, kernel.n - n)
    w = jnp.pad(w, ((0, 0), columns, (0, 0)) if transpose_w else ((0, 0), (0, 0), columns))
    tiles = row_tiles(group_sizes, kernel.m, WIDE.tile[0])
    return kernel.call()(*tiles, x_MK, w)[:m, :n]


@functools.partial(jax.jit, static_argnames=("form", "interpret"))
def fp8_grouped_matmul(
    a: Quantized,
    b: Quantized,
    group_sizes: Int[Array, "G"],
    *,
    form: Form | None = None,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """The grouped form of the block-scaled FP8 matmul, with a BF16 result.

    Args:
        a: [M, K] values with 1x128 tile scales, rows in group order.
        b: [G, N, K] values with 128x128 block scales, or one of a stack, [L, G, N, K].
        group_sizes: rows of each group, 0 allowed; rows past their sum come out as zeros.
        form: of a tile: `WIDE`, `TALL` or `THREE`; default: see `choose_form`.
        interpret: simulate on the CPU.

    Raises:
        ValueError: unless K is a multiple of 128 and N of 64.
    """
    (m, k), (groups, n, _) = a.values.shape, b.shape
    if k % TILE or n % 64:
        raise ValueError(f"K must be a multiple of 128 and N of 64, not {k} and {n}")
    form = form or choose_form(m, k, groups)
    kernel = _Kernel(_aligned(m), _wide(n), k, jnp.dtype(a.values.dtype), True, form, interpret)
    a_values = jnp.pad(a.values, ((0, kernel.m - m), (0, 0)))
    a_scale = jnp.pad(a.scale, ((0, 0), (0, kernel.m - m)))
    count, group, *rows = row_tiles(group_sizes, kernel.m, form.tile[0])
    if kernel.n != n:
        b = b.cut_out()  # and not all of its stack padded
    # The groups of all layers as one list, in which this layer's begin somewhere.
    b_values, b_scale = (x.reshape(-1, *x.shape[-2:]) for x in b[:2])
    if b.layer is not None:
        group = jnp.where(group < groups, b.layer * groups + group, len(b_values))
    b_values = jnp.pad(b_values, ((0, 0), (0, kernel.n - n), (0, 0)))
    return kernel.call()(count, group, *rows, a_values, b_values, a_scale, b_scale)[:m, :n]


def choose_form(m: int, k: int, groups: int) -> Form:
    """A tile's form in FP8 for ``m`` rows in so many groups, after what was measured on an H100."""
    if m < _MANY_ROWS * groups:
        return WIDE
    return TALL if k > _LONG_K else THREE


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
    form: Form
    interpret: bool

    @property
    def fp8(self) -> bool:
        return self.dtype.itemsize == 1

    @property
    def staged_columns(self) -> int:
        """Columns of a whole part on its way out; the scales of a tall tile leave no more room."""
        return _STORE_COLUMNS // 2 if self.form == TALL else _STORE_COLUMNS

    @property
    def k_tile(self) -> int:
        return _STEP_BYTES // self.dtype.itemsize

    @property
    def k_steps(self) -> int:
        return self.k // self.k_tile

    @property
    def cluster(self) -> int:
        """Blocks that share rows: not where one would have no tile of its own in the end."""
        return 1 if self.n % (self.form.cluster * self.form.tile[1]) else self.form.cluster

    @property
    def n_tiles(self) -> int:
        """Tiles side by side, counted in clusters."""
        return pl.cdiv(self.n, self.cluster * self.form.tile[1])

    def call(self):
        operand = (plgpu.TilingTransform((8, self.k_tile)), plgpu.SwizzleTransform(128))
        result = (
            plgpu.TilingTransform((8, self.staged_columns)),
            plgpu.SwizzleTransform(2 * self.staged_columns),
        )
        columns = (_COLUMNS, self.k_tile) if self.transpose_w else (self.k_tile, _COLUMNS)
        form, (tile_rows, _) = self.form, self.form.tile
        rows = (form.row_parts, form.part_rows, self.k_tile)
        edge = (form.warpgroups, _ROWS, _STORE_COLUMNS)
        staged = (form.warpgroups, _ROWS, self.staged_columns)
        scratch = dict(
            a_smem=plgpu.SMEM((_STAGES, *rows), self.dtype, transforms=operand),
            b_smem=plgpu.SMEM(
                (_STAGES, form.column_parts, *columns), self.dtype, transforms=operand
            ),
            a_scale_smem=plgpu.SMEM((_STAGES, tile_rows), jnp.float32) if self.fp8 else None,
            out_smem=plgpu.SMEM(staged, jnp.bfloat16, transforms=result),
            # Rows are stored from here one by one, which a swizzle does not allow.
            edge_smem=plgpu.SMEM(edge, jnp.bfloat16),
            full=plgpu.Barrier(num_arrivals=2 + self.fp8, num_barriers=_STAGES),
            full_second=plgpu.Barrier(num_barriers=_STAGES) if len(form.parts) == 2 else None,
            empty=empty_barriers(form.warpgroups, _STAGES, self.cluster),
        )
        names = [name for name, spec in scratch.items() if spec is not None]

        def body(count, group, row, low, high, a, b, *refs):
            scales, (out, *refs) = (refs[:2], refs[2:]) if self.fp8 else ((None, None), refs)
            refs = dict.fromkeys(scratch) | dict(zip(names, refs, strict=True))
            warpgroup = lax.axis_index("warpgroup")

            def tile(info):
                """Entries of the list of tiles, the column, and how much of K is to be summed."""
                chunk = _CHUNK_ROWS // tile_rows
                t, n_tile = plgpu.planar_snake(info.index[0], (count[0], self.n_tiles), 0, chunk)
                if self.cluster == 2:
                    n_tile = 2 * n_tile + lax.axis_index("cluster")
                k_steps = lax.select(group[t] < b.shape[0], jnp.int32(self.k_steps), jnp.int32(0))
                first = pl.multiple_of(row[t], _ALIGNMENT)
                return group[t], first, low[t], high[t], n_tile, k_steps

            steps = (count[0] * self.n_tiles,)
            pl.when(warpgroup == form.warpgroups)(
                functools.partial(self.produce, steps, tile, a, b, scales[0], refs)
            )
            pl.when(warpgroup < form.warpgroups)(
                functools.partial(self.consume, steps, tile, warpgroup, scales[1], out, refs)
            )

        return compat.kernel(
            body,
            interpret=self.interpret,
            out_type=jax.ShapeDtypeStruct((self.m, self.n), jnp.bfloat16),
            grid=(1 if self.interpret else compat.multiprocessors() // self.cluster,),
            grid_names=("sm",),
            num_threads=form.warpgroups + 1,
            thread_name="warpgroup",
            scratch_types=[scratch[name] for name in names],
            **in_cluster(self.cluster),
        )

    def produce(self, steps, tile, a, b, a_scale, refs):
        """Keep the ring full; what the second part needs has a barrier of its own."""
        form = self.form
        plgpu.set_max_registers(REGISTERS[form.warpgroups][0], action="decrease")
        load = plgpu.copy_gmem_to_smem
        shared = "cluster" if self.cluster == 2 else None

        ring, empty = Ring(_STAGES), refs["empty"]

        @plgpu.nd_loop(steps, collective_axes="sm", init_carry=ring.start())
        def per_tile(info, carry):
            group, row, _, _, n_tile, k_steps = tile(info)

            def step(k, position):
                ring.acquire(position, empty)
                slot = position.slot
                ks = pl.ds(k * self.k_tile, self.k_tile)

                def barrier(part):
                    return refs["full_second" if part else "full"].at[slot]

                def rows(part):
                    source = a.at[pl.ds(row + part * form.part_rows, form.part_rows), ks]
                    target = refs["a_smem"].at[slot, part]
                    load(source, target, barrier(part), collective_axes=shared)

                def columns(part):
                    wanted = pl.ds(n_tile * form.tile[1] + part * _COLUMNS, _COLUMNS)
                    source = (
                        b.at[group, wanted, ks] if self.transpose_w else b.at[group, ks, wanted]
                    )
                    load(source, refs["b_smem"].at[slot, part], barrier(part))

                rows(0)
                if self.fp8:
                    scales = a_scale.at[k, pl.ds(row, form.tile[0])]
                    load(scales, refs["a_scale_smem"].at[slot], barrier(0))
                columns(0)
                for part in range(1, form.row_parts):
                    rows(part)
                for part in range(1, form.column_parts):
                    columns(part)
                return ring.advance(position)

            return lax.fori_loop(0, k_steps, step, carry)

        ring.drain(per_tile, empty)

    def consume(self, steps, tile, warpgroup, b_scale, out, refs):
        """Multiply and store one tile after the other."""
        plgpu.set_max_registers(REGISTERS[self.form.warpgroups][1], action="increase")
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
        a_part, b_part = self.form.parts[part]
        a = refs["a_smem"].at[slot, a_part, pl.ds(warpgroup * _ROWS, _ROWS)]
        b = refs["b_smem"].at[slot, b_part]
        return a, b.T if self.transpose_w else b

    def sum_bf16(self, slot, group, n_tile, k_steps, warpgroup, b_scale, refs):
        """All of K in the accumulators of the tensor cores, one product always in flight."""
        del group, n_tile, b_scale

        def mainloop(*accumulators):
            def step(k, carry):
                slot, previous = carry
                for part, accumulator in enumerate(accumulators):
                    plgpu.barrier_wait(refs["full" if part == 0 else "full_second"].at[slot])
                    plgpu.wgmma(accumulator, *self.operands(slot, part, warpgroup, refs))
                # Those of the stage before are finished.
                plgpu.wgmma_wait(len(accumulators))

                @pl.when(k > 0)
                def _():
                    plgpu.barrier_arrive(refs["empty"].at[previous])

                return Ring(_STAGES).next_slot(slot), slot

            carry = lax.fori_loop(0, k_steps, step, (slot, slot))
            totals = tuple(accumulator[...] for accumulator in accumulators)

            @pl.when(k_steps > 0)
            def _():
                plgpu.barrier_arrive(refs["empty"].at[carry[1]])

            return carry[0], totals

        accumulator = plgpu.ACC((_ROWS, _COLUMNS), jnp.float32)
        return pl.run_scoped(mainloop, *[accumulator] * len(self.form.parts))

    def sum_fp8(self, slot, group, n_tile, k_steps, warpgroup, b_scale, refs):
        """Every 128 of K promoted into FP32 registers, as in `pallas_kernels.hopper.matmul`."""
        form, shape = self.form, (_ROWS, _COLUMNS)
        group = lax.min(group, jnp.int32(b_scale.shape[0] - 1))
        blocks = form.column_parts

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
                row_part, column_part = form.parts[part]
                if column_part == 0:
                    first = row_part * form.part_rows + warpgroup * _ROWS
                    scale = refs["a_scale_smem"][slot, pl.ds(first, _ROWS)]
                scale_part = lax.broadcast_in_dim(scale * scales_b[column_part], shape, (0,))

                def multiply(accumulator, part=part):
                    plgpu.wgmma(accumulator, *self.operands(slot, part, warpgroup, refs))
                    return accumulator[...]

                partial = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
                if part == len(totals) - 1:
                    plgpu.barrier_arrive(refs["empty"].at[slot])
                    if not self.interpret:
                        compat.use_zero()
                new_totals.append(total + partial * scale_part)
            return Ring(_STAGES).next_slot(slot), next_scales_b, tuple(new_totals)

        zeros = tuple(jnp.zeros(shape, jnp.float32) for _ in form.parts)
        start = slot, block_scales(jnp.int32(0)), zeros
        slot, _, totals = lax.fori_loop(0, k_steps, step, start)
        return slot, totals

    def store(self, warpgroup, first, low, high, n_tile, totals, out, refs):
        """Store what lies in the rows [low, high), of each part the 64 from its ``first`` on."""
        form = self.form
        for (row_part, column_part), total in zip(form.parts, totals, strict=True):
            own = first + row_part * form.part_rows
            whole = (low <= own) & (own + _ROWS <= high)
            for start in range(0, _COLUMNS, _STORE_COLUMNS):
                values = total[:, start : start + _STORE_COLUMNS].astype(jnp.bfloat16)
                column = n_tile * form.tile[1] + column_part * _COLUMNS + start
                columns = pl.ds(column, _STORE_COLUMNS)

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
