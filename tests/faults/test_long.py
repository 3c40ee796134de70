"""Many steps of one process: memory of host and device, open files and threads stay what they were.

python -m pytest -m slow tests/faults/test_long.py -k 60       # a minute or two; without -k, 500 steps, too
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import jax
import pytest

from grpo_jax import run as run_module
from grpo_jax import train
from tests.grpo_jax.small_run import small

WARM = 30  # steps, after which next to all shapes that occur are compiled


def held() -> dict[str, int]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    arrays = jax.live_arrays()
    return {
        "host": pages * os.sysconf("SC_PAGE_SIZE"),
        "arrays": len(arrays),
        "device": sum(x.nbytes for x in arrays),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("steps", [60, 500])
def test_nothing_grows(steps, tiny_model, tmp_path, monkeypatch):
    seen, end_step = [], run_module.end_step

    def watched(run, *rest):
        end_step(run, *rest)
        run.checkpoints.wait()  # what a save holds while it is under way is no growth
        seen.append(held())

    monkeypatch.setattr(train, "end_step", watched)
    train.train(small(tiny_model, tmp_path / "run", **{"run.steps": steps, "checkpoint.every": 5, "run.tensorboard": True}))
    first, last = seen[WARM - 1], seen[-1]
    print({name: (first[name], last[name]) for name in first})
    assert len(seen) == steps
    for name in ("arrays", "device", "files", "threads"):
        assert last[name] <= first[name], (name, first, last)
    assert (last["host"] - first["host"]) / (steps - WARM) < 2**17, (first, last)  # bytes a step; a batch here takes more
