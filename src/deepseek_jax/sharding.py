"""Meshes, and the one table from logical axes to mesh axes. No other file names a mesh axis."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.types import UserError

# Slowest network first: what crosses the pod or host boundary is what communicates least.
MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")

# logical axis -> mesh axis (or axes). Parameters state logical axes beside their shapes.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "q_lora": None,
    "kv_lora": None,
    "heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "expert": "expert",
    "norm": None,
    "accumulate": None,
    # Expert parallelism is carved out of data parallelism, as in V3 section 3.2: every
    # device of the expert axis also holds its own sequences.
    "batch": ("data", "fsdp", "expert"),
    "sequence": "context",
}


def parse_mesh(text: str) -> dict[str, int]:
    """``"data=2,expert=4"`` -> ``{"data": 2, "expert": 4}``; ``-1`` fills one axis.

    Raises:
        UserError: for an unknown or repeated axis, a size that is not a positive number or
            -1, or more than one -1.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES:
            raise UserError(f"unknown mesh axis {axis!r}; the axes are {', '.join(MESH_AXES)}.")
        if axis in sizes:
            raise UserError(f"mesh axis {axis!r} is given twice in {text!r}.")
        try:
            sizes[axis] = int(size)
        except ValueError:
            raise UserError(f"mesh axis {part!r} needs a whole number, as in {axis}=2.") from None
        if sizes[axis] < 1 and sizes[axis] != -1:
            raise UserError(f"mesh axis {part!r} must be at least 1, or -1 to fill.")
    if list(sizes.values()).count(-1) > 1:
        raise UserError(f"only one axis of {text!r} can be -1.")
    return sizes


def make_mesh(text: str = "data=-1", devices: list[Any] | None = None) -> Mesh:
    """A mesh over all five axes; those not named have size 1.

    Raises:
        UserError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = parse_mesh(text)
    known = math.prod(size for size in sizes.values() if size != -1)
    for axis, size in sizes.items():
        if size == -1:
            sizes[axis] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise UserError(
            f"mesh {text!r} asks for {math.prod(sizes.values()) or known} devices, but there are "
            f"{len(devices)}; change a size or set one axis to -1."
        )
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    return Mesh(np.asarray(devices).reshape(shape), MESH_AXES)


def spec(*logical: str | None) -> PartitionSpec:
    """The mesh axes of an array whose axes have these logical names (None: replicated)."""
    return PartitionSpec(*(None if name is None else RULES[name] for name in logical))


def sharding(mesh: Mesh, *logical: str | None) -> NamedSharding:
    """``spec`` on a mesh."""
    return NamedSharding(mesh, spec(*logical))


def param_shardings(mesh: Mesh, logical_axes: Any) -> Any:
    """Shardings for a tree of logical-axis tuples (see ``model.transformer.logical_axes``)."""
    return jax.tree.map(
        lambda axes: sharding(mesh, *axes), logical_axes, is_leaf=lambda x: isinstance(x, tuple)
    )


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are divided."""
    axes = RULES["batch"]
    assert isinstance(axes, tuple)
    return math.prod(mesh.shape[axis] for axis in axes)
