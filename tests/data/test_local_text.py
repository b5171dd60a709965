"""Text of what is installed: each content once, always in the same order, nothing left out."""

import numpy as np
import pytest

from benchmarks import local_text
from deepseek_jax.data.tokenizer import train_bpe


@pytest.fixture
def folder(tmp_path):
    for i in range(60):
        (tmp_path / f"part{i % 3}").mkdir(exist_ok=True)
        (tmp_path / f"part{i % 3}" / f"{i}.py").write_text(f"value_{i} = {i}\n" * 20)
    (tmp_path / "copy.py").write_text("value_7 = 7\n" * 20)
    (tmp_path / "table.py").write_text("0, " * local_text.MOST_BYTES)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "picture.png").write_bytes(b"value")
    (tmp_path / "empty.py").touch()
    return tmp_path


def test_every_content_once_and_held_out_apart(folder):
    text = local_text.gather([folder, folder / "part0", folder / "absent"], 10**6, held_out=0.3)
    assert sorted(text.train + text.held_out) == sorted(
        f"value_{i} = {i}\n" * 20 for i in range(60)
    )
    assert text.train
    assert text.held_out
    assert text.files == 64  # and no picture
    again = local_text.gather([folder / f"part{i}" for i in (2, 1, 0)], 10**6, held_out=0.3)
    assert (again.train, again.held_out) == (text.train, text.held_out)
    less = local_text.gather([folder], 5000, held_out=0.3)
    assert less.train == text.train[: len(less.train)]
    assert local_text.num_bytes(less.train + less.held_out) <= 5000


def test_an_epoch_of_batches_has_every_token_as_a_target_once(folder):
    text = local_text.gather([folder], 10**6)
    tokenizer = train_bpe(text.train, 300)
    ids = local_text.encode(tokenizer, text.train, 10**9)
    assert tokenizer.decode(ids, skip_special=True) == "".join(text.train)
    assert (ids == tokenizer.bos_id).sum() == len(text.train)
    np.testing.assert_array_equal(local_text.encode(tokenizer, text.train, 100), ids[:100])

    numbers = local_text.Rows(np.arange(1 + 7 * 12, dtype=np.uint16), 7)
    batches = local_text.Batches(numbers, 4, seed=0)
    assert batches.per_epoch == 3
    epochs = [np.concatenate([batches[3 * e + i] for i in range(3)]) for e in range(2)]
    for rows in epochs:
        assert rows.shape == (12, 8)
        assert sorted(rows[:, 1:].ravel()) == list(range(1, 85))
        np.testing.assert_array_equal(np.diff(rows.astype(int), axis=1), 1)
    assert not np.array_equal(*epochs)
    np.testing.assert_array_equal(batches[4], local_text.Batches(numbers, 4, seed=0)[4])
    with pytest.raises(ValueError, match="no batch of 13"):
        local_text.Batches(numbers, 13, seed=0)
