"""Many steps of one process: memory of host and device, open files and threads stay what they were.

python -m pytest -m slow tests/faults/test_long.py -k 60       # two or three minutes; without -k, 500 steps, too
"""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from pathlib import Path

import jax
import pytest

from grpo_jax import run as run_module
from grpo_jax import train
from tests.grpo_jax.small_run import small

WARM = 30  # steps, after which nothing is new


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
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="wants glibc, and Linux's /proc")
@pytest.mark.parametrize("steps", [60, 500])
def test_nothing_grows(steps, tiny_model, tmp_path, monkeypatch):
    seen, end_step = [], run_module.end_step

    def watched(run, *rest):
        end_step(run, *rest)
        run.checkpoints.wait()  # what a save holds while it is under way is no growth,
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # nor is what is free and not given back yet
        seen.append(held())

    monkeypatch.setattr(train, "end_step", watched)
    # Twice the same steps: what a shape that comes up late takes, tens of megabytes for its program, is there already.
    for name in ("compiles", "counts"):
        seen.clear()
        train.train(small(tiny_model, tmp_path / name, **{"run.steps": steps, "checkpoint.every": 5, "run.tensorboard": True}))
    first, last = seen[WARM - 1], seen[-1]
    for one, window in ((first, seen[WARM - 5 : WARM]), (last, seen[-5:])):
        one["host"] = max(now["host"] for now in window)  # it dips now and then
    print({name: (first[name], last[name]) for name in first})
    assert len(seen) == steps
    for name in ("arrays", "device", "files", "threads"):
        assert last[name] <= first[name], (name, first, last)
    assert (last["host"] - first["host"]) / (steps - WARM) < 2**17, (first, last)  # bytes a step; a batch here takes more
