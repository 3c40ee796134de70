"""Replies that were made elsewhere: a file of JSON lines, `{"id": ..., "output": ...}`, to be judged like those of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Reply:
    """One line."""

    line: int  # from 1
    id: str
    output: str
    benchmark: str | None  # its name, where the line has it
    token_count: int | None
    truncated: bool
    reason: str | None  # of lines that eval.run wrote


def read(path: Path) -> list[Reply]:
    """The replies of a file, in its order. "text" will do for "output"; "benchmark", "token_count", "truncated" are optional.

    Raises FileNotFoundError, and ValueError, with the line, for one that is no reply and for an item that has two.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file: give the JSON lines with the replies")
    replies: dict[tuple[str | None, str], Reply] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            reply = _reply(number, json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f'{path}:{number}: not a reply ({error}): a line is {{"id": ..., "output": ...}}') from error
        if before := replies.get((reply.benchmark, reply.id)):
            raise ValueError(f"{path}:{number}: id {reply.id!r} is that of line {before.line}, too: an item has one reply")
        replies[reply.benchmark, reply.id] = reply
    return list(replies.values())


def _reply(number: int, row: Any) -> Reply:
    if not isinstance(row, dict) or "id" not in row or not {"output", "text"} & row.keys():
        raise ValueError("no object with id and output")
    output = row["output"] if "output" in row else row["text"]
    benchmark, count, truncated, reason = (row.get(key) for key in ("benchmark", "token_count", "truncated", "reason"))
    if not isinstance(row["id"], str) or not isinstance(output, str) or not isinstance(benchmark, str | None):
        raise ValueError("id, output and benchmark are texts")
    count = count if isinstance(count, int) else None
    return Reply(number, row["id"], output, benchmark, count, truncated is True, reason if isinstance(reason, str) else None)


def assigned(path: Path, replies: Sequence[Reply], ids: Mapping[str, Set[str]]) -> dict[tuple[str, str], Reply]:
    """The replies by benchmark and id, of the benchmarks in `ids`, {name: all its ids}; of others' none.

    A line need not name its benchmark where one alone has its id. Raises ValueError for an id that none has or several have,
    and where no reply is left.
    """
    found: dict[tuple[str, str], Reply] = {}
    for reply in replies:
        if reply.benchmark is not None and reply.benchmark not in ids:
            continue
        names = [name for name in ids if reply.benchmark in (None, name) and reply.id in ids[name]]
        where = f"{path}:{reply.line}: id {reply.id!r}"
        if not names:
            of = reply.benchmark or " or ".join(ids)
            raise ValueError(f'{where} is no item of {of}: mend it, or, if it is another\'s, name that as "benchmark"')
        if len(names) > 1:
            raise ValueError(f'{where} is an item of {" and ".join(names)}: say which in the line, as "benchmark"')
        if (names[0], reply.id) in found:
            raise ValueError(f"{where} has a reply in line {found[names[0], reply.id].line}, too: an item has one")
        found[names[0], reply.id] = reply
    if not found:
        raise ValueError(f"{path}: it holds no replies to {' or '.join(ids)}")
    return found
