"""Bytes of the expert axis: the closed form against dice, against the router, against bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import preset
from deepseek_jax.model.moe import route
from deepseek_jax.plan import traffic
from tests.configs import MICRO

V3 = preset("v3")


@pytest.mark.parametrize("devices", [1, 2, 4, 8, 16, 64, 256])
@pytest.mark.parametrize("model", ["v3", "v2", "v2_lite", "kimi_k2"])
def test_expected_receivers_by_throwing_dice(model, devices):
    config = preset(model)
    if config.n_routed_experts % devices:
        pytest.skip("experts do not divide")
    E, G, g, K = (
        config.n_routed_experts,
        config.n_group,
        config.topk_group,
        config.num_experts_per_tok,
    )
    rng, draws = np.random.default_rng(0), 4000
    kept = rng.random((draws, G)).argsort(1)[:, :g]
    open_DE = np.zeros((draws, G, E // G), bool)
    np.put_along_axis(open_DE, kept[..., None], True, axis=1)
    chances = np.where(open_DE.reshape(draws, E), rng.random((draws, E)), -1)
    chosen = chances.argsort(1)[:, -K:] // (E // devices)
    counts = np.array([len(set(row)) for row in chosen])
    expected = traffic.expected_receivers(config, devices)
    assert abs(counts.mean() - expected) <= 4 * counts.std() / draws**0.5 + 1e-9
    assert counts.max() <= traffic.most_receivers(config, devices)


def test_receivers_at_the_ends():
    assert traffic.expected_receivers(V3, 1) == pytest.approx(1)
    assert traffic.expected_receivers(V3, 256) == pytest.approx(8)  # an expert a device: K
    assert traffic.most_receivers(V3, 8) == 4  # node-limited: topk_group
    assert traffic.most_receivers(V3, 64) == 8
    assert traffic.most_receivers(V3, 4) == 4
    assert traffic.most_receivers(MICRO, 8) == 3


@pytest.mark.parametrize(("devices", "apart"), [(8, 0.10), (64, 0.03)])
def test_the_router_itself_comes_near(devices, apart):
    """Its groups are kept for their two best experts, so choices spread a little wider."""
    logits = jax.random.normal(jax.random.key(0), (1, 4000, 256))
    chosen = np.asarray(route(logits, jnp.zeros(256), V3).experts_BTK)[0] // (256 // devices)
    mean = np.mean([len(set(row)) for row in chosen])
    expected = traffic.expected_receivers(V3, devices)
    assert expected < mean < expected * (1 + apart)
    assert mean < traffic.most_receivers(V3, devices)


def test_bytes_per_token():
    row = traffic.row_bytes(V3)
    assert row.bf16 == 14_336
    assert row.fp8 == 7168 + 4 * 56
    there = traffic.token_traffic(V3, 64, receivers=8.0)
    assert there.dispatch_bf16 == there.combine_bf16 == 8 * 63 / 64 * 14_336
    assert there.dispatch_fp8 == 8 * 63 / 64 * 7392
    assert there.fp8 / there.bf16 == pytest.approx(0.758, abs=1e-3)
    assert traffic.token_traffic(V3, 1).bf16 == 0
    assert traffic.ring_traffic(V3, 1) == 0
    assert traffic.ring_traffic(V3, 64) == 64 * (6 * 7168 + 8 * 8)
