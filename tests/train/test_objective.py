"""GRPO's objectives against a NumPy version written from the papers, in loops and float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import Batch
from deepseek_jax.train import objective
from deepseek_jax.train.objective import (
    ObjectiveConfig,
    group_advantages,
    has_spread,
    policy_loss,
    step_totals,
    without_truncated,
)
from deepseek_jax.types import Rollout, UserError

B, T, MAX_TOKENS = 6, 9, 8
CLIPS = {"grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}


def arrays(seed=0, spread=0.3):
    """Log-probabilities of four policies near one another, advantages, and ragged masks."""
    rng = np.random.default_rng(seed)
    logp = -rng.exponential(1.0, (B, T))
    near = [logp + spread * rng.standard_normal((B, T)) for _ in range(3)]
    advantages = rng.standard_normal(B)
    mask = np.zeros((B, T))
    for row, (first, length) in enumerate([(2, 5), (0, 1), (3, 6), (4, 2), (1, 8), (5, 0)]):
        mask[row, first : first + length] = 1
    return [np.asarray(x, np.float32) for x in (logp, *near, advantages, mask)]


def rollout_of(old, ref, sampler, advantages, mask):
    ids = jnp.zeros(mask.shape, jnp.int32)
    batch = Batch(ids, ids, jnp.asarray(mask), ids, ids + 1)
    optional = [None if x is None else jnp.asarray(x) for x in (old, ref, sampler)]
    return Rollout(batch, jnp.asarray(advantages), *optional)


def by_hand(
    logp, old, ref, sampler, advantages, mask, *, variant, clip, beta=0.0, kl="k3", cap=None,
    threshold=None,
):  # fmt: skip
    """The loss of a step in float64, completion by completion and token by token."""
    logp, old, ref, sampler, advantages, mask = (
        np.asarray(x, np.float64) for x in (logp, old, ref, sampler, advantages, mask)
    )
    low, high = clip
    counted = [i for i in range(len(logp)) if mask[i].any()]
    all_tokens = mask.sum()
    total = 0.0
    for i in counted:
        tokens = np.flatnonzero(mask[i])
        log_ratios = logp[i, tokens] - old[i, tokens]
        mismatch = old[i, tokens] - sampler[i, tokens]
        if variant == "gspo":
            log_ratios = np.full(len(tokens), log_ratios.mean())
            mismatch = np.full(len(tokens), mismatch.mean())
        drift = (sampler[i, tokens] - logp[i, tokens]).mean()
        dropped = threshold is not None and advantages[i] < 0 and drift > threshold
        losses = []
        for t, log_ratio, gap in zip(tokens, log_ratios, mismatch, strict=True):
            ratio = np.exp(log_ratio)
            surrogate = min(
                ratio * advantages[i], min(max(ratio, 1 - low), 1 + high) * advantages[i]
            )
            loss = 0.0 if dropped else -surrogate
            if cap is not None:
                loss *= min(np.exp(gap), cap)
            x = ref[i, t] - logp[i, t]
            k3 = np.exp(x) - x - 1
            token_ratio = np.exp(logp[i, t] - old[i, t])
            loss += beta * {"k2": x * x / 2, "k3": k3, "unbiased": token_ratio * k3}[kl]
            losses.append(loss)
        if variant in ("grpo", "gspo"):
            total += np.mean(losses) / len(counted)
        elif variant == "dr_grpo":
            total += np.sum(losses) / MAX_TOKENS / len(counted)
        else:
            total += np.sum(losses) / all_tokens
    return total


def loss_of(logp, rollout, totals, config):
    return policy_loss(logp, rollout, totals, config, MAX_TOKENS)


def numeric_gradient(f, x, h=1e-6):
    x = np.asarray(x, np.float64)
    grad = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += h
        down[index] -= h
        grad[index] = (f(up) - f(down)) / (2 * h)
    return grad


OPTIONS = {
    "plain": {},
    "k2": {"beta": 0.1, "kl": "k2"},
    "k3": {"beta": 0.1, "kl": "k3"},
    "unbiased": {"beta": 0.1, "kl": "unbiased"},
    "importance": {"cap": 1.1},
    "off-policy mask": {"threshold": 0.02, "beta": 0.05},
    "all": {"beta": 0.1, "kl": "unbiased", "cap": 1.2, "threshold": 0.02},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("variant", CLIPS)
def test_loss_and_gradient_equal_numpy(variant, options):
    logp, old, ref, sampler, advantages, mask = arrays(spread=0.003 if variant == "gspo" else 0.3)
    if variant == "gspo" and "threshold" in options:
        options = options | {"threshold": 0.0005}
    config = ObjectiveConfig(
        variant,
        kl_coef=options.get("beta", 0.0),
        kl=options.get("kl", "k3"),
        importance_cap=options.get("cap"),
        off_policy_threshold=options.get("threshold"),
    )
    rollout = rollout_of(old, ref, sampler, advantages, mask)

    def ours(logp):
        return policy_loss(logp, rollout, step_totals(jnp.asarray(mask)), config, MAX_TOKENS)

    (loss, metrics), grad = jax.jit(jax.value_and_grad(ours, has_aux=True))(jnp.asarray(logp))

    def theirs(logp):
        return by_hand(
            logp, old, ref, sampler, advantages, mask, variant=variant, clip=CLIPS[variant],
            **options,
        )  # fmt: skip

    assert float(loss) == pytest.approx(theirs(logp), rel=2e-5, abs=1e-6)
    np.testing.assert_allclose(grad, numeric_gradient(theirs, logp), rtol=2e-3, atol=2e-6)
    assert np.abs(grad).max() > 1e-3
    assert (np.asarray(grad)[mask == 0] == 0).all()
    # Something was clipped, and dropped where asked: the case is not vacuous.
    assert metrics["clipped_low"] + metrics["clipped_high"] > 0
    if "threshold" in options:
        assert 0 < metrics["off_policy_dropped"] < 1
    if "cap" in options:
        assert 0 < metrics["importance_weight"] < options["cap"]


@pytest.mark.parametrize("variant", CLIPS)
def test_micro_batches_add_up_to_the_step(variant):
    logp, *rest = arrays()
    config = ObjectiveConfig(variant, kl_coef=0.1)
    totals = step_totals(jnp.asarray(rest[-1]))

    def share(rows):
        parts = [x[rows] for x in rest]
        f = jax.jit(functools.partial(loss_of, totals=totals, config=config))
        return f(jnp.asarray(logp[rows]), rollout_of(*parts))

    whole, metrics = share(slice(None))
    parts = [share(slice(i, i + 2)) for i in range(0, B, 2)]
    assert float(sum(p[0] for p in parts)) == pytest.approx(float(whole), rel=1e-5)
    for name, value in metrics.items():
        assert float(sum(p[1][name] for p in parts)) == pytest.approx(float(value), abs=1e-6)


@pytest.mark.parametrize("variant", CLIPS)
def test_on_policy_the_ratio_is_exactly_one(variant):
    logp, _, ref, _, advantages, mask = arrays()
    config = ObjectiveConfig(variant, kl_coef=0.0)
    totals = step_totals(jnp.asarray(mask))
    outcomes = []
    for old in (logp, None):  # kept from the rollout, or left out for one update per rollout
        rollout = rollout_of(old, ref, None, advantages, mask)
        f = functools.partial(loss_of, rollout=rollout, totals=totals, config=config)
        (loss, metrics), grad = jax.jit(jax.value_and_grad(f, has_aux=True))(jnp.asarray(logp))
        assert float(metrics["ratio"]) == pytest.approx(1, abs=1e-6)
        assert metrics["clipped_low"] == metrics["clipped_high"] == 0
        outcomes.append((loss, grad))
    np.testing.assert_array_equal(outcomes[0][1], outcomes[1][1])
    # REINFORCE: on-policy every variant pushes each token by minus its advantage.
    signs = -np.sign(advantages)[:, None] * mask
    np.testing.assert_array_equal(np.sign(outcomes[0][1]), signs)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_no_policy_gradient(scale):
    rewards = jnp.asarray([[0.1] * 3, [0.7] * 3], jnp.float32)  # means round away from both
    advantages = group_advantages(rewards, scale)
    assert (np.asarray(advantages) == 0).all()
    logp, old, ref, sampler, _, mask = arrays()
    rollout = rollout_of(old, ref, sampler, advantages.reshape(-1), mask)
    grad = jax.grad(
        lambda x: policy_loss(
            x, rollout, step_totals(jnp.asarray(mask)), ObjectiveConfig(kl_coef=0.0), MAX_TOKENS
        )[0]
    )(jnp.asarray(logp))
    assert (np.asarray(grad) == 0).all()


def test_the_policy_term_of_a_first_update_is_zero_and_its_gradient_is_not():
    logp, _, _, _, _, mask = arrays()
    advantages = group_advantages(jnp.asarray([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]), "group")
    mask = np.ones_like(mask)
    rollout = rollout_of(None, None, None, advantages.reshape(-1), mask)
    loss, grad = jax.value_and_grad(
        lambda x: policy_loss(
            x, rollout, step_totals(jnp.asarray(mask)), ObjectiveConfig(kl_coef=0.0), MAX_TOKENS
        )[0]
    )(jnp.asarray(logp))
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert np.abs(grad).max() > 0.01


def test_advantages_equal_numpy():
    rewards = np.random.default_rng(0).random((5, 4))
    rewards[2] = 0.3
    centred = rewards - rewards.mean(1, keepdims=True)
    expected = {
        "none": centred,
        "batch": centred / rewards.std(),
        "group": centred / np.maximum(rewards.std(1, keepdims=True), 1e-9),
    }
    expected["group"][2] = 0
    for scale, want in expected.items():
        got = group_advantages(jnp.asarray(rewards, jnp.float32), scale)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    assert has_spread(jnp.asarray(rewards)).tolist() == [True, True, False, True, True]


def test_what_lies_outside_completions_cannot_matter():
    logp, old, ref, sampler, advantages, mask = arrays()
    config = ObjectiveConfig(kl_coef=0.1, importance_cap=2.0, off_policy_threshold=0.1)
    totals = step_totals(jnp.asarray(mask))

    f = functools.partial(loss_of, totals=totals, config=config)
    step = jax.jit(jax.value_and_grad(f, has_aux=True))

    def value_and_grad(*four):
        return step(four[0], rollout_of(*four[1:], advantages, mask))

    clean = value_and_grad(*(jnp.asarray(x) for x in (logp, old, ref, sampler)))
    for garbage in (np.nan, np.inf, -1e30):
        dirty = (jnp.where(mask > 0, x, garbage) for x in (logp, old, ref, sampler))
        jax.tree.map(np.testing.assert_array_equal, clean, value_and_grad(*dirty))


def test_a_ratio_that_overflows_gives_no_nan():
    logp, old, ref, sampler, advantages, mask = arrays()
    far = rollout_of(old - 500, ref + 500, sampler, advantages, mask)
    config = ObjectiveConfig("dapo", kl_coef=0.1, kl="unbiased")
    grad = jax.grad(
        lambda x: policy_loss(x, far, step_totals(jnp.asarray(mask)), config, 8)[0]
    )(jnp.asarray(logp))  # fmt: skip
    assert np.isfinite(grad).all()


def test_truncated_completions_leave_the_mask():
    mask = jnp.ones((3, 2))
    kept = without_truncated(mask, jnp.asarray([False, True, False]))
    assert kept.tolist() == [[1, 1], [0, 0], [1, 1]]
    assert step_totals(kept).sequences == 2


# --- KL ---------------------------------------------------------------------------------------


def kl_setting():
    """Two distributions over a few tokens; expectations are exact sums."""
    rng = np.random.default_rng(3)
    return (jnp.asarray(rng.standard_normal(7), jnp.float32) for _ in range(3))


def expected_gradient(estimator):
    """E over v ~ pi of d estimator(v) / d logits, on-policy, and the KL's own gradient."""
    logits, ref_logits, _ = kl_setting()
    ref = jax.nn.log_softmax(ref_logits)
    probabilities = jax.nn.softmax(logits)

    def expectation(logits):
        log_pi = jax.nn.log_softmax(logits)
        return (probabilities * estimator(ref - log_pi, log_pi)).sum()

    def kl(logits):
        log_pi = jax.nn.log_softmax(logits)
        return (jnp.exp(log_pi) * (log_pi - ref)).sum()

    return jax.grad(expectation)(logits), jax.grad(kl)(logits)


def row(f):
    return lambda x, _: f(x[None])[0]


def unbiased(x, log_pi):
    ratio = jnp.exp(log_pi - jax.lax.stop_gradient(log_pi))
    return objective.kl_unbiased(x[None], ratio[None])[0]


def test_k1_as_a_loss_restrains_nothing():
    grad, kl_grad = expected_gradient(row(objective.kl_k1))
    assert np.abs(grad).max() < 1e-6
    assert np.abs(kl_grad).max() > 0.1
    with pytest.raises(Exception, match="k1"):  # the types' checker in tests, UserError elsewhere
        ObjectiveConfig(kl="k1")


@pytest.mark.parametrize("estimator", [row(objective.kl_k2), unbiased], ids=["k2", "unbiased"])
def test_k2_and_the_unbiased_form_have_the_gradient_of_the_kl(estimator):
    grad, kl_grad = expected_gradient(estimator)
    np.testing.assert_allclose(grad, kl_grad, atol=1e-5)


def test_k3_has_the_gradient_of_the_other_direction():
    """E_pi[(1 - ref/pi) d log pi] = d KL(ref || pi): it restrains, by another measure."""
    grad, _ = expected_gradient(row(objective.kl_k3))
    logits, ref_logits, _ = kl_setting()
    ref = jax.nn.log_softmax(ref_logits)
    forward = jax.grad(lambda x: (jnp.exp(ref) * (ref - jax.nn.log_softmax(x))).sum())(logits)
    np.testing.assert_allclose(grad, forward, atol=1e-5)


def test_off_policy_only_the_unbiased_form_keeps_the_gradient():
    logits, ref_logits, old_logits = kl_setting()
    ref, old = jax.nn.log_softmax(ref_logits), jax.nn.log_softmax(old_logits)

    def expectation(logits, estimator):
        log_pi = jax.nn.log_softmax(logits)
        return (jnp.exp(old) * estimator(ref - log_pi, jnp.exp(log_pi - old))).sum()

    def kl(logits):
        log_pi = jax.nn.log_softmax(logits)
        return (jnp.exp(log_pi) * (log_pi - ref)).sum()

    want = jax.grad(kl)(logits)
    right = jax.grad(expectation)(
        logits, lambda x, ratio: objective.kl_unbiased(x[None], ratio[None])[0]
    )
    np.testing.assert_allclose(right, want, atol=1e-5)
    for biased in (objective.kl_k2, objective.kl_k3):
        assert np.abs(jax.grad(expectation)(logits, row(biased)) - want).max() > 0.05


def test_estimators_as_figures():
    """Under pi, k1 and k3 average to the KL exactly; k3 is never negative."""
    logits, ref_logits, _ = kl_setting()
    log_pi, ref = jax.nn.log_softmax(logits), jax.nn.log_softmax(ref_logits)
    kl = float((jnp.exp(log_pi) * (log_pi - ref)).sum())
    for estimator in (objective.kl_k1, objective.kl_k3):
        mean = float((jnp.exp(log_pi) * estimator((ref - log_pi)[None])[0]).sum())
        assert mean == pytest.approx(kl, rel=1e-4)
    assert (objective.kl_k3((ref - log_pi)[None]) >= 0).all()


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"clip_low": -0.1},
        {"clip_high": float("nan")},
        {"kl_coef": -1.0},
        {"importance_cap": 0.0},
    ],
)
def test_settings_without_meaning_are_refused(options):
    with pytest.raises(UserError):
        ObjectiveConfig(**options)


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        (ObjectiveConfig(), "reference"),
        (ObjectiveConfig("dapo", importance_cap=2.0), "sampler"),
        (ObjectiveConfig("dapo", off_policy_threshold=0.1), "sampler"),
    ],
)
def test_log_probabilities_that_are_missing_are_named(config, missing):
    logp, old, _, _, advantages, mask = arrays()
    rollout = rollout_of(old, None, None, advantages, mask)
    with pytest.raises(UserError, match=missing):
        policy_loss(jnp.asarray(logp), rollout, step_totals(jnp.asarray(mask)), config, 8)
