"""Hostile text by the million: through every reward, every reader of replies and every loader of rows.

    python -m tests.faults.fuzz --responses 1000000 --rows 100000 --seed 0

    READERS      what reads a reply: never raises
    LOADERS      what reads a row: returns, drops it for a reason, or raises one line that a user can act on (`refused`)
    campaign     cases through all of them -> what went wrong, and the longest call of each

What is read is made by tests/faults/broken.py. Case `number` of a seed is always the same: --first NUMBER --responses 1 is one
case again. A call is timed by the processor time of its thread, and a long one twice more, of which the least counts, so that a
busy machine makes none slow. What goes wrong is printed with its number; the exit code is then 1.
"""

from __future__ import annotations

import gzip
import json
import math
import random
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import track

from data import augment, command_line, jsonl, overlap, prompt, toolace
from data.example import Example, is_deeper, make
from eval import acebench, api_bank, bfcl, chat, completions, lines, record, replies
from eval.benchmark import Item
from grpo_jax import config, console, metrics, reward
from grpo_jax.report import reading
from models import hf
from tests.faults.broken import CALLS, MEGABYTE, PIECES, response, row

SECONDS = 0.2  # that a call may take
SHOWN = 20  # findings that are printed whole


@dataclass(frozen=True)
class Args:
    """Puts broken replies and rows to all that reads them; exit code 1 where something raises or is slow."""

    #: Replies, each through every reward and every reader of replies.
    responses: int = 20_000
    #: Rows, each through every loader.
    rows: int = 2_000
    #: Of all that is drawn.
    seed: int = 0
    #: The number of the first case, to see one again.
    first: int = 0
    #: Files rollouts.jsonl of runs, whose responses are broken beside those that the program makes.
    replies_of: tuple[Path, ...] = ()
    #: Files of rows (JSONL, JSON, Parquet), likewise.
    rows_of: tuple[Path, ...] = ()


@dataclass
class Report:
    """What came of a campaign."""

    cases: int = 0
    characters: int = 0
    longest: dict[str, float] = field(default_factory=dict)  # reader -> seconds of its slowest call
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


# ---------------------------------------------------------------- what reads a reply

Reader = Callable[[str, list[dict[str, Any]]], Any]


def _judged(kind: str) -> Reader:
    def read(text: str, answer: list[dict[str, Any]]) -> str:
        scored = reward.judge(text, answer, kind)
        assert math.isfinite(scored.value) and isinstance(scored.value, float), scored
        assert scored.reason in reward.REASONS, scored
        return scored.reason

    return read


def _parsed(text: str, answer: list[dict[str, Any]]) -> None:
    """What was read is written and read again as the same."""
    calls = reward.parse_calls(text)
    if calls is not None:
        assert reward.parse_calls(prompt.reply(calls, text[:1000])) == calls
        assert reward.score(prompt.reply(calls, ""), calls) == 1


def _bfcl(text: str, answer: list[dict[str, Any]]) -> None:
    for block in ("first", "last"):
        calls = bfcl.calls_of(text, block)
        assert calls is None or isinstance(record._plain(calls), list | None)


def _verdict(module: Any, given: Callable[[list[dict[str, Any]]], list[Item]]) -> Reader:
    def read(text: str, answer: list[dict[str, Any]]) -> None:
        for item in given(answer):
            scored = module.verdict(text, item)
            assert scored.value in (0.0, 1.0) and set(scored.parts.values()) <= {0.0, 1.0}, scored

    return read


def _item(**given: Any) -> Item:
    return Item("item", "category", make([{"role": "user", "content": "?"}], [], [], "fuzz"), given)


def _api_bank(answer: list[dict[str, Any]]) -> list[Item]:
    texts = [{**call, "arguments": {key: str(value) for key, value in call["arguments"].items()}} for call in answer[:1]]
    return [_item(answer=call) for call in texts]


def _acebench(answer: list[dict[str, Any]]) -> list[Item]:
    kinds = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
    tools = []
    for call in answer:
        properties = {key: {"type": kinds.get(type(value), "string")} for key, value in call["arguments"].items()}
        schema = {"type": "object", "properties": properties, "required": list(properties)[:1]}
        tools.append({"name": call["name"], "description": "", "parameters": schema if properties else {}})
    return [_item(tools=tools, answers=[{call["name"]: call["arguments"] for call in answer}])] if answer else []


def _kept(text: str, answer: list[dict[str, Any]]) -> None:
    """The text in the files of a run and of an evaluation."""
    row = {"step": 1, "responses": [{"text": text, "value": math.nan}]}
    line = json.dumps(metrics.plain(row), allow_nan=False).encode("ascii")
    assert json.loads(line)["responses"][0]["text"] == _joined(text)
    assert json.loads(lines.encoded({"id": "item", "output": text}))["output"] == _joined(text)


@lru_cache(maxsize=1)  # slow on a megabyte of halves: called before the clock starts
def _joined(text: str) -> str:
    """Two halves of a surrogate pair side by side, as JSON reads them: one character."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass") if _HALF.search(text) else text


_HALF = re.compile("[\ud800-\udfff]")


def _seen(text: str, answer: list[dict[str, Any]]) -> None:
    """The text on a terminal, and as a turn of a conversation."""
    thought, _, rest = chat.parts(text)
    chat.problem(text)
    for part in (thought[:2000], rest[:2000]):
        shown = console.visible(part, "utf-8")
        shown.encode()
        assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u202e\u2028]", shown)


def _paged(text: str, answer: list[dict[str, Any]]) -> None:
    """The text as a response on the page of a run. Up to a quarter of a megabyte: its JSON, in which a character may take
    twelve, is packed, which is linear in its length, but slower than all other reading."""
    text = text[: MEGABYTE // 4]
    groups = _groups(text, "Which?", answer)
    assert "".join(piece for _, piece in groups.chunks[0][0][0]["pieces"]) == json.loads(json.dumps(text))
    _packed(groups.chunks[0], text)


def _prompted(text: str, answer: list[dict[str, Any]]) -> None:
    """The text as a prompt on the page of a run, and as what a task is called; up to the same length."""
    text = text[: MEGABYTE // 4]
    _packed(_groups("", f"<|im_start|>user\n{text}", answer).task_chunks[0], text)


def _groups(text: str, asked: str, answer: list[dict[str, Any]]) -> reading.Groups:
    response = {"text": text, "value": 0.0, "reason": text[:9], "token_count": 1, "truncated": False, "advantage": None}
    row = {"step": 1, "id": text[:50], "prompt": asked, "answer": answer, "responses": [response]}
    groups = reading.Groups()
    groups.add(1, Path("rollouts.jsonl"), json.dumps(row).encode("ascii"), 1)
    return groups


def _packed(chunk: list[Any], text: str) -> None:
    packed = reading.pack(chunk)
    if len(text) < 2**16:  # of longer ones this check would take as long as what is timed
        assert json.loads(gzip.decompress(packed)) == json.loads(json.dumps(chunk))


READERS: dict[str, Reader] = {
    **{kind: _judged(kind) for kind in reward.KINDS},
    "parse_calls": _parsed,
    "bfcl": _bfcl,
    "api_bank": _verdict(api_bank, _api_bank),
    "acebench": _verdict(acebench, _acebench),
    "files": _kept,
    "terminal": _seen,
    "page, response": _paged,
    "page, prompt": _prompted,
}


# ---------------------------------------------------------------- what reads a row


@dataclass(frozen=True)
class Place:
    """Where files are written for those loaders that read files."""

    folder: Path
    tokenizer: Any

    def file(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path


Loader = Callable[[bytes, Place], Any]
GOOD = b'{"query": "Oslo?", "tools": [{"name": "f"}], "answers": [{"name": "f", "arguments": {}}]}'


def _outcome(outcome: Example | str, place: Place) -> str:
    """A row that is used goes the whole way that a run takes with it."""
    if isinstance(outcome, str):
        return f"dropped: {outcome}"
    again = jsonl.example_of(json.loads(json.dumps(jsonl.row_of(outcome))), "other")
    assert again == outcome, (again, outcome)
    assert reward.score(prompt.target(make(outcome.messages, outcome.tools, outcome.answer, "")), outcome.answer) == 1
    prompt.target(outcome)
    assert prompt.messages(outcome)[0]["role"] == "system"
    assert prompt.encode(outcome, place.tokenizer)
    augment.irrelevant(outcome)
    masked = augment.masked(outcome, random.Random(0))
    assert {call["name"] for call in masked.answer} <= {tool["name"] for tool in masked.tools}
    return "used"


def _row(content: bytes, place: Place) -> str:
    value = jsonl._parse_json(content, Path("fuzz"), 1, "mend it")
    return _outcome(jsonl.example_of(value, "fuzz", keep_no_call=len(content) % 2 == 0), place)


def _toolace(content: bytes, place: Place) -> str:
    value = jsonl._parse_json(content, Path("fuzz"), 1, "mend it")
    outcomes = [_outcome(one, place) for one in toolace.examples_of(value, "fuzz", keep_no_call=len(content) % 2 == 0)]
    return ", ".join(sorted(set(outcomes)))


def _jsonl(content: bytes, place: Place) -> None:
    assert jsonl.load(place.file("rows.jsonl", GOOD + b"\n" + content)).examples


def _json(content: bytes, place: Place) -> None:
    assert jsonl.load(place.file("rows.json", b"[" + GOOD + b",\n" + content + b"]")).examples


def _parquet(content: bytes, place: Place) -> str | None:
    """Of a row in eight; not every value can be a column."""
    if len(content) % 8 or len(content) > 20_000:
        return None
    value, path = jsonl._parse_json(content, Path("fuzz"), 1, "mend it"), place.folder / "rows.parquet"
    if not isinstance(value, dict) or is_deeper(value, 60):  # pyarrow takes seconds to write what it will not read
        return None
    try:
        texts = {key: part if isinstance(part, str) or len(content) % 16 else json.dumps(part) for key, part in value.items()}
        pq.write_table(pa.Table.from_pylist([texts]), path)
    except Exception:  # pyarrow's, of what Parquet has no column for
        return None
    if len(content) % 3 == 0:
        damaged = bytearray(path.read_bytes())
        damaged[len(content) % len(damaged)] ^= 0x55
        path.write_bytes(damaged)
    return f"parquet of {len(jsonl.load(path, keep_no_call=True).examples)}"


def _example_overlap(content: bytes, place: Place) -> None:
    overlap.read([str(place.file("benchmark.json", content))])


def _config(content: bytes, place: Place) -> None:
    place.file("config.json", content)
    hf.load_config(place.folder)


def _reply_of_server(content: bytes, place: Place) -> str:
    return type(completions.read_reply(200, {}, content)).__name__


LOADERS: dict[str, Loader] = {
    "row": _row,
    "toolace": _toolace,
    "jsonl": _jsonl,
    "json": _json,
    "parquet": _parquet,
    "replies": lambda content, place: replies.read(place.file("replies.jsonl", content)),
    "tools": lambda content, place: chat.read_tools(place.file("tools.json", content)),
    "metrics": lambda content, place: metrics.read(place.file("metrics.jsonl", content + b"\n")),
    "benchmarks": _example_overlap,
    "config": _config,
    "server": _reply_of_server,
}


def refused(error: Exception) -> bool:
    """Whether it is one line that a user can act on: what `config.run_main` and data.build make an exit code 2 of."""
    ours = isinstance(error, OSError) or (isinstance(error, ValueError) and config._is_ours(error))
    return ours and bool(str(error)) and "\n" not in str(error) and len(str(error)) < 2000


# ---------------------------------------------------------------- the campaign


def campaign(cases: Sequence[int], seed: int, kind: str, corpus: Sequence[Any] = (), seconds: float = SECONDS) -> Report:
    """The cases of these numbers through all READERS (kind "responses") or LOADERS ("rows")."""
    report = Report()
    tokenizer = hf.load_tokenizer(config.DEMO_MODEL) if kind == "rows" else None
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        place = Place(Path(folder), tokenizer)
        if kind == "rows":
            put(Report(), "", (GOOD + b" " * (-len(GOOD) % 8), place), kind, seconds)  # the first call of all imports much
        for number in cases:
            rng = random.Random((seed << 32) + number)
            case = response(rng, corpus) if kind == "responses" else (row(rng, corpus), place)
            put(report, f"{kind} {number}", case, kind, seconds)
    return report


def put(report: Report, label: str, case: tuple[Any, Any], kind: str, seconds: float) -> None:
    """One case through all that reads it."""
    table, may_raise = (READERS, ()) if kind == "responses" else (LOADERS, (ValueError, OSError))
    report.cases += 1
    report.characters += len(case[0])
    if kind == "responses":
        _joined(case[0])
    for name, read in table.items():
        outcome, took = _timed(read, case)
        if took > seconds:  # what the machine was busy with beside does not come again
            took = min(took, *(_timed(read, case)[1] for _ in range(2)))
        if isinstance(outcome, Exception):
            error, outcome = outcome, "refused"
            if not (isinstance(error, may_raise) and refused(error)):
                outcome = "raised"
                report.findings.append(f"{label}, {name}: {''.join(traceback.format_exception(error)[-6:])[-2000:]}")
        if took > seconds:
            report.findings.append(f"{label}, {name}: {took:.3f} s")
        report.longest[name] = max(took, report.longest.get(name, 0.0))
        if isinstance(outcome, str):
            report.outcomes[f"{name}: {outcome}"] += 1


def _timed(read: Callable[..., Any], case: tuple[Any, Any]) -> tuple[Any, float]:
    """What reading the case returns, or raises, and the seconds of processor time that it took."""
    began = time.thread_time()
    try:
        outcome = read(*case)
    except Exception as error:
        outcome = error
    return outcome, time.thread_time() - began


def megabytes(seconds: float = SECONDS) -> Report:
    """A megabyte of every piece, alone, as a block, as an argument and behind right calls, through all READERS."""
    report = Report()
    for piece in filter(None, PIECES):
        run = piece * (MEGABYTE // len(piece))
        block = f"<think></think><tool_call>{run}</tool_call>"
        argument = f'<tool_call>[{{"name": "f", "arguments": {{"a": "{run}"}}}}]</tool_call>'
        for text in (run, block, argument, prompt.reply(CALLS[0], "") + run):
            put(report, f"{len(text):,} characters of {piece[:20]!r}", (text, CALLS[0]), "responses", seconds)
    return report


def _show(title: str, report: Report, seconds: float) -> None:
    cells = {"cases": f"{report.cases:,}", "characters": f"{report.characters:,}", "time": f"{seconds:,.0f} s"}
    cells["findings"] = f"{len(report.findings):,}"
    slowest = [(f"longest, {name}", f"{1000 * took:.1f} ms") for name, took in sorted(report.longest.items())]
    console.header(title, [*cells.items(), *slowest, *((name, f"{n:,}") for name, n in report.outcomes.most_common(40))])
    for finding in report.findings[:SHOWN]:
        console.warn(console.visible(finding))


def _texts(files: Sequence[Path]) -> list[str]:
    return [said["text"] for file in files for step in metrics.read(file) for said in step["responses"]]


def main() -> None:
    args = command_line.read(Args, "python -m tests.faults.fuzz", sys.argv[1:])
    corpora = {"responses": _texts(args.replies_of), "rows": [row for file in args.rows_of for row, _ in jsonl.rows(file)]}
    wrong = 0
    if args.responses and not args.first:
        began = time.monotonic()
        report = megabytes()
        _show("a megabyte of each piece", report, time.monotonic() - began)
        wrong += len(report.findings)
    for kind, count in (("responses", args.responses), ("rows", args.rows)):
        if count:
            began, quiet = time.monotonic(), not console.CONSOLE.is_terminal
            cases = track(range(args.first, args.first + count), kind, console=console.CONSOLE, transient=True, disable=quiet)
            report = campaign(cases, args.seed, kind, corpora[kind])
            _show(f"{kind}, seed {args.seed}, from case {args.first:,}", report, time.monotonic() - began)
            wrong += len(report.findings)
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    config.run_main(main)
