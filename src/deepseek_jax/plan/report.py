"""What a plan found, as numbers: one flat record that the table, the picture and JSON share."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from deepseek_jax.plan import hlo, work
from deepseek_jax.plan.collectives import Collective, collectives
from deepseek_jax.plan.compile import Compiled, Memory
from deepseek_jax.plan.roofline import Roofline, roofline
from deepseek_jax.plan.topology import Topology

_LARGEST_LISTED = 12


@dataclass(frozen=True)
class Plan:
    """A step on a slice; per device unless it says otherwise."""

    title: str
    topology: str
    devices: int
    mesh: str
    step: str
    """``train`` or ``decode``."""
    tokens: int
    """Of a step, on all devices together."""
    hbm: float
    """Bytes that a device has."""
    fits: bool
    complaint: str
    """What the compiler said if it does not fit."""
    needed: float
    """Bytes needed, if it does not fit and the compiler said how many."""
    memory: Memory | None
    trace_seconds: float
    compile_seconds: float
    model_flops: float
    """Of the step on paper (``training_flops_per_token``), without recomputation."""
    flops: float
    """Of the compiled program, grouped products counted at balanced load."""
    xla_flops: float
    """XLA's own count: every loop's body once."""
    hbm_bytes: float
    collectives: tuple[Collective, ...]
    """Ragged exchanges with all of their buffers, which is more than they send."""
    rows: float
    """Rows that a device sends at expectation in one exchange of a MoE layer."""
    open_loops: tuple[str, ...]
    """Loops whose trips depend on data: rounds of dispatch that only skewed routing needs, counted
    as not entered, and the blocks of a cache, counted as full."""
    roofline: Roofline | None

    @property
    def tokens_per_second(self) -> float:
        """Of the whole slice, at the roofline; 0 if it does not fit."""
        return self.tokens / self.roofline.best if self.roofline else 0.0

    def sent(self, *, buffers: bool = False) -> dict[tuple[str, str], float]:
        """Bytes sent per (kind, axes), largest first.

        Ragged exchanges count the rows of uniform routing, or with ``buffers`` all they have
        room for.
        """
        total: dict[tuple[str, str], float] = {}
        for one in self.collectives:
            key = one.kind, "+".join(one.axes)
            part = one.total if buffers else one.filled(self.rows).total
            total[key] = total.get(key, 0.0) + part
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    def to_json(self) -> dict[str, Any]:
        """All of it; of the collectives the sums, and the largest one by one."""
        record = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("memory", "collectives", "roofline")
        }
        record["memory"] = self.memory and self.memory._asdict() | {"peak": self.memory.peak}
        record["roofline"] = self.roofline and self.roofline._asdict() | {
            "bound": self.roofline.bound,
            "best": self.roofline.best,
            "serial": self.roofline.serial,
        }
        buffers = self.sent(buffers=True)
        record["sent"] = [
            {"kind": kind, "axes": axes, "bytes": total, "bytes_of_buffers": buffers[kind, axes]}
            for (kind, axes), total in self.sent().items()
        ]
        record["largest_collectives"] = [
            {
                "kind": one.kind,
                "axes": one.axes,
                "buffer": one.buffer,
                "bytes": one.sent,
                "executions": one.executions,
                "asynchronous": one.is_async,
                "source": one.source,
            }
            for one in self.collectives[:_LARGEST_LISTED]
        ]
        return record


class Routed(NamedTuple):
    """What the routing puts into the buffers of one MoE layer of a device, at expectation."""

    rows: float
    """Tokens sent to other devices, or kept, once per device that holds an expert of theirs."""
    pairs: float
    """(token, expert) pairs computed at a time."""


def analyse(
    compiled: Compiled,
    topology: Topology,
    mesh: Mesh,
    *,
    title: str,
    step: str,
    tokens: int,
    model_flops: float,
    routed: Routed,
    open_trips: Mapping[str, int],
) -> Plan:
    """Read a compiled step."""
    hbm = topology.chip.hbm / topology.chip.devices
    common: dict[str, Any] = {
        "title": title,
        "topology": topology.name,
        "devices": mesh.size,
        "mesh": ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1),
        "step": step,
        "tokens": tokens,
        "hbm": hbm,
        "fits": compiled.memory is not None,
        "complaint": compiled.too_large,
        "needed": compiled.needed,
        "memory": compiled.memory,
        "trace_seconds": compiled.trace_seconds,
        "compile_seconds": compiled.compile_seconds,
        "model_flops": model_flops / mesh.size,
        "xla_flops": compiled.flops_once,
        "rows": routed.rows,
    }
    if compiled.memory is None:
        return Plan(
            **common, flops=0.0, hbm_bytes=0.0, collectives=(), open_loops=(), roofline=None
        )
    program = hlo.parse(compiled.text, open_trips)
    done = work.count(program, routed.pairs)
    flops = done.flops + done.ragged_flops
    sent = tuple(collectives(program, mesh.shape))
    filled = [one.filled(routed.rows) for one in sent]
    return Plan(
        **common,
        flops=flops,
        hbm_bytes=done.hbm_bytes,
        collectives=sent,
        open_loops=program.open_loops,
        roofline=roofline(topology, coordinates(mesh), flops, done.hbm_bytes, filled),
    )


def coordinates(mesh: Mesh) -> np.ndarray:
    """Where in the torus every device of the mesh sits, in the mesh's order."""
    return np.array([device.coords for device in mesh.devices.flat], np.int64)


def ranked(plans: Sequence[Plan]) -> list[Plan]:
    """Those that fit by tokens per second, then those that do not by what they need."""
    return sorted(plans, key=lambda p: (not p.fits, -p.tokens_per_second, p.needed))
