"""Products and lookups: what is rounded where, and what a GPU is given to multiply."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import Precision, sharding
from deepseek_jax.model.layers import contract, linear, linears, lookup, tokens_whole


def test_a_token_seen_often_does_not_stop_learning():
    """In bfloat16 a sum of ones ends at 256."""
    table = jnp.zeros((3, 4), jnp.bfloat16)
    tokens = jnp.array([[2] * 1000 + [0]])
    gradient = jax.grad(lambda t: lookup(t, tokens).astype(jnp.float32).sum())(table)
    np.testing.assert_array_equal(gradient.astype(jnp.float32)[:, 0], [1, 0, 1000])


@pytest.mark.parametrize("inputs", [(8,), (4, 8)])
def test_a_row_alone_is_multiplied_as_a_matrix_on_a_gpu(monkeypatch, inputs):
    """A vector would have XLA copy the matrix to float32 first."""
    contracted = len(inputs)
    x = jax.random.normal(jax.random.key(0), (1, 1, *inputs), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (*inputs, 6), jnp.bfloat16)
    expected = contract(x, w, contracted, "float32")
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")

    def product(x, w):
        return contract(x, w, contracted, "float32")

    got = product(x, w)
    assert got.shape == expected.shape == (1, 1, 6)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    dots = [e for e in jax.make_jaxpr(product)(x, w).eqns if e.primitive.name == "dot_general"]
    assert [e.outvars[0].aval.shape for e in dots] == [(2, 6)]


def test_a_row_alone_is_laid_out_token_by_token_on_a_gpu(monkeypatch):
    """Else XLA may put the tokens side by side, and gathering one reads a number at a time."""
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")

    def layouts(rows):
        eqns = jax.make_jaxpr(tokens_whole)(jnp.zeros((rows, 5, 8))).eqns
        return [e.params["layout"].major_to_minor for e in eqns]

    assert layouts(1) == [(0, 1, 2)]
    assert layouts(2) == []
    x = jnp.arange(40.0).reshape(1, 5, 8)
    y, pullback = jax.vjp(jax.jit(tokens_whole), x)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(pullback(2 * x)[0], 2 * x)


@pytest.mark.parametrize("matmuls", ["compute", "fp8"])
@pytest.mark.parametrize("widths", [(2, 64), (24,)], ids=str)
def test_several_products_of_one_input_are_each_its_own(matmuls, widths):
    """In FP8 also where a block of scales would belong to two of them."""
    precision = Precision(compute="float32", matmuls=matmuls)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 3, 256))
    ws = [jax.random.normal(k, (256, *w)) for k, w in zip(keys[1:], (widths, (40,)), strict=True)]
    together = linears(x, ws, precision)
    for one, w in zip(together, ws, strict=True):
        assert one.shape == (2, 3, *w.shape[1:])
        np.testing.assert_allclose(one, linear(x, w, precision), rtol=1e-5, atol=1e-4)
