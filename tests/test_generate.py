"""Sampling: greedy against the full forward, the nucleus, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import DeepSeekV3, UserError, forward, init_params, init_router_bias
from deepseek_jax.config import FLOAT32
from deepseek_jax.generate import generate, sample
from tests.configs import MICRO, quick_jit

CONFIG = MICRO.replace(num_nextn_predict_layers=0, num_hidden_layers=2, max_position_embeddings=32)


def setup():
    model = DeepSeekV3(CONFIG, FLOAT32)
    params = quick_jit(lambda key: init_params(model, key))(jax.random.key(0))
    return model, params, init_router_bias(CONFIG)


def test_greedy_is_the_argmax_of_the_full_forward():
    model, params, bias = setup()
    prompts = jnp.array([[3, 1, 4, 1], [2, 7, 1, 8]], jnp.int32)
    new = generate(model, params, bias, prompts, jax.random.key(0), max_new_tokens=6, temperature=0)
    whole = jnp.concatenate([prompts, new], axis=1)
    logits = quick_jit(lambda t: forward(CONFIG, params, bias, t))(whole)
    np.testing.assert_array_equal(new, jnp.argmax(logits[:, 3:-1], -1))


def test_the_same_key_gives_the_same_text_and_another_another():
    model, params, bias = setup()
    prompts = jnp.array([[5, 6]], jnp.int32)

    def text(seed):
        key = jax.random.key(seed)
        options = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 1.0}
        return np.asarray(generate(model, params, bias, prompts, key, **options)).tolist()

    assert text(0) == text(0) != text(1)


def test_nucleus_keeps_the_likeliest_and_their_proportions():
    probs = np.array([0.5, 0.3, 0.15, 0.05])
    logits = jnp.tile(jnp.log(jnp.asarray(probs, jnp.float32)), (20_000, 1))
    drawn = np.asarray(sample(logits, jax.random.key(0), temperature=1.0, top_p=0.7))
    counts = np.bincount(drawn, minlength=4) / len(drawn)
    # 0.5 does not reach 0.7, 0.5 + 0.3 does. Four standard deviations of a share of 20,000.
    np.testing.assert_allclose(counts, [0.625, 0.375, 0, 0], atol=4 * (0.25 / 20_000) ** 0.5)
    cold = np.asarray(sample(logits, jax.random.key(1), temperature=0.5, top_p=1.0))
    expected = probs**2 / (probs**2).sum()
    np.testing.assert_allclose(np.bincount(cold, minlength=4) / 20_000, expected, atol=0.015)


@pytest.mark.parametrize(
    ("prompt", "new", "named"),
    [([[]], 4, "empty"), ([[61]], 4, "61"), ([[-1]], 4, "vocabulary"), ([[1]], 32, "32")],
)
def test_bad_prompts_are_refused(prompt, new, named):
    model, params, bias = setup()
    prompts = jnp.array(prompt, jnp.int32).reshape(1, -1)
    with pytest.raises(UserError, match=named):
        generate(model, params, bias, prompts, jax.random.key(0), max_new_tokens=new)
