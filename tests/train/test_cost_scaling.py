"""What a step should cost, and the script that measures whether it does."""

import argparse
import json

import pytest

from benchmarks import cost_scaling
from benchmarks.cost_scaling import Point, Work
from deepseek_jax import preset
from deepseek_jax.plan import training_flops_per_token


def test_each_term_of_the_cost_grows_with_what_it_is_of():
    config = preset("tiny")
    base = cost_scaling.work_of(config, Point(16, 256, 4))
    assert base.flops == pytest.approx(1024 * training_flops_per_token(config, 256))
    longer = cost_scaling.work_of(config, Point(16, 1024, 1))
    assert longer == (base.parameters, 4 * base.attention_flops, base.product_flops)
    twice = cost_scaling.work_of(config, Point(16, 256, 8))
    assert twice == (base.parameters, 2 * base.attention_flops, 2 * base.product_flops)

    # 42 bytes of each of 1e9 parameters take 14 ms, and attention 10 ms; products are the rest.
    work = Work(10**9, 3.75e12, 40e12)
    for other, seconds in (
        (work, 0.1),
        (work._replace(parameters=2 * 10**9), 0.114),
        (work._replace(attention_flops=7.5e12), 0.11),
        (work._replace(product_flops=80e12), 0.176),
    ):
        assert cost_scaling.expected(other, work, 0.1, "compute") == pytest.approx(seconds)


def test_the_base_point_belongs_to_all_sweeps_and_sequences_share_its_tokens():
    sizes = dict(experts_sweep=[4, 8], seq_sweep=[32, 128], batch_sweep=[1, 2])
    asked = argparse.Namespace(experts=8, seq=64, batch=2, sweeps=[*cost_scaling.SWEEPS], **sizes)
    assert cost_scaling.points(asked) == {
        Point(8, 64, 2): ["experts", "seq", "batch"],
        Point(4, 64, 2): ["experts"],
        Point(8, 32, 4): ["seq"],
        Point(8, 128, 1): ["seq"],
        Point(8, 64, 1): ["batch"],
    }


@pytest.mark.slow
def test_what_was_measured_becomes_a_table_and_a_picture(tmp_path, capsys):
    slice_ = "--model tiny --layers 1 --dense 0 --vocab 128 --compute float32 --moments float32"
    sizes = "--experts 8 --seq 16 --batch 2 --steps 2 --sweeps experts --experts-sweep 8"
    cost_scaling.main(["--out", str(tmp_path), *slice_.split(), *sizes.split()])
    results = tmp_path / cost_scaling.RESULTS
    base, again = [json.loads(line) for line in results.read_text().splitlines()]
    assert base["losses"] == again["losses"]  # begun anew, at the end
    assert base["losses"][0] > base["losses"][2]
    assert base["alone"]
    assert base["ms"] > 0

    other = base | {"experts": 4, "base": False, "ms": 3 * again["ms"]}
    with results.open("a") as file:
        for line in (other, other | {"seq": 32, "error": "no"}, other | {"matmuls": "fp8"}):
            file.write(json.dumps(line) + "\n")
    cost_scaling.main(["--report", str(tmp_path)])
    said = capsys.readouterr().out
    assert f"| {again['ms']:.1f} | {again['ms']:.1f} | 1.00 |" in said
    assert f"| {3 * again['ms']:.1f} | {again['ms']:.1f} | 3.00 |" in said
    assert "x 32" not in said
    assert "fp8: no base point" in said
    assert (tmp_path / "cost_scaling.png").stat().st_size > 10_000
