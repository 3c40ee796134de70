"""What an evaluation on benchmarks keeps, item by item, and how one that was stopped goes on.

OUT/settings.json    what all results in the folder share: model, template, decoding, benchmarks and how they are asked
OUT/NAME.jsonl       a line an item of the benchmark, as they come: `row`
OUT/lock             held by the process that is at work in the folder
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from eval import report
from eval.benchmark import Item
from eval.lines import TAKEN, Lines, lock
from eval.selection import Benchmark

NO_REPLY = "no_reply"  # the reason of an item that a file of replies lacks, or that a server left without an answer

Row = dict[str, Any]


def row(
    benchmark: Benchmark,
    item: Item,
    output: str,
    *,
    prompt: str = "",
    token_count: int | None = None,
    truncated: bool = False,
    missing: str | None = None,
) -> Row:
    """The result of one item: the reply with its verdict; `missing` is the reason where there is none, which is wrong."""
    scored = benchmark.verdict(output, item)
    return {
        "id": item.id,
        "category": item.category,
        "prompt": prompt,
        "output": output,
        "token_count": token_count,
        "truncated": truncated,
        "calls": _plain(benchmark.calls(output, item)),
        "value": 0.0 if missing else scored.value,
        "reason": missing or scored.reason,
        "parts": dict.fromkeys(scored.parts, 0.0) if missing else scored.parts,
    }


def _plain(calls: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """None for calls that no JSON holds: BFCL reads NaN, other readers of our file might not."""
    try:
        json.dumps(calls, allow_nan=False)
    except ValueError:
        return None
    return calls


def settle(out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the folder, with what it had before; changes nothing.

    settings: plain JSON; "benchmarks" has those of each by its name, and those of benchmarks that it does not name stay.
    Raises ValueError, naming what differs, where the folder has results of others, and where it has none of ours.
    """
    if (out / "responses.jsonl").exists():
        raise ValueError(f"{out}: holds an evaluation on rows of data: give another --out")
    file, kept = out / "settings.json", [f"{name}.jsonl" for name in settings["benchmarks"]]
    if not file.exists():
        if there := [name for name in kept if (out / name).exists()]:
            raise ValueError(f"{out / there[0]}: no settings.json beside it says whose results these are: give another --out")
        return dict(settings)
    before = read(file)
    old, new = _flat(before), _flat(settings)
    differ = [f"{name} was {old[name]}, is {new[name]}" for name in new if name in old and old[name] != new[name]]
    answered = any((out / f"{name}.jsonl").exists() and (out / f"{name}.jsonl").stat().st_size for name in before["benchmarks"])
    if differ and answered:
        raise ValueError(f"{out}: holds results of another evaluation ({'; '.join(differ)}): give another --out")
    if differ:  # of a start that came to nothing, for a wrong --model, say
        return dict(settings)
    return before | settings | {"benchmarks": before["benchmarks"] | settings["benchmarks"]}


def read(file: Path) -> dict[str, Any]:
    """A JSON file of the folder. Raises ValueError where it is damaged, and says what to do."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found["benchmarks"], dict):
            raise TypeError
    except (ValueError, TypeError, LookupError):
        raise ValueError(f"{file}: damaged: restore it, or give another --out") from None
    return found


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    plain = {name: value for name, value in settings.items() if name != "benchmarks"}
    of = settings["benchmarks"].items()
    return plain | {f"{name}.{option}": value for name, options in of for option, value in options.items()}


class Results:
    """The results of an evaluation: those of earlier starts, and new ones, in the file before they count; a context manager."""

    def __init__(self, out: Path, settings: Mapping[str, Any], benchmarks: Sequence[Benchmark], *, anew: bool = False):
        """anew: what earlier starts left goes. Raises ValueError where the folder is another's, in use or damaged."""
        self.rows: dict[str, dict[str, Row]] = {}  # by benchmark and id
        self._lines: dict[str, Lines] = {}
        self.added: Callable[[Row], None] = lambda row: None  # is told of each new one
        out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            # Of the folder, not of a file alone: else others could change the settings before our first result is there.
            lock(opened.enter_context((out / "lock").open("a")), f"{out}: {TAKEN}")
            settled = settle(out, settings)
            for benchmark in benchmarks:
                path = out / f"{benchmark.name}.jsonl"
                self._lines[benchmark.name] = lines = opened.enter_context(closing(Lines(path)))
                if anew:
                    lines.clear()
                found = () if anew else lines.found
                self.rows[benchmark.name] = _read(path, found, {item.id for item in benchmark.items})
            report.write(out / "settings.json", json.dumps(settled, indent=2, ensure_ascii=False) + "\n")
            self._close = opened.pop_all().close

    def add(self, benchmark: str, result: Row) -> None:
        self._lines[benchmark].append(result, sync=False)
        self.rows[benchmark][result["id"]] = result
        self.added(result)

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


def _read(path: Path, lines: Sequence[bytes], ids: set[str]) -> dict[str, Row]:
    found = {}
    for number, line in enumerate(lines, 1):
        try:
            result = json.loads(line)
            if result["id"] not in ids or not {"value", "reason", "parts", "token_count", "truncated"} <= result.keys():
                raise ValueError
        except (ValueError, TypeError, LookupError, AttributeError):
            raise ValueError(f"{path}:{number}: damaged: delete the line, and its item is asked again") from None
        found[result["id"]] = result
    return found
