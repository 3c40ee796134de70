"""Several hosts, one run: every host starts the same program, one process each, and JAX's own runtime joins them.

    start       joins the hosts that a launcher (Slurm, Open MPI, a TPU pod) or flags name; alone it does nothing
    share       which items of a batch are this host's, and `whole`, the batch again from the shares of all
    gather      what every host has to say, on every host
    together    one function on every host; the error of one is the error of all
    agree       what must be the same on all of them
    Stop        a wish to stop (SIGTERM, SIGINT, a time limit) on one host, known to all
    halt        stops here, on all hosts, where one was asked to

The learner is one program over all devices. Sampling and rewards are each host's own; in between, the hosts give each other
their groups whole, a few megabytes, so that every host knows the same batch, packs it alike and counts the same metrics.
Only the first host writes files and speaks.

When a host dies, the others are ended by JAX's runtime (SIGABRT) once its heartbeat has been missing for HEARTBEAT seconds,
or sooner by the collective that it is missing from: nothing may rely on being cleaned up.
"""

from __future__ import annotations

import io
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from grpo_jax import config, console

HEARTBEAT = 30  # seconds; JAX's own 100 would let a job of many GPUs wait for as long
RESERVE = 60  # seconds of --run.time_limit kept for saving; of short limits, a tenth
STOPPED = 75  # exit code of a run that was asked to stop and can go on: EX_TEMPFAIL of sysexits.h
_PATIENCE = 300  # seconds that hosts wait for each other at the start
_CHUNK = 2**25  # bytes that a host gives the others at a time: they pass through the memory of its devices
_SAME = 0.2  # seconds within which two signals are one that came twice: to a group of processes, and passed on by its leader
_STOP = "grpo_jax/stop"  # a folder in the store of JAX's runtime
_ANOTHER = "another host was asked to stop"

Item = TypeVar("Item")
Result = TypeVar("Result")


class Stopped(Exception):
    """The run was asked to stop; what it has done is kept as far as the checkpoint that is written next."""


def start(settings: config.Hosts) -> None:
    """Joins the hosts. To be called before anything asks JAX for devices.

    Raises ValueError where the flags are not complete, or the hosts do not find each other.
    """
    flags = {"coordinator": settings.coordinator, "count": settings.count, "index": settings.index}
    given = {name for name, value in flags.items() if value is not None}
    tasks = _tasks(os.environ)
    if settings.launcher == "none" or (settings.launcher == "auto" and not given and tasks is None and not _tpu_pod()):
        return
    count, index = settings.count, settings.index
    where = f" at {settings.coordinator}" if settings.coordinator else ""
    if given == {"coordinator"} and tasks and "OMPI_COMM_WORLD_RANK" in os.environ:  # Open MPI 5 says the rest
        count, index = tasks[0], int(os.environ["OMPI_COMM_WORLD_RANK"])
    elif given and given != set(flags):
        missing = ", ".join(f"--hosts.{name}" for name in flags if name not in given)
        raise ValueError(f"{missing} missing: several hosts need --hosts.coordinator, --hosts.count and --hosts.index")
    if settings.coordinator and not settings.coordinator.rpartition(":")[2].isdigit():
        raise ValueError(f"--hosts.coordinator {settings.coordinator}: add the port, as in {settings.coordinator}:1234")
    if count is not None and not index < count:
        raise ValueError(f"--hosts.index {index}: with --hosts.count {count} it is one of 0 ... {count - 1}")
    print(f"waiting for the other hosts{where}, up to {_PATIENCE} s", file=sys.stderr, flush=True)
    # JAX's own service for preemptions would take SIGTERM away from `Stop`.
    jax.config.update("jax_enable_preemption_service", False)
    # Left to itself under Slurm or Open MPI, JAX takes one device for each process: here a process has all of its host.
    alone = tasks is None or tasks[1] == 1
    try:
        jax.distributed.initialize(
            settings.coordinator, count, index, [] if alone else None,
            initialization_timeout=_PATIENCE, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=HEARTBEAT,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"the hosts did not find each other{where} ({why}); see docs/scale.md") from error
    counts = {process: 0 for process in range(jax.process_count())}
    for device in jax.devices():
        counts[device.process_index] += 1
    if len(set(counts.values())) > 1:
        raise ValueError(f"the hosts have different numbers of devices ({', '.join(map(str, counts.values()))})")
    console.CONSOLE.quiet = not is_main()


def _tasks(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """(tasks, tasks on a host) that Slurm's srun or Open MPI's mpirun has started, where there is more than one."""
    number = lambda name: int(environment.get(name, 0))  # noqa: E731
    if "SLURM_STEP_NODELIST" in environment and "SLURM_PROCID" in environment:
        tasks, on_host = number("SLURM_NTASKS"), -(-number("SLURM_NTASKS") // max(1, number("SLURM_STEP_NUM_NODES")))
    else:
        tasks, on_host = number("OMPI_COMM_WORLD_SIZE"), number("OMPI_COMM_WORLD_LOCAL_SIZE")
    return (tasks, on_host) if tasks > 1 else None


def _tpu_pod() -> bool:
    """Whether the environment of this process names the several workers of a TPU pod, as GKE's does."""
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") and os.environ.get("JAX_PLATFORMS") != "cpu"


def is_main() -> bool:
    """Whether this host is the one that writes files and speaks."""
    return jax.process_index() == 0


# ---------------------------------------------------------------- what hosts tell each other


def share(batch: Sequence[Item]) -> list[Item]:
    """This host's part: every so-manieth item, so that neighbours in length come to different hosts."""
    return list(batch[jax.process_index() :: jax.process_count()])


def whole(shares: Sequence[Sequence[Item]]) -> list[Item]:
    """The batch in its order, from the `share` of every host."""
    count, total = len(shares), sum(map(len, shares))
    return [shares[i % count][i // count] for i in range(total)]


def gather(plain: Any, arrays: Mapping[str, np.ndarray] | None = None) -> list[tuple[Any, dict[str, np.ndarray]]]:
    """(plain, arrays) of every host, in the order of hosts; `plain` is JSON. Every host must call it, in the same place."""
    arrays = dict(arrays or {})
    if jax.process_count() == 1:
        return [(plain, arrays)]
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, plain=np.frombuffer(json.dumps(plain).encode(), np.uint8), **arrays)
    found = []
    for data in _gather_bytes(file.getvalue()):
        with np.load(io.BytesIO(data), allow_pickle=False) as read:
            both = dict(read)
        found.append((json.loads(both.pop("plain").tobytes()), both))
    return found


def _gather_bytes(data: bytes) -> list[bytes]:
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    pieces = []
    for begin in range(0, int(sizes.max()), _CHUNK):
        width = min(_CHUNK, 1 << (int(sizes.max()) - begin - 1).bit_length())  # few sizes: each is compiled
        part = np.frombuffer(data[begin : begin + width], np.uint8)
        pieces.append(multihost_utils.process_allgather(np.pad(part, (0, width - len(part)))))
    joined = np.concatenate(pieces, 1)
    return [row[:size].tobytes() for row, size in zip(joined, sizes, strict=True)]


def together(f: Callable[[], Result]) -> Result:
    """f() on every host. Where it raises ValueError or OSError on any, all stop: the first host with it, the others mute.

    f may not wait for other hosts.
    """
    if jax.process_count() == 1:
        return f()
    result, problem = None, None
    try:
        result = f()
    except (ValueError, OSError) as error:
        problem = error
    told = [text for text, _ in gather(None if problem is None else str(problem) or type(problem).__name__)]
    if any(text is not None for text in told):
        _end(problem or ValueError("; ".join(f"host {i}: {text}" for i, text in enumerate(told) if text is not None)))
    return result


def agree(what: Callable[[], dict[str, str]]) -> None:
    """Ends the run, with the first host saying which, where hosts do not have the same under one of the names of `what`()."""
    if jax.process_count() == 1:
        return
    told = [values for values, _ in gather(what())]
    for name in told[0]:
        if len({values[name] for values in told}) > 1:
            which = ", ".join(values[name] for values in told)
            _end(ValueError(f"hosts differ in {name} ({which}); give all of them the same"))


def _end(problem: Exception) -> NoReturn:
    """Raises the error on the first host and exits on the others, all of them being here."""
    first = is_main()
    jax.distributed.shutdown()  # in order, or each would wait for the others at its exit
    if not first:
        sys.exit(2)
    raise problem


def wait_for(path: Path, seconds: int = 60) -> None:
    """Waits for what another host has written, as long as a network file system may take to show it; else ValueError."""
    began = time.monotonic()
    while not path.exists():
        if time.monotonic() - began > seconds:
            raise ValueError(f"{path} is not seen here, but by the first host; give a --run.dir that all hosts share")
        time.sleep(0.5)


def memory() -> int | None:
    """Bytes that a device may use, the least of all hosts; None where one does not tell it, as a CPU."""
    told = [limit for limit, _ in gather((jax.local_devices()[0].memory_stats() or {}).get("bytes_limit"))]
    return None if None in told else min(told)


def free_memory() -> int | None:
    """Bytes of this host's own memory that programs may still take; None where the system does not tell (no Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


# ---------------------------------------------------------------- a wish to stop


class Stop:
    """Takes SIGTERM and SIGINT, as a context manager: the first asks the run to stop at the next place where nothing is lost, a
    second ends the process at once. When `minutes` since `began` (of time.monotonic) are nearly over, that asks, too.

    A thread hears them, because Python's own handlers wait while the main thread is within a compilation or on the device. To
    be entered after `start`, whose runtime would take the signals over, and on the main thread.
    """

    def __init__(self, minutes: float | None = None, began: float = 0.0):
        self.nothing_to_lose = ""  # while all that was done is saved: what to say, on the one host there is, and leave at once
        self._asked, self._say = False, ""
        self._signalled: float | None = None  # when this process was, first
        self._deadline = math.inf if minutes is None else began + 60 * minutes - min(RESERVE, 6 * minutes)

    def __enter__(self) -> Stop:
        self._ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        self._before = {one: signal.signal(one, lambda *_: None) for one in (signal.SIGTERM, signal.SIGINT)}
        self._woken = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._woken)
        for one, handler in self._before.items():
            signal.signal(one, handler)
        self._mouth.close()  # which ends the thread

    def _listen(self) -> None:
        while numbers := self._ear.recv(64):  # those that came together are one
            ours = [number for number in numbers if number in self._before]
            if ours:
                self._take(signal.Signals(ours[0]))
        self._ear.close()

    def _take(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self._signalled is not None and now - self._signalled > _SAME:
            _leave(f"{number.name} again: ended at once", 128 + number)
        if self.nothing_to_lose and not jax.distributed.is_initialized():
            _leave(f"{number.name}: {self.nothing_to_lose}", STOPPED)
        if self._signalled is None:
            self._signalled = now
            if not self._asked:
                self._asked, self._say = True, number.name

    def asked(self, ahead: float = 0.0) -> bool:
        """Whether this host was asked, or heard that another was, or has less than `ahead` seconds left of its time limit."""
        client, how = _client(), "stopping, to be resumed by the same command; a second signal ends it at once"
        if not self._asked and time.monotonic() + ahead > self._deadline:
            self._asked, self._say = True, "the time limit is near"
        if self._say:
            console.warn(f"{self._say}: {how}")
            self._say = ""
        if client is not None and self._asked:
            client.key_value_set(f"{_STOP}/{jax.process_index()}", "", allow_overwrite=True)
        elif client is not None and client.key_value_dir_get(_STOP):
            self._asked = True
            console.warn(f"{_ANOTHER}: {how}")
        return self._asked

    def told(self) -> None:
        """Another host was asked to stop, and this one may not have heard of it yet."""
        if not self._asked:
            self._asked, self._say = True, _ANOTHER
            self.asked()


def halt(stop: Stop, ahead: float = 0.0) -> None:
    """Raises Stopped, on all hosts, where one was asked to stop, or will be within `ahead` seconds by its time limit."""
    if any(asked for asked, _ in gather(stop.asked(ahead))):
        stop.told()
        raise Stopped


def _leave(text: str, code: int) -> NoReturn:
    """Ends the process, whatever its other threads are at."""
    shown = b"\x1b[?25h\n" if os.isatty(2) else b""  # the cursor, which the display hides
    os.write(2, shown + text.encode() + b"\n")
    os._exit(code)


def _client() -> Any:
    """Of the store that JAX's runtime keeps for all hosts, which can be read while others are busy. Of no public name yet."""
    from jax._src import distributed

    return distributed.global_state.client
