"""Bytes between devices, read from compiled texts: of a program made here, and of lines as other compilers write them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_jax import collectives

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from grpo_jax import collectives

mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

def step(x, _):
    whole = jax.lax.all_gather(x, ("a", "b"), tiled=True)          # [32, 8] of [8, 8]
    return x + jax.lax.psum_scatter(whole, ("a", "b"), tiled=True), None

def outer(x, _):
    return jax.lax.scan(step, jax.lax.ppermute(x, "a", [(0, 1), (1, 0)]), None, 3)[0], None

def f(x):
    x, _ = jax.lax.scan(outer, x, None, 5)
    return jax.lax.psum(x.sum(0), "b")

g = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P(("a", "b")), out_specs=P("a"), check_vma=False))
x = jax.ShapeDtypeStruct((32, 8), jnp.float32, sharding=NamedSharding(mesh, P(("a", "b"))))
text = g.trace(x).lower().compile().as_text()
found = collectives.read(text, [0, 0, 1, 1])
print(json.dumps([found.by_kind, found.local, found.across, found.unbounded]))
"""


def test_a_program_on_four_devices_by_kind_trips_and_hosts():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    by_kind, local, across, unbounded = json.loads(done.stdout.splitlines()[-1])
    whole = 32 * 8 * 4
    assert by_kind == {
        "all-gather": 15 * whole * 3 / 4,
        "reduce-scatter": 15 * whole * 3 / 4,
        "collective-permute": 5 * whole / 4,
        "all-reduce": 2 * 8 * 4 / 2,
    }
    assert local == by_kind["all-reduce"]  # over axis b, whose two devices are of one host
    assert across == sum(by_kind.values()) - local
    assert unbounded == 0


@pytest.mark.parametrize(
    "written, groups",
    [
        ("replica_groups={{0,1},{2,3}}, dims", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['x'=2,'y'=2] {'x'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['x'=2,'y'=2] {'x','y'}, x", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['x'=4] {'x':(2)2}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['x'=4] {'x':(1)2}, x", [[0, 2], [1, 3]]),
        ("replica_groups={}, x", [[0, 1, 2, 3]]),
    ],
)
def test_groups_are_read_in_every_spelling(written, groups):
    assert collectives._groups(f"%a = f32[4]{{0}} all-reduce(%b), {written}", 4).tolist() == groups


TEXT = """HloModule m

%fused_computation.1 (p: bf16[8,2]) -> bf16[8,8] {
  %all-gather.1 = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={1}
}

%async_collective_fusion.2 (p: bf16[8,2]) -> bf16[8,8] {
  %all-gather.2 = bf16[8,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={1}
}

%all-reduce-scatter.3 (p: f32[8,8]) -> f32[8,2] {
  %all-reduce.3 = f32[8,8]{1,0} all-reduce(%p), channel_id=8, replica_groups={{0,1,2,3}}, to_apply=%add
}

%condition (p: (s32[], f32[8,8])) -> pred[] {
  %constant.9 = s32[]{:T(128)} constant(10)
  %constant.1 = s32[]{:T(128)} constant(2)
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.9), direction=LT
}

%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %start = (bf16[8,2], bf16[8,8]) fusion(%x), kind=kCustom, calls=%fused_computation.1
  %beside = (f32[4], bf16[8,8]) fusion(%x), kind=kCustom, calls=%async_collective_fusion.2
  %scatter = f32[8,2] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3
}

ENTRY %main (p: f32[8,8]) -> f32[8,8] {
  %while.1 = (s32[], f32[8,8]) while(%t), condition=%condition, body=%body
  %g = ((f32[2,8]), f32[8,8]{1,0}) all-gather-start(%p), channel_id=9, replica_groups=[1,4]<=[4], dimensions={0}
  %s = ((bf16[8,8]{1,0}), (bf16[2,8]{1,0})) reduce-scatter-start(%p), channel_id=10, replica_groups=[1,4]<=[4]
}
"""


def test_fusions_of_tpus_count_once_and_loops_by_their_condition():
    found = collectives.read(TEXT, [0] * 4)
    assert found.by_kind == {
        "all-gather": (10 * 8 * 8 * 2 + 8 * 8 * 4) * 3 / 4,
        "reduce-scatter": (10 * 8 * 8 * 4 + 8 * 8 * 2) * 3 / 4,
    }
    assert found.across == 0 and found.local == found.total and found.unbounded == 0


def test_a_loop_of_unknown_length_is_told():
    text = TEXT.replace("constant(10)", "parameter(0)").replace("constant(2)", "parameter(1)")
    assert collectives.read(text, [0] * 4).unbounded == 2
