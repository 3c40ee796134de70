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
PROGRAM = """
import json, re, sys, time
import jax, numpy as np
from grpo_jax import config, devices, forecast, learner, mesh, packing
from grpo_jax.learner import Objective
from models import decoder

devices.prepare()
topology, size, fsdp, tensor, tokens = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
where = devices.parse(topology)
found = mesh.make(config.Mesh(1, fsdp, tensor), devices.open_(where)[0])
model, shards = decoder.SIZES[size], mesh.shards(found)
kernel = {"gpu": "cudnn", "tpu": "splash"}[where.device.platform]
groups = forecast.groups_of([1000], [[200] * 5]) * (tokens // 2000 * shards)
pack = forecast.pack_on(found, packing.pack(groups, tokens, shards, kernel=kernel).packs[0], False)
params = forecast.params_on(found, model, "float32")
objective = Objective(kl_coefficient=1e-3, dtype="bfloat16", mesh=found)
began = time.perf_counter()
done = learner.accumulate.trace(model, objective, params, forecast.sums_on(found, params), pack).lower().compile()
memory, calls = done.memory_analysis(), re.findall(r'custom_call_target="([^"]+)"', done.as_text())
print(json.dumps({
    "seconds": round(time.perf_counter() - began, 1),
    "calls": {name: calls.count(name) for name in sorted(set(calls))},
    "temporary_gb": round(memory.temp_size_in_bytes / 1e9, 2),
    "arguments_gb": round(memory.argument_size_in_bytes / 1e9, 2),
}))
"""


def compiled(target: str, size: str, fsdp: int, tensor: int, tokens: int) -> dict:
    count = fsdp * tensor
    package = {"h100": "jax_cuda13_plugin", "v5p": "libtpu"}[target]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    topology = f"h100:{count}" if target == "h100" else {1: "v5p:1x1x1", 4: "v5p:2x2x1", 8: "v5p:2x2x2"}[count]
    words = [sys.executable, "-W", "ignore", "-c", PROGRAM, topology, size, *map(str, (fsdp, tensor, tokens))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
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
