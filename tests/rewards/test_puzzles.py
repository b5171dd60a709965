"""Verifiers of puzzles: strict, and nothing in an answer is run."""

import json
import time

import pytest

from deepseek_jax.rewards import Completion, exact, numeric
from deepseek_jax.rewards.puzzles import countdown, number_list, reward_for, word_list
from deepseek_jax.types import UserError

PUZZLE = json.dumps({"numbers": [6, 61, 94, 4], "target": 309})


def said(answer):
    return Completion(f"<answer>{answer}</answer>", 5)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("94*4 - 61 - 6", 1),
        ("(94 * 4) - (61 + 6)", 1),
        ("94*4 - 61 - 6 = 309", 0),
        ("309", 0),
        ("94*4 - 67", 0),  # a number that was not given
        ("94*4 - 61 - 6 + 4 - 4", 0),  # one used again
        ("94*4 - 61 - 6 - 0", 0),
        ("94*4-6_1-6", 0),
        ("94*4 - 61 - 6.0", 0),
        ("9**9**9**9", 0),
        ("94*4-61-6 or 1", 0),
        ("__import__('os').system('true')", 0),
        ("94/(6-6)", 0),
        ("(" * 150, 0),
        ("-" * 199 + "4", 0),
        ("94*4\n-61-6", 0),
        ("９４*4-61-6", 0),
        ("", 0),
    ],
)
def test_countdown(answer, right):
    began = time.monotonic()
    assert countdown("", said(answer), PUZZLE) == right
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("['1', '2.5', '-3']", 1),
        ("[1, 2.50, -3]", 1),
        ("1, 2.5, -3", 1),
        ("1 2.5 -3", 0),
        ("[1, 2.5, -3", 0),
        ("[1, 2.5]", 0),
        ("[1, 2.5, -3, 4]", 0),
        ("[2.5, 1, -3]", 0),
        ("[[1, 2.5, -3]]", 0),
        ("[1, 2.5, -3, ]", 0),
        ("['1, 2.5, -3']", 0),
        ("[]", 0),
    ],
)
def test_number_list(answer, right):
    assert number_list("", said(answer), "['1', '2.5', '-3']") == right


def test_word_list():
    for answer, right in (("b, a", 1), ("['b', 'a']", 1), ("a, b", 0), ("b a", 0), ("b, a, a", 0)):
        assert word_list("", said(answer), "b, a") == right


@pytest.mark.parametrize(
    ("reward", "reference"), [(countdown, "309"), (countdown, "{}"), (number_list, "[]")]
)
def test_references_of_the_wrong_kind_are_named(reward, reference):
    with pytest.raises(UserError, match="reference"):
        reward("", said("1"), reference)


def test_each_source_has_its_reward():
    assert reward_for("add:3") is numeric
    assert reward_for("rg:chain_sum,max_terms=3") is numeric
    assert reward_for("rg:countdown") is countdown
    assert reward_for("rg:spell_backward") is exact
    assert reward_for("tasks.jsonl") is exact
