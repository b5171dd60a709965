"""The pictures at the end of a run.

matplotlib is imported inside the functions: it costs most of a second, which every ``--help`` and
every other process of a pod would pay. Figures are built without pyplot, whose list of open
figures is global and whose backend may want a display.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from deepseek_jax.types import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREY = "#1f5fa8", "#d1600f", "#6b6b6b"
_STAGE_COLORS = (_BLUE, _ORANGE, "#3a8f4d", "#8a4fa3", _GREY)
_STYLES = (":", "--", "-.")


def plot_loss(
    metrics: Sequence[Mapping[str, float | int]],
    path: str | os.PathLike[str],
    *,
    references: Mapping[str, float | int] | None = None,
) -> None:
    """Draws the loss curve: training (raw and smoothed) and evaluation.

    A second panel shows the evaluation in bits per byte beside the references, if there are any.

    Args:
        metrics: from `read_metrics`; the keys ``loss`` and ``eval_loss`` (nats per token) and
            ``eval_bits_per_byte`` are drawn where they occur. Values that are not finite are
            marked at the foot of the panel.
        path: the PNG to write.
        references: horizontal lines by label (``{"token bigram": 2.41}``), in bits per byte.
    """
    references = references or {}
    steps, bits = _series(metrics, "eval_bits_per_byte")
    two = bool(references) or len(steps) > 0
    figure = _figure(10 if two else 6, 4)
    axes = figure.subplots(1, 2 if two else 1, squeeze=False)[0]
    _draw_training(axes[0], metrics)
    if two:
        _draw_bits_per_byte(axes[1], steps, bits, references)
    figure.savefig(Path(path), dpi=160)


def plot_rewards(
    metrics: Sequence[Mapping[str, float | int]], path: str | os.PathLike[str]
) -> None:
    """Draws a run of reinforcement learning: rewards, held-out accuracy, length, entropy.

    Args:
        metrics: from `read_metrics`.
        path: the PNG to write.
    """
    panels = [
        ("reward", ("reward/accuracy", "reward/format")),
        ("held-out accuracy", ("eval_greedy", "eval_pass@1")),
        ("tokens per completion", ("completion_tokens",)),
        ("entropy (nats)", ("entropy",)),
    ]
    figure = _figure(12, 3)
    for axis, (label, names) in zip(figure.subplots(1, 4), panels, strict=True):
        for name, color in zip(names, (_BLUE, _ORANGE), strict=False):
            steps, values = _series(metrics, name)
            mark = "o-" if name.startswith("eval_") else "-"
            short = name.removeprefix("reward/").removeprefix("eval_")
            axis.plot(steps, values, mark, color=color, markersize=4, label=short)
        _finish(axis, label)
    figure.savefig(Path(path), dpi=160)


def plot_runs(
    runs: Mapping[str, Sequence[Mapping[str, float | int]]], path: str | os.PathLike[str]
) -> None:
    """Draws runs of reinforcement learning over one another: reward, accuracy, length, and so on.

    Args:
        runs: by name; from `read_metrics`.
        path: the PNG to write.
    """
    panels = {
        "reward/accuracy": "accuracy of rollouts",
        "reward/format": "format of rollouts",
        "eval_greedy": "held-out accuracy, greedy",
        "completion_tokens": "tokens per completion",
        "truncated": "cut off",
        "groups_without_spread": "groups without spread",
        "entropy": "entropy (nats)",
        "grad_norm": "norm of the gradient",
    }
    figure = _figure(14, 6)
    axes = figure.subplots(2, 4).flat
    for axis, (name, label) in zip(axes, panels.items(), strict=True):
        for index, (run, metrics) in enumerate(runs.items()):
            steps, values = _series(metrics, name)
            color = _STAGE_COLORS[index % len(_STAGE_COLORS)]
            style = ("-", *_STYLES)[index // len(_STAGE_COLORS) % 4]
            mark = "o" if name.startswith("eval_") else ""
            axis.plot(
                steps, values, mark + style, color=color, markersize=4, linewidth=1.2, label=run
            )
        _finish(axis, label)
        if name != "reward/accuracy" and axis.get_legend() is not None:
            axis.get_legend().remove()  # one serves for all
    figure.savefig(Path(path), dpi=160)


def plot_stages(stages: Mapping[str, Mapping[str, float]], path: str | os.PathLike[str]) -> None:
    """Draws held-out figures of successive stages: accuracy, form and language, length.

    Args:
        stages: by the stage's name, in order; ``greedy``, ``pass@1``, ``pass@4``, ``form``,
            ``english``, ``kind`` (rates) and ``tokens``.
        path: the PNG to write.
    """
    panels = [
        ("held-out accuracy", ("greedy", "pass@1", "pass@4")),
        ("rate", ("form", "english", "kind")),
        ("tokens per answer", ("tokens",)),
    ]
    figure = _figure(13, 4)
    for axis, (label, names) in zip(figure.subplots(1, 3), panels, strict=True):
        for name, color in zip(names, (_BLUE, _ORANGE, _GREY), strict=False):
            values = [row[name] for row in stages.values()]
            axis.plot(range(len(stages)), values, "o-", color=color, markersize=4, label=name)
        _finish(axis, label)
        axis.set_xlim(-0.4, len(stages) - 0.6)
        axis.set_xticks(range(len(stages)), list(stages), rotation=60, ha="right", fontsize=8)
        axis.set_xlabel("")
        axis.set_ylim(bottom=0)
    figure.savefig(Path(path), dpi=160)


def plot_chain(
    runs: Mapping[str, Sequence[Mapping[str, float | int]]], path: str | os.PathLike[str]
) -> None:
    """Draws runs of reinforcement learning one after the other: rewards and length by step.

    Args:
        runs: by the stage's name, in order; from `read_metrics`.
        path: the PNG to write.
    """
    panels = {
        "reward/accuracy": "accuracy of rollouts",
        "completion_tokens": "tokens per completion",
        "reward/format": "format",
        "reward/language": "words in the target language",
        "reward/preference": "reward model's score",
    }
    figure = _figure(16, 3.2)
    for axis, (name, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        start = 0.0
        for (stage, metrics), color in zip(runs.items(), _STAGE_COLORS, strict=False):
            steps, values = _series(metrics, name)
            if len(steps):
                axis.plot(start + steps, values, color=color, linewidth=1.4, label=stage)
            start += max((row["step"] for row in metrics), default=0)
        _finish(axis, label)
        axis.set_xlabel("step, stage after stage")
    figure.savefig(Path(path), dpi=160)


def plot_expert_load(
    first_LE: Float[Array, "L E"] | Int[Array, "L E"],
    last_LE: Float[Array, "L E"] | Int[Array, "L E"],
    path: str | os.PathLike[str],
) -> None:
    """Draws the load of every expert of every MoE layer, at the first and at the last step.

    Colour is load over the mean load of the layer: white is balanced (1), blue idle (0), red
    overloaded (2 and more: without that limit one hot expert would turn all others white). Both
    panels share the scale; above each stands the largest violation, over all layers,
    ``max_E(load) / mean_E(load) - 1`` (MaxVio of arXiv 2408.15664).

    Args:
        first_LE: tokens per expert, in any unit.
        last_LE: likewise.
        path: the PNG to write.
    """
    loads = [_relative(np.asarray(load, np.float64)) for load in (first_LE, last_LE)]
    layers, experts = loads[0].shape
    figure = _figure(10, min(max(2.2, 1.6 + 0.12 * layers), 6))
    axes = figure.subplots(1, 2, sharey=True)
    image = None
    for axis, load, name in zip(axes, loads, ("first step", "last step"), strict=True):
        image = axis.imshow(
            load, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", interpolation="nearest"
        )
        axis.set_title(f"{name}: max violation {load.max() - 1:.2f}", fontsize=10)
        axis.set_xlabel("expert")
        _integer_ticks(axis.xaxis, experts)
    axes[0].set_ylabel("MoE layer")
    _integer_ticks(axes[0].yaxis, layers)
    assert image is not None
    bar = figure.colorbar(image, ax=axes, label="load / mean load", pad=0.01, extend="max")
    bar.set_ticks([0, 0.5, 1, 1.5, 2])
    figure.savefig(Path(path), dpi=160)


def _figure(width: float | int, height: float | int) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _series(
    metrics: Sequence[Mapping[str, float | int]], name: str
) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(row["step"], row[name]) for row in metrics if name in row]
    steps, values = np.array(pairs, np.float64).reshape(-1, 2).T
    return steps, values


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a fiftieth of the run, centred (so that it does not lag behind).

    The window shrinks towards the steep start, where a one-sided one would be biased, and is cut
    off at the flat end, where a shrinking one would end in noise. Only finite values count.
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    half = np.minimum(len(values) // 100, index)
    low, high = index - half, np.minimum(index + half + 1, len(values))
    number = counts[high] - counts[low]
    mean = (sums[high] - sums[low]) / np.maximum(number, 1)
    return np.where(number > 0, mean, np.nan)


def _draw_training(axis: "Axes", metrics: Sequence[Mapping[str, float | int]]) -> None:
    steps, loss = _series(metrics, "loss")
    if len(steps):
        dots = "." if len(steps) < 20 else ""  # a line through one point would be invisible
        axis.plot(steps, loss, dots + "-", color=_BLUE, alpha=0.25, linewidth=0.8, label="train")
        axis.plot(steps, _smooth(loss), color=_BLUE, linewidth=1.6, label="train, smoothed")
        bad = steps[~np.isfinite(loss)]
        foot = axis.get_xaxis_transform()  # x in steps, y in parts of the panel
        if len(bad):
            axis.plot(
                bad,
                np.full(len(bad), 0.02),
                "x",
                color="crimson",
                transform=foot,
                label="not finite",
                clip_on=False,
            )
    eval_steps, eval_loss = _series(metrics, "eval_loss")
    if len(eval_steps):
        axis.plot(
            eval_steps, eval_loss, "o-", color=_ORANGE, markersize=4, linewidth=1, label="held out"
        )
    _finish(axis, "loss (nats per token)")


def _draw_bits_per_byte(
    axis: "Axes", steps: np.ndarray, bits: np.ndarray, references: Mapping[str, float | int]
) -> None:
    if len(steps):
        axis.plot(steps, bits, "o-", color=_ORANGE, markersize=4, label="held out")
    for (name, value), style in zip(references.items(), _STYLES * len(references), strict=False):
        axis.axhline(value, color=_GREY, linestyle=style, label=f"{name} ({value:.3f})")
    _finish(axis, "bits per byte")


def _finish(axis: "Axes", label: str) -> None:
    axis.set_xlabel("step")
    axis.set_ylabel(label)
    axis.set_xlim(left=0)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=9)


def _relative(load_LE: np.ndarray) -> np.ndarray:
    mean = load_LE.mean(axis=1, keepdims=True)
    return np.divide(load_LE, mean, out=np.ones_like(load_LE), where=mean > 0)


def _integer_ticks(axis: Any, count: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=min(count, 8), integer=True))
