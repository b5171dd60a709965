"""Gradients of the whole loss equal torch autograd's, for every parameter; causality."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from deepseek_jax import DeepSeekV3, forward  # noqa: E402
from deepseek_jax.config import FLOAT32  # noqa: E402
from deepseek_jax.model.transformer import abstract_params  # noqa: E402
from tests.reference.test_logits import CONFIGS, V3  # noqa: E402
from tests.reference.torch_models import our_params, torch_model  # noqa: E402


@pytest.mark.parametrize(
    "name",
    ["v3_yarn", "v2_lite"]
    + [pytest.param(x, marks=pytest.mark.slow) for x in ("v3", "kimi_k2", "moonlight", "v2_yarn")],
)
def test_gradients_equal_those_of_torch(name, tmp_path):
    config = CONFIGS[name]
    model = torch_model(config)
    params, router_bias = our_params(config, model, tmp_path / "weights")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 41))

    def loss(params):
        logits = forward(config, params, router_bias, jnp.asarray(tokens[:, :-1]))
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    compiled = jax.jit(jax.value_and_grad(loss))
    our_loss, ours = compiled(params)
    logits = model(torch.from_numpy(tokens[:, :-1])).logits
    their_loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(tokens[:, 1:]).flatten()
    )
    their_loss.backward()
    for parameter in model.parameters():  # the gradient takes the parameter's way into our layout
        gradient = parameter.grad
        parameter.data = torch.zeros_like(parameter) if gradient is None else gradient
    theirs, _ = our_params(config, model, tmp_path / "gradients")

    np.testing.assert_allclose(our_loss, their_loss.item(), rtol=1e-5)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert np.abs(b).max() > 0, f"{path}: no gradient to compare"
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max(), err_msg=str(path))


def test_no_logit_sees_the_future():
    """Gradient of logits at i with respect to the embedding of token j: zero for j > i (+ depth).

    MTP depth k reads the embeddings up to token i + k beside the states up to i.
    """
    config = V3.replace(num_nextn_predict_layers=2)
    model = DeepSeekV3(config, FLOAT32)
    random = np.random.default_rng(0)
    params = jax.tree.map(  # running the initialisers would take most of this test's time
        lambda x: jnp.asarray(0.3 * random.standard_normal(x.shape), x.dtype),
        abstract_params(model),
    )
    bias = jnp.asarray(random.standard_normal((config.num_routers, 12)), jnp.float32)
    T, at = 10, 5
    # Each position has a token of its own, so that a row of the embedding is a position.
    tokens = jnp.arange(T)[None]

    def energy(embed, depth):
        out = model.apply({"params": params | {"embed": embed}}, tokens, bias)
        all_logits = (out.logits_BTV, *out.mtp_logits)
        return jnp.stack([jnp.sum(jnp.sin(logits[0, at])) for logits in all_logits])[depth]

    seen = jax.jit(jax.grad(energy))
    for depth in range(3):
        gradient = jnp.abs(seen(params["embed"], depth)[:T]).sum(-1)
        assert (gradient[: at + depth + 1] > 0).all(), f"depth {depth} misses some of its past"
        assert (gradient[at + depth + 1 :] == 0).all(), f"depth {depth} sees the future"
