"""Bytes that a compiled program sends between devices, read from its text.

XLA's own cost analysis counts the body of a loop once. Here every collective counts as often as the loops around it turn:
by `known_trip_count` where the compiler writes it, else by the bound in the loop's condition. Bytes are those that one
device receives when n of them do it in a ring: (n - 1) / n of what is gathered, scattered or exchanged, twice that of an
all-reduce.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(r"\b(calls|to_apply|body|branch_computations|called_computations)=(?:%([\w.\-]+)|\{([^}]*)\})")
_CONDITION = re.compile(r"\bcondition=%([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:?\s*\{"n":"?(\d+)')
_SHAPE = re.compile(r"\b(pred|bf16|[sufc]\d+|f8\w+)\[([\d,]*)\]")
_BOUND = re.compile(r"%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)")


@dataclass(frozen=True)
class Traffic:
    """Of one run of a program, bytes that each device receives."""

    by_kind: dict[str, float] = field(default_factory=dict)
    local: float = 0.0  # by collectives whose devices are of one host
    across: float = 0.0  # by those of several hosts
    unbounded: int = 0  # collectives in loops whose trips could not be read; counted as one

    @property
    def total(self) -> float:
        return self.local + self.across


@dataclass
class _Computation:
    lines: list[str] = field(default_factory=list)  # collectives
    calls: list[tuple[str, str | None]] = field(default_factory=list)  # (callee, condition of a loop; text of its trips)
    constants: dict[str, int] = field(default_factory=dict)
    root: str = ""  # the line of its result

    def bound(self) -> int | None:
        """Of a loop's condition: the one constant that it compares with."""
        compared = [n for name, n in self.constants.items() if re.search(rf"%{re.escape(name)}\b(?![.\-])", self.root)]
        found = compared or list(self.constants.values())
        return found[0] if len(found) == 1 else None


def read(text: str, hosts: Sequence[int]) -> Traffic:
    """The traffic of a program from `compiled.as_text()`; `hosts` has the host of each device, in the order of the mesh."""
    computations, entry = _computations(text)
    total: dict[str, float] = {}
    local = across = 0.0
    unbounded, seen = 0, set()

    def visit(name: str, times: int, known: bool) -> None:
        nonlocal local, across, unbounded
        computation = computations.get(name, _Computation())
        for line in computation.lines:
            # TPUs spread one collective over several fusions, which all show it; a channel is one collective.
            channel = re.search(r"channel_id=(\d+)", line)
            key = (channel[1], line.split(" = ", 1)[1].split("{")[0]) if channel else None
            if key and name.startswith(("fused_computation", "async_collective")):
                if key in seen:
                    continue
                seen.add(key)
            kind, size, wide = _cost(line, hosts, scatter="all-reduce-scatter" in name)
            total[kind] = total.get(kind, 0.0) + times * size
            local, across = (local, across + times * size) if wide else (local + times * size, across)
            unbounded += not known
        for callee, trips in computation.calls:
            if trips is None:
                visit(callee, times, known)
            elif trips.isdigit():
                visit(callee, times * int(trips), known)
            else:
                bound = computations[trips].bound() if trips in computations else None
                visit(callee, times * (bound or 1), known and bound is not None)

    visit(entry, 1, True)
    return Traffic(total, local, across, unbounded)


def _computations(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry, now = "", _Computation()
    for line in text.splitlines():
        if not line.startswith(" "):
            if line.endswith("{") and (header := _HEADER.match(line)):
                now = computations[header[2]] = _Computation()
                entry = header[2] if header[1] else entry
            continue
        if (bound := _BOUND.search(line)) is not None:
            now.constants[bound[1]] = int(bound[2])
        if line.lstrip().startswith("ROOT "):
            now.root = line
        if _COLLECTIVE.search(line):
            now.lines.append(line)
        for kind, one, several in _CALLED.findall(line):
            for callee in [one] if one else re.findall(r"%([\w.\-]+)", several):
                trips = None
                if kind == "body" and (condition := _CONDITION.search(line)):
                    known = _TRIPS.search(line)
                    trips = known[1] if known else condition[1]
                now.calls.append((callee, trips))
    # Most computations are the insides of fusions: those from which no collective can be reached are not worth a visit.
    worth = {name for name, c in computations.items() if c.lines}
    while more := {n for n, c in computations.items() if n not in worth and any(callee in worth for callee, _ in c.calls)}:
        worth |= more
    for computation in computations.values():
        computation.calls = [call for call in computation.calls if call[0] in worth]
    return computations, entry


def _cost(line: str, hosts: Sequence[int], scatter: bool) -> tuple[str, float, bool]:
    """(kind, bytes that a device receives, whether it leaves a host) of the collective of one line."""
    found = _COLLECTIVE.search(line)
    kind, result = found[1], line[: found.start()].split(" = ", 1)[1]
    if found[2] and kind != "all-reduce":  # (operands, results, ...)
        result = _elements(result)[1]
    size = sum(_bytes(*shape) for shape in _SHAPE.findall(result))
    if kind == "collective-permute":
        pairs = np.array(re.findall(r"\{(\d+),(\d+)\}", line.split("source_target_pairs=")[1].split("}}")[0] + "}"), int)
        host = np.asarray(hosts)[pairs]
        return kind, float(size), bool((host[:, 0] != host[:, 1]).any())
    groups = _groups(line, len(hosts))
    n, host = groups.shape[1], np.asarray(hosts)[groups]
    wide = bool((host != host[:, :1]).any())
    if kind == "all-reduce" and scatter:
        kind = "reduce-scatter"
    elif kind == "reduce-scatter":
        size *= n
    return kind, size * (n - 1) / n * (2 if kind == "all-reduce" else 1), wide


def _elements(text: str) -> list[str]:
    """Of a tuple's text, that of its elements."""
    parts, depth = [""], 0
    for letter in text.strip()[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _bytes(dtype: str, extents: str) -> int:
    bits = 8 if dtype in ("pred",) or dtype.startswith("f8") else int(re.search(r"\d+", dtype)[0])
    return math.prod(map(int, filter(None, extents.split(",")))) * bits // 8


def _groups(line: str, count: int) -> np.ndarray:
    """[groups, devices of each], of the three ways in which XLA writes them."""
    text = line.split("replica_groups=", 1)[1] if "replica_groups=" in line else ""
    everyone = np.arange(count)
    if text.startswith("mesh["):  # mesh['a'=8,'b'=8] {'a'}, or of a part of an axis 'a':(before)size
        sizes = [int(n) for n in re.findall(r"'=(\d+)", text.split("]")[0])]
        names = re.findall(r"'(\w+)'=", text.split("]")[0])
        inside = text.split("]", 1)[1].split("{", 1)[1].split("}")[0]
        shape, chosen = [], []
        parts = {m[0]: m[1:] for m in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", inside)}
        for name, size in zip(names, sizes, strict=True):
            before, own = (int(x) if x else None for x in parts.get(name, ("", "")))
            if name in parts and own:
                chosen.append(len(shape) + 1)
                shape += [before, own, size // before // own]
            else:
                if name in parts:
                    chosen.append(len(shape))
                shape.append(size)
        order = [axis for axis in range(len(shape)) if axis not in chosen] + chosen
        return everyone.reshape(shape).transpose(order).reshape(-1, math.prod(shape[axis] for axis in chosen))
    if text.startswith("["):  # [groups,devices]<=[extents]T(order)
        numbers = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
        shape, extents, order = ([int(x) for x in part.split(",")] if part else None for part in numbers.groups())
        ids = np.arange(math.prod(extents)).reshape(extents)
        return (ids.transpose(order) if order else ids).reshape(shape[0], -1)
    listed = re.findall(r"\{([\d,]+)\}", text.split("}}")[0] + "}") if text.startswith("{{") else []
    return np.array([[int(x) for x in group.split(",")] for group in listed]) if listed else everyone[None]
