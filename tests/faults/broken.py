"""Replies and rows, broken with knowledge of their grammar: tags, JSON, escapes, nesting, runs, bytes.

response     a generator of random numbers -> (a reply, the right calls)
row          the same -> a row of data: broken first as a value, then as text, then as bytes
"""

from __future__ import annotations

import copy
import json
import math
import random
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from data import demo, jsonl
from data.example import is_deeper
from grpo_jax import config

MEGABYTE = 2**20

CALLS = (
    [{"name": "weather", "arguments": {"city": "Oslo"}}],
    [{"name": "weather", "arguments": {"city": "Zürich \u2028 \U0001f600", "days": 3, "wind": True, "from": None}}],
    [{"name": "book.table", "arguments": {"people": 4, "price": 3.5, "at": [{"or": "8"}]}}, {"name": "now", "arguments": {}}],
    [],
    [{"name": "a", "arguments": {}}] * 3,
)  # fmt: skip
STRINGS = (
    "", " ", "x", "Oslo", "NaN", "</tool_call>", "<tool_call>", "<think>", "</think>", "<|im_end|>", "<|im_start|>assistant\n",
    "\0", "\x1b[2J", "\ud800", "\udc00\ud800", "\u202e", "\ufeff", "\u2028", "é", "e\u0301", "٣", "１２", "𝟙", "\\", '"', "'",
    "{tools}", "{0.__class__}", "%s%n", "{{7*7}}", "{% raw %}", "$(reboot)", "`reboot`", "; reboot", "../../etc/passwd",
    "<script>alert(1)</script>", "__import__('os').system('reboot')", "1e999", "9" * 4301, "a" * 5000,
)  # fmt: skip
PIECES = (
    *STRINGS, "<tool_call", "tool_call>", "<TOOL_CALL>", "<tool_call></tool_call>", "{", "}", "[", "]", "[]", "{}", ",", ":",
    "\n", "\t", '{"name": "', '"arguments": {', '"name": "f", ', "null", "true", "Infinity", "-Infinity", "-0", "0.1e-999",
    "1E400", "01", "+1", "1_000", "0x10", "\\ud83d", "\\ud83d\\ude00", "\\u0000", "\\u003c/tool_call>", "\\x41", "\\u12", '\\"',
    '"""', "```json", "#", "//", "=", "(", ")", "[f(a=1)]", "f(", "True", "None", "-", "\r\n", "\xa0", "\x85",
)  # fmt: skip
KEYS = (
    "name", "arguments", "role", "content", "function", "parameters", "properties", "required", "type", "id", "calls", "\ud800",
)  # fmt: skip
NUMBERS = (0, -1, 1.0, 10**4300, -(10**400), 5e-324, math.inf, -math.inf, math.nan, True, False, None)
DEPTHS = (2, 10, 63, 65, 99, 101, 199, 201, 499, 501, 900)
BRACKETS = ("[]", '{"a":}', "()", "{}")


def response(rng: random.Random, texts: Sequence[str] = ()) -> tuple[str, list[dict[str, Any]]]:
    """(a reply, the right calls): half of them broken from right ones as values, the others as text; most then as text, too."""
    answer = rng.choice(CALLS)
    if texts and rng.random() < 0.5:
        text = rng.choice(texts)
    else:
        calls: Any = copy.deepcopy(answer)
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            calls = broken_value(calls, rng)
        text = f"<think>{rng.choice(STRINGS)}</think>\n<tool_call>{written(calls, rng)}</tool_call>"
    for _ in range(rng.choice((0, 1, 1, 2, 4, 8))):
        text = broken_text(text, rng)
    return text[:MEGABYTE], answer


def row(rng: random.Random, rows: Sequence[Any] = ()) -> bytes:
    """A row as it stands in a file, without a line's end inside unless that was broken, too."""
    value: Any = copy.deepcopy(rng.choice((*_rows(), *rows)))
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 5))):
        value = broken_value(value, rng)
    text = written(value, rng)
    for _ in range(rng.choice((0, 0, 0, 0, 0, 0, 1, 2))):
        text = broken_text(text, rng)
    content = bytearray(text[:MEGABYTE].encode(errors=rng.choice(("surrogatepass", "backslashreplace"))))
    for _ in range(rng.choice((0, 0, 0, 0, 0, 0, 0, 1, 3))):
        if content:
            content[rng.randrange(len(content))] = rng.choice((0, 0x0A, 0x80, 0xFF, 0xC0, 0xED, rng.randrange(256)))
    return bytes(content)


@cache
def _rows() -> tuple[Any, ...]:
    """Right rows of all kinds that some loader takes."""
    tool = {"name": "weather", "description": "Weather.", "parameters": {"city": {"type": "string"}}}
    schema = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}
    other = {"name": "Book table (v2)", "description": "", "parameters": schema}
    call, asked = {"name": "weather", "arguments": {"city": "Oslo"}}, {"role": "user", "content": "How warm is Oslo?"}
    turns = [
        {"role": "system", "content": "Be brief."}, asked, {"role": "gpt", "content": "", "tool_calls": [{"function": call}]},
        {"role": "tool", "name": "weather", "content": {"celsius": 4}}, {"role": "human", "content": "And tomorrow?"},
    ]  # fmt: skip
    head = "The current time is 2024. Here is a list of functions in JSON format that you can invoke:\n"
    said = [("user", "Oslo?"), ("assistant", "[weather(city='Oslo')]"), ("tool", "4"), ("user", "And a table?"),
            ("assistant", '[Book table (v2)(city="Oslo", days=-2, x=[1, (2, "3")], y={"k": None}), weather(city="\\u00e9")]'),
            ("assistant", "Four degrees.")]  # fmt: skip
    conversation = [{"from": who, "value": text} for who, text in said]
    made = [jsonl.row_of(example) for example in demo.tasks(4, seed=1, held_out=False)]
    return (
        {"query": "How warm?", "tools": [tool], "answers": [call], "id": 3, "source": "mine", "reasoning": "why"},
        {"query": "How warm?", "tools": json.dumps([tool, other]), "answers": json.dumps([call, call])},
        {"messages": turns, "tools": [{"type": "function", "function": tool}, other], "answers": [{"function": call}]},
        {"query": "How warm?", "tools": [tool], "answers": [], "no_call": True},
        {"system": head + json.dumps([tool, other]) + ". Put it so.", "conversations": conversation},
        {"id": "item-1", "output": "<think></think><tool_call>[]</tool_call>", "token_count": 3, "truncated": False},
        tool,
        [tool, other],
        {"step": 1, "reward/mean": 0.5, "reason/correct": 0.5},
        {"question": [[asked]], "history": "user: Oslo?\nsystem: When?", "input": "User: Oslo?\nAI: Yes."},
        {"choices": [{"message": {"content": "[]", "reasoning": "so"}, "finish_reason": "stop"}], "usage": {"total": 3}},
        json.loads((config.DEMO_MODEL / "config.json").read_text()),
        *made,
    )


def broken_value(value: Any, rng: random.Random) -> Any:
    """The value with one thing wrong in it: another type, a strange number or text, a key less or more, a list around, ..."""
    places = _places(value)
    if not places:
        return _odd(rng)
    held, key = rng.choice(places)
    match rng.randrange(8):
        case 0 | 1 | 2:
            held[key] = _odd(rng)
        case 3:
            del held[key]
        case 4:
            held[key] = rng.choice(([held[key]], {rng.choice(KEYS): held[key]}, _as_text(held[key])))
        case 5 if isinstance(held, dict):
            held[rng.choice(KEYS)] = held.pop(key)
        case 6 if isinstance(held, list):
            held *= rng.choice((0, 2, 7))
        case _:
            other, there = rng.choice(places)
            held[key] = _odd(rng) if is_deeper(other[there], 60) else copy.deepcopy(other[there])  # deepcopy recurses
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (list or object, key) inside it, from the outside in; not of what is nested very deep, or repeated very often."""
    found, level = [], [value] if isinstance(value, (list, dict)) else []
    while level and len(found) < 300:
        inside = [(held, key) for held in level for key in _keys(held)]
        found += inside
        level = [held[key] for held, key in inside if isinstance(held[key], (list, dict))]
    return found


def _keys(held: Any) -> Sequence[Any]:
    return range(len(held)) if isinstance(held, list) else list(held)


def _as_text(value: Any) -> Any:
    try:
        return json.dumps(value)
    except (RecursionError, ValueError):
        return value


def _odd(rng: random.Random) -> Any:
    match rng.randrange(6):
        case 0:
            return rng.choice(NUMBERS)
        case 1 | 2:
            return rng.choice(STRINGS)
        case 3:
            deep: Any = rng.choice((None, "x", [], {}))
            for _ in range(rng.choice(DEPTHS)):
                deep = [deep] if rng.random() < 0.5 else {"a": deep}
            return deep
        case 4:
            return {rng.choice(KEYS): rng.choice(STRINGS) for _ in range(rng.randrange(1, 6))}
        case _:
            return rng.choice(([], {}, ["x"] * 30, [[1]], {"a": {"a": []}}, copy.deepcopy(rng.choice(CALLS)), "x" * 7))


def written(value: Any, rng: random.Random) -> str:
    """As JSON, in one of many ways; once in a while as Python."""
    try:
        if rng.random() < 0.03:
            return repr(value)
        style = rng.choice(({}, {"separators": (",", ":")})) if rng.random() < 0.95 else {"indent": 1}
        text = json.dumps(value, ensure_ascii=rng.random() < 0.5, **style)
        return json.dumps(text) if rng.random() < 0.05 else text
    except (RecursionError, ValueError):  # a number too long to be written
        return "[" * 500


def broken_text(text: str, rng: random.Random) -> str:
    """The text with one thing wrong: a piece put in, cut out, doubled or moved; at times a long run, or deep nesting."""
    at, end = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
    match rng.randrange(12):
        case 0 | 1 | 2 | 3:
            return text[:at] + rng.choice(PIECES) + text[at:]
        case 4:
            return text[:at] + text[end:]
        case 5:
            return text[:end]
        case 6:
            return text[:end] + text[at:end] * rng.choice((1, 1, 2, 20)) + text[end:]
        case 7:
            return text[end:] + text[at:end] + text[:at]
        case 8:
            return text[:at] + chr(rng.randrange(rng.choice((128, 0x3000, 0x110000)))) + text[at + 1 :]
        case 9:
            found = list(re.finditer(r'"[^"]{0,20}"|[\w.]+', text[at : at + 200]))
            spot = rng.choice(found) if found else None
            return text if spot is None else text[: at + spot.start()] + rng.choice(PIECES) + text[at + spot.end() :]
        case 10:
            piece = rng.choice(PIECES) or "["
            longest = MEGABYTE if rng.random() < 0.02 else 2000
            return text[:at] + piece * (int(longest ** rng.random()) // len(piece) + 1) + text[at:]
        case _:
            around, deep = rng.choice(BRACKETS), rng.choice((*DEPTHS, 20_000 if rng.random() < 0.02 else 40))
            return text[:at] + around[:-1] * deep + text[at:end] + around[-1] * rng.choice((deep, deep, 0)) + text[end:]
