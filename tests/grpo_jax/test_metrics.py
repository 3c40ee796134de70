"""The run's files (what a kill and a restart leave of them), the counting of metrics, the picture, the console."""

import io
import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from grpo_jax import console, metrics
from grpo_jax.group import Group
from grpo_jax.reward import REASONS, Scored

ROOT = Path(__file__).resolve().parents[2]


def write(folder, steps, resume=0, tensorboard=False):
    log = metrics.Log.open(folder, resume, tensorboard)
    for step in steps:
        log.step({"step": step, "reward/mean": step / 7})
        log.rollouts([{"step": step, "id": f"{step}{k}", "prompt": "naïve \ud800 ♥", "answer": []} for k in "ab"])
    log.close()


def steps(path):
    return [row["step"] for row in metrics.read(path)]


# Files


def test_rows_after_the_restored_step_are_dropped_and_the_others_keep_their_bytes(tmp_path):
    write(tmp_path, [0, 1, 2, 3, 4, 5])
    files = [tmp_path / "metrics.jsonl", tmp_path / "rollouts.jsonl"]
    whole = [file.read_bytes() for file in files]
    metrics.Log.open(tmp_path, 3, False).close()
    assert steps(files[0]) == [0, 1, 2, 3]
    assert steps(files[1]) == [0, 0, 1, 1, 2, 2, 3, 3]
    for file, before in zip(files, whole, strict=True):
        assert before.startswith(file.read_bytes())
    write(tmp_path, [4, 5], resume=3)
    assert [file.read_bytes() for file in files] == whole
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "rollouts.jsonl"]


def test_a_start_without_a_checkpoint_drops_every_row(tmp_path):
    write(tmp_path, [0, 1, 2])
    write(tmp_path, [0], resume=0)
    assert steps(tmp_path / "metrics.jsonl") == [0]


def test_a_kill_at_any_byte_loses_only_the_row_being_written(tmp_path):
    write(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    ends = [number for number, byte in enumerate(whole) if byte == ord("\n")]  # a row is whole without its line's end
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        left = [1, 2, 3][: sum(end <= length for end in ends)]
        assert steps(path) == left
        metrics.Log.open(tmp_path, 9, False).close()
        assert path.read_bytes() == whole[: ends[len(left) - 1] + 1 if left else 0]


def test_numbers_that_are_not_finite_become_null_and_numpy_scalars_numbers(tmp_path):
    log = metrics.Log.open(tmp_path, 0, False)
    log.step({"step": np.int64(1), "a": math.nan, "b": -math.inf, "c": np.float32(0.5), "d": np.array(2.0), "e": None})
    log.rollouts([{"step": 1, "responses": [{"text": "\udfff", "advantage": math.inf, "truncated": True}]}])
    # before close: each row is handed over when it is written
    assert (tmp_path / "metrics.jsonl").read_text() == ('{"step": 1, "a": null, "b": null, "c": 0.5, "d": 2.0, "e": null}\n')
    row = {"step": 1, "responses": [{"text": "\udfff", "advantage": None, "truncated": True}]}
    assert metrics.read(tmp_path / "rollouts.jsonl") == [row]
    log.close()


def test_a_row_without_a_step_and_a_damaged_file_are_refused(tmp_path):
    log = metrics.Log.open(tmp_path, 0, False)
    with pytest.raises(ValueError, match=r'metrics.jsonl needs a whole number under "step"; it has 1.5'):
        log.step({"step": 1.5})
    log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"reward/mean": 1}\n{"step": 3}\n')
    for use in (metrics.read, lambda _: metrics.Log.open(tmp_path, 3, False)):
        with pytest.raises(ValueError, match="metrics.jsonl, line 2: .*delete the line"):
            use(path)
    assert len(path.read_text().splitlines()) == 3
    assert metrics.read(tmp_path / "nothing.jsonl") == []


def test_tensorboard_has_the_rows_and_hides_those_written_anew(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    write(tmp_path, [0, 1, 2], tensorboard=True)
    first = set((tmp_path / "tensorboard").iterdir())
    # a folder of its own, because a file's name holds only the second in which it was made
    write(tmp_path / "again", [2], resume=1, tensorboard=True)

    def events(file):
        data = file.read_bytes()
        while data:  # records: length, its checksum, event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]

    scalars = [(e.step, v.tag, v.simple_value) for f in first for e in events(f) for v in e.summary.value]
    assert scalars == [(step, "reward/mean", pytest.approx(step / 7)) for step in (0, 1, 2)]
    (second,) = (tmp_path / "again" / "tensorboard").iterdir()
    assert [e.step for e in events(second) if e.HasField("session_log")] == [2]


# Counting


def group(*lengths, truncated=()):
    responses = tuple(np.zeros(length, np.int32) for length in lengths)
    cut = tuple(index in truncated for index in range(len(lengths)))
    return Group(np.zeros(3, np.int32), responses, tuple(np.zeros(length) for length in lengths), cut)


def test_summarize_by_hand():
    groups = [group(4, 8), group(2, 16, truncated=[1]), group(5, 7)]
    pairs = [[(1, "correct"), (0, "no_format")], [(0, "bad_json"), (0, "mine")], [(1, "correct"), (1, "correct")]]
    scored = [[Scored(float(value), reason, {}) for value, reason in pair] for pair in pairs]
    found = metrics.summarize(groups, scored)
    assert found == {
        "reward/mean": 0.5,
        "reward/std": 0.5,
        "groups/zero_variance": 2 / 3,
        "response_tokens/mean": 7.0,
        "response_tokens/min": 2,
        "response_tokens/max": 16,
        "response_tokens/truncated_share": 1 / 6,
        **{f"reason/{code}": 0.0 for code in REASONS},
        "reason/correct": 3 / 6,
        "reason/no_format": 1 / 6,
        "reason/bad_json": 1 / 6,
        "reason/mine": 1 / 6,
    }
    assert list(found)[-1] == "reason/mine"
    assert metrics.summarize([], []) == {}
    with pytest.raises(ValueError, match="5 scores do not fit 3 groups of 6 responses"):
        metrics.summarize(groups, [*scored[:2], scored[2][:1]])


def test_summarize_does_not_depend_on_the_order_of_groups():
    rng = np.random.default_rng(0)
    groups = [group(*rng.integers(1, 50, 3)) for _ in range(200)]
    scored = [[Scored(float(value), "custom", {}) for value in rng.normal(size=3) * 10.0**k] for k in range(-5, 5)] * 20
    order = rng.permutation(200)
    shuffled = metrics.summarize([groups[i] for i in order], [scored[i] for i in order])
    assert shuffled == metrics.summarize(groups, scored)


# Curves


@pytest.mark.parametrize("count", [0, 1, 2, 21, 50])
def test_curves_are_drawn_from_any_number_of_rows(tmp_path, count):
    log = metrics.Log.open(tmp_path, 0, False)
    for step in range(count):
        row = {name: math.sin(step) for name, _ in metrics.PANELS}
        log.step({"step": step, **row, "kl/mean": None, "val/accuracy": 0.5 if step % 10 == 0 else None})
    log.close()
    path = metrics.curves(tmp_path)
    assert path == tmp_path / "curves.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", path.read_bytes()[16:24]) == (1800, 930)
    assert sorted(os.listdir(tmp_path)) == ["curves.png", "metrics.jsonl", "rollouts.jsonl"]


def test_benchmarks_are_lines_of_one_more_panel(tmp_path, monkeypatch):
    drawn = []
    panel = metrics._benchmarks
    monkeypatch.setattr(metrics, "_benchmarks", lambda axes, points: (panel(axes, points), drawn.append(axes)))
    names = [f"part_{number}" for number in range(20)]
    log = metrics.Log.open(tmp_path, 0, False)
    log.step({"step": 0, "val/accuracy": 0.25, **{f"val/{name}/accuracy": 0.5 for name in names[:19]}})
    log.step({"step": 4, "val/accuracy": 0.75, "val/part_19/accuracy": 1.0, "val/reason/accuracy": 1.0, "val/a/b": 1.0})
    log.close()
    assert struct.unpack(">II", metrics.curves(tmp_path).read_bytes()[16:24]) == (1800, 1395)
    lines = drawn[0].get_lines()
    assert [line.get_label() for line in lines] == ["validation rows", *names]
    assert lines[0].get_xydata().tolist() == [[0, 25], [4, 75]] and lines[20].get_xydata().tolist() == [[4, 100]]
    looks = [(line.get_color(), line.get_marker()) for line in lines]
    assert len(set(looks[:19])) == 19  # then they begin again


@pytest.mark.parametrize("count", [21, 22, 400])
def test_smoothing_keeps_constants_and_the_middle_of_a_line(count):
    np.testing.assert_allclose(metrics._smooth(np.full(count, 0.3)), 0.3, rtol=1e-12)
    middle = count // 2
    np.testing.assert_allclose(metrics._smooth(np.arange(count, dtype=float))[middle], middle, rtol=1e-9)


def test_neither_jax_nor_pyplot_is_imported(tmp_path):
    code = (
        "import sys; from grpo_jax import metrics, console; metrics.Log.open(sys.argv[1], 0, True).close();"
        "metrics.curves(sys.argv[1]); print([name for name in ('jax', 'matplotlib.pyplot') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout == "[]\n"


# Console


class Terminal(io.StringIO):
    def isatty(self):
        return True


def row(step, **more):
    return {"step": step, "reward/mean": 0.4567, "kl/mean": 0.00123, "entropy/mean": 0.3, "loss": 9.0, **more}


def test_off_a_terminal_each_step_is_one_line_without_escape_codes(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # many CI systems set it
    monkeypatch.setenv("COLUMNS", "20")
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(console, "time", clock)
    file = io.StringIO()
    with console.Progress(4, console=console.make_console(file)) as progress:
        progress.phase("validation", 0, 512)
        progress.step({"step": 0, "val/accuracy": 0.125})
        # the first step compiles: it counts only while there is no other
        for step, now in enumerate([100, 110, 130], 1):
            progress.phase("rollout", 1, 2)
            clock.now = now
            progress.step(row(step, **{"response_tokens/mean": 1234.5, "time/step": 2.0}))
    numbers = "reward 0.457  KL 0.00123  entropy 0.300  length 1,234.5  s/step 2.0"
    assert file.getvalue().splitlines() == [
        "step 0/4  validation 12.5%",
        f"step 1/4  {numbers}  0:05:00 left",
        f"step 2/4  {numbers}  0:00:20 left",
        f"step 3/4  {numbers}  0:00:15 left",
    ]


def test_fine_tuning_shows_its_loss():
    file = io.StringIO()
    with console.Progress(1, console=console.make_console(file)) as progress:
        progress.step({"step": 1, "loss": 1.23456, "val/loss": 2.0, "learner/tokens_per_second": 1e4})
    assert file.getvalue() == "step 1/1  loss 1.2346  val. loss 2.0000  tokens/s 10,000\n"


@pytest.mark.parametrize("width", [50, 80, 120])
def test_on_a_terminal_the_display_fits_and_keeps_the_last_validation(width, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = console.make_console(Terminal())
    terminal.width = width
    with console.Progress(30, start=10, console=terminal) as progress:
        progress.step(row(11, **{"val/accuracy": 0.25, "rollout/tokens_per_second": 54321.0}))
        progress.step(row(12, **{"val/accuracy": None}))
        progress.phase("rollout", 300, 1024)
        with terminal.capture() as capture:
            terminal.print(progress._render())
        plain = console.Text.from_ansi(capture.get()).plain
        console.warn("mind the gap", terminal)
    assert "mind the gap" in terminal.file.getvalue()
    for shown in ("12/30", "rollout", "300/1024", "25.0%", "54,321", "0.457"):
        assert shown in plain
    assert max(map(len, plain.splitlines())) <= width


def test_a_quiet_console_says_nothing():
    silent = console.make_console(Terminal(), quiet=True)
    with console.Progress(1, console=silent) as progress:
        progress.step(row(1))
        console.warn("w", silent)
    console.header("h", [("a", "b")], silent)
    console.closing({}, {}, [("a", "b")], silent)
    assert silent.file.getvalue() == ""


def test_header_and_closing_table():
    plain = console.make_console(io.StringIO())
    console.header("demo", [("a step", "8 prompts x 5 responses " * 9), ("data", "rows \ud800")], plain)
    before = {"step": 0, "val/accuracy": 0.1, "val/reason/no_format": 0.9, "val/reason/correct": 0.1, "val/reason/unseen": 0.0}
    after = {
        "step": 9,
        "reason/bad_json": 0.5,
        "val/reason/unseen": 0.0,
        "val/reason/correct": 0.75,
        "val/reason/mine": 0.25,
        "val/accuracy": 0.75,
    }
    console.closing(before, after, [("model", "/runs/" + "x" * 100)], plain)
    console.closing({}, {"val/accuracy": 0.5}, [], plain)
    bench = {"val/my_reason/accuracy": 0.0, "val/loss/accuracy": 0.5, "val/reason/correct": 0.5}
    console.closing({"val/accuracy": 0.0, "val/my_reason/accuracy": 0.0}, {"val/accuracy": 0.5, **bench}, [], plain)
    console.closing({"val/loss": 1.25}, {"val/loss": 1.0, "loss": 3.0}, [], plain)
    assert plain.file.getvalue().splitlines() == [
        "demo",
        "  a step  " + "8 prompts x 5 responses " * 9,
        "  data    rows \\ud800",
        "",
        "",
        "validation    before   after  difference",
        "accuracy       10.0%   75.0%       +65.0",
        "no_format      90.0%    0.0%       -90.0",
        "correct        10.0%   75.0%       +65.0",
        "mine            0.0%   25.0%       +25.0",
        "",
        "  model  /runs/" + "x" * 100,
        "",
        "validation    before   after  difference",
        "accuracy           -   50.0%           -",
        "",
        "",
        "validation    before   after  difference",
        "accuracy        0.0%   50.0%       +50.0",
        "correct            -   50.0%           -",
        "my_reason       0.0%    0.0%        +0.0",
        "loss               -   50.0%           -",
        "",
        "",
        "validation    before   after  difference",
        "loss          1.2500  1.0000     -0.2500",
        "",
    ]


def test_rows_are_ascii_lines_that_json_reads(tmp_path):
    write(tmp_path, [1])
    for line in (tmp_path / "rollouts.jsonl").read_bytes().splitlines():
        assert line.isascii() and json.loads(line)["prompt"] == "naïve \ud800 ♥"
