"""The TPU's grouped FP8 kernels, simulated, against the reference (which test_linear checks)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import grouped_matmul, quantize, reference
from pallas_kernels.tpu import grouped_matmul as tpu

# Empty groups, groups within a block of 256 rows and across several, and rows of no group.
# All of one shape, so that one compilation serves them.
ROWS = 520
SIZES = [[100, 0, 300, 77], [0, 0, 0, 0], [516, 3, 1, 0], [0, 256, 256, 0], [0, 0, 5, 0]]
each_sizes = pytest.mark.parametrize("sizes", SIZES, ids=str)

in_fp32 = jax.jit(functools.partial(reference.fp8_grouped_matmul, out_dtype=jnp.float32))
ragged = jax.jit(reference.quantize_tiles_ragged)
row_visits = jax.jit(tpu.row_visits, static_argnums=(1, 2))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 31, 32, 33, 100]), min_size=6, max_size=6))
def test_visits_own_every_row_once_and_in_order(sizes):
    m = 6 * 100 + 5
    block, group, low, high = map(np.asarray, row_visits(jnp.asarray(sizes, jnp.int32), m, 32))
    owner = np.full(m, -1)
    for visit in range(len(block)):
        rows = slice(low[visit], high[visit])
        assert (owner[rows] == -1).all()
        owner[rows] = group[visit]
        if low[visit] < high[visit]:
            assert block[visit] * 32 <= low[visit] < high[visit] <= (block[visit] + 1) * 32
    np.testing.assert_array_equal(owner, np.repeat(np.arange(7), [*sizes, m - sum(sizes)]))
    # What is kept from one visit to the next is kept on chip only while the block stays the same.
    assert (np.diff(block) >= 0).all()
    assert (np.diff(block) <= 1).all()
    # No visit multiplies rows of padding, and each group has at most two blocks that are not full.
    assert sum((group < 6) & (low < high)) <= sum(-(-size // 32) + 1 for size in sizes if size)


def draw(sizes, k, n):
    """Rows, gradients and matrices; the rows of the padding are NaN."""
    rng = np.random.default_rng(0)
    rows = sum(sizes)
    x, dy = (rng.standard_normal((ROWS, width)) for width in (k, n))
    x[rows:], dy[rows:] = np.nan, np.nan
    w = rng.standard_normal((len(sizes), n, k))
    x, dy, w = (jnp.asarray(a, jnp.float32) for a in (x, dy, w))
    return x, dy, w, jnp.asarray(sizes, jnp.int32)


def assert_close(got, want, out_dtype):
    assert got.dtype == out_dtype
    assert np.isfinite(want).all()
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    rtol = 2.0**-8 if out_dtype == jnp.bfloat16 else 0
    np.testing.assert_allclose(got, want, rtol=rtol, atol=2e-6 * max(np.abs(want).max(), 1))


@functools.partial(jax.jit, static_argnames=("f", "out_dtype"))
def run(f, *args, out_dtype):
    return f(*args, out_dtype=out_dtype, interpret=True)


@each_sizes
@pytest.mark.parametrize(
    ("k", "n", "out_dtype"), [(1152, 640, jnp.float32), (256, 128, jnp.bfloat16)]
)
def test_rows(k, n, out_dtype, sizes):
    x, _, w, group_sizes = draw(sizes, k, n)
    a, b = quantize.quantize_tiles(x), quantize.quantize_blocks(w)
    got = run(tpu.fp8_grouped_matmul, a, b, group_sizes, out_dtype=out_dtype)
    want = in_fp32(a, b, group_sizes)
    assert_close(got, want, out_dtype)
    assert (np.asarray(got, np.float32)[sum(sizes) :] == 0).all()


@each_sizes
@pytest.mark.parametrize(
    ("k", "n", "out_dtype"), [(640, 256, jnp.bfloat16), (128, 1152, jnp.float32)]
)
def test_weight_gradients(k, n, out_dtype, sizes):
    x, dy, _, group_sizes = draw(sizes, k, n)
    tiles = quantize.ragged_tiles(group_sizes, ROWS)
    a, b = (ragged(z, tiles) for z in (x, dy))
    # What lies in tiles of no group must not matter.
    a = a._replace(scale=a.scale.at[int(tiles.count[0]) :].set(jnp.nan))
    got = run(tpu.fp8_grouped_wgrad, a, b, tiles, out_dtype=out_dtype)
    want = jax.jit(reference.fp8_grouped_wgrad)(a, b, tiles)
    assert_close(got, want, out_dtype)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="asks for what a CPU lacks")
def test_explicit_impl_never_falls_back():
    x, _, w, group_sizes = draw([128, 0], 128, 128)
    a, b = quantize.quantize_tiles(x), quantize.quantize_blocks(w)
    with pytest.raises(ValueError, match="interpret mode"):
        grouped_matmul.fp8_grouped_matmul(a, b, group_sizes, impl="tpu")
    a, b = quantize.quantize_tiles(x[:, :100]), quantize.quantize_blocks(w[:, :, :100])
    with pytest.raises(ValueError, match="multiples of 128"):
        grouped_matmul.fp8_grouped_matmul(a, b, group_sizes, impl="tpu")
