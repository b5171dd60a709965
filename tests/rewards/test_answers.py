"""Which answer counts, and what it is compared as. Every case here is a way to cheat, or isn't."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.rewards import (
    Completion,
    exact,
    multiple_choice,
    numeric,
    think_answer_format,
    think_format,
)
from deepseek_jax.rewards.answers import balanced, boxed, extract_answer, last_boxed, parse_number
from deepseek_jax.types import UserError

OPENED = "Solve it.\nAssistant: <think>"


def said(text):
    return Completion(text, len(text.split()))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>42</answer>", "42"),
        ("<think>so</think> <answer> 42\n</answer>", "42"),
        ("<think>so</think> it is \\boxed{42}.", "42"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("<answer>it is \\boxed{42}</answer>", "42"),
        ("before <think>so</think> <answer>42</answer>", "42"),
        # Nothing within the thinking counts.
        ("<think><answer>42</answer></think>", None),
        ("<think>\\boxed{42}</think> done", None),
        ("<think>\\boxed{41} <answer>41</answer></think> \\boxed{42}", "42"),
        # The thinking is malformed.
        ("<think>so <answer>42</answer>", None),
        ("so</think></think><answer>42</answer>", None),
        ("<think>a</think><think>b</think><answer>42</answer>", None),
        ("</think><answer>42</answer><think>", None),
        # Several answers are none.
        ("<answer>41</answer><answer>42</answer>", None),
        ("<answer>42</answer> <answer>42</answer>", None),
        ("<answer>41 <answer>42</answer></answer>", None),
        ("<answer>42</answer></answer>", None),
        ("\\boxed{41} \\boxed{42}", None),
        ("\\boxed{41\\boxed{42}}", None),
        ("\\boxed{42} <answer>42</answer>", None),
        ("<answer>\\boxed{41}\\boxed{42}</answer>", None),
        # No answer.
        ("", None),
        ("42", None),
        ("<answer></answer>", None),
        ("<answer> \n</answer>", None),
        ("\\boxed{}", None),
        ("\\boxed{42", None),
        ("</answer>42<answer>", None),
        ("<answer>42", None),
        ("<ANSWER>42</ANSWER>", None),
        # Out of one box and into another.
        ("<answer>41}\\boxed{42</answer>", None),
    ],
)
def test_one_answer_outside_the_thinking(text, answer):
    assert extract_answer("What is 6 times 7?", text) == answer


def test_a_prompt_may_have_opened_the_thinking():
    assert extract_answer(OPENED, "so</think><answer>42</answer>") == "42"
    assert extract_answer(OPENED, "so <answer>42</answer>") is None
    assert extract_answer(OPENED, "<think>so</think><answer>42</answer>") is None


@given(st.text(alphabet="{}\\boxed 1", max_size=40))
def test_boxes_are_balanced(text):
    assert all(balanced(content) for content in boxed(text))


def test_the_last_box_of_a_worked_solution():
    assert last_boxed("so \\boxed{1}, and \\boxed{\\frac{2}{3}}.") == "\\frac{2}{3}"
    assert last_boxed("none") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("-42", -42),
        ("+42", 42),
        (" 0042 ", 42),
        ("42.0", 42),
        (".5", Fraction(1, 2)),
        ("1,234,567", 1234567),
        ("1.5e3", 1500),
        ("1e-2", Fraction(1, 100)),
        ("-3/4", Fraction(-3, 4)),
        # Decimal digits of any script count as their value, and so does a typographic minus.
        ("٤٢", 42),
        ("４２", 42),
        ("−42", -42),
        ("४२.५", Fraction(85, 2)),
        # Other characters that look like numbers do not.
        ("4²", None),
        ("½", None),
        ("Ⅷ", None),
        ("四十二", None),
        ("", None),
        ("-", None),
        (".", None),
        ("4 2", None),
        ("42.", None),
        ("1,23", None),
        ("1234,567", None),
        ("1/0", None),
        ("1/2/3", None),
        ("1.5/2", None),
        ("42%", None),
        ("$42", None),
        ("0x2a", None),
        ("4_2", None),
        ("nan", None),
        ("inf", None),
        ("41 or 42", None),
        ("40+2", None),
        ("--42", None),
        ("1e999999999", None),
        ("9" * 1000, None),
    ],
)
def test_numbers(text, value):
    assert parse_number(text) == value


@given(st.text(max_size=30))
def test_any_text_is_a_number_or_is_not(text):
    value = parse_number(text)
    assert value is None or isinstance(value, Fraction)


@given(st.integers(), st.integers(min_value=1))
def test_numbers_are_exact(a, b):
    assert parse_number(f"{a}/{b}") == Fraction(a, b)


def test_numeric_exact_and_choice():
    for answer, right in (("42", 1), ("42.00", 1), ("84/2", 1), ("41", 0), ("41 or 42", 0)):
        assert numeric("", said(f"<answer>{answer}</answer>"), "42") == right
    for answer, right in (("New  York", 1), ("New\nYork", 1), ("new york", 0), ("York", 0)):
        assert exact("", said(f"<answer>{answer}</answer>"), "New York ") == right
    for answer, right in (("B", 1), ("(b)", 1), ("B.", 1), ("A", 0), ("A or B", 0), ("AB", 0)):
        assert multiple_choice("", said(f"<answer>{answer}</answer>"), "B") == right
    for reward, reference in ((numeric, "42"), (exact, "42"), (multiple_choice, "B")):
        assert reward("", said(""), reference) == 0


@pytest.mark.parametrize(("reward", "reference"), [(numeric, "many"), (multiple_choice, "AB")])
def test_a_reference_of_the_wrong_kind_is_named(reward, reference):
    with pytest.raises(UserError, match=reference):
        reward("", said("<answer>42</answer>"), reference)


@pytest.mark.parametrize(
    ("text", "strict", "loose"),
    [
        ("<think>so</think><answer>42</answer>", 1, 1),
        ("\n<think>so</think>\n\n<answer>42</answer>\n", 1, 1),
        ("<think>so</think> It is \\boxed{42}.", 0, 1),
        ("<think>so</think><answer>42</answer> indeed", 0, 1),
        ("well <think>so</think><answer>42</answer>", 0, 0),
        ("<think> </think><answer>42</answer>", 0, 0),
        ("<think>so</think><answer> </answer>", 0, 1),
        ("<think>so</think>", 0, 0),
        ("<answer>42</answer>", 0, 0),
        ("<answer>42</answer><think>so</think>", 0, 0),
        ("<think>so</think><answer>1</answer><answer>2</answer>", 0, 1),
        ("<think><answer>1</answer></think><answer>2</answer>", 0, 1),
        ("<think><think>so</think><answer>42</answer>", 0, 0),
        ("", 0, 0),
    ],
)
def test_formats(text, strict, loose):
    assert think_answer_format("", said(text), "") == strict
    assert think_format("", said(text), "") == loose
    if text.startswith("<think>"):
        rest = text.removeprefix("<think>")
        assert think_answer_format(OPENED, said(rest), "") == strict
        assert think_format(OPENED, said(rest), "") == loose
