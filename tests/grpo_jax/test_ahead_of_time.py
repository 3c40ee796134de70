"""The learner's programs compiled for an H100 and a TPU v5p on a machine with neither; nothing is run, nothing is timed.

Slow, and each needs its own packages: `pip install -e '.[cuda]'` or `pip install -e '.[tpu]'`. In processes of their own,
because platforms are settled when jax starts.

    python -m pytest -m slow tests/grpo_jax/test_ahead_of_time.py -s
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What the compiler wants to know of an H100 SXM (80 GB); figures of the data sheet and of the CUDA programming guide.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  l2_cache_size: 52428800  memory_bandwidth: 3352320000000  device_memory_size: 84978434048
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
"""
PROGRAM = """
import json, re, sys, time
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from grpo_jax import learner, mesh, packing
from grpo_jax.group import Group
from grpo_jax.learner import Objective
from models import decoder

target, size, fsdp, tensor, tokens = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
count = fsdp * tensor
if target == "h100":
    found = topologies.get_topology_desc("h100", "cuda", target_config=sys.argv[6], topology=f"1x1x{count}").devices
elif count == 1:
    found = topologies.get_topology_desc("v5p:1x1x1", "tpu", chips_per_host_bounds=(1, 1, 1)).devices
else:
    found = topologies.get_topology_desc({4: "v5p:2x2x1", 8: "v5p:2x2x2"}[count], "tpu").devices
axes = ("data", "fsdp", "tensor")
devices = Mesh(np.array(found).reshape(1, fsdp, tensor), axes, axis_types=(AxisType.Auto,) * 3)
model = decoder.SIZES[size]
zeros = lambda n: np.zeros(n, np.int32)
logp = tuple(np.zeros(200, np.float32) for _ in range(5))
group = Group(zeros(1000), tuple(zeros(200) for _ in range(5)), logp, (False,) * 5, np.ones(5))
kernel = {"h100": "cudnn", "v5p": "splash"}[target]
shards = mesh.shards(devices)
pack = packing.pack([group] * (tokens // 2000 * shards), tokens, shards, kernel=kernel).packs[0]
on = lambda tree, sharding: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
params = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), decoder.shapes(model), mesh.shardings(devices, model)
)
sums = jax.eval_shape(learner.zeros, params)
sums = learner.Sums(params, *on([sums.count] * 7, NamedSharding(devices, PartitionSpec())))
objective = Objective(kl_coefficient=1e-3, dtype="bfloat16", mesh=devices)
began = time.perf_counter()
compiled = learner.accumulate.trace(model, objective, params, sums, on(pack, mesh.rows(devices))).lower().compile()
text, memory = compiled.as_text(), compiled.memory_analysis()
calls = re.findall(r'custom_call_target="([^"]+)"', text)
print(json.dumps({
    "seconds": round(time.perf_counter() - began, 1),
    "calls": {name: calls.count(name) for name in sorted(set(calls))},
    "collectives": {
        name: len(re.findall(rf"= [^\\n]* {name}(?:-start)?\\(", text))
        for name in ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
    },
    "temporary_gb": round(memory.temp_size_in_bytes / 1e9, 2),
    "arguments_gb": round(memory.argument_size_in_bytes / 1e9, 2),
}))
"""


def compiled(target: str, size: str, fsdp: int, tensor: int, tokens: int) -> dict:
    package = {"h100": "jax_cuda13_plugin", "v5p": "libtpu"}[target]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",  # the compiler of the target needs no device, and no device may be there
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    words = [sys.executable, "-W", "ignore", "-c", PROGRAM, target, size, *map(str, (fsdp, tensor, tokens)), H100]
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "involuntary" not in done.stderr.lower(), done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    print(target, size, f"fsdp {fsdp} tensor {tensor}, {tokens} tokens:", report)
    return report


@pytest.mark.slow
@pytest.mark.parametrize(
    "size, fsdp, tensor, tokens",
    [("qwen2.5-0.5b", 1, 1, 8192), ("qwen2.5-7b", 8, 1, 8192), ("qwen2.5-7b", 4, 2, 8192)],
)
def test_the_update_for_h100_calls_cudnn(size, fsdp, tensor, tokens):
    report = compiled("h100", size, fsdp, tensor, tokens)
    # Forward once, though the rest of a layer is recomputed, and backward once: they stand in the bodies of scans.
    assert report["calls"]["__cudnn$fmhaSoftmaxBackward"] == report["calls"]["__cudnn$fmhaSoftmax"] == 1
    assert report["temporary_gb"] + report["arguments_gb"] < 80


@pytest.mark.slow
@pytest.mark.parametrize("size, fsdp, tensor, tokens", [("qwen2.5-0.5b", 1, 1, 4096), ("qwen2.5-0.5b", 4, 1, 4096)])
def test_the_update_for_v5p_calls_splash(size, fsdp, tensor, tokens):
    report = compiled("v5p", size, fsdp, tensor, tokens)
    assert report["calls"]["tpu_custom_call"] >= 2  # forward, and its one backward kernel
    assert report["temporary_gb"] + report["arguments_gb"] < 95
