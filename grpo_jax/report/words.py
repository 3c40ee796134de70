"""What came of a run, in sentences: what a person would ask first, with the filter that shows it among the rollouts.

Shares of held-out rows have Wilson's 95 % interval (E. B. Wilson, JASA 1927); mean rewards 1.96 standard errors over groups,
since the responses of a group are alike. Where two intervals overlap the text says that the difference may be chance.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from data.command_line import plural
from grpo_jax import alarms
from grpo_jax.metrics import benchmark_of
from grpo_jax.report import calls
from grpo_jax.report.reading import Reading

REASONS = {
    "no_format": "no thought or no tool_call block",
    "bad_json": "calls that are not JSON",
    "wrong_count": "too many or too few calls",
    "wrong_name": "another tool",
    "wrong_arguments": "the right tool with other arguments",
}
HIGH = 0.9  # of groups that teach nothing: from here on they are a warning
CUT = 0.05  # of responses that were cut at the limit: likewise
NORMAL = 1.96


def summary(run: Reading) -> list[dict[str, Any]]:
    """[{"title", "text", "warning": bool, "show": filter of the rollouts or None}], the most important first."""
    found = [_state(run), *_accuracy(run), *_reward(run), *_loss(run), *_failures(run), *_speed(run)]
    return found + [_item("Warning", text, warning=True) for text in warnings(run)] + _export(run)


def _item(title: str, text: str, *, warning: bool = False, show: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"title": title, "text": text, "warning": warning, "show": show}


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval (low, high) of a share of `count` that was `share`."""
    z = NORMAL
    centre, spread = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (centre - spread) / (1 + z * z / count)), min(1.0, (centre + spread) / (1 + z * z / count))


def warnings(run: Reading) -> list[str]:
    """What the run warned of, or should be looked at, by the thresholds of docs/training.md."""
    rows = [row for row in run.rows if row["step"] > 0]
    last = rows[-_tenth(rows) :]
    texts, raised = [], {}
    for i in range(len(rows)):
        for name, text in alarms.of(rows[max(0, i + 1 - alarms.STUCK) : i + 1], run.config).items():
            raised.setdefault(name, []).append((rows[i]["step"], text))
    for found in raised.values():
        step, text = found[0]
        texts.append(f"In {plural(len(found), 'step')}, first in step {step}: {text}.")
    if skipped := [row["step"] for row in rows if row.get("learner/skipped")]:
        texts.append(
            f"In {plural(len(skipped), 'step')}, first in step {skipped[0]}, optimizer steps were left out, since their loss, "
            "gradient or log-probs were not finite; their batches are under skipped/ in the run's folder."
        )
    equal, cut = _mean(last, "groups/zero_variance"), _mean(last, "response_tokens/truncated_share")
    if equal is not None and equal > HIGH:
        texts.append(
            f"In the last {plural(len(last), 'step')} {equal:.0%} of the groups had equal rewards and taught nothing: the data "
            "is too easy or too hard by now, or the temperature too low."
        )
    if cut is not None and cut > CUT and "length" not in raised:
        texts.append(
            f"In the last {plural(len(last), 'step')} {cut:.0%} of the responses were cut at --rollout.max_response_tokens."
        )
    for name in ("loss", "grad_norm", "reward/mean"):
        if broken := [row["step"] for row in rows if name in row and row[name] is None]:
            texts.append(f"{name} was no finite number in {plural(len(broken), 'step')}, first in step {broken[0]}.")
    for name in run.torn:
        texts.append(f"The last line of {name} has no end (the run is writing it, or was killed there), and is left out here.")
    if run.groups.left_out:
        texts.append(
            f"Of {run.count + run.groups.left_out:,} groups {run.count:,} are here, the first ones of each step; --groups "
            "takes in more."
        )
    return texts


def _state(run: Reading) -> dict[str, Any]:
    step = run.rows[-1]["step"] if run.rows else 0
    done = f"{step:,} of {run.steps:,} steps" if run.steps else plural(step, "step")
    if run.finished:
        return _item("State", f"Finished, after {plural(step, 'step')}.")
    return _item("State", f"{done} so far: it is still running, or was stopped.")


def _accuracy(run: Reading) -> list[dict[str, Any]]:
    """Of the held-out rows, then of each benchmark."""
    items = []
    for name in run.names:
        if name != "val/accuracy" and not benchmark_of(name):
            continue
        rows = [row for row in run.rows if row.get(name) is not None]
        what = f"benchmark {benchmark_of(name)}" if benchmark_of(name) else "held-out rows"
        title = "Accuracy" if name == "val/accuracy" else f"Benchmark {benchmark_of(name)}"
        first, last = rows[0], rows[-1]
        counts = [row.get("val/count") if name == "val/accuracy" else None for row in (first, last)]
        if len(rows) == 1:
            text = f"{_share(last[name], counts[1])} of the {what} were right in step {last['step']}, the only validation."
        else:
            ends = [wilson(row[name], n) if n else None for row, n in zip((first, last), counts, strict=True)]
            text = (
                f"Validation accuracy {_verb(first[name], last[name], *ends)} from {_share(first[name], counts[0])} in step "
                f"{first['step']} to {_share(last[name], counts[1])} in step {last['step']}"
            )
            text += f", on {plural(counts[1], 'held-out row')}" if counts[1] else f", on {what}"
            text += _chance(*ends) + "."
            best = max(rows, key=lambda row: row[name])
            if best[name] > last[name]:
                text += f" The best was {best[name]:.1%}, in step {best['step']}."
        items.append(_item(title, text))
    return items


def _reward(run: Reading) -> list[dict[str, Any]]:
    rows = [row for row in run.rows if row.get("reward/mean") is not None]
    if not rows:
        return []
    width = _tenth(rows)
    if len(rows) == 1:
        return [_item("Reward", f"The mean reward was {rows[0]['reward/mean']:.3f} in step {rows[0]['step']}.")]
    first, last = rows[:width], rows[-width:]
    texts, ends = [], []
    for some in (first, last):
        mean, half = _mean(some, "reward/mean"), _half_width(run, some[0]["step"], some[-1]["step"])
        ends.append(None if half is None else (mean - half, mean + half))
        steps = f"step {some[0]['step']}" if len(some) == 1 else f"steps {some[0]['step']} to {some[-1]['step']}"
        texts.append(f"{mean:.3f}" + ("" if half is None else f" ± {half:.3f}") + f" in {steps}")
    verb = _verb(_mean(first, "reward/mean"), _mean(last, "reward/mean"), *ends)
    text = f"The mean reward of sampled responses {verb} from {texts[0]} to {texts[1]}{_chance(*ends)}."
    equal = _mean(last, "groups/zero_variance")
    if equal is not None:
        text += f" At the end {equal:.0%} of the groups had equal rewards and taught nothing."
    return [_item("Reward", text)]


def _loss(run: Reading) -> list[dict[str, Any]]:
    """Of supervised training."""
    name = "val/loss" if "val/loss" in run.names else "loss"
    rows = [row for row in run.rows if row.get(name) is not None]
    if "reward/mean" in run.names or not rows:
        return []
    what = "validation loss" if name == "val/loss" else "loss"
    ends = f"from {rows[0][name]:.4f} in step {rows[0]['step']} to {rows[-1][name]:.4f} in step {rows[-1]['step']}"
    return [_item("Loss", f"The {what} went {ends} (nats a token).")]


def _failures(run: Reading) -> list[dict[str, Any]]:
    """Why responses still fail: reasons of the last validation, or of the last steps, and what is wrong in the calls."""
    validated = [row for row in run.rows if any(name.startswith("val/reason/") for name in row)]
    rows = [row for row in run.rows if any(name.startswith("reason/") for name in row)]
    if not rows and not validated:
        return []
    family, some = ("val/reason/", validated[-1:]) if validated else ("reason/", rows[-_tenth(rows) :])
    shares = {name: _mean(some, name) or 0.0 for row in some for name in row if name.startswith(family)}
    shares = {name.removeprefix(family): share for name, share in shares.items() if share}
    wrong = sorted(((share, code) for code, share in shares.items() if code != "correct"), reverse=True)
    where = (
        f"In the validation of step {some[-1]['step']}" if validated else f"In steps {some[0]['step']} to {some[-1]['step']}"
    )
    if wrong:
        listed = "; ".join(f"{REASONS.get(code, code)} {share:.1%}" for share, code in wrong)
        items = [_item("What fails", f"{where}, of all responses: {listed}.")]
    else:
        items = [_item("What fails", f"{where}: nothing, every response was right.")]
    return items + _differences(run, rows[-_tenth(rows) :] if rows else [])


def _differences(run: Reading, rows: Sequence[dict]) -> list[dict[str, Any]]:
    """What is wrong in the calls of the last steps, and with which tools."""
    if not rows or not run.count:
        return []
    first, last = rows[0]["step"], rows[-1]["step"]
    columns, kinds, tools = run.groups.columns, Counter(), Counter()
    wrong = 0
    for step, task, bits in zip(columns["step"], columns["task"], columns["marks"], strict=True):
        if first <= step <= last:
            for found in bits:
                wrong += bool(found)
                kinds.update(mark for i, mark in enumerate(calls.MARKS) if found >> i & 1)
            failed = sum(map(bool, bits))
            tools.update({run.groups.tools[tool]: failed for tool in run.groups.tasks[task][2] if failed})
    if not wrong:
        return []
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    listed = "; ".join(f"{calls.MARKS[mark]} {count:,}" for mark, count in kinds.most_common())
    text = f"Of the sampled responses of {steps}, {wrong:,} have calls that differ from the right ones: {listed}."
    if tools:
        text += f" Most often with {', '.join(f'{name} ({count:,})' for name, count in tools.most_common(3))}."
    return [_item("What differs", text, show={"from": first, "to": last, "difference": "any"})]


def _speed(run: Reading) -> list[dict[str, Any]]:
    rows = [row for row in run.rows if row.get("time/step") is not None and row["step"] > 0]
    if not rows:
        return []
    whole = math.fsum((row.get("time/step") or 0) + (row.get("time/validation") or 0) for row in rows)
    phases = Counter()
    for row in rows:
        phases.update({name: value for name, value in row.items() if name.startswith("time/") and value})
    step = phases.pop("time/step")
    phases.pop("time/validation", None)
    listed = ", ".join(f"{name.removeprefix('time/')} {value / step:.0%}" for name, value in phases.most_common(3))
    text = f"A step took {statistics.median(row['time/step'] for row in rows):.1f} s in the middle; all of them {_hours(whole)}"
    text += f" with validations. Of a step: {listed}." if listed else "."
    return [_item("Time", text)]


def _export(run: Reading) -> list[dict[str, Any]]:
    places = [(what, run.folder / name) for what, name in (("model", "hf"), ("adapter", "adapter"))]
    found = [f"the {what} in {place.resolve()}" for what, place in places if place.exists()]
    if found:
        return [_item("Export", f"For Hugging Face: {', '.join(found)}.")]
    return [_item("Export", "None yet; scripts/export_hf.py makes one of the newest checkpoint.")]


def _half_width(run: Reading, first: int, last: int) -> float | None:
    """1.96 standard errors of the mean reward over the groups of some steps; None for fewer than two."""
    columns = run.groups.columns
    means = [
        statistics.fmean(rewards)
        for step, rewards in zip(columns["step"], columns["reward"], strict=True)
        if first <= step <= last and rewards and None not in rewards
    ]
    return NORMAL * statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None


def _verb(first: float, last: float, before: tuple | None, after: tuple | None) -> str:
    """What a number did: it rose or fell where its intervals are apart, else it went."""
    if before is None or after is None or _overlap(before, after):
        return "went"
    return "rose" if last > first else "fell"


def _chance(before: tuple | None, after: tuple | None) -> str:
    return "; the difference may be chance" if before and after and _overlap(before, after) else ""


def _overlap(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] <= b[1] and b[0] <= a[1]


def _share(value: float, count: int | None) -> str:
    if not count:
        return f"{value:.1%}"
    low, high = wilson(value, count)
    return f"{value:.1%} (95 % interval {100 * low:.1f} to {100 * high:.1f})"


def _mean(rows: Sequence[dict], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return math.fsum(values) / len(values) if values else None


def _tenth(rows: Sequence[dict]) -> int:
    """How many rows are the beginning, or the end, of so many."""
    return max(1, len(rows) // 10)


def _hours(seconds: float) -> str:
    minutes = int(seconds) // 60
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {int(seconds) % 60} s"
