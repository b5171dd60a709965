import json

import grain
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.data.packing import PackRows, rows_to_batch

quick = settings(max_examples=50, deadline=None)
lengths = st.lists(st.integers(1, 20), min_size=1, max_size=12)
seq_lens = st.integers(1, 15)


def make_documents(lengths):
    """Documents whose tokens are all different and none is 0, the padding."""
    ends = np.cumsum(lengths)
    return [np.arange(e - n, e, dtype=np.int32) + 1 for n, e in zip(lengths, ends, strict=True)]


def pack(documents, seq_len, repeat=1):
    dataset = grain.MapDataset.source(documents).repeat(repeat).to_iter_dataset()
    return PackRows(dataset, seq_len)


def unpad(values, weights):
    return values[weights > 0].tolist()


@quick
@given(lengths, seq_lens)
def test_every_token_is_read_once_and_learnt_once(lengths, seq_len):
    documents = make_documents(lengths)
    stream = np.concatenate(documents).tolist()
    rows = list(pack(documents, seq_len))
    assert len(rows) == -(-(len(stream) - 1) // seq_len)
    if not rows:
        return
    batch = rows_to_batch(rows, mask_documents=False)
    assert unpad(batch.tokens_BT, batch.loss_weights_BT) == stream[:-1]
    assert unpad(batch.targets_BT, batch.loss_weights_BT) == stream[1:]
    assert all(row.segments.all() for row in rows[:-1]), "only the last row may be padded"


@quick
@given(lengths, seq_lens)
def test_with_masking_all_but_first_tokens_are_learnt(lengths, seq_len):
    documents = make_documents(lengths)
    rows = list(pack(documents, seq_len))
    if not rows:
        return
    batch = rows_to_batch(rows, mask_documents=True)
    learnt = unpad(batch.targets_BT, batch.loss_weights_BT)
    assert learnt == np.concatenate([d[1:] for d in documents]).tolist()
    np.testing.assert_array_equal(
        batch.targets_BT[batch.loss_weights_BT > 0],
        batch.tokens_BT[batch.loss_weights_BT > 0] + 1,
    )


@quick
@given(lengths, seq_lens, st.booleans())
def test_segments_and_positions_agree(lengths, seq_len, mask_documents):
    documents = make_documents(lengths)
    owner = {int(t): i for i, document in enumerate(documents) for t in document}
    for row in pack(documents, seq_len):
        batch = rows_to_batch([row], mask_documents=mask_documents)
        tokens, segments, positions = (
            x[0].tolist() for x in (batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT)
        )
        count = sum(s > 0 for s in segments)
        assert segments[count:] == positions[count:] == [0] * (seq_len - count)
        owners = [owner[t] if mask_documents else 0 for t in tokens[:count]]
        assert segments[:count] == [o - owners[0] + 1 for o in owners]
        assert positions[:count] == [i - owners.index(o) for i, o in enumerate(owners)]


def test_batch_types_and_example():
    rows = list(pack(make_documents([3, 4]), 5))
    assert [row.ids.tolist() for row in rows] == [[1, 2, 3, 4, 5, 6], [6, 7, 0, 0, 0, 0]]
    batch = rows_to_batch(rows, mask_documents=True)
    assert [x.dtype for x in batch] == [np.int32, np.int32, np.float32, np.int32, np.int32]
    assert batch.segment_ids_BT.tolist() == [[1, 1, 1, 2, 2], [1, 1, 0, 0, 0]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert batch.loss_weights_BT.tolist() == [[1, 1, 0, 1, 1], [1, 0, 0, 0, 0]]
    plain = rows_to_batch(rows, mask_documents=False)
    assert plain.segment_ids_BT.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert plain.positions_BT.tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 0, 0]]
    assert plain.loss_weights_BT.tolist() == [[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]


@quick
@given(lengths, seq_lens, st.data())
def test_resume_at_any_row(lengths, seq_len, data):
    documents = make_documents(lengths)
    dataset = pack(documents, seq_len, repeat=3)
    rows = list(dataset)
    iterator = iter(dataset)
    for _ in range(data.draw(st.integers(0, len(rows)))):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    rest = list(iterator)
    fresh = iter(dataset)
    for _ in range(data.draw(st.integers(0, min(3, len(rows))))):
        next(fresh)  # what it read before set_state must leave no trace
    fresh.set_state(state)
    assert fresh.get_state() == state
    for one, other in zip(list(fresh), rest, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.segments, other.segments)
