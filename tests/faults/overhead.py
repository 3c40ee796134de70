"""What watchdog, checks and checksums cost of a step of the demo, in one run:

    python -m tests.faults.overhead [STEPS]

Each of them is timed where it is called, from the end of the first step on, in a run that saves at every step: the demo does so
more rarely. A call counts as long as the median of its kind, so that a compilation, once a run, is left out; what the start
takes is said apart. The choice between new and old parameters, compiled into the optimizer's step, is timed beside one
without it, in turns.
"""

from __future__ import annotations

import faulthandler
import functools
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from grpo_jax import checkpoint, config, hosts, learner, metrics, train
from grpo_jax import run as run_module

ROUNDS = 200


def main(steps: int) -> None:
    calls: defaultdict[str, list[float]] = defaultdict(list)
    at_start: Counter[str] = Counter()
    ends: list[float] = []

    def timed(where, name: str, label: str) -> None:
        function = getattr(where, name)

        @functools.wraps(function)
        def measured(*arguments, **named):
            began = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                took = time.perf_counter() - began
                if ends:
                    calls[label].append(took)
                else:
                    at_start[label] += took

        setattr(where, name, measured)

    timed(train, "watch", "alarms")
    timed(train, "note_skipped", "note of skipped batches")
    timed(hosts, "halt", "looks for a wish to stop")
    timed(checkpoint.Checkpoints, "poll", "look at the save under way")
    timed(checkpoint, "checksums", "checksums")
    timed(checkpoint, "fingerprint", "fingerprints")
    timed(metrics.Log, "sync", "rows to the disk before a save")
    kept = {}

    def step(run, *rest, end=run_module.end_step):
        end(run, *rest)
        kept["run"] = run
        ends.append(time.perf_counter())

    train.end_step = step
    options = ["--run.steps", str(steps), "--checkpoint.every", "1"]
    with tempfile.TemporaryDirectory() as folder:
        train.train(config.parse(config.TrainConfig, "overhead", ["demo", *options, "--run.dir", f"{folder}/run"]))
        arm = time.perf_counter()
        with (Path(folder) / "stalls.txt").open("a") as file:
            for _ in range(ROUNDS):
                faulthandler.dump_traceback_later(1000, repeat=True, file=file)
            faulthandler.cancel_dump_traceback_later()
        arm = (time.perf_counter() - arm) / ROUNDS
    whole = ends[-1] - ends[0]
    typical = statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False))
    each = {label: len(took) / (steps - 1) * statistics.median(took) for label, took in calls.items()}
    each["watchdog"] = typical / (60 * config.Run().watchdog / 4) * arm
    each["the choice in the optimizer's step"] = chosen(kept["run"])
    each["together"] = sum(each.values())
    print(f"\n{steps} steps, {typical:.2f} s a step (median), {whole / (steps - 1):.2f} s (mean, validation included)")
    for name, value in sorted(each.items(), key=lambda one: one[1]):
        print(f"{name:40}{1000 * value:10.3f} ms a step{value / typical:10.4%}")
    for name, value in at_start.most_common():
        print(f"{name:40}{1000 * value:10.3f} ms at the start, compilation included")


def chosen(run: run_module.Run) -> float:
    """Seconds that an optimizer step takes longer for looking whether it is finite; the median of turns."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def plain(params, state, sums):
        count = jnp.maximum(sums.count, 1)
        gradient = jax.tree.map(lambda g: g / count.astype(g.dtype), sums.gradient)
        updates, state = run.optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, optax.tree.norm(gradient)

    sums = learner.zeros(run.state["params"])
    took = {"plain": [], "ours": []}
    params, state = run.state["params"], run.state["optimizer"]
    for _ in range(ROUNDS):
        for name, apply in (("plain", plain), ("ours", functools.partial(learner.apply, run.optimizer))):
            began = time.perf_counter()
            params, state, _ = jax.block_until_ready(apply(params, state, sums))
            took[name].append(time.perf_counter() - began)
    return statistics.median(b - a for a, b in zip(took["plain"], took["ours"], strict=True))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
