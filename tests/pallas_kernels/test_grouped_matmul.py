"""Grouped matmul against one NumPy product per group, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul import grouped_matmul


def reference(x, w, sizes):
    ends = np.cumsum(sizes)
    parts = [
        x[end - size : end] @ w[g] for g, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]
    return np.concatenate(parts)


def run(x, w, sizes, impl="blocked"):
    return grouped_matmul(jnp.asarray(x), jnp.asarray(w), jnp.array(sizes, jnp.int32), impl=impl)


def draw(sizes, K=12, N=7, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((sum(sizes), K)), rng.standard_normal((len(sizes), K, N))
    return x.astype(dtype), w.astype(dtype)


@pytest.mark.parametrize("impl", ["blocked", "ragged_dot"])
@pytest.mark.parametrize(
    "sizes", [[5, 0, 300, 1], [0, 0, 4], [400, 0, 0], [128, 128], [1], [0, 257, 127, 0]]
)
def test_equals_one_product_per_group(impl, sizes):
    x, w = draw(sizes)
    out = run(x, w, sizes, impl)
    np.testing.assert_allclose(out, reference(x, w, sizes), rtol=1e-5, atol=1e-5)


@jax.jit
def cotangents(x, w, sizes, dy):
    return jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, impl="blocked"), x, w)[1](dy)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 5), min_size=4, max_size=4).filter(sum), st.integers(0, 10**6))
def test_gradients_equal_those_of_the_products(weights, seed):
    # One shape (it is compiled once), any split of the rows over the groups.
    rng = np.random.default_rng(seed)
    sizes = rng.multinomial(200, np.array(weights) / sum(weights))
    x, w = draw(sizes, seed=seed)
    dy = rng.standard_normal((200, 7)).astype(np.float32)
    dx, dw = cotangents(x, w, jnp.asarray(sizes, jnp.int32), dy)
    ends = np.cumsum(sizes)
    for g, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        rows = slice(end - size, end)
        np.testing.assert_allclose(dx[rows], dy[rows] @ w[g].T, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(dw[g], x[rows].T @ dy[rows], rtol=1e-4, atol=1e-4)


def test_bfloat16_sums_in_float32():
    sizes = [64, 64]
    x, w = draw(sizes, K=4096, N=4)
    out = grouped_matmul(
        jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16), jnp.array(sizes, jnp.int32)
    )
    rounded = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (x, w)]
    expected = reference(*rounded, sizes)
    # One rounding of the result, 2^-9 relative; summing in bfloat16 would be off by tens of that.
    assert out.dtype == jnp.bfloat16
    scale = np.abs(expected).max()
    assert np.abs(np.asarray(out, np.float64) - expected).max() <= 2**-8 * scale


def test_other_groups_garbage_does_not_leak():
    sizes = [3, 130, 2]
    x, w = draw(sizes)
    clean = run(x, w, sizes)
    x = x.copy()
    x[3:133] = np.nan
    dirty = run(x, w, sizes)
    np.testing.assert_array_equal(
        np.delete(dirty, range(3, 133), 0), np.delete(clean, range(3, 133), 0)
    )
