import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.data import encoding
from deepseek_jax.data.encoding import DocumentEncoder, fim_ids, split_fim
from deepseek_jax.data.tokenizer import train_bpe

quick = settings(max_examples=50, deadline=None)


@quick
@given(st.text(max_size=40), st.integers(0, 2**32 - 1))
def test_fim_pieces_make_up_the_text(text, seed):
    assert "".join(split_fim(text, np.random.default_rng(seed))) == text


@quick
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), st.integers(0, 99))
def test_fim_ids_recover_the_text(fim_tokenizer, text, seed):
    ids = fim_ids(text, fim_tokenizer, np.random.default_rng(seed))
    marks = (fim_tokenizer.fim_begin_id, fim_tokenizer.fim_hole_id, fim_tokenizer.fim_end_id)
    begin, hole, end = (ids.index(mark) for mark in marks)
    assert begin == 0 < hole < end
    pieces = (ids[1:hole], ids[end + 1 :], ids[hole + 1 : end])
    assert "".join(map(fim_tokenizer.decode, pieces)) == text


@pytest.fixture(scope="module")
def fim_tokenizer():
    return train_bpe(["abc abc"], 280)


def test_fim_cuts_are_spread_over_the_text():
    cuts = [len(split_fim("x" * 9, np.random.default_rng(i))[0]) for i in range(200)]
    assert set(cuts) == set(range(10))


def test_fill_in_middle_changes_with_the_epoch_alone(texts, tokenizer):
    count = len(texts)
    encoder = DocumentEncoder(texts, tokenizer, fim_rate=0.5)
    again = DocumentEncoder(texts, tokenizer, fim_rate=0.5)
    epochs = [[tuple(encoder(e * count + i, i)) for i in range(count)] for e in range(2)]
    backwards = [tuple(again(i, i)) for i in reversed(range(count))]
    assert backwards[::-1] == epochs[0] != epochs[1]
    share = np.mean([ids[1] == tokenizer.fim_begin_id for epoch in epochs for ids in epoch])
    assert 0.3 < share < 0.7


def test_cache_has_a_limit(texts, tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "_CACHED_TOKENS", 50)
    encoder = DocumentEncoder(texts, tokenizer)
    for _ in range(2):
        read = [encoder(i, i) for i in range(len(texts))]
    assert [tokenizer.decode(ids[1:-1]) for ids in read] == texts
    assert encoder._cached_tokens <= 50


def test_encode_all_is_each_document_as_it_is(texts, tokenizer):
    encoder = DocumentEncoder(texts * 2, tokenizer, fim_rate=0.5)
    plain = DocumentEncoder(texts * 2, tokenizer, add_bos=False)
    for i, (ids, text) in enumerate(zip(encoder.encode_all(), texts * 2, strict=True)):
        assert ids.tolist() == [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        assert plain(i, i).tolist() == ids.tolist()[1:]
