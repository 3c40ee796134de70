"""Checkpoints of a run, and its right to resume.

On several hosts, all call these together, and all see the same folder.

    compare        whether the run's folder holds nothing, or the same run; anything else is refused
    claim          the folder and its lock
    record         its config.json
    Checkpoints    asynchronous, atomic saves by Orbax of a state (a pytree of arrays) and `meta` (plain JSON)
    read_params    the weights alone of a checkpoint, whatever devices it was written from
    read_meta      its `meta`
    fingerprint    a short hash of anything in JSON: data, template, tokenizer

Orbax writes a checkpoint beside its place and renames it, so a kill leaves none or a whole one. It does not notice a
byte that flipped later; so `meta` also holds, for every array, the modular sum of its bits, which does not depend on how
the array is sharded, and a hash of itself; restoring compares. A save that fails, for want of room say, leaves the run alive
and the checkpoints before it as they were.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import inspect
import json
import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import Array

from grpo_jax import config as configs
from grpo_jax import hosts
from grpo_jax import mesh as meshes

State = Any
_LOCK, _PARTIAL = "lock", "config.tmp"  # files in a run's folder


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was found whole."""

    step: int
    state: State
    meta: dict[str, Any]


def fingerprint(value: Any) -> str:
    """16 hex digits of the SHA-256 of the value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def compare(config: Any, program: str) -> list[str]:
    """Whether the run's folder can take this config; changes nothing.

    Returns the operational fields that changed since the run began, as "field: old -> new". Raises ValueError, naming
    them, where identity fields differ, where the folder is of another program, and where it holds something that is no run.
    """
    folder = Path(config.run.dir)
    file = folder / "config.json"
    if not file.exists():
        begun = {_LOCK, _PARTIAL}  # what a kill within `claim` leaves
        if folder.exists() and (not folder.is_dir() or any(found.name not in begun for found in folder.iterdir())):
            raise ValueError(f"{folder} is not empty and holds no run (no config.json); choose another --run.dir")
        return []
    try:
        before = json.loads(file.read_text())
        owner = before.pop("program")
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{file}: not the config of a run; choose another --run.dir, or delete the folder") from None
    if owner != program:
        raise ValueError(f"{folder} holds a run of {owner}, not of {program}; choose another --run.dir")
    identity, changed = configs.differences(before, config)
    if identity:
        raise ValueError(
            f"{folder} holds a run with other values of {'; '.join(identity)}; give the old values, or another --run.dir"
        )
    return changed


def claim(run_dir: str | Path) -> IO[str]:
    """Makes the run's folder and locks it: two processes would cut off and overwrite each other's rows and checkpoints.

    The lock lasts as long as the file that is returned is open, so at most as long as this process. Raises ValueError,
    naming the owner, where another process holds it.
    """
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / _LOCK).open("a+")
    with contextlib.suppress(OSError):  # some network file systems know no locks
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read(200).strip()
            lock.close()
            raise ValueError(
                f"{folder}: another process is at work on this run{f' ({owner})' if owner else ''}; wait for it, end it, or "
                "choose another --run.dir"
            ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    lock.flush()
    return lock


def record(config: Any, program: str) -> None:
    """Writes the config.json of a run whose folder was claimed, whole or not at all."""
    partial = Path(config.run.dir) / _PARTIAL
    partial.write_text(json.dumps({"program": program, **configs.to_dict(config)}, indent=2) + "\n")
    os.replace(partial, partial.with_name("config.json"))


class Checkpoints:
    """The folder `checkpoints/` of a run, of which `keep` are kept; `warn` is told what went wrong and was got over."""

    def __init__(self, run_dir: str | Path, keep: int, warn: Callable[[str], None]):
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs each file it touches, and each error four times
        self._folder = (Path(run_dir) / "checkpoints").resolve()
        self._keep = keep
        self._warn = warn
        self.latest = 0  # the step of the newest checkpoint that was restored, or is saved
        self._under_way: int | None = None  # the step that is being saved
        self._manager: ocp.CheckpointManager | None = None

    def restore(self, like: State) -> Restored | None:
        """The newest checkpoint that is whole, or None where there is none at all.

        `like` is a pytree of arrays with the shapes, dtypes and shardings to restore to. A damaged checkpoint is warned
        about and, once an older one is found whole, renamed to damaged-STEP. Raises ValueError where all are damaged.
        """
        steps = sorted((int(p.name) for p in self._folder.glob("*") if p.name.isdigit()), reverse=True)
        steps = hosts.gather(steps)[0][0]  # as the first host sees the folder
        hosts.together(lambda: [hosts.wait_for(self._folder / str(step)) for step in steps])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        damaged: list[tuple[int, str]] = []
        _silence_unfinished_reads()
        for step in steps:
            restored, why = None, None
            try:
                restored = self._read(step, abstract)
            except Exception as error:  # Orbax and tensorstore raise a dozen kinds for a file cut short
                why = _in_short(error)
            whys = [why for why, _ in hosts.gather(why) if why is not None]
            if whys:
                damaged.append((step, whys[0]))
                continue
            for bad, why in damaged if hosts.is_main() else ():
                earlier = len(list(self._folder.glob(f"damaged-{bad}*")))
                aside = self._folder / (f"damaged-{bad}-{earlier + 1}" if earlier else f"damaged-{bad}")
                self._warn(
                    f"checkpoint {self._folder / str(bad)} is damaged ({why}); now {aside.name}, going on from step {step}"
                )
                (self._folder / str(bad)).rename(aside)
            hosts.gather(None)  # no host goes on before the names are what they will be
            self.latest = step
            return restored
        if damaged:
            step, why = damaged[0]
            mend = "restore one from a backup, or choose another --run.dir"
            raise ValueError(f"{self._folder}: every checkpoint is damaged (step {step}: {why}); {mend}")
        return None

    def _read(self, step: int, abstract: State) -> Restored:
        with ocp.CheckpointManager(self._folder) as manager:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore())
            found = manager.restore(step, args=args)
        _verify(found.state, found.meta)
        return Restored(step, found.state, found.meta)

    def save(self, step: int, state: State, meta: dict[str, Any]) -> None:
        """Starts saving; returns once the state is copied, so that its buffers may be donated.

        A save that fails, now or before it is done, is warned about; `latest` stays, and so does what it stands for.
        """
        self.wait()
        if self._manager is None:
            if hosts.is_main():
                self._sweep()
            hosts.gather(None)

        def begin() -> None:
            if self._manager is None:
                options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, enable_async_checkpointing=True)
                self._manager = ocp.CheckpointManager(self._folder, options=options)
            here = meshes.moved(state, "device")  # what rests in host memory; computing its checksums needs it there
            whole = {**meta, "step": step, "checksums": checksums(here)}
            whole["digest"] = fingerprint(whole)
            items = ocp.args.Composite(state=ocp.args.StandardSave(here), meta=ocp.args.JsonSave(whole))
            self._manager.save(step, args=items)

        self._under_way = step
        self._attempt(begin)

    def poll(self) -> None:
        """Notices, without waiting, how a save has ended. With several hosts only `wait` does, which all reach together."""
        if self._under_way is not None and jax.process_count() == 1 and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits for a save under way."""
        if self._under_way is not None and self._attempt(self._manager.wait_until_finished):
            self.latest, self._under_way = self._under_way, None

    def close(self) -> None:
        """Waits for a save under way, and lets go of Orbax's threads."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _attempt(self, part: Callable[[], Any]) -> bool:
        """Does a part of a save. Where it fails, on any host, the save is given up, on all: warned about and cleared away."""
        why = None
        try:
            part()
        except Exception as error:  # of many kinds, as in `restore`
            why = _in_short(error)
        whys = [why for why, _ in hosts.gather(why) if why is not None]
        if whys:
            step, self._under_way = self._under_way, None
            newest = f"the newest is that of step {self.latest}" if self.latest else "there is none yet"
            self._warn(
                f"checkpoint {step} could not be saved ({whys[0]}); {newest}, and the run goes on: see to room and rights in "
                f"{self._folder}"
            )
            with contextlib.suppress(Exception):  # that of the save, once more
                self._manager.close()
            self._manager = None
            if hosts.is_main():
                self._sweep()
        return not whys

    def _sweep(self) -> None:
        """Removes what saves that were killed, or failed, have left: else each would hold the room of a checkpoint."""
        for partial in self._folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(partial, ignore_errors=True)


def _silence_unfinished_reads() -> None:
    """When one read of a restore fails, Orbax leaves the others unfinished; each would print a traceback of its own, when
    it ends (its event loop is closed) or when Python collects it."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # "exception was never retrieved"
    excepthook, unraisablehook = sys.excepthook, sys.unraisablehook
    closed = lambda error: isinstance(error, RuntimeError) and "Event loop is closed" in str(error)  # noqa: E731
    sys.excepthook = lambda kind, error, trace: None if closed(error) else excepthook(kind, error, trace)
    sys.unraisablehook = lambda u: None if inspect.iscoroutine(u.object) or closed(u.exc_value) else unraisablehook(u)


def read_params(run_dir: str | Path, shapes: Any, step: int | None = None) -> Any:
    """The parameters in the checkpoint of `step`, or in the newest one, as numpy arrays.

    `shapes` is a pytree of what they must be (`.shape`, `.dtype`). Nothing else of the checkpoint is read, and the devices
    it was written from need not be here. Raises FileNotFoundError where there is none, ValueError where it cannot be read.
    """
    wanted = {"params": shapes}
    as_numpy = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype), wanted)
    state = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
    return _found(run_dir, step, state=state).state["params"]


def read_meta(run_dir: str | Path, step: int | None = None) -> dict[str, Any]:
    """What `Checkpoints.save` was given beside the state; which checkpoint, and errors, as in `read_params`."""
    return _found(run_dir, step).meta


def _found(run_dir: str | Path, step: int | None, **items: ocp.args.CheckpointArgs) -> Any:
    """The items of a checkpoint and its `meta`, by which the state is verified if it is among them."""
    folder = (Path(run_dir) / "checkpoints").resolve()
    steps = sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())
    if not steps or (step is not None and step not in steps):
        there = ", ".join(map(str, steps)) or "none"
        raise FileNotFoundError(f"{folder}: no checkpoint{'' if step is None else f' of step {step}'}; there are: {there}")
    step = steps[-1] if step is None else step
    _silence_unfinished_reads()
    try:
        with ocp.CheckpointManager(folder) as manager:
            found = manager.restore(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonRestore()))
        _verify(found.state if "state" in items else {}, found.meta)
        return found
    except Exception as error:  # of a dozen kinds, as in `restore`
        why = _in_short(error)
        raise ValueError(f"{folder / str(step)}: cannot be read ({why}); take another step") from None


def _in_short(error: Exception) -> str:
    """What Orbax or tensorstore raise, in a line."""
    return " ".join(str(error).split()).split(". See full")[0].split(" [source locations")[0][:200] or type(error).__name__


def _verify(state: State, meta: dict[str, Any]) -> None:
    """Raises ValueError where a state, or a part of one, or `meta` is not what was saved."""
    written = meta.pop("digest", None)  # none: by a program from before there was one
    if written is not None and written != fingerprint(meta):
        raise ValueError("its metadata are not those that were saved")
    for name, value in checksums(state).items():
        if value != meta["checksums"].get(name):
            raise ValueError(f"the checksum of {name} is {value}, not {meta['checksums'].get(name)}")


def checksums(state: State) -> dict[str, int]:
    """For every array, by its path: the sum of its bits as unsigned integers, modulo 2**32."""
    paths = jax.tree_util.tree_leaves_with_path(state)
    sums = jax.device_get(_sums([leaf for _, leaf in paths]))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): int(value) for (path, _), value in zip(paths, sums, strict=True)
    }


@jax.jit
def _sums(leaves: list[Array]) -> list[Array]:
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
    return [jax.lax.bitcast_convert_type(x, bits[x.dtype.itemsize]).astype(jnp.uint32).sum(dtype=jnp.uint32) for x in leaves]
