"""Which curves stand on the page, and where: sections of panels, made from the names of the metrics that the runs have.

A panel is {"title", "kind": "line" | "stack", "unit": "" | "share", "wide": bool, "series": [{"metric", "label", "colour"}]}: a
line of each metric and run, or for each run an area of its metrics on top of each other. A metric that no panel knows is drawn
in the last section.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grpo_jax.metrics import PANELS, SFT_PANELS, benchmark_of
from grpo_jax.reward import REASONS

Panel = dict[str, Any]


def sections(names: Sequence[str]) -> list[dict[str, Any]]:
    """[{"title", "panels"}] of the metrics of these names; what has none of its metrics is left out."""
    supervised = "reward/mean" not in names
    first = SFT_PANELS if supervised else PANELS
    benchmarks = [name for name in names if benchmark_of(name)]
    listed = [
        ("Supervised training" if supervised else "The paper's six", [_line(title, metric) for metric, title in first]),
        ("Benchmarks", [_panel("benchmarks (%)", "line", "share", [(name, benchmark_of(name)) for name in benchmarks])]),
        (
            "Why responses get what they get",
            [
                _panel("reasons of sampled responses", "stack", "share", _reasons("reason/", names), wide=True),
                _panel("reasons in validation", "stack", "share", _reasons("val/reason/", names)),
            ],
        ),
        (
            "How it learns",
            [
                _panel("groups of equal rewards", "line", "share", [("groups/zero_variance", "")]),
                _panel("responses cut at the limit", "line", "share", [("response_tokens/truncated_share", "")]),
                _panel("clipped tokens", "line", "share", [("clip_fraction", "")]),
                _panel(
                    "sampler and learner apart (nats a token)",
                    "line",
                    "",
                    [("rollout/logp_mismatch", "mean"), ("rollout/logp_mismatch_max", "largest")],
                ),
                _line("gradient norm", "grad_norm"),
                _line("loss", "loss"),
            ],
        ),
        (
            "Speed and memory",
            [
                _panel(
                    "tokens per second",
                    "line",
                    "",
                    [("rollout/tokens_per_second", "sampling"), ("learner/tokens_per_second", "learning")],
                ),
                _panel("time of a step (s)", "stack", "", _phases(names)),
                _panel("memory, peak (GB)", "line", "", [("memory/host_gb", "host"), ("memory/device_gb", "device")]),
            ],
        ),
    ]
    shown: set[str] = set()
    found = []
    for title, panels in listed:
        kept = []
        for panel in panels:
            series = [one for one in panel["series"] if one["metric"] in names and one["metric"] not in shown]
            shown |= {one["metric"] for one in series}
            if series:
                kept.append(panel | {"series": series})
        if kept:
            found.append({"title": title, "panels": kept})
    rest = [_line(name, name) for name in names if name not in shown]
    return found + ([{"title": "Everything else", "panels": rest}] if rest else [])


def _panel(title: str, kind: str, unit: str, series: Sequence[tuple[str, str]], wide: bool = False) -> Panel:
    listed = [{"metric": metric, "label": label, "colour": i} for i, (metric, label) in enumerate(series)]
    return {"title": title, "kind": kind, "unit": unit, "wide": wide, "series": listed}


def _line(title: str, metric: str) -> Panel:
    return _panel(title, "line", "share" if metric == "val/accuracy" else "", [(metric, "")])


def _reasons(family: str, names: Sequence[str]) -> list[tuple[str, str]]:
    """What is right at the bottom, then the reward's own reasons in their order, seen or not, then others."""
    found = [name.removeprefix(family) for name in names if name.startswith(family)]
    order = ["correct", *(code for code in REASONS if code != "correct")]
    return [(family + code, code) for code in [*order, *(code for code in found if code not in order)]]


def _phases(names: Sequence[str]) -> list[tuple[str, str]]:
    """The phases of a step; a validation comes on top of it."""
    found = [name for name in names if name.startswith("time/") and name != "time/step"]
    return [(name, name.removeprefix("time/")) for name in sorted(found, key=lambda name: name == "time/validation")]
