"""TPU topologies by name, with no TPU present, and the published figures of their chips."""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax

from deepseek_jax.types import UserError


class Chip(NamedTuple):
    """Published peaks of one chip; sizes in bytes, rates per second.

    From the "System architecture" tables of Google's documentation (cloud.google.com/tpu/docs:
    ``v5e``, ``v5p``, ``v6e``, ``tpu7x``).
    """

    flops: float
    """Dense BF16."""
    hbm: float
    hbm_bandwidth: float
    ici_bandwidth: float
    """Of all links of a chip together, both directions."""
    torus_dims: int
    """Dimensions of the network; two links for each."""
    full: int
    """Length from which a dimension closes to a ring (the multiples of it)."""
    devices: int = 1
    """What JAX shows as devices: two on a chip of two dies."""

    @property
    def link_bandwidth(self) -> float:
        """Of one link in one direction."""
        return self.ici_bandwidth / (4 * self.torus_dims)


_GB, _GIB = 1e9, 2.0**30
CHIPS = {
    "v5e": Chip(197e12, 16 * _GIB, 819 * _GB, 400 * _GB, 2, 16),
    "v5p": Chip(459e12, 95 * _GIB, 2765 * _GB, 1200 * _GB, 3, 4),
    "v6e": Chip(918e12, 32 * _GIB, 1638 * _GB, 800 * _GB, 2, 16),
    "tpu7x": Chip(2307e12, 192 * _GIB, 7380 * _GB, 1200 * _GB, 3, 4, devices=2),
}
# Pods of these sizes exist; a typing error should not become a compilation of hours.
_LARGEST = {"v5e": 256, "v5p": 8960, "v6e": 256, "tpu7x": 9216}


class Topology(NamedTuple):
    """A slice of a pod."""

    name: str
    """As in ``v5p:8x16x16``."""
    chip: Chip
    dims: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Their number."""
        return math.prod(self.dims)

    def is_ring(self, dim: int) -> bool:
        """Whether the network wraps around along a dimension."""
        whole = all(size % self.chip.full == 0 for size in self.dims)
        return self.dims[dim] % self.chip.full == 0 and (whole or self.chip.torus_dims == 2)


def parse_topology(text: str) -> Topology:
    """``v5p:8x16x16``: a kind of chip, and the sizes of the slice.

    Raises:
        UserError: for an unknown chip, a GPU, or sizes that no slice of that chip can have.
    """
    kind, _, sizes = text.strip().lower().partition(":")
    if kind not in CHIPS:
        gpu = " (GPUs are not planned for yet)" if _is_gpu(kind) else ""
        raise UserError(
            f"unknown topology {text!r}{gpu}; write one of {', '.join(CHIPS)} and the slice's "
            "sizes, as in v5p:4x4x4 or v6e:16x16."
        )
    chip = CHIPS[kind]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) or sizes.count("x") != chip.torus_dims - 1:
        example = "x".join(["4"] * chip.torus_dims)
        raise UserError(
            f"topology {text!r} needs {chip.torus_dims} sizes after the colon, as in "
            f"{kind}:{example}."
        )
    topology = Topology(f"{kind}:{sizes}", chip, tuple(int(size) for size in sizes.split("x")))
    if topology.chips > _LARGEST[kind]:
        raise UserError(
            f"topology {text!r} has {topology.chips} chips; the largest slice of {kind} has "
            f"{_LARGEST[kind]}."
        )
    return topology


def _is_gpu(kind: str) -> bool:
    return bool(re.match(r"(gpu|cuda|rocm|nvidia|amd|[abh]\d{2,3}|gh?b?200)", kind))


def topology_devices(topology: Topology) -> list[Any]:
    """The slice's devices as JAX would show them, made by libtpu out of its name alone.

    Raises:
        UserError: if libtpu is not installed, or knows no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "compiling for TPUs needs libtpu, which needs no TPU: pip install 'jax[tpu]'."
        )
    # Without these libtpu asks a metadata server which host of which slice this is, and waits;
    # and it takes a lock file for a device that is not there.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")  # any; the name below decides
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(topology.name, "tpu").devices
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"libtpu makes no topology {topology.name!r}: {reason}.") from error
    return list(devices)
