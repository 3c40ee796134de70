"""What a person sees while a run goes on: its plan, a live display, its closing table. Numbers in, text out, to stdout.

    header       before: what will be computed, label by label
    Progress     during: on a terminal, a bar, the phase at work and the numbers people watch; elsewhere, a line a step
    closing      after: the first validation and the last, and where everything lies
    warn         at any time; stands above the display
    visible      what a model or a user wrote, made safe to print, or to write

In a pipe or a CI log there are no escape codes and no line is broken, however long it is. Everything goes through one
rich `Console`, because only that knows to print above its own display; a process that should be silent (all but the
first, on many hosts) takes `make_console(quiet=True)`.
"""

from __future__ import annotations

import sys
import time
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from grpo_jax.metrics import benchmark_of

Number = float | int | None

NUMBERS = (
    # what is watched, place by place: (label, metric, format); of a place's alternatives, the first that a row has
    (("reward", "reward/mean", "{:.3f}"), ("loss", "loss", "{:.4f}")),
    (("validation", "val/accuracy", "{:.1%}"), ("val. loss", "val/loss", "{:.4f}")),
    (("KL", "kl/mean", "{:.3g}"),),
    (("entropy", "entropy/mean", "{:.3f}"),),
    (("length", "response_tokens/mean", "{:,.1f}"),),
    (("tokens/s", "rollout/tokens_per_second", "{:,.0f}"), ("tokens/s", "learner/tokens_per_second", "{:,.0f}")),
    (("s/step", "time/step", "{:,.1f}"),),
)
CELL = 11  # columns of a number on the display: seven of them in a terminal of 80
WIDEST = 100  # a longer bar tells no more
RECENT = 10  # steps that the remaining time is judged by


def make_console(file: TextIO | None = None, quiet: bool = False) -> Console:
    """A console on `file`, or on what sys.stdout is at each time; plain text unless that is a terminal."""
    terminal = (file or sys.stdout).isatty()
    return Console(file=file, force_terminal=terminal, quiet=quiet, highlight=False, markup=False, emoji=False)


CONSOLE = make_console()


def _live(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal and not console.quiet


def _line(console: Console, *parts: str | tuple[str, str], wrap: bool = False) -> None:
    """One line of texts or (text, style). wrap: fold it at words, on a terminal."""
    pairs = [part if isinstance(part, tuple) else (part, "") for part in parts]
    line = Text.assemble(*((_encodable(text, console.encoding), style) for text, style in pairs))
    console.print(line, soft_wrap=not (wrap and _live(console)))


def _encodable(text: str, encoding: str) -> str:
    """The text with what the encoding does not have escaped, so that no output ends a run."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


def visible(text: str, encoding: str | None = None) -> str:
    """Text that others wrote, a model say, with all that would steer the terminal, or hide, as escapes; lines and tabs stay.

    So does all that the encoding lacks, of the file where the text is going; None: that of the terminal.
    """
    steers = {c for c in text if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")}
    shown = text.translate({ord(c): c.encode("unicode_escape").decode() for c in steers})
    return _encodable(shown, encoding or CONSOLE.encoding)


def header(title: str, rows: Sequence[tuple[str, str]], console: Console = CONSOLE) -> None:
    """Prints what a run is about to do: a title, and (label, value) below it."""
    _line(console, (title, "bold"), wrap=True)
    if _live(console):
        table = Table.grid(padding=(0, 2), pad_edge=True)
        for label, value in rows:
            table.add_row(Text(label, style="dim"), Text(_encodable(value, console.encoding), overflow="fold"))
        console.print(table)
    else:
        _labelled(console, rows)
        _line(console)


def note(text: str, console: Console = CONSOLE) -> None:
    """Prints one line."""
    _line(console, (text, "dim"), wrap=True)


def warn(text: str, console: Console = CONSOLE) -> None:
    """Prints one warning."""
    _line(console, ("warning: ", "bold yellow"), text, wrap=True)


def closing(
    before: Mapping[str, Number],
    after: Mapping[str, Number],
    places: Sequence[tuple[str, str]],
    console: Console = CONSOLE,
) -> None:
    """Prints two validations side by side, and (label, path) of what the run leaves.

    before, after: metrics, of which "val/loss" and the shares under "val/accuracy", "val/<benchmark>/accuracy" and
    "val/reason/<code>" are shown. What one of the two lacks was not measured; a reason it lacks among others was not seen. A
    reason seen in neither is left out.
    """
    shown, reasons = ("val/loss", "val/accuracy", "val/reason/"), "val/reason/"
    names = [name for name in {**before, **after} if name.startswith(shown) or benchmark_of(name)]
    names = [name for name in names if not name.startswith(reasons) or before.get(name) or after.get(name)]
    names.sort(key=lambda name: 2 if benchmark_of(name) else name.startswith(reasons))
    if names:
        labels = [benchmark_of(name) or name.removeprefix(reasons).removeprefix("val/") for name in names]
        width = max(12, *(len(label) + 2 for label in labels))
        _line(console)
        _line(console, (f"{'validation':{width}}{'before':>8}{'after':>8}{'difference':>12}", "dim"))
        for label, name in zip(labels, names, strict=True):
            old, new = _share(before, name), _share(after, name)
            value, change, scale = ("{:.4f}", "{:+.4f}", 1) if name == "val/loss" else ("{:.1%}", "{:+.1f}", 100)
            cells = [f"{'-' if number is None else value.format(number):>8}" for number in (old, new)]
            difference = "-" if old is None or new is None else change.format(scale * (new - old))
            style = "" if name.startswith(reasons) else "bold"
            _line(console, (f"{label:{width}}{''.join(cells)}{difference:>12}", style))
    _line(console)
    _labelled(console, places)


def _share(metrics: Mapping[str, Number], name: str) -> Number:
    """The share under `name`; 0 for a reason that is missing among others, None for what was not measured."""
    family = "val/reason/"
    counted = name.startswith(family) and any(other.startswith(family) for other in metrics)
    return metrics.get(name, 0.0 if counted else None)


def _labelled(console: Console, rows: Sequence[tuple[str, str]]) -> None:
    width = max((len(label) for label, _ in rows), default=0)
    for label, value in rows:
        _line(console, "  ", (f"{label:{width}}", "dim"), "  ", value)  # never folded: paths are there to be copied


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _numbers(metrics: Mapping[str, Number]) -> list[tuple[str, str]]:
    """(label, formatted value) of what is watched and the metrics have."""
    shown = []
    for alternatives in NUMBERS:
        found = [(label, style, metrics.get(name)) for label, name, style in alternatives]
        shown += [(label, style.format(value)) for label, style, value in found if value is not None][:1]
    return shown


class Progress:
    """The display around a training loop, as a context manager.

        with Progress(steps, start=resumed_step) as progress:
            progress.phase("rollout", 300, 1024)      # any time, cheap; without numbers: at work, nobody knows how long
            progress.step(row)                        # a row of metrics.jsonl, that of step 0 too

    Numbers stay on the display until newer ones replace them, so that the last validation can be seen.
    """

    def __init__(self, steps: int, start: int = 0, console: Console = CONSOLE):
        self._steps = steps
        self._at = start
        self._console = console
        self._latest: dict[str, Number] = {}
        self._phase: tuple[str, int | None, int | None] | None = None
        self._phase_began = 0.0
        self._began = 0.0
        self._marks: list[float] = []  # when the loop began and when its steps ended
        self._ended = False
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        self._began = time.monotonic()
        self._marks = [self._began]
        if _live(self._console):
            self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=5)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        if self._live:
            self._live.stop()

    def phase(self, name: str, done: int | None = None, total: int | None = None) -> None:
        """Shows that the phase `name` is at work, `done` of `total` if known."""
        if self._phase is None or self._phase[0] != name:
            self._phase_began = time.monotonic()
        self._phase = (name, done, total)

    def where(self) -> str:
        """The step and phase at work, in words that change whenever something moves. Other threads may ask."""
        name, done, total = self._phase or ("between two phases", None, None)
        return f"step {self._at + 1}, {name}" + ("" if done is None else f" {done}" if total is None else f" {done}/{total}")

    def step(self, metrics: Mapping[str, Number]) -> None:
        """Shows the metrics of the step that has just ended; off a terminal, prints them as a line."""
        self._at = metrics["step"]
        self._latest.update({name: value for name, value in metrics.items() if value is not None})
        self._phase = None
        if self._at == 0:  # a validation, not a step: no measure of what steps take
            self._marks = [time.monotonic()]
        else:
            self._marks.append(time.monotonic())
        if self._live:
            self._live.refresh()
        else:
            left = self._left()
            cells = [f"step {self._at}/{self._steps}", *(f"{label} {value}" for label, value in _numbers(metrics))]
            _line(self._console, "  ".join(cells + ([f"{left} left"] if left else [])))

    def _left(self) -> str | None:
        """The remaining time at the pace of the last steps; None while there is no pace, and after the last step."""
        marks = self._marks
        if len(marks) < 2 or self._at >= self._steps:
            return None
        if len(marks) > 2:
            marks = marks[1:][-RECENT - 1 :]  # the first step compiles
        pace = (marks[-1] - marks[0]) / (len(marks) - 1)
        return _duration(max(0.0, pace * (self._steps - self._at) - (time.monotonic() - marks[-1])))

    def _render(self) -> RenderableType:
        """What `Live` draws, from a thread of its own: so each attribute that may become None is read once."""
        now, left, phase = time.monotonic(), self._left(), self._phase
        width = min(self._console.width, WIDEST)
        bars = Table.grid(padding=(0, 2), expand=True)
        bars.width = width
        bars.add_column(no_wrap=True, min_width=CELL - 2)
        bars.add_column(ratio=1)
        bars.add_column(no_wrap=True, justify="right", min_width=9)
        bars.add_column(no_wrap=True, min_width=len("0:00:00, 0:00:00 left"))
        times = _duration(now - self._began) + (f", {left} left" if left else "")
        bar = ProgressBar(total=max(self._steps, 1), completed=self._at, complete_style="green")
        bars.add_row(Text("step", style="bold"), bar, f"{self._at}/{self._steps}", times)
        if phase and not self._ended:
            name, done, total = phase
            bar = ProgressBar(total=total, completed=done or 0, pulse=not total, complete_style="cyan")
            count = "" if done is None else f"{done}/{total}" if total else f"{done}"
            bars.add_row(Text(name, style="cyan"), bar, count, _duration(now - self._phase_began))
        elif not self._ended:
            bars.add_row("")  # so that the display does not jump between two phases
        return Group("", bars, "", *self._tables(width))

    def _tables(self, width: int) -> list[Table]:
        """The latest numbers, each below its label, in as many rows as the width asks for."""
        cells, fit = _numbers(self._latest), max(1, width // CELL)
        tables = []
        for first in range(0, len(cells), fit):
            table = Table.grid()
            some = cells[first : first + fit]
            for _ in some:
                table.add_column(width=CELL, no_wrap=True)
            table.add_row(*(Text(label, style="dim") for label, _ in some))
            table.add_row(*(Text(value, style="bold") for _, value in some))
            tables.append(table)
        return tables
