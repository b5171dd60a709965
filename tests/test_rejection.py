"""Rejection sampling: what is kept of a policy's answers, and why the rest is not."""

import numpy as np
import pytest

from deepseek_jax.data.conversations import parse_record
from deepseek_jax.data.tasks import Task
from deepseek_jax.evaluate import Solved
from deepseek_jax.rejection import RejectionConfig, sift
from deepseek_jax.rewards import Completion, Sample
from deepseek_jax.types import UserError

GOOD = "<think>add the ones</think><answer>3</answer>"


def solved(*rows: list[Completion]) -> Solved:
    """An answer is right if it says 3."""
    samples = [[Sample("1+2=", said, "3") for said in row] for row in rows]
    correct_Pk = np.array([["<answer>3" in said.text for said in row] for row in rows])
    truncated_Pk = np.array([[said.truncated for said in row] for row in rows])
    tokens_Pk = np.array([[said.num_tokens for said in row] for row in rows])
    return Solved(samples, correct_Pk, correct_Pk, truncated_Pk, tokens_Pk)


def thought(text: str) -> Completion:
    return Completion(f"<think>{text}</think><answer>3</answer>", 10)


def test_every_reason_is_counted():
    answers = [
        Completion("<think>hm</think><answer>4</answer>", 9),
        Completion(GOOD, 10, truncated=True),
        thought("add 个位"),
        Completion(GOOD, 31),
        thought("add\n```\n1 + 2\n```"),
        thought("add " * 30),
        Completion("<think>add the</think><think>ones</think><answer>3</answer>", 10),
        Completion(GOOD, 10),
        Completion(GOOD.replace(" the ", "\n the  "), 10),  # the same but for white space
        thought("sum"),
        thought("another one"),
    ]
    config = RejectionConfig(language="en", longest=30, longest_paragraph=60, keep=2)
    found = sift(solved(answers), [Task("1+2=", "3")], config)
    assert found.counts == {
        "sampled": 11, "wrong": 1, "cut_off": 1, "mixed": 1, "long": 1, "unreadable": 3,
        "repeated": 1, "surplus": 1, "kept": 2,
    }  # fmt: skip
    assert [record["completion"] for record in found.records] == [GOOD, thought("sum").text]
    question, answer = parse_record(found.records[0])
    assert (question.content, answer.reasoning) == ("1+2=", "add the ones")


def test_tasks_are_apart_and_what_is_not_asked_for_is_not_looked_at():
    mixed = thought("add 个位\n```code```")
    tasks = [Task("1+2=", "3"), Task("2+1=", "3")]
    found = sift(solved([mixed] * 2, [mixed] * 2), tasks, RejectionConfig(code_blocks=True))
    assert [record["prompt"] for record in found.records] == ["1+2=", "2+1="]
    assert found.counts["repeated"] == 2
    share = RejectionConfig(language="en", min_language=0.3, code_blocks=True)
    assert sift(solved([mixed]), tasks[:1], share).counts["kept"] == 1


@pytest.mark.parametrize("changes", [{"keep": 0}, {"min_language": 2.0}, {"language": "xx"}])
def test_settings_that_keep_nothing_are_refused(changes):
    with pytest.raises(UserError):
        RejectionConfig(**changes)
