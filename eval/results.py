"""What evaluations on benchmarks left in their folders, read back, and what of several folders can be compared.

    read        a folder of `python -m eval.run --benchmarks` -> Folder: its scores.json, and every reply with its verdict
    common      the items of a benchmark that several folders have
    remarks     in words, where folders differ in more than the model
    counts      {category: (right, all)}, by a protocol;  pairs: of two folders
    kind        what became of one reply

What a page says is counted from the verdicts on the items compared, not taken from scores.json, which is of all items.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import jsonl
from data.command_line import plural
from eval import acebench, api_bank, bfcl, chance
from eval.chance import ALL, Pairs
from eval.record import NO_REPLY

AGAIN = "answer the benchmarks again: python -m eval.run --help"
CUT = "cut off"
UNKNOWN = "not known"
SETTINGS = {  # of scores.json, and what a reader calls them
    "temperature": "temperature",
    "max_response_tokens": "most tokens of a reply",
    "template_fingerprint": "template",
}
FIELDS = {"id": str, "category": str, "output": str, "truncated": bool, "value": int | float, "reason": str, "parts": dict}


@dataclass(frozen=True)
class Benchmark:
    """What a comparison knows of a benchmark besides its module's CATEGORIES and `aggregates`."""

    title: str
    categories: tuple[str, ...]
    aggregates: Callable[[Any], dict[str, Any]]
    protocols: tuple[str, ...]  # the first is the value of a reply, the others are in its parts
    headlines: tuple[str, ...]  # the means that a picture shows; the last is the one of one line
    size: int  # items in all
    paper: Mapping[str, Mapping[str, float]]  # model: {column: percent}
    columns: tuple[str, ...]  # of the paper's rows and ours side by side
    marks: Mapping[str, str]  # headline: the paper's column that is nearest to it
    note: str  # what the paper's columns are


def _bfcl_rows() -> dict[str, dict[str, float]]:
    """Table 2 with both kinds of "live" and "overall": as printed, and like for like under the names of `aggregates`."""
    printed = {model: {f"{name}, printed": row[name] for name in ("live", "overall")} for model, row in bfcl.PAPER.items()}
    return {model: bfcl.like_for_like(row) | printed[model] for model, row in bfcl.PAPER.items()}


def _figure_3(numbers: Mapping[str, float]) -> dict[str, dict[str, float]]:
    return {model: {"figure 3": number} for model, number in numbers.items()}


BENCHMARKS = {
    "bfcl": Benchmark(
        "BFCL",
        bfcl.CATEGORIES,
        bfcl.aggregates,
        ("official",),
        ("non_live", "live", "overall"),
        sum(bfcl.SIZES.values()),
        _bfcl_rows(),
        (*bfcl.COLUMNS[:-2], "live, printed", "overall, printed", "live", "overall"),
        {name: name for name in ("non_live", "live", "overall")},
        'The paper\'s rows are Table 2 of Tool-N1 (arXiv 2505.00024). Its "live" is not one quantity: for the two Tool-N1 rows '
        "it is the share of the 1,351 live tasks whose calls are checked by their form, for the others the leaderboard's mean "
        "of April 2025, which counted 900 irrelevance and relevance tasks, too. The last two columns are like for like: the "
        "share of the 1,351 for every row, counted again from its four live columns, and the mean of that and non-live. Ours "
        "are of this kind, so compare them with these two and not with those printed.",
    ),
    "api_bank": Benchmark(
        "API-Bank",
        api_bank.CATEGORIES,
        api_bank.aggregates,
        ("accuracy", "toolrl"),
        ("accuracy",),
        sum(api_bank.SIZES.values()),
        _figure_3(api_bank.PAPER),
        ("figure 3", "accuracy", "accuracy_394", "accuracy_reachable"),
        {"accuracy": "figure 3"},
        "The paper's rows are read from Figure 3 of Tool-N1 (arXiv 2505.00024), which says neither how dialogues were shown "
        "nor by which protocol replies were judged. Its three baselines are multiples of 1/394, so `accuracy_394` is nearest "
        "to them; the two Tool-N1 rows are of neither 394 nor 399 tasks.",
    ),
    "acebench": Benchmark(
        "ACEBench",
        acebench.CATEGORIES,
        acebench.aggregates,
        ("official", "official_nostrip", "strict"),
        ("acebench",),
        500,
        _figure_3(acebench.PAPER),
        ("figure 3", "acebench", "atom", "single_turn"),
        {"acebench": "figure 3"},
        "The paper's rows are read from Figure 3 of Tool-N1 (arXiv 2505.00024), which states neither layout nor language. Ours "
        "is the mean of the eight categories by the authors' own rules (`official`); four of the paper's five numbers can be "
        "such a mean.",
    ),
}


@dataclass(frozen=True)
class Folder:
    """One evaluation."""

    label: str
    path: Path
    scores: dict[str, Any]  # scores.json
    replies: dict[str, dict[str, dict[str, Any]]]  # benchmark: item id: a line of its file


def read(label: str, path: Path) -> Folder:
    """Raises FileNotFoundError or NotADirectoryError, and ValueError for what is none of `eval.run --benchmarks`."""
    if not path.is_dir():
        raise NotADirectoryError(f"{path}: no such folder: give one that python -m eval.run --benchmarks ... --out wrote")
    file = path / "scores.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{path}: no scores.json: give a folder that eval.run wrote, after its end: the same command goes on"
        )
    try:
        scores = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error}): {AGAIN}") from error
    found = scores.get("benchmarks") if isinstance(scores, dict) else None
    if not (isinstance(found, dict) and found and all(isinstance(about, dict) for about in found.values())):
        raise ValueError(f"{file}: it has no scores of benchmarks: give a folder that python -m eval.run --benchmarks wrote")
    if unknown := [name for name in found if name not in BENCHMARKS]:
        raise ValueError(f"{file}: unknown benchmark {unknown[0]!r}: known are {', '.join(BENCHMARKS)}")
    return Folder(label, path, scores, {name: _replies(path / f"{name}.jsonl", name) for name in BENCHMARKS if name in found})


def _replies(file: Path, name: str) -> dict[str, dict[str, Any]]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not there, but scores.json beside it has this benchmark: {AGAIN}")
    found: dict[str, dict[str, Any]] = {}
    for number, (row, _) in enumerate(jsonl.rows(file), start=1):
        if problem := _problem(row, BENCHMARKS[name]):
            raise ValueError(f"{file}: row {number}: {problem}: mend or delete it, or {AGAIN}")
        if row["id"] in found:
            raise ValueError(f"{file}: row {number}: a second reply to {row['id']!r}: delete one")
        found[row["id"]] = row
    if not found:
        raise ValueError(f"{file}: it has no replies: {AGAIN}")
    return found


def _problem(row: Any, benchmark: Benchmark) -> str:
    """What is wrong with a line of a benchmark's file; empty for nothing."""
    if not isinstance(row, dict):
        return "no object"
    for name, type_ in FIELDS.items():
        if not isinstance(row.get(name), type_):
            return f"{name!r} is {row.get(name)!r:.60}" if name in row else f"it has no {name!r}"
    if row["category"] not in benchmark.categories:
        return f"{benchmark.title} has no category {row['category']!r:.60}"
    parts = [row["value"], *(row["parts"].get(name, row["value"]) for name in benchmark.protocols[1:])]
    if not all(value in (0, 1) for value in parts):
        return f"its value and parts are {parts}, and not 0 or 1"
    if (row["value"] == 1) != (row["reason"] == "correct"):
        return f"value {row['value']} and reason {row['reason']!r:.60} do not go together"
    return ""


def common(folders: Sequence[Folder], name: str) -> list[str]:
    """The ids of the items, under the same category, that all these folders have; by category, then as a person counts."""
    first, *others = [folder.replies[name] for folder in folders]
    place = BENCHMARKS[name].categories.index
    ids = [one for one, row in first.items() if all(row["category"] == rows.get(one, {}).get("category") for rows in others)]
    return sorted(ids, key=lambda one: (place(first[one]["category"]), re.sub(r"\d+", lambda digits: digits[0].zfill(9), one)))


def asked(folders: Sequence[Folder]) -> dict[str, list[Folder]]:
    """The folders that have each benchmark, of the benchmarks that any has and of which they have items in common."""
    having = {name: [folder for folder in folders if name in folder.replies] for name in BENCHMARKS}
    return {name: some for name, some in having.items() if some and common(some, name)}


def remarks(folders: Sequence[Folder]) -> list[str]:
    """A sentence for each way in which the folders differ besides the model, or in which what was scored is not all."""
    found = []
    for name, benchmark in BENCHMARKS.items():
        having = [folder for folder in folders if name in folder.replies]
        if having:
            found += [f"{benchmark.title}: {text}" for text in _remarks(folders, having, name)]
    settings = [settings_of(folder) for folder in folders]
    for setting in settings[0]:
        values = {folder.label: each[setting] for folder, each in zip(folders, settings, strict=True)}
        found += _differing(setting, {label: value for label, value in values.items() if value != UNKNOWN})
    if told := [folder.label for folder in folders if folder.scores.get("replies") is not None]:
        found.append(f"Of {', '.join(told)} the template and the decoding are not known: the replies were read from a file.")
    return found


def _remarks(folders: Sequence[Folder], having: Sequence[Folder], name: str) -> list[str]:
    found, ids = [], common(having, name)
    if lacking := [folder.label for folder in folders if folder not in having]:
        found.append(f"not in {', '.join(lacking)}.")
    sizes = {folder.label: len(folder.replies[name]) for folder in having}
    if not ids:
        found.append(f"{', '.join(sizes)} have no item in common, so nothing is compared.")
    elif set(sizes.values()) != {len(ids)}:
        each = ", ".join(f"{label} has {plural(size, 'item')}" for label, size in sizes.items())
        found.append(f"{each}; {plural(len(ids), 'item')} in common, and only there is anything compared.")
    elif len(ids) < BENCHMARKS[name].size:
        found.append(f"{plural(len(ids), 'item')} of {BENCHMARKS[name].size:,} were asked.")
    options = [folder.scores["benchmarks"][name].get("options") or {} for folder in having]
    names = dict.fromkeys(key for each in options for key in each)
    for option in [key for key in names if key not in ("limit", "categories")]:  # these two show in the items
        shown = {folder.label: each.get(option, UNKNOWN) for folder, each in zip(having, options, strict=True)}
        found += _differing(option, shown)
    for folder in having:
        said = folder.scores["benchmarks"][name].get("items")
        if said not in (None, len(folder.replies[name])):
            found.append(f"scores.json of {folder.label} is of {said} items, its file has {len(folder.replies[name])}.")
        if missing := sum(row["reason"] == NO_REPLY for row in folder.replies[name].values()):
            are = "is" if missing == 1 else "are"
            found.append(f"{plural(missing, 'item')} of {folder.label} {are} without a reply; wrong in scores, in no pair.")
    return found


def _differing(what: str, values: Mapping[str, Any]) -> list[str]:
    if len({json.dumps(value, sort_keys=True) for value in values.values()}) < 2:
        return []
    return [f"{what}: " + ", ".join(f"{value} in {label}" for label, value in values.items()) + "."]


def settings_of(folder: Folder) -> dict[str, Any]:
    """How the replies of a folder came to be; of those read from a file, nobody knows."""
    scores, replies = folder.scores, folder.scores.get("replies") is not None
    way = "from a file" if replies else "by an endpoint" if scores.get("endpoint") is not None else "by our sampler"
    known = {shown: UNKNOWN if replies else scores.get(name, UNKNOWN) for name, shown in SETTINGS.items()}
    return {"replies": way} | known


def right(row: Mapping[str, Any], protocol: str) -> bool:
    """Whether a reply is right by a protocol: by its parts, or its value, where a benchmark has one protocol alone."""
    return row["parts"].get(protocol, row["value"]) == 1


def counts(folder: Folder, name: str, ids: Sequence[str], protocol: str) -> dict[str, tuple[int, int]]:
    """{category: (right, all)} over some items, in the order of the benchmark's categories."""
    rows = [folder.replies[name][one] for one in ids]
    total = Counter(row["category"] for row in rows)
    passed = Counter(row["category"] for row in rows if right(row, protocol))
    return {category: (passed[category], total[category]) for category in BENCHMARKS[name].categories if total[category]}


def answered(base: Folder, other: Folder, name: str) -> list[str]:
    """The items of a benchmark that both folders have a reply to."""
    both = [folder.replies[name] for folder in (base, other)]
    return [one for one in common([base, other], name) if all(rows[one]["reason"] != NO_REPLY for rows in both)]


def pairs(base: Folder, other: Folder, name: str, ids: Sequence[str], protocol: str) -> dict[str, Pairs]:
    """{category: Pairs} over some items, and under ALL over all of them."""
    found: dict[str, Counter] = {}
    for one in ids:
        before, after = base.replies[name][one], other.replies[name][one]
        for group in (before["category"], ALL):
            found.setdefault(group, Counter())[right(before, protocol), right(after, protocol)] += 1
    order = ((True, True), (False, True), (True, False), (False, False))
    return {group: Pairs(*(cells[key] for key in order)) for group, cells in found.items()}


def kind(row: Mapping[str, Any]) -> str:
    """What became of a reply, in words: "correct", or why it is wrong: a reason of its verdict, or that it was cut off.

    A reply that reached the limit on tokens before its calls could be read is "cut off": its reason, no call or bad JSON, is
    only what follows from that.
    """
    if row["truncated"] and row["reason"] in ("no_call", "bad_json"):
        return CUT
    return row["reason"].replace("_", " ").replace("json", "JSON")


def scored(counts: Mapping[str, tuple[int, int]], name: str) -> dict[str, tuple[float, float, float]]:
    """In percent, {row: (score, low, high)}: the categories, ALL, and the means of the benchmark, with their 95 % intervals."""
    aggregates = BENCHMARKS[name].aggregates
    shares, ends = chance.shares(counts, aggregates), chance.intervals(counts, aggregates)
    return {row: (100 * share, 100 * ends[row][0], 100 * ends[row][1]) for row, share in shares.items()}


def words(name: str) -> str:
    """A category or a mean, as a reader has it."""
    return name.replace("non_live", "non-live").replace("_", " ")


def means(rows: Mapping[str, Any], name: str) -> list[str]:
    """The means of a benchmark that `rows` has; where there are none, of some categories alone, ALL takes their place."""
    return [row for row in rows if row not in (*BENCHMARKS[name].categories, ALL)] or [ALL]


def headlines(rows: Mapping[str, Any], name: str) -> list[str]:
    """Those of `means` that stand for a benchmark in pictures."""
    return [row for row in BENCHMARKS[name].headlines if row in rows] or [ALL]


def changes(found: Mapping[str, Pairs], name: str) -> dict[str, tuple[float, float, float]]:
    """`chance.differences` of the categories of `pairs`."""
    return chance.differences({group: some for group, some in found.items() if group != ALL}, BENCHMARKS[name].aggregates)
