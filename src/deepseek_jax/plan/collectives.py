"""What a compiled program sends: bytes per kind of collective and per mesh axis.

Counted is what each device must send at the least, whatever the algorithm. With n devices in a
group and an operand of b bytes on each: all-gather (n-1) b; reduce-scatter and all-to-all
(n-1)/n b; all-reduce, which is one of each of the first two, 2 (n-1)/n b; collective-permute b
on the devices that send. A ragged-all-to-all is counted like an all-to-all of its whole buffer,
an upper bound, since what it really sends depends on the routing (see ``traffic``).
"""

import itertools
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from deepseek_jax.plan.hlo import Computation, Instruction, Program

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
_OPCODES = {opcode + suffix: opcode for opcode in KINDS for suffix in ("", "-start")}
_IOTA = re.compile(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}(?=,|$|\s)"
)
_LISTED = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


class Collective(NamedTuple):
    """One collective instruction of the program."""

    name: str
    kind: str
    axes: tuple[str, ...]
    """Mesh axes along which the devices of a group differ."""
    size: int
    """Devices in a group."""
    sent: float
    """Bytes that a device sends in one execution."""
    executions: int
    buffer: str
    """The largest operand, as in ``bf16[4096,7168]``."""
    rows: int
    """Its first dimension."""
    source: str
    """Where in the model it comes from: XLA's ``op_name``."""
    groups: Int[np.ndarray, "groups size"]
    """Positions in the mesh."""
    is_async: bool
    """Split into a start and a done, with other work between them."""

    @property
    def total(self) -> float:
        """Bytes that a device sends in one step."""
        return self.sent * self.executions

    def filled(self, rows: float | int) -> "Collective":
        """A ragged exchange whose buffer holds so many rows; any other is as it was."""
        if self.kind != "ragged-all-to-all":
            return self
        return self._replace(sent=self.sent * min(1.0, rows / self.rows))


def collectives(program: Program, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Every collective that is executed and sends anything, largest total first.

    ``mesh_shape`` are the axes and sizes of the mesh that the program was compiled for, in order.
    """
    found = []
    for name, computation in program.computations.items():
        if not (times := program.executions[name]):
            continue
        for instruction in computation.instructions.values():
            kind = _OPCODES.get(instruction.opcode)
            if kind is None:
                continue
            one = _collective(kind, instruction, computation, times, mesh_shape)
            if one.size > 1 and one.sent:
                found.append(one)
    return sorted(found, key=lambda one: -one.total)


def _collective(
    kind: str,
    instruction: Instruction,
    computation: Computation,
    times: int,
    mesh_shape: Mapping[str, int],
) -> Collective:
    groups = parse_groups(instruction.attributes, math.prod(mesh_shape.values()))
    size = groups.shape[1]
    if kind == "all-reduce" and _is_scattered(instruction, computation):
        kind = "reduce-scatter"
    names = instruction.operands[:1] if kind == "ragged-all-to-all" else instruction.operands
    arrays = [
        shape
        for name in names
        if name in computation.instructions
        for shape in computation.instructions[name].shapes
    ]
    held = sum(shape.bytes for shape in arrays)
    if kind == "all-reduce":  # TPUs round a float32 operand to a bfloat16 result before sending
        held = min(held, instruction.bytes)
    factor = {
        "all-gather": size - 1,
        "all-reduce": 2 * (size - 1) / size,
        "collective-permute": len(groups) / math.prod(mesh_shape.values()),
    }.get(kind, (size - 1) / size)
    largest = max(arrays, key=lambda shape: shape.bytes, default=None)
    source = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return Collective(
        instruction.name,
        kind,
        axes_of(groups, mesh_shape),
        size,
        float(held * factor),
        times,
        "" if largest is None else f"{largest.dtype}[{','.join(map(str, largest.dims))}]",
        largest.dims[0] if largest is not None and largest.dims else 1,
        source[1] if source else "",
        groups,
        instruction.opcode.endswith("-start") or computation.name.startswith("async"),
    )


def _is_scattered(instruction: Instruction, computation: Computation) -> bool:
    """An all-reduce of which each device keeps its own part alone.

    XLA's TPU compiler writes a reduce-scatter as a fusion of all-reduce and dynamic-slice; the
    kernel that comes of it sends what a reduce-scatter sends.
    """
    users = [i for i in computation.instructions.values() if instruction.name in i.operands]
    while len(users) == 1 and users[0].opcode == "bitcast":
        through = users[0].name
        users = [i for i in computation.instructions.values() if through in i.operands]
    return "scatter" in computation.name and len(users) == 1 and users[0].opcode == "dynamic-slice"


def parse_groups(attributes: str, devices: int) -> Int[np.ndarray, "groups size"]:
    """The groups of a collective, as positions in the mesh; of a permute its (from, to) pairs.

    Groups are written in four ways: listed ``{{0,1},{2,3}}``; as an iota
    ``[2,2]<=[2,2]T(1,0)``; by axes of a mesh ``mesh['a'=2,'b'=2] {'b'}``, which may be parts of
    axes, ``'b':(1)2``; or empty, meaning all devices.
    """
    if found := _PAIRS.search(attributes):
        pairs = re.findall(r"\{(\d+),(\d+)\}", found[1])
        kept = [(int(a), int(b)) for a, b in pairs if a != b]
        return np.array(kept, np.int64).reshape(-1, 2)
    if found := _IOTA.search(attributes):
        return _iota(found[1])
    if found := _MESH.search(attributes):
        return _mesh_groups(*found.groups())
    if (found := _LISTED.search(attributes)) and found[1]:
        listed = re.findall(r"\{([\d,]+)\}", found[1])
        return np.array([[int(i) for i in group.split(",")] for group in listed], np.int64)
    return np.arange(devices, dtype=np.int64)[None]


def _iota(text: str) -> Int[np.ndarray, "..."]:
    shape, _, source = text.partition("<=")
    source, _, order = source.partition("T")
    sizes = [int(i) for i in source.strip("[]").split(",")]
    ids = np.arange(math.prod(sizes), dtype=np.int64).reshape(sizes)
    if order:
        ids = ids.transpose([int(i) for i in order.strip("()").split(",")])
    return ids.reshape([int(i) for i in shape.strip("[]").split(",")])


def _mesh_groups(axes: str, device_ids: str | None, grouped: str) -> Int[np.ndarray, "groups size"]:
    sizes = {
        name.strip("' "): int(size)
        for name, _, size in (a.rpartition("=") for a in axes.split(","))
    }
    ids = np.arange(math.prod(sizes.values()), dtype=np.int64)
    if device_ids and device_ids.startswith("["):  # an iota that is reshaped and transposed
        ids = _iota(f"[{len(ids)}]<={device_ids}")
    elif device_ids:
        ids = np.array([int(i) for i in device_ids.split(",")], np.int64)
    # Cut every axis at the borders of its parts, then bring the grouped parts to the end.
    wanted = [_part(text, sizes) for text in grouped.split(",") if text]
    shape, labels = [], []
    for name, size in sizes.items():
        cuts = sorted(
            {1, size} | {edge for axis, pre, n in wanted if axis == name for edge in (pre, pre * n)}
        )
        for low, high in itertools.pairwise(cuts):
            shape.append(high // low)
            labels.append((name, low, high // low))
    last = [
        i
        for axis, pre, n in wanted
        for i, (name, low, part) in enumerate(labels)
        if name == axis and pre <= low and low * part <= pre * n
    ]
    first = [i for i in range(len(shape)) if i not in last]
    size = math.prod(shape[i] for i in last)
    return ids.reshape(shape).transpose(first + last).reshape(-1, size)


def _part(text: str, sizes: Mapping[str, int]) -> tuple[str, int, int]:
    """``'b':(2)4`` is the 4 of axis b that comes after its outer 2; ``'b'`` all of it."""
    name, _, part = text.partition(":")
    name = name.strip("' ")
    if not part:
        return name, 1, sizes[name]
    before, _, size = part.removeprefix("(").partition(")")
    return name, int(before), int(size)


def axes_of(
    groups: Int[np.ndarray, "groups size"], mesh_shape: Mapping[str, int]
) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ."""
    places = np.unravel_index(groups, tuple(mesh_shape.values()))
    return tuple(
        name
        for name, place in zip(mesh_shape, places, strict=True)
        if (place != place[:, :1]).any()
    )
