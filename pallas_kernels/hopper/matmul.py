"""Block-scaled FP8 matmul on Hopper: TMA, `wgmma` and promotion in registers.

One block of threads computes a tile of 64 to 256 rows and 128 columns. A producer warpgroup fills
a ring of shared-memory stages, each 128 of K, with the tensor memory accelerator. One to three
consumer warpgroups take 64 rows each, ``waves`` times over: `wgmma` sums 128 of K into a fresh
accumulator, which is then scaled and added to the FP32 total in registers (V3 section 3.5.2).
While one warpgroup promotes, the tensor cores work for the others.

Why the pieces are as they are (the budget is in docs/performance.md):

* Two waves: a tile of 256 x 128 needs 3/4 of the shared-memory fills that 128 x 128 needs per
  product. The totals then take 128 registers and the accumulator 64, of the 232 a thread may have.
* Three consumers where `b` has a scale per column: promotion is twice the work then, and outlasts
  the `wgmma` of one other consumer.
* A barrier of its own for each wave's rows: it is a branch, and so keeps the compiler from starting
  the second wave's `wgmma` before the first accumulator is free, which spills registers.
* A cluster of two blocks that share the rows of ``a`` (or of ``b``) loads those once for both.
* The grid is persistent: while consumers store a tile, the producer already loads the next one.
* Few rows, as in decoding, are a matter of reading `b`, which takes many multiprocessors at once:
  tiles are split along K, and their parts added up by XLA, with what follows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.hopper import compat, tilings
from pallas_kernels.hopper.ring import REGISTERS, Ring, empty_barriers, in_cluster
from pallas_kernels.reference import TILE, Quantized, RaggedTiles, check_product, has_block_scales

_ROWS = 64  # rows of one wgmma instruction
_STORE_BYTES = 128  # width of a chunk of the result on its way out: one swizzle
_SHARED_BYTES = 227 * 1024 - 2048  # of a block, less what barriers and alignment take
_MANY_ROWS = 16384
# What a product of few rows costs, in units of the time in which memory delivers a block of 128x128
# to anyone: a multiprocessor takes one step of K in so many (0.4 us where memory delivers 3 TB/s),
# so that fewer of them leave memory idle. A tile takes so many steps more to begin and to end.
_STEP, _EXTRA_STEPS = 75, 2


@dataclasses.dataclass(frozen=True)
class Tiling:
    """What may be tuned; `choose_tiling` has the defaults.

    Attributes:
        waves: How often each consumer takes 64 rows of a tile: 1 or 2.
        warpgroups: Consumers: 2, or 1 or 3 of one wave each. A tile has 64 rows for each and wave.
        shared: Which operand two neighbouring blocks load once for both: "a", "b" or "none".
        stages: Depth of the ring; 0 means as deep as shared memory allows.
        group: Tiles of N that are walked together for every step in M, to stay in L2.
        store_slots: Buffers between registers and the asynchronous store.
        splits: Parts of K that are summed by different blocks, and then with one another.
    """

    waves: int = 2
    warpgroups: int = 2
    shared: str = "a"
    stages: int = 0
    group: int = 8
    store_slots: int = 1
    splits: int = 1

    def __post_init__(self):
        if self.waves not in (1, 2) or self.shared not in ("a", "b", "none"):
            raise ValueError(f"waves must be 1 or 2 and shared 'a', 'b' or 'none', not {self}")
        if (self.waves, self.warpgroups) not in ((1, 1), (1, 2), (2, 2), (1, 3)):
            raise ValueError(f"two waves take 2 consumers, one wave 1 to 3 of them, not {self}")
        if min(self.group, self.store_slots, self.splits) < 1 or self.stages < 0:
            raise ValueError(
                f"groups, buffers and parts are 1 or more, and stages not below 0: {self}"
            )

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return self.waves * self.warpgroups * _ROWS


def choose_tiling(
    m: int, n: int, k: int, *, b_in_tiles: bool, device: str, multiprocessors: int
) -> Tiling:
    """The fastest tiling measured on this kind of device for the shape, else one by rule."""
    operation = f"fp8_matmul, {'tiles' if b_in_tiles else 'blocks'}"
    if found := tilings.measured(device, operation, m, n, k):
        return Tiling(**found)
    return tiling_by_rule(m, n, k, b_in_tiles=b_in_tiles, multiprocessors=multiprocessors)


def tiling_of_few_rows(m: int, n: int, k: int, *, multiprocessors: int) -> Tiling:
    """Tiles of all the rows there are, split along K so as to read `b` the fastest."""
    tiles, steps = pl.cdiv(n, TILE), pl.cdiv(k, TILE)

    def cost(splits):
        rounds, rest = divmod(tiles * splits, multiprocessors)
        at_work = rounds * max(multiprocessors, _STEP) + (max(rest, _STEP) if rest else 0)
        # FP32, written and read again.
        partial_sums = 8 * splits * m * n / TILE**2 if splits > 1 else 0
        return (pl.cdiv(steps, splits) + _EXTRA_STEPS) * at_work + partial_sums

    splits = min(range(1, max(steps, 1) + 1), key=cost)
    return Tiling(waves=1, warpgroups=1, shared="none", splits=splits)


def tiling_by_rule(m: int, n: int, k: int, *, b_in_tiles: bool, multiprocessors: int) -> Tiling:
    """A tiling for any shape, after what was measured on an H100 (docs/performance.md)."""
    if m <= _ROWS and not b_in_tiles:
        return tiling_of_few_rows(m, n, k, multiprocessors=multiprocessors)
    # A tall tile is cheaper per row, unless it leaves multiprocessors idle. With a scale per column
    # as well, promotion takes so long that two consumers cannot hide it: a third can. A third also
    # takes less energy per product, which is what counts in a product of so many rows that it
    # brings the device to its power limit.
    three = Tiling(waves=1, warpgroups=3, store_slots=2)
    tall = three if b_in_tiles or m >= _MANY_ROWS else Tiling(waves=2)
    low = Tiling(waves=1)

    def cost(tiling):
        tiles = pl.cdiv(m, tiling.rows) * pl.cdiv(n, TILE)
        return pl.cdiv(tiles, multiprocessors) * tiling.rows * (1.1 if tiling == low else 1.0)

    tiling = min((low, tall), key=cost)
    if pl.cdiv(n, TILE) % 2 == 0:
        shared = "a"
    elif pl.cdiv(m, tiling.rows) % 2 == 0:
        shared = "b"
    else:
        shared = "none"
    return dataclasses.replace(tiling, shared=shared)


@functools.partial(jax.jit, static_argnames=("out_dtype", "tiling", "interpret"))
def fp8_matmul(
    a: Quantized,
    b: Quantized,
    *,
    out_dtype=jnp.bfloat16,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """See `pallas_kernels.matmul.fp8_matmul`.

    Args:
        a: Left operand with 1x128 tile scales.
        b: Right operand, transposed, with block or tile scales; with block scales, maybe one of a
            stack.
        out_dtype: bfloat16 or float32.
        tiling: Instead of the default of `choose_tiling`.
        interpret: Simulate on the CPU. Needs jax 0.11; 0.12 unless ``tiling.shared`` is "none".
    """
    check_product(a, b)
    (m, k), (n, _) = a.values.shape, b.shape
    b_in_tiles = not has_block_scales(b)
    multiprocessors = compat.multiprocessors()
    tiling = tiling or choose_tiling(
        m,
        n,
        k,
        b_in_tiles=b_in_tiles,
        device=compat.device_kind(),
        multiprocessors=multiprocessors,
    )
    if 0 in (m, n, k):
        return jnp.zeros((m, n), out_dtype)

    # Mosaic tiles operands in global memory by (8, 128) and the result by (8, 128 bytes); a tile of
    # the kernel may run past an edge, but the edge itself must lie on that grid. The shapes of
    # the model all do; anything else is copied into place first.
    m_pad, k_pad = _round_up(m, 8), _round_up(k, TILE)
    # A result of a single chunk of columns would be overwritten by the chunks beyond its edge:
    # along a dimension of one tile, Mosaic takes every coordinate for zero.
    stored = jnp.dtype(jnp.float32 if tiling.splits > 1 else out_dtype)
    store_columns = _STORE_BYTES // stored.itemsize
    n_pad = max(_round_up(n, store_columns), 2 * store_columns)
    if (n, k) != (n_pad, k_pad):
        b = b.cut_out()  # and not all of its stack padded
        b = b._replace(values=_pad(b.values, (n_pad, k_pad)))
    a_values, a_scale = _pad(a.values, (m_pad, k_pad)), _pad(a.scale, (pl.cdiv(k, TILE), m_pad))
    b_scale = _pad(b.scale, (pl.cdiv(k, TILE), n_pad)) if b_in_tiles else b.scale

    layer = () if b.layer is None else (b.layer.reshape(1),)
    form = dict(b_in_tiles=b_in_tiles, stacked=bool(layer))
    kernel = _Kernel(m_pad, n_pad, k_pad, out_dtype=stored, tiling=tiling, **form)
    out = kernel.call(multiprocessors, interpret)(*layer, a_values, b.values, a_scale, b_scale)
    if tiling.splits > 1:
        out = jnp.sum(out, axis=0)
    return out[:m, :n].astype(out_dtype)


@functools.partial(jax.jit, static_argnames=("out_dtype", "tiling", "interpret"))
def fp8_grouped_wgrad(
    a: Quantized,
    b: Quantized,
    tiles: RaggedTiles,
    *,
    out_dtype=jnp.float32,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> Float[Array, "G M N"]:
    """See `pallas_kernels.reference.fp8_grouped_wgrad`: a product per group, over its own tiles.

    Args:
        a: [M, 128 T] values with 1x128 tile scales, from `quantize_tiles_ragged`.
        b: [N, 128 T] values, likewise.
        tiles: Which of the tiles belong to each group; the others are not looked at.
        out_dtype: bfloat16 or float32.
        tiling: Instead of the default of `tiling_by_rule`; its ``splits`` must be 1.
        interpret: Simulate on the CPU.

    Raises:
        ValueError: unless M and N are multiples of 128.
    """
    (m, k), n = a.values.shape, b.values.shape[0]
    if b.values.shape[1] != k or a.scale.shape != (k // TILE, m) or b.scale.shape != (k // TILE, n):
        raise ValueError("the operands must have 1x128 tile scales, and the same tiles")
    if m % TILE or n % TILE:
        raise ValueError(f"M and N must be multiples of {TILE}, not {m} and {n}")
    multiprocessors = compat.multiprocessors()
    tiling = tiling or tiling_by_rule(m, n, k, b_in_tiles=True, multiprocessors=multiprocessors)
    if tiling.splits != 1:
        raise ValueError("the part of K that a group has is not split further")
    groups = len(tiles.tiles_G)
    kernel = _Kernel(m, n, k, True, jnp.dtype(out_dtype), tiling, groups)
    call = kernel.call(multiprocessors, interpret)
    return call(tiles.offset_G, tiles.tiles_G, a.values, b.values, a.scale, b.scale)


def _round_up(size: int, multiple: int) -> int:
    return pl.cdiv(size, multiple) * multiple


def _pad(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """``x`` with zeros after it; zeros contribute nothing, whatever their scale."""
    if x.shape == shape:
        return x
    return jnp.pad(x, [(0, to - size) for size, to in zip(x.shape, shape, strict=True)])


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """One compiled shape: the numbers that the producer and the consumers must agree on.

    With ``groups``, there is a product for each of them, over its own part of K: which tiles of K
    these are is read from two arrays, the first and the number of each group's. Just so there is a
    product for each of the tiling's ``splits``, over an equal part of K.

    Where `b` is ``stacked``, the number of its layer in the stack is read from an array, too.
    """

    m: int
    n: int
    k: int
    b_in_tiles: bool
    out_dtype: jnp.dtype
    tiling: Tiling
    groups: int = 0
    stacked: bool = False

    @property
    def wave_rows(self) -> int:
        """Rows that all consumers together take at a time."""
        return self.tiling.warpgroups * _ROWS

    @property
    def tile_rows(self) -> int:
        return self.tiling.rows

    @property
    def k_steps(self) -> int:
        return pl.cdiv(self.k, TILE)

    @property
    def cluster(self) -> int:
        return 1 if self.tiling.shared == "none" else 2

    @property
    def cluster_grid(self) -> tuple[int, int]:
        """Tiles along M and N, counted in clusters."""
        m_tiles, n_tiles = pl.cdiv(self.m, self.tile_rows), pl.cdiv(self.n, TILE)
        if self.tiling.shared == "a":
            n_tiles = pl.cdiv(n_tiles, 2)
        elif self.tiling.shared == "b":
            m_tiles = pl.cdiv(m_tiles, 2)
        return m_tiles, n_tiles

    @property
    def products(self) -> int:
        """Results, each over its own part of K."""
        return self.groups or self.tiling.splits

    @property
    def out_shape(self) -> tuple[int, ...]:
        several = (self.products,) if self.groups or self.products > 1 else ()
        return (*several, self.m, self.n)

    @property
    def store_columns(self) -> int:
        return _STORE_BYTES // self.out_dtype.itemsize

    @property
    def stages(self) -> int:
        if self.tiling.stages:
            return self.tiling.stages
        scales = 4 * (self.tile_rows + (TILE if self.b_in_tiles else 0))
        stage = (self.tile_rows + TILE) * TILE + scales
        store = self.tiling.warpgroups * self.tiling.store_slots * _ROWS * _STORE_BYTES
        return (_SHARED_BYTES - store) // stage

    @property
    def grid(self) -> tuple[int]:
        """Number of tiles, counted in clusters."""
        m_tiles, n_tiles = self.cluster_grid
        return (self.products * m_tiles * n_tiles,)

    def product(self, index):
        """Whose tile the ``index``-th is that this cluster takes, and the index within that."""
        each = jnp.int32(self.grid[0] // self.products)
        return lax.div(index, each), lax.rem(index, each)

    def k_range(self, index, groups):
        """The first tile of K that is summed for the ``index``-th tile, and the number of them."""
        product, _ = self.product(index)
        if self.groups:
            first, count = groups
            return first[product], count[product]
        if self.products == 1:
            return jnp.int32(0), self.k_steps
        each = pl.cdiv(self.k_steps, self.products)
        first = product * each
        return first, lax.clamp(jnp.int32(0), self.k_steps - first, jnp.int32(each))

    def tile(self, index):
        """(row of tiles, column of tiles) of the ``index``-th tile that this cluster takes."""
        if self.products > 1:
            _, index = self.product(index)
        m_tile, n_tile = plgpu.planar_snake(index, self.cluster_grid, 1, self.tiling.group)
        if self.tiling.shared == "a":
            n_tile = 2 * n_tile + lax.axis_index("cluster")
        elif self.tiling.shared == "b":
            m_tile = 2 * m_tile + lax.axis_index("cluster")
        return m_tile, n_tile

    def call(self, multiprocessors: int, interpret: bool):
        ring = self.stages
        operand = (plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(TILE))
        result = (plgpu.TilingTransform((8, self.store_columns)), plgpu.SwizzleTransform(128))
        fp8 = jnp.float8_e4m3fn
        scratch = dict(
            a_smem=plgpu.SMEM(
                (ring, self.tiling.waves, self.wave_rows, TILE), fp8, transforms=operand
            ),
            b_smem=plgpu.SMEM((ring, TILE, TILE), fp8, transforms=operand),
            a_scale_smem=plgpu.SMEM((ring, self.tile_rows), jnp.float32),
            b_scale_smem=plgpu.SMEM((ring, TILE), jnp.float32) if self.b_in_tiles else None,
            out_smem=plgpu.SMEM(
                (self.tiling.warpgroups, self.tiling.store_slots, _ROWS, self.store_columns),
                self.out_dtype,
                transforms=result,
            ),
            # Arrivals: the first wave's rows of a, its scales, b (and its scales).
            full=plgpu.Barrier(num_arrivals=3 + self.b_in_tiles, num_barriers=ring),
            full_second=plgpu.Barrier(num_barriers=ring) if self.tiling.waves == 2 else None,
            empty=empty_barriers(self.tiling.warpgroups, ring, self.cluster),
        )
        names = [name for name, spec in scratch.items() if spec is not None]

        def body(*refs):
            groups, refs = (refs[:2], refs[2:]) if self.groups else (None, refs)
            layer, refs = (refs[0], refs[1:]) if self.stacked else (None, refs)
            (a, b, a_scale, b_scale, out), refs = refs[:5], refs[5:]
            if layer is not None:
                b, b_scale = b.at[layer[0]], b_scale.at[layer[0]]
            refs = dict.fromkeys(scratch) | dict(zip(names, refs, strict=True))
            warpgroup = lax.axis_index("warpgroup")
            pl.when(warpgroup == self.tiling.warpgroups)(
                functools.partial(self.produce, groups, a, b, a_scale, b_scale, refs)
            )
            pl.when(warpgroup < self.tiling.warpgroups)(
                functools.partial(self.consume, groups, warpgroup, b_scale, out, refs)
            )

        return compat.kernel(
            body,
            interpret=interpret,
            out_type=jax.ShapeDtypeStruct(self.out_shape, self.out_dtype),
            grid=(1 if interpret else multiprocessors // self.cluster,),
            grid_names=("sm",),
            num_threads=self.tiling.warpgroups + 1,
            thread_name="warpgroup",
            scratch_types=[scratch[name] for name in names],
            **in_cluster(self.cluster),
        )

    def produce(self, groups, a, b, a_scale, b_scale, refs):
        """Keep the ring full; what the consumers still have to read must not be overwritten."""
        if self.tiling.warpgroups in REGISTERS:
            plgpu.set_max_registers(REGISTERS[self.tiling.warpgroups][0], action="decrease")
        a_axis = "cluster" if self.tiling.shared == "a" else None
        b_axis = "cluster" if self.tiling.shared == "b" else None

        ring, empty = Ring(self.stages), refs["empty"]

        @plgpu.nd_loop(self.grid, collective_axes="sm", init_carry=ring.start())
        def per_tile(info, carry):
            m_tile, n_tile = self.tile(info.index[0])
            first_k, k_steps = self.k_range(info.index[0], groups)
            first_row, columns = m_tile * self.tile_rows, pl.ds(n_tile * TILE, TILE)

            def step(k, position):
                ring.acquire(position, empty)
                slot, k = position.slot, first_k + k
                ks = pl.ds(k * TILE, TILE)
                full = refs["full"].at[slot]

                def rows(wave):
                    return a.at[pl.ds(first_row + wave * self.wave_rows, self.wave_rows), ks]

                load = plgpu.copy_gmem_to_smem
                load(rows(0), refs["a_smem"].at[slot, 0], full, collective_axes=a_axis)
                load(b.at[columns, ks], refs["b_smem"].at[slot], full, collective_axes=b_axis)
                scale_rows = pl.ds(first_row, self.tile_rows)
                load(a_scale.at[k, scale_rows], refs["a_scale_smem"].at[slot], full)
                if self.b_in_tiles:
                    load(b_scale.at[k, columns], refs["b_scale_smem"].at[slot], full)
                if self.tiling.waves == 2:
                    second = refs["full_second"].at[slot]
                    load(rows(1), refs["a_smem"].at[slot, 1], second, collective_axes=a_axis)
                return ring.advance(position)

            return lax.fori_loop(0, k_steps, step, carry)

        ring.drain(per_tile, empty)

    def consume(self, groups, warpgroup, b_scale, out, refs):
        """Multiply, promote, and store one tile after the other."""
        if self.tiling.warpgroups in REGISTERS:
            plgpu.set_max_registers(REGISTERS[self.tiling.warpgroups][1], action="increase")
        rows = pl.ds(warpgroup * _ROWS, _ROWS)
        tile_shape = (_ROWS, TILE)
        last_block = b_scale.shape[0] - 1
        ring = Ring(self.stages)

        @plgpu.nd_loop(self.grid, collective_axes="sm", init_carry=jnp.int32(0))
        def per_tile(info, carry):
            slot, (m_tile, n_tile) = carry, self.tile(info.index[0])
            first_k, k_steps = self.k_range(info.index[0], groups)

            def block_scale(k):
                # An odd number of tiles leaves a cluster's second block without one.
                k = lax.min(first_k + k, jnp.int32(self.k_steps - 1))
                return b_scale[lax.min(n_tile, jnp.int32(last_block)), k]

            def step(k, carry):
                slot, scale_b, totals = carry
                # Asked for a step ahead: it comes from global memory.
                next_scale_b = None if self.b_in_tiles else block_scale(k + 1)
                new_totals = []
                for wave, total in enumerate(totals):
                    ready = refs["full" if wave == 0 else "full_second"]
                    plgpu.barrier_wait(ready.at[slot])
                    wave_rows = pl.ds(wave * self.wave_rows + warpgroup * _ROWS, _ROWS)

                    def multiply(accumulator, wave=wave):
                        a_ref = refs["a_smem"].at[slot, wave, rows]
                        plgpu.wgmma(accumulator, a_ref, refs["b_smem"].at[slot].T)
                        return accumulator[...]

                    product = functools.partial(
                        pl.run_scoped, multiply, plgpu.ACC(tile_shape, jnp.float32)
                    )
                    # With a scale per element, the product first: few registers are left to hold
                    # the scales while the tensor cores work.
                    partial = product() if self.b_in_tiles else None
                    scale = refs["a_scale_smem"][slot, wave_rows]
                    if self.b_in_tiles:
                        scale_columns = refs["b_scale_smem"][slot]
                        scale = lax.broadcast_in_dim(scale, tile_shape, (0,))
                        scale = scale * lax.broadcast_in_dim(scale_columns, tile_shape, (1,))
                    else:
                        scale = lax.broadcast_in_dim(scale * scale_b, tile_shape, (0,))
                    if partial is None:
                        partial = product()
                    if wave == len(totals) - 1:
                        # The scales were read by ordinary loads, whose values are in registers by
                        # now: no proxy fence is needed before TMA may write over them.
                        plgpu.barrier_arrive(refs["empty"].at[slot])
                    new_totals.append(total + partial * scale)
                return ring.next_slot(slot), next_scale_b, tuple(new_totals)

            zeros = tuple(jnp.zeros(tile_shape, jnp.float32) for _ in range(self.tiling.waves))
            first_scale_b = None if self.b_in_tiles else block_scale(jnp.int32(0))
            carry = lax.fori_loop(0, k_steps, step, (slot, first_scale_b, zeros))
            target = out.at[self.product(info.index[0])[0]] if len(out.shape) == 3 else out
            self.store(warpgroup, m_tile, n_tile, carry[2], target, refs["out_smem"])
            return carry[0]

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def store(self, warpgroup, m_tile, n_tile, totals, out, out_smem):
        """Convert the totals and hand them to asynchronous stores, a chunk of columns each."""
        slots, width = self.tiling.store_slots, self.store_columns
        chunks = [(wave, c) for wave in range(len(totals)) for c in range(TILE // width)]
        for index, (wave, chunk) in enumerate(chunks):
            slot = index % slots
            plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
            values = totals[wave].astype(self.out_dtype)
            out_smem[warpgroup, slot] = values[:, chunk * width : (chunk + 1) * width]
            plgpu.commit_smem()
            row = m_tile * self.tile_rows + wave * self.wave_rows + warpgroup * _ROWS
            column = n_tile * TILE + chunk * width
            plgpu.copy_smem_to_gmem(
                out_smem.at[warpgroup, slot], out.at[pl.ds(row, _ROWS), pl.ds(column, width)]
            )
