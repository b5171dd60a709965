"""What a run tells its owner: metrics, progress, pictures, tables; and when its loss misbehaves.

Everything here runs on the host, on plain Python numbers.
"""

from deepseek_jax.report.console import Progress, summary_table
from deepseek_jax.report.hardware import peak_flops
from deepseek_jax.report.metrics import MetricsWriter, read_metrics
from deepseek_jax.report.monitor import LossMonitor
from deepseek_jax.report.plots import (
    plot_chain,
    plot_expert_load,
    plot_loss,
    plot_rewards,
    plot_runs,
    plot_stages,
)
from deepseek_jax.report.rows import show_rows

__all__ = [
    "LossMonitor",
    "MetricsWriter",
    "Progress",
    "peak_flops",
    "plot_chain",
    "plot_expert_load",
    "plot_loss",
    "plot_rewards",
    "plot_runs",
    "plot_stages",
    "read_metrics",
    "show_rows",
    "summary_table",
]
