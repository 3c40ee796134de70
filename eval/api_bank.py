"""API-Bank, call mode: a dialogue, some tools, and the one call that comes next (arXiv 2304.08244, "level 1").

    items(path) -> [Item]     the 399 tasks of level-1-api.json: 389 calls, ten of them twice, as its authors count them
    verdict(text, item)       accuracy (ours, the value) and toolrl (that of ToolRL, arXiv 2504.13958), by text alone
    aggregates(counts)        each of them over all tasks, over 394 and over 391

The authors' own evaluator runs the call on a database and compares the results. Fed with its own answers it passes 337 of
399 (answers that need an earlier call's state, lists written two ways, translation services), so we compare calls.

All values of the source are strings, lists too ("['Ann', 'Bo']"). A model answers 2 and ["Ann", "Bo"], which is what the
descriptions ask for; hence the forms that `_same` takes as one. Two groups of tasks have categories of their own, since
published numbers differ in whether they count them: the five calls of BookHotel, which do not parse in the copy that
others score (the paper's baselines are multiples of 1/394), and the eight whose answer uses an argument that the tool
does not describe, which no model can get right except by luck.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.example import make
from eval.benchmark import Item
from grpo_jax.reward import Scored, judge, parse_calls

SIZES = {"call": 386, "call_book_hotel": 5, "call_undescribed_argument": 8}
CATEGORIES = tuple(SIZES)
LAYOUTS = ("one_message", "turns")
PAPER = {  # percent; read from Figure 3 of Tool-N1 (arXiv 2505.00024)
    "LLaMA-3.1-Base-8B": 60.41,
    "GPT-4o-mini": 73.10,
    "GPT-4o": 77.16,
    "Tool-N1-7B": 81.28,
    "Tool-N1-14B": 82.19,
}
SOURCE = (
    "download https://huggingface.co/datasets/liminghao1630/API-Bank/resolve/main/test-data/level-1-api.json and give its path"
)
YEAR = "This year is 2023."  # many dates need it; the authors' prompt says it, too
REQUEST = "Based on our conversation above, please only make one tool call to solve my need."  # ToolRL's

_TURN = re.compile(r"(User|AI|API-Request): (.*)")
_CALL = re.compile(r"\[(\w+)\((.*?)\)\](?:->(.*))?")
# Values are not escaped ('['a', 'b']', 'Queen's'), so a value ends where the next argument, or nothing, follows.
_ARGUMENT = re.compile(r"(\w+)='(.*?)'(?=, \w+='|$)")
_MAX_LITERAL = 2000  # characters of a text that is read as a list or an object; the longest in the data has under 200


def items(path: str | Path, categories: Sequence[str] = CATEGORIES, *, layout: str = "one_message") -> list[Item]:
    """The tasks of some categories, in the order of the file.

    path: the authors' level-1-api.json, a folder that holds it (itself or in test-data/), or JSON lines of
        {"id", "tools", "history", "answer"} (history: {"role", "content"}, an earlier call {"role": "tool", "name",
        "arguments", "content"}).
    layout: "one_message", the dialogue as one user message in the layout of ToolRL, with calls in the format that our
        prompt asks for; or "turns", as turns of a chat. In both the last words are ToolRL's request for one call: two
        thirds of the dialogues end with the assistant's own "I'll do that now".
    Raises FileNotFoundError where there is no such file, ValueError where it is another, and for an unknown category or
    layout.
    """
    if unknown := [name for name in categories if name not in CATEGORIES]:
        raise ValueError(f"API-Bank has no category {unknown[0]!r}: use {', '.join(CATEGORIES)}")
    if layout not in LAYOUTS:
        raise ValueError(f"API-Bank: layout {layout!r}: use {' or '.join(LAYOUTS)}")
    found = []
    for number, row in enumerate(_rows(_file(Path(path))), start=1):
        try:
            found.append(_item(_from_authors(row) if "expected_output" in row else row, layout))
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}: row {number} is none of API-Bank's level 1 ({problem}): {SOURCE}") from error
    return [item for item in found if item.category in categories]


def verdict(text: str, item: Item) -> Scored:
    """Scores a reply by the last tool-call block in it; whether it thinks does not count. Never raises, on any text.

    parts: accuracy (also the value): exactly one call, with the answer's name, the same arguments, and equal values, where
    a number, true, false and null equal their Python text, space around a text is nothing, and a text that holds a list or
    an object, written as JSON or as Python, equals that. toolrl: any of the calls has the answer's name and its arguments
    as they stand, which are texts.
    reason: no_call (no block), bad_json, wrong_count (an empty list, too), wrong_function, missing_argument, extra_argument,
    wrong_argument, correct; the first that holds.
    """
    answer, calls = item.given["answer"], parse_calls(text)
    if calls is None:
        reason = "bad_json" if judge(text, ()).parts["tool_call"] else "no_call"
        return Scored(0.0, reason, {"accuracy": 0.0, "toolrl": 0.0})
    reason = "wrong_count" if len(calls) != 1 else _compared(calls[0], answer)
    accuracy = float(reason == "correct")
    return Scored(accuracy, reason, {"accuracy": accuracy, "toolrl": float(answer in calls)})


def aggregates(counts: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    """Shares from {category: (right, all)}, of one protocol: over all tasks (of `toolrl`, this is ToolRL's number), without
    BookHotel (accuracy_394) and without the undescribed arguments (accuracy_reachable). Of part of a category, that part stands
    for the whole. Of categories that are not there, nothing is counted; what no task is left for, is left out."""
    without = {"accuracy": None, "accuracy_394": CATEGORIES[1], "accuracy_reachable": CATEGORIES[2]}
    shares = {}
    for name, left_out in without.items():
        used = {category: pair for category, pair in counts.items() if category != left_out and pair[1]}
        if used:
            right = sum(right * SIZES[category] / count for category, (right, count) in used.items())
            shares[name] = right / sum(SIZES[category] for category in used)
    return shares


def _compared(call: Mapping[str, Any], answer: Mapping[str, Any]) -> str:
    """What is wrong with a call, or "correct"."""
    given, right = call["arguments"], answer["arguments"]
    if call["name"] != answer["name"]:
        return "wrong_function"
    if right.keys() - given.keys():
        return "missing_argument"
    if given.keys() - right.keys():
        return "extra_argument"
    return "correct" if all(_same(given[name], value) for name, value in right.items()) else "wrong_argument"


def _same(value: Any, right: Any) -> bool:
    """Whether two values are equal by the rules of `verdict`, at every depth. It goes no deeper than the answer."""
    value, right = _container(value), _container(right)
    if isinstance(value, dict) and isinstance(right, dict):
        return value.keys() == right.keys() and all(_same(value[key], right[key]) for key in right)
    if isinstance(value, list) and isinstance(right, list):
        return len(value) == len(right) and all(map(_same, value, right))
    if isinstance(value, (dict, list)) or isinstance(right, (dict, list)):
        return False
    return str(value).strip() == str(right).strip()


def _container(value: Any) -> Any:
    """The list or object that a text holds; any other value as it is. Longer texts are not read: literal_eval recurses."""
    if not (isinstance(value, str) and len(value) <= _MAX_LITERAL and value.strip()[:1] in ("[", "{")):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            held = read(value.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if isinstance(held, (list, dict)):
            return held
    return value


# The file.


def _file(path: Path) -> Path:
    places = [path, path / "level-1-api.json", path / "test-data" / "level-1-api.json"]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"{path}: API-Bank's level-1-api.json is not there: {SOURCE}")


def _rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON list or of JSON lines."""
    try:
        text = file.read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip()[:1] == "[" else [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise ValueError(f"{file}: cannot be read as JSON ({error}): {SOURCE}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{file}: it holds no tasks: {SOURCE}")
    return rows


def _from_authors(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of level-1-api.json, {"file", "id", "instruction", "input", "expected_output"}: tools stand as JSON lines at the
    end of the instruction, the dialogue is lines of `User:`, `AI:` and `API-Request: [Tool(name='value')]->result`."""
    described = row["instruction"].partition("API descriptions:\n")[2].split("\n")
    tools = [
        {"name": tool["name"], "description": tool["description"], "parameters": tool["input_parameters"]}
        for tool in map(json.loads, described)
    ]
    history = []
    for line in row["input"].strip().split("\n"):
        if line == "Generate API Request:":
            continue
        turn = _TURN.fullmatch(line)
        if turn is None:
            raise ValueError(f"a line of the dialogue is of nobody: {line:.60}")
        if turn[1] == "API-Request":
            history.append({"role": "tool", **_call(turn[2]), "content": _CALL.fullmatch(turn[2])[3]})
        else:
            history.append({"role": "user" if turn[1] == "User" else "assistant", "content": turn[2]})
    answer = _call(row["expected_output"].removeprefix("API-Request: "))
    return {"id": f"{row['file'].removesuffix('.jsonl')}:{row['id']}", "tools": tools, "history": history, "answer": answer}


def _call(text: str) -> dict[str, Any]:
    """`[Tool(name='value', ...)]`, perhaps with `->result` behind it, as a call."""
    match = _CALL.fullmatch(text)
    if match is None:
        raise ValueError(f"not a call: {text:.60}")
    return {"name": match[1], "arguments": dict(_ARGUMENT.findall(match[2]))}


def _item(row: Mapping[str, Any], layout: str) -> Item:
    answer = {"name": row["answer"]["name"], "arguments": row["answer"]["arguments"]}
    tools = {tool["name"]: tool for tool in row["tools"]}
    if answer["name"] == "BookHotel":
        category = "call_book_hotel"
    elif answer["arguments"].keys() - tools[answer["name"]]["parameters"].keys():
        category = "call_undescribed_argument"
    else:
        category = "call"
    turns = _turns(row["history"]) if layout == "turns" else [{"role": "user", "content": _one_message(row["history"])}]
    messages = [{"role": "system", "content": YEAR}, *turns]
    example = make(messages, row["tools"], [answer], "api_bank", {"row_id": str(row["id"])})
    return Item(str(row["id"]), category, example, {"answer": answer})


# The dialogue.


def _turns(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Turns of a chat. What the assistant said before a call stands beside it, so that `data.prompt` makes it the thought."""
    turns: list[dict[str, Any]] = []
    for turn in history:
        if turn["role"] != "tool":
            turns.append({"role": turn["role"], "content": turn["content"]})
            continue
        if not turns or turns[-1]["role"] != "assistant" or "calls" in turns[-1]:
            turns.append({"role": "assistant", "content": ""})
        turns[-1]["calls"] = [{"name": turn["name"], "arguments": turn["arguments"]}]
        turns.append({"role": "tool", "name": turn["name"], "content": str(turn["content"])})
    return [*turns, {"role": "user", "content": REQUEST}]


def _one_message(history: Sequence[Mapping[str, Any]]) -> str:
    """ToolRL's layout, but for the calls: there one object a line with "parameters", here the list that our prompt asks for."""
    lines = ["**Dialogue Records History**"]
    for turn in history:
        match turn["role"]:
            case "user":
                lines += [""] * (len(lines) > 1) + [f"<user>{turn['content']}</user>"]
            case "assistant":
                lines.append(f"<response>{turn['content']}</response>")
            case "tool":
                listed = json.dumps([{"name": turn["name"], "arguments": turn["arguments"]}], ensure_ascii=False)
                lines += ["<tool_call>", listed, "</tool_call>", f"<obs> {turn['content']} </obs>"]
            case other:
                raise ValueError(f"a turn of role {other!r}")
    return "\n".join([*lines, "", f"<user> {REQUEST}</user>"])
