"""Whoever reads them, the rows of the run's batches are the same."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax import sharding
from deepseek_jax.data.feed import Feed, TrainRows, make_feed, rows_of, streams_of
from deepseek_jax.data.pipeline import DataConfig, train_batches
from deepseek_jax.types import Batch, UserError

# Blocks of the eight rows of a batch, by process.
LAYOUTS = {
    "one process": [{(0, 8)}],
    "two, a half each": [{(0, 4)}, {(4, 8)}],
    "two with the same rows": [{(0, 8)}, {(0, 8)}],  # a tensor or context axis across them
    "four in two pairs": [{(0, 4)}, {(0, 4)}, {(4, 8)}, {(4, 8)}],
    "four, several devices each": [{(i, i + 1), (i + 1, i + 2)} for i in (0, 2, 4, 6)],
    "scattered": [{(0, 2), (4, 6)}, {(2, 4), (6, 8)}],  # as a torus may have it
    "overlapping": [{(0, 2), (2, 4)}, {(2, 4), (4, 6)}, {(6, 8)}],
}


@pytest.fixture
def config(text_dir):
    return DataConfig(source=(str(text_dir),), seq_len=16, fim_rate=0.3, mix_tokens=200)


@pytest.fixture
def where():
    mesh = sharding.make_mesh("data=4,context=2")
    return sharding.sharding(mesh, "accumulate", "batch", "sequence")


def readers(config, tokenizer, where, layout) -> list[TrainRows]:
    blocks = dict(enumerate(LAYOUTS[layout]))
    streams = streams_of(blocks, 8)
    return [
        TrainRows(
            functools.partial(train_batches, config, tokenizer),
            Feed(where, 8, rows_of(held), streams),
            config.streams,
        )
        for held in blocks.values()
    ]


def whole(parts: list[TrainRows]) -> np.ndarray:
    """The next batch's tokens, put together; where two hold the same row they must agree."""
    tokens = np.full((8, 16), -1)
    for part in parts:
        rows, new = part._feed.rows, next(part).tokens_BT
        assert ((tokens[rows] == -1) | (tokens[rows] == new)).all()
        tokens[rows] = new
    assert (tokens >= 0).all()
    return tokens


@pytest.mark.parametrize(
    ("layout", "streams"), list(zip(LAYOUTS, (1, 2, 1, 2, 4, 4, 4), strict=True))
)
def test_every_layout_gives_the_batches_of_one_reader(config, tokenizer, where, layout, streams):
    assert streams_of(dict(enumerate(LAYOUTS[layout])), 8) == streams
    many = readers(config, tokenizer, where, layout)
    alone = readers(dataclasses.replace(config, streams=streams), tokenizer, where, "one process")
    batches = [whole(many) for _ in range(4)]
    for batch in batches:
        np.testing.assert_array_equal(batch, whole(alone))
    assert len({row.tobytes() for batch in batches for row in batch}) == 32  # no row twice


@pytest.mark.parametrize("later", LAYOUTS)
@pytest.mark.parametrize("first", ["one process", "two, a half each", "scattered"])
def test_any_number_of_processes_may_continue(config, tokenizer, where, first, later):
    before = readers(config, tokenizer, where, first)
    for _ in range(3):
        whole(before)
    states = json.loads(json.dumps([part.get_state() for part in before]))
    after = readers(config, tokenizer, where, later)
    for part in after:
        part.set_state(states)
    for _ in range(3):
        np.testing.assert_array_equal(whole(after), whole(before))


def test_each_reads_no_stream_but_its_own(config, tokenizer, where):
    for layout, count in (("two, a half each", 1), ("scattered", 2), ("one process", 1)):
        for part in readers(config, tokenizer, where, layout):
            assert len(part._iterators) == count


def test_streams_that_do_not_divide_the_batch_are_refused(config, tokenizer, where):
    with pytest.raises(UserError, match=r"8 sequences .* 3 streams .* multiple of 3"):
        readers(dataclasses.replace(config, streams=3), tokenizer, where, "one process")


@pytest.mark.parametrize("mesh", ["data=8", "data=2,fsdp=2,context=2", "context=8", "tensor=8"])
def test_placed_rows_are_where_their_sharding_says(mesh):
    where = sharding.sharding(sharding.make_mesh(mesh), "accumulate", "batch", "sequence")
    feed = make_feed(where, 8, 16)
    assert feed.rows.tolist() == list(range(8))
    assert feed.streams == 1
    values = np.arange(3 * 8 * 16).reshape(3, 8, 16)
    placed = feed.place([feed.own(Batch(*[micro] * 5)) for micro in values])
    for array in placed:
        assert array.sharding == where
        np.testing.assert_array_equal(array, values)


def test_rows_that_are_not_all_here_find_their_devices():
    """As in a process that holds rows 2, 3, 6 and 7 alone, over four devices."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(4), ("rows",))
    where = NamedSharding(mesh, PartitionSpec(None, "rows"))
    held = np.array([2, 3, 6, 7])
    feed = Feed(where, 8, held, 1)
    values = np.arange(8 * 2).reshape(1, 8, 2)
    index_of = where.devices_indices_map((1, 8, 2))
    parts = [feed.part(values[:, held], index_of[d]) for d in jax.devices()[1:4:2]]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), values[:, held])
