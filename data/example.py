"""A tool-calling task as plain data: the dialogue so far, the tools on offer and the calls that are right.

Everything that yields tasks (files, the hub, the demo, benchmarks) builds `Example`s, and everything behind (prompt,
reward, training, evaluation) reads nothing else. The id is a hash of what the task *is* (dialogue, tools, answer) and
not of where it came from, because random keys, the held-out split and the search for repeats hang on it: the same row
in another file, or in another place of the file, is the same task and gets the same samples.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

DEEPEST = 100  # lists and objects inside each other; real rows have at most some 15


@dataclass(frozen=True)
class Example:
    """One task. Raises ValueError where messages, tools and answer are no plain JSON, as in `content_id`.

    messages: the dialogue before the answer, in order. Each turn is {"role": "system" | "user" | "assistant" | "tool",
        "content": str}; an assistant turn that called tools has "calls": [{"name": str, "arguments": dict}], and a tool
        turn may have "name", the tool whose result it holds.
    tools: {"name": str, "description": str, "parameters": dict}, perhaps with more keys of the row's own.
    answer: the right calls, {"name": str, "arguments": dict}; empty where the right answer is to call nothing.
    source: where the task came from; for people and for metrics.
    id: 16 hex digits of the content (`content_id`), computed where it is left empty. `dataclasses.replace` keeps the
        old one: with other messages, tools or answer, pass id="" too.
    extra: what only some rows have: "reasoning" (text thought before the answer), "response" (full text of a reply to
        imitate), "row_id" (the id that the row had in its file).
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...]
    answer: tuple[dict[str, Any], ...]
    source: str
    id: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", content_id(self.messages, self.tools, self.answer))


def content_id(messages: Iterable[dict], tools: Iterable[dict], answer: Iterable[dict]) -> str:
    """16 hex digits (64 bits of SHA-256) of the canonical JSON: keys sorted, no spaces, UTF-8.

    `1`, `1.0` and `true` differ. Raises ValueError where the content is no plain JSON: NaN or infinity, half a
    surrogate pair, a type that JSON lacks; and where it is nested over DEEPEST levels deep, since much that handles an
    example (json, chat templates) recurses, and how deep it may depends on who calls it.
    """
    content = {"messages": list(messages), "tools": list(tools), "answer": list(answer)}
    if is_deeper(content, DEEPEST):
        raise ValueError(f"the task is nested over {DEEPEST} levels deep: mend the value")
    try:
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"the task cannot be written as JSON ({error}): mend the value") from error


def make(
    messages: Iterable[dict],
    tools: Iterable[dict],
    answer: Iterable[dict],
    source: str,
    extra: dict[str, Any] | None = None,
) -> Example:
    """An Example from any iterables, with its id; fields and errors as in `Example`."""
    return Example(tuple(messages), tuple(tools), tuple(answer), source, extra=dict(extra or {}))


def is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects of a JSON value stand inside each other over `levels` deep. Does not recurse."""
    level = [value]
    for _ in range(levels + 1):
        level = [node for node in level if isinstance(node, (dict, list, tuple))]
        if not level:
            return False
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
    return True
