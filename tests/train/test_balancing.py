"""The bias mends a skewed router, and it is the bias that does (V3 section 2.1.2)."""

import pytest

from benchmarks.balancing import stdlib_batches, violations


@pytest.mark.slow
def test_bias_balances_a_skewed_router_and_its_absence_does_not():
    mended = violations(stdlib_batches(), bias_speed=0.01, steps=260)
    left = violations(stdlib_batches(), bias_speed=0.0, steps=100)
    assert mended[0] == left[0] == 3.0  # 8 experts, all tokens on the same 2
    assert mended[0] / mended[-20:].mean() >= 5
    assert left[0] / left[-20:].mean() < 1.5
