"""Bytes of the expert axis: the closed form against dice, against the router, against bounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from deepseek_jax import preset, sharding
from deepseek_jax.config import Precision
from deepseek_jax.model.dispatch import ExpertParallel
from deepseek_jax.model.moe import route
from deepseek_jax.model.transformer import (
    DeepSeekV3,
    abstract_params,
    decode_step,
    init_cache,
    init_router_bias,
)
from deepseek_jax.plan import hlo, traffic
from deepseek_jax.plan.collectives import collectives
from deepseek_jax.plan.command import PlanConfig, plan
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


def test_the_ring_compiled_sends_what_it_does_on_paper():
    """On 8 devices, forward: tokens, ids, gates and sums, once round, in each MoE layer."""
    config = MICRO.replace(num_nextn_predict_layers=0)
    mesh = sharding.make_mesh("expert=8")
    ring = ExpertParallel(dispatcher="ring")
    model = DeepSeekV3(config, Precision(compute="float32"), parallel=ring)
    rows, tokens = 16, 5
    cache = jax.eval_shape(lambda: init_cache(config, rows, 8))
    with jax.set_mesh(mesh):
        program = (
            jax.jit(functools.partial(decode_step, model))
            .lower(
                abstract_params(model),
                init_router_bias(config),
                jax.ShapeDtypeStruct((rows, tokens), jnp.int32),
                cache,
            )
            .compile()
        )
    sent = collectives(hlo.parse(program.as_text()), mesh.shape)
    around = sum(one.total for one in sent if one.kind == "collective-permute")
    here = rows // 8 * tokens * config.num_moe_layers
    # The paper's tokens are bfloat16, these are float32: 2 D more on each of the 8 hops.
    assert around == here * (traffic.ring_traffic(config, 8) + 8 * 2 * config.hidden_size)


@pytest.mark.slow
def test_the_step_that_plan_compiles_sends_what_it_does_on_paper(tmp_path):
    """V3's routing over 64 devices, narrow otherwise: within 10% of the paper's bytes.

    The buffers have room for the most devices a token can go to, and the exchanges are what the
    compiler made of forward, recomputation and backward pass.
    """
    pytest.importorskip("libtpu")
    config = V3.replace(
        vocab_size=512,
        hidden_size=512,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_nextn_predict_layers=0,
        num_attention_heads=4,
        q_lora_rank=128,
        intermediate_size=256,
        moe_intermediate_size=128,
    )
    tokens = 256
    wanted = PlanConfig(
        model=config, topology="v5p:4x4x4", mesh="expert=64", batch=64, seq=tokens, out=tmp_path
    )
    (found,) = plan(wanted, Console(quiet=True))
    key = ("ragged-all-to-all", "expert")
    paper = tokens * traffic.step_traffic(config, 64, "full")
    assert found.sent()[key] == pytest.approx(paper, rel=0.10)
    # Dispatch alone, by what its buffers hold: only that is there without an assumption.
    buffers = {
        one.name: one.sent
        for one in found.collectives
        if one.kind == key[0] and one.rows == tokens * traffic.most_receivers(config, 64)
    }
    dispatch = tokens * traffic.token_traffic(config, 64).dispatch_bf16
    assert max(buffers.values()) == pytest.approx(dispatch, rel=0.10)
    assert max(buffers.values()) > dispatch
