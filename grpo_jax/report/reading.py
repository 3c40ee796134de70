"""A run's folder as the page shows it, read as far as it is written, and read on when there is more.

    Tail       the whole lines that a growing file has gained
    Groups     the groups of rollouts.jsonl: columns to filter by, and chunks with all that they say
    Reading    a folder: config.json, metrics.jsonl and rollouts.jsonl; `update` reads what is new

A full chunk never changes. A run that starts again from a checkpoint writes its files anew; then all is read again.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_jax.metrics import parse_row
from grpo_jax.report import calls
from grpo_jax.reward import parse_calls

CHUNK = 64  # groups, or tasks, that are compressed together
SNIPPET = 160  # characters of a request that a list shows
_STEP = re.compile(rb'\{"step": (\d+),')  # how `Log` begins a row; another beginning is read as a whole
_TURNS = re.compile(
    r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)"  # Qwen2.5
    r"|<\|start_header_id\|>(\w+)<\|end_header_id\|>\n\n(.*?)(?:<\|eot_id\|>|<\|eom_id\|>|\Z)",  # Llama 3
    re.DOTALL,
)


class Tail:
    """The lines of a file that others write; a missing file has none."""

    def __init__(self, path: Path):
        self.path = path
        self.torn = False  # whether the last line has no end yet, and is left out
        self._file: int | None = None
        self._at = self._number = 0

    def begun_anew(self) -> bool:
        """Whether the file is not the one that was read, or is shorter; then the next `lines` are from its beginning on."""
        found = os.stat(self.path) if self.path.exists() else None
        same = found and found.st_ino == self._file and found.st_size >= self._at
        if self._file is None or same:
            self._file = found and found.st_ino
            return False
        self._file, self._at, self._number, self.torn = found and found.st_ino, 0, 0, False
        return True

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(number from 1, line) of each line that was not read yet and has its end."""
        self.torn = False
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._at)
            for line in file:
                if not line.endswith(b"\n"):
                    self.torn = True
                    return
                yield self._number + 1, line
                self._at += len(line)  # not before: a line that is refused is refused again
                self._number += 1


class Groups:
    """The groups of a run, in the order of the file."""

    def __init__(self) -> None:
        of_group = ("step", "task", "learned", "called")
        of_responses = ("reward", "reason", "length", "cut", "advantage", "marks")  # a list over the responses of a group
        self.columns: dict[str, list] = {name: [] for name in (*of_group, *of_responses)}
        self.reasons: list[str] = []  # what "reason" counts from 0
        self.tools: list[str] = []  # what "called" counts: names of tools that were called, or should have been
        self.tasks: list[tuple[str, str, list[int]]] = []  # (id, beginning of the request, tools of the right calls)
        self.chunks: list[bytes | list[Any]] = []  # CHUNK groups each: what their responses say; full ones compressed
        self.task_chunks: list[bytes | list[Any]] = []  # CHUNK tasks each: the conversation, tools and right calls; likewise
        self.left_out = 0
        self._places: dict[str, dict[Any, int]] = {"reasons": {}, "tools": {}, "tasks": {}}
        self._in_step: Counter[int] = Counter()

    def add(self, number: int, path: Path, line: bytes, most_per_step: int) -> None:
        """Takes the group of a line of rollouts.jsonl in, or counts it, where the step has enough of them."""
        begin = _STEP.match(line)
        step = int(begin[1]) if begin else parse_row(path, number, line)["step"]
        if self._in_step[step] >= most_per_step:
            self.left_out += 1
            return
        row = parse_row(path, number, line)
        try:
            cells, said = self._known(row)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not a group of responses ({error!r}); delete the line") from None
        self._in_step[step] += 1
        for name, cell in cells.items():
            self.columns[name].append(cell)
        _append(self.chunks, said)

    def _known(self, row: dict[str, Any]) -> tuple[dict[str, Any], list[dict]]:
        """What the columns hold of a group, and what its responses say."""
        answer, responses = row["answer"], row["responses"]
        read = [parse_calls(response["text"]) for response in responses]
        compared = [None if found is None else calls.compare(found, answer) for found in read]
        called = {call["name"][: calls.MOST_NAME] for some in (answer, *read) for call in some or ()}
        of = lambda name: [response[name] for response in responses]  # noqa: E731
        cells = {
            "step": row["step"],
            "task": self._task(row["id"], row["prompt"], answer),
            "learned": int(row.get("learned", True)),
            "reward": of("value"),
            "reason": [self._place("reasons", reason) for reason in of("reason")],
            "length": of("token_count"),
            "cut": [int(cut) for cut in of("truncated")],
            "advantage": of("advantage"),
            "marks": [_bits(entries) for entries in compared],
            "called": [self._place("tools", name) for name in sorted(called)],
        }
        return cells, [
            {"pieces": calls.pieces(response["text"]), "calls": entries}
            for response, entries in zip(responses, compared, strict=True)
        ]

    def index(self) -> dict[str, Any]:
        """What is known of all groups without their texts."""
        return self.columns | {"reasons": self.reasons, "tools": self.tools, "tasks": self.tasks, "chunk": CHUNK}

    def _task(self, key: str, prompt: str, answer: list[dict]) -> int:
        """The number of a task; a prompt that comes again, in a later epoch, is kept once."""
        places = self._places["tasks"]
        found = (key, prompt, json.dumps(answer))
        if found not in places:
            places[found] = len(places)
            turns = turns_of(prompt)
            turns, tools = _without_tools(turns)
            request = next((text for role, text in reversed(turns) if role not in ("assistant", "system")), turns[-1][1])
            request = " ".join(request[: 4 * SNIPPET].split())[:SNIPPET]
            self.tasks.append((key, request, [self._place("tools", name) for name in {call["name"]: 0 for call in answer}]))
            right = [{"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)} for call in answer]
            _append(self.task_chunks, {"turns": turns, "tools": tools, "answer": right})
        return places[found]

    def _place(self, what: str, name: str) -> int:
        """The number of a name in one of the lists of names."""
        places, names = self._places[what], getattr(self, what)
        if name not in places:
            places[name] = len(names)
            names.append(name)
        return places[name]


class Reading:
    """What is known of a run; it grows with `update`."""

    def __init__(self, folder: Path, most_groups: int):
        if not ((folder / "metrics.jsonl").exists() or (folder / "config.json").exists()):
            raise FileNotFoundError(f"{folder}: no metrics.jsonl in it: give the folder of a run (its --run.dir)")
        self.folder = folder
        self.config: dict[str, Any] = {}
        self._most_groups = most_groups
        self._metrics, self._rollouts = Tail(folder / "metrics.jsonl"), Tail(folder / "rollouts.jsonl")
        self.rows: list[dict] = []
        self.groups = Groups()
        self._seen: tuple | None = None  # what the last update found
        self.begun = 0  # how often the groups were read from the file's beginning again

    def update(self) -> bool:
        """Reads what is new; whether anything is. Raises ValueError for a file that is damaged elsewhere than at its end."""
        anew = [tail.begun_anew() for tail in (self._metrics, self._rollouts)]
        if anew[0]:
            self.rows = []
        if anew[1]:
            self.groups = Groups()
            self.begun += 1
        self.config = _config(self.folder / "config.json")
        self.rows += [parse_row(self._metrics.path, number, line) for number, line in self._metrics.lines()]
        per_step = max(1, self._most_groups // max(1, self.steps or 0, self.rows[-1]["step"] if self.rows else 0))
        for number, line in self._rollouts.lines():
            self.groups.add(number, self._rollouts.path, line, per_step)
        before, self._seen = self._seen, (
            len(self.rows), self.count, self.groups.left_out, self.torn, self.config, self.finished
        )  # fmt: skip
        return any(anew) or before != self._seen

    @property
    def count(self) -> int:
        """Groups that are kept."""
        return len(self.groups.columns["step"])

    @property
    def steps(self) -> int | None:
        """Steps that the run was asked for; None where epochs decide."""
        return self.config.get("run", {}).get("steps")

    @property
    def finished(self) -> bool:
        """Whether the run has written its Hugging Face folder, its last deed but for pictures."""
        return (self.folder / "hf").exists()

    @property
    def torn(self) -> list[str]:
        """The files whose last line has no end."""
        return [tail.path.name for tail in (self._metrics, self._rollouts) if tail.torn]

    @property
    def names(self) -> list[str]:
        """The metrics that any row has a number of, in the order of their first one."""
        found = dict.fromkeys(name for row in self.rows for name, value in row.items() if value is not None)
        return [name for name in found if name != "step"]


def turns_of(prompt: str) -> list[tuple[str, str]]:
    """(role, text) of each turn of a prompt of Qwen2.5 or Llama 3; of another model the whole, under the role "prompt"."""
    found = [(a or c, b or d) for a, b, c, d in _TURNS.findall(prompt)]
    found = [(role, text.strip()) for role, text in found if text.strip()]
    return found or [("prompt", prompt)]


def _without_tools(turns: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The turns, the first without its tools, and (name, JSON) of each tool: the first lines in a row that describe one."""
    role, text = turns[0]
    before: list[str] = []
    tools: list[tuple[str, str]] = []
    lines = text.split("\n")
    for i, line in enumerate(lines):
        tool = _tool(line)
        if tool is not None:
            tools.append((tool, line))
        elif tools:
            kept = [*before, f"[{len(tools)} tools, listed apart]", *lines[i:]]
            return [(role, "\n".join(kept)), *turns[1:]], tools
        else:
            before.append(line)
    return ([(role, "\n".join([*before, f"[{len(tools)} tools, listed apart]"])), *turns[1:]], tools) if tools else (turns, [])


def _tool(line: str) -> str | None:
    """The name of the tool that a line describes as data.prompt writes it; None for any other line."""
    if not line.startswith('{"type": "function"'):
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    name = value["function"].get("name") if isinstance(value.get("function"), dict) else None
    return name if isinstance(name, str) else None


def _bits(entries: list[dict] | None) -> int:
    """The marks of a response as a sum of powers of two, in the order of MARKS."""
    found = calls.marks(entries or [])
    return sum(1 << i for i, mark in enumerate(calls.MARKS) if mark in found)


def _append(chunks: list[bytes | list[Any]], item: Any) -> None:
    if not chunks or isinstance(chunks[-1], bytes):
        chunks.append([])
    chunks[-1].append(item)
    if len(chunks[-1]) == CHUNK:
        chunks[-1] = pack(chunks[-1])


def pack(value: Any) -> bytes:
    """JSON in ASCII, so that lone surrogates are escapes, compressed; the same for the same value."""
    return gzip.compress(json.dumps(value, separators=(",", ":")).encode("ascii"), 6, mtime=0)


def _config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        raise ValueError(f"{path}: not JSON; restore the file, or delete it") from None
    return found if isinstance(found, dict) else {}
