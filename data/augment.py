"""Other tasks made of a task: none of its tools fits (irrelevance), or its names mean nothing (masking).

Both give a new Example with an id of its own. The thought and the whole reply that a row may carry go, because they speak
of the tools and names that were there before.
"""

import random
import string
from typing import Any

from data.example import Example, make

MASK_LETTERS = 8


def irrelevant(example: Example) -> Example | None:
    """The task without the tools that it calls, so that to call nothing is right.

    None where that would leave no tool at all: such a prompt asks for no judgement, and a model that calls nothing when
    it sees an empty list has learned nothing about tools. None, too, where an earlier turn called one of them: a
    conversation does not call what it was not offered.
    """
    called = {call["name"] for call in example.answer}
    earlier = {call["name"] for turn in example.messages for call in turn.get("calls", ())}
    tools = [tool for tool in example.tools if tool["name"] not in called]
    if not called or not tools or called & earlier:
        return None
    return _made_of(example, example.messages, tools, [], "irrelevance")


def masked(example: Example, rng: random.Random) -> Example:
    """The task with random letters for the names of its tools and their parameters, in tools and calls alike (Hammer,
    arXiv 2410.04587): what a tool does is then in its description alone.

    Names stay where they are part of a text, as descriptions, and so do arguments that the tool does not list.
    """
    taken: set[str] = set()
    tool_names: dict[str, str] = {}
    parameter_names: dict[str, dict[str, str]] = {}
    for tool in example.tools:
        name = tool["name"]
        tool_names[name] = tool_names.get(name) or _letters(rng, taken)
        known = parameter_names.setdefault(name, {})
        known |= {parameter: _letters(rng, taken) for parameter in _parameters(tool) if parameter not in known}

    def call(old: dict[str, Any]) -> dict[str, Any]:
        known, arguments = parameter_names.get(old["name"], {}), old["arguments"]
        renamed = {known.get(key, key): value for key, value in arguments.items()}
        return {"name": tool_names.get(old["name"], old["name"]), "arguments": renamed}

    def turn(old: dict[str, Any]) -> dict[str, Any]:
        calls = {"calls": [call(one) for one in old["calls"]]} if "calls" in old else {}
        name = {"name": tool_names.get(old["name"], old["name"])} if "name" in old else {}
        return {**old, **calls, **name}

    tools = [_renamed(tool, tool_names[tool["name"]], parameter_names[tool["name"]]) for tool in example.tools]
    return _made_of(example, map(turn, example.messages), tools, map(call, example.answer), "masked")


def _made_of(example: Example, messages: Any, tools: Any, answer: Any, how: str) -> Example:
    extra = {key: value for key, value in example.extra.items() if key == "row_id"}
    return make(messages, tools, answer, f"{example.source}-{how}", extra)


def _letters(rng: random.Random, taken: set[str]) -> str:
    """Letters that no other name of the task has, marked as taken."""
    while (name := "".join(rng.choices(string.ascii_lowercase, k=MASK_LETTERS))) in taken:
        pass
    taken.add(name)
    return name


def _is_schema(parameters: dict[str, Any]) -> bool:
    """Whether parameters stand in a JSON schema (ToolACE, OpenAI), and not by themselves (xLAM)."""
    return isinstance(parameters.get("properties"), dict) and isinstance(parameters.get("type"), str)


def _parameters(tool: dict[str, Any]) -> dict[str, Any]:
    parameters = tool["parameters"]
    return parameters["properties"] if _is_schema(parameters) else parameters


def _renamed(tool: dict[str, Any], name: str, names: dict[str, str]) -> dict[str, Any]:
    properties = {names[key]: value for key, value in _parameters(tool).items()}
    if not _is_schema(tool["parameters"]):
        return {**tool, "name": name, "parameters": properties}
    schema = {**tool["parameters"], "properties": properties}
    if isinstance(schema.get("required"), list):
        schema["required"] = [names.get(key, key) if isinstance(key, str) else key for key in schema["required"]]
    return {**tool, "name": name, "parameters": schema}
