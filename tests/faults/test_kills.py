"""Kills at random moments: inside the start, a rollout, an update, a save, the export. In the end all is as if there were none.

Twenty of them, by five seeds, each chain of four ending in a whole run (about ten minutes on two idle cores):

    python -m pytest -m slow tests/faults/test_kills.py
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.grpo_jax.small_run import SMALL, rows, words

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8
OPTIONS = {**SMALL, "run.steps": STEPS, "checkpoint.every": 2, "validation.every": 4}

# The training program, which kills itself as many seconds after the so-manieth call of a function has begun as it is told.
PROGRAM = """
import os, signal, sys, threading
from grpo_jax import batch, checkpoint, config, train

place, call, delay = sys.argv.pop(1), int(sys.argv.pop(1)), float(sys.argv.pop(1))
where, name = {"start": (train, "open_run"), "rollout": (batch, "respond"), "update": (train, "update"),
               "save": (checkpoint.Checkpoints, "save"), "export": (train, "finish"), "": (train, "main")}[place]
function, calls = getattr(where, name), iter(range(1, 1000))

def counted(*arguments, **named):
    if place and next(calls) == call:
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return function(*arguments, **named)

setattr(where, name, counted)
config.run_main(train.main)
"""
# Of each place: the last call of it that a process may be killed in, and the seconds within which it is over.
PLACES = {"start": (1, 1.0), "rollout": (3, 0.3), "update": (4, 0.3), "save": (1, 0.2), "export": (1, 0.3)}


def start(model: str, folder: Path, environment: dict, kill: tuple[str, int, float] = ("", 0, 0.0)) -> int:
    """The exit code of one start of the run's command."""
    options = {**OPTIONS, "model.path": model, "run.dir": str(folder)}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, *map(str, kill), "demo", *words(options)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode in (0, -9), done.stderr
    return done.returncode


@pytest.fixture(scope="module")
def unbroken(tiny_model, environment, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    assert start(tiny_model, folder, environment) == 0
    return folder


def drawn(seed: int) -> list[tuple[str, int, float]]:
    """Four kills: three of the places of a loop or its start, in any order, then one in the export."""
    rng = random.Random(seed)
    places = rng.sample(["start", "rollout", "update", "save"], 3)
    return [(place, rng.randint(1, PLACES[place][0]), rng.uniform(0, PLACES[place][1])) for place in (*places, "export")]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_four_times_it_ends_bit_equal_to_a_run_that_was_not(seed, tiny_model, environment, unbroken, tmp_path):
    folder = tmp_path / "run"
    for kill in drawn(seed):
        code = start(tiny_model, folder, environment, kill)
        print(f"seed {seed}: {kill[0]}, call {kill[1]}, after {kill[2]:.3f} s: {'killed' if code else 'over before'}")
        assert code == -9, kill
    assert start(tiny_model, folder, environment) == 0
    assert rows(folder) == rows(unbroken)
    assert [row["step"] for row in rows(folder)] == list(range(STEPS + 1))
    for file in ("rollouts.jsonl", "hf/model.safetensors"):
        assert (folder / file).read_bytes() == (unbroken / file).read_bytes(), file
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["6", "8"]  # nothing partial, nothing damaged
