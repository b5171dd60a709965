import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels import quantize, reference
from pallas_kernels.hopper import compat
from pallas_kernels.hopper import quantize as hopper
from pallas_kernels.hopper import quantize_both as hopper_both
from pallas_kernels.hopper import swiglu_gradient as hopper_swiglu
from pallas_kernels.reference import Quantized

E4M3_STEP = 2.0**-4  # half of the spacing of E4M3 relative to a normal number
SMALLEST_NORMAL = 2.0**-126


def random_matrix(rows, columns, seed=0):
    """Rows of very different magnitude, as activations have them."""
    rng = np.random.default_rng(seed)
    scale = np.exp(3 * rng.normal(size=(rows, 1)))
    return jnp.asarray(rng.normal(size=(rows, columns)) * scale, jnp.float32)


@pytest.mark.parametrize("shape", [(4, 128), (3, 5), (130, 257)])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("how", ["rows", "columns", "blocks"])
def test_dequantized_is_near(shape, power_of_two, how):
    x = random_matrix(*shape)
    if how == "blocks":
        q = quantize.quantize_blocks(x, power_of_two=power_of_two)
    else:
        axis = 1 if how == "rows" else 0
        q = quantize.quantize_tiles(x, axis=axis, power_of_two=power_of_two)
    want = np.asarray(x.T if how == "columns" else x)
    assert q.values.shape == want.shape
    assert reference.has_block_scales(q) == (how == "blocks")
    scale_RK = np.repeat(np.asarray(reference._tile_scales(q)).T, 128, axis=1)[:, : want.shape[1]]
    # Half a step of the number's own binade, or half a denormal step of E4M3 times the scale.
    bound = np.maximum(np.abs(want) * E4M3_STEP, scale_RK * 2.0**-10) * (1 + 1e-6)
    assert (np.abs(np.asarray(reference.dequantize(q)) - want) <= bound).all()


@pytest.mark.parametrize("power_of_two", [False, True])
def test_the_largest_of_a_tile_uses_the_whole_range(power_of_two):
    q = quantize.quantize_tiles(random_matrix(64, 512), power_of_two=power_of_two)
    largest = np.abs(np.asarray(q.values, np.float32)).reshape(64, 4, 128).max(-1)
    if power_of_two:
        assert (largest > 448 / 2 - 16).all()
        mantissa, _ = np.frexp(np.asarray(q.scale))
        assert (mantissa == 0.5).all()
    else:
        assert (largest == 448).all()


def test_power_of_two_scale_is_the_next_one_up():
    amax = jnp.asarray([448.0, 448.0 * 1.0001, 447.0, 448 * 2.0**-130, 0.0, 2.0**100 * 448])
    got = reference.scales_of(amax, power_of_two=True)
    np.testing.assert_array_equal(got, [1, 2, 1, SMALLEST_NORMAL, SMALLEST_NORMAL, 2.0**100])


def test_special_values():
    x = np.zeros((8, 128), np.float32)
    x[1, 5] = np.inf
    x[2, 5] = np.nan
    x[3] = 3e38
    x[4, 0] = 1e-45
    x[5] = 1e-38
    x[6, :2] = 3e38, 1e-30
    x[7] = -0.0
    q = quantize.quantize_tiles(jnp.asarray(x))
    got = np.asarray(reference.dequantize(q))
    assert (got[0] == 0).all()
    assert np.isfinite(np.asarray(q.scale)[0, [0, 3, 4, 5, 6, 7]]).all()
    assert np.isnan(got[1]).all(), "an infinity must not vanish into a finite tile"
    assert np.isnan(got[2]).all()
    np.testing.assert_allclose(got[3], 3e38, rtol=1e-6)
    np.testing.assert_allclose(got[4], 0, atol=SMALLEST_NORMAL)
    np.testing.assert_allclose(got[5], 1e-38, atol=SMALLEST_NORMAL)
    assert got[6, 0] == pytest.approx(3e38)
    assert got[6, 1] == 0, "far below the largest: below the smallest E4M3 number"
    assert (got[7] == 0).all()


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        (2, 128),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
    st.booleans(),
)
def test_any_finite_tile_stays_finite_and_saturates(x, power_of_two):
    q = quantize.quantize_tiles(jnp.asarray(x), power_of_two=power_of_two)
    values = np.asarray(q.values, np.float32)
    assert np.isfinite(values).all()
    assert np.isfinite(np.asarray(q.scale)).all()
    # The rounding to E4M3 is that of ml_dtypes, element by element.
    scaled = (x / np.asarray(q.scale).T).clip(-448, 448)
    flushed = np.abs(x) < SMALLEST_NORMAL
    want = scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(values[~flushed], want[~flushed])


needs_simulation = pytest.mark.skipif(
    tuple(int(part) for part in jax.__version__.split(".")[:2]) < (0, 11),
    reason="before 0.11, Pallas simulates too little",
)


@pytest.mark.parametrize(
    "interpret",
    [
        pytest.param(True, id="simulated", marks=needs_simulation),
        pytest.param(False, id="device", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_hopper_equals_reference(dtype, power_of_two, interpret):
    x = random_matrix(128, 384).at[3, 5].set(jnp.inf).at[9, 200].set(jnp.nan).at[70].set(0)
    x = x.astype(dtype)
    got = hopper.quantize_tiles(x, power_of_two=power_of_two, interpret=interpret)
    want = quantize.quantize_tiles(x, power_of_two=power_of_two, impl="reference")
    # A GPU divides to two units in the last place, which may tip a tie in rounding to E4M3.
    np.testing.assert_allclose(got.scale, want.scale, rtol=0 if interpret else 2.0**-22)
    got, want = (np.asarray(q.values, np.float32) for q in (got, want))
    np.testing.assert_allclose(got, want, rtol=0 if interpret else 2.0**-3)
    assert np.mean((got != want) & ~np.isnan(want)) < 1e-3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_hopper_lowers_without_a_device(power_of_two, dtype):
    x = jax.ShapeDtypeStruct((4096, 7168), dtype)
    traced = jax.jit(lambda x: hopper.quantize_tiles(x, power_of_two=power_of_two)).trace(x)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_explicit_impl_never_falls_back():
    with pytest.raises(ValueError, match="no kernel to quantize float32"):
        quantize.quantize_tiles(random_matrix(128, 128), axis=0, impl="hopper")
    with pytest.raises(ValueError, match="no implementation 'hopper' for float32"):
        quantize.quantize_blocks_both(random_matrix(128, 130), impl="hopper")
    with pytest.raises(ValueError, match="multiple of 64"):
        quantize.quantize_tiles(random_matrix(100, 128), impl="hopper")


def test_both_ways_agrees_with_each():
    x = random_matrix(200, 300)
    both = quantize.quantize_tiles_both(x)
    for got, axis in ((both.by_row, 1), (both.by_column, 0)):
        want = quantize.quantize_tiles(x, axis=axis)
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_blocks_transpose_without_requantizing():
    w = random_matrix(200, 300)
    got = quantize.transpose_blocks(quantize.quantize_blocks(w))
    want = quantize.quantize_blocks(w.T)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    with pytest.raises(ValueError, match="transpose"):
        quantize.transpose_blocks(quantize.quantize_tiles(w))


def test_blocks_of_many_groups():
    w = random_matrix(3 * 130, 140).reshape(3, 130, 140)
    q = quantize.quantize_blocks(w)
    for g in range(3):
        want = quantize.quantize_blocks(w[g])
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda a, g=g: a[g], q), want)


def test_bfloat16_input_is_not_rounded_again():
    x = random_matrix(16, 256).astype(jnp.bfloat16)
    jax.tree.map(
        np.testing.assert_array_equal,
        quantize.quantize_tiles(x),
        quantize.quantize_tiles(x.astype(jnp.float32)),
    )


# --- both axes, groups of rows, SwiGLU -----------------------------------------------------------

SIZES = [[128, 128, 0], [100, 0, 28, 70], [0, 3, 250, 0, 1, 0], [0, 0, 0]]

simulated_and_real = pytest.mark.parametrize(
    "interpret",
    [
        pytest.param(True, id="simulated", marks=needs_simulation),
        pytest.param(False, id="device", marks=pytest.mark.gpu),
    ],
)


def tiles_of(sizes, m):
    return quantize.ragged_tiles(jnp.asarray(sizes, jnp.int32), m)


def rows_of_tiles(tiles, m):
    """Of every tile that is used, the rows that are its own and where they stand in it."""
    for t in range(int(tiles.count[0])):
        low, high, first = (int(x[t]) for x in (tiles.low_T, tiles.high_T, tiles.first_T))
        assert 0 <= first <= low < high <= min(first + 128, m)
        yield t, slice(low, high), slice(low - first, high - first)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 7, 127, 128, 129, 300]), min_size=5, max_size=5))
def test_tiles_take_every_row_once_and_never_two_groups(sizes):
    m = 5 * 300
    tiles = tiles_of(sizes, m)
    owner = np.full(m, -1)
    group_T = np.repeat(np.arange(5), np.asarray(tiles.tiles_G))
    assert len(group_T) == tiles.count[0] == sum(-(-size // 128) for size in sizes)
    np.testing.assert_array_equal(tiles.offset_G, np.cumsum(tiles.tiles_G) - tiles.tiles_G)
    for t, rows, _ in rows_of_tiles(tiles, m):
        assert (owner[rows] == -1).all()
        owner[rows] = group_T[t]
    np.testing.assert_array_equal(owner, np.repeat([*range(5), -1], [*sizes, m - sum(sizes)]))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_ragged_tiles_are_each_quantized_by_themselves(sizes):
    m = 264
    x = random_matrix(m, 130).at[sum(sizes) :].set(jnp.nan)
    tiles = tiles_of(sizes, m)
    q = reference.quantize_tiles_ragged(x, tiles)
    assert q.values.shape == (130, 128 * len(tiles.first_T))
    for t, rows, within in rows_of_tiles(tiles, m):
        block = np.zeros((128, 130), np.float32)
        block[within] = x[rows]
        want = quantize.quantize_tiles(jnp.asarray(block), axis=0)
        np.testing.assert_array_equal(q.values[:, 128 * t : 128 * t + 128], want.values)
        np.testing.assert_array_equal(q.scale[t], want.scale[0])


def assert_nearly_equal(got, want, *, exact):
    """A GPU multiplies by a rounded reciprocal, which may tip a tie in rounding to E4M3."""
    np.testing.assert_allclose(got.scale, want.scale, rtol=0 if exact else 2.0**-21)
    got, want = (np.asarray(q.values, np.float32) for q in (got, want))
    np.testing.assert_allclose(got, want, rtol=2.0**-3, atol=2.0**-9)
    assert np.mean((got != want) & ~np.isnan(want)) < 2e-3


def special(x, dtype=jnp.bfloat16):
    """With an infinity, a NaN, zeros, and the smallest and largest of BF16."""
    x = x.at[3, 5].set(jnp.inf).at[9, 200].set(jnp.nan).at[70].set(0)
    return x.at[80].set(1e-40).at[81, :7].set(3e38).astype(dtype)


@simulated_and_real
@pytest.mark.parametrize("power_of_two", [False, True])
def test_both_axes_in_one_pass(power_of_two, interpret):
    x = special(random_matrix(256, 384))
    tiles = tiles_of([256], 256)
    got = hopper_both.quantize_both(x, tiles, power_of_two=power_of_two, interpret=interpret)
    want = quantize.quantize_tiles_both(x, power_of_two=power_of_two, impl="reference")
    for a, b in zip(got, want, strict=True):
        assert_nearly_equal(a, b, exact=interpret)


@simulated_and_real
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("of", ["plain", "swiglu", "swiglu_factors"])
def test_both_axes_in_groups(of, sizes, interpret):
    m = 264
    x = random_matrix(m, 256 if of == "plain" else 512).astype(jnp.bfloat16)
    x = x.at[sum(sizes) :].set(jnp.nan)
    factors = random_matrix(m, 1, 1)[:, 0] if of == "swiglu_factors" else None
    tiles = tiles_of(sizes, m)
    if of == "plain":
        by_row, by_column = hopper_both.quantize_both(x, tiles, interpret=interpret)
        want = quantize.quantize_tiles_both(x, tiles, impl="reference")
    else:
        by_row, by_column = hopper_both.quantize_both(
            x, tiles, swiglu=True, factors_M=factors, interpret=interpret
        )
        want = quantize.quantize_tiles_both(reference.swiglu(x, factors), tiles, impl="reference")
    rows, used = sum(sizes), 128 * int(tiles.count[0])
    # exp differs by its last bits, which may round to another BF16 number.
    compare = assert_dequantized_near
    if of == "plain":
        compare = functools.partial(assert_nearly_equal, exact=interpret)

    def of_rows(q):
        return Quantized(q.values[:rows], q.scale[:, :rows])

    def of_tiles(q):
        return Quantized(q.values[:, :used], q.scale[: used // 128])

    if rows:
        compare(of_rows(by_row), of_rows(want.by_row))
        compare(of_tiles(by_column), of_tiles(want.by_column))


@simulated_and_real
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_what_is_in_fp8_is_turned_round(sizes, interpret):
    m = 264
    x = random_matrix(m, 256).at[sum(sizes) :].set(jnp.nan).astype(jnp.bfloat16)
    tiles = tiles_of(sizes, m)
    q = quantize.quantize_tiles(x, power_of_two=True)
    options = dict(scale_kM=q.scale, by_row=False, power_of_two=True, interpret=interpret)
    (got,) = hopper_both.quantize_both(q.values, tiles, **options)
    want = quantize.requantize_tiles(q, tiles, impl="reference")
    used = 128 * int(tiles.count[0])
    got, want = (Quantized(a.values[:, :used], a.scale[: used // 128]) for a in (got, want))
    if used:  # powers of two all the way
        assert_nearly_equal(got, want, exact=True)
        np.testing.assert_array_equal(*(np.asarray(a.values, np.float32) for a in (got, want)))


def swiglu_gradient_in_pieces(gate_up, dh, factors, tiles):
    """By row as one matrix, by column, and of the factors."""
    x = reference.dequantize(gate_up)
    grad, dfactors = reference.swiglu_gradient(x, dh.astype(jnp.float32), factors)
    parts = *jnp.split(grad, 2, axis=1), reference.swiglu(x, factors)
    columns = tuple(reference.quantize_tiles_ragged(part.astype(dh.dtype), tiles) for part in parts)
    return reference.quantize_tiles(grad), columns, dfactors


def compare_swiglu_gradient(got, want, tiles, rows, compare):
    """Of rows and tiles in groups; the first of ``got`` are one matrix or two, side by side."""
    used = 128 * int(tiles.count[0])
    by_row = Quantized(
        jnp.concatenate([q.values for q in got[0]], axis=1),
        jnp.concatenate([q.scale for q in got[0]], axis=0),
    )
    if rows:
        compare(*(Quantized(q.values[:rows], q.scale[:, :rows]) for q in (by_row, want[0])))
        for pair in zip(got[1], want[1], strict=True):
            compare(*(Quantized(q.values[:, :used], q.scale[: used // 128]) for q in pair))
    assert (got[2] is None) == (want[2] is None)
    if got[2] is not None:
        largest = np.abs(want[2][:rows]).max(initial=0)
        np.testing.assert_allclose(got[2][:rows], want[2][:rows], rtol=1e-4, atol=1e-5 * largest)


def random_swiglu_gradient(m, k, rows, with_factors, seed=0):
    """Gate, up, the gradient of their product, and factors; past the rows NaN, as it may be.

    From a gate of -44 on, the quotient's derivative by autodiff divides by a square that overflows:
    a part of a gradient of 1e-20 is lost, which in a tile of one row is the largest.
    """
    gate_up = jnp.maximum(random_matrix(m, 2 * k, seed), -40)
    gate_up = gate_up.at[rows:].set(jnp.nan).astype(jnp.bfloat16)
    dh = random_matrix(m, k, seed + 1).at[rows:].set(0).astype(jnp.bfloat16)
    factors = random_matrix(m, 1, seed + 2)[:, 0].at[rows:].set(jnp.nan) if with_factors else None
    return quantize.quantize_tiles(gate_up), dh, factors


def run_swiglu_gradient(sizes, m, k, *, with_factors, apart, interpret):
    """The kernel beside the pieces."""
    rows, tiles = sum(sizes), tiles_of(sizes, m)
    gate_up, dh, factors = random_swiglu_gradient(m, k, rows, with_factors)
    options = dict(factors_M=factors, apart=apart, interpret=interpret)
    got = hopper_swiglu.swiglu_gradient(gate_up, dh, tiles, **options)
    assert len(got[0]) == (2 if apart else 1)
    sums = None if factors is None else got[2].sum(0)
    want = swiglu_gradient_in_pieces(gate_up, dh, factors, tiles)
    compare_swiglu_gradient((*got[:2], sums), want, tiles, rows, assert_dequantized_near)
    only_rows, nothing, _ = hopper_swiglu.swiglu_gradient(
        gate_up, dh, tiles, by_column=False, **options
    )
    assert nothing == ()
    for a, b in zip(jax.tree.leaves(only_rows), jax.tree.leaves(got[0]), strict=True):
        axis = 0 if a.dtype == reference.E4M3 else 1
        a, b = (jnp.take(x, jnp.arange(rows), axis=axis).astype(jnp.float32) for x in (a, b))
        np.testing.assert_array_equal(a, b)


@simulated_and_real
@pytest.mark.parametrize("with_factors", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_swiglu_gradient_in_one_pass(sizes, with_factors, interpret):
    run_swiglu_gradient(
        sizes, 264, 256, with_factors=with_factors, apart=with_factors, interpret=interpret
    )


@needs_simulation
@settings(max_examples=6, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 7, 127, 128, 129]), min_size=1, max_size=3),
    st.integers(0, 3),
    st.sampled_from([128, 256]),
    st.booleans(),
    st.booleans(),
)
def test_swiglu_gradient_of_any_groups(sizes, more, k, with_factors, apart):
    m = max(128, -(-sum(sizes) // 8) * 8) + 8 * more
    run_swiglu_gradient(sizes, m, k, with_factors=with_factors, apart=apart, interpret=True)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("k", [130, 256])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_swiglu_gradient_is_that_of_its_pieces(dtype, k, apart):
    m, sizes = 200, [100, 0, 28, 7]
    rows, tiles = sum(sizes), tiles_of(sizes, m)
    gate_up, dh, factors = random_swiglu_gradient(m, k, rows, True)
    dh = dh.astype(dtype)
    got = quantize.swiglu_gradient_quantize_tiles(gate_up, dh, factors, tiles, apart=apart)
    by_row, *want = swiglu_gradient_in_pieces(gate_up, dh, factors, tiles)
    if k % 128 and apart:  # a tile of one matrix has numbers of both
        x = reference.dequantize(gate_up)
        grad = reference.swiglu_gradient(x, dh.astype(jnp.float32), factors)[0]
        halves = [quantize.quantize_tiles(x) for x in jnp.split(grad, 2, axis=1)]
        by_row = Quantized(
            *(
                jnp.concatenate(x, a)
                for a, x in ((1, [q.values for q in halves]), (0, [q.scale for q in halves]))
            )
        )
    compare_swiglu_gradient(got, (by_row, *want), tiles, rows, assert_nearly_all_equal)
    assert (got.factors_M[rows:] == 0).all()
    rows_only = quantize.swiglu_gradient_quantize_tiles(
        gate_up, dh, None, tiles, apart=apart, by_column=False
    )
    assert rows_only.by_column is rows_only.factors_M is None


def assert_nearly_all_equal(got, want):
    """XLA multiplies three factors in any order, which may tip a number of BF16 or E4M3."""
    np.testing.assert_allclose(got.scale, want.scale, rtol=2.0**-7)
    got, want = (np.asarray(q.values, np.float32) for q in (got, want))
    np.testing.assert_allclose(got, want, rtol=2.0**-3, atol=2.0**-9)
    assert np.mean(got != want) < 1e-2


@simulated_and_real
def test_swiglu_gradient_in_one_pass_where_its_exponential_overflows(interpret):
    gate = jnp.linspace(-1e4, 1e4, 128 * 128).reshape(128, 128)
    gate_up = quantize.quantize_tiles(jnp.concatenate([gate, gate], axis=1).astype(jnp.bfloat16))
    dh = jnp.ones((128, 128), jnp.bfloat16)
    tiles = tiles_of([128], 128)
    rows, columns, _ = hopper_swiglu.swiglu_gradient(gate_up, dh, tiles, interpret=interpret)
    assert all(np.isfinite(reference.dequantize(q)).all() for q in (*rows, *columns))
    assert (np.asarray(rows[0].values[0], np.float32) == 0).all()


def test_swiglu_gradient_is_near_that_in_float32():
    m, k = 128, 256
    gate_up, dh, factors = random_swiglu_gradient(m, k, m, True)
    got = quantize.swiglu_gradient_quantize_tiles(gate_up, dh, factors)

    def product(gate_up, factors):
        gate, up = jnp.split(gate_up, 2, axis=1)
        return jax.nn.silu(gate) * up * factors[:, None]

    x = reference.dequantize(gate_up)
    h, vjp = jax.vjp(product, x, factors)
    grad, dfactors = vjp(dh.astype(jnp.float32))
    np.testing.assert_allclose(got.factors_M, dfactors, rtol=1e-4, atol=1e-5 * dfactors.max())
    wants = grad, *(part.T for part in (*jnp.split(grad, 2, axis=1), h))
    for q, want in zip((*got.by_row, *got.by_column), wants, strict=True):
        scale = np.repeat(np.asarray(q.scale).T, 128, axis=1)
        bound = np.abs(want) * (E4M3_STEP + 2.0**-8) + scale * 2.0**-9
        assert (np.abs(reference.dequantize(q) - want) <= bound).all()


def assert_dequantized_near(got, want):
    """To a step of E4M3 and of the scale: a last bit of BF16 may move both."""
    scale = np.repeat(np.asarray(want.scale).T, 128, axis=1)[:, : want.values.shape[1]]
    got, want = (np.asarray(reference.dequantize(q)) for q in (got, want))
    assert (np.abs(got - want) <= np.maximum(np.abs(want) * 0.14, scale * 2.0**-8)).all()
    assert np.mean(np.abs(got - want) > np.abs(want) * 0.01) < 1e-2


@simulated_and_real
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_blocks_both_ways_in_one_pass(power_of_two, dtype, interpret):
    w = jnp.stack([special(random_matrix(256, 384, seed), dtype) for seed in range(2)])
    want = quantize.quantize_blocks_both(w, power_of_two=power_of_two, impl="reference")
    for parts in ((w,), (w[..., :256], w[..., 256:])):
        got = hopper_both.quantize_blocks_both(
            parts, power_of_two=power_of_two, interpret=interpret
        )
        for a, b in zip(got, want, strict=True):
            assert_nearly_equal(a, b, exact=interpret)
        values, transposed, expected = (np.asarray(q.values, np.float32) for q in (*got, want[0]))
        np.testing.assert_array_equal(values.swapaxes(1, 2), transposed)
        if interpret:
            np.testing.assert_array_equal(values, expected)


def test_blocks_of_weights_side_by_side():
    w, v = random_matrix(200, 256), random_matrix(200, 70, 1)
    got = quantize.quantize_blocks_both((w, v))
    want = quantize.quantize_blocks_both(jnp.concatenate([w, v], axis=1))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    with pytest.raises(ValueError, match="a block would hold two"):
        quantize.quantize_blocks_both((v, w))


def test_swiglu_has_a_gradient_where_its_exponential_overflows():
    gate_up = jnp.array([[-1e4, -100.0, 0.0, 1e4, 1, 1, 1, 1]])
    dgate, dup = jnp.split(jax.grad(lambda x: reference.swiglu(x).sum())(gate_up), 2, axis=1)
    np.testing.assert_allclose(dgate, [[0, 0, 0.5, 1]], atol=1e-6)
    np.testing.assert_allclose(dup, [[0, 0, 0, 1e4]], atol=1e-6)


def test_swiglu_is_that_of_jax():
    gate_up, factors = random_matrix(130, 280), random_matrix(130, 1, 1)
    gate, up = jnp.split(gate_up, 2, axis=1)
    got = quantize.swiglu_quantize_tiles(gate_up, factors[:, 0])
    want = quantize.quantize_tiles(jax.nn.silu(gate) * up * factors)
    np.testing.assert_allclose(got.scale, want.scale, rtol=1e-5)
    overflow = quantize.swiglu_quantize_tiles(jnp.array([[-1e4, 1.0]]))
    assert overflow.values[0, 0] == 0, "exp overflows, silu does not"


@pytest.mark.skipif(not compat.loads_transposed(), reason="before 0.11, Pallas finds no layout")
@pytest.mark.parametrize(
    "which", ["plain", "swiglu", "blocks", "blocks_fp32", "columns", "from_fp8", "swiglu_gradient"]
)
def test_both_lower_without_a_device(which):
    x = jax.ShapeDtypeStruct((1000, 2048), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((8,), jnp.int32)
    if which.startswith("blocks"):
        dtype = jnp.float32 if which == "blocks_fp32" else jnp.bfloat16
        w = jax.ShapeDtypeStruct((8, 7168, 2048), dtype)
        traced = jax.jit(hopper_both.quantize_blocks_both).trace((w, w))
    else:
        factors = jax.ShapeDtypeStruct((1000,), jnp.float32)
        scale = jax.ShapeDtypeStruct((16, 1000), jnp.float32)
        if which in ("from_fp8", "swiglu_gradient"):
            x = jax.ShapeDtypeStruct((1000, 2048), reference.E4M3)

        def run(sizes, x, factors, scale):
            tiles = quantize.ragged_tiles(sizes, 1000)
            options = {
                "swiglu": {"swiglu": True, "factors_M": factors},
                "columns": {"by_row": False},
                "from_fp8": {"by_row": False, "scale_kM": scale},
            }
            if which == "swiglu_gradient":
                dh = jnp.zeros((1000, 1024), jnp.bfloat16)
                return hopper_swiglu.swiglu_gradient(
                    Quantized(x, scale), dh, tiles, factors_M=factors
                )
            return hopper_both.quantize_both(x, tiles, **options.get(which, {}))

        traced = jax.jit(run).trace(sizes, x, factors, scale)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
