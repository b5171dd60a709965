import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels import quantize, reference
from pallas_kernels.hopper import quantize as hopper

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
    with pytest.raises(ValueError, match="along axis 0"):
        quantize.quantize_tiles(random_matrix(128, 128), axis=0, impl="hopper")
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
