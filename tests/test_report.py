"""Reports: metrics that survive kills and resumes, progress, pictures, and the loss monitor."""

import io
import json
import math
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from deepseek_jax import report
from deepseek_jax.report import (
    LossMonitor,
    MetricsWriter,
    Progress,
    peak_flops,
    plot_expert_load,
    plot_loss,
    plot_runs,
    read_metrics,
    summary_table,
)
from deepseek_jax.types import UserError


@pytest.fixture(autouse=True)
def _no_torch(monkeypatch):
    # tensorboardX imports torch if it finds it, which takes seconds and is not needed.
    if "torch" not in sys.modules:
        monkeypatch.setitem(sys.modules, "torch", None)


def lines(directory: Path) -> list[dict]:
    def no_constants(name):
        raise AssertionError(f"{name} is not JSON")

    text = (directory / "metrics.jsonl").read_text()
    assert text.endswith("\n") or not text
    return [json.loads(line, parse_constant=no_constants) for line in text.splitlines()]


# --- metrics ----------------------------------------------------------------------------------


def test_each_line_is_there_before_write_returns(tmp_path):
    with MetricsWriter(tmp_path / "new/run") as writer:
        for step in (1, 2):
            writer.write(
                step, {"loss": 3.5 / step, "tokens_per_s": np.float32(100), "n": jnp.int32(3)}
            )
            assert lines(tmp_path / "new/run")[-1] == {
                "step": step,
                "loss": 3.5 / step,
                "tokens_per_s": 100.0,
                "n": 3.0,
            }
        writer.write(2, {"eval_loss": 4.0})
    writer.close()  # twice is harmless
    writer.write(3, {"loss": 1.0})  # as is writing afterwards
    read = read_metrics(tmp_path / "new/run/metrics.jsonl")
    assert [row["step"] for row in read] == [1, 2]
    assert read[1] == {"step": 2, "loss": 1.75, "tokens_per_s": 100.0, "n": 3.0, "eval_loss": 4.0}


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.floats()))
def test_every_float_survives(tmp_path_factory, scalars):
    for reserved in ("step", "non_finite"):
        scalars.pop(reserved, None)
    directory = tmp_path_factory.mktemp("run")
    with MetricsWriter(directory) as writer:
        assert writer._events is not None
        writer._events.close()  # TensorBoard is another test's business, and slow
        writer._events = SimpleNamespace(add_scalar=lambda *_: None, close=lambda: None)
        writer.write(5, scalars)
    (line,) = lines(directory)
    bad = {name for name, value in scalars.items() if not math.isfinite(value)}
    assert {name for name, value in line.items() if value is None} == bad
    assert set(line.get("non_finite", {})) == bad
    (row,) = read_metrics(directory / "metrics.jsonl")
    assert row.pop("step") == 5
    assert row.keys() == scalars.keys()
    assert all(row[k] == v or (v != v and row[k] != row[k]) for k, v in scalars.items())


def test_resume_leaves_each_step_once(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(10):
            writer.write(step, {"loss": math.nan if step == 3 else 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')  # killed here
    with MetricsWriter(tmp_path, resumed_step=6) as writer:
        for step in range(7, 12):
            writer.write(step, {"loss": 2.0})
    read = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in read] == list(range(12))
    assert [line["step"] for line in lines(tmp_path)] == list(range(12))
    assert math.isnan(read[3]["loss"])
    assert [row["loss"] for row in read[4:]] == [1.0] * 3 + [2.0] * 5
    with MetricsWriter(tmp_path):  # a fresh run starts afresh
        assert lines(tmp_path) == []


def test_a_line_that_is_cut_off_is_left_out_but_a_broken_one_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "los')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    for broken in ("{", "3", '{"loss": 1}', ""):
        path.write_text(f'{{"step": 1}}\n{broken}\n{{"step": 3}}\n')
        with pytest.raises(UserError, match="line 2"):
            read_metrics(path)
    with pytest.raises(UserError, match="cannot read"):
        read_metrics(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="another output directory"):
        MetricsWriter(tmp_path / "file/run")


def test_a_full_disk_is_one_sentence(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    with MetricsWriter(tmp_path) as writer:
        assert writer._file is not None
        writer._file.close()
        full = open("/dev/full", "w")  # noqa: SIM115
        writer._file = full
        with pytest.raises(UserError, match=r"cannot write metrics.*No space left.*--resume"):
            writer.write(1, {"loss": 1.0})
        writer._file = io.StringIO()
    with pytest.raises(OSError, match="No space"):
        full.close()


def test_tensorboard_has_the_finite_scalars(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 2.5, "bad": math.inf})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()
    assert b"bad" not in events.read_bytes()


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 2.5})
    assert list(tmp_path.iterdir()) == []


# --- progress and tables ----------------------------------------------------------------------


def drive(progress: Progress, steps):
    with progress:
        for step in steps:
            progress.update(step, loss=2.5, tokens_per_s=12_345.0)
        progress.print("a [path] in brackets")


def test_plain_lines_now_and_then(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    out = io.StringIO()
    progress = Progress(100, initial=60, interval_s=10, console=Console(file=out))
    for step in range(61, 101):
        clock[0] += 30.0 if step == 61 else 3.0  # the first step is compiled
        progress.update(step, loss=2.5, tokens_per_s=12_345.0)
    printed = out.getvalue().splitlines()
    assert printed[0] == "step 61/100  loss 2.5000  12.3k tokens/s  eta ?"
    assert printed[1] == "step 65/100  loss 2.5000  12.3k tokens/s  eta 0:01:45"
    assert printed[-1] == "step 100/100  loss 2.5000  12.3k tokens/s  eta 0:00:00"
    assert len(printed) == 11
    assert all(len(line.splitlines()) == 1 for line in printed)


def test_a_bar_on_a_terminal():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, _environ={})
    drive(Progress(100, initial=10, console=console), range(11, 101))
    assert "100/100" in out.getvalue()
    assert "loss 2.5000" in out.getvalue()
    assert "a [path] in brackets" in out.getvalue()


def test_no_bar_without_steps():
    out = io.StringIO()
    drive(Progress(100, console=Console(file=out, force_terminal=True, _environ={})), [])
    assert out.getvalue() == "a [path] in brackets\n"


def test_quiet_on_other_processes(monkeypatch, capsys):
    drive(Progress(3, interval_s=0), range(1, 4))
    assert "step 3/3" in capsys.readouterr().out
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    drive(Progress(3, interval_s=0), range(1, 4))
    assert capsys.readouterr().out == ""


def test_a_run_goes_on_where_nobody_reads_on():
    """As with ``| head``, or a ``tee`` that has died."""
    code = """
        import sys
        from deepseek_jax.report import Progress, summary_table
        sys.stdin.read()
        progress = Progress(3, interval_s=0)
        for step in range(1, 4):
            progress.update(step, tokens_per_s=1.0)
        progress.console.print(summary_table([{"a": 1}]))
        print("made", step, file=sys.stderr)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    _, stderr = process.communicate("", timeout=120)
    assert (process.returncode, stderr) == (0, "made 3\n")


def test_summary_table():
    rows = [
        {"model": "tiny", "bits per byte": 2.123456, "bytes": 1234567, "ok": True},
        {"model": "gzip -9", "bits per byte": 2.5, "tokens/s": 98_765.4},
    ]
    out = io.StringIO()
    Console(file=out, width=80).print(summary_table(rows, title="held out"))
    text = out.getvalue()
    for part in (
        "held out",
        "bits per byte",
        "2.123",
        "2.500",
        "98,765",
        "1,234,567",
        "gzip -9",
        "True",
    ):
        assert part in text
    summary_table([])


# --- peak speed -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2.25e15),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v6e", 918e12),
        ("NVIDIA RTX A1000", None),
        ("TPU v4 lite", None),
        ("NVIDIA GB200", None),
        ("cpu", None),
    ],
)
def test_peak_flops(kind, peak):
    assert report.hardware.peak_of(kind) == peak


def test_peak_of_this_cpu_is_not_known():
    assert peak_flops(jax.devices("cpu")[0]) is None


# --- pictures ---------------------------------------------------------------------------------


def a_run(steps: int) -> list[dict[str, float]]:
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "loss": 3 + 4 / step if step % 7 else math.nan}
        if step % 10 == 0:
            row |= {"eval_loss": 3.5, "eval_bits_per_byte": 2.2}
        rows.append(row)
    return rows


@pytest.mark.parametrize("steps", [0, 1, 7, 200])
@pytest.mark.parametrize("references", [None, {"bigram": 2.4, "gzip -9": 2.0}])
def test_the_loss_curve_is_a_picture_at_any_length(tmp_path, steps, references):
    plot_loss(a_run(steps), tmp_path / "loss.png", references=references)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules


def test_a_run_of_only_nan_is_still_drawn(tmp_path):
    plot_loss([{"step": s, "loss": math.nan} for s in range(9)], tmp_path / "loss.png")


def test_the_smoothed_curve_does_not_lag():
    from deepseek_jax.report.plots import _smooth

    line = np.linspace(5, 1, 500)
    np.testing.assert_allclose(_smooth(line)[:490], line[:490])
    holes = line.copy()
    holes[100:103] = np.nan
    assert np.isfinite(_smooth(holes)).all()
    assert abs(_smooth(holes) - line).max() < 0.05


@pytest.mark.parametrize("shape", [(1, 4), (58, 256)])
def test_the_expert_load_is_drawn(tmp_path, shape):
    rng = np.random.default_rng(0)
    first, last = rng.dirichlet(np.ones(shape[1]), shape[0]), np.full(shape, 7, np.int32)
    first[0] = 0  # a layer that no token has reached
    plot_expert_load(first, last, tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_runs_are_drawn_over_one_another(tmp_path):
    """More of them than colours, one without an evaluation, one that has only begun."""
    runs = {
        f"seed {i}": [
            {"step": step, "reward/accuracy": 0.1 * step, "entropy": 1.0, "grad_norm": 0.5}
            | ({"eval_greedy": 0.2} if step % 2 == 0 and i else {})
            for step in range(1, 2 + i)
        ]
        for i in range(7)
    }
    plot_runs(runs, tmp_path / "runs.png")
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_importing_is_cheap():
    code = "import sys, deepseek_jax.report as r; print([m for m in sys.modules if m in %r])"
    heavy = ["matplotlib", "tensorboardX", "torch", "tensorflow"]
    result = subprocess.run([sys.executable, "-c", code % heavy], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


# --- the loss monitor -------------------------------------------------------------------------


def feed(monitor: LossMonitor, losses, start: int = 0) -> list[bool]:
    return [monitor.observe(step, loss) for step, loss in enumerate(losses, start)]


def test_a_normal_run_is_never_skipped():
    rng = np.random.default_rng(0)
    steps = np.arange(3000)
    losses = 2.5 + 7 * np.exp(-steps / 200) + 0.15 * rng.standard_normal(3000)
    assert not any(feed(LossMonitor(), losses.tolist()))


def test_a_spike_is_skipped_and_does_not_move_the_threshold():
    monitor = LossMonitor(warmup=10)
    feed(monitor, [3.0] * 20)
    threshold = monitor.threshold()
    assert threshold == 4.0  # no spread: the margin alone
    assert feed(monitor, [4.1, 3.9, 400.0, 3.0]) == [True, False, True, False]
    assert monitor.threshold() == pytest.approx(threshold, abs=0.01)
    assert (monitor.skipped, monitor.consecutive) == (2, 0)


def test_the_threshold_is_the_documented_one():
    losses = np.random.default_rng(1).normal(3, 1, 200).tolist()
    monitor = LossMonitor(window=50, warmup=10, k=6, min_margin=0.1)
    for step, loss in enumerate(losses):
        monitor.observe(step, loss, skipped=False)
    median = statistics.median(losses[-50:])
    mad = statistics.median(abs(loss - median) for loss in losses[-50:])
    assert monitor.threshold() == median + 6 * 1.4826 * mad


def test_nothing_but_nan_is_refused_while_warming_up():
    monitor = LossMonitor(warmup=5, window=5)
    assert feed(monitor, [10.0, 500.0, math.nan, math.inf, -math.inf]) == [False] * 2 + [True] * 3
    assert monitor.threshold() == math.inf


def test_the_decision_of_the_device_stands():
    monitor = LossMonitor(warmup=1)
    feed(monitor, [1.0])
    assert monitor.observe(1, 1.5, skipped=True)
    assert not monitor.observe(2, jnp.float32(100), skipped=False)


@pytest.mark.parametrize(
    ("losses", "stops"),
    [([1.0, math.nan, math.nan, math.nan], 3), ([1.0, math.nan] * 5, 9)],
)
def test_too_many_skipped_steps_stop_the_run(losses, stops):
    monitor = LossMonitor(max_consecutive=3, max_total=5)
    feed(monitor, losses[:stops])
    with pytest.raises(UserError, match=rf"diverged: step {stops} has loss nan.*--resume"):
        monitor.observe(stops, losses[stops])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 20) | st.sampled_from([math.nan, math.inf]), max_size=80),
    st.integers(0, 80),
)
def test_a_resumed_monitor_decides_as_the_uninterrupted_one(losses, cut):
    def new():
        return LossMonitor(window=16, warmup=4, max_consecutive=1000, max_total=1000)

    whole, before, after = new(), new(), new()
    expected = feed(whole, losses)
    decided = feed(before, losses[:cut])
    after.load(json.loads(json.dumps(before.state(), allow_nan=False)))
    assert decided + feed(after, losses[cut:]) == expected
    assert after.threshold() == whole.threshold()
    assert after.state() == whole.state()
    assert whole.skipped == sum(expected)
    assert all(
        not skipped or loss > 0 or loss != loss
        for skipped, loss in zip(expected, losses, strict=True)
    )


def test_a_nonsensical_monitor_is_refused():
    with pytest.raises(UserError, match="warmup"):
        LossMonitor(window=4, warmup=5)
