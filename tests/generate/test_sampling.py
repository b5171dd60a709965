"""Distributions of sampled and of verified tokens, against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.generate.sampling import SAMPLE, Controls, draw, log_probs, verify

PROBS = np.array([0.5, 0.3, 0.15, 0.05])
ROWS = 20_000


def controls(rows, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, seed=0):
    keys = jax.random.key_data(jax.random.split(jax.random.key(seed), rows))
    full = [jnp.full((rows,), x, jnp.float32) for x in (temperature, top_p)]
    return Controls(*full, jnp.full((rows,), top_k), jnp.full((rows,), min_p, jnp.float32), keys)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, PROBS),
        ({"top_p": 0.7}, [0.625, 0.375, 0, 0]),  # 0.5 does not reach 0.7, 0.5 + 0.3 does
        ({"top_p": 0.8}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
        ({"top_k": 3}, [*PROBS[:3], 0]),
        ({"top_k": 9}, PROBS),
        # Of the three likeliest, renormalised: 0.526 + 0.316 reaches 0.84, not 0.5 + 0.3.
        ({"top_k": 3, "top_p": 0.84}, [0.625, 0.375, 0, 0]),
        ({"min_p": 0.29}, [*PROBS[:3], 0]),
        ({"min_p": 0.31}, [0.625, 0.375, 0, 0]),
        ({"temperature": 0.5}, PROBS**2),
        ({"temperature": 0.0, "top_p": 0.5, "min_p": 0.5}, [1, 0, 0, 0]),
    ],
)
def test_sampling_distribution(options, expected):
    logits = jnp.asarray(np.log(PROBS)[None] + 3, jnp.float32)
    found = np.exp(log_probs(logits, controls(1, **options)))[0]
    np.testing.assert_allclose(found, np.asarray(expected) / np.sum(expected), atol=1e-6)


def test_rows_keep_their_own_parameters():
    each = [{}, {"top_p": 0.7}, {"top_k": 1}, {"temperature": 0.0}, {"min_p": 0.2}]
    together = jax.tree.map(lambda *x: jnp.concatenate(x), *(controls(1, **o) for o in each))
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((5, 30)), jnp.float32)
    found = log_probs(logits, together)
    for row, options in enumerate(each):
        alone = log_probs(logits[row : row + 1], controls(1, **options))
        np.testing.assert_array_equal(found[row], alone[0])


def chi_squared(counts, expected):
    """Below 5 sigma of the statistic's own distribution (mean df, variance 2 df)."""
    expected = np.asarray(expected, np.float64)
    assert not counts[expected == 0].any()
    kept = expected > 0
    statistic = ((counts - counts.sum() * expected) ** 2)[kept] / (counts.sum() * expected[kept])
    df = kept.sum() - 1
    return statistic.sum() < df + 5 * np.sqrt(2 * df)


def test_draws_follow_the_distribution():
    options = controls(ROWS)
    tiled = jnp.tile(jnp.log(jnp.asarray(PROBS, jnp.float32)), (ROWS, 1))
    drawn = draw(tiled, options, jnp.zeros(ROWS, jnp.int32), SAMPLE)
    assert chi_squared(np.bincount(drawn, minlength=4), PROBS)
    again = draw(tiled, options, jnp.ones(ROWS, jnp.int32), SAMPLE)
    both = np.bincount(4 * drawn + again, minlength=16)
    assert chi_squared(both, np.outer(PROBS, PROBS).ravel())  # positions are independent


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_verified_tokens_are_distributed_as_without_a_draft(top_p):
    """Two drafts from wrong distributions; whole continuations of three tokens counted."""
    rng = np.random.default_rng(1)
    V, k = 4, 2
    options = controls(ROWS * 4, top_p=top_p, seed=5)
    n = len(options.top_p_B)
    # p depends on the token before it, as a language model's does; so does q.
    p_logits = jnp.asarray(rng.standard_normal((V, V)) * 1.5, jnp.float32)
    q_logits = jnp.asarray(rng.standard_normal((V, V)) * 1.5, jnp.float32)

    def of(table, token_B):
        return log_probs(table[token_B], options)

    token_B, drafts, qs = jnp.zeros(n, jnp.int32), [], []
    for j in range(k):
        qs.append(of(q_logits, token_B))
        token_B = draw(qs[-1], options, jnp.full(n, j), 1)
        drafts.append(token_B)
    drafts_Bk = jnp.stack(drafts, 1)
    before = jnp.concatenate([jnp.zeros((n, 1), jnp.int32), drafts_Bk], 1)
    p_BjV = jnp.stack([of(p_logits, before[:, j]) for j in range(k + 1)], 1)
    count_B, next_B = verify(drafts_Bk, jnp.stack(qs, 1), p_BjV, options, jnp.zeros(n, jnp.int32))
    assert 0.05 < (count_B == k).mean() < 0.95
    # The tokens that come out, and as many more from p as are missing from three.
    out = [jnp.where(j < count_B, drafts_Bk[:, j], next_B) for j in range(k)] + [next_B]
    for j in range(1, k + 1):
        fresh = draw(of(p_logits, out[j - 1]), options, jnp.full(n, j), 7)
        out[j] = jnp.where(j <= count_B, out[j], fresh)
    p = np.exp(np.stack([log_probs(p_logits, controls(V, top_p=top_p))]))[0]
    expected = np.einsum("a,ab,bc->abc", p[0], p, p).ravel()
    counts = np.bincount(np.asarray((out[0] * V + out[1]) * V + out[2]), minlength=V**3)
    assert chi_squared(counts, expected)


def test_a_draft_from_the_same_distribution_is_always_accepted():
    options = controls(500)
    p = jnp.tile(jnp.log(jnp.asarray(PROBS, jnp.float32)), (500, 2, 1))
    drafts = draw(p[:, 0], options, jnp.zeros(500, jnp.int32), 1)[:, None]
    count_B, next_B = verify(drafts, p[:, :1], p, options, jnp.zeros(500, jnp.int32))
    assert (count_B == 1).all()
    assert set(np.unique(next_B)) == {0, 1, 2, 3}
