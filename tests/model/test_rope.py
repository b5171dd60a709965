"""Rotation of a part of every head, and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import Yarn
from deepseek_jax.model.rope import apply_rope, rope_tables, rotate_last
from tests.configs import MICRO

ROTATED = MICRO.qk_rope_head_dim
POSITIONS = jnp.array([[0, 1, 2, 50, 1000], [3, 1, 0, 7, 11]])


def _plain(x_BTNX, cos_BTp, sin_BTp):
    first = x_BTNX.shape[-1] - ROTATED
    rotated = apply_rope(x_BTNX[..., first:], cos_BTp, sin_BTp)
    return jnp.concatenate([x_BTNX[..., :first], rotated], axis=-1)


@pytest.mark.parametrize("width", [ROTATED, ROTATED + 1, 3 * ROTATED])
def test_rotation_of_the_last_numbers_and_its_gradient(width):
    """Also where nothing, or little, is left as it is."""
    tables = rope_tables(MICRO, POSITIONS)
    x, gradient = jax.random.normal(jax.random.key(0), (2, 2, 5, 3, width))
    want, want_back = jax.vjp(lambda x: _plain(x, *tables), x)
    got, back = jax.vjp(lambda x: rotate_last(x, *tables), x)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(back(gradient)[0], want_back(gradient)[0], atol=1e-6)
    # A rotation back and forth, since no YaRN stretches it here.
    np.testing.assert_allclose(back(got)[0], x, atol=1e-6)


def test_the_gradient_in_bfloat16_of_a_stretched_rotation():
    """With tables that YaRN scales; V3's are not scaled, since there both of its numbers are 1."""
    yarn = Yarn(factor=40.0, mscale=1.0, mscale_all_dim=0.5, original_max_position_embeddings=8)
    tables = rope_tables(MICRO.replace(rope_scaling=yarn), POSITIONS)
    assert float(tables[0].max()) == pytest.approx((0.1 * np.log(40) + 1) / (0.05 * np.log(40) + 1))
    x, gradient = jax.random.normal(jax.random.key(1), (2, 2, 5, 3, 3 * ROTATED), jnp.bfloat16)
    got, back = jax.vjp(lambda x: rotate_last(x, *tables), x)
    want, want_back = jax.vjp(lambda x: _plain(x, *tables), x)
    np.testing.assert_array_equal(got.astype(jnp.float32), want.astype(jnp.float32))
    got, want = (f(gradient)[0].astype(jnp.float32) for f in (back, want_back))
    np.testing.assert_allclose(got, want, rtol=2**-7, atol=2**-6)


def test_the_gradient_is_not_put_together_from_padded_halves():
    tables = rope_tables(MICRO, jnp.arange(5)[None])
    x = jnp.ones((1, 5, 3, 3 * ROTATED))

    def pads(rotate):
        program = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(rotate(x, *tables) ** 2)))(x)
        return str(program).count(" pad[")

    assert pads(_plain) > 0
    assert pads(rotate_last) == 0
