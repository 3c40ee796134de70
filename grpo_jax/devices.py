"""Known accelerators: what one holds and how fast it is by its data sheet, and machines of them for the ahead-of-time compiler.

    parse      `v5e:8x8`, `h100:4x8` -> Topology
    open_      a Topology -> its devices, and those of one host, as the compiler of that hardware describes them

Nothing here needs such a device. `jax[tpu]` brings the compiler for TPUs, `jax[cuda13]` the one for NVIDIA GPUs.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Device:
    """One TPU chip or GPU. Rates are peaks of the data sheet, in one direction."""

    name: str
    platform: str  # "tpu" or "gpu", as jax names it
    memory: float  # bytes that a program can have: what the compiler or the driver reports
    flops: float  # bfloat16 products, FLOP/s
    bandwidth: float  # of its memory, bytes/s
    link: float  # bytes/s that it receives from its neighbours: of the host, on TPUs of the slice
    network: float  # bytes/s that it receives from other hosts
    local: int  # devices that one host has
    target: str = ""  # GPUs: what the compiler wants to know besides


_GIB = 2**30
# Cores, registers and shared memory: CUDA programming guide, "Compute Capabilities".
_TARGET = """
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: 0 }}
  core_count: {cores}  fpus_per_core: {fpus}  clock_rate_ghz: {clock}
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: {shared}  shared_memory_per_core: {shared_core}
  l2_cache_size: {l2}  memory_bandwidth: {bandwidth:.0f}  device_memory_size: {memory:.0f}
}}
platform_name: "CUDA"
device_description_str: "{description}"
dnn_version_info {{ major: 9 minor: 10 }}
"""
_AMPERE = dict(major=8, cores=108, fpus=64, clock=1.41, shared=166912, shared_core=167936, l2=41943040)
_HOPPER = dict(major=9, cores=132, fpus=128, clock=1.98, shared=232448, shared_core=233472, l2=52428800)


def _gpu(name: str, memory: float, flops: float, bandwidth: float, link: float, network: float, chip: dict, described: str):
    target = _TARGET.format(bandwidth=bandwidth, memory=memory, description=described, **chip)
    return Device(name, "gpu", memory, flops, bandwidth, link, network, 8, target)


DEVICES = {
    device.name: device
    for device in (
        # TPUs: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e. Links: half of the two-way rate, or all one-way links of a
        # chip. What programs can have of the memory is what libtpu's compiler says on refusing one that wants more.
        # Slices of several hosts are never left, so `network` is the same as `link`.
        Device("v4", "tpu", 31.25 * _GIB, 275e12, 1228e9, 150e9, 150e9, 4),
        Device("v5e", "tpu", 15.75 * _GIB, 197e12, 819e9, 200e9, 200e9, 4),
        Device("v5p", "tpu", 95.74 * _GIB, 459e12, 2765e9, 600e9, 600e9, 4),
        Device("v6e", "tpu", 31.25 * _GIB, 918e12, 1640e9, 400e9, 400e9, 4),
        # NVIDIA data sheets "A100 80GB", "H100", "H200" (SXM; FLOP/s without sparsity, NVLink halved to one direction).
        # Networks: those of DGX A100, H100, H200, a card of 200 or 400 Gbit/s a GPU.
        _gpu("a100", 84.97e9, 312e12, 2039e9, 300e9, 25e9, _AMPERE, "NVIDIA A100-SXM4-80GB"),
        _gpu("h100", 84978434048, 989e12, 3352.32e9, 450e9, 50e9, _HOPPER, "NVIDIA H100 80GB HBM3"),
        _gpu("h200", 150e9, 989e12, 4.8e12, 450e9, 50e9, _HOPPER, "NVIDIA H200"),
    )
}


@dataclass(frozen=True)
class Topology:
    """Some devices of one kind."""

    device: Device
    extents: tuple[int, ...]  # TPUs: chips along each axis; GPUs: (hosts, GPUs of each)

    @property
    def count(self) -> int:
        return math.prod(self.extents)

    @property
    def local(self) -> int:
        """Devices of one host."""
        return self.extents[1] if self.device.platform == "gpu" else min(self.count, self.device.local)

    def __str__(self) -> str:
        return f"{self.device.name}:{'x'.join(map(str, self.extents))}"


def parse(text: str) -> Topology:
    """Reads `v5e:8x8`, `v5p:4x4x4`, `h100:8` or `h100:4x8` (hosts x GPUs). Raises ValueError, in one line."""
    name, _, extents = text.lower().partition(":")
    if name not in DEVICES:
        raise ValueError(f"--topology {text}: unknown device {name!r}; known are {', '.join(DEVICES)}")
    device = DEVICES[name]
    axes = {"v5e": 2, "v6e": 2}.get(name, 3)
    example = "8 or 4x8 (hosts x GPUs)" if device.platform == "gpu" else "x".join("4" * axes)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", extents):
        raise ValueError(f"--topology {text}: after the colon comes the shape of the machine, like {name}:{example}")
    sizes = tuple(map(int, extents.split("x")))
    if device.platform == "gpu":
        sizes = (1, *sizes) if len(sizes) == 1 else sizes
        axes = 2
    if len(sizes) != axes:
        raise ValueError(f"--topology {text}: {name} has shapes of {axes} numbers, like {name}:{example}")
    if device.platform == "gpu" and sizes[1] > device.local:
        raise ValueError(f"--topology {text}: a host has up to {device.local} GPUs; write {name}:HOSTSx{device.local}")
    return Topology(device, sizes)


def prepare() -> None:
    """Settles what jax and libtpu read when they start: no device is looked for, on this machine or in a cloud."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    jax.config.update("jax_platforms", "cpu")


def open_(topology: Topology) -> tuple[list[Any], list[Any]]:
    """(all devices, those of one host), to compile for. After `prepare`.

    Raises ValueError where the compiler is not installed, and for a shape that it refuses.
    """
    tpu = topology.device.platform == "tpu"
    package, extra = ("libtpu", "tpu") if tpu else ("jax_cuda13_plugin", "cuda")
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{topology.device.name}: its compiler is not installed; pip install -e '.[{extra}]'")
    everything = _devices(topology)
    if topology.local == topology.count:
        return everything, everything
    host = (1, topology.local) if not tpu else (2, 2, 1)[: len(topology.extents)]
    return everything, _devices(Topology(topology.device, host))


def _devices(topology: Topology) -> list[Any]:
    from jax.experimental import topologies

    name = topology.device.name
    try:
        if topology.device.platform == "gpu":
            hosts, local = topology.extents
            found = topologies.get_topology_desc(
                name, "cuda", target_config=topology.device.target, topology=f"1x{hosts}x{local}"
            )
        else:
            # The smallest slices are parts of a host, and the compiler must be told so.
            part = {"chips_per_host_bounds": (*topology.extents, 1)[:3]} if topology.count < topology.device.local else {}
            found = topologies.get_topology_desc(str(topology), "tpu", **part)
    except Exception as error:  # jax raises what the plug-in gives it
        raise ValueError(f"--topology {topology}: the compiler refuses it: {' '.join(str(error).split())[:200]}") from None
    return list(found.devices)
