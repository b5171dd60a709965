"""The loop by itself: stopping before it has begun, what it refuses, when it gives up."""

import math
import signal
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import DeepSeekV3, UserError, sharding
from deepseek_jax.report import LossMonitor
from deepseek_jax.train.loop import LoopConfig, OpenRun, Task, divide_batch, fit
from deepseek_jax.types import Batch, TrainState
from tests.configs import MICRO


class Batches:
    """Data during the first of which the run is asked to stop."""

    def get_state(self):
        return {}

    def __next__(self):
        signal.raise_signal(signal.SIGTERM)


def test_a_run_stopped_before_its_first_step_says_that_nothing_was_saved(capsys):
    saver = SimpleNamespace(wait=lambda: None)  # it has no ``save``
    state = TrainState(jnp.int32(0), {}, (), jnp.zeros((2, 4)))
    rows_1BT = np.zeros((1, 8, 16), np.int32)
    batch = Batch(rows_1BT, rows_1BT, rows_1BT.astype(np.float32), rows_1BT, rows_1BT)
    feed = SimpleNamespace(place=lambda _: batch)
    task = Task(DeepSeekV3(MICRO), lambda *_: None, Batches(), feed, lambda step: 0.0)
    outcome = fit(task, LoopConfig(steps=3), OpenRun(state, saver, None))
    assert (outcome.step, outcome.finished) == (0, False)
    np.testing.assert_array_equal(outcome.first_load_LE, np.zeros((2, 4)))
    said = capsys.readouterr().out
    assert "stopped before the first step, nothing was saved; begin again with --resume." in said
    assert "stopped and saved" not in said


@pytest.mark.parametrize(
    ("sizes", "option"),
    [
        ({"batch_size": 12}, "batch_size"),
        ({"batch_size": 24, "micro_batch": 12}, "micro_batch"),
        ({"batch_size": 24, "first_batch_size": 12}, "first_batch_size"),
    ],
)
def test_what_cannot_be_divided_over_the_mesh_names_the_option_that_said_so(sizes, option):
    loop, mesh = LoopConfig(**sizes), sharding.make_mesh("data=8")
    with pytest.raises(UserError, match=f"; make {option} a multiple of 8"):
        divide_batch(loop.rows, 16, mesh, option=loop.rows_option)
    with pytest.raises(UserError, match=f"; a run keeps its {option}, so choose a mesh"):
        divide_batch(loop.rows, 16, mesh, option=loop.rows_option, resume=True)


@pytest.mark.parametrize("option", ["max_skips", "max_total_skips"])
def test_too_many_skips_name_the_option_that_allows_more(option):
    limits = {"max_skips": 100, "max_total_skips": 100} | {option: 3}
    loop = LoopConfig(**limits)
    monitor = LossMonitor(max_consecutive=loop.max_skips, max_total=loop.max_total_skips)
    monitor.observe(1, math.nan)
    monitor.observe(2, math.nan)
    with pytest.raises(UserError, match=f"go on with --resume and a higher {option}"):
        monitor.observe(3, math.nan)
    with pytest.raises(UserError, match=f"{option}.*must be at least 1"):
        LoopConfig(**{option: 0})
