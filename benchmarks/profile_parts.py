"""Where a step's device time goes, by part of the model, from a profile and the compiled program.

A profile names instructions of the compiled program; these carry the ``jax.named_scope``s that the
model sets around its parts. An instruction belongs to the innermost part that its name mentions.
"""

import collections
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax

PARTS = (
    "attention_core",
    "mla",
    "router",
    "dispatch",
    "experts",
    "ffn",
    "head_and_loss",
    "optimizer",
)
REST = "the rest"
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_NAMED = re.compile(r"op_name=\"([^\"]*)\"")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_SCOPE = re.compile(r"(?<![\w.])(" + "|".join(PARTS) + r")(?![\w.])")
# They last as long as what they call.
_CALLERS = re.compile(r"^(while|call|conditional)[.\d]*$")


class Op(NamedTuple):
    """One instruction's share of the profile."""

    name: str
    part: str
    scope: str
    """The whole name that the program gives it."""
    milliseconds: float
    """Over all devices and steps in the profile; on CPU over all threads, so that two cores at work
    make two milliseconds of one."""
    times: int


def keep_names() -> None:
    """Before JAX is first used: captured into a graph, instructions have no names in a profile."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer="


def part_of(scope: str) -> str:
    """The innermost part in a name such as ``jit(step)/transpose(jvp(mla))/dot_general``."""
    found = _SCOPE.findall(scope)
    return found[-1] if found else REST


def ops(directory: str | pathlib.Path, program: str) -> list[Op]:
    """All instructions of a profile, the longest first; ``program`` is the compiled HLO text."""
    scopes = _scopes(program)
    total: dict[str, float] = collections.defaultdict(float)
    times: collections.Counter[str] = collections.Counter()
    for name, nanoseconds in _events(pathlib.Path(directory)):
        total[name] += nanoseconds
        times[name] += 1
    return [
        Op(name, part_of(scopes.get(name, "")), scopes.get(name, ""), ns / 1e6, times[name])
        for name, ns in _longest_first(total)
    ]


def _longest_first(times: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(times.items(), key=lambda item: -item[1])


def _scopes(program: str) -> dict[str, str]:
    """The name of every instruction; a fusion whose own says nothing has its commonest inside."""
    scopes: dict[str, str] = {}
    calls: dict[str, str] = {}
    inside: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    computation = ""
    for line in program.splitlines():
        if opening := _COMPUTATION.match(line):
            computation = opening[1]
        if not (instruction := _INSTRUCTION.match(line)):
            continue
        scope = _NAMED.search(line)
        scopes[instruction[1]] = scope[1] if scope else ""
        if scope and part_of(scope[1]) != REST:
            inside[computation][scope[1]] += 1
        if called := _CALLED.search(line):
            calls[instruction[1]] = called[1]
    for name, called in calls.items():
        if part_of(scopes[name]) == REST and inside[called]:
            scopes[name] = inside[called].most_common(1)[0][0]
    return scopes


def _events(directory: pathlib.Path) -> Iterator[tuple[str, float]]:
    for file in sorted(directory.rglob("*.xplane.pb")):
        planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
        devices = [p for p in planes if p.name.startswith("/device:")]
        for plane in devices or planes:
            for line in plane.lines:
                for event in line.events:
                    name = _instruction(event)
                    if name is not None and not _CALLERS.match(name):
                        yield name, event.duration_ns


def _instruction(event: jax.profiler.ProfileEvent) -> str | None:
    """The instruction that an event executes; a kernel's own name where none is said."""
    stats: Mapping[str, object] = {k: v for k, v in event.stats if k is not None}
    if "hlo_op" in stats:
        return str(stats["hlo_op"])
    return event.name if "kernel_details" in stats else None


def by_part(found: list[Op], steps: int) -> dict[str, float]:
    """Milliseconds a step of every part, the longest first."""
    parts: dict[str, float] = collections.defaultdict(float)
    for op in found:
        parts[op.part] += op.milliseconds / steps
    return dict(_longest_first(parts))


def table(found: list[Op], steps: int, most: int = 70) -> str:
    """Milliseconds a step of every part, then of the longest instructions."""
    parts = by_part(found, steps)
    whole = sum(parts.values())
    lines = [f"{whole:9.2f} ms a step in {len(found)} instructions"]
    lines += [f"{ms:9.2f} ms {ms / whole:6.1%}  {part}" for part, ms in parts.items()]
    for op in found[:most]:
        ms = op.milliseconds / steps
        lines.append(
            f"{ms:9.2f} ms {op.times / steps:6g}x {op.part:15} {op.name[:40]:40} {op.scope[-90:]}"
        )
    return "\n".join(lines)
