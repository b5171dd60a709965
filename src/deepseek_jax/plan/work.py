"""What a compiled program computes and moves: FLOPs of its products, bytes to and from HBM."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from deepseek_jax.plan.hlo import Computation, Instruction, Program, Shape

# Neither read nor write: names for parts of what is there, and control flow.
_FREE = frozenset(
    """parameter constant iota tuple get-tuple-element bitcast while call conditional after-all
    partition-id replica-id opt-barrier domain async-start async-update""".split()  # noqa: SIM905
)
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_KERNEL = 'custom_call_target="tpu_custom_call"'
_GROUPED = re.compile(r"ragged_dot_tiling|jit\(t?gmm\)")
_ESTIMATE = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
_BYTES = re.compile(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"')
_DIMS = re.compile(r"(lhs|rhs)_(contracting|batch)_dims=\{([\d,]*)\}")


class Work(NamedTuple):
    """Per device and step."""

    flops: float
    """Of dense products, a multiplication and an addition each, and of other kernels."""
    ragged_flops: float
    """Of grouped (per-expert) products, of the rows that are there."""
    hbm_bytes: float
    """Operands and results of all that is not fused into something else."""


def count(program: Program, pairs: float | int = math.inf) -> Work:
    """Add up the program, loops by their trips.

    Args:
        program: a parsed module.
        pairs: (token, expert) pairs that a grouped product really has. Its buffer has room for
            more, and the kernels pass over the rest.
    """
    flops = ragged = moved = 0.0
    for name, computation in program.computations.items():
        if not (times := program.executions[name]):
            continue
        for instruction in computation.instructions.values():
            if instruction.opcode in ("convolution", "dot"):
                flops += times * product_flops(instruction, computation)
            elif is_ragged(instruction):
                ragged += times * ragged_flops(instruction, computation, pairs)
            elif instruction.opcode == "custom-call":
                flops += times * kernel_flops(instruction)
            if name not in program.fused:
                moved += times * _moved(program, instruction, computation)
    return Work(flops, ragged, moved)


def operand_shapes(instruction: Instruction, computation: Computation) -> list[Shape]:
    """One array per operand, an empty one where it is a tuple."""
    found = []
    for name in instruction.operands:
        operand = computation.instructions.get(name)
        single = operand is not None and len(operand.shapes) == 1
        found.append(operand.shapes[0] if operand and single else Shape("token", (), False))
    return found


# --- products --------------------------------------------------------------------------------


def product_flops(instruction: Instruction, computation: Computation) -> float:
    """Of a ``dot`` or a ``convolution``, as which XLA's TPU compiler writes its dots."""
    lhs, rhs = operand_shapes(instruction, computation)[:2]
    (out,) = instruction.shapes[:1]
    if instruction.opcode == "dot":
        dims = {(side, kind): text for side, kind, text in _DIMS.findall(instruction.attributes)}
        contracted = [int(i) for i in dims.get(("lhs", "contracting"), "").split(",") if i]
        return 2.0 * out.elements * math.prod(lhs.dims[i] for i in contracted)
    labels = _LABELS.search(instruction.attributes)
    assert labels is not None
    lhs_labels, rhs_labels, out_labels = labels.groups()
    flops = 2.0 * out.dims[out_labels.index("b")] * out.dims[out_labels.index("f")]
    flops *= rhs.dims[rhs_labels.index("i")]  # already the part of one feature group
    window = _window(instruction.attributes)
    for i, label in enumerate(sorted(set(out_labels) - {"b", "f"})):
        of = {key: values[i] for key, values in window.items() if len(values) > i}
        flops *= _positions(
            lhs.dims[lhs_labels.index(label)],
            rhs.dims[rhs_labels.index(label)],
            out.dims[out_labels.index(label)],
            of,
        )
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    return flops / (int(groups[1]) if groups else 1)


def _window(attributes: str) -> dict[str, list[str]]:
    found = _WINDOW.search(attributes)
    pairs = (part.partition("=") for part in found[1].split()) if found else ()
    return {key: text.split("x") for key, _, text in pairs}


def _positions(lhs: int, rhs: int, out: int, window: Mapping[str, str]) -> int:
    """Products along one spatial axis: pairs of output and kernel position that meet an input.

    A batched dot is a convolution with a window as wide as the batch, stretched so that each
    output meets one position only; to count the window's size would be wrong by that factor.
    """
    stride, stretch = int(window.get("stride", 1)), int(window.get("lhs_dilate", 1))
    apart = int(window.get("rhs_dilate", 1))
    low = int(window.get("pad", "0_0").partition("_")[0])
    at = np.arange(out)[:, None] * stride - low + np.arange(rhs)[None] * apart
    inside = (at >= 0) & (at <= (lhs - 1) * stretch) & (at % stretch == 0)
    return int(inside.sum())


def is_ragged(instruction: Instruction) -> bool:
    """A grouped product: XLA's own, the kernel its TPU compiler makes of it, or megablox's."""
    return instruction.opcode == "ragged-dot" or (
        instruction.opcode == "custom-call"
        and _KERNEL in instruction.attributes
        and _GROUPED.search(instruction.attributes) is not None
    )


def ragged_flops(
    instruction: Instruction, computation: Computation, pairs: float | int = math.inf
) -> float:
    """2 M K N: every row with one matrix, or (weight gradient) every row into one matrix."""
    shapes = [*operand_shapes(instruction, computation), *instruction.shapes]
    matrices = next(shape for shape in shapes if len(shape.dims) == 3)  # [G, K, N]
    each = 2.0 * math.prod(matrices.dims[1:])
    if estimate := kernel_flops(instruction):
        return min(estimate, each * pairs)
    rows = max(shape.dims[0] for shape in shapes if len(shape.dims) == 2)
    return each * min(rows, pairs)


def kernel_flops(instruction: Instruction) -> float:
    """What a Pallas kernel says of itself (``pl.CostEstimate``); 0 if it says nothing."""
    found = _ESTIMATE.search(instruction.attributes)
    return float(found[1]) if found else 0.0


# --- memory ----------------------------------------------------------------------------------


def _moved(program: Program, instruction: Instruction, computation: Computation) -> float:
    """Bytes that one execution reads from and writes to HBM.

    Where an instruction takes a slice of a large array, such as one layer of the stacked
    parameters, or writes one in place, only the slice is moved. Of a kernel that takes such an
    array nothing shows what it reads; it says so itself.
    """
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0.0
    operands = [computation.instructions.get(name) for name in instruction.operands]
    reads = [_in_hbm(x.shapes) if x is not None else 0 for x in operands]
    writes = _in_hbm(instruction.shapes)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * writes
    if opcode == "dynamic-update-slice":
        return 2.0 * reads[1]
    if opcode == "scatter":
        return reads[1] + 2.0 * sum(reads[2:])
    if opcode.endswith("-start"):  # its result repeats the operand
        return 2.0 * sum(reads)
    if opcode == "fusion" and (inner := _inner(program, instruction)) is not None:
        reads = [min(read, _read_inside(program, inner, i)) for i, read in enumerate(reads)]
        writes = min(writes, _written_inside(inner, writes))
    total = float(sum(reads) + writes)
    said = _BYTES.search(instruction.attributes) if opcode == "custom-call" else None
    # Not more than there is: some count what they read again.
    return min(total, float(said[1])) if said else total


def _in_hbm(shapes: tuple[Shape, ...]) -> float:
    return float(sum(shape.bytes for shape in shapes if shape.in_hbm))


def _inner(program: Program, fusion: Instruction) -> Computation | None:
    found = re.search(r"calls=%?([\w.\-]+)", fusion.attributes)
    return program.computations.get(found[1]) if found else None


def _read_inside(program: Program, inner: Computation, index: int) -> float:
    """How much of its input ``index`` a fusion reads: all, unless it only cuts slices from it."""
    name = next(
        (
            i.name
            for i in inner.instructions.values()
            if i.opcode == "parameter" and i.arguments == str(index)
        ),
        None,
    )
    if name is None:
        return math.inf
    total = 0.0
    waiting = [name]
    while waiting:
        name = waiting.pop()
        for user in inner.instructions.values():
            if name not in user.operands:
                continue
            if user.opcode == "bitcast":
                waiting.append(user.name)
            elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                total += user.bytes
            elif user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == name:
                continue  # written in place
            elif user.opcode == "fusion" and (nested := _inner(program, user)) is not None:
                at = [i for i, operand in enumerate(user.operands) if operand == name]
                total += sum(_read_inside(program, nested, i) for i in at)
            else:
                return math.inf
    return total


def _written_inside(inner: Computation, whole: float) -> float:
    """How much a fusion writes: the slices alone where it updates arrays in place."""
    root = inner.root
    names = root.operands if root.opcode == "tuple" else (root.name,)
    total = 0.0
    for name in names:
        result = inner.instructions.get(name)
        while result is not None and result.opcode == "bitcast":
            result = inner.instructions.get(result.operands[0])
        if result is None:
            return whole
        if result.opcode in ("dynamic-update-slice", "scatter"):
            # The updates come second; of a scatter third, after the indices.
            place = 1 if result.opcode == "dynamic-update-slice" else 2
            update = inner.instructions.get(result.operands[place])
            total += update.bytes if update is not None else result.bytes
        else:
            total += result.bytes
    return total
