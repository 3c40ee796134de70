"""Rows of files or of the hub to Examples: a row is used, or it is dropped and counted under a reason.

    load(path) -> `files` (which files) -> `rows` (one row after another) -> `example_of` (Example, or a reason)
    row_of(example) -> the row that is read back as that example
    split(examples) -> (train, validation)

A row is an object with

    "query": text, or "messages": [turn, ...]    the dialogue, which ends with a user or a tool turn
    "tools": [{"name", "description", "parameters"}, ...]
    "answers": [{"name", "arguments"}, ...]      the right calls
    "id", "source", "reasoning", "response"      optional texts: its name, where it is from, a thought, a whole reply
    "no_call": true                              optional: that there are no answers is the right answer, and no omission

Rows of xLAM (tools and answers are JSON inside a string) and OpenAI's ways of writing (`{"type": "function",
"function": {...}}` round a tool or a call, arguments as a JSON string, `tool_calls` on an assistant turn) are valid.

What is wrong with one row's content drops the row; what is wrong with a file is an error, since a line that is not
JSON means a broken copy and a silently shorter data set. Parquet and Arrow are refused where the arguments of the
answers are a struct column: such a column gives each call the parameters of every other call as nulls, and turns 1 into
1.0, which would be another right answer. JSON strings are safe.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.example import DEEPEST, Example, is_deeper, make

SUFFIXES = (".jsonl", ".json", ".parquet")
MANIFEST = "manifest.json"  # what `data.build` says about a folder of rows; no row itself
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?")

# Why a row is dropped; the first that holds counts.
NOT_AN_OBJECT = "not_an_object"  # the row is JSON, but no object
NO_QUERY = "no_query"  # neither a query nor messages
MESSAGES_DO_NOT_PARSE = "messages_do_not_parse"  # unknown role, content that is no text, no turn to answer at the end
TOOLS_DO_NOT_PARSE = "tools_do_not_parse"
ANSWERS_DO_NOT_PARSE = "answers_do_not_parse"
NO_CALL = "no_call"  # no answers, and the row does not say that this is right
CALLS_UNOFFERED_TOOL = "calls_unoffered_tool"  # a right call is of a tool that the row does not list
# NaN, infinity, half a surrogate pair: no tokenizer and no JSON file takes it; or nested over DEEPEST levels deep.
NOT_PLAIN_JSON = "not_plain_json"
DUPLICATE = "duplicate"  # the same messages, tools and answers as an earlier row

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Loaded:
    """What was read: the usable rows, in the order of the files, and how many rows were dropped for each reason."""

    examples: list[Example]
    dropped: dict[str, int]


def load(path: str | Path, *, limit: int | None = None, keep_no_call: bool = False) -> Loaded:
    """The rows of a file, of a folder (its .jsonl, .json and .parquet files by name) or of a hub id `org/name`, which may
    have a revision (a commit, tag or branch) behind it: `org/name@revision`.

    limit: stop after so many usable rows; the rows behind are not read and not counted. keep_no_call: use rows without
    answers even where they do not say that this is right. Of several rows with one content the first is used.
    Raises FileNotFoundError where there is nothing under `path`, ValueError for a file that cannot be read and where no
    row is usable.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit = {limit}: give a number of rows from 1 on, or None for all")
    found: dict[str, Example] = {}
    dropped: Counter[str] = Counter()
    for row, source in rows(path):
        example = example_of(row, source, keep_no_call=keep_no_call)
        if isinstance(example, str):
            dropped[example] += 1
        elif example.id in found:
            dropped[DUPLICATE] += 1
        else:
            found[example.id] = example
            if len(found) == limit:
                break
    if not found:
        counts = ", ".join(f"{reason} {count}" for reason, count in dropped.most_common()) or "it holds no rows"
        raise ValueError(f"{path}: no usable row ({counts}): mend the rows, or give other data")
    return Loaded(list(found.values()), dict(dropped))


def split(examples: Iterable[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, validation), both shuffled; `fraction` of the rows, rounded, are held out.

    The shuffle starts from the order of the ids, so that the result depends on the set of rows and not on their order
    in files. At least one row is held out where fraction > 0, and at least one is left to train on.
    Raises ValueError for a fraction outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the held-out fraction is {fraction}: give a number from 0 to below 1")
    ordered = sorted(examples, key=lambda example: example.id)
    shuffled = [ordered[i] for i in np.random.default_rng(seed).permutation(len(ordered))]
    held_out = max(1, round(fraction * len(shuffled))) if fraction > 0 else 0
    held_out = max(0, min(held_out, len(shuffled) - 1))
    return shuffled[held_out:], shuffled[:held_out]


def example_of(row: Any, source: str, *, keep_no_call: bool = False) -> Example | str:
    """One row as an Example, or the reason why it is dropped. `source` is for rows that name none themselves."""
    if not isinstance(row, dict):
        return NOT_AN_OBJECT
    if is_deeper(row, DEEPEST):
        return NOT_PLAIN_JSON
    if not row.get("messages") and not str(row.get("query") or "").strip():
        return NO_QUERY
    turns = parsed(_turns, row.get("messages") or [{"role": "user", "content": row.get("query")}])
    if turns is None:
        return MESSAGES_DO_NOT_PARSE
    tools = parsed(tools_of, row.get("tools"))
    if tools is None:
        return TOOLS_DO_NOT_PARSE
    answer = parsed(_calls, row.get("answers"))
    if answer is None:
        return ANSWERS_DO_NOT_PARSE
    if not answer and not keep_no_call and row.get("no_call") is not True:
        return NO_CALL
    if not {call["name"] for call in answer} <= {tool["name"] for tool in tools}:
        return CALLS_UNOFFERED_TOOL
    extra = {key: row[key] for key in ("reasoning", "response") if isinstance(row.get(key), str) and row[key].strip()}
    if row.get("id") is not None:
        extra["row_id"] = str(row["id"])
    named = row.get("source")
    try:
        "".join(extra.values()).encode()  # half a surrogate pair raises, like in messages, tools and answer
        return make(turns, tools, answer, named if isinstance(named, str) and named else source, extra)
    except ValueError:
        return NOT_PLAIN_JSON


def row_of(example: Example) -> dict[str, Any]:
    """The row that `example_of` reads back as the same example."""
    extra = {("id" if key == "row_id" else key): value for key, value in example.extra.items()}
    row = {**extra, "source": example.source, "messages": list(example.messages), "tools": list(example.tools)}
    return row | {"answers": list(example.answer)} | ({} if example.answer else {"no_call": True})


# The parts of a row. These raise ValueError for what is not as it should be; `parsed` turns that into None.


def parsed(parse: Callable[[Any], Any], value: Any) -> Any:
    """What `parse` makes of a value; None where it raises ValueError, or the value is nested too deeply."""
    try:
        return parse(value)
    except (ValueError, RecursionError):
        return None


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def decoded(value: Any, kind: type) -> Any:
    """A value of that type, which may be written as a JSON string; ValueError for any other."""
    value = json.loads(value) if isinstance(value, str) else value
    _require(isinstance(value, kind), f"not a {kind.__name__}")
    return value


def unwrapped(value: Any) -> dict[str, Any]:
    """A tool or a call without OpenAI's wrapping. Only a tool or call without a name of its own is wrapped: a plain one
    may well have a key "function"."""
    _require(isinstance(value, dict), "not an object")
    inner = value.get("function")
    value = inner if isinstance(inner, dict) and "name" not in value else value
    _require(isinstance(value.get("name"), str) and value["name"] != "", "no name")
    return value


def tools_of(value: Any) -> list[dict[str, Any]]:
    """A row's tools, or the JSON string of them, each with name, description and parameters."""
    tools = []
    for tool in map(unwrapped, decoded(value, list)):
        description, parameters = tool.get("description") or "", tool.get("parameters")
        _require(isinstance(description, str), "a description that is no text")
        parameters = {} if parameters is None else decoded(parameters, dict)
        tools.append({**tool, "name": tool["name"], "description": description, "parameters": parameters})
    return tools


def _calls(value: Any) -> list[dict[str, Any]]:
    calls = map(unwrapped, decoded(value, list))
    return [{"name": call["name"], "arguments": decoded(call.get("arguments"), dict)} for call in calls]


def _turns(value: Any) -> list[dict[str, Any]]:
    turns = [_turn(turn) for turn in decoded(value, list)]
    asked = [turn["role"] for turn in turns if turn["role"] != "system"]
    _require(asked[-1:] in (["user"], ["tool"]), "no turn to answer at the end")
    return turns


def _turn(turn: Any) -> dict[str, Any]:
    _require(isinstance(turn, dict) and isinstance(turn.get("role"), str) and turn["role"] in ROLES, "not a turn")
    role, content = ROLES[turn["role"]], turn.get("content")
    calls = (turn.get("calls") or turn.get("tool_calls")) if role == "assistant" else None
    if content is None and (calls or role == "tool"):
        content = ""
    if role == "tool" and not isinstance(content, str):
        content = json.dumps(content, ensure_ascii=False)  # a result given as a value rather than as text
    _require(isinstance(content, str), "a content that is no text")
    parsed = {"role": role, "content": content}
    if calls:
        parsed["calls"] = _calls(calls)
    if role == "tool" and isinstance(turn.get("name"), str):
        parsed["name"] = turn["name"]
    return parsed


# Files and the hub. Each yields (row, source).


def rows(path: str | Path) -> Iterator[tuple[Any, str]]:
    """The rows of a file, a folder or a hub id, one after another as they are stored, each with the name of its source.

    Errors as in `load`.
    """
    place = Path(path)
    if not place.exists():
        yield from _hub_rows(str(path))
        return
    for file in files(place):
        read = _parquet_rows if file.suffix == ".parquet" else _json_rows
        for row in read(file):
            yield row, file.stem


def files(place: Path) -> list[Path]:
    """The data files that a path means: itself, or those in the folder, by name. Errors as in `load`."""
    if place.is_file():
        if place.suffix not in SUFFIXES:
            raise ValueError(f"{place}: not a data file by its name: give a file that ends in {', '.join(SUFFIXES)}")
        return [place]
    found = sorted(file for file in place.iterdir() if file.suffix in SUFFIXES and file.is_file() and file.name != MANIFEST)
    if not found:
        raise FileNotFoundError(f"{place}: no data file in this folder: put one in that ends in {', '.join(SUFFIXES)}")
    return found


def _json_rows(file: Path) -> Iterator[Any]:
    """One row a line; a .json file may also be one list."""
    with file.open("rb") as lines:
        if file.suffix == ".json" and lines.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            yield from _parse_json(file.read_bytes(), file, 1, "mend the file")
            return
        lines.seek(0)
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _parse_json(line.rstrip(), file, number, "mend or delete the line")


def _parse_json(text: bytes, file: Path, line: int, mend: str) -> Any:
    """The value of a JSON text that starts at that line of the file."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        where, near = f"{file}:{line + error.lineno - 1}", error.doc[max(0, error.pos - 20) : error.pos + 20]
        what = f"{error.msg.removesuffix(' at')} at column {error.colno}, near {near!r}"
        raise ValueError(f"{where}: not JSON ({what}): {mend}") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, an endless number, endless nesting
        raise ValueError(f"{file}:{line}: not JSON ({error}): {mend}") from error


def _parquet_rows(file: Path) -> Iterator[Any]:
    import pyarrow as pa  # here: slow to import, and JSON needs none of it
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            _refuse_struct_arguments(table.schema_arrow, str(file))
            for batch in table.iter_batches(batch_size=1024):
                yield from map(_without_nulls, batch.to_pylist())
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if getattr(error, "errno", None):  # of the system, which names the file; pyarrow's own have no number
            raise
        raise ValueError(f"{file}: not readable as Parquet ({str(error).splitlines()[0]}): copy or write it again") from error


def is_hub_id(name: str) -> bool:
    """Whether it has the form of one; it may be the path of a missing folder, too."""
    return _HUB_ID.fullmatch(name) is not None and not name.endswith(SUFFIXES)


def _hub_rows(name: str) -> Iterator[tuple[Any, str]]:
    """The train split of a data set on the hub."""
    may_be = f"a file ({', '.join(SUFFIXES)}), a folder of such files, or a hub id org/name"
    hub_id, _, revision = name.partition("@")
    if not is_hub_id(name):
        raise FileNotFoundError(f"{name}: no such file or folder: give {may_be}")
    import datasets  # here: slow to import, and files need none of it

    try:
        table = datasets.load_dataset(hub_id, split="train", **({"revision": revision} if revision else {}))
    except Exception as error:  # a dozen kinds, from no network to a gated data set; all mean that there are no rows
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if "gated dataset" in reason:
            raise PermissionError(
                f"{name}: this data set is gated: accept its conditions at https://huggingface.co/datasets/{hub_id}, then log "
                "in with `hf auth login` (or set HF_TOKEN); or download it and give the file"
            ) from error
        raise FileNotFoundError(f"{name}: no such file or folder, nor on the hub ({reason}): give {may_be}") from error
    _refuse_struct_arguments(table.features.arrow_schema, name)
    for row in table:
        yield _without_nulls(row), hub_id


def _refuse_struct_arguments(schema: Any, where: str) -> None:
    if "answers" in schema.names and _has_struct_arguments(schema.field("answers").type):
        raise ValueError(
            f"{where}: the arguments in the column 'answers' are Arrow structs, which mix up those of all rows: "
            "store 'answers' as a JSON string, or give the rows as .jsonl"
        )


def _has_struct_arguments(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(
            (part.name == "arguments" and pa.types.is_struct(part.type)) or _has_struct_arguments(part.type) for part in kind
        )
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return is_list and _has_struct_arguments(kind.value_type)


def _without_nulls(value: Any) -> Any:
    """Arrow gives every object of a column the keys of all of them: take the null ones out again."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
