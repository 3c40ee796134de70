"""What a study leaves for a reader: its table, the final accuracy of every run, and validation accuracy by step.

new_figure, plain, save, COLOURS and write are what every page with pictures of this folder is made with.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.command_line import plural
from grpo_jax import metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from eval.study import Study

# Of Okabe and Ito: told apart with any kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")


@dataclass
class Outcome:
    """What became of one run."""

    scores: dict[str, Any] | None = None  # of eval.run
    problem: str = ""  # why there are none


Outcomes = Mapping[tuple[str, int], Outcome]  # by a row's name and a seed


def table(study: Study, asked: str, outcomes: Outcomes, commands: Sequence[str]) -> str:
    """study.md: the table, why responses were wrong, what failed, and the `commands` of the first seed."""
    scores = {row.name: [o.scores for o in _of(outcomes, row.name) if o.scores] for row in study.rows}
    tests = sorted({(s["rows"], sum(s["dropped"].values())) for found in scores.values() for s in found})
    test = " or ".join(
        plural(rows, "row") + (f" ({dropped:,} more were unusable)" if dropped else "") for rows, dropped in tests
    )
    lines = [
        f"# {study.title}",
        "",
        f"`python -m eval.study {asked}`. {f'Scored on {test}. ' if test else ''}Accuracy: right calls after a thought; right "
        "calls: with a thought or without; both of greedy responses. Sampled: right calls of responses drawn at temperature "
        "0.7, as in training. In %; mean ± standard deviation over seeds. The paper's numbers "
        f"({study.paper}) are BFCL's, of a 7B model unless the row says otherwise: another test.",
        "",
        "| | paper: non-live | paper: live | paper: mean | accuracy | right calls | sampled | runs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in study.rows:
        found, failed = scores[row.name], sum(bool(o.problem) for o in _of(outcomes, row.name))
        cells = [f"{number:.2f}" for number in row.paper] if row.paper else [""] * 3
        cells += [spread([s[name] for s in found]) for name in ("accuracy", "calls")]
        cells.append(spread([s["sampled"]["calls"] for s in found]))
        cells.append(f"{len(found)}" + (f", {failed} failed" if failed else ""))
        lines.append(f"| {row.label} | {' | '.join(cells)} |")
    if reasons := dict.fromkeys(r for found in scores.values() for s in found for r in s["reasons"] if r != "correct"):
        lines += [
            "",
            "Why responses were wrong (% of all), and their length:",
            "",
            f"| | {' | '.join(reason.replace('_', ' ') for reason in reasons)} | tokens a response |",
            "|---" * (len(reasons) + 2) + "|",
        ]
        for row in study.rows:
            found = scores[row.name]
            cells = [spread([s["reasons"].get(reason, 0.0) for s in found]) for reason in reasons]
            cells.append(f"{statistics.mean(s['response_tokens'] for s in found):.1f}" if found else "")
            lines.append(f"| {row.label} | {' | '.join(cells)} |")
    if problems := [(name, seed, o.problem) for (name, seed), o in outcomes.items() if o.problem]:
        lines += ["", "Failed:", "", *(f"- {name}, seed {seed}: {problem}" for name, seed, problem in problems)]
    lines += ["", "![accuracy](accuracy.png)", "", "![validation accuracy by step](curves.png)", ""]
    return "\n".join([*lines, "The runs of seed 0:", "", "```", *commands, "```", ""])


def _of(outcomes: Outcomes, name: str) -> list[Outcome]:
    return [outcome for (row, _), outcome in outcomes.items() if row == name]


def spread(shares: Sequence[float]) -> str:
    """Shares of 1 as per cent: "87.3 ± 1.2"; without the spread for one of them, empty for none."""
    if not shares:
        return ""
    percent = [100 * share for share in shares]
    return f"{statistics.mean(percent):.1f}" + (f" ± {statistics.stdev(percent):.1f}" if len(percent) > 1 else "")


def accuracy(path: Path, labels: Mapping[str, str], outcomes: Outcomes) -> None:
    """One line a row of the study: a point a seed, a bar at the mean of the greedy ones. `labels`: of the rows, by name.

    Right calls, with a thought or without, as benchmarks judge; else rows that do not think would be 0 by the format.
    """
    figure = new_figure(9, 1.0 + 0.45 * len(labels))
    axes = figure.subplots()
    for place, name in enumerate(labels):
        found = [outcome.scores for outcome in _of(outcomes, name) if outcome.scores]
        if not found:
            axes.text(1, place, "no result", va="center", fontsize=9, color="#999999")
            continue
        greedy, sampled = ([100 * s["calls"] for s in some] for some in (found, [s["sampled"] for s in found]))
        axes.barh(place, statistics.mean(greedy), height=0.7, color="#DCE8F2")
        spots = place + np.linspace(-0.2, 0.2, len(found)) if len(found) > 1 else [place]
        axes.plot(greedy, spots, "o", color=COLOURS[0], markersize=5, clip_on=False, label="greedy")
        axes.plot(sampled, spots, "D", color=COLOURS[1], markersize=4, clip_on=False, label="sampled")
    axes.set_yticks(range(len(labels)), labels.values())
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("right calls (%), with a thought or without")
    once = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if once:
        figure.legend(once.values(), once.keys(), loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    plain(axes)
    save(figure, path)


def curves(path: Path, labels: Mapping[str, str], runs: Mapping[str, Sequence[Path]]) -> None:
    """Validation accuracy by step: the mean over seeds, and a band from the lowest to the highest. `runs`: folders, by row."""
    figure = new_figure(8.5, 4.5)
    axes = figure.subplots()
    for place, (name, folders) in enumerate(runs.items()):
        points: dict[int, list[float]] = {}
        for folder in folders:
            rows = metrics.read(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else ()
            for row in rows:
                if row.get("val/accuracy") is not None:
                    points.setdefault(row["step"], []).append(100 * row["val/accuracy"])
        if points:
            steps, colour = sorted(points), COLOURS[place % len(COLOURS)]
            axes.plot(steps, [statistics.mean(points[s]) for s in steps], "o-", color=colour, markersize=3, label=labels[name])
            axes.fill_between(
                steps, [min(points[s]) for s in steps], [max(points[s]) for s in steps], color=colour, alpha=0.15, linewidth=0
            )
    if axes.lines:
        axes.legend(frameon=False, fontsize=9)
    axes.set_xlabel("step of reinforcement learning")
    axes.set_ylabel("validation accuracy (%), by the reward of the run")
    plain(axes)
    save(figure, path)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches."""
    from matplotlib.figure import Figure  # half a second, and only here

    return Figure(figsize=(width, height), dpi=130, layout="constrained")  # not pyplot's: no global state


def plain(axes: Any) -> None:
    """No frame, a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)


def save(figure: Figure, path: Path) -> None:
    """A PNG, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    partial = path.with_name(path.name + ".tmp.png")
    FigureCanvasAgg(figure).print_png(partial)
    os.replace(partial, path)  # a viewer that looks at the old one never sees half of the new


def write(path: Path, text: str) -> None:
    """A file, whole or not at all."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
