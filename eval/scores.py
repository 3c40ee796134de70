"""From the results of items to scores: counts, the benchmarks' own means, and tables of them for the terminal and a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from data.command_line import plural
from eval import markdown
from eval.record import Row
from eval.selection import Benchmark


def of(benchmark: Benchmark, rows: Sequence[Row]) -> dict[str, Any]:
    """What scores.json has of a benchmark: counts, and shares of 1. rows: a result for each of its items."""
    counts = _counts(benchmark, rows, {row["id"]: row["value"] for row in rows})
    names = list(dict.fromkeys(name for row in rows for name in row["parts"]))  # of one protocol, the value alone
    of_parts = {name: _counts(benchmark, rows, {row["id"]: row["parts"][name] for row in rows}) for name in names}
    lengths = [row["token_count"] for row in rows if row["token_count"] is not None]
    return {
        "items": len(rows),
        "right": sum(right for right, _ in counts.values()),
        "categories": counts,
        "aggregates": benchmark.aggregates(counts),
        "protocols": {
            name: {"categories": found, "aggregates": benchmark.aggregates(found)} for name, found in of_parts.items()
        },
        "reasons": dict(Counter(row["reason"] for row in rows).most_common()),
        "response_tokens": sum(lengths) / len(lengths) if lengths else None,
        "truncated": sum(row["truncated"] for row in rows) / len(rows),
        "options": dict(benchmark.options),
    }


def _counts(benchmark: Benchmark, rows: Sequence[Row], values: Mapping[str, float]) -> dict[str, list[int]]:
    of = {category: [row for row in rows if row["category"] == category] for category in benchmark.categories}
    return {category: [sum(values[row["id"]] >= 1 for row in some), len(some)] for category, some in of.items()}


def table(name: str, found: Mapping[str, Any]) -> list[list[str]]:
    """The scores of a benchmark, a row a category and a mean, below a row of headings; in per cent, by protocol."""
    protocols = found["protocols"] or {"%": found}
    rows = [[name, "right", "of", *protocols]]
    for category, (right, count) in found["categories"].items():
        shares = [100 * right / count for right, count in (p["categories"][category] for p in protocols.values())]
        rows.append([category, f"{right:,}", f"{count:,}", *(f"{share:.2f}" for share in shares)])
    for mean in found["aggregates"]:
        rows.append([mean, "", "", *(f"{100 * p['aggregates'][mean]:.2f}" for p in protocols.values())])
    return rows


def remarks(found: Mapping[str, Any]) -> list[str]:
    """Why replies were wrong, and how long they were, a sentence each."""
    wrong = ", ".join(f"{reason} {count:,}" for reason, count in found["reasons"].items() if reason != "correct")
    said = [f"wrong: {wrong}"] if wrong else []
    if found["response_tokens"] is not None:
        said.append(f"{found['response_tokens']:.1f} tokens a response, {found['truncated']:.1%} cut at the limit")
    if found["options"]["limit"] is not None:
        said.append(f"of each category at most {plural(found['options']['limit'], 'item')}")
    return said


def shown(name: str, found: Mapping[str, Any]) -> Group:
    """The table for a terminal."""
    head, *rows = table(name, found)
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for place, title in enumerate(head):
        drawn.add_column(title, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*row, style="" if row[1] else "bold")
    return Group("", drawn, *(Text(line, style="dim") for line in remarks(found)))


def page(scores: Mapping[str, Any]) -> str:
    """scores.md."""
    told = {
        "weights": scores["model_fingerprint"],
        "replies": scores["replies"],
        "server": scores["endpoint"],
        "temperature": None if scores["replies"] else scores["temperature"],
        "most tokens of a response": None if scores["replies"] else scores["max_response_tokens"],
        "template": scores["template_fingerprint"],
    }
    told = {name: markdown.cell(str(value)) for name, value in told.items() if value is not None}
    lines = [f"# {markdown.cell(scores['model'])}", "", *(f"- {name}: {value}" for name, value in told.items()), ""]
    for name, found in scores["benchmarks"].items():
        head, *rows = table(name, found)
        lines += markdown.table(head, rows)
        options = ", ".join(f"{option} {value}" for option, value in found["options"].items() if option != "categories")
        lines += [
            *(f"{line[0].upper()}{line[1:]}.  " for line in [*remarks(found), f"asked with {markdown.cell(options)}"]),
            "",
        ]
    return "\n".join(lines)
