"""The numbers of a run: counted from its groups, kept in its folder, drawn as curves.

    summarize    groups and their scores -> the metrics that describe a batch
    Log          metrics.jsonl and rollouts.jsonl in a run's folder, growing row by row, and TensorBoard's events
    read         the rows of such a file
    benchmark_of the benchmark that a metric is the accuracy of
    curves       metrics.jsonl -> curves.png, the six curves of the paper (Tool-N1, Figures 6 and 7), and benchmarks

metrics.jsonl is the source of truth; console, TensorBoard and curves show what it holds. The row of step s (from 1)
describes step s; a validation before the first step is a row of step 0. A run that starts again from the checkpoint of
step s keeps the rows up to s, byte for byte, and writes those after it anew; so row s must be on the disk (`Log.sync`) before
the saving of checkpoint s begins. A process killed while it writes leaves a line without an end, and only at the end of the
file. Rows that a full disk does not take wait in memory, and are written with the next.

Sums are exactly rounded (`math.fsum`), so that no metric depends on the order of the groups.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_jax.group import Group
from grpo_jax.reward import REASONS, Scored

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from tensorboardX.event_file_writer import EventsWriter

Number = float | int | None

_MOST_WAITING = 2**30  # bytes of rows that may wait for room on the disk
PANELS = (
    ("kl/mean", "KL to the initial policy"),
    ("response_tokens/mean", "response length, mean (tokens)"),
    ("response_tokens/min", "response length, minimum (tokens)"),
    ("val/accuracy", "validation accuracy (%)"),
    ("reward/mean", "reward, mean"),
    ("entropy/mean", "entropy (nats a token)"),
)
SFT_PANELS = (("loss", "loss (nats a token)"), ("val/loss", "validation loss (nats a token)"), ("grad_norm", "gradient norm"))
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#6B6B6B"  # Okabe and Ito: told apart by colour-blind eyes
_LINES = (BLUE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # theirs too, of benchmarks; orange is that of rows
_STYLES = ({"marker": "s"}, {"marker": "D", "linestyle": "--"}, {"marker": "^", "linestyle": ":"})  # where colours run out


def summarize(groups: Sequence[Group], scored: Sequence[Sequence[Scored]]) -> dict[str, float | int]:
    """The metrics of N groups and the scores of their responses; {} for no groups.

    Means, standard deviation (of the population) and shares run over all responses; `groups/zero_variance` is the share
    of groups whose rewards are all equal, which teach nothing. `reason/<code>` is there for every code of REASONS, and
    for a code of a user's own where it occurs.
    """
    if not groups:
        return {}
    rewards = [[score.value for score in row] for row in scored]
    values = [value for row in rewards for value in row]
    lengths = [len(response) for group in groups for response in group.responses]
    if list(map(len, rewards)) != [len(group.responses) for group in groups]:
        raise ValueError(f"{len(values)} scores do not fit {len(groups)} groups of {len(lengths)} responses")
    mean = math.fsum(values) / len(values)
    reasons = Counter(score.reason for row in scored for score in row)
    codes = [*REASONS, *sorted(reasons.keys() - set(REASONS))]
    return {
        "reward/mean": mean,
        "reward/std": math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values)),
        "groups/zero_variance": sum(max(row) == min(row) for row in rewards) / len(rewards),
        "response_tokens/mean": sum(lengths) / len(lengths),
        "response_tokens/min": min(lengths),
        "response_tokens/max": max(lengths),
        "response_tokens/truncated_share": sum(sum(group.truncated) for group in groups) / len(lengths),
        **{f"reason/{code}": reasons[code] / len(values) for code in codes},
    }


class Log:
    """The files of a run's folder that grow by rows. One process writes them; readers may look at any time.

    `problem` is why rows wait in memory, or why TensorBoard's events have ended; "" where all is well.
    """

    def __init__(self, metrics: _Growing, rollouts: _Growing, board: EventsWriter | None):
        self._metrics = metrics
        self._rollouts = rollouts
        self._board = board
        self.problem = ""

    @classmethod
    def open(cls, run_dir: str | Path, resume_step: int, tensorboard: bool, pending: bool = False) -> Log:
        """Opens the files of `run_dir`, which is made if missing.

        resume_step: the step of the checkpoint the run goes on from; later rows are dropped. 0 where there is none: all
        rows are, that of step 0 too. pending: that step's metrics are to be logged (again).
        Raises ValueError for a file that is damaged elsewhere than at its end.
        """
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / "metrics.jsonl", folder / "rollouts.jsonl"]
        _keep(paths[0], resume_step - pending if resume_step else None)
        _keep(paths[1], resume_step or None)
        board = _board(folder / "tensorboard", resume_step + 1 if resume_step else 0) if tensorboard else None
        return cls(*map(_Growing, paths), board)

    def step(self, metrics: Mapping[str, Number]) -> None:
        """Writes the row of one step; it survives the process. "step" is an int; numbers not finite become null."""
        row = plain(metrics)
        self._metrics.add([row])
        self._write()
        if self._board:
            from tensorboardX.proto.event_pb2 import Event
            from tensorboardX.summary import scalar

            shown = {name: value for name, value in row.items() if name != "step" and value is not None}
            try:
                for name, value in shown.items():
                    self._board.write_event(Event(wall_time=time.time(), step=row["step"], summary=scalar(name, value)))
                self._board.flush()
            except OSError as error:
                self._board = None
                self.problem = self.problem or f"TensorBoard's events end here: {error.strerror}"

    def rollouts(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes one row a group, each with its "step". Texts may hold anything, lone surrogates too."""
        self._rollouts.add([plain(row) for row in rows])
        self._write()

    def _write(self) -> None:
        try:
            for file in (self._rollouts, self._metrics):
                file.write()
            self.problem = ""
        except OSError as error:
            waiting = self._metrics.waiting + self._rollouts.waiting
            if len(waiting) > _MOST_WAITING:
                raise
            self.problem = f"{len(waiting):,} bytes of metrics and rollouts wait in memory: {error.strerror}"

    def sync(self) -> bool:
        """Brings all rows to the disk itself, so that they outlast the machine's power; False where some still wait."""
        self._write()
        return all(file.sync() for file in (self._metrics, self._rollouts))

    def close(self) -> None:
        self._write()
        for file in (self._metrics, self._rollouts, self._board):
            if file:
                with contextlib.suppress(OSError):  # TensorBoard's, once more
                    file.close()


class _Growing:
    """A file that grows by rows, whole ones only as long as the process lives."""

    def __init__(self, path: Path):
        self._file = path.open("ab", buffering=0)
        self._length = self._file.tell()  # of the rows that are written
        self.waiting = b""

    def add(self, rows: Sequence[dict]) -> None:
        """Has rows written by the next `write`."""
        for row in rows:
            if not isinstance(row.get("step"), int):
                raise ValueError(f'a row for {self._file.name} needs a whole number under "step"; it has {row.get("step")!r}')
        self.waiting += b"".join(json.dumps(row, allow_nan=False).encode("ascii") + b"\n" for row in rows)

    def write(self) -> None:
        """Writes what is waiting. Raises OSError where it cannot; it then is still waiting, and no part of it written."""
        left = memoryview(self.waiting)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            os.ftruncate(self._file.fileno(), self._length)
            raise
        self._length += len(self.waiting)
        self.waiting = b""

    def sync(self) -> bool:
        """Whether all is on the disk, after having seen to it."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems that know no such thing
                return False
        return not self.waiting

    def close(self) -> None:
        self._file.close()


def _board(folder: Path, purge_step: int) -> EventsWriter:
    """A file of TensorBoard's events; those of earlier files from `purge_step` on are hidden.

    Not tensorboardX's SummaryWriter: its thread dies of a full disk, and the next that hands it an event waits for ever.
    """
    from tensorboardX.event_file_writer import EventsWriter  # costs a second, and not every run wants it
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    folder.mkdir(exist_ok=True)
    board = EventsWriter(str(folder / "events"))
    board.write_event(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
    board.flush()
    return board


def read(path: str | Path) -> list[dict]:
    """The rows of a file that `Log` writes, without a last line that was cut off; [] where there is no file.

    Raises ValueError for a line that is not a row of a step.
    """
    return [row for _, row in _rows(Path(path))]


def _rows(path: Path) -> Iterator[tuple[bytes, dict]]:
    """(line as it stands, its row) for each whole row of the file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            row = parse_row(path, number, line)
            if row is not None:
                yield line, row


def parse_row(path: Path, number: int, line: bytes) -> dict | None:
    """The row that a line of such a file holds; None for one that was cut off, which has no end.

    Raises ValueError for a whole line that is not a row of a step.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if isinstance(row, dict) and isinstance(row.get("step"), int):
        return row
    if line.endswith(b"\n"):
        start = line[:40].decode(errors="replace").strip()
        raise ValueError(f"{path}, line {number}: not a row of a step: {start!r}; delete the line")
    return None


def _keep(path: Path, last: int | None) -> None:
    """Cuts the file to its rows up to step `last`, to none if that is None; at any moment it is the old or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        for line, row in () if last is None else _rows(path):
            if row["step"] <= last:
                file.write(line.rstrip(b"\n") + b"\n")  # a kill can part a line from its end
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def plain(value: Any) -> Any:
    """The value in JSON's types: arrays' scalars as numbers, numbers that are not finite as None."""
    match value:
        case None | bool() | str():
            return value
        case int() | np.integer():
            return int(value)
        case Mapping():
            return {key: plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case _:
            number = float(value)
            return number if math.isfinite(number) else None


def benchmark_of(metric: str) -> str | None:
    """`name` of val/<name>/accuracy; None for all other metrics."""
    match metric.split("/"):
        case ["val", name, "accuracy"] if name != "reason":  # val/reason/<code>: a reward of a user's may have such a code
            return name
    return None


def curves(run_dir: str | Path) -> Path:
    """Draws curves.png in the run's folder from its metrics.jsonl, however few rows that has; returns its path.

    The paper's six curves, or for supervised training its loss; below them, where there are benchmarks, all of these in one.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second, once, at the end of a run
    from matplotlib.figure import Figure

    folder = Path(run_dir)
    rows = read(folder / "metrics.jsonl")
    supervised = any("loss" in row for row in rows) and not any("reward/mean" in row for row in rows)
    panels = SFT_PANELS if supervised else PANELS
    asked = [name for name in dict.fromkeys(name for row in rows for name in row) if benchmark_of(name)]
    height = len(panels) // 3 + bool(asked)
    figure = Figure(figsize=(12, 3.1 * height), dpi=150, layout="constrained")  # not pyplot's: no global state
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    grid, last = figure.add_gridspec(height, 3), max((row["step"] for row in rows), default=0)
    points = lambda metric: [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]  # noqa: E731
    for place, (metric, title) in enumerate(panels):
        axes = figure.add_subplot(grid[place // 3, place % 3])
        _panel(axes, points(metric), validation=metric.startswith("val/"), scale=100 if metric == "val/accuracy" else 1)
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color="#222222")
    if asked:
        _benchmarks(figure.add_subplot(grid[-1, :2]), {name: points(name) for name in ("val/accuracy", *asked)})
    for axes in figure.axes:
        axes.set_xlim(-0.02 * max(last, 1), 1.02 * max(last, 1))
    for axes in figure.axes[-1 if asked else -3 :]:
        axes.set_xlabel("step", color=GREY)
    path = folder / "curves.png"
    temporary = folder / "curves.tmp.png"
    FigureCanvasAgg(figure).print_png(temporary)
    os.replace(temporary, path)  # a viewer that looks at the old one never sees half of the new
    return path


def _benchmarks(axes: Axes, points: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """The held-out rows and every benchmark in one panel of two columns; the third is for their names."""
    _frame(axes)
    looks = itertools.cycle([{"color": colour, **style} for style in _STYLES for colour in _LINES])
    for metric, pairs in points.items():
        name = benchmark_of(metric)
        look = next(looks) if name else {"color": ORANGE, "marker": "o"}
        if pairs:
            steps, values = np.array(pairs, float).T
            axes.plot(
                steps, 100 * values, linewidth=1.5, markersize=4.5, label=name or "validation rows", clip_on=False, **look
            )
    axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
    axes.set_title("benchmarks (%)", loc="left", fontsize=11, fontweight="bold", color="#222222")
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.03), frameon=False, fontsize=9, labelcolor="#222222")
    legend.set_in_layout(False)  # it has the third column to itself, and would narrow that of the other panels


def _frame(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#BBBBBB")
    axes.tick_params(colors=GREY, length=0)
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))


def _panel(axes: Axes, points: Sequence[tuple[int, float]], *, validation: bool, scale: float) -> None:
    """One small multiple: validation as joined markers, anything else as a line, faint under a smooth one if long."""
    _frame(axes)
    if not points:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", color="#999999")
        axes.set_yticks([])
        axes.grid(visible=False)
        return
    steps, values = np.array(points, float).T
    values = scale * values
    if validation:
        axes.plot(steps, values, "o-", color=ORANGE, linewidth=1.5, markersize=5, clip_on=False)
    elif len(steps) > 20:
        axes.plot(steps, values, color=BLUE, linewidth=0.8, alpha=0.3)
        axes.plot(steps, _smooth(values), color=BLUE, linewidth=2)
    else:
        axes.plot(steps, values, "o-", color=BLUE, linewidth=1.5, markersize=3.5, clip_on=False)
    if values.min() >= 0 > axes.get_ylim()[0]:
        axes.set_ylim(bottom=0)  # room below nought would suggest what cannot be


def _smooth(values: np.ndarray) -> np.ndarray:
    """Weighted running mean of values [S], Gaussian over a fortieth of them each side, renormalised at the ends."""
    width = max(1.5, len(values) / 40)
    reach = min(math.ceil(3 * width), (len(values) - 1) // 2)  # a longer kernel would lengthen what convolve returns
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    mean = lambda x: np.convolve(x, kernel, mode="same")  # noqa: E731
    return mean(values) / mean(np.ones_like(values))
