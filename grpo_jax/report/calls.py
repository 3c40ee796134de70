"""What a response says, and how its calls differ from the right ones.

    pieces     text -> [(kind, text)]: the thought, the block that is read, and all else
    compare    the calls of a response, the right calls -> call by call, argument by argument, what is the same and what not

Which text is the thought and which the calls, and which values are equal, is decided by grpo_jax.reward alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from grpo_jax.reward import block_span, canonical, think_span

# What may be wrong with a response whose calls can be read: (name in the data, what it means).
MARKS = {
    "missing_call": "a call is missing",
    "extra_call": "a call too many",
    "name": "another tool",
    "missing": "an argument is missing",
    "extra": "an argument too many",
    "value": "another value",
    "type": "another type",
}
MOST_ROWS = 200  # calls shown of a response, and arguments of a call: a model may write thousands
MOST_VALUE = 2000  # characters of a value: the whole stands in the response
MOST_NAME = 200  # characters of a name, or a path

_LIMIT = 8  # right calls, or calls, up to which every one is held against every other


def pieces(text: str) -> list[tuple[str, str]]:
    """The text cut into (kind, text), in order: "think" and "call" (the block that is read), with their tags, "" all else."""
    spans = [("call", block_span(text)), ("think", think_span(text))]
    spans = [(kind, span) for kind, span in spans if span]
    cuts = sorted({0, len(text), *(place for _, span in spans for place in span)})
    kinds = [next((kind for kind, (a, b) in spans if a <= begin < b), "") for begin in cuts[:-1]]
    return [(kind, text[a:b]) for kind, a, b in zip(kinds, cuts, cuts[1:], strict=False)]


def compare(calls: Sequence[dict], answer: Sequence[dict]) -> list[dict[str, Any]]:
    """One entry for each right call, then one for each call that is too many.

    calls: of `parse_calls`; answer: the right ones, {"name", "arguments"} each. An entry has "mark" ("" where the name is
    right), "name", "wanted" (the right name, where that is another) and "arguments": (mark, path, value, right value), the
    values as JSON, or None where there is none. Order does not matter: equal calls are paired first, then those of one name
    with the fewest differences, then what is left, in order.
    """
    pairs = _paired(calls, answer)
    taken = {i for i in pairs if i is not None}
    entries = []
    for right, place in zip(answer, pairs, strict=True):
        if place is None:
            entries.append(_entry("missing_call", right["name"], _rows({}, right["arguments"], "")))
            continue
        call = calls[place]
        rows = _rows(call["arguments"], right["arguments"])
        if call["name"] == right["name"]:
            entries.append(_entry("", call["name"], rows))
        else:
            entries.append(_entry("name", call["name"], rows) | {"wanted": right["name"][:MOST_NAME]})
    extra = [call for i, call in enumerate(calls) if i not in taken][:MOST_ROWS]
    return entries + [_entry("extra_call", call["name"], _rows(call["arguments"], {}, "")) for call in extra]


def _entry(mark: str, name: str, rows: list[tuple]) -> dict[str, Any]:
    return {"mark": mark, "name": name[:MOST_NAME], "arguments": rows}


def marks(entries: Sequence[dict[str, Any]]) -> set[str]:
    """All marks of MARKS that entries of `compare` have."""
    return {mark for entry in entries for mark in (entry["mark"], *(row[0] for row in entry["arguments"])) if mark}


def _paired(calls: Sequence[dict], answer: Sequence[dict]) -> list[int | None]:
    """For each right call the place of the call that is held against it."""
    free = dict.fromkeys(range(len(calls)))
    pairs: list[int | None] = [None] * len(answer)

    def take(place: int, found: int) -> None:
        pairs[place] = found
        del free[found]

    equal: dict[tuple[str, str], list[int]] = {}
    for i, call in enumerate(calls):
        equal.setdefault((call["name"], canonical(call["arguments"])), []).append(i)
    for place, right in enumerate(answer):
        if same := equal.get((right["name"], canonical(right["arguments"]))):
            take(place, same.pop(0))
    for place, right in enumerate(answer):
        if pairs[place] is None and (named := [i for i in free if calls[i]["name"] == right["name"]][:_LIMIT]):
            differing = {i: sum(bool(row[0]) for row in _rows(calls[i]["arguments"], right["arguments"])) for i in named}
            take(place, min(named, key=differing.get))
    for place in range(len(answer)):
        if pairs[place] is None and free:
            take(place, next(iter(free)))
    return pairs


def _rows(given: dict, right: dict, mark: str | None = None) -> list[tuple[str, str, str | None, str | None]]:
    """(mark, path, value, right value) of each argument, in the order of the right ones; `mark` for all, where it is given."""
    rows = []
    for found, path, value, wanted in _differences(given, right, ""):
        if len(rows) == MOST_ROWS:
            break
        rows.append((found if mark is None else mark, path[:MOST_NAME], _shown(value), _shown(wanted)))
    return rows


_NONE = object()  # no value: None is one


def _differences(given: Any, right: Any, path: str) -> Iterator[tuple[str, str, Any, Any]]:
    if isinstance(given, dict) and isinstance(right, dict) and (path == "" or given.keys() & right.keys()):
        for key in [*right, *(key for key in given if key not in right)]:
            inner = f"{path}.{key}" if path else key
            yield from _differences(given.get(key, _NONE), right.get(key, _NONE), inner)
    elif isinstance(given, list) and isinstance(right, list) and len(given) == len(right) > 0:
        for i, (one, other) in enumerate(zip(given, right, strict=True)):
            yield from _differences(one, other, f"{path}[{i}]")
    elif given is _NONE:
        yield "missing", path, given, right
    elif right is _NONE:
        yield "extra", path, given, right
    elif canonical(given) == canonical(right):
        yield "", path, given, right
    else:
        yield ("value" if _type(given) == _type(right) else "type"), path, given, right


def _type(value: Any) -> str:
    """JSON's type of a value, with whole numbers apart: 1 and 1.0 differ for the reward."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
    return "array" if isinstance(value, (list, tuple)) else "object"


def _shown(value: Any) -> str | None:
    if value is _NONE:
        return None
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MOST_VALUE else text[:MOST_VALUE] + "…"
