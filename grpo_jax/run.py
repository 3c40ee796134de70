"""What every training program does around its loop: claim or resume the run's folder, keep its files, export at the end.

    begin        what a run needs besides its weights, read on every host and alike on all
    open_run     the weights and the run's state on the devices, from its newest checkpoint where there is one
    guarded      around the loop: what is kept when a run is asked to stop, is interrupted or fails
    update       an optimizer step on the run's state; one that is not finite is left out, noted, and stops the run in the end
    end_step     a step's row is logged, its state saved when it is time
    finish       the Hugging Face folder, the curves, the page of the run

All of it is called by all hosts together.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from grpo_jax import alarms, checkpoint, console, hosts, inputs, learner, metrics, packing, watchdog
from grpo_jax import config as configs
from grpo_jax import mesh as meshes
from grpo_jax.group import Group, flat
from grpo_jax.inputs import Policy, Task, Tasks
from grpo_jax.learner import Objective
from grpo_jax.packing import Pack, Packed
from grpo_jax.report import page
from models import decoder, hf, lora
from models.decoder import DecoderConfig, Params

KEPT_SKIPS = 10  # batches kept under skipped/
BEGAN = time.monotonic()


class Diverged(ValueError):
    """Too many optimizer steps in a row were not finite; the same on all hosts."""


@dataclass
class Run:
    """A run that is open: its state on the devices, and its files."""

    config: Any  # TrainConfig or SftConfig
    policy: Policy
    mesh: Mesh  # of the learner
    local: Mesh  # of the sampler: this host's devices
    state: dict[str, Any]  # {"params", "optimizer"}; with LoRA, of the adapters alone
    frozen: Params | None  # with LoRA, the model beside them in the compute dtype
    reference: Params | None  # the initial weights in the compute dtype, where a KL term wants them; with LoRA, `frozen`
    objective: Objective
    kernel: str  # of attention in learning
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    step: int  # the last whole one: of the checkpoint it resumed from, 0 for a new run; then of the loop
    meta: dict[str, Any]  # of the next checkpoint; under "pending" the row of `step` while it waits for its validation
    log: metrics.Log | None  # the first host's
    checkpoints: checkpoint.Checkpoints
    lock: IO[str] | None  # held while it is open, by the first host
    stop: hosts.Stop
    whole: bool = True  # whether `state` is that after `step`, and not within the next
    skipped: int = 0  # optimizer steps in a row, up to now, that were left out
    recent: deque[Mapping[str, Any]] = field(default_factory=lambda: deque(maxlen=alarms.STUCK))  # rows of the last steps
    longest: float = 0.0  # seconds of a step, validation and all; the first, which compiles, left out
    ended: float | None = None  # when the last step did, of time.monotonic
    said: set[str] = field(default_factory=set)  # what is said once


@dataclass(frozen=True)
class Ready:
    """What a run needs besides its weights, the same on all hosts."""

    policy: Policy
    tasks: Tasks
    mesh: Mesh  # of the learner
    local: Mesh  # of the sampler: this host's devices


def begin(config: Any, read_tasks: Callable[[Policy], Tasks], longest: int, options: str, tensor: int | None = None) -> Ready:
    """Reads model and data and lays out the devices; refuses, before anything is compiled, what a user must mend.

    A sequence may have `longest` tokens, which `options` set; `tensor` is --rollout.tensor. Raises ValueError, on the first
    host, for what any of them finds.
    """
    limit = hosts.memory()

    def prepare() -> Ready:
        policy = inputs.load_policy(config.model.path)
        mesh = meshes.make(meshes.chosen(config.mesh, policy.model, meshes.extents(), limit, lora=config.lora.rank > 0))
        meshes.shardings(mesh, policy.model)  # refuses what does not divide
        dtype = inputs.compute_dtype(config.learner)
        local = meshes.local(tensor or meshes.rollout_tensor(policy.model, dtype, jax.local_device_count(), limit))
        meshes.shardings(local, policy.model, section="rollout")
        inputs.check_context(policy.path, policy.model, longest, options)
        return Ready(policy, read_tasks(policy), mesh, local)

    ready = hosts.together(prepare)
    hosts.agree(lambda: inputs.identity(config, ready.policy, ready.tasks))
    return ready


def open_run(config: Any, program: str, ready: Ready, objective: Objective, optimizer_steps: int, stop: hosts.Stop) -> Run:
    """Loads the weights, and resumes the run from its newest whole checkpoint, or begins it.

    Raises ValueError where model, tokenizer or data changed since, where every checkpoint is damaged, and where another process
    is at work on the run.
    """
    lock = hosts.together(lambda: checkpoint.claim(config.run.dir) if hosts.is_main() else None)
    try:
        return _open(config, program, ready, objective, optimizer_steps, stop, lock)
    except BaseException:
        if lock:
            lock.close()
        raise


def _open(config, program, ready, objective, optimizer_steps, stop, lock) -> Run:
    """See `open_run`; the folder is this process's own."""
    policy, tasks, mesh, local = ready.policy, ready.tasks, ready.mesh, ready.local
    folder = Path(config.run.dir)
    changed = checkpoint.compare(config, program)
    # With LoRA as the file has them, so that their fingerprint does not depend on the dtype of the computation.
    params = hosts.together(lambda: inputs.load_params(policy, mesh, None if objective.lora else jnp.float32))
    optimizer, schedule = learner.make_optimizer(config.optimizer, optimizer_steps)
    kernel = inputs.attention_kernel(config.learner, policy.model)
    meta = {
        "program": program,
        "config": configs.to_dict(config),
        "fingerprints": inputs.fingerprints(policy, params, tasks),
        "resolved": {
            "device": jax.devices()[0].device_kind,
            "mesh": dict(mesh.shape),
            "hosts": jax.process_count(),
            "rollout_tensor": local.shape["tensor"],
            "dtype": objective.dtype,
            "attention": kernel,
        },
    }
    frozen = None
    if objective.lora:
        frozen = learner.cast(params, objective.dtype)
        reference = frozen if objective.kl_coefficient else None
        params = inputs.first_adapters(policy, mesh, objective.lora, config.run.seed)
    else:
        reference = jax.tree.map(jnp.copy, learner.cast(params, objective.dtype)) if objective.kl_coefficient else None
    if config.learner.offload in ("reference", "both") and reference is not None:
        reference = meshes.moved(reference, "pinned_host")
    checkpoints = checkpoint.Checkpoints(config.run.dir, config.checkpoint.keep, console.warn)
    # The optimizer's state is made only where there is none to restore, or there would be two for a while.
    restored = checkpoints.restore({"params": params, "optimizer": learner.state_shapes(optimizer, params)})
    if restored is None:
        state = {"params": params, "optimizer": learner.init_state(optimizer, params)}
    else:
        for name, value in meta["fingerprints"].items():
            if restored.meta["fingerprints"].get(name) != value:
                what = name.replace("_", " ")
                raise ValueError(
                    f"{config.run.dir}: the run began with another {what}; restore it, or choose another --run.dir"
                )
        state = restored.state
        # What was chosen for this kind of device stays chosen: the memory that is free today must not change a shape.
        if meta["resolved"].items() <= restored.meta["resolved"].items():
            meta["resolved"] = restored.meta["resolved"]
    if config.learner.offload in ("optimizer", "both"):
        state["optimizer"] = meshes.moved(state["optimizer"], "pinned_host")
    hosts.together(lambda: checkpoint.record(config, program) if hosts.is_main() else None)
    hosts.together(lambda: hosts.wait_for(folder / "config.json"))
    step = restored.step if restored else 0
    if restored is not None:
        meta |= {name: restored.meta[name] for name in ("place", "pending") if name in restored.meta}
    if restored is not None:
        before = restored.meta["resolved"]
        changed += [
            f"{name}: {before.get(name)} -> {value}" for name, value in meta["resolved"].items() if before.get(name) != value
        ]
        console.header(f"resuming {folder} after step {step}", [("changed", c) for c in changed])
    elif (folder / "metrics.jsonl").exists():
        console.warn(f"{folder}: no checkpoint to resume from; the run begins anew, over its old metrics and rollouts")
    log = hosts.together(
        lambda: metrics.Log.open(folder, step, config.run.tensorboard, "pending" in meta) if hosts.is_main() else None
    )
    return Run(
        config, policy, mesh, local, state, frozen, reference, objective, kernel, optimizer, schedule, step, meta, log,
        checkpoints, lock, stop,
    )  # fmt: skip


def weights(run: Run, dtype: str | None = None) -> Params:
    """The policy's weights, by layer, on this host's devices (`run.local`), in the compute dtype or another."""
    params = run.state["params"]
    if run.frozen is not None:
        params = lora.join(run.frozen, params, run.objective.lora)
    return meshes.host_copy(params, run.policy.model, dtype or run.objective.dtype, run.local.shape["tensor"])


@contextmanager
def stoppable(settings: configs.Run) -> Iterator[hosts.Stop]:
    """Around all of a program, once hosts are joined: who hears signals and the time limit."""
    with hosts.Stop(settings.time_limit, BEGAN) as stop:
        stop.nothing_to_lose = "nothing was begun that is not saved; the same command goes on"
        yield stop


@contextmanager
def guarded(run: Run) -> Iterator[None]:
    """Around the loop. However it ends, the last whole step is saved and the folder let go of; a run that was asked to stop
    exits with `hosts.STOPPED`. Where one of several hosts fails, the others would not come to the save: they do without."""
    try:
        yield
    except hosts.Stopped:
        _keep(run)
        kept = run.checkpoints.latest
        lost = f" (step {kept} is the newest that could be saved)" if kept < run.step else ""
        console.note(f"stopped after step {run.step}; the same command goes on from there{lost}")
        raise SystemExit(hosts.STOPPED) from None
    except BaseException as error:
        if jax.process_count() == 1 or isinstance(error, Diverged):
            _keep(run)
        raise
    run.checkpoints.wait()
    if any(asked for asked, _ in hosts.gather(run.stop.asked())):
        _keep(run)
        console.note(f"stopped after step {run.step}, the last; the same command writes the model")
        raise SystemExit(hosts.STOPPED)
    run.checkpoints.close()
    if run.checkpoints.latest == run.step:
        run.stop.nothing_to_lose = "all steps are saved; the same command writes the model"


def _keep(run: Run) -> None:
    """Saves the last whole step, if it is not saved, and lets go of the folder."""
    run.checkpoints.wait()
    if run.whole and run.step > run.checkpoints.latest:
        save(run)
    run.checkpoints.close()
    if run.log:
        run.log.close()
        run.lock.close()


def save(run: Run) -> None:
    """Starts saving the state as that after `run.step`, once its rows are on the disk."""
    waiting = run.log is not None and not run.log.sync()
    if any(told for told, _ in hosts.gather(waiting)):
        newest = run.checkpoints.latest
        console.warn(f"step {run.step} is not saved (the newest is step {newest}), and the run goes on: see to room and rights")
        return
    run.checkpoints.save(run.step, run.state, run.meta)


def end_step(run: Run, show: console.Progress, row: dict[str, Any], last: bool) -> None:
    """Logs the row of a step that is whole, and saves where it is time, or the `last`. Raises Diverged."""
    report(run, show, row)
    run.step, run.whole = row["step"], True
    run.meta.pop("pending", None)
    now = time.monotonic()
    if run.ended is not None:
        run.longest = max(run.longest, now - run.ended)
    run.ended = now
    run.checkpoints.poll()
    if last or run.step % run.config.checkpoint.every == 0:
        save(run)
    if run.skipped > run.config.optimizer.skips:
        raise Diverged(
            f"{run.skipped} optimizer steps in a row were not finite, the last in step {run.step}; nothing of them was "
            f"learned, and {Path(run.config.run.dir) / 'skipped'} has their batches. In a new run lower "
            "--optimizer.learning_rate; to go on past these batches, start the same command with a higher --optimizer.skips"
        )


def watching(run: Run, show: console.Progress) -> AbstractContextManager[None]:
    """The watchdog of this host, around the loop."""
    name = f"stalls{'' if hosts.is_main() else f'-{jax.process_index()}'}.txt"
    return watchdog.watching(Path(run.config.run.dir) / name, run.config.run.watchdog, show.where, console.warn)


def update(run: Run, objective: Objective, packs: Sequence[Pack]) -> dict[str, Any]:
    """One optimizer step from the micro-batches of a mini-batch; changes `run.state`. Returns what grpo_jax.learner.apply does,
    on the host."""
    run.whole, run.stop.nothing_to_lose = False, ""
    params, optimizer, sums = learner.update(
        run.policy.model, objective, run.optimizer, run.state["params"], run.state["optimizer"], packs, run.frozen
    )
    run.state = {"params": params, "optimizer": optimizer}
    sums = jax.device_get(sums)
    run.skipped = run.skipped + 1 if sums["skipped"] else 0
    return sums


def note_skipped(
    run: Run, step: int, done: Sequence[Mapping[str, Any]], tasks: Sequence[Task], groups: Sequence[Group]
) -> None:
    """Warns of the optimizer steps of a step that were left out, and keeps its batch: `skipped/step-N.npz`, the arrays of
    grpo_jax.group.flat with prompts and advantages, and under "about", in JSON, the rows' ids and what came of each update."""
    left_out = [i for i, sums in enumerate(done) if sums["skipped"]]
    if not left_out or not hosts.is_main():
        return
    bad = sorted({name for i in left_out for name, value in done[i].items() if not np.isfinite(value)})
    folder = Path(run.config.run.dir) / "skipped"
    row = f" ({run.skipped} in a row up to now; more than {run.config.optimizer.skips} end the run)" if run.skipped else ""
    console.warn(
        f"step {step}: {len(left_out)} of {len(done)} optimizer steps left out, for {', '.join(bad)} not finite; its batch is "
        f"in {folder}{row}"
    )
    about = {"step": step, "ids": [task.example.id for task in tasks], "updates": [metrics.plain(sums) for sums in done]}
    arrays = flat(groups) | {
        "prompt_length": np.array([len(group.prompt) for group in groups], np.int32),
        "prompts": np.concatenate([group.prompt for group in groups]),
        "advantages": np.array([np.zeros(len(g.responses)) if g.advantages is None else g.advantages for g in groups]),
        "about": np.array(json.dumps(about)),
    }
    try:
        folder.mkdir(exist_ok=True)
        if len(list(folder.iterdir())) < KEPT_SKIPS:
            np.savez(folder / f"step-{step}.npz", **arrays)
    except OSError as error:
        console.warn(f"{folder}: {error.strerror}")


def pack(run: Run, groups: Sequence[Group]) -> Packed:
    """The micro-batches of one mini-batch, on the devices."""
    packed = packing.pack(groups, run.config.learner.tokens_per_microbatch, meshes.shards(run.mesh), kernel=run.kernel)
    return replace(packed, packs=[packing.place(p, meshes.rows(run.mesh)) for p in packed.packs])


def padding(packed: Sequence[Packed]) -> dict[str, float]:
    """The share of padding among what the learner computes: tokens, and pairs of tokens in attention."""
    total = lambda name: sum(getattr(p, name) for p in packed)  # noqa: E731
    return {
        "learner/token_padding": 1 - total("tokens") / max(1, total("launched_tokens")),
        "learner/attention_padding": 1 - total("cells") / max(1, total("launched_cells")),
    }


def report(run: Run, show: console.Progress, row: dict[str, Any]) -> None:
    """Logs and shows the row of a step, with the learning rate of its last optimizer step."""
    # From the optimizer, not from the step: a step whose groups are all left out takes no optimizer step.
    taken = int(optax.tree_utils.tree_get_all_with_path(run.state["optimizer"], "count")[0][1])
    row["learning_rate"] = float(run.schedule(max(0, taken - 1)))
    if run.log:
        run.log.step(row)
        if run.log.problem and "log" not in run.said:
            run.said.add("log")
            console.warn(f"{run.config.run.dir}: {run.log.problem}; the run goes on: see to room and rights")
    show.step(row)
    if row["step"] and "started" not in run.said:
        run.said.add("started")
        console.note(f"the first step was done {time.monotonic() - BEGAN:.0f} s after the start, compilation included")


def watch(run: Run, row: Mapping[str, Any]) -> None:
    """Warns, once a run of each, of what a step's metrics are alarming for."""
    run.recent.append(row)
    for name, text in alarms.of(tuple(run.recent), run.meta["config"]).items():
        if name not in run.said:
            run.said.add(name)
            console.warn(f"step {row['step']}: {text}")


def finish(run: Run) -> None:
    """Writes the Hugging Face folder and the adapters', draws the curves, makes the page, and says what came of it."""
    folder = Path(run.config.run.dir)
    params = weights(run, run.config.export.dtype)
    own = None if run.frozen is None else meshes.replicated(run.state["params"])
    if not run.log:
        hosts.gather(None)  # the first host writes
        return
    run.log.close()
    params["layers"] = jax.tree.map(lambda *layers: np.stack(jax.device_get(layers)), *params["layers"])
    hf.save(folder / "hf", run.policy.model, params, run.policy.tokenizer, dtype=run.config.export.dtype)
    exported = [("model", str(folder / "hf"))]
    if run.frozen is not None:
        hf.save_adapter(folder / "adapter", run.policy.model, run.objective.lora, jax.device_get(own), run.policy.path)
        exported.append(("adapter", str(folder / "adapter")))
    drawn = metrics.curves(folder)
    made = report_page(folder)
    validated = [row for row in metrics.read(folder / "metrics.jsonl") if any(name.startswith("val/") for name in row)]
    places = [
        ("metrics", str(folder / "metrics.jsonl")),
        ("rollouts", str(folder / "rollouts.jsonl")),
        ("curves", str(drawn)),
        *([("page", str(made))] if made else []),
        ("checkpoints", str(folder / "checkpoints")),
        *exported,
    ]
    first, last = (validated[0], validated[-1]) if validated else ({}, {})
    console.closing(first, last, [(label, place) for label, place in places if Path(place).stat().st_size])
    run.lock.close()
    hosts.gather(None)


def report_page(folder: Path) -> Path | None:
    """Makes the page of the run; None, with a warning, where that fails: a finished run must not fail by it."""
    try:
        page.write([folder], folder / "report.html")
    except Exception as error:
        console.warn(
            f"{folder / 'report.html'} could not be made ({type(error).__name__}: {error}); the run is whole, and "
            f"python -m grpo_jax.report {folder} tries again"
        )
        return None
    return folder / "report.html"


def cache_compilations() -> None:
    """Keeps compiled programs in ~/.cache/grpo_jax, so that a program started again reads them.

    Where JAX_COMPILATION_CACHE_DIR names another folder it is that one; JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    if not jax.config.jax_compilation_cache_dir:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "grpo_jax"))
    # Below JAX's second, because a start has many small programs; above what reading a file takes.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


class Clock:
    """Seconds a step spends in each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began

    def metrics(self) -> dict[str, float]:
        return {
            **{f"time/{phase}": s for phase, s in self.seconds.items()},
            "time/step": time.perf_counter() - self._began,
        }


def free_memory(model: DecoderConfig, dtype: str, mesh: Mesh) -> int | None:
    """Bytes that are free on the first device beside a copy of the weights to sample with; None: not told."""
    stats = mesh.local_devices[0].memory_stats() or {}
    if not {"bytes_limit", "bytes_in_use"} <= stats.keys():
        return None
    shapes, places = jax.tree.leaves(decoder.shapes(model)), jax.tree.leaves(meshes.shardings(mesh, model))
    copy = sum(math.prod(place.shard_shape(x.shape)) for x, place in zip(shapes, places, strict=True))
    return stats["bytes_limit"] - stats["bytes_in_use"] - copy * jnp.dtype(dtype).itemsize


def memory() -> dict[str, float]:
    """Peak memory of this process, and of its first device where that tells, in GB."""
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    peak = {"memory/host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9}
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        peak["memory/device_gb"] = stats["peak_bytes_in_use"] / 1e9
    return peak
