"""What comes to a run from outside: a wish to stop, in each phase, twice, while it is busy; a full disk; a second process.

Two processes under jax.distributed are in tests/grpo_jax/test_hosts.py.
"""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo_jax import batch, checkpoint, config, hosts, metrics, sft, train
from grpo_jax import run as run_module
from tests.faults.small_disk import fill, small_disk
from tests.grpo_jax.small_run import end_of, rows, small

ROOT = Path(__file__).resolve().parents[2]
WITHIN = 30  # seconds from the signal to the end, of the processor's time: other jobs may take most of the clock's


# ---------------------------------------------------------------- signals alone


def test_the_first_signal_asks_and_handlers_are_given_back(monkeypatch):
    monkeypatch.setattr(hosts, "_SAME", 600)  # a second one in that time would end this process
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with hosts.Stop() as stop:
        assert not stop.asked()
        for _ in range(2):  # one that comes twice at once is one
            os.kill(os.getpid(), signal.SIGTERM)
        until = time.monotonic() + 60
        while not stop.asked() and time.monotonic() < until:
            time.sleep(0.001)
        assert stop.asked()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


BUSY = """
import hashlib, sys
from grpo_jax import hosts

with hosts.Stop() as stop:
    stop.nothing_to_lose = sys.argv[1]
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in C, as a compilation: Python's own handlers would wait for it
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("nothing_to_lose", ["", "all is saved"])
def test_a_busy_main_thread_does_not_keep_a_process_from_ending(nothing_to_lose, number):
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, nothing_to_lose],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    if not nothing_to_lose:
        with pytest.raises(subprocess.TimeoutExpired):  # once only asks
            process.wait(10 * hosts._SAME)
        process.send_signal(number)
    _, said = process.communicate(timeout=120)  # far less than the hash would take
    name = signal.Signals(number).name
    assert process.returncode == (hosts.STOPPED if nothing_to_lose else 128 + number)
    assert said == (f"{name}: all is saved\n" if nothing_to_lose else f"{name} again: ended at once\n")


def test_the_time_limit_keeps_a_tenth_or_a_minute_for_saving():
    began = time.monotonic()
    for minutes, usable in ((5, 270), (100, 5940)):
        with hosts.Stop(minutes, began - usable + 600) as stop:  # ten minutes are left
            assert not stop.asked(500)
            assert stop.asked(600.001)
    with hosts.Stop(None, 0.0) as stop:
        assert not stop.asked(10**9)


# ---------------------------------------------------------------- in a run

OPTIONS = {
    "run.steps": 4,
    "checkpoint.every": 100,
    "validation.limit": 4,
    "validation.every": 3,
    "update.recompute_old_logp": True,
}


@pytest.fixture(scope="module")
def unbroken(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    train.train(small(tiny_model, folder, **OPTIONS))
    return folder


def signalled(monkeypatch, where, name: str, call: int) -> list[float]:
    """SIGTERM to this process at the so-manieth call of a function; returns when."""
    count, function, when = iter(range(1, 1000)), getattr(where, name), []

    def calling(*arguments, **named):
        if next(count) == call:
            when.append(time.process_time())
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)  # for the thread that hears it
        return function(*arguments, **named)

    monkeypatch.setattr(where, name, calling)
    return when


PHASES = {  # where, name, the call of it, the step that is saved
    "rollout": (batch, "respond", 3, 1),  # validation, steps 1 and 2
    "reward": (batch, "score", 3, 1),
    "reference": (train, "add_reference", 2, 1),
    "update": (train, "update", 3, 2),  # the first of two mini-batches of step 2: the step is ended
    "last of an update": (train, "update", 4, 2),
    "validation": (batch, "respond", 5, 3),  # of step 3, whose row waits for it
    "save": (run_module, "save", 1, 4),  # of the last step; the export is left to the next start
}


@pytest.mark.parametrize("phase", PHASES)
def test_told_in_any_phase_it_ends_in_time_and_goes_on_as_if_it_had_not_been(
    phase, tiny_model, unbroken, tmp_path, monkeypatch, capsys
):
    where, name, call, saved = PHASES[phase]
    cfg = small(tiny_model, tmp_path / "run", **OPTIONS)
    with monkeypatch.context() as patch:
        when = signalled(patch, where, name, call)
        with pytest.raises(SystemExit) as stop:
            train.train(cfg)
    assert stop.value.code == hosts.STOPPED == 75
    assert time.process_time() - when[0] < WITHIN
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [str(saved)]
    assert f"stopped after step {saved}" in capsys.readouterr().out
    train.train(cfg)
    assert rows(tmp_path / "run") == rows(unbroken)
    for file in ("rollouts.jsonl", "hf/model.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (unbroken / file).read_bytes()


def test_a_time_limit_that_is_over_begins_no_step(tiny_model, tmp_path, capsys):
    cfg = small(tiny_model, tmp_path / "run", **{"run.time_limit": 1e-6, "run.steps": 1})
    with pytest.raises(SystemExit) as stop:
        train.train(cfg)
    assert stop.value.code == hosts.STOPPED
    assert "warning: the time limit is near: stopping" in capsys.readouterr().out
    assert [row["step"] for row in metrics.read(tmp_path / "run" / "metrics.jsonl")] in ([], [0])


def test_supervised_training_stops_as_well(tiny_model, tmp_path, monkeypatch):
    """Told in the update of step 2 of 3, which is ended; resumed, it equals a run that was not told."""
    settings = lambda name: config.parse(  # noqa: E731
        config.SftConfig,
        "grpo_jax.sft",
        ["demo", "--model.path", tiny_model, "--run.dir", str(tmp_path / name), "--run.steps", "3", "--validation.limit", "0",
         "--batch.rows_per_step", "2", "--batch.max_tokens", "400", "--learner.tokens_per_microbatch", "2048"],
    )  # fmt: skip
    sft.sft(settings("unbroken"))
    with monkeypatch.context() as patch:
        when = signalled(patch, sft, "update", 2)
        with pytest.raises(SystemExit) as stop:
            sft.sft(settings("run"))
    assert stop.value.code == hosts.STOPPED and time.process_time() - when[0] < WITHIN
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]
    sft.sft(settings("run"))
    assert rows(tmp_path / "run") == rows(tmp_path / "unbroken")
    weights = [(tmp_path / name / "hf" / "model.safetensors").read_bytes() for name in ("run", "unbroken")]
    assert weights[0] == weights[1]


def test_a_disk_that_is_full_for_a_while_costs_two_saves_and_nothing_else(tiny_model, unbroken, tmp_path, monkeypatch, capsys):
    """Full in step 2, its rows wait; in step 3 with room for rows, but not for a checkpoint; in step 4 with room for all."""
    with small_disk(tmp_path / "disk", 8) as disk:
        learn, end_step, filler, saved = train.learn, train.end_step, disk / "filler", []

        def filling(run, *rest):  # before the step's rows are written, of which those of rollouts take pages
            match run.step + 1:
                case 2:
                    fill(disk)
                case 3:
                    os.truncate(filler, filler.stat().st_size - 60_000)
                case 4:
                    filler.unlink()
            return learn(run, *rest)

        def watched(run, *rest):
            end_step(run, *rest)
            run.checkpoints.wait()
            saved.append((sorted(path.name for path in (disk / "run" / "checkpoints").iterdir()), lines(disk / "run")))

        monkeypatch.setattr(train, "learn", filling)
        monkeypatch.setattr(train, "end_step", watched)
        train.train(small(tiny_model, disk / "run", **{**OPTIONS, "checkpoint.every": 1}))
        assert saved == [(["1"], 2), (["1"], 2), (["1"], 4), (["1", "4"], 5)]
        said = " ".join(capsys.readouterr().out.split())
        assert said.count("bytes of metrics and rollouts wait in memory: No space left on device") == 1
        assert "warning: step 2 is not saved (the newest is step 1), and the run goes on" in said
        assert "warning: checkpoint 3 could not be saved (" in said and said.count("warning: checkpoint") == 1
        assert rows(disk / "run") == rows(unbroken)
        for file in ("rollouts.jsonl", "hf/model.safetensors"):
            assert (disk / "run" / file).read_bytes() == (unbroken / file).read_bytes()


def lines(folder: Path) -> int:
    return (folder / "metrics.jsonl").read_bytes().count(b"\n")


# ---------------------------------------------------------------- two processes on one folder

OWNER = """
import sys
from grpo_jax import checkpoint

lock = checkpoint.claim(sys.argv[1])
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_by_name_and_a_dead_ones_lock_is_free(tmp_path):
    folder = tmp_path / "run"
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert owner.stdout.readline() == "ready\n"
    with pytest.raises(ValueError) as refused:
        checkpoint.claim(folder)
    assert f"another process is at work on this run (process {owner.pid} on {os.uname().nodename}, since 20" in str(
        refused.value
    )
    owner.kill()
    owner.communicate()
    lock = checkpoint.claim(folder)
    assert f"process {os.getpid()} on" in (folder / "lock").read_text()
    with pytest.raises(ValueError, match=f"process {os.getpid()} on"):
        checkpoint.claim(folder)  # not even this one twice
    lock.close()
    checkpoint.claim(folder).close()


# ---------------------------------------------------------------- the clock


def test_a_clock_that_jumps_changes_nothing(tiny_model, tmp_path, monkeypatch):
    """By three years, forward and back, each time that it is read."""
    options = {"validation.limit": 2, "run.time_limit": 60, "run.watchdog": 1, "run.tensorboard": True, "checkpoint.every": 1}
    found, weights = end_of(small(tiny_model, tmp_path / "calm", **options))
    jumps = itertools.cycle((0.0, 1e8, -1e8))
    monkeypatch.setattr(time, "time", lambda: 1.7e9 + next(jumps))
    again, same = end_of(small(tiny_model, tmp_path / "jumps", **options))
    assert again == found and (same == weights).all()
    timed = [value for row in metrics.read(tmp_path / "jumps" / "metrics.jsonl") for k, value in row.items() if "time/" in k]
    assert timed and all(0 <= value < 600 for value in timed)
    assert not (tmp_path / "jumps" / "stalls.txt").exists()  # nothing was taken for a stall
