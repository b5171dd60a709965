import pytest

from deepseek_jax.data.corpus import open_corpus
from deepseek_jax.types import UserError


def texts_of(documents):
    return [documents[i] for i in range(len(documents))]


def write_all(root, texts):
    root.mkdir(exist_ok=True)
    for i, text in enumerate(texts):
        (root / f"{i:04}.txt").write_text(text)
    return (str(root),)


def test_split_is_complete_and_disjoint(text_dir, texts):
    corpus = open_corpus((str(text_dir),), held_out_fraction=0.3)
    train, held_out = texts_of(corpus.train), texts_of(corpus.held_out)
    assert sorted(train + held_out) == sorted(texts)
    assert not set(train) & set(held_out)
    assert 5 < len(held_out) < 31


def test_split_goes_by_content(tmp_path, texts):
    """Copies stay together; new neighbours, names and order move nobody across."""
    few = open_corpus(write_all(tmp_path / "few", texts[:30]), held_out_fraction=0.3)
    many = open_corpus(write_all(tmp_path / "many", texts[::-1] * 2), held_out_fraction=0.3)
    assert set(texts_of(few.held_out)) <= set(texts_of(many.held_out))
    assert set(texts_of(few.train)) <= set(texts_of(many.train))
    assert not set(texts_of(many.train)) & set(texts_of(many.held_out))
    assert few.fingerprint != many.fingerprint


def test_empty_documents_are_left_out(tmp_path, texts):
    corpus = open_corpus(write_all(tmp_path, ["", *texts, ""]), held_out_fraction=0.3)
    assert "" not in texts_of(corpus.train) + texts_of(corpus.held_out)


def test_held_out_source(tmp_path, texts):
    source = write_all(tmp_path / "a", texts)
    held_out = write_all(tmp_path / "b", ["other", ""])
    corpus = open_corpus(source, held_out_source=held_out)
    assert texts_of(corpus.train) == texts
    assert texts_of(corpus.held_out) == ["other"]
    (tmp_path / "a" / "0000.txt").write_text("longer than it was before: " * 20)
    assert open_corpus(source, held_out_source=held_out).fingerprint != corpus.fingerprint


def test_held_out_source_spares_reading_the_rest(tmp_path, texts):
    source = write_all(tmp_path / "a", texts)
    held_out = write_all(tmp_path / "b", ["other"])
    (tmp_path / "a" / "0030.txt").write_bytes(b"\xff")
    corpus = open_corpus(source, held_out_source=held_out)
    with pytest.raises(UserError, match=r"0030\.txt is not UTF-8 at byte 0"):
        corpus.train[30]


@pytest.mark.parametrize("empty", ["source", "held_out_source"])
def test_empty_side_of_a_pair(tmp_path, texts, empty):
    sides = {"source": write_all(tmp_path / "a", texts), "held_out_source": ("stdlib",)}
    sides[empty] = write_all(tmp_path / "b", ["", ""])
    with pytest.raises(UserError, match=r"corpus is empty: no text in .*b.0000\.txt"):
        open_corpus(**sides)


def test_a_changed_file_is_read_again(tmp_path, texts):
    source = write_all(tmp_path, texts)
    first = open_corpus(source, held_out_fraction=0.3)
    assert open_corpus(source, held_out_fraction=0.3) is first
    (tmp_path / "0000.txt").write_text("another text altogether")
    second = open_corpus(source, held_out_fraction=0.3)
    assert second.fingerprint != first.fingerprint


@pytest.mark.parametrize("texts", [[""], ["", ""]])
def test_empty_corpus(tmp_path, texts):
    source = write_all(tmp_path, texts)
    with pytest.raises(UserError, match=r"corpus is empty: no text in .*0000\.txt"):
        open_corpus(source)


def test_empty_record_files(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(UserError, match="corpus is empty"):
        open_corpus((str(tmp_path),))


@pytest.mark.parametrize(("fraction", "side"), [(1e-9, "for training"), (1 - 1e-9, "held out")])
def test_everything_on_one_side(text_dir, fraction, side):
    with pytest.raises(UserError, match=f"all 60 documents are {side}.*held_out_source"):
        open_corpus((str(text_dir),), held_out_fraction=fraction)


def test_unreadable_document_is_found_at_once(tmp_path, texts):
    source = write_all(tmp_path, texts)
    (tmp_path / "0030.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"0030\.txt is not UTF-8 at byte 0"):
        open_corpus(source)
