"""BFCL: the ten single-turn categories whose calls the Berkeley leaderboard checks, with its own data and its own checker.

    items     the package's entries -> Items: prompts with the leaderboard's hints for Java and JavaScript
    verdict   a reply -> calls_of -> the package's ast_checker -> Scored
    simple_python, multiple, ... each category for training: --validation.benchmarks eval.bfcl:simple_python
    aggregates, columns, PAPER, like_for_like     the leaderboard's means, and Table 2 of Tool-N1 (arXiv 2505.00024)

The package, bfcl-eval, is installed without what it depends on (6 GB, and an old NumPy, with which only an old JAX goes):
`INSTALL`. Two things are kept from it when it is imported. Its table of models, which imports sixty clients of as many
services, is replaced by a table of one; and the folders that it makes for results, by default beside its own code, go to a
temporary one.

A reply is read as the handler that Tool-N1 released reads it: the *first* `<tool_call>` block holds one JSON list of calls (one
object without a list around it, or a string that holds JSON, is none, although the reward takes both), in Python's JSON, and
a missing `<think>` costs nothing. `block="last"` reads the last block, as the reward does. In Java and JavaScript each argument
is a string that holds a literal of the language.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import json
import os
import signal
import sys
import tempfile
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data import example
from eval.benchmark import Item, for_training
from grpo_jax.reward import Reward, Scored

SIZES = {
    "simple_python": 400,
    "simple_java": 100,
    "simple_javascript": 50,
    "multiple": 200,
    "parallel": 200,
    "parallel_multiple": 200,
    "live_simple": 258,
    "live_multiple": 1053,
    "live_parallel": 16,
    "live_parallel_multiple": 24,
}
CATEGORIES = tuple(SIZES)
REASONS = (
    "correct",
    "no_call",  # no <tool_call> block
    "bad_json",  # the block holds no list of calls
    "wrong_count",  # more or fewer calls than asked for
    "wrong_function",
    "missing_argument",
    "extra_argument",  # one that the function, or the answer, does not have
    "wrong_argument",  # its type or its value
    "checker_failed",  # the official checker raised, or took longer than CHECK_SECONDS; it counts as wrong
)
INSTALL = "pip install --no-deps bfcl-eval==2026.3.23 filelock"
MODEL = "grpo-jax"  # our name in the package's table of models; it takes an underscore in a name for a slash
CHECK_SECONDS = 10.0
MAX_DEPTH = 100  # of the JSON of calls; right ones have at most 6

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_LIVE = tuple(category for category in CATEGORIES if category.startswith("live_"))
_LANGUAGES = {"simple_java": "JAVA", "simple_javascript": "JAVASCRIPT"}
_BY_CHECK = {
    "wrong_count": "wrong_count",
    "wrong_func_name": "wrong_function",
    "missing_required": "missing_argument",
    "missing_optional": "missing_argument",
    "unexpected_param": "extra_argument",
    "checker_failed": "checker_failed",
}


@dataclass(frozen=True)
class Package:
    """What is used of bfcl_eval."""

    ast_checker: Callable[..., dict[str, Any]]
    languages: Any  # the enumeration Language
    entries: Callable[..., list[dict[str, Any]]]  # load_dataset_entry
    answers: Callable[[str], list[dict[str, Any]]]  # load_ground_truth_entry
    models: dict[str, Any]  # the table of models
    folder: tempfile.TemporaryDirectory  # lives as long as this does


@functools.cache
def package() -> Package:
    """Imports it, once. Raises ValueError, with the command that installs it, where it is missing."""
    folder, before = tempfile.TemporaryDirectory(prefix="bfcl-"), os.environ.get("BFCL_PROJECT_ROOT")
    os.environ["BFCL_PROJECT_ROOT"] = folder.name
    table = types.ModuleType("bfcl_eval.constants.model_config")
    table.MODEL_CONFIG_MAPPING = {}
    try:
        importlib.import_module("bfcl_eval")
        table = sys.modules.setdefault(table.__name__, table)
        table.MODEL_CONFIG_MAPPING[MODEL] = types.SimpleNamespace(underscore_to_dot=False)
        utils = importlib.import_module("bfcl_eval.utils")
        checker = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker").ast_checker
        languages = importlib.import_module("bfcl_eval.constants.enums").Language
    except ModuleNotFoundError as error:
        raise ValueError(f"BFCL needs the leaderboard's own data and checker ({error}): {INSTALL}") from error
    finally:
        os.environ.pop("BFCL_PROJECT_ROOT")
        if before is not None:
            os.environ["BFCL_PROJECT_ROOT"] = before
    entries, answers = utils.load_dataset_entry, utils.load_ground_truth_entry
    return Package(checker, languages, entries, answers, table.MODEL_CONFIG_MAPPING, folder)


def items(
    categories: Sequence[str] = CATEGORIES,
    *,
    system_messages: bool = True,
    block: str = "first",
) -> list[Item]:
    """The tasks of some categories, in their order and that of the files.

    system_messages: whether the system messages of 49 live entries are part of the task. Our prompt puts them at the end of its
    own; the handler that Tool-N1 released overwrites them. block: which `<tool_call>` block of a reply counts, "first" or
    "last".
    The answers are one right reply of several (for seven entries, that no reply can pass, near to one).
    Raises ValueError for an unknown category or block, and where the package is missing.
    """
    for category in categories:
        if category not in SIZES:
            near = difflib.get_close_matches(category, CATEGORIES, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown BFCL category {category!r}: did you mean {near!r}? Known: {', '.join(CATEGORIES)}")
    if block not in ("first", "last"):
        raise ValueError(f"unknown block {block!r}: 'first' or 'last'")
    return [item for category in categories for item in _items(category, system_messages, block)]


def validation(category: str) -> tuple[list[example.Example], Reward]:
    """A category as --validation.benchmarks wants it; `simple_python()` and so on are this module's functions for it."""
    return for_training(items([category]), verdict)


simple_python = functools.partial(validation, "simple_python")
simple_java = functools.partial(validation, "simple_java")
simple_javascript = functools.partial(validation, "simple_javascript")
multiple = functools.partial(validation, "multiple")
parallel = functools.partial(validation, "parallel")
parallel_multiple = functools.partial(validation, "parallel_multiple")
live_simple = functools.partial(validation, "live_simple")
live_multiple = functools.partial(validation, "live_multiple")
live_parallel = functools.partial(validation, "live_parallel")
live_parallel_multiple = functools.partial(validation, "live_parallel_multiple")


def _items(category: str, system_messages: bool, block: str) -> list[Item]:
    found = []
    shown = package().entries(category)  # with the hints, and types of Java and JavaScript said in words
    raw = package().entries(category, include_language_specific_hint=False)
    for entry, told, right in zip(raw, shown, package().answers(category), strict=True):
        (turns,) = entry["question"]
        chat = [turn for turn in turns if system_messages or turn["role"] != "system"]
        answer = [
            _call(name, call, entry["function"], category)
            for right_call in right["ground_truth"]
            for name, call in right_call.items()
        ]
        given = {"functions": entry["function"], "ground_truth": right["ground_truth"], "block": block}
        found.append(Item(entry["id"], category, example.make(chat, told["function"], answer, f"bfcl:{category}"), given))
    return found


def verdict(text: str, item: Item) -> Scored:
    """Whether a reply's calls are right by the official checker; 1.0 or 0.0, and one of REASONS. Never raises on any text."""
    calls = calls_of(text, item.given["block"])
    if calls is None:
        found = _block(text, item.given["block"])
        return Scored(0.0, "no_call" if found is None else "bad_json", {})
    language = package().languages[_LANGUAGES.get(item.category, "PYTHON")]
    functions, ground_truth = item.given["functions"], item.given["ground_truth"]
    checked = check(functions, calls, ground_truth, language, item.category, MODEL)
    return Scored(float(checked["valid"]), "correct" if checked["valid"] else reason_of(checked, calls, ground_truth), {})


def calls_of(text: str, block: str = "first") -> list[dict[str, Any]] | None:
    """The calls of a reply in the official checker's form, {name: arguments}; None where there are none to read.

    Those nested deeper than MAX_DEPTH are none: the official program knows no limit but Python's stack, which depends on the
    caller.
    """
    found = _block(text, block)
    try:
        calls = None if found is None else json.loads(found.strip())
    except (ValueError, RecursionError):  # among ValueErrors: an integer of over 4300 digits
        return None
    if not isinstance(calls, list) or not all(map(_is_call, calls)):
        return None
    calls = [{call["name"]: call["arguments"]} for call in calls]
    return None if example.is_deeper(calls, MAX_DEPTH) else calls


def calls(text: str, item: Item) -> list[dict[str, Any]] | None:
    """The same as {"name", "arguments"}, of the block that counts for the item."""
    found = calls_of(text, item.given["block"])
    return None if found is None else [{"name": name, "arguments": given} for call in found for name, given in call.items()]


def check(*args: Any) -> dict[str, Any]:
    """The official ast_checker, same arguments, with the error type "checker_failed" where it raises or does not end.

    Both happen: a list of numbers where it expects objects, an integer that no float holds; and its regular expressions for
    literals of Java and JavaScript take time exponential in a malformed one. A limit on time needs the main thread.
    """
    try:
        with _limit():
            return package().ast_checker(*args)
    except Exception as error:
        return {"valid": False, "error": [f"{type(error).__name__}: {error}"], "error_type": "checker_failed"}


def reason_of(checked: Mapping[str, Any], calls: Sequence[dict[str, Any]], ground_truth: Sequence[dict[str, Any]]) -> str:
    """One of REASONS for what the official checker says of wrong calls.

    Where calls may stand in any order it compares each with each, and an argument's value that is wrong may only mean
    that a call is another one: so a missing argument, then one too many, are the reason before a wrong value.
    """
    if not checked["error_type"].endswith(":cannot_find_match"):
        return _reason(checked["error_type"])
    if Counter(name for call in calls for name in call) != Counter(name for right in ground_truth for name in right):
        return "wrong_function"
    compared = [about for found in checked["error"] if isinstance(found, dict) for about in found.values()]
    kinds = {_reason(about["sub_error_type"]) for about in compared}
    return next((kind for kind in ("missing_argument", "extra_argument") if kind in kinds), "wrong_argument")


def aggregates(counts: Mapping[str, tuple[int, int]]) -> dict[str, float]:
    """The leaderboard's means as shares, from {category: (right, all)}; those alone whose categories are all there.

    simple: the mean of Python, Java and JavaScript, each counting the same. non_live: the mean of simple, multiple, parallel
    and parallel_multiple. live: the share of all live cases (of part of a category, that part stands for the whole). Both are
    the leaderboard's today. overall: the mean of the two, which is the paper's; the leaderboard's own also has multi-turn and
    agentic parts. In April 2025 its "Live" held irrelevance and relevance, 900 other tasks: not to be had from these.
    """
    share = {category: right / total for category, (right, total) in counts.items() if total}
    means: dict[str, float] = {}
    _mean(means, share, "simple", ("simple_python", "simple_java", "simple_javascript"))
    _mean(means, share | means, "non_live", ("simple", "multiple", "parallel", "parallel_multiple"))
    if all(category in share for category in _LIVE):
        means["live"] = sum(share[category] * SIZES[category] for category in _LIVE) / sum(map(SIZES.get, _LIVE))
    _mean(means, means, "overall", ("non_live", "live"))
    return means


COLUMNS = ("simple", "multiple", "parallel", "parallel_multiple", *_LIVE, "non_live", "live", "overall")
_TABLE_2 = {
    "GPT-4o": (79.42, 95.50, 94.00, 83.50, 84.88, 79.77, 87.50, 75.00, 88.10, 79.83, 83.97),
    "GPT-4o-mini": (80.08, 90.50, 89.50, 87.00, 81.40, 76.73, 93.75, 79.17, 86.77, 76.50, 81.64),
    "GPT-3.5-Turbo-0125": (77.92, 93.50, 67.00, 53.00, 80.62, 78.63, 75.00, 58.33, 72.85, 68.55, 70.70),
    "Gemini-2.0-Flash-001": (74.92, 89.50, 86.50, 87.00, 75.58, 73.12, 81.25, 83.33, 84.48, 81.39, 82.94),
    "DeepSeek-R1": (76.42, 94.50, 90.05, 88.00, 84.11, 79.87, 87.50, 70.83, 87.35, 74.41, 80.88),
    "Llama3.1-70B-Inst": (77.92, 96.00, 94.50, 91.50, 78.29, 76.16, 87.50, 66.67, 89.98, 62.24, 76.11),
    "Llama3.1-8B-Inst": (72.83, 93.50, 87.00, 83.50, 74.03, 73.31, 56.25, 54.17, 84.21, 61.08, 72.65),
    "Qwen2.5-7B-Inst": (75.33, 94.50, 91.50, 84.50, 76.74, 74.93, 62.50, 70.83, 86.46, 67.44, 76.95),
    "xLAM-2-70b-fc-r (FC)": (78.25, 94.50, 92.00, 89.00, 77.13, 71.13, 68.75, 58.33, 88.44, 72.95, 80.70),
    "ToolACE-8B (FC)": (76.67, 93.50, 90.50, 89.50, 73.26, 76.73, 81.25, 70.83, 87.54, 78.59, 82.57),
    "Hammer2.1-7B (FC)": (78.08, 95.00, 93.50, 88.00, 76.74, 77.40, 81.25, 70.83, 88.65, 75.11, 81.88),
    "Tool-N1-7B": (77.00, 95.00, 94.50, 90.50, 82.17, 80.44, 62.50, 70.83, 89.25, 80.38, 84.82),
    "Tool-N1-14B": (80.58, 96.00, 93.50, 92.00, 84.10, 81.10, 81.25, 66.67, 90.52, 81.42, 85.97),
}
PAPER = {model: dict(zip(COLUMNS, row, strict=True)) for model, row in _TABLE_2.items()}
"""Table 2 of Tool-N1, percent as printed, slips included (DeepSeek-R1's parallel is 90.50, ToolACE-8B's overall 83.07)."""


def columns(counts: Mapping[str, tuple[int, int]]) -> dict[str, float]:
    """Our row of Table 2, percent, from {category: (right, all)}; the columns alone that the counts suffice for."""
    shares = {category: right / total for category, (right, total) in counts.items() if total} | aggregates(counts)
    return {name: 100 * shares[name] for name in COLUMNS if name in shares}


def like_for_like(printed: Mapping[str, float]) -> dict[str, float]:
    """A row of PAPER, percent, with "live" and "overall" as `aggregates` has them.

    The table prints the share of the four live categories for Tool-N1, and for all others the leaderboard's "Live Acc" of then,
    which held irrelevance. The share can be had for all: each printed percentage is that of one whole number of cases.
    """
    right = sum(round(printed[category] / 100 * SIZES[category]) for category in _LIVE)
    live = 100 * right / sum(map(SIZES.get, _LIVE))
    return dict(printed) | {"live": live, "overall": (printed["non_live"] + live) / 2}


def _mean(means: dict[str, float], of: Mapping[str, float], name: str, parts: Sequence[str]) -> None:
    if all(part in of for part in parts):
        means[name] = sum(of[part] for part in parts) / len(parts)


def _block(text: str, which: str) -> str | None:
    """What `<tool_call>(.*?)</tool_call>` finds first or last, in linear time: no closing tag ahead ends the search."""
    found, position = None, 0
    while (start := text.find(_OPEN, position)) >= 0:
        start += len(_OPEN)
        end = text.find(_CLOSE, start)
        if end < 0:
            break
        found, position = text[start:end], end + len(_CLOSE)
        if which == "first":
            break
    return found


def _is_call(call: Any) -> bool:
    return isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict)


@contextlib.contextmanager
def _limit() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"no verdict in {CHECK_SECONDS:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    outer = signal.setitimer(signal.ITIMER_REAL, CHECK_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *outer)  # somebody else's alarm, if one was set


def _reason(error_type: str) -> str:
    """Of one call. What is not about a count, a name or a missing or unknown argument is about a type or a value."""
    return _BY_CHECK.get(error_type.rpartition(":")[2], "wrong_argument")


def _call(name: str, allowed: Mapping[str, list[Any]], functions: Sequence[dict[str, Any]], category: str) -> dict[str, Any]:
    """A right call: of each argument the first value allowed, and none where its function knows no such argument.

    "" among the values allowed says that the argument may be left out.
    """
    (function,) = [function for function in functions if function["name"] == name] or functions[:1]
    schemas, arguments = function["parameters"]["properties"], {}
    for argument, values in allowed.items():
        values = [value for value in values if value != ""] or values
        if argument in schemas and values and (values != [""] or argument in function["parameters"]["required"]):
            value = _plain(values[0])
            arguments[argument] = _literal(value, schemas[argument], category) if category in _LANGUAGES else value
    return {"name": function["name"], "arguments": arguments}


def _plain(value: Any) -> Any:
    """An allowed value as a call has it: an object's own values are lists of allowed ones, one level deep."""
    if isinstance(value, list):
        return [_plain(element) if isinstance(element, dict) else element for element in value]
    if not isinstance(value, dict):
        return value
    of = {key: allowed if isinstance(allowed, list) else [allowed] for key, allowed in value.items()}
    return {key: next((one for one in allowed if one != ""), "") for key, allowed in of.items() if allowed and allowed[0] != ""}


def _literal(value: Any, schema: Mapping[str, Any], category: str) -> str:
    """A value as a literal that the official program reads back, in the type that the function declares."""
    kind, element = schema["type"], schema.get("items", {})
    if isinstance(value, str):
        return value
    if category == "simple_javascript" or not isinstance(value, (list, dict)):
        suffix = {"long": "L", "float": "f" if category == "simple_java" else "", "Bigint": "n"}.get(kind, "")
        return json.dumps(value) + suffix
    if isinstance(value, dict):
        return (
            "new HashMap<>() {{ "
            + " ".join(f"put({json.dumps(key)}, {json.dumps(one)});" for key, one in value.items())
            + " }}"
        )
    if kind == "Array":  # its strings are read with their quotes, if they have any
        return "new Object[]{" + ", ".join(_literal(one, element, category) for one in value) + "}"
    quoted = [json.dumps(one) if isinstance(one, str) else _literal(one, element, category) for one in value]
    return f"new ArrayList<>(Arrays.asList({', '.join(quoted)}))"
