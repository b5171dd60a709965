"""math-verify behind a deadline, and without its leniency."""

import time

import pytest

from deepseek_jax.rewards import Completion, MathEquivalence, RewardSum, Sample, Term
from deepseek_jax.rewards.equivalence import hedged
from deepseek_jax.types import UserError

pytest.importorskip("math_verify")


@pytest.fixture(scope="module")
def equivalent():
    with MathEquivalence(deadline_s=1.5) as reward:

        def of(answer, reference):
            return reward("", Completion(f"So it is \\boxed{{{answer}}}.", 9), reference)

        of.reward = reward
        yield of


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("1/2", "0.5"),
        ("\\frac12", "0.5"),
        ("42.0", "42"),
        ("x = 42", "42"),
        ("1,234", "1234"),
        ("$42$", "42"),
        ("(x+1)^2", "x^2+2x+1"),
        ("2\\sqrt{2}", "\\sqrt{8}"),
        ("\\{2, 1\\}", "\\{1,2\\}"),
        ("(1, 2)", "(1,2)"),
        ("x > 3", "x > 3"),
        ("42 or 41", "41 or 42"),
    ],
)
def test_equivalent(equivalent, answer, reference):
    assert equivalent(answer, reference) == 1


@pytest.mark.parametrize(
    "answer",
    [
        "41 or 42",
        "42 or 41",
        "42\\text{ or }41",
        "\\text{42 or 41}",
        "41, 42",
        "42; 41",
        "41 42",
        "42(41)",
        "42\\quad 41",
        "42 \\lor 41",
        "42 \\pm 1",
        "x=42=41",
        "42 is right, 41 is not",
        "\\approx 42",
        "$41$ $42$",
        "43",
        "\\text{forty-two}",
        "",
    ],
)
def test_not_42(equivalent, answer):
    assert equivalent(answer, "42") == 0


def test_an_answer_must_be_marked(equivalent):
    for text in (
        "It is 42.",
        "$42$",
        "42",
        "<think>\\boxed{42}</think>",
        "<answer>41}{42</answer>",
    ):
        assert equivalent.reward("", Completion(text, 3), "42") == 0


def test_what_never_ends_is_ended_and_counted(equivalent):
    began = time.monotonic()
    answers = ("9^{9^{9^9}}", "84/2", "10000000!")
    samples = [Sample("", Completion(f"\\boxed{{{x}}}", 3), "42") for x in answers]
    report = RewardSum([Term("math", 1.0, equivalent.reward)])(samples)
    assert time.monotonic() - began < 15  # the process is started again, too
    assert report.total_B.tolist() == [0, 1, 0]
    assert report.hung_K.tolist() == [2]
    assert "Hung" in (report.first_error or "")


def test_a_reference_that_cannot_be_read_is_named(equivalent):
    with pytest.raises(UserError, match="cannot read"):
        equivalent("42", "")


def test_hedges():
    assert hedged("1 or 2", "1")
    assert not hedged("1 or 2", "1 or 2")
    assert not hedged("\\sqrt{2}", "\\sqrt{2}")
    assert not hedged("\\oring", "1")  # no word within a command
