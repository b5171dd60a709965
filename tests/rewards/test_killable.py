"""Functions in another process, and sums of rewards that fail."""

import contextlib
import re
import threading
import time

import numpy as np
import pytest

from deepseek_jax.rewards import Completion, Killable, RewardSum, Sample, Term, numeric
from deepseek_jax.rewards.killable import Failed, Hung
from deepseek_jax.types import UserError
from tests.rewards.helpers import double, misbehave


def test_calls_are_served_by_one_process():
    with Killable(double) as remote:
        assert [remote(x) for x in (1, "a", [2])] == [2, "aa", [2, 2]]
        assert remote("x" * 200_000) == "x" * 400_000  # larger than a pipe
        assert remote.restarts == 0


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("hang", Hung),
        ("hang in C", Hung),
        ("raise", Failed),
        ("die", Failed),
        ("memory", Failed),
        ("flood", Failed),
        ("not JSON", Failed),
    ],
)
def test_whatever_a_call_does_the_next_one_is_served(how, error):
    with Killable(misbehave, deadline_s=0.5) as remote:
        assert remote("well") == "done"
        began = time.monotonic()
        with pytest.raises(error):
            remote(how)
        assert time.monotonic() - began < 3
        assert remote("well") == "done"


def test_what_is_printed_is_no_answer():
    with Killable(misbehave) as remote:
        assert remote("print") == "done"


def test_only_what_can_be_imported():
    with pytest.raises(UserError, match="lambda"):
        Killable(lambda: 0)


def test_no_process_is_left():
    remote = Killable(double)
    remote(1)
    process = remote._process
    remote.close()
    assert process.poll() is not None


# --- sums -------------------------------------------------------------------------------------

SAMPLES = [Sample("", Completion(f"<answer>{x}</answer>", 3), "1") for x in (1, 2, 3)]


def constant(prompt, completion, reference):
    return 0.5


def raises_sometimes(prompt, completion, reference):
    if "2" in completion.text:
        raise RuntimeError("two")
    return 1


def hangs_sometimes(prompt, completion, reference):
    while "3" in completion.text:
        with contextlib.suppress(Exception):  # what the signal raises must get past this
            time.sleep(0.001)
    return 1.0


def backtracks(prompt, completion, reference):
    return float(bool(re.fullmatch(r"(a+)+", "a" * 60 + "b")))


def test_each_term_is_reported_apart():
    report = RewardSum([Term("right", 1.0, numeric), Term("half", 0.2, constant)])(SAMPLES)
    np.testing.assert_allclose(report.rewards_KB, [[1, 0, 0], [0.5] * 3])
    np.testing.assert_allclose(report.total_B, [1.1, 0.1, 0.1])
    assert report.first_error is None
    assert report.metrics() == pytest.approx(
        {"reward": 1.3 / 3, "reward/right": 1 / 3, "reward/half": 0.5}
    )


def test_a_term_judges_what_it_is_for():
    """What it does not judge is neither in its mean nor in the sum, and is not put to it."""
    asked = []

    class Model:
        def score(self, samples):
            asked.extend(samples)
            return [0.25] * len(samples)

    general = Sample("", Completion("hello", 1), "", general=True)
    terms = [Term("right", 1.0, numeric, "reasoning"), Term("liked", 2.0, Model(), "general")]
    report = RewardSum([*terms, Term("half", 1.0, constant)])([*SAMPLES, general])
    np.testing.assert_array_equal(report.rewards_KB[0], [1, 0, 0, np.nan])
    np.testing.assert_array_equal(report.rewards_KB[1], [np.nan] * 3 + [0.25])
    np.testing.assert_allclose(report.total_B, [1.5, 0.5, 0.5, 1.0])
    assert asked == [general]
    assert report.raised_K.sum() == 0
    assert report.metrics() == pytest.approx(
        {"reward": 3.5 / 4, "reward/right": 1 / 3, "reward/liked": 0.25, "reward/half": 0.5}
    )
    assert "reward/liked" not in RewardSum(terms)(SAMPLES).metrics()


def test_failures_are_bounded_counted_and_worth_nothing():
    began = time.monotonic()
    terms = [
        Term("raises", 1.0, raises_sometimes),
        Term("hangs", 1.0, hangs_sometimes),
        Term("backtracks", 1.0, backtracks),
        Term("nan", 1.0, lambda *_: float("nan")),
        Term("half", 1.0, constant),
    ]
    report = RewardSum(terms, deadline_s=0.2)(SAMPLES)
    assert time.monotonic() - began < 5
    np.testing.assert_array_equal(
        report.rewards_KB, [[1, 0, 1], [1, 1, 0], [0, 0, 0], [0, 0, 0], [0.5] * 3]
    )
    assert report.raised_K.tolist() == [1, 0, 0, 3, 0]
    assert report.hung_K.tolist() == [0, 1, 3, 0, 0]
    assert "two" in (report.first_error or "")
    metrics = report.metrics()
    assert metrics["reward_raised/raises"] == 1
    assert metrics["reward_hung/backtracks"] == 3


def test_a_judge_that_fails_costs_its_term_alone():
    class Judge:
        def __init__(self, grades):
            self.grades = grades

        def score(self, samples):
            return self.grades

    for grades, failed in (([0.1, 0.2, 0.3], 0), ([0.1, float("nan"), 0.3], 1), ([0.1], 3)):
        report = RewardSum([Term("judge", 1.0, Judge(grades)), Term("half", 1.0, constant)])(
            SAMPLES
        )
        assert report.raised_K.tolist() == [failed, 0]
        assert (report.rewards_KB[1] == 0.5).all()


def test_outside_the_main_thread_only_what_bounds_itself():
    errors, reports = [], []

    class Bounded:
        deadline_s = 1.0

        def __call__(self, prompt, completion, reference):
            return 1.0

    def work():
        reports.append(RewardSum([Term("own", 1.0, Bounded())])(SAMPLES))
        try:
            RewardSum([Term("half", 1.0, constant)])(SAMPLES)
        except UserError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert reports[0].total_B.tolist() == [1, 1, 1]
    assert "main thread" in errors[0]


def test_bad_sums_are_refused():
    for terms in ([], [Term("a", 1.0, constant)] * 2, [Term("a", float("nan"), constant)]):
        with pytest.raises(UserError):
            RewardSum(terms)


def test_a_worker_ends_with_its_parent():
    """It reads lines from its parent; when that is gone there are none."""
    with Killable(double) as remote:
        remote(1)
        process = remote._process
        process.stdin.close()
        assert process.wait(5) == 0
