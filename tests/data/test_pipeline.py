import dataclasses
import hashlib
import itertools
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from deepseek_jax.data import packing, pipeline
from deepseek_jax.data.pipeline import (
    DataConfig,
    eval_batches,
    fit_tokenizer,
    load_corpus,
    target_bytes,
    train_batches,
)
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.types import Batch, UserError


@pytest.fixture
def config(text_dir):
    source = (str(text_dir),)
    return DataConfig(source, seq_len=32, held_out_fraction=0.2, fim_rate=0.3, mix_tokens=1_000)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_equal(ones, others):
    for one, other in zip(ones, others, strict=True):
        for x, y in zip(one, other, strict=True):
            np.testing.assert_array_equal(x, y)


def documents_in(batches, tokenizer):
    """The documents that begin and end within ``batches`` of one row, in order, as ids."""
    stream = np.concatenate([batch.tokens_BT[0] for batch in batches])
    starts = np.flatnonzero(stream == tokenizer.bos_id)
    return [tuple(part) for part in np.split(stream, starts)[1:-1]]


def restore_fim(ids, tokenizer):
    """The text of a document, whether rearranged for Fill-in-Middle or not."""
    ids = list(ids[1:-1])
    if ids[0] != tokenizer.fim_begin_id:
        return tokenizer.decode(ids)
    hole, end = ids.index(tokenizer.fim_hole_id), ids.index(tokenizer.fim_end_id)
    return "".join(map(tokenizer.decode, (ids[1:hole], ids[end + 1 :], ids[hole + 1 : end])))


def epoch_rows(config, tokenizer, epochs=1):
    """A number of single rows that surely covers ``epochs``."""
    documents = load_corpus(config).train
    tokens = sum(len(tokenizer.encode(documents[i])) + 8 for i in range(len(documents)))
    return epochs * tokens // config.seq_len + 2


def test_shapes_and_types(config, tokenizer):
    batch = next(train_batches(config, tokenizer, 3))
    assert isinstance(batch, Batch)
    assert {x.shape for x in batch} == {(3, 32)}
    assert [x.dtype for x in batch] == [np.int32, np.int32, np.float32, np.int32, np.int32]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_each_epoch_reads_every_training_document_once(
    config, tokenizer, texts, tmp_path, suffix, shuffle
):
    if suffix == "jsonl":
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    elif suffix == "parquet":
        pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=7)
    source = config.source if suffix == "txt" else (str(tmp_path),)
    # Read off the stream, hence before rows change places.
    config = dataclasses.replace(config, source=source, shuffle=shuffle, mix_tokens=0)
    corpus = load_corpus(config)
    train = [corpus.train[i] for i in range(len(corpus.train))]
    batches = take(train_batches(config, tokenizer, 1), epoch_rows(config, tokenizer, 2))
    read = [restore_fim(d, tokenizer) for d in documents_in(batches, tokenizer)]
    first, second = read[: len(train)], read[len(train) : 2 * len(train)]
    assert sorted(first) == sorted(second) == sorted(train)
    assert (first == train) is (second == train) is not shuffle
    assert (first == second) is not shuffle


def test_mixing_moves_rows_within_windows(config, tokenizer):
    in_order = dataclasses.replace(config, mix_tokens=0)
    mixed = dataclasses.replace(config, mix_tokens=5 * config.seq_len)
    before = [b.tokens_BT.tobytes() for b in take(train_batches(in_order, tokenizer, 1), 15)]
    after = [b.tokens_BT.tobytes() for b in take(train_batches(mixed, tokenizer, 1), 15)]
    assert before != after
    for window in range(0, 15, 5):
        assert sorted(before[window : window + 5]) == sorted(after[window : window + 5])
    batches = train_batches(mixed, tokenizer, 1)
    take(batches, 7)  # into the second window
    again = train_batches(mixed, tokenizer, 1)
    again.set_state(json.loads(json.dumps(batches.get_state())))
    assert_equal(take(batches, 9), take(again, 9))


def test_order_depends_on_the_seed(config, tokenizer):
    first = take(train_batches(config, tokenizer, 2), 3)
    assert_equal(first, take(train_batches(config, tokenizer, 2), 3))
    other = take(train_batches(dataclasses.replace(config, seed=1), tokenizer, 2), 3)
    assert any((a.tokens_BT != b.tokens_BT).any() for a, b in zip(first, other, strict=True))


def test_streams_share_each_epoch(config, tokenizer):
    config = dataclasses.replace(config, fim_rate=0.0, mix_tokens=0)
    corpus = load_corpus(config)
    texts = [corpus.train[i] for i in range(len(corpus.train))]
    read: Counter[str] = Counter()
    for stream in range(3):
        batches = train_batches(config, tokenizer, 1, stream=stream, streams=3)
        documents = documents_in(take(batches, epoch_rows(config, tokenizer)), tokenizer)
        own = len(range(stream, len(texts), 3))
        read.update(restore_fim(d, tokenizer) for d in documents[:own])
    assert read == Counter(texts)


@pytest.mark.parametrize("consumed", [0, 1, 40, 150])
def test_resume_equals_uninterrupted(config, tokenizer, consumed):
    """An epoch has about 40 batches: an epoch's end before, within and after what is resumed."""
    assert 70 < epoch_rows(config, tokenizer) < 100
    iterator = train_batches(config, tokenizer, 2)
    take(iterator, consumed)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 30)
    fresh = train_batches(config, tokenizer, 2)
    next(fresh)
    fresh.set_state(state)
    assert_equal(take(fresh, 30), expected)


RESUME = """
import json, sys, hashlib
from pathlib import Path
from deepseek_jax.data.pipeline import DataConfig, train_batches
from deepseek_jax.data.tokenizer import Tokenizer

source, tokenizer, state = sys.argv[1:]
config = DataConfig(
    (source,), seq_len=32, held_out_fraction=0.2, fim_rate=0.3, mix_tokens=1_000
)
iterator = train_batches(config, Tokenizer.load(tokenizer), 2)
iterator.set_state(json.loads(state))
digest = hashlib.sha256()
for _ in range(10):
    for array in next(iterator):
        digest.update(array.tobytes())
print(digest.hexdigest())
"""


def test_resume_in_a_fresh_process(config, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    iterator = train_batches(config, Tokenizer.load(tmp_path), 2)
    take(iterator, 9)
    state = json.dumps(iterator.get_state())
    arguments = [sys.executable, "-c", RESUME, config.source[0], str(tmp_path), state]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    iterator.set_state(json.loads(state))
    digest = hashlib.sha256()
    for batch in take(iterator, 10):
        for array in batch:
            digest.update(array.tobytes())
    assert done.stdout.strip() == digest.hexdigest()


@pytest.mark.parametrize(
    "change",
    [{"seed": 5}, {"seq_len": 16}, {"fim_rate": 0.2}, {"num_workers": 1}, {"shuffle": False}],
)
def test_state_of_other_data_is_refused(config, tokenizer, change):
    state = train_batches(config, tokenizer, 2).get_state()
    other = train_batches(dataclasses.replace(config, **change), tokenizer, 2)
    with pytest.raises(UserError, match="not those the checkpoint was written with"):
        other.set_state(state)
    other.close()


def test_state_of_other_tokenizer_or_share_is_refused(config, tokenizer, texts):
    state = train_batches(config, tokenizer, 2).get_state()
    other_tokenizer = train_batches(config, pipeline.train_bpe(texts, 300), 2)
    other_share = train_batches(config, tokenizer, 2, stream=0, streams=2)
    for other in (other_tokenizer, other_share):
        with pytest.raises(UserError, match="not those the checkpoint was written with"):
            other.set_state(state)


def test_workers_resume_too(config, tokenizer):
    config = dataclasses.replace(config, num_workers=1)
    iterator = train_batches(config, tokenizer, 2)
    try:
        alone = train_batches(dataclasses.replace(config, num_workers=0), tokenizer, 2)
        assert_equal(take(iterator, 3), take(alone, 3))
        state = json.loads(json.dumps(iterator.get_state()))
        expected = take(iterator, 3)
        iterator.set_state(state)
        assert_equal(take(iterator, 3), expected)
    finally:
        iterator.close()


@pytest.mark.parametrize("mask_documents", [False, True])
def test_eval_covers_the_held_out_text_exactly(config, tokenizer, mask_documents):
    config = dataclasses.replace(config, mask_documents=mask_documents)
    documents = load_corpus(config).held_out
    texts = [documents[i] for i in range(len(documents))]
    items = list(eval_batches(config, tokenizer, 4))
    batches = [item.batch for item in items]
    assert {batch.tokens_BT.shape for batch in batches} == {(4, 32)}
    assert sum(item.num_bytes for item in items) == len("".join(texts).encode())
    targets = Counter(
        np.concatenate([b.targets_BT[b.loss_weights_BT > 0] for b in batches]).tolist()
    )
    expected = Counter(t for text in texts for t in (*tokenizer.encode(text), tokenizer.eos_id))
    expected[tokenizer.bos_id] = 0 if mask_documents else len(texts) - 1
    assert targets == expected


def test_target_bytes_ignores_weightless_targets(config, tokenizer):
    batch = next(train_batches(config, tokenizer, 2))
    nothing = batch._replace(loss_weights_BT=np.zeros_like(batch.loss_weights_BT))
    assert target_bytes(tokenizer, batch) > target_bytes(tokenizer, nothing) == 0


def test_tokenizer_is_trained_on_training_documents_only(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"{'q' * (i + 3)} " * 5)
    config = DataConfig(source=(str(tmp_path),), held_out_fraction=0.5)
    corpus = load_corpus(config)
    texts = [corpus.train[i] for i in range(len(corpus.train))]
    assert fit_tokenizer(config, 300).to_json() == pipeline.train_bpe(texts, 300).to_json()


def test_more_processes_than_documents(config, tokenizer):
    with pytest.raises(UserError, match="cannot feed 100 processes"):
        train_batches(config, tokenizer, 1, stream=0, streams=100)


def plain_tokenizer(tokens):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    backend.add_special_tokens(tokens)
    return Tokenizer(backend)


def test_tokenizer_without_the_tokens_needed(config):
    with pytest.raises(UserError, match="no end-of-sentence token"):
        train_batches(config, plain_tokenizer([]), 1)
    with pytest.raises(UserError, match=r"no Fill-in-Middle tokens: set `fim_rate` to 0"):
        train_batches(config, plain_tokenizer(["</s>"]), 1)
    next(train_batches(dataclasses.replace(config, fim_rate=0.0), plain_tokenizer(["</s>"]), 1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"seq_len": 0},
        {"fim_rate": 1.5},
        {"held_out_fraction": 0.0},
        {"num_workers": -1},
        {"seed": -1},
    ],
)
def test_config_out_of_range(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        DataConfig(**wrong)


def test_padding_row_has_no_weight():
    row = packing.padding_row(8)
    assert packing.rows_to_batch([row], mask_documents=True).loss_weights_BT.sum() == 0
