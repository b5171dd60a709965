"""The least time that a step can take on a slice, from what it computes, moves and sends.

Three terms, each as if it ran alone at the published peak: products on the matrix units, traffic
to HBM, traffic between chips. The largest is the estimate (all else hidden behind it), their sum
the other extreme (nothing overlaps). Latencies, vector units and stalls are not in it: a measured
step is slower.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from deepseek_jax.plan.collectives import Collective
from deepseek_jax.plan.topology import Topology


class Roofline(NamedTuple):
    """Seconds a step."""

    compute: float
    hbm: float
    ici: float

    @property
    def bound(self) -> str:
        """The largest term."""
        return max(self._asdict(), key=lambda name: getattr(self, name))

    @property
    def best(self) -> float:
        """Everything hidden behind the largest term."""
        return max(self)

    @property
    def serial(self) -> float:
        """Nothing overlaps."""
        return sum(self)


def roofline(
    topology: Topology,
    coords: Int[np.ndarray, "devices dims"],
    flops: float,
    hbm_bytes: float,
    sent: Sequence[Collective],
) -> Roofline:
    """Per-device FLOPs, bytes and collectives against the peaks of a device."""
    chip = topology.chip
    return Roofline(
        flops / (chip.flops / chip.devices),
        hbm_bytes / (chip.hbm_bandwidth / chip.devices),
        sum(seconds(topology, coords, one) * one.executions for one in sent),
    )


def seconds(topology: Topology, coords: Int[np.ndarray, "devices dims"], one: Collective) -> float:
    """The least time of one execution of a collective on a torus.

    Gather, scatter and reduce can use both links of every dimension that the group spans, one
    where it is a line and not a ring. In an all-to-all each byte also passes through the chips
    between; of a dimension of n the middle carries a quarter of n times what a chip sends. A
    permute goes one way. Where members are d chips apart, d groups share the links.

    Args:
        topology: the slice.
        coords: of every device in mesh order.
        one: the collective.
    """
    link = topology.chip.link_bandwidth / topology.chip.devices
    members = coords[one.groups]  # [groups, size, dims]
    if one.kind == "collective-permute":
        hops = _hops(topology, members[:, 0], members[:, 1])
        return one.sent * max(float(hops.mean()), 1.0 if hops.any() else 0.0) / link
    spans = [span for d in range(len(topology.dims)) if (span := _span(topology, members, d))]
    if not spans:  # two devices of one chip
        return 0.0
    if one.kind in ("all-to-all", "ragged-all-to-all"):
        return max(one.sent * n / 4 * apart / links for n, apart, links in spans) / link
    return one.sent / sum(links / apart for _, apart, links in spans) / link


def _span(
    topology: Topology, members: Int[np.ndarray, "groups size dims"], d: int
) -> tuple[int, float, int] | None:
    """Of dimension d: chips of a group along it, their distance, and links (2 in a ring)."""
    along = np.unique(members[0, :, d])
    if len(along) == 1:
        return None
    apart = float(np.diff(along).min())
    whole = len(along) * apart == topology.dims[d]
    return len(along), apart, 2 if whole and topology.is_ring(d) else 1


def _hops(
    topology: Topology, a: Int[np.ndarray, "pairs dims"], b: Int[np.ndarray, "pairs dims"]
) -> Int[np.ndarray, "pairs"]:
    total = np.zeros(len(a), np.int64)
    for d, size in enumerate(topology.dims):
        straight = np.abs(a[:, d] - b[:, d])
        total += np.minimum(straight, size - straight) if topology.is_ring(d) else straight
    return total
