"""The training step for a TPU: one half's tokens travel while the other half is computed."""

import pytest

from deepseek_jax import DeepSeekV3, sharding
from deepseek_jax.config import Precision
from deepseek_jax.model.dispatch import ExpertParallel
from deepseek_jax.plan import compile as compiler
from deepseek_jax.plan.hlo import Computation, Program, parse
from deepseek_jax.plan.topology import parse_topology, topology_devices
from deepseek_jax.train.optim import OptimConfig
from tests.configs import MICRO

pytest.importorskip("libtpu")

# Wide enough for a transfer to take time. Compiling takes minutes of two cores.
pytestmark = pytest.mark.slow
CONFIG = MICRO.replace(
    vocab_size=512,
    hidden_size=1024,
    num_hidden_layers=2,
    moe_intermediate_size=512,
    num_nextn_predict_layers=0,
)


def under_way(computation: Computation) -> list[set[str]]:
    """For every asynchronous exchange, in the order of the schedule: what runs before it is done.

    Grouped products are called ``gmm`` (forward, gradient of rows) and ``tgmm`` (of weights).
    """
    found = []
    for start in computation.instructions.values():
        if start.opcode != "ragged-all-to-all-start":
            continue
        between: set[str] = set()
        recording = False
        for instruction in computation.instructions.values():
            recording |= instruction is start
            if (
                instruction.opcode == "ragged-all-to-all-done"
                and start.name in instruction.operands
            ):
                break
            if recording and instruction.opcode == "custom-call" and "gmm" in instruction.name:
                between.add(instruction.name)
        found.append(between)
    return found


def step(overlap: bool) -> Program:
    mesh = sharding.make_mesh("expert=4", topology_devices(parse_topology("v5p:2x2x1")))
    model = DeepSeekV3(CONFIG, Precision(), "full", ExpertParallel("ragged", overlap=overlap))
    training = compiler.training_step(model, OptimConfig(), mesh, 1, 16, 2048)
    return parse(compiler.compile_step(training, mesh, lambda _: None).text)


def test_exchanges_are_asynchronous_and_products_run_under_them():
    program = step(overlap=True)
    reached = [c for name, c in program.computations.items() if program.executions[name]]
    exchanges = [between for computation in reached for between in under_way(computation)]
    assert len(exchanges) >= 8  # two halves, both ways, forward and backward
    assert sum(bool(between) for between in exchanges) >= 2
