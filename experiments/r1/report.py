"""The chain's page: a table of all stages, curves, and what was said before and after."""

import json
from pathlib import Path
from typing import Any

from deepseek_jax.report import plot_chain, plot_stages, read_metrics
from experiments.r1.setting import Setting

CHAIN = ("zero", "reasoning", "scenarios", "student_rl")
RATES = ("greedy", "pass@1", "pass@4", "form", "english", "truncated", "no spread", "kind")


def report(s: Setting, titles: dict[str, str]) -> Path:
    """Write ``report.md``, ``r1_stages.png`` and ``r1_curves.png`` into the chain's directory."""
    found: dict[str, Any] = {
        name: json.loads((s.out / "figures" / f"{name}.json").read_text()) for name in titles
    }
    plot_stages(found, s.out / "r1_stages.png")
    runs = {name: read_metrics(s.out / name / "metrics.jsonl") for name in CHAIN}
    plot_chain(runs, s.out / "r1_curves.png")
    counts = json.loads((s.out / "figures" / "rejection.json").read_text())["sifted"]
    pages = [
        "# The R1 recipe: what it did",
        f"Seed {s.seed}, sums of {s.digits} digits, {s.judged} held out for the table.",
        _table(titles, found),
        "![Held-out figures by stage](r1_stages.png)",
        "![Rewards and length over the steps of the RL stages](r1_curves.png)",
        "Answers of stage 3 to training sums: "
        + ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
        + ".",
        "The reward model prefers the better of two held-out replies in "
        f"{found['scenarios']['reward model, held-out pairs']:.1%} of pairs.",
        f"Distillation against RL of the same smaller model: {_verdict(found)}",
        "## Transcripts",
        *(_transcript(titles[name], found[name]) for name in titles),
    ]
    path = s.out / "report.md"
    path.write_text("\n\n".join(pages) + "\n", encoding="utf-8")
    return path


def _table(titles: dict[str, str], found: dict[str, Any]) -> str:
    head = ["stage", *RATES, "tokens", "seconds"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, title in titles.items():
        row = found[name]
        rates = (f"{row[rate]:.1%}" for rate in RATES)
        cells = [title, *rates, f"{row['tokens']:.0f}", f"{row['seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _verdict(found: dict[str, Any]) -> str:
    taught = {name: found[name]["greedy"] for name in ("student_sft", "student_logits")}
    alone = found["student_rl"]["greedy"]
    best = max(taught, key=taught.__getitem__)
    won = "better, as the paper found" if taught[best] > alone else "not better here"
    return (
        f"{won} ({best} {taught[best]:.1%} greedy, RL {alone:.1%}, "
        f"before {found['student_base']['greedy']:.1%})."
    )


def _transcript(title: str, row: dict[str, Any]) -> str:
    lines = [f"{said['prompt']}  ->  {said['said']}" for said in row["transcripts"]]
    return f"**{title}**\n\n```\n" + "\n".join(lines) + "\n```"
