"""Measuring in rounds: contenders and the machine's ceilings in turn, what each launched, and how much memory it took."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import flops
from grpo_jax.run import memory

# Of the ceilings, by kind of device: the side of the matrices, and how many float32 are copied.
SIZES = {"cpu": (2048, 2**26), "gpu": (8192, 2**28), "tpu": (8192, 2**28)}


@dataclass
class Contender:
    """One way of doing the work, and what was measured of it, round by round."""

    name: str
    run: Callable[[], dict[str, float]]  # does the work once, waits for it; facts about it, of which "time/..." are seconds
    part: str = ""  # a part of the work, timed alone; listed under the contender
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    times: list[dict[str, float]] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)
    calls: list[tuple[Any, tuple]] = field(default_factory=list)  # compiled calls of the first round


class Ceilings:
    """The fastest matrix product and the fastest copy of this machine, each the best of all tries."""

    def __init__(self, dtype: str):
        devices = jax.device_count()
        size, length = SIZES[jax.default_backend()]
        self._a = jnp.ones((size, size), dtype)
        self._x = jnp.zeros(length, jnp.float32)
        self._product, self._add = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1, donate_argnums=0)
        self._work = {"flops_per_second": 2 * size**3 * devices, "bytes_per_second": 2 * self._x.nbytes * devices}
        self._best = dict.fromkeys(self._work, math.inf)

    def measure(self) -> None:
        for _ in range(3):
            began = time.perf_counter()
            self._product(self._a, self._a).block_until_ready()
            middle = time.perf_counter()
            self._x = self._add(self._x).block_until_ready()
            for name, seconds in zip(self._best, (middle - began, time.perf_counter() - middle), strict=True):
                self._best[name] = min(self._best[name], seconds)

    def read(self) -> dict[str, float]:
        """FLOPs and bytes (read and written) a second, of all devices."""
        return {name: work / self._best[name] for name, work in self._work.items()}


@contextlib.contextmanager
def recording(modules: Sequence[ModuleType], calls: list[tuple[Any, tuple]]) -> Iterator[None]:
    """Notes every call from the host of a jitted function of the modules, with the shapes of its arguments.

    That says what is launched, however the modules arrange it; traced and counted later (`launched`), outside of the time.
    """
    jitted = type(jax.jit(lambda: None))
    found = [(m, name, f) for m in modules for name, f in vars(m).items() if isinstance(f, jitted)]

    def noting(f):
        def call(*args):
            if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args)):  # else part of a call noted itself
                calls.append((f, jax.tree.map(_shape, args)))
            return f(*args)

        return call

    for module, name, f in found:
        setattr(module, name, noting(f))
    try:
        yield
    finally:
        for module, name, f in found:
            setattr(module, name, f)


def _shape(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, (jax.Array, np.ndarray)) else x


def launched(calls: Sequence[tuple[Any, tuple]]) -> int:
    """FLOPs of the calls; equal ones are traced once."""
    known: dict[str, int] = {}
    total = 0
    for f, args in calls:
        key = f"{id(f)} {args}"
        if key not in known:
            known[key] = flops.count(f.trace(*args).jaxpr)
        total += known[key]
    return total


def peak_memory() -> dict[str, float]:
    """GB: of the process since the last call where Linux tells, else since its start; of a device since its start."""
    peak = memory()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                peak["memory/host_gb"] = int(line.split()[1]) * 1024 / 1e9
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is held now
    return {name.removeprefix("memory/"): value for name, value in peak.items()}


def time_round(
    contenders: Sequence[Contender], ceilings: Ceilings, modules: Sequence[ModuleType], advance: Callable[[], None]
) -> None:
    """Every contender does its work once; in its first round what it calls of the modules is noted."""
    for one in contenders:
        peak_memory()
        with contextlib.nullcontext() if one.seconds else recording(modules, one.calls):
            began = time.perf_counter()
            facts = one.run()
            one.seconds.append(time.perf_counter() - began)
        one.times.append({name: facts.pop(name) for name in list(facts) if name.startswith("time/")})
        one.facts |= facts
        one.memory = {k: max(v, one.memory.get(k, 0.0)) for k, v in peak_memory().items()}
        advance()
    ceilings.measure()
