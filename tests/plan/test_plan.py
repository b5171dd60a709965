"""The command: real steps compiled for CPU devices here, for a TPU slice where libtpu is."""

import functools
import json
import math
import shlex

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from rich.console import Console

from deepseek_jax import cli, sharding
from deepseek_jax.cli import main
from deepseek_jax.config import Precision
from deepseek_jax.model.dispatch import ExpertParallel
from deepseek_jax.model.transformer import (
    DeepSeekV3,
    abstract_params,
)
from deepseek_jax.plan import compile as compiler
from deepseek_jax.plan import hlo, topology, traffic
from deepseek_jax.plan.collectives import collectives
from deepseek_jax.plan.command import PlanConfig, plan, pretrain_command
from deepseek_jax.plan.search import candidates
from deepseek_jax.plan.show import search_table
from deepseek_jax.presets import preset
from deepseek_jax.train.lora import LoraConfig
from deepseek_jax.train.optim import OptimConfig
from deepseek_jax.train.pretrain import PretrainConfig
from deepseek_jax.types import UserError
from tests.configs import MICRO

F32 = Precision(compute="float32")
DENSE = MICRO.replace(first_k_dense_replace=3, num_nextn_predict_layers=0)


@functools.cache
def _train(micro_batches: int) -> tuple[compiler.Compiled, Mesh]:
    mesh = sharding.make_mesh("data=8")
    model = DeepSeekV3(DENSE, F32, "full")
    step = compiler.training_step(model, OptimConfig(), mesh, micro_batches, 8, 16)
    return compiler.compile_step(step, mesh, lambda stage: None), mesh


def _sent(compiled, mesh):
    total: dict[str, float] = {}
    for one in collectives(hlo.parse(compiled.text), mesh.shape):
        key = f"{one.kind} {'+'.join(one.axes)}"
        total[key] = total.get(key, 0.0) + one.total
    return total


@functools.cache
def _param_bytes(config) -> int:
    return sum(x.size * 4 for x in jax.tree.leaves(abstract_params(DeepSeekV3(config, F32))))


def test_data_parallel_training_sends_every_gradient_once():
    sent = _sent(*_train(1))
    assert set(sent) == {"all-reduce data"}
    gradients = 2 * 7 / 8 * _param_bytes(DENSE)
    # Beside them the loss, its weight and counters: a few scalars.
    assert gradients <= sent["all-reduce data"] <= gradients + 1000


def test_micro_batches_add_no_gradient_traffic():
    once, thrice = (_sent(*_train(n))["all-reduce data"] for n in (1, 3))
    assert once <= thrice <= once + 1000


def test_memory_of_arguments_is_that_of_parameters_and_moments():
    memory = _train(1)[0].memory
    assert memory is not None
    state = 3 * _param_bytes(DENSE)
    mesh = sharding.make_mesh("data=8")
    step = compiler.training_step(DeepSeekV3(DENSE, F32, "full"), OptimConfig(), mesh, 1, 8, 16)
    assert step.arguments == pytest.approx(memory.arguments, rel=0.01)
    assert state <= memory.arguments <= 1.1 * state
    assert memory.aliased >= 0.9 * state  # donated
    assert memory.peak == (
        memory.arguments + memory.outputs - memory.aliased + memory.temporaries + memory.code
    )


# --- bad input: one sentence, before anything is compiled --------------------------------------


@pytest.fixture
def no_compile(monkeypatch):
    """Eight devices for the slice, and a failure of the test if anything is compiled."""

    def refuse(*args):
        pytest.fail("compiled")

    monkeypatch.setattr(compiler, "compile_step", refuse)
    monkeypatch.setattr("deepseek_jax.plan.command.topology_devices", lambda _: jax.devices())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"topology": "v7:2x2"}, "unknown topology 'v7:2x2'"),
        ({"mesh": "fsdp=3"}, "mesh 'fsdp=3' asks for 3 devices, but there are 8"),
        ({"mesh": "pods=8"}, "unknown mesh axis 'pods'"),
        ({"mesh": "data=3,fsdp=-1"}, "asks for"),
        ({"batch": 12}, "12 sequences cannot be divided over 8 batch shards"),
        ({"batch": 8, "micro_batches": 3}, "8 sequences cannot be taken in 3 micro-batches"),
        ({"batch": 0}, "0 sequences cannot be taken"),
        ({"mesh": "expert=4,context=2", "seq": 15}, "a sequence of 15 cannot be divided over 2"),
        ({"mesh": "tensor=8", "batch": 8}, "tensor=8 does not divide"),
        ({"decode": True, "remat": "full"}, "decode has no backward pass"),
    ],
)
def test_bad_input(no_compile, tmp_path, changes, named):
    base = {"model": MICRO, "topology": "v5p:2x2x2", "mesh": "fsdp=8", "out": tmp_path}
    config = PlanConfig(**{**base, **changes})
    with pytest.raises(UserError) as raised:
        plan(config, Console(quiet=True))
    message = str(raised.value)
    assert named in message
    assert message.endswith(".")
    assert "\n" not in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--topology gpu:8", "GPUs are not planned for"),
        ("--topology v5p:2x2x1 --model v9", "no preset 'v9'"),
        ("--topology v5p:2x2x1 --mesh fsdp=3", "asks for 3 devices, but there are 8"),
    ],
)
def test_on_the_command_line_it_is_one_sentence_and_status_2(no_compile, capsys, words, named):
    with pytest.raises(SystemExit) as end:
        main(["plan", *words.split()])
    stdout, stderr = capsys.readouterr()
    assert end.value.code == 2
    assert not stdout
    assert named in stderr
    assert stderr.count("\n") == 1


def test_a_program_too_large_is_read_from_the_compilers_complaint():
    total = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 123.50G of 95.74G hbm."
    assert compiler.needed_bytes(total, 7) == 123.5 * 2**30
    parts = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (2.91T) exceeds available HBM (95.74G)."
    )
    assert compiler.needed_bytes(parts, 7) == 2.91 * 2**40 + 7
    assert compiler.needed_bytes("RESOURCE_EXHAUSTED: something else", 7) == 0


# --- the whole way, on devices that are here ----------------------------------------------------


@pytest.fixture
def slice_of_cpus(monkeypatch):
    """Eight CPU devices in the places of a 2x2x2 slice."""
    places = np.array(list(np.ndindex(2, 2, 2)))
    monkeypatch.setattr("deepseek_jax.plan.command.topology_devices", lambda _: jax.devices())
    monkeypatch.setattr("deepseek_jax.plan.report.coordinates", lambda mesh: places)


def test_table_picture_and_json(slice_of_cpus, tmp_path):
    config = PlanConfig(
        model=MICRO.replace(num_hidden_layers=2, num_nextn_predict_layers=0),
        topology="v5p:2x2x2",
        mesh="fsdp=2,expert=4",
        batch=16,
        seq=16,
        out=tmp_path,
        parallel=ExpertParallel(dispatcher="ring"),
    )
    console = Console(record=True, width=120, force_terminal=False)
    (found,) = plan(config, console)
    assert found.memory is not None
    assert found.roofline is not None
    # The ring: 4 hops of tokens, ids, gates and sums, forward; more in the backward pass.
    ring = [one for one in found.collectives if one.kind == "collective-permute"]
    assert {one.axes for one in ring} == {("expert",)}
    assert sum(one.total for one in ring) > 2 * 16 * traffic.ring_traffic(config.model, 4)
    assert found.tokens == 16 * 16
    assert found.roofline.compute == pytest.approx(found.flops / 459e12)
    assert found.tokens_per_second == pytest.approx(256 / found.roofline.best)
    text = console.export_text()
    assert "to train so: deepseek-jax pretrain --model config.json --mesh fsdp=2,expert=4 " in text
    for word in ("fsdp=2,expert=4", "temporaries", "collective-permute", "bounds the step"):
        assert word in text
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["memory"]["peak"] == found.memory.peak
    assert record["roofline"]["bound"] == found.roofline.bound
    assert sum(s["bytes"] for s in record["sent"]) == pytest.approx(sum(found.sent().values()))
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_that_trains_what_was_planned():
    planned = PlanConfig(
        model=preset("small"),
        batch=64,
        seq=512,
        micro_batches=4,
        moments="bfloat16",
        precision=Precision(params="bfloat16", matmuls="fp8"),
        parallel=ExpertParallel(overlap=True, receive_factor=2.0),
    )
    command = pretrain_command(planned)
    assert command is not None
    program, stage, *words = shlex.split(command)
    assert (program, stage) == ("deepseek-jax", "pretrain")
    with cli._REGISTRY:
        found = cli._parse(PretrainConfig(), words)
    assert found.model == planned.model
    assert found.mesh == planned.mesh
    assert (found.loop.batch_size, found.loop.micro_batch, found.data.seq_len) == (64, 16, 512)
    assert (found.remat, found.optim.moments) == ("full", "bfloat16")
    assert (found.precision, found.parallel) == (planned.precision, planned.parallel)
    assert pretrain_command(PlanConfig(decode=True)) is None
    assert pretrain_command(PlanConfig(lora=LoraConfig(lora_rank=8))) is None


def test_a_search_ranks_what_fits_first(slice_of_cpus, tmp_path, monkeypatch):
    good = compiler.Compiled(_train(1)[0].text, _train(1)[0].memory, 0.0, 1.0, 2.0)
    large = compiler.Compiled("", None, 0.0, 1.0, 2.0, "RESOURCE_EXHAUSTED: no room", 3e12)
    answers = iter([large, good, large._replace(needed=2e12), good])
    monkeypatch.setattr(compiler, "compile_step", lambda *args: next(answers))
    tries = [(mesh, remat) for mesh in ("data=8", "fsdp=8") for remat in ("full", "selective")]
    monkeypatch.setattr("deepseek_jax.plan.command.candidates", lambda *a, **k: tries)
    config = PlanConfig(
        model=DENSE, topology="v5p:2x2x2", batch=8, seq=16, search=True, out=tmp_path
    )
    console = Console(record=True, width=120, force_terminal=False)
    found = plan(config, console)
    assert [one.fits for one in found] == [True, True, False, False]
    assert [one.needed for one in found[2:]] == [2e12, 3e12]
    assert console.export_text().count("does not fit") == 2
    stored = json.loads((tmp_path / "search.json").read_text())
    assert [one["fits"] for one in stored] == [True, True, False, False]


# --- search ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("devices", "batch"), [(2048, 2048), (256, 256), (64, 64), (64, 16)])
def test_candidates_are_meshes_that_can_be(devices, batch):
    config = preset("v3")
    tries = candidates(config, devices, batch, decode=False)
    assert len({mesh for mesh, _ in tries}) == 3
    assert {remat for _, remat in tries} == {"full", "selective"}
    for text, _ in tries:
        sizes = sharding.parse_mesh(text)
        assert math.prod(sizes.values()) == devices
        assert config.n_routed_experts % sizes.get("expert", 1) == 0
        assert batch % (sizes.get("fsdp", 1) * sizes.get("expert", 1)) == 0
        assert config.num_attention_heads % sizes.get("tensor", 1) == 0
    assert {remat for _, remat in candidates(config, devices, batch, decode=True)} == {"none"}


# --- for real ----------------------------------------------------------------------------------


@pytest.fixture
def libtpu():
    return pytest.importorskip("libtpu")


SMALL = MICRO.replace(
    hidden_size=256, moe_intermediate_size=128, intermediate_size=256, num_nextn_predict_layers=0
)


def test_a_training_step_for_a_tpu_slice(libtpu, tmp_path):
    config = PlanConfig(
        model=SMALL,
        topology="v5p:2x2x1",
        mesh="fsdp=2,expert=2",
        batch=8,
        seq=128,
        out=tmp_path,
        save_hlo=True,
    )
    console = Console(record=True, width=120, force_terminal=False)
    (found,) = plan(config, console)
    assert found.fits
    assert found.memory is not None
    assert found.roofline is not None
    assert 0 < found.memory.peak < found.hbm
    # Recomputation costs a third on top of the model's own FLOPs; attention here is not causal.
    assert found.model_flops < found.flops < 3 * found.model_flops
    axes = {axis for one in found.collectives for axis in one.axes}
    assert axes == {"fsdp", "expert"}
    assert found.roofline.best == max(found.roofline) > 0
    text = console.export_text()
    for word in ("temporaries", "peak", "all-gather", "bounds the step", "not executed"):
        assert word in text
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["memory"]["peak"] == found.memory.peak
    assert record["sent"]
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "program.hlo.txt").stat().st_size > 10_000


def test_a_decode_step_for_a_tpu_slice(libtpu, tmp_path):
    config = PlanConfig(
        model=SMALL,
        topology="v5p:2x2x1",
        mesh="expert=4",
        batch=8,
        seq=256,
        decode=True,
        out=tmp_path,
    )
    (found,) = plan(config, Console(quiet=True))
    assert found.fits
    assert found.memory is not None
    assert found.tokens == 8
    cache = 3 * 2 * 256 * (12 + 6) * 2
    assert found.memory.aliased >= cache  # the cache is donated


@pytest.mark.slow
def test_a_step_that_does_not_fit_is_a_finding_and_not_an_error(libtpu, tmp_path):
    """V3's vocabulary and width on four chips of v6e: 32 GiB are not enough."""
    config = PlanConfig(
        model=preset("v3").replace(num_hidden_layers=4),
        topology="v6e:2x2",
        mesh="expert=4",
        batch=4,
        seq=4096,
        out=tmp_path,
    )
    console = Console(record=True, width=120, force_terminal=False)
    (found,) = plan(config, console)
    assert not found.fits
    assert found.needed > found.hbm
    assert "does not fit" in console.export_text()
    console.print(search_table([found]))
    assert "does not fit" in console.export_text()
    assert not (tmp_path / "plan.png").exists()


def test_published_figures_are_those_of_the_documentation():
    """Copied once more by hand from the pages that ``Chip`` names."""
    figures = {
        "v5e": (197, 16, 819, 400),
        "v5p": (459, 95, 2765, 1200),
        "v6e": (918, 32, 1638, 800),
        "tpu7x": (2307, 192, 7380, 1200),
    }
    for kind, (tflops, gib, bandwidth, ici) in figures.items():
        chip = topology.CHIPS[kind]
        found = (chip.flops / 1e12, chip.hbm / 2**30, chip.hbm_bandwidth / 1e9)
        assert found == pytest.approx((tflops, gib, bandwidth))
        assert chip.ici_bandwidth / 1e9 == ici
    assert np.isclose(topology.CHIPS["v5p"].flops, 4.59e14)
