"""From files of conversations to batches: split, packing, mixtures, positions, policies."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.data.chat import DEEPSEEK, ChatTemplate
from deepseek_jax.data.packing import pack_samples
from deepseek_jax.data.sft import ConversationConfig, SftData, epoch_steps
from deepseek_jax.types import UserError


def record(i: int, words: int = 3) -> dict:
    return {"prompt": f"question {i}", "completion": " ".join(["answer"] * words) + f" {i}"}


def write(path, records) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


@pytest.fixture
def open_data(tokenizer):
    def make(**changes) -> SftData:
        template = ChatTemplate(DEEPSEEK, tokenizer, "ours")
        return SftData(ConversationConfig(seq_len=96, **changes), tokenizer, template)

    return make


@pytest.fixture
def many(tmp_path) -> str:
    return write(tmp_path / "many.jsonl", [record(i, 1 + i % 7) for i in range(60)])


def segments(batch) -> list[list[int]]:
    """The tokens of every segment, its last target with them."""
    found = []
    for row in range(len(batch.tokens_BT)):
        for number in range(1, batch.segment_ids_BT[row].max() + 1):
            (at,) = np.nonzero(batch.segment_ids_BT[row] == number)
            ids = batch.tokens_BT[row, at].tolist()
            if batch.loss_weights_BT[row, at[-1]]:  # a row full to the last target
                ids.append(int(batch.targets_BT[row, at[-1]]))
            found.append(ids)
    return found


def prompts(tokenizer, batches) -> list[str]:
    texts = [tokenizer.decode(ids) for batch in batches for ids in segments(batch)]
    return [t.partition("<｜User｜>")[2].partition("<｜Assistant｜>")[0] for t in texts]


# --- packing ----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=40))
def test_rows_hold_every_sample_once_and_none_is_cut(lengths):
    rows = pack_samples(lengths, 20)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < size <= 20 for size in used)
    # First fit, longest first: at most 11/9 of the best, which is at least the sum over 20.
    assert len(rows) <= max(1, 11 / 9 * -(-sum(lengths) // 20) + sum(n > 10 for n in lengths) + 1)


def test_samples_are_whole_apart_and_learnt_where_the_assistant_speaks(open_data, many, tokenizer):
    batch = next(open_data(data=(many,)).train_batches(4))
    for ids in segments(batch):
        text = tokenizer.decode(ids)
        assert text.startswith("<｜begin▁of▁sentence｜><｜User｜>question")
        assert text.endswith("<｜end▁of▁sentence｜>")
    starts = np.diff(batch.segment_ids_BT, axis=1, prepend=0) > 0
    assert (batch.positions_BT[starts] == 0).all()
    inside = (batch.segment_ids_BT > 0) & ~starts
    assert (batch.positions_BT[inside] > 0).all()
    learnt = tokenizer.decode(batch.targets_BT[batch.loss_weights_BT > 0])
    assert set(learnt.replace("<｜end▁of▁sentence｜>", " ").split()) <= {
        "answer",
        *map(str, range(60)),
    }
    across = starts[:, 1:] & (batch.segment_ids_BT[:, :-1] > 0)
    assert not batch.loss_weights_BT[:, :-1][across].any()


# --- split, epochs, mixtures --------------------------------------------------------------------


def test_an_epoch_has_every_conversation_once_and_none_held_out(open_data, many, tokenizer):
    data = open_data(data=(many,), held_out_fraction=0.2)
    survey = data.survey()
    held = set(prompts(tokenizer, [part.batch for part in data.eval_batches(3)]))
    assert 2 <= len(held) == 60 - survey.conversations
    iterator, seen = data.train_batches(1), Counter()
    while not seen or min(seen.values()) < 2 or len(seen) < survey.conversations:
        seen.update(prompts(tokenizer, [next(iterator)]))
    assert not held & set(seen)
    assert max(seen.values()) <= 3  # epochs do not overlap by more than a window's rows
    assert epoch_steps(survey.rows, 2.0, 4) == -(-2 * survey.rows // 4)


def test_two_answers_to_one_question_are_on_one_side(open_data, tmp_path, tokenizer):
    records = [{"prompt": f"question {i // 3}", "completion": f"a{i}"} for i in range(90)]
    data = open_data(data=(write(tmp_path / "a.jsonl", records),), held_out_fraction=0.3)
    held = Counter(prompts(tokenizer, [part.batch for part in data.eval_batches(3)]))
    assert held
    assert set(held.values()) == {3}


def test_weights_are_shares_of_the_conversations(open_data, tmp_path, tokenizer):
    a = write(tmp_path / "a.jsonl", [record(i) for i in range(20)])
    b = write(tmp_path / "b.jsonl", [record(1000 + i) for i in range(100)])
    held = write(tmp_path / "c.jsonl", [record(5000)])
    data = open_data(data=(a, b), weights=(3.0, 1.0), held_out=(held,))
    iterator = data.train_batches(8)
    seen = prompts(tokenizer, [next(iterator) for _ in range(12)])
    share = np.mean([int(text.split()[1]) < 1000 for text in seen])
    assert 0.7 < share < 0.8


def test_parquet_is_read_a_row_group_at_a_time(open_data, tmp_path, tokenizer):
    table = pa.Table.from_pylist([record(i) for i in range(64)])
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    held = write(tmp_path / "c.jsonl", [record(5000)])
    data = open_data(data=(str(tmp_path / "a.parquet"),), held_out=(held,))
    rows = data.survey().rows
    iterator = data.train_batches(1)
    seen = prompts(tokenizer, [next(iterator) for _ in range(rows)])
    assert len(set(seen)) > 60
    groups = [int(text.split()[1]) // 4 for text in seen]
    assert groups != sorted(groups)


def test_a_position_continues_bit_for_bit(open_data, many):
    changes = {"data": (many,), "held_out_fraction": 0.1}
    iterator = open_data(**changes).train_batches(2)
    state, expected = None, []
    for step in range(25):
        if step == 13:
            state = json.loads(json.dumps(iterator.get_state()))
        batch = next(iterator)
        expected.append(batch)
    again = open_data(**changes).train_batches(2)
    again.set_state(state)
    for batch in expected[13:]:
        for ours, theirs in zip(next(again), batch, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    other = open_data(**(changes | {"train_on": "last"})).train_batches(2)
    with pytest.raises(UserError, match="the data are not those the checkpoint was written with"):
        other.set_state(state)


def test_streams_share_the_conversations(open_data, many, tokenizer):
    data = open_data(data=(many,), held_out_fraction=0.1)
    parts = []
    for stream in range(2):
        iterator = data.train_batches(1, stream=stream, streams=2)
        parts.append(set(prompts(tokenizer, [next(iterator) for _ in range(8)])))
    first, second = parts
    assert len(first & second) < len(first) / 2


# --- policies ---------------------------------------------------------------------------------


@pytest.fixture
def uneven(tmp_path) -> str:
    long = [record(7, 90), {"prompt": "why " * 120, "completion": "so"}]
    return write(tmp_path / "uneven.jsonl", [record(0), record(1), *long, record(2)])


@pytest.fixture
def held(tmp_path) -> tuple[str]:
    return (write(tmp_path / "held.jsonl", [record(99)]),)


def test_too_long_is_an_error_that_names_its_line(open_data, uneven, held):
    data = open_data(data=(uneven,), held_out=held)
    with pytest.raises(UserError, match=r"uneven.jsonl, line 3: the conversation is .* --too-long"):
        data.survey()


def test_too_long_is_dropped_and_counted(open_data, uneven, held):
    survey = open_data(data=(uneven,), held_out=held, too_long="drop").survey()
    assert (survey.conversations, survey.samples, survey.dropped, survey.cut) == (5, 3, 2, 0)
    assert "2 too long, left out" in str(survey)


def test_too_long_is_cut_and_counted(open_data, uneven, held, tokenizer):
    data = open_data(data=(uneven,), held_out=held, too_long="cut", shuffle=False)
    survey = data.survey()
    # The one whose question alone fills a row has nothing to learn.
    assert (survey.samples, survey.dropped, survey.cut) == (4, 1, 1)
    assert "1 too long, left out; 1 too long, cut off" in str(survey)
    iterator = data.train_batches(survey.rows)
    lengths = [len(ids) for ids in segments(next(iterator))]
    assert max(lengths) == 97


def test_what_generation_cut_off_does_not_teach_to_stop(open_data, tmp_path, held, tokenizer):
    records = [record(0) | {"finish": "length"}, record(1) | {"finish": "stop"}]
    changes = {"data": (write(tmp_path / "a.jsonl", records),), "held_out": held}
    with pytest.raises(UserError, match=r"a.jsonl, line 1: the completion was cut off when it was"):
        open_data(**changes).survey()
    assert open_data(**changes, too_long="drop").survey()[1:2] == (1,)
    data = open_data(**changes, too_long="cut")
    assert (data.survey().cut, data.survey().samples) == (1, 2)
    batch = next(data.train_batches(1))
    learnt = batch.targets_BT[batch.loss_weights_BT > 0]
    assert (learnt == tokenizer.eos_id).sum() == 1


def test_nothing_left_to_learn(open_data, tmp_path, held):
    records = [{"prompt": "why " * 120, "completion": "so"}]
    data = open_data(data=(write(tmp_path / "a.jsonl", records),), held_out=held, too_long="drop")
    with pytest.raises(UserError, match="the data hold no token to learn"):
        data.survey()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"data": ()}, "there is nothing to learn from: name files with --data"),
        ({"weights": (1.0, 2.0)}, r"1 entries of data have the weights \[1.0, 2.0\]"),
        ({"weights": (0.0,)}, "give one above 0 to each"),
        ({"held_out_fraction": 1.0}, "held_out_fraction is a share between 0 and 1"),
        ({"held_out_fraction": 1e-9}, "no conversation is held out: use more"),
    ],
)
def test_configurations_that_cannot_be(open_data, many, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        open_data(**({"data": (many,)} | changes))


def test_the_fields_of_the_configuration_are_documented():
    documented = ConversationConfig.__doc__ or ""
    assert all(f" {f.name}:" in documented for f in dataclasses.fields(ConversationConfig))
