"""What a comparison leaves for a reader: its page, and two pictures.

page            scores with intervals, the paper's rows, why replies are wrong, what changed between two models
scores          the means of every benchmark, with intervals, and the paper's rows as faint marks
errors          why replies are wrong, a bar a model
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.command_line import plural
from eval import chance, report, results
from eval.chance import ALL, Pairs
from eval.markdown import cell, code, fenced, table
from eval.results import BENCHMARKS, Folder, words
from grpo_jax.console import visible

PAGE, SCORES, ERRORS = "comparison.md", "scores.png", "errors.png"
QUOTED = 3  # items whose outputs are quoted, of those won and of those lost
_BLUE, _RED, _GREEN, _PINK, _ORANGE, _SKY, _BLACK, _YELLOW = report.COLOURS
KINDS = {  # of wrong replies, in the order of tables and bars: black to yellow where no call can be read, red and pink where it
    # is another call, blue and green where an argument is wrong; others stand behind them, in grey
    "cut off": _BLACK,
    "no call": _ORANGE,
    "bad JSON": _YELLOW,
    "wrong count": _PINK,
    "wrong function": _RED,
    "missing argument": _SKY,
    "extra argument": _GREEN,
    "wrong argument": _BLUE,
}
GREYS = ("#999999", "#CCCCCC", "#666666")


def page(folders: Sequence[Folder], base: Folder, notes: Sequence[str]) -> str:
    """The whole page; `notes` are the remarks of `results`, `base` is what the others are set against."""
    lines = [f"# {'Comparison of ' if len(folders) > 1 else ''}{', '.join(cell(folder.label) for folder in folders)}", ""]
    lines += _setting(folders, notes)
    lines += [
        "## Scores",
        "",
        f"![scores]({SCORES})",
        "",
        "In %, with the 95 % interval and right/all. Intervals are of the bootstrap: items drawn anew within each category "
        f"{chance.DRAWS:,} times (percentiles, seed {chance.SEED}), those of means by the benchmark's own formula. Where all "
        "of a category are right, or none, the interval has no width: of n items the true share may still be 3/n away.",
        "",
    ]
    asked = results.asked(folders)
    for name, some in asked.items():
        lines += _scores(name, some)
    lines += [
        "## Why replies are wrong",
        "",
        f"![why replies are wrong]({ERRORS})",
        "",
        "Each reply has one reason, the first that holds. Cut off: it reached the limit on tokens before its calls could be "
        "read; the last column counts all replies that reached it, right ones, too.",
        "",
    ]
    for name, some in asked.items():
        lines += _errors(name, some)
    for other in folders:
        if other is not base:
            lines += _pair(base, other)
    return "\n".join(lines)


def _setting(folders: Sequence[Folder], notes: Sequence[str]) -> list[str]:
    settings = [results.settings_of(folder) for folder in folders]
    rows = []
    for folder, each in zip(folders, settings, strict=True):
        named = (folder.path, folder.scores.get("model"), folder.scores.get("model_fingerprint"), *each.values())
        rows.append([f"**{cell(folder.label)}**", *("" if value is None else cell(str(value)) for value in named)])
    lines = table(["", "folder", "model", "weights", *settings[0]], rows)
    if notes:
        several = "What differs besides the models, or was left out. A difference below may come from there, too:"
        lines += [several if len(folders) > 1 else "Note:", "", *(f"- {cell(note)}" for note in notes), ""]
    elif len(folders) > 1:
        lines += ["Nothing differs but the models: the same items, options, template and settings.", ""]
    return lines


def _scores(name: str, folders: Sequence[Folder]) -> list[str]:
    """The tables of one benchmark, over the items that the folders have in common."""
    benchmark, ids = BENCHMARKS[name], results.common(folders, name)
    main, *others = benchmark.protocols
    labels = [cell(folder.label) for folder in folders]
    counts = {protocol: [results.counts(f, name, ids, protocol) for f in folders] for protocol in benchmark.protocols}
    found = {protocol: [results.scored(each, name) for each in some] for protocol, some in counts.items()}
    totals = [{**each, ALL: tuple(map(sum, zip(*each.values(), strict=True)))} for each in counts[main]]
    rows = []
    for row in found[main][0]:
        cells = [_interval(each[row]) for each in found[main]]
        if row in totals[0]:
            cells = [f"{text} {total[row][0]:,}/{total[row][1]:,}" for text, total in zip(cells, totals, strict=True)]
        rows.append([words(row), *cells])
    lines = [f"### {benchmark.title}", "", f"{plural(len(ids), 'item')}, protocol `{main}`.", "", *table(["", *labels], rows)]
    if others:
        means = results.means(found[main][0], name)
        rows = [[f"`{p}`, {words(row)}", *(_interval(each[row]) for each in found[p])] for p in others for row in means]
        lines += ["The same replies by other protocols:", "", *table(["", *labels], rows)]
    rows = [[f"**{label}**", *_percent(each, benchmark)] for label, each in zip(labels, found[main], strict=True)]
    rows += [[model, *_percent(row, benchmark)] for model, row in benchmark.paper.items()]
    part = f" Ours are of {len(ids):,} of its {benchmark.size:,} tasks, so they are of another test."
    lines += [f"Beside the paper. {benchmark.note}{part if len(ids) < benchmark.size else ''}", ""]
    return lines + table(["", *map(words, benchmark.columns)], rows)


def _percent(row: dict[str, Any], benchmark: results.Benchmark) -> list[str]:
    """The cells of the table beside the paper; of ours, which have intervals, the score alone."""
    cells = [row.get(column) for column in benchmark.columns]
    cells = [value[0] if isinstance(value, tuple) else value for value in cells]
    return ["" if value is None else f"{value:.2f}" for value in cells]


def _interval(score: tuple[float, float, float]) -> str:
    return f"**{score[0]:.1f}** [{score[1]:.1f}, {score[2]:.1f}]"


def kinds(folders: Sequence[Folder], name: str, ids: Sequence[str]) -> list[Counter]:
    """For each folder the wrong replies to some items by `results.kind`; in all of them the same keys, in one order."""
    rows = [[folder.replies[name][one] for one in ids] for folder in folders]
    found = [Counter(results.kind(row) for row in some if row["value"] != 1) for some in rows]
    seen = sorted({kind for each in found for kind in each}, key=_place)
    return [Counter({kind: each[kind] for kind in seen}) for each in found]


def _errors(name: str, folders: Sequence[Folder]) -> list[str]:
    ids = results.common(folders, name)
    found, rows = kinds(folders, name, ids), []
    for folder, each in zip(folders, found, strict=True):
        reached = sum(folder.replies[name][one]["truncated"] for one in ids)
        cells = [f"{count:,} ({100 * count / len(ids):.1f})" for count in (*each.values(), each.total(), reached)]
        rows.append([f"**{cell(folder.label)}**", *cells])
    head = ["", *map(cell, found[0]), "all wrong ones", "reached the limit"]
    return [f"{BENCHMARKS[name].title}, {plural(len(ids), 'item')} (and in %):", "", *table(head, rows)]


def _pair(base: Folder, other: Folder) -> list[str]:
    """What changed from one model to the other, benchmark by benchmark, on the items that both answered."""
    before, after = cell(base.label), cell(other.label)
    lines = [
        f"## {after} against {before}",
        "",
        f"On the items that both answered. Points: the share right in {after} minus that in {before}, in %, with the 95 % "
        f"interval of the paired bootstrap. Won: wrong in {before}, right in {after}; lost: the reverse. p is that of "
        "McNemar's exact test: how often won and lost would be at least as unequal as this, did a coin decide each item "
        "that changed sides. It counts all items of a row alike and knows nothing of the other rows: of twenty rows without "
        "any real difference, about one has p < 0.05.",
        "",
    ]
    shared = [name for name in BENCHMARKS if name in base.replies and name in other.replies]
    asked = {name: ids for name in shared if (ids := results.answered(base, other, name))}
    if not asked:
        lines += ["There are none.", ""]
    for name, ids in asked.items():
        lines += [f"### {BENCHMARKS[name].title}, {plural(len(ids), 'item')}", "", *_paired_scores(base, other, name, ids)]
        lines += _moves(base, other, name, ids)
    return lines


def _paired_scores(base: Folder, other: Folder, name: str, ids: Sequence[str]) -> list[str]:
    """Each row of `chance.differences`; of protocols but the first, the means alone."""
    benchmark, rows = BENCHMARKS[name], []
    for protocol in benchmark.protocols:
        pairs = results.pairs(base, other, name, ids, protocol)
        scores = [results.counts(folder, name, ids, protocol) for folder in (base, other)]
        old, new = (chance.shares(counts, benchmark.aggregates) for counts in scores)
        changes = results.changes(pairs, name)
        main = protocol == benchmark.protocols[0]
        for row in changes if main else results.means(changes, name):
            label = words(row) if main else f"`{protocol}`, {words(row)}"
            counted = _counted(pairs[row]) if row in pairs else [""] * 5
            rows.append([label, f"{100 * old[row]:.1f}", f"{100 * new[row]:.1f}", points(changes[row]), *counted])
    head = ["", cell(base.label), cell(other.label), "points", "won", "lost", "both right", "both wrong", "p"]
    return table(head, rows)


def points(change: tuple[float, float, float]) -> str:
    """A difference and its interval, in points: "+1.2 [-0.3, +2.7]"."""
    difference, low, high = (f"{round(100 * end, 1) + 0.0:+.1f}" for end in change)  # + 0.0: no "-0.0"
    return f"{difference} [{low}, {high}]"


def _counted(pairs: Pairs) -> list[str]:
    counts = (pairs.won, pairs.lost, pairs.both, pairs.neither)
    return [*(f"{count:,}" for count in counts), p_value(pairs)]


def p_value(pairs: Pairs) -> str:
    """Of McNemar's test, as a reader wants it."""
    value = chance.mcnemar(pairs.won, pairs.lost)
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def _moves(base: Folder, other: Folder, name: str, ids: Sequence[str]) -> list[str]:
    """How reasons moved, the items that changed sides, and outputs of some of these."""
    sides = {one: tuple(results.kind(folder.replies[name][one]) for folder in (base, other)) for one in ids}
    moves = Counter(sides.values())
    order = sorted({kind for move in moves for kind in move}, key=lambda kind: (kind != "correct", *_place(kind)))
    head = [f"{cell(base.label)} (down), {cell(other.label)} (across)", *map(cell, order)]
    rows = [[cell(old), *(f"{moves[old, new]:,}" if moves[old, new] else "" for new in order)] for old in order]
    lines = ["What became of replies, in items:", "", *table(head, rows)]
    changed = [one for one, (old, new) in sides.items() if (old == "correct") != (new == "correct")]
    if not changed:
        return [*lines, "No item changed sides.", ""]
    rows = [
        [code(one), words(base.replies[name][one]["category"]), f"{cell(sides[one][0])} → {cell(sides[one][1])}"]
        for one in changed
    ]
    lines += [f"<details><summary>{plural(len(changed), 'item')} that changed sides</summary>", ""]
    lines += [*table(["item", "category", "reason"], rows), "</details>", ""]
    for title, side in (("Won", 1), ("Lost", 0)):
        some = _various([one for one in changed if sides[one][side] == "correct"], sides, moves)
        if some:
            lines += [f"<details><summary>{title}: outputs to {plural(len(some), 'item')}</summary>", ""]
        for one in some:
            lines += [f"{code(one)}, {cell(sides[one][0])} → {cell(sides[one][1])}", ""]
            for folder in (base, other):
                lines += [f"{cell(folder.label)}:", "", fenced(folder.replies[name][one]["output"]), ""]
        lines += ["</details>", ""] if some else []
    return lines


def _place(kind: str) -> tuple[int, str]:
    return ([*KINDS, kind].index(kind), kind)


def _various(items: Sequence[str], sides: dict[str, tuple[str, str]], moves: Counter) -> list[str]:
    """At most QUOTED items, of as many kinds of change as can be, the most frequent first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for one in items:
        groups.setdefault(sides[one], []).append(one)
    lists = [groups[move] for move in sorted(groups, key=lambda move: -moves[move])]
    rounds = (some[turn] for turn in range(QUOTED) for some in lists if turn < len(some))
    return [one for _, one in zip(range(QUOTED), rounds, strict=False)]


def scores(path: Path, folders: Sequence[Folder]) -> None:
    """A PNG: of each mean one line a folder, a dot with its interval, and above them the paper's rows as faint marks."""
    groups = [group for name, some in results.asked(folders).items() for group in _means(name, some)]
    colours = {folder.label: report.COLOURS[place % 7] for place, folder in enumerate(folders)}  # yellow is too faint for a dot
    values = [value for _, marks, rows in groups for value in (*marks.values(), *np.ravel([*rows.values()]))]
    low, high = (min(values), max(values)) if values else (0, 100)
    left, right = low - 0.04 * (high - low) - 1, high + 0.12 * (high - low) + 1
    figure = report.new_figure(8.5, 1.0 + 0.27 * sum(1.4 + len(rows) for _, _, rows in groups))
    axes = figure.subplots()
    axes.set_xlim(left, right)
    lines: list[tuple[float, str, str]] = []
    y = 0.0
    for title, marks, rows in groups:
        lines.append((y, title, "bold"))
        _marks(axes, y, marks, (right - left) / 110)
        for label, (score, begin, end) in rows.items():
            y += 1
            lines.append((y, _label(label), "normal"))
            axes.plot([begin, end], [y, y], "-", color=colours[label], linewidth=2, alpha=0.6)
            axes.plot(score, y, "o", color=colours[label], markersize=7)
            axes.annotate(f"{score:.1f}", (end, y), (5, 0), textcoords="offset points", va="center", fontsize=8.5)
        y += 1.4
    axes.set_ylim(y - 0.4, -1)
    axes.set_yticks([y for y, _, _ in lines], [text for _, text, _ in lines], fontsize=9)
    for text, (_, _, weight) in zip(axes.get_yticklabels(), lines, strict=True):
        text.set_fontweight(weight)
    report.plain(axes)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("right (%), with 95 % intervals; grey: the paper's rows (BFCL's like for like)", fontsize=9)
    report.save(figure, path)


def _means(name: str, folders: Sequence[Folder]) -> list[tuple[str, dict[str, float], dict[str, tuple[float, float, float]]]]:
    """(title, the paper's rows, ours) of each mean of a benchmark that the picture shows."""
    benchmark, ids = BENCHMARKS[name], results.common(folders, name)
    counts = {folder.label: results.counts(folder, name, ids, benchmark.protocols[0]) for folder in folders}
    found = {label: results.scored(each, name) for label, each in counts.items()}
    shown = results.headlines(next(iter(found.values())), name)
    paper = {row: {model: of[column] for model, of in benchmark.paper.items()} for row, column in benchmark.marks.items()}
    titles = [f"{benchmark.title} {words(row)}" if len(shown) > 1 else benchmark.title for row in shown]
    ours = [{label: rows[row] for label, rows in found.items()} for row in shown]
    return [(title, paper.get(row, {}), rows) for title, row, rows in zip(titles, shown, ours, strict=True)]


def _marks(axes: Any, y: float, marks: Mapping[str, float], character: float) -> None:
    """The paper's rows on one line; a flag with a name on those, the last first, that find room.

    character: the width of a letter, in units of the axis.
    """
    axes.plot(list(marks.values()), [y] * len(marks), "|", color="#999999", markersize=6, markeredgewidth=1)
    taken: list[tuple[float, float]] = [(axes.get_xlim()[1], np.inf)]
    for model, value in reversed(marks.items()):
        width = character * (len(model) + 2)
        for side, begin in (("left", value), ("right", value - width)):
            if all(begin + width <= other[0] or begin >= other[1] for other in taken):
                taken.append((begin, begin + width))
                axes.plot([value, value], [y, y - 0.75], "-", color="#999999", linewidth=1)
                offset = (3 if side == "left" else -3, 6)
                axes.annotate(model, (value, y), offset, textcoords="offset points", ha=side, fontsize=6.5, color="#777777")
                break


def _label(text: str) -> str:
    """A folder's label in a picture, which takes a pair of $ for mathematics."""
    line = " ".join(visible(text, "utf-8").split()).replace("$", "\\$")
    return line if len(line) <= 40 else f"{line[:39]}…"


def errors(path: Path, folders: Sequence[Folder]) -> None:
    """A PNG: of each benchmark one bar a folder, as long as the share of wrong replies, cut into kinds."""
    asked = {name: (some, results.common(some, name)) for name, some in results.asked(folders).items()}
    found = {name: kinds(some, name, ids) for name, (some, ids) in asked.items()}
    seen = sorted({kind for some in found.values() for kind in some[0]}, key=_place)
    others = [kind for kind in seen if kind not in KINDS]
    colours = KINDS | {kind: GREYS[place % len(GREYS)] for place, kind in enumerate(others)}
    longest = max((100 * each.total() / len(asked[name][1]) for name, some in found.items() for each in some), default=0) or 1
    sizes = [len(some) for some in found.values()] or [1]
    figure = report.new_figure(8.5, 1.5 + 0.4 * sum(sizes) + 0.3 * len(sizes))
    panels = figure.subplots(len(sizes), 1, sharex=True, squeeze=False, height_ratios=sizes)[:, 0]
    for axes, (name, some) in zip(panels, found.items(), strict=False):
        bars = {folder.label: each for folder, each in zip(asked[name][0], some, strict=True)}
        for y, each in enumerate(bars.values()):
            begin = 0.0
            for kind, count in each.items():
                width = 100 * count / len(asked[name][1])
                axes.barh(y, width, left=begin, height=0.7, color=colours[kind], edgecolor="white", linewidth=0.6)
                if width > 0.045 * longest:
                    ink = "white" if colours[kind] in (_BLACK, _BLUE, _RED, _GREEN, GREYS[2]) else "black"
                    axes.text(begin + width / 2, y, f"{width:.1f}", ha="center", va="center", fontsize=7.5, color=ink)
                begin += width
            axes.annotate(f"{begin:.1f}", (begin, y), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
        axes.set_yticks(range(len(bars)), map(_label, bars), fontsize=9)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_xlim(0, 1.08 * longest)
        axes.set_title(BENCHMARKS[name].title, loc="left", fontsize=9, fontweight="bold")
        report.plain(axes)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
    panels[-1].set_xlabel("wrong replies (% of items)", fontsize=9)
    if seen:
        from matplotlib.patches import Patch

        patches = [Patch(color=colours[kind], label=kind) for kind in seen]
        figure.legend(handles=patches, loc="outside upper center", ncols=min(5, len(seen)), frameon=False, fontsize=8.5)
    report.save(figure, path)
