"""Reading a compiled program: computations, instructions, and how often each is executed.

XLA's own cost analysis looks at every instruction once, also inside a loop over 58 layers. Here
the call graph is followed from the entry, and what a loop's body does counts once per trip.
"""

import functools
import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLS = re.compile(
    r"(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# Reductions name a scalar computation that is not executed as such.
_APPLIED = frozenset({"call", "async-start", "custom-call"})
_GONE = frozenset({"async-done", "async-update"})  # they repeat the computation of async-start


class Shape(NamedTuple):
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool
    """False where the layout names another memory (``S(1)`` is a TPU's VMEM)."""

    @property
    def elements(self) -> int:
        """Their number."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Without the padding of a tiled layout."""
        return math.ceil(self.elements * _element_bytes(self.dtype))


class Instruction(NamedTuple):
    """One line of HLO."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    arguments: str
    """What stands between the parentheses."""
    attributes: str
    """What stands after them."""
    is_root: bool

    @property
    def bytes(self) -> int:
        """Of all arrays of the result."""
        return sum(shape.bytes for shape in self.shapes)


class Computation(NamedTuple):
    """A named list of instructions, by name and in order."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """The one whose result is the computation's."""
        return next(
            (i for i in self.instructions.values() if i.is_root),
            next(reversed(self.instructions.values())),
        )


class Call(NamedTuple):
    """An edge of the call graph."""

    caller: str
    callee: str
    instruction: Instruction
    trips: int


class Program(NamedTuple):
    """A parsed module."""

    computations: dict[str, Computation]
    entry: str
    executions: dict[str, int]
    """How often each computation runs in one execution of the program."""
    fused: frozenset[str]
    """Computations inside a fusion: what they do stays on chip."""
    open_loops: tuple[str, ...]
    """Loops that are reached and whose trip count depends on data."""


def parse(text: str, open_trips: Mapping[str, int] = MappingProxyType({})) -> Program:
    """Read ``compiled.as_text()``.

    Branches of a conditional count once each, an upper bound.

    Args:
        text: a module, as XLA prints it.
        open_trips: how often the body of a loop counts whose trips depend on data, by a name in
            its scope (``jax.named_scope``). Others count as not entered: they are the further
            rounds of dispatch that only skewed routing needs.
    """
    computations, entry = _computations(text)
    calls, open_loops = [], []
    for computation in computations.values():
        for instruction in computation.instructions.values():
            found, known = _calls(computations, computation, instruction, open_trips)
            calls += found
            if not known:
                open_loops.append(instruction.name)
    executions = dict.fromkeys(computations, 0)
    executions[entry] = 1
    outgoing: dict[str, list[Call]] = {}
    for call in calls:
        outgoing.setdefault(call.caller, []).append(call)
    for name in _callers_first(entry, outgoing):
        for call in outgoing.get(name, []):
            executions[call.callee] += executions[name] * call.trips
    fused = {call.callee for call in calls if call.instruction.opcode == "fusion"}
    reached = tuple(
        call.instruction.name
        for call in calls
        if call.instruction.name in open_loops and executions[call.caller]
    )
    return Program(computations, entry, executions, frozenset(fused), tuple(dict.fromkeys(reached)))


def _computations(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")) and line.rstrip().endswith("{"):
            name = _first_name(line.removeprefix("ENTRY").strip())
            current = computations.setdefault(name, Computation(name, {}))
            if line.startswith("ENTRY"):
                entry = name
        elif line.startswith("}"):
            current = None
        elif current is not None and (instruction := _instruction(line)) is not None:
            current.instructions[instruction.name] = instruction
    return computations, entry


def _first_name(text: str) -> str:
    found = re.match(r"%?([\w.\-]+)", text)
    assert found is not None
    return found[1]


def _instruction(line: str) -> Instruction | None:
    line = line.strip()
    is_root = line.startswith("ROOT ")
    name, equals, rest = line.removeprefix("ROOT ").partition(" = ")
    if not equals:
        return None
    end = _closing(rest) + 1 if rest.startswith("(") else rest.find(" ")
    shapes, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    start = len(opcode)
    stop = start + _closing(rest[start:])
    arguments = rest[start + 1 : stop]
    return Instruction(
        name.lstrip("%"),
        opcode,
        parse_shapes(shapes),
        tuple(_NAME.findall(arguments)),
        arguments,
        rest[stop + 1 :],
        is_root,
    )


def _closing(text: str) -> int:
    """Where the parenthesis that opens ``text`` closes."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.start()
    return len(text)


@functools.lru_cache(maxsize=65536)
def parse_shapes(text: str) -> tuple[Shape, ...]:
    """The arrays in ``bf16[8,128]{1,0:T(8,128)(2,1)S(1)}`` or in a tuple of such."""
    text = re.sub(r"/\*.*?\*/", "", text)
    return tuple(
        Shape(
            dtype,
            tuple(int(size) for size in dims.split(",") if size),
            "S(" not in layout,
        )
        for dtype, dims, layout in _SHAPE.findall(text)
    )


def _element_bytes(dtype: str) -> float:
    if dtype in _BYTES:
        return float(_BYTES[dtype])
    bits = re.match(r"[a-z]+(\d+)", dtype)  # f8e4m3fn: the first number
    return int(bits[1]) / 8 if bits else 0.0


# --- the call graph --------------------------------------------------------------------------


def _calls(
    computations: dict[str, Computation],
    caller: Computation,
    instruction: Instruction,
    open_trips: Mapping[str, int],
) -> tuple[list[Call], bool]:
    """The computations that an instruction executes, and whether it is known how often."""
    if instruction.opcode in _GONE or "=" not in instruction.attributes:
        return [], True
    calls, known = [], True
    for kind, name, several in _CALLS.findall(instruction.attributes):
        names = _NAME.findall(several) if several else [name]
        if kind == "to_apply" and instruction.opcode not in _APPLIED:
            continue
        trips = 1
        if instruction.opcode == "while":
            counted = _trips(computations, caller, instruction)
            known = counted is not None
            trips = _assumed(instruction, open_trips) if counted is None else counted
        calls += [
            Call(caller.name, callee, instruction, trips)
            for callee in names
            if callee in computations
        ]
    return calls, known


def _assumed(loop: Instruction, open_trips: Mapping[str, int]) -> int:
    return next((n for scope, n in open_trips.items() if scope in loop.attributes), 0)


def _callers_first(entry: str, outgoing: dict[str, list[Call]]) -> list[str]:
    order: list[str] = []
    seen: set[str] = set()
    stack = [(entry, False)]
    while stack:
        name, left = stack.pop()
        if left:
            order.append(name)
        elif name not in seen:
            seen.add(name)
            stack.append((name, True))
            stack += [(call.callee, False) for call in outgoing.get(name, [])]
    return order[::-1]


def _trips(
    computations: dict[str, Computation], caller: Computation, loop: Instruction
) -> int | None:
    """Of a loop that counts up by one: written in its attributes, or limit minus start."""
    if found := _TRIPS.search(loop.attributes):
        return int(found[1])
    attributes = {kind: name for kind, name, _ in _CALLS.findall(loop.attributes) if kind}
    condition = computations.get(attributes.get("condition", ""))
    if condition is None:
        return None
    compare = condition.root
    inputs: tuple[str, ...] | None = None
    if compare.opcode == "fusion":  # the comparison may be wrapped
        inputs = compare.operands
        condition_of_fusion = computations.get(_called(compare))
        if condition_of_fusion is None:
            return None
        compare = condition_of_fusion.root
        operands = [
            _fusion_input(condition_of_fusion, name, inputs) or name for name in compare.operands
        ]
    else:
        operands = list(compare.operands)
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return None
    counter, limit = (
        _value_in_loop(computations, caller, loop, condition, name) for name in operands
    )
    return None if counter is None or limit is None else max(limit - counter, 0)


def _called(instruction: Instruction) -> str:
    found = re.search(r"calls=%?([\w.\-]+)", instruction.attributes)
    return found[1] if found else ""


def _fusion_input(fusion: Computation, name: str, inputs: tuple[str, ...]) -> str | None:
    inner = fusion.instructions.get(name)
    if inner is None or inner.opcode != "parameter":
        return None
    return inputs[int(inner.arguments)]


def _value_in_loop(
    computations: dict[str, Computation],
    caller: Computation,
    loop: Instruction,
    condition: Computation,
    name: str,
) -> int | None:
    """A constant of the condition, or the first value of an element of the loop's state."""
    instruction = condition.instructions.get(name)
    if instruction is None:
        return None
    if instruction.opcode == "get-tuple-element":
        index = re.search(r"index=(\d+)", instruction.attributes)
        state = caller.instructions.get(loop.operands[0])
        if index is None or state is None or state.opcode != "tuple":
            return None
        return _constant(computations, caller, state.operands[int(index[1])])
    return _constant(computations, condition, name)


def _constant(computations: dict[str, Computation], where: Computation, name: str) -> int | None:
    """An integer that the program states, through copies and broadcasts of it."""
    instruction = where.instructions.get(name)
    while instruction is not None:
        if instruction.opcode == "constant":
            text = instruction.arguments.strip("{}")
            return int(text) if re.fullmatch(r"-?\d+", text) else None
        if instruction.opcode == "fusion":
            where = computations.get(_called(instruction), where)
            instruction = where.root if not instruction.operands else None
        elif instruction.opcode in ("copy", "copy-done", "copy-start", "bitcast", "broadcast"):
            instruction = where.instructions.get(instruction.operands[0])
        else:
            return None
    return None
