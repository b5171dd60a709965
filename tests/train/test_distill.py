"""Distillation: the divergence is that of plain JAX, on any mesh, and a run comes closer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import sharding
from deepseek_jax.config import FLOAT32
from deepseek_jax.data.sft import ConversationConfig
from deepseek_jax.report import read_metrics
from deepseek_jax.train import losses
from deepseek_jax.train.distill import DistillConfig, top_k_divergence
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.optim import OptimConfig
from deepseek_jax.train.sft import SftConfig, sft
from deepseek_jax.types import UserError
from tests.train import runs

M, D, V, K = 13, 6, 20, 5


def random(shape, seed):
    return jax.random.normal(jax.random.key(seed), shape)


STUDENT = (random((M, D), 0), random((D, V), 1))
TEACHER = (random((M, D + 2), 2), random((D + 2, V), 3))
WEIGHTS = (jnp.arange(M) % 3 > 0).astype(jnp.float32)


def plain(student, k):
    """All logits at once."""
    hidden, head = student
    top, ids = jax.lax.top_k(TEACHER[0] @ TEACHER[1], k)
    p = jax.nn.softmax(top)
    q_log = jnp.take_along_axis(jax.nn.log_softmax(hidden @ head), ids, axis=1)
    return ((p * (jnp.log(p) - q_log)).sum(-1) * WEIGHTS).sum()


@pytest.mark.parametrize("k", [1, K, V])
def test_chunks_are_the_whole(k, monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 2 * V * 4)  # four rows at a time

    def chunked(student):
        return top_k_divergence(*student, *TEACHER, WEIGHTS, k)

    ours, gradient = jax.value_and_grad(chunked)(STUDENT)
    expected, reference = jax.value_and_grad(functools.partial(plain, k=k))(STUDENT)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    for a, b in zip(gradient, reference, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_the_teachers_own_logits_diverge_by_nothing():
    hidden, head = TEACHER
    nothing = top_k_divergence(hidden, head, hidden, head, WEIGHTS, V)
    np.testing.assert_allclose(nothing, 0, atol=1e-5)


def test_a_vocabulary_in_parts_is_the_whole():
    mesh = sharding.make_mesh("tensor=4,data=2")
    spec = sharding.spec(None, "vocab")

    def local(hidden, head, teacher_head):
        loss, pullback = jax.vjp(
            lambda h, w: top_k_divergence(h, w, TEACHER[0], teacher_head, WEIGHTS, K), hidden, head
        )
        dhidden, dhead = pullback(jnp.full_like(loss, 1 / sharding.replicas()))
        return loss, *sharding.sum_gradients((dhidden, dhead), (sharding.spec(), spec))

    with jax.set_mesh(mesh):
        out_specs = (sharding.spec(), sharding.spec(), spec)
        run = sharding.per_device(local, (sharding.spec(), spec, spec), out_specs)
        loss, *gradient = jax.jit(run)(*STUDENT, TEACHER[1])
    expected, reference = jax.value_and_grad(functools.partial(plain, k=K))(STUDENT)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for a, b in zip(gradient, reference, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_run_comes_closer_to_its_teacher(tmp_path):
    base = runs.write_base(tmp_path / "base")
    teacher = runs.write_base(tmp_path / "teacher", hidden_size=48, num_nextn_predict_layers=0)
    data = tmp_path / "talks.jsonl"
    data.write_text('{"prompt": "why", "completion": "because of this and that"}\n' * 4)
    talks = ConversationConfig(data=(str(data),), held_out=(str(data),), seq_len=64)
    config = SftConfig(
        out=tmp_path / "out",
        init=base,
        mesh="fsdp=2,data=2,tensor=2",
        precision=FLOAT32,
        epochs=None,
        conversations=talks,
        loop=LoopConfig(steps=12, batch_size=4, eval_every=0),
        optim=OptimConfig(peak_lr=1e-2, warmup_steps=0),
        samples=0,
        distill=DistillConfig(teacher=teacher, teacher_weight=1.0, teacher_top_k=266),
    )
    assert sft(config) is not None
    rows = read_metrics(tmp_path / "out/metrics.jsonl")
    assert rows[-2]["teacher_divergence"] < 0.7 * rows[0]["teacher_divergence"]


def test_a_weight_that_is_no_share():
    with pytest.raises(UserError, match="teacher_weight lies between 0 and 1"):
        DistillConfig(teacher_weight=1.5)
