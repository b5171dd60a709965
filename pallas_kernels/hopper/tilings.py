"""Tilings measured on a device: a table that `benchmarks/autotune.py` rewrites.

An entry is for one form of product, N and K, and for the M that it was measured at up to the next
larger one, but less than twice its own: how many tiles there are decides as much as their form.
What the table lacks, a rule decides: see `choose_tiling` in `pallas_kernels.hopper.matmul`.
"""

import functools
import json
from importlib import resources
from typing import Any

TABLE = "tilings.json"


def measured(device: str, operation: str, m: int, n: int, k: int) -> dict[str, Any] | None:
    """The fastest tiling that was measured, or None.

    Args:
        device: The device's kind, as jax names it.
        operation: For example ``fp8_matmul, blocks``.
        m: Rows of the result.
        n: Columns of the result.
        k: The contracted size.
    """
    found = [
        entry
        for entry in _table().get(device, {}).get(operation, [])
        if (entry["n"], entry["k"]) == (n, k) and entry["m"] <= m < 2 * entry["m"]
    ]
    return max(found, key=lambda entry: entry["m"])["tiling"] if found else None


@functools.cache
def _table() -> dict:
    return json.loads(resources.files("pallas_kernels.hopper").joinpath(TABLE).read_text())
