import json
import pickle

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deepseek_jax.data import tokenizer as tok
from deepseek_jax.data.tokenizer import Tokenizer, train_bpe
from deepseek_jax.types import UserError

TEXTS = ["def f(x):\n    return x + 1\n" * 3, "naïve 北京 🙂 1234567 <think>", tok.EOS] * 3
SMALL = train_bpe(TEXTS, 300)
quick = settings(max_examples=100, deadline=None)
unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@quick
@given(unicode_text)
@example(f"a{tok.EOS}b{tok.BOS}<think></think>")
@example("\r\n \t\x00\u200b\ufeff")
@example("  12345\u0661\u0662½ ひらがなカタカナ漢字")
def test_decode_undoes_encode(text):
    assert SMALL.decode(SMALL.encode(text)) == text


@quick
@given(unicode_text)
@example(f"{tok.EOS}<think>🙂")
def test_token_bytes_add_up_to_the_text(text):
    assert SMALL.token_bytes[SMALL.encode(text)].sum() == len(text.encode())


@quick
@given(unicode_text, st.sampled_from(tok.SPECIAL_TOKENS))
def test_special_tokens_in_text_are_text_unless_asked(text, name):
    special = SMALL.token_id(name)
    assert special not in SMALL.encode(text + name)
    assert SMALL.encode(name, allow_special=True) == [special]
    assert SMALL.token_bytes[special] == 0


def test_splits_text_as_deepseek_does():
    pieces = ["ab", "(x", ")\n\n", " ", "123", "456", "7", "漢字", "  ", " y"]
    split = SMALL._backend.pre_tokenizer.pre_tokenize_str("ab(x)\n\n 1234567漢字   y")
    assert [SMALL._backend.decoder.decode([piece]) for piece, _ in split] == pieces


def test_ids_of_special_tokens():
    assert [SMALL.token_id(name) for name in tok.SPECIAL_TOKENS] == list(range(10))
    assert (SMALL.bos_id, SMALL.eos_id, SMALL.pad_id) == (0, 1, 2)
    assert None not in (SMALL.fim_begin_id, SMALL.fim_hole_id, SMALL.fim_end_id)
    assert SMALL.decode([0, *SMALL.encode("x"), 1], skip_special=True) == "x"


def test_training_is_deterministic_whatever_the_order():
    again, backwards = train_bpe(TEXTS, 300), train_bpe(TEXTS[::-1], 300)
    assert SMALL.to_json() == again.to_json() == backwards.to_json()


def test_small_corpus_yields_a_smaller_vocabulary():
    assert train_bpe(["aaaa"], 5000).vocab_size < 300


def test_vocabulary_without_room():
    with pytest.raises(UserError, match="too small"):
        train_bpe(TEXTS, 260)


def test_save_and_load(tmp_path):
    SMALL.save(tmp_path / "new" / "tokenizer.json")
    for path in (tmp_path / "new", tmp_path / "new" / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.to_json() == SMALL.to_json()
        assert loaded.encode(TEXTS[1]) == SMALL.encode(TEXTS[1])
        assert loaded.eos_id == SMALL.eos_id


def test_pickle_keeps_special_tokens_out_of_text():
    copy = pickle.loads(pickle.dumps(SMALL))
    assert copy.encode(tok.EOS) == SMALL.encode(tok.EOS)


def test_encode_batch_is_encode():
    assert SMALL.encode_batch(TEXTS) == [SMALL.encode(text) for text in TEXTS]


def test_foreign_tokenizer_takes_names_from_its_config(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    backend.add_special_tokens(["<go>", "<stop>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    bare = Tokenizer.load(tmp_path)
    assert bare.bos_id is bare.eos_id is bare.fim_hole_id is None
    config = {"bos_token": {"content": "<go>"}, "eos_token": "<stop>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    named = Tokenizer.load(tmp_path)
    assert (named.bos_id, named.eos_id, named.pad_id) == (2, 3, None)
    np.testing.assert_array_equal(named.token_bytes, [1, 1, 0, 0])


def test_truncation_padding_and_gaps_of_a_foreign_tokenizer(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 7}, []))
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode("aabb") == [0, 0, 7, 7]
    assert loaded.vocab_size == len(loaded.token_bytes) == 8


@pytest.mark.parametrize("content", ["", "{}", "not json"])
def test_unreadable_tokenizer(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"cannot read the tokenizer .*tokenizer\.json"):
        Tokenizer.load(path)


def test_missing_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at"):
        Tokenizer.load(tmp_path / "nowhere.json")


def test_broken_tokenizer_config(tmp_path):
    SMALL.save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)
