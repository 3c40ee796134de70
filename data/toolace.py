"""Conversations of ToolACE to Examples: one for each turn of the assistant that calls tools, or a reason why there is none.

    row {"system", "conversations": [{"from", "value"}]}
        system           --system_of-->   the tools, a JSON list amid text, and the time, where it is told
        assistant turns  --calls_of-->    [name(key=value, ...), ...] by `parse_calls`, or prose
        both             --examples_of--> one Example or reason a turn; the turns before it are its messages

The assistant's turns in ToolACE (Team-ACE/ToolACE, arXiv 2409.00920) write calls like Python with literals for values, but
a name is whatever the API is called (`Get User (Beta)`, `M2.5+ Earthquakes, Past Hour`), `true` stands beside `True`, and
some values are no literals at all. So the calls are read by a parser of their own: never by `eval`, in linear time, to a
bounded depth. What it does not take for certain it refuses, and the turn is dropped: a wrong answer would be rewarded.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from data import jsonl
from data.example import Example

# Why a turn is dropped, beside the reasons of `jsonl`. What cannot be read at all drops every answer of the conversation.
NO_ANSWER = "no_answer"  # a conversation without a turn of the assistant
CALLS_DO_NOT_PARSE = "calls_do_not_parse"
AFTER_A_BAD_CALL = "after_a_bad_call"  # an earlier turn of the conversation, and so of the context, was dropped for its call

DEEPEST = 64  # lists and objects inside each other in a value
LONGEST_NUMBER = 400  # characters; the largest float has 309 digits
MOST_TOOLS = 1000  # of a row: each of their names is looked for in each answer

_TOOLS = re.compile(r"list\s+of\s+functions\s+in\s+JSON\s+format\s+that\s+you\s+can\s+invoke[^\[]*+")
_TIME = re.compile(r"The current (?:time|date) [^\n]*")


def examples_of(row: Any, row_id: str, *, keep_no_call: bool = False) -> list[Example | str]:
    """One Example or reason for each turn of the assistant, in their order; one reason where there is no such turn.

    keep_no_call: prose is an answer, too: that nothing is to be called. `row_id` names the conversation; its answers
    are `row_id#1`, ... After a call that is dropped the turns behind are dropped as well, since their context holds it.
    """
    if not isinstance(row, dict):
        return [jsonl.NOT_AN_OBJECT]
    turns = jsonl.parsed(_turns, row.get("conversations"))
    if turns is None:
        return [jsonl.MESSAGES_DO_NOT_PARSE]
    answers = sum(role == "assistant" for role, _ in turns)
    system = jsonl.parsed(system_of, row.get("system"))
    if not answers or system is None:
        return [jsonl.TOOLS_DO_NOT_PARSE] * answers or [NO_ANSWER]
    tools, context = system
    offered = _offered(tools)
    outcomes: list[Example | str] = []
    bad_call = False
    for role, text in turns:
        turn = {"role": role, "content": text}
        if role == "assistant":
            calls = jsonl.parsed(lambda text: _with_known_keys(calls_of(text, offered), offered), text)
            if bad_call:
                outcome: Example | str = AFTER_A_BAD_CALL
            elif calls is None:
                outcome = CALLS_DO_NOT_PARSE
            else:
                example = {"id": f"{row_id}#{len(outcomes) + 1}", "messages": context, "tools": tools, "answers": calls}
                outcome = jsonl.example_of(example, "toolace", keep_no_call=keep_no_call)
            bad_call = bad_call or outcome in (CALLS_DO_NOT_PARSE, jsonl.CALLS_UNOFFERED_TOOL)
            outcomes.append(outcome)
            turn = {"role": role, "content": "", "calls": calls} if calls else turn
        context = [*context, turn]
    return outcomes


def _turns(value: Any) -> list[tuple[str, str]]:
    """(role, text) of each turn."""
    turns = []
    for turn in jsonl.decoded(value, list):
        role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or role not in jsonl.ROLES or not isinstance(text, str):
            raise ValueError("not a turn")
        turns.append((jsonl.ROLES[role], text))
    return turns


def system_of(text: Any) -> tuple[list[Any], list[dict[str, str]]]:
    """(the JSON list of tools in ToolACE's system text, whatever stands behind it; the system turns that are to stay).

    The text is instructions, in whose place our template stands; but where it tells the time, the conversation may speak
    of "tomorrow", so that sentence stays. Raises ValueError where there is no list.
    """
    marker = _TOOLS.search(text) if isinstance(text, str) else None
    if not marker:
        raise ValueError("no list of functions")
    tools = jsonl.decoded(json.JSONDecoder().raw_decode(text, marker.end())[0], list)
    if len(tools) > MOST_TOOLS:
        raise ValueError(f"over {MOST_TOOLS} tools")
    time = _TIME.search(text, 0, marker.start())
    return tools, [{"role": "system", "content": time.group().split("Here is a")[0].strip()}] if time else []


def _offered(tools: list[Any]) -> dict[str, frozenset[str] | None]:
    """The parameters of each tool by its name; None where its schema does not say."""
    found = {}
    for tool in tools:
        tool = jsonl.parsed(jsonl.unwrapped, tool)
        if tool is not None:
            parameters = tool.get("parameters")
            known = parameters.get("properties") if isinstance(parameters, dict) else None
            found[tool["name"]] = frozenset(known) if isinstance(known, dict) else None
    return found


def _with_known_keys(calls: list[dict[str, Any]], offered: Mapping[str, frozenset[str] | None]) -> list[dict[str, Any]]:
    """The calls. ValueError where a key with a space in it is no parameter of the tool: `1 b=2` lacks a comma."""
    for call in calls:
        known = offered.get(call["name"])
        odd = [key for key in call["arguments"] if known is not None and key not in known and len(key.split()) > 1]
        if odd:
            raise ValueError(f"{odd[0]!r} is no parameter of {call['name']}")
    return calls


# ---------------------------------------------------------------- calls

_SPACE = re.compile(r"\s*+")
_OPENING = re.compile(r"\s*+\[\s*+(?:\]\s*+$|[^\[\](){}=]++\()")  # of a turn that is a list of calls and no prose
_NAME = re.compile(r"""[^()\[\]{}"'=,]++(?=\()""")
_KEY = re.compile(r"""([^()"'=,]++)=""")
_COMMENT = re.compile(r"[\n\r#]|/\*")  # in a key
_STRING = re.compile(r""" "([^"\\]*+(?:\\.[^"\\]*+)*+)" | '([^'\\]*+(?:\\.[^'\\]*+)*+)' """, re.DOTALL | re.VERBOSE)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{1,3})|(.))", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][+-]?\d++)?", re.ASCII)
_WORD = re.compile(r"\w++")

_LITERALS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
# The slash is JSON's; an escape that is not here keeps its backslash, as in Python.
_ESCAPES = dict(zip("ntrbfav\\'\"/", "\n\t\r\b\f\a\v\\'\"/", strict=True)) | {"\n": ""}

# Signs of a call in other formats or amid prose: its tag, its two keys in JSON, a list that begins with one.
_TAG = re.compile(r"</?tool_call>", re.IGNORECASE)
_JSON_NAME, _JSON_ARGUMENTS = (re.compile(rf"""(["'])(?:{keys})\1\s*+:""") for keys in ("name", "arguments|parameters"))
_LISTED = re.compile(r"\[\s*+[\w./ -]++\(\s*+(?:\w++\s*+=|\)\s*+[\],])")


def calls_of(text: str, names: Collection[str]) -> list[dict[str, Any]]:
    """The calls of an assistant's turn; [] where it is prose, or an empty list.

    names: of the tools on offer. Raises ValueError where a call does not parse, and for prose with what may be a call: one
    amid words, in another format, or the name of a tool in other case before a bracket, or alone in a list.
    """
    if _OPENING.match(text) or text.lstrip().startswith(tuple(f"[{name}(" for name in names)):
        return parse_calls(text, names)
    if any(f"{name}(" in text for name in names) or any(sign.search(text) for sign in (_TAG, _LISTED)):
        raise ValueError("a call amid prose")
    if _JSON_NAME.search(text) and _JSON_ARGUMENTS.search(text):
        raise ValueError("a call as JSON")
    lower = text.lower()
    for name in filter(None, (name.strip().lower() for name in names)):  # it ends in no space, so time is linear
        plain = re.escape(name)
        if name in lower and re.search(rf"(?<!\w){plain}\s*+\(|\[\s*+{plain}\s*+[\],]", lower):
            raise ValueError("the name of a tool, as if called")
    return []


def parse_calls(text: str, names: Collection[str] = ()) -> list[dict[str, Any]]:
    """The calls of `[name(key=value, ...), ...]` as {"name", "arguments"}.

    A value is a string in either quotes, a number, True, true, False, false, None, null, a list, a tuple (read as a
    list), or a dict with strings for keys. names: those of tools on offer, which may hold any character; other names
    hold no brackets, quotes, commas or equals signs. Raises ValueError, and nothing else, for any other text.
    """
    longest_first = sorted(names, key=len, reverse=True)
    start = _SPACE.match(text).end()
    if not text.startswith("[", start):
        raise _wrong(text, start, "a list")
    calls, end = _items(text, start + 1, "]", lambda at: _call(text, at, longest_first))
    if _SPACE.match(text, end).end() != len(text):
        raise _wrong(text, end, "nothing more")
    return calls


def _wrong(text: str, at: int, wanted: str) -> ValueError:
    return ValueError(f"{wanted} is due at character {at}, before {text[at : at + 20]!r}")


def _items(text: str, at: int, close: str, item: Callable[[int], tuple[Any, int]]) -> tuple[list[Any], int]:
    """(what `item` reads between commas, the place behind the closing bracket); like Python, a last comma is allowed."""
    found = []
    while True:
        at = _SPACE.match(text, at).end()
        if text.startswith(close, at):
            return found, at + 1
        value, at = item(at)
        found.append(value)
        at = _SPACE.match(text, at).end()
        if text.startswith(",", at):
            at += 1
        elif not text.startswith(close, at):
            raise _wrong(text, at, f"',' or {close!r}")


def _call(text: str, at: int, longest_first: list[str]) -> tuple[dict[str, Any], int]:
    opening = next((at + len(name) for name in longest_first if text.startswith(f"{name}(", at)), None)
    if opening is None:
        named = _NAME.match(text, at)
        if not named:
            raise _wrong(text, at, "a call")
        opening = named.end()
    pairs, end = _items(text, opening + 1, ")", lambda at: _argument(text, at))
    arguments = dict(pairs)
    if len(arguments) < len(pairs):
        raise ValueError(f"an argument is given twice in the call at character {at}")
    return {"name": text[at:opening].strip(), "arguments": arguments}, end


def _argument(text: str, at: int) -> tuple[tuple[str, Any], int]:
    key = _KEY.match(text, at)
    name = key.group(1).strip() if key else ""
    # In `a: 1 b=2` another argument stands before the name.
    if not name or _COMMENT.search(name) or (":" in name and len(name.split()) > 1):
        raise _wrong(text, at, "an argument's name and '='")
    value, end = _value(text, _SPACE.match(text, key.end()).end(), 0)
    return (name, value), end


def _value(text: str, at: int, depth: int) -> tuple[Any, int]:
    if depth > DEEPEST:
        raise _wrong(text, at, f"an end of nesting, {DEEPEST} levels deep,")
    match text[at : at + 1]:
        case '"' | "'":
            return _string(text, at)
        case "[":
            return _items(text, at + 1, "]", lambda at: _value(text, at, depth + 1))
        case "(":
            items, end = _items(text, at + 1, ")", lambda at: _value(text, at, depth + 1))
            if len(items) == 1:
                raise _wrong(text, at, "a value without parentheses")  # a tuple or not? a comma decides in Python
            return items, end
        case "{":
            pairs, end = _items(text, at + 1, "}", lambda at: _pair(text, at, depth + 1))
            held = dict(pairs)
            if len(held) < len(pairs):
                raise ValueError(f"a key is given twice in the object at character {at}")
            return held, end
    if number := _NUMBER.match(text, at):
        return _number(text, at, number.group()), number.end()
    word = _WORD.match(text, at)
    if not word or word.group() not in _LITERALS:
        raise _wrong(text, at, "a value")
    return _LITERALS[word.group()], word.end()


def _pair(text: str, at: int, depth: int) -> tuple[tuple[str, Any], int]:
    key, at = _string(text, at)
    at = _SPACE.match(text, at).end()
    if not text.startswith(":", at):
        raise _wrong(text, at, "':'")
    value, end = _value(text, _SPACE.match(text, at + 1).end(), depth)
    return (key, value), end


def _number(text: str, at: int, digits: str) -> int | float:
    if len(digits) > LONGEST_NUMBER or re.match(r"[+-]?0\d+$", digits):  # 007 is no number, to Python as to JSON
        raise _wrong(text, at, "a number")
    number = int(digits) if digits.lstrip("+-").isdigit() else float(digits)
    if math.isinf(number):
        raise _wrong(text, at, "a number that a float can hold")
    return number


def _string(text: str, at: int) -> tuple[str, int]:
    quoted = _STRING.match(text, at)
    if not quoted:
        raise _wrong(text, at, "a string")
    value = quoted.group(1) if quoted.group(2) is None else quoted.group(2)
    if "\\" in value:
        value = _ESCAPE.sub(_unescaped, value)
        # JSON writes a character beyond 16 bits as two halves. One half alone stays: the row is dropped for it later.
        value = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    return value, quoted.end()


def _unescaped(escape: re.Match[str]) -> str:
    byte, short, long, octal, other = escape.groups()
    if other is not None and other in "xuUN":  # too few digits, or a character by its name
        raise ValueError(f"{escape.group()} is no character")
    if other is not None:
        return _ESCAPES.get(other, escape.group())
    code = int(octal, 8) if octal else int(byte or short or long, 16)
    if code > 0x10FFFF:
        raise ValueError(f"{escape.group()} is no character")
    return chr(code)
