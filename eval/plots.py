"""Pictures of a study: final accuracy of every run, and validation accuracy by step. Okabe and Ito's colours."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_jax import metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")


def accuracy(path: Path, labels: Mapping[str, str], found: Mapping[str, Sequence[float]]) -> None:
    """One line a row of the study: a point a seed, a bar at their mean. `found`: shares of 1, by the row's name."""
    figure = _figure(8.5, 0.8 + 0.42 * len(labels))
    axes = figure.subplots()
    for place, name in enumerate(labels):
        shares = [100 * share for share in found.get(name, ())]
        if shares:
            axes.barh(place, statistics.mean(shares), height=0.6, color="#C9DDEC")
            offsets = np.linspace(-0.15, 0.15, len(shares)) if len(shares) > 1 else [0.0]
            axes.plot(shares, place + np.array(offsets), "o", color=COLOURS[0], markersize=5)
            axes.text(101.5, place, f"{statistics.mean(shares):.1f}", va="center", fontsize=9, color="#444444")
        else:
            axes.text(1, place, "no result", va="center", fontsize=9, color="#999999")
    axes.set_yticks(range(len(labels)), labels.values())
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy (%); a point is a seed, the bar their mean")
    _plain(axes)
    _save(figure, path)


def curves(path: Path, labels: Mapping[str, str], runs: Mapping[str, Sequence[Path]]) -> None:
    """Validation accuracy by step: the mean over seeds, and a band from the lowest to the highest. `runs`: folders, by row."""
    figure = _figure(8.5, 4.5)
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
    axes.set_ylabel("validation accuracy (%)")
    _plain(axes)
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # half a second, and only here

    return Figure(figsize=(width, height), dpi=130, layout="constrained")  # not pyplot's: no global state


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    partial = path.with_name(path.name + ".tmp.png")
    FigureCanvasAgg(figure).print_png(partial)
    os.replace(partial, path)  # a viewer that looks at the old one never sees half of the new
