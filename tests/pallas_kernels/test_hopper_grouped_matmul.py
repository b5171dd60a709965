"""The Hopper grouped matmul: its list of tiles, its simulation, and the device where there is one.

On a Hopper GPU: ``JAX_PLATFORMS=cuda pytest -m gpu tests/pallas_kernels``.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import quantize, reference
from pallas_kernels.hopper import grouped_matmul as hopper
from pallas_kernels.reference import Quantized

needs_simulation = pytest.mark.skipif(
    tuple(int(part) for part in jax.__version__.split(".")[:2]) < (0, 11),
    reason="before 0.11, Pallas cannot simulate a transposed operand",
)

# The last of them in clusters, which have to have an even number of tiles side by side.
FORMS = [
    pytest.param(hopper.WIDE, 320, id="wide"),
    pytest.param(hopper.TALL, 320, id="tall"),
    pytest.param(hopper.THREE, 320, id="three"),
    pytest.param(hopper.THREE, 512, id="three-in-clusters"),
]
# Empty groups at both ends and in the middle, one row, boundaries off every multiple of 8.
SIZES = [[128, 128], [100, 0, 28, 77], [0, 3, 130, 0, 1, 0], [0, 0, 64]]

simulated_and_real = pytest.mark.parametrize(
    "interpret",
    [
        pytest.param(True, id="simulated", marks=needs_simulation),
        pytest.param(False, id="device", marks=pytest.mark.gpu),
    ],
)


def needs_clusters():
    if jax.__version_info__ < (0, 12):
        pytest.skip("before 0.12, Pallas simulates no clusters of blocks")


row_tiles = jax.jit(hopper.row_tiles, static_argnums=(1, 2))
SIZES_AT_EDGES = st.sampled_from([0, 1, 7, 8, 9, 127, 128, 129, 300, 511])


@settings(max_examples=60, deadline=None)
@given(st.lists(SIZES_AT_EDGES, min_size=9, max_size=9), st.sampled_from([128, 192, 256]))
def test_every_row_is_stored_once_and_by_its_group(sizes, rows):
    m = 9 * 512  # one shape for all examples, so that one compilation serves them all
    lists = row_tiles(jnp.asarray(sizes, jnp.int32), m, rows)
    count, group, row, low, high = (np.asarray(x) for x in lists)
    owner = np.full(m, -1)
    for t in range(count[0]):
        assert row[t] % 8 == 0, "or the tensor memory accelerator cannot start there"
        assert row[t] <= low[t] < high[t] <= row[t] + rows
        assert (owner[low[t] : high[t]] == -1).all(), "stored twice"
        owner[low[t] : high[t]] = group[t]
    padding = m - sum(sizes)
    np.testing.assert_array_equal(owner, np.repeat(np.arange(10), [*sizes, padding]))
    # Work is proportional to rows: at most one tile of each group is not full.
    multiplied = sum(group[: count[0]] < 9)
    assert multiplied <= sum(-(-(size + 7) // rows) for size in sizes if size)


def matrices(sizes, k, n, seed=0, padding=0):
    """Rows, matrices and sizes; the rows of the padding are NaN."""
    keys = jax.random.split(jax.random.key(seed), 2)
    x = jax.random.normal(keys[0], (sum(sizes) + padding, k), jnp.bfloat16)
    x = x.at[sum(sizes) :].set(jnp.nan)
    w = jax.random.normal(keys[1], (len(sizes), k, n), jnp.bfloat16)
    return x, w, jnp.asarray(sizes, jnp.int32)


def assert_near(got, want):
    """To the rounding of a BF16 result, and of sums in another order."""
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=2.0**-8, atol=1e-2)


@simulated_and_real
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("transpose_w", [False, True])
def test_bfloat16(sizes, transpose_w, interpret):
    x, w, group_sizes = matrices(sizes, 192, 320)
    operand = w.swapaxes(1, 2) if transpose_w else w
    got = hopper.grouped_matmul(
        x, operand, group_sizes, transpose_w=transpose_w, interpret=interpret
    )
    assert_near(got, reference.grouped_matmul(x, w, group_sizes, out_dtype=jnp.float32))


@simulated_and_real
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("form", "n"), FORMS)
def test_fp8(form, n, sizes, interpret):
    if interpret and n % 256 == 0:
        needs_clusters()
    x, w, group_sizes = matrices(sizes, 640, n)
    a, b = quantize.quantize_tiles(x), quantize.quantize_blocks(w.swapaxes(1, 2))
    got = hopper.fp8_grouped_matmul(a, b, group_sizes, form=form, interpret=interpret)
    want = np.asarray(reference.fp8_grouped_matmul(a, b, group_sizes, out_dtype=jnp.float32))
    # Tensor cores sum E4M3 products to about 13 bits: an error relative to the largest sums.
    atol = 1e-2 if interpret else 2.0**-11 * np.abs(want).max()
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=2.0**-8, atol=atol)


@simulated_and_real
@pytest.mark.parametrize("n", [64, 384])
def test_one_of_a_stack(n, interpret):
    """The matrices of a layer's groups, out of those of all layers; rows of no group included."""
    x, _, group_sizes = matrices([9, 0, 30], 256, n, padding=5)
    of_layers = [matrices([9, 0, 30], 256, n, seed)[1].swapaxes(1, 2) for seed in range(3)]
    layers = [quantize.quantize_blocks(w) for w in of_layers]
    stack = jax.tree.map(lambda *each: jnp.stack(each), *layers)
    multiply = functools.partial(hopper.fp8_grouped_matmul, interpret=interpret)
    a = quantize.quantize_tiles(x)
    for layer, alone in enumerate(layers):
        got = multiply(a, stack._replace(layer=jnp.int32(layer)), group_sizes)
        np.testing.assert_array_equal(got, multiply(a, alone, group_sizes))


@simulated_and_real
@pytest.mark.parametrize("sizes", [[100, 0, 28, 77], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("padding", [3, 200])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_rows_past_the_last_group_are_zero(fp8, padding, sizes, interpret):
    n = 256 if fp8 and padding == 200 else 320  # in clusters
    if interpret and n == 256:
        needs_clusters()
    x, w, group_sizes = matrices(sizes, 128, n, padding=padding)
    want = reference.grouped_matmul(x, w, group_sizes, out_dtype=jnp.float32)
    assert np.isfinite(want).all()
    if fp8:
        a, b = quantize.quantize_tiles(x), quantize.quantize_blocks(w.swapaxes(1, 2))
        form = hopper.TALL if padding == 3 else hopper.THREE
        got = hopper.fp8_grouped_matmul(a, b, group_sizes, form=form, interpret=interpret)
    else:
        got = hopper.grouped_matmul(x, w, group_sizes, interpret=interpret)
    assert (np.asarray(got, np.float32)[sum(sizes) :] == 0).all()
    tolerance = 0.05 * float(np.abs(want).max()) if fp8 else 1e-2
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=2.0**-8, atol=tolerance)


@simulated_and_real
def test_one_chunk_of_columns(interpret):
    x, w, group_sizes = matrices([5, 60], 128, 64)
    want = reference.grouped_matmul(x, w, group_sizes, out_dtype=jnp.float32)
    assert_near(hopper.grouped_matmul(x, w, group_sizes, interpret=interpret), want)
    a, b = quantize.quantize_tiles(x), quantize.quantize_blocks(w.swapaxes(1, 2))
    got = hopper.fp8_grouped_matmul(a, b, group_sizes, interpret=interpret)
    assert got.shape == want.shape
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=0.1 * np.abs(want).max())


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("transpose_w", [False, True])
def test_lowers_without_a_device(fp8, transpose_w):
    shape = jax.ShapeDtypeStruct
    m, k, n, groups = 1000, 2048, 7168, 8
    group_sizes = shape((groups,), jnp.int32)
    if fp8:
        a = Quantized(shape((m, k), reference.E4M3), shape((k // 128, m), jnp.float32))
        scales = shape((groups, n // 128, k // 128), jnp.float32)
        b = Quantized(shape((groups, n, k), reference.E4M3), scales)
        traced = jax.jit(hopper.fp8_grouped_matmul).trace(a, b, group_sizes)
    else:
        w = shape((groups, n, k) if transpose_w else (groups, k, n), jnp.bfloat16)
        multiply = functools.partial(hopper.grouped_matmul, transpose_w=transpose_w)
        traced = jax.jit(multiply).trace(shape((m, k), jnp.bfloat16), w, group_sizes)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_shapes_it_cannot_do_are_named():
    x, w, group_sizes = matrices([8], 96, 64)
    with pytest.raises(ValueError, match="multiples of 64, not 96 and 64"):
        hopper.grouped_matmul(x, w, group_sizes)
