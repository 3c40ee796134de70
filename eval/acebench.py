"""ACEBench, its normal cases of one turn of calls: six "atom" categories and two "single turn" ones (arXiv 2501.12851).

    items(path) -> [Item]     500 tasks of data_en (or data_zh)
    verdict(text, item)       official (the value), official_nostrip, strict
    aggregates(counts)        acebench, the mean of all eight categories (the number of Tool-N1's Figure 3), atom, single_turn

The authors' checker reads Python calls, `[name(key='value')]`. Ours renders a reply's JSON as such calls in thought: it
applies what rendering, parsing and checking do to names and values, without the text. `_decoded` is the first two,
`_passes` and below the third, written from its rules and held to it item by item. The rules are kept where they look odd,
because published numbers contain them:

- all whitespace is removed before parsing, that inside of texts too. Lists inside objects are then compared as they
  stand, so right answers with a space in one fail: the answers themselves score 93.0. `official_nostrip` leaves that step
  out (99.9; an empty list in one answer).
- numbers and truth values of a call are never compared, only their types, and a text passes if it contains the answer's.
- an argument that the schema does not require may be left out, inside objects none may.
- what makes the authors' checker raise, and so end its run, counts as wrong here.

`strict` is what the official number overstates: as many calls, each with an answer's name and exactly its arguments and
values (1 equals 1.0, true equals only true, texts by character, the order of lists counts).
"""

from __future__ import annotations

import difflib
import json
import keyword
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.example import is_deeper, make
from eval.benchmark import Item
from grpo_jax.reward import Scored, judge, parse_calls

ATOM = ("atom_bool", "atom_enum", "atom_number", "atom_list", "atom_object_short", "atom_object_deep")
SINGLE_TURN = ("single_turn_single_function", "single_turn_parallel_function")
CATEGORIES = ATOM + SINGLE_TURN
LAYOUTS = ("one_message", "turns")
PAPER = {  # percent; read from Figure 3 of Tool-N1 (arXiv 2505.00024)
    "LLaMA-3.1-Base-8B": 50.63,
    "GPT-4o-mini": 81.63,
    "GPT-4o": 87.00,
    "Tool-N1-7B": 82.34,
    "Tool-N1-14B": 86.00,
}
SOURCE = "git clone https://github.com/ACEBench/ACEBench and give its folder data_all/data_en"

_TURN = re.compile(r"^(user|system): ?", re.MULTILINE)  # "system" is the assistant, who asks back
_NUMBERED = re.compile(r"_\d+$")  # a tool that is called twice stands in the answer as name_1, name_2
_MAX_BRACKETS = 200  # deeper ones Python's tokenizer refuses


def items(path: str | Path, categories: Sequence[str] = CATEGORIES, *, layout: str = "one_message") -> list[Item]:
    """The tasks of some categories, in the order of CATEGORIES and of the files.

    path: the folder data_en of ACEBench, or the whole repository (of which data_en is read).
    layout: "one_message", the question as the authors ask it, its "user:" and "system:" lines below a heading in one user
        message; or "turns", as turns of a chat. The time, where a task has one, is a system turn.
    Of each tool, name, description and schema are shown. In the files only tools that are not the answer have a schema
    under "arguments", results or tags; as they stand, their keys would give the answer away.
    Raises FileNotFoundError where a file is missing, ValueError where one is another, and for an unknown category or layout.
    """
    for name in categories:
        if name not in CATEGORIES:
            nearest = difflib.get_close_matches(name, CATEGORIES, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"ACEBench: no category {name!r} here: did you mean {nearest!r}? There are {', '.join(CATEGORIES)}"
            )
    if layout not in LAYOUTS:
        raise ValueError(f"ACEBench: layout {layout!r}: use {' or '.join(LAYOUTS)}")
    folder = Path(path)
    if (folder / "data_all" / "data_en").is_dir():
        folder = folder / "data_all" / "data_en"
    found = []
    for category in CATEGORIES:
        if category not in categories:
            continue
        name = f"data_normal_{category}.json"
        tasks, answers = _rows(folder / name), _rows(folder / "possible_answer" / name)
        if [row.get("id") for row in tasks] != [row.get("id") for row in answers]:
            raise ValueError(f"{folder / name}: its ids are not those of possible_answer/{name}: {SOURCE}")
        for task, answer in zip(tasks, answers, strict=True):
            try:
                found.append(_item(task, answer["ground_truth"], category, layout))
            except (LookupError, TypeError, AttributeError, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
                raise ValueError(f"{folder / name}: {task.get('id')} is no task of ACEBench ({problem}): {SOURCE}") from error
    return found


def verdict(text: str, item: Item) -> Scored:
    """Scores a reply by the last tool-call block in it; whether it thinks does not count. Never raises, on any text.

    parts: official (also the value), official_nostrip and strict, by the rules of the module's docstring; where an answer
    has alternatives, any of them.
    reason: "correct" where the value is 1, else the first that holds of no_call (no block), bad_json, wrong_count (an empty
    list, too), wrong_function, missing_argument (one that the schema requires), extra_argument (one that the answer lacks),
    wrong_argument. Compared with the first of the alternatives.
    """
    tools, answers = item.given["tools"], item.given["answers"]
    calls = parse_calls(text)
    if calls is None:
        reason = "bad_json" if judge(text, ()).parts["tool_call"] else "no_call"
        return Scored(0.0, reason, {"official": 0.0, "official_nostrip": 0.0, "strict": 0.0})
    parts = {
        "official": float(_official(_decoded(calls, strip=True), answers, tools)),
        "official_nostrip": float(_official(_decoded(calls, strip=False), answers, tools)),
        "strict": float(any(_strict(calls, _answer_calls(answer, tools)) for answer in answers)),
    }
    reason = "correct" if parts["official"] else _reason(calls, _answer_calls(answers[0], tools), tools)
    return Scored(parts["official"], reason, parts)


def aggregates(counts: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    """Means of the accuracies of categories, from {category: (right, all)} of one protocol. A mean that lacks a category
    is left out."""
    share = {name: right / count for name, (right, count) in counts.items() if count}
    means = {"acebench": CATEGORIES, "atom": ATOM, "single_turn": SINGLE_TURN}
    return {
        mean: sum(share[name] for name in names) / len(names) for mean, names in means.items() if share.keys() >= set(names)
    }


# The files.


def _rows(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file of ACEBench: {SOURCE}")
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except ValueError as error:
        raise ValueError(f"{file}: cannot be read as JSON lines ({error}): {SOURCE}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{file}: it holds no tasks: {SOURCE}")
    return rows


def _item(task: Mapping[str, Any], ground_truth: Any, category: str, layout: str) -> Item:
    tools = [
        {
            "name": tool["name"],
            "description": tool["description"],
            "parameters": tool.get("parameters", tool.get("arguments", {})),
        }
        for tool in task["function"]
    ]
    answers = ground_truth if isinstance(ground_truth, list) else [ground_truth]
    rights = [_answer_calls(answer, task["function"]) for answer in answers]
    if not all(right and all(isinstance(call["arguments"], dict) for call in right) for right in rights):
        raise ValueError("its answer is not calls with arguments")
    time = [{"role": "system", "content": task["time"]}] if task["time"] else []
    example = make(
        [*time, *_dialogue(task["question"], layout)], tools, rights[0], f"acebench:{category}", {"row_id": task["id"]}
    )
    return Item(task["id"], category, example, {"tools": task["function"], "answers": answers})


def _dialogue(question: str, layout: str) -> list[dict[str, str]]:
    if layout == "one_message":
        return [{"role": "user", "content": f"Conversation history 1..t:\n{question}"}]  # the authors' heading
    _, *parts = _TURN.split(question)
    roles = {"user": "user", "system": "assistant"}
    return [{"role": roles[role], "content": said.strip()} for role, said in zip(parts[::2], parts[1::2], strict=True)]


def _answer_calls(answer: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """An answer, {name: arguments} with name_1, name_2 for a tool that is called twice, as calls."""
    offered = {tool["name"] for tool in tools}
    return [
        {"name": name if name in offered else _NUMBERED.sub("", name), "arguments": arguments}
        for name, arguments in answer.items()
    ]


# Our own full comparison, and the reason.


def _strict(calls: Sequence[Mapping[str, Any]], right: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the calls are those of an answer, in any order. Taking the first equal one is enough: `_equal` is transitive."""
    left = list(right)
    for call in calls:
        match = next((place for place, other in enumerate(left) if _equal(call, other)), None)
        if match is None:
            return False
        del left[match]
    return not left


def _equal(value: Any, right: Any) -> bool:
    """JSON values by value. It goes no deeper than the answer."""
    if isinstance(value, dict) and isinstance(right, dict):
        return value.keys() == right.keys() and all(_equal(value[key], right[key]) for key in right)
    if isinstance(value, list) and isinstance(right, list):
        return len(value) == len(right) and all(map(_equal, value, right))
    return isinstance(value, bool) == isinstance(right, bool) and value == right


def _reason(calls: Sequence[Mapping], right: Sequence[Mapping], tools: Sequence[Mapping]) -> str:
    """What is wrong with calls that the official verdict refuses."""
    if len(calls) != len(right):
        return "wrong_count"
    if Counter(call["name"] for call in calls) != Counter(call["name"] for call in right):
        return "wrong_function"
    schemas = {tool["name"]: tool.get("parameters") or {} for tool in tools}
    missing = extra = False
    for answer in right:  # each may be met by any call of its name, as in the authors' checker
        required = set(schemas.get(answer["name"], {}).get("required", ()))
        same = [call["arguments"].keys() for call in calls if call["name"] == answer["name"]]
        missing |= all(required - given for given in same)
        extra |= all(given - answer["arguments"].keys() for given in same)
    return "missing_argument" if missing else "extra_argument" if extra else "wrong_argument"


# What rendering as Python calls and parsing them does.


def _decoded(calls: Sequence[Mapping[str, Any]], *, strip: bool) -> list[tuple[str, dict[str, Any]]] | None:
    """(name, arguments) of each call as they come back from Python's parser, or None where it would refuse one."""
    decoded = []
    for call in calls:
        values = list(call["arguments"].values())
        parts = [_identifier(part, strip) for part in call["name"].split(".")]
        names = [_identifier(name, strip) for name in call["arguments"]]
        if None in parts or None in names or is_deeper(values, _MAX_BRACKETS - 1):
            return None
        values = [_stripped(value) for value in values] if strip else values
        decoded.append((".".join(parts), dict(zip(names, values, strict=True))))
    return decoded


def _identifier(text: str, strip: bool) -> str | None:
    """A name as Python reads it, or None where it would not. A name that no identifier is could be code; it is refused."""
    text = "".join(text.split()) if strip else text.strip(" \t\f\r\n")
    return unicodedata.normalize("NFKC", text) if text.isidentifier() and not keyword.iskeyword(text) else None


def _stripped(value: Any) -> Any:
    """A value whose Python text lost its whitespace. That is spaces only: repr writes all other whitespace as escapes."""
    if isinstance(value, str):
        return value.replace(" ", "")
    if isinstance(value, list):
        return [_stripped(child) for child in value]
    if isinstance(value, dict):
        return {_stripped(key): _stripped(child) for key, child in value.items()}
    return value


# The authors' checker.

_TYPES = {"string": str, "integer": int, "number": int, "boolean": bool, "array": list, "object": dict}  # "number" is an int
_LOOSE = str.maketrans("'", '"', " ,./-_*^")


def _official(
    calls: Sequence[tuple[str, dict]] | None, answers: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> bool:
    return calls is not None and any(_passes(calls, answer, tools) for answer in answers)


def _passes(calls: Sequence[tuple[str, dict]], answer: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> bool:
    """Names as a multiset; then every call of the answer needs one of the reply's, and one may serve for several."""
    numbered = {name: _NUMBERED.sub("", name) for name in answer}
    if Counter(name for name, _ in calls) != Counter(numbered.values()):
        return False
    for name, right in answer.items():
        tool = next((tool for tool in tools if tool["name"] in name), None)  # the first whose name occurs in the answer's
        if tool is None or tool["name"] != numbered[name]:
            return False
        if not any(_call_passes(given, right, tool) for called, given in calls if called == tool["name"]):
            return False
    return True


def _call_passes(given: Mapping[str, Any], right: Mapping[str, Any], tool: Mapping[str, Any]) -> bool:
    schema = tool.get("parameters")
    if not given or not schema:
        return schema == {} and not given
    if "properties" not in schema or "required" not in schema:
        return False
    properties = schema["properties"]
    if right == properties:  # only where both are empty: then any arguments pass
        return True
    return set(schema["required"]) <= given.keys() <= properties.keys() & right.keys() and all(
        _value_passes(value, right[name], properties[name]) for name, value in given.items()
    )


def _value_passes(value: Any, right: Any, schema: Mapping[str, Any]) -> bool:
    """An argument against the answer's. Types first; the values are compared only where the answer has the type that the
    schema declares, and only those of texts, lists and objects."""
    kind = _TYPES.get(schema.get("type"))
    seen = _truth(value)  # so a text "true" where a text is asked for never passes
    if kind is None:
        return False
    if type(seen) is not kind:
        return right != "" and (type(seen) is type(right) or right == seen)
    items = schema.get("items", {}).get("type")
    inner = _TYPES.get(items, dict)
    if kind in (list, dict) and not _elements_pass(seen, right, inner):
        return False
    if right != "" and type(right) is not kind:
        return True
    if kind is dict:
        return _object_passes(value, right)
    if kind is list and inner is dict:
        return len(value) == len(right) and all(map(_object_passes, value, right))
    if kind is list:
        return [_loose(element) for element in value] == [_loose(element) for element in right]
    return kind is not str or _loose(right) in _loose(value)


def _elements_pass(seen: list | dict, right: Any, inner: type) -> bool:
    """The types of a list's elements, which are looked at only where those of the answer are lists themselves. An empty
    answer fails, whatever the reply is."""
    return isinstance(right, (list, dict, str)) and any(
        not isinstance(element, list) or all(type(_truth(child)) in (inner, list) for child in seen) for element in right
    )


def _object_passes(value: Any, right: Any) -> bool:
    """The same keys; objects inside by the same rule, and of anything else the answer's text within that of the value."""
    if not (isinstance(value, dict) and isinstance(right, dict) and value.keys() == right.keys()):
        return False
    for key, expected in right.items():
        if isinstance(expected, dict):
            if not _object_passes(value[key], expected):
                return False
        elif str(_loose(expected)) not in str(_loose(_truth(value[key]))):
            return False
    return True


def _truth(value: Any) -> Any:
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


def _loose(value: Any) -> Any:
    """A text without punctuation and case; anything else as it is."""
    return value.translate(_LOOSE).lower() if isinstance(value, str) else value
