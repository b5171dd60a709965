import pickle

import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.data.shuffle import Blocks, BlockShuffle, find_blocks
from deepseek_jax.data.sources import Concatenated, ParquetFiles, Selected, TextFiles

quick = settings(max_examples=20, deadline=None)
sizes = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def shuffled(sizes, window, seed=0):
    blocks = Blocks(np.cumsum(sizes), window)
    return BlockShuffle(grain.MapDataset.range(sum(sizes)), blocks, seed)


@quick
@given(sizes, st.integers(1, 5), st.integers(0, 9))
def test_an_epoch_is_a_permutation(sizes, window, seed):
    dataset = pickle.loads(pickle.dumps(shuffled(sizes, window, seed)))
    for epoch in range(2):
        order = [dataset[i] for i in range(epoch * len(dataset), (epoch + 1) * len(dataset))]
        assert sorted(order) == list(range(sum(sizes)))


@quick
@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 5))
def test_a_window_touches_no_more_blocks_than_fit(size, count, window):
    dataset = shuffled([size] * count, window)
    blocks = [dataset[i] // size for i in range(size * count)]
    for start in range(0, len(blocks), size * window):
        touched = set(blocks[start : start + size * window])
        assert len(touched) <= window
        assert touched.isdisjoint(blocks[start + size * window :])


def test_epochs_and_seeds_differ():
    dataset, other = shuffled([5] * 10, 4), shuffled([5] * 10, 4, seed=1)
    first = [dataset[i] for i in range(50)]
    assert first != [dataset[i] for i in range(50, 100)]
    assert first != [other[i] for i in range(50)]
    assert first == [shuffled([5] * 10, 4)[i] for i in range(50)]


def test_blocks_of_sources(tmp_path):
    for name, rows in (("a", 5), ("b", 3)):
        table = pa.table({"text": [f"{name}{i}" for i in range(rows)]})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
    parquet = ParquetFiles([tmp_path / "a.parquet", tmp_path / "b.parquet"], "text")
    plain = TextFiles([tmp_path / "x", tmp_path / "y"])
    assert find_blocks(plain) is None
    assert find_blocks(Concatenated([plain, plain])) is None
    assert find_blocks(parquet).ends.tolist() == [2, 4, 5, 7, 8]
    mixed = Concatenated([plain, parquet])
    assert find_blocks(mixed).ends.tolist() == [1, 2, 4, 6, 7, 9, 10]
    selected = Selected(mixed, np.array([1, 2, 3, 6, 9]))
    assert find_blocks(selected).ends.tolist() == [1, 3, 4, 5]
    texts = [selected[i] for i in range(1, 5)]
    assert texts == ["a0", "a1", "a4", "b2"]
