"""Conversations from files: every form is read, and a bad record is named by its line."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepseek_jax.data.conversations import Conversations, Message
from deepseek_jax.types import UserError

ASK, SAY = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
PLAIN = (Message("user", "Why?"), Message("assistant", "Because."))
THOUGHT = (Message("user", "Why?"), Message("assistant", "Because.", "Hm."))

FORMS = {
    "messages": ({"messages": [ASK, SAY]}, PLAIN),
    "reasoning": ({"messages": [ASK, SAY | {"reasoning_content": "Hm."}]}, THOUGHT),
    "think": (
        {"messages": [ASK, SAY | {"content": "<think>\nHm.\n</think>\n\nBecause."}]},
        THOUGHT,
    ),
    "prompt": ({"prompt": "Why?", "completion": "Because."}, PLAIN),
    "prompt, thinking begun before": (
        {"prompt": "Why?", "completion": "Hm.\n</think>\n\nBecause."},
        THOUGHT,
    ),
    "generated": (
        {"messages": [ASK], "completion": "<think>Hm.</think>Because.", "logprobs": [1], "n": 3},
        THOUGHT,
    ),
    "generated from a prompt": (
        {"prompt": "Why?", "messages": None, "completion": "Because.", "finish": "stop"},
        PLAIN,
    ),
}


def test_a_completion_that_generation_cut_off_is_known(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [{"prompt": "a", "completion": "b", "finish": f} for f in ("stop", "length")]
    path.write_text("\n".join(map(json.dumps, lines)))
    found = Conversations([path])
    assert [found[i][-1].finished for i in range(2)] == [True, False]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_every_form_is_read(tmp_path, form, suffix):
    record, expected = FORMS[form]
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        path.write_text(f"\n{json.dumps(record)}\n\n{json.dumps(record, ensure_ascii=False)}")
    else:
        pq.write_table(pa.Table.from_pylist([record] * 2), path, row_group_size=1)
    found = Conversations([path])
    assert [found[i] for i in range(len(found))] == [expected] * 2


def test_files_of_both_kinds_are_one_sequence(tmp_path):
    talks = [{"prompt": str(i), "completion": "x"} for i in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, talks[:2])))
    pq.write_table(pa.Table.from_pylist(talks[2:4]), tmp_path / "b.parquet")
    (tmp_path / "c.jsonl").write_text(json.dumps(talks[4]))
    found = Conversations([tmp_path / f for f in ("a.jsonl", "b.parquet", "c.jsonl")])
    assert [found[i][0].content for i in range(len(found))] == list("01234")
    assert found.place(1).endswith("a.jsonl, line 2")
    assert found.place(3).endswith("b.parquet, row 2 of row group 0")
    assert found.place(4).endswith("c.jsonl, line 1")


BAD = {
    "turn 1 has the role 'bot'; roles are system, user, assistant": {
        "messages": [{"role": "bot", "content": "x"}, SAY]
    },
    "turn 2, the assistant's, is empty": {"messages": [ASK, SAY | {"content": " \n"}]},
    "turn 2, the assistant's, is empty: leave it out or fill": {
        "messages": [ASK, SAY | {"content": "<think>only thinking</think>"}]
    },
    "the field `messages` is missing": {"text": "x"},
    "the field `completion` is missing": {"prompt": "x"},
    "the field `prompt` is missing": {"completion": "x"},
    "turn 2 has no text under `content`": {"messages": [ASK, {"role": "assistant"}]},
    "turn 1 has no text under `role`": {"messages": [{"content": "x"}]},
    "turn 1 is not an object": {"messages": ["x"]},
    "`messages` is not a list": {"messages": "x"},
    "no turn is the assistant's": {"messages": [ASK]},
    "the record is not an object": [ASK, SAY],
    "turn 2 has a `reasoning_content` that is not": {
        "messages": [ASK, SAY | {"reasoning_content": [1]}]
    },
}


@pytest.mark.parametrize("complaint", BAD)
def test_a_bad_record_is_named_by_its_line(tmp_path, complaint):
    path = tmp_path / "a.jsonl"
    good = json.dumps({"messages": [ASK, SAY]})
    path.write_text(f"{good}\n\n{json.dumps(BAD[complaint])}\n{good}")
    found = Conversations([path])
    with pytest.raises(UserError) as error:
        found[1]
    assert str(error.value).startswith(f"{path}, line 3: {complaint}")


def test_other_formats_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"notes\.txt is neither \.jsonl nor \.parquet"):
        Conversations([tmp_path / "notes.txt"])
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match='no column "messages" or "prompt" or'):
        Conversations([tmp_path / "a.parquet"])
