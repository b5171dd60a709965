"""The package by itself: its examples, and what it says to operands that do not fit."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import backend, linear, quantize, reference
from pallas_kernels.grouped_matmul import fp8_grouped_matmul, fp8_grouped_wgrad, grouped_matmul
from pallas_kernels.matmul import fp8_matmul
from pallas_kernels.mla_attention import mla_decode
from pallas_kernels.quantize import ragged_tiles

TWO = jnp.asarray([5, 3], jnp.int32)


def test_the_examples():
    found = doctest.testmod(pallas_kernels)
    assert (found.attempted, found.failed) == (9, 0)


def unchecked(function):
    """Without the check of shapes and types that all tests run under, which users do not have."""
    return function.__wrapped__


def quantized(M, G, N, K):
    x, w = jnp.ones((M, K), jnp.bfloat16), jnp.ones((G, N, K))
    return quantize.quantize_tiles(x), quantize.quantize_blocks(w)


@pytest.mark.parametrize("impl", ["auto", "hopper", "tpu", "blocked"])
def test_rows_and_matrices_must_fit(impl):
    x = jnp.ones((8, 128))
    plain = unchecked(grouped_matmul)
    with pytest.raises(ValueError, match="grouped_matmul: rows have K = 128, the matrices K = 256"):
        plain(x, jnp.ones((2, 256, 64)), TWO, impl=impl)
    with pytest.raises(ValueError, match="grouped_matmul: 2 group sizes for 3 matrices"):
        plain(x, jnp.ones((3, 128, 64)), TWO, impl=impl)


def test_quantized_rows_and_matrices_must_fit():
    plain = unchecked(fp8_grouped_matmul)
    a, b = quantized(8, 2, 128, 256)
    with pytest.raises(ValueError, match="rows have K = 128, the matrices K = 256"):
        plain(quantized(8, 2, 128, 128)[0], b, TWO)
    with pytest.raises(ValueError, match="2 group sizes for 3 matrices"):
        plain(a, quantized(8, 3, 128, 256)[1], TWO)
    in_tiles = b._replace(scale=jnp.ones((2, 2, 128)))
    with pytest.raises(ValueError, match="rows need 1x128 tile scales, matrices 128x128 blocks"):
        plain(a, in_tiles, TWO)
    tiles = ragged_tiles(TWO, 8)
    with pytest.raises(ValueError, match="tiles of different rows, 256 and 128"):
        unchecked(fp8_grouped_wgrad)(a, quantized(8, 2, 128, 128)[0], tiles)


def test_an_unknown_implementation_is_refused():
    x, (a, b) = jnp.ones((8, 128)), quantized(8, 1, 128, 128)
    b = b._replace(values=b.values[0], scale=b.scale[0])
    cache = jnp.ones((1, 1, 64, 512)), jnp.ones((1, 1, 64, 64))
    queries = jnp.ones((1, 1, 4, 512)), jnp.ones((1, 1, 4, 64))
    for call in (
        lambda: unchecked(fp8_matmul)(a, b, impl="hoper"),
        lambda: unchecked(grouped_matmul)(x, jnp.ones((2, 128, 8)), TWO, impl="hoper"),
        lambda: unchecked(mla_decode)(*queries, *cache, TWO[:1], 0, scale=1.0, impl="hoper"),
        lambda: backend.check_impl("quantize_tiles", "hoper", ("auto", "hopper", "reference")),
    ):
        with pytest.raises(ValueError, match="has no implementation 'hoper': give one of"):
            call()


@pytest.mark.parametrize("x", [jnp.ones((2, 3, 128)), jnp.ones((2, 128), jnp.int32)])
def test_activations_are_a_matrix_of_numbers(x):
    with pytest.raises(ValueError, match="x must be a floating point matrix"):
        unchecked(linear.fp8_linear)(x, jnp.ones((128, 128)))


def test_no_rows_at_all():
    """A device whose experts nobody has chosen."""
    none, x = jnp.zeros((2,), jnp.int32), jnp.ones((0, 128), jnp.bfloat16)
    w = jnp.ones((2, 128, 256))

    def both(x, w):
        return linear.fp8_linear(x, w[0]), linear.fp8_grouped_linear(x, w, none)

    (dense, grouped), vjp = jax.vjp(both, x, w)
    assert dense.shape == grouped.shape == (0, 256)
    dx, dw = vjp((dense, grouped))
    assert dx.shape == x.shape
    np.testing.assert_array_equal(dw, jnp.zeros_like(w))
    a, b = quantized(1, 2, 256, 128)
    none_of_a = a._replace(values=a.values[:0], scale=a.scale[:, :0])
    assert fp8_grouped_matmul(none_of_a, b, none, impl="hopper").shape == (0, 256)


@pytest.mark.parametrize("k", [128, 200, 256])
def test_matrices_of_groups_are_dequantized_as_each_is(k):
    w = (
        jax.random.normal(jax.random.key(0), (3, 256, k))
        * jnp.asarray([1, 10, 100.0])[:, None, None]
    )
    q = quantize.quantize_blocks(w)
    got = reference.dequantize(q)
    for g in range(3):
        alone = quantize.quantize_blocks(w[g])
        np.testing.assert_array_equal(got[g], reference.dequantize(alone))
