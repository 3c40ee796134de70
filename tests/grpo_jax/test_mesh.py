"""Where parameters lie by the table, and that four devices compute what one does."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from grpo_jax import config, mesh
from models import decoder
from models.decoder import DecoderConfig
from models.lora import Lora

ROOT = Path(__file__).resolve().parents[2]
MODEL = DecoderConfig("qwen2", 32, 24, 40, 2, 12, 2, 2, tied=False)


def abstract(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"))


def specs(device_mesh, model):
    """{path: PartitionSpec} of every parameter."""
    found = jax.tree_util.tree_leaves_with_path(mesh.shardings(device_mesh, model))
    return {jax.tree_util.keystr(path, simple=True, separator="."): s.spec for path, s in found}


def test_every_parameter_lies_by_the_table():
    qkv = PartitionSpec(None, "tensor", None, "fsdp")
    bias = PartitionSpec(None, "tensor", None)
    assert specs(abstract(2, 2, 2), MODEL) == {
        "embed": PartitionSpec("tensor", "fsdp"),
        "head": PartitionSpec("tensor", "fsdp"),
        "norm.scale": PartitionSpec("fsdp"),
        "layers.attention_norm.scale": PartitionSpec(None, "fsdp"),
        "layers.ff_norm.scale": PartitionSpec(None, "fsdp"),
        "layers.attention.q": qkv,
        "layers.attention.k": qkv,
        "layers.attention.v": qkv,
        "layers.attention.o": PartitionSpec(None, "fsdp", "tensor", None),
        "layers.attention.q_bias": bias,
        "layers.attention.k_bias": bias,
        "layers.attention.v_bias": bias,
        "layers.ff.gate": PartitionSpec(None, "tensor", "fsdp"),
        "layers.ff.up": PartitionSpec(None, "tensor", "fsdp"),
        "layers.ff.down": PartitionSpec(None, "fsdp", "tensor"),
    }


def test_adapters_lie_like_their_matrices_and_the_rank_is_whole():
    found = mesh.shardings(abstract(2, 2, 2), MODEL, Lora(8, targets=("q_proj", "o_proj", "gate_proj")))["layers"]
    assert jax.tree.map(lambda s: s.spec, found) == {
        "attention": {
            "q": {"a": PartitionSpec(None, None, "fsdp"), "b": PartitionSpec(None, "tensor", None, None)},
            "o": {"a": PartitionSpec(None, None, "tensor", None), "b": PartitionSpec(None, "fsdp", None)},
        },
        "ff": {"gate": {"a": PartitionSpec(None, None, "fsdp"), "b": PartitionSpec(None, "tensor", None)}},
    }


def test_key_heads_that_do_not_divide_are_left_whole():
    """2 key heads on 4 tensor devices are replicated; the 12 query heads, 40 wide feed-forward and 32 words divide."""
    found = specs(abstract(1, 1, 4), MODEL)
    assert found["layers.attention.q"] == PartitionSpec(None, "tensor", None, "fsdp")
    assert found["layers.attention.k"] == found["layers.attention.v"] == PartitionSpec(None, None, None, "fsdp")
    assert found["layers.attention.k_bias"] == PartitionSpec(None, None, None)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((1, 5, 1), "--mesh.fsdp 5 does not divide what it splits of this model (embed 24); up to 5 devices, 1, 2, 3, 4 would"),
        (
            (1, 1, 3),
            "--mesh.tensor 3 does not divide what it splits of this model (vocab 32, heads 12, ff 40); up to 3 devices, 1, 2",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused(sizes, message):
    with pytest.raises(ValueError) as error:
        mesh.shardings(abstract(*sizes), MODEL)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", decoder.SIZES)
@pytest.mark.parametrize("fsdp, tensor", [(8, 1), (8, 2), (4, 4)])
def test_a_device_holds_its_share_of_the_published_models(name, fsdp, tensor):
    model = decoder.SIZES[name]
    if model.heads % tensor:  # the 14 of 0.5B over 4
        with pytest.raises(ValueError, match=f"heads {model.heads}"):
            mesh.shardings(abstract(1, fsdp, tensor), model)
        return
    shapes, shardings = decoder.shapes(model), mesh.shardings(abstract(1, fsdp, tensor), model)
    parts = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)), shapes, shardings)  # raises where it does not divide
    share = sum(jax.tree.leaves(parts)) / sum(x.size for x in jax.tree.leaves(shapes)) * fsdp * tensor
    print(name, share)
    assert 1 <= share < (1.05 if model.kv_heads % tensor else 1.001)  # on 4 tensor devices, the 2 key heads of 0.5B to 3B


def test_a_host_gets_the_weights_in_the_dtype_it_wants():
    model = DecoderConfig("qwen2", 32, 24, 40, 3, 6, 3, 4, tied=False)
    params = jax.jit(decoder.init, static_argnums=0, out_shardings=mesh.shardings(mesh.make(config.Mesh()), model))(
        model, jax.random.key(0)
    )
    for dtype in ("float32", "bfloat16"):
        found = mesh.host_copy(params, model, dtype, 1)
        chex.assert_trees_all_equal(found, decoder.by_layer(jax.tree.map(lambda x: x.astype(dtype), params)))  # noqa: B023
        assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(found))


@pytest.mark.parametrize(
    "name, devices, gigabytes, tensor",
    [
        ("qwen2.5-7b", 8, None, 1),  # memory not told, as on a CPU
        ("qwen2.5-7b", 8, 80, 1),  # 15 GB
        ("qwen2.5-14b", 8, 50, 2),  # 30 GB
        ("qwen2.5-7b", 4, 16, 2),
        ("qwen2.5-7b", 8, 3, 4),  # 8 would not divide 28 heads
        ("qwen2.5-0.5b", 8, 1, 2),
    ],
)
def test_sampling_splits_weights_as_little_as_they_must_be(name, devices, gigabytes, tensor):
    memory = None if gigabytes is None else gigabytes * 10**9
    assert mesh.rollout_tensor(decoder.SIZES[name], "bfloat16", devices, memory) == tensor


def test_a_host_that_cannot_be_cut_is_told():
    with pytest.raises(ValueError, match=f"--rollout.tensor 7 does not divide the {jax.local_device_count()} devices"):
        mesh.local(7)


def test_rows_are_split_over_data_and_fsdp():
    assert mesh.rows(abstract(2, 3, 4)).spec == PartitionSpec(("data", "fsdp"))
    assert mesh.shards(abstract(2, 3, 4)) == 6


def test_make_takes_the_devices_that_there_are():
    devices = jax.device_count()
    made = mesh.make(config.Mesh())
    assert dict(made.shape) == {"data": devices, "fsdp": 1, "tensor": 1}
    assert dict(mesh.make(config.Mesh(data=1, fsdp=devices)).shape) == {"data": 1, "fsdp": devices, "tensor": 1}
    assert dict(mesh.make(config.Mesh(data=1)).shape) == {"data": 1, "fsdp": devices, "tensor": 1}


@pytest.mark.parametrize("sizes", [config.Mesh(data=3, fsdp=5, tensor=7), config.Mesh(fsdp=1024), config.Mesh(fsdp=0)])
def test_a_wrong_product_is_refused_in_one_line_with_its_options(sizes):
    with pytest.raises(ValueError) as error:
        mesh.make(sizes)
    text = str(error.value)
    assert "\n" not in text
    for part in (f"--mesh.fsdp {sizes.fsdp}", f"--mesh.tensor {sizes.tensor}", f"there are {jax.device_count()} devices"):
        assert part in text
    assert f"--mesh.data {sizes.data or 1} x" in text
    if sizes.data:
        assert "--mesh.fsdp 5 x --mesh.tensor 7 = 105" in text


# Four devices against one, in a process of its own: the number of devices is fixed when jax starts.
PROGRAM = """
import json
from dataclasses import replace

import jax, jax.numpy as jnp, numpy as np, optax

from grpo_jax import config, learner, mesh, packing
from grpo_jax.group import Group
from models import decoder, lora
from jax.sharding import AxisType
from models.decoder import DecoderConfig

MODEL = DecoderConfig("qwen2", 32, 24, 40, 2, 6, 3, 4, tied=True)  # 3 key heads: replicated on 2 tensor devices
rng = np.random.default_rng(0)
init = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape) + (x.shape[-1:] == x.shape), decoder.shapes(MODEL))
groups = []
for p, rs in [(5, [4]), (3, [5, 1]), (7, [1, 6, 3, 2, 6]), (4, [3, 3, 1]), (6, [2, 2]), (2, [6, 1, 4]), (8, [2, 1])]:
    prompt, *ids = (rng.integers(0, 32, n).astype(np.int32) for n in (p, *rs))
    logp = tuple(-3 + 0.5 * rng.normal(size=r) for r in rs)
    groups.append(Group(prompt, tuple(ids), logp, (False,) * len(rs), rng.normal(size=len(rs))))
objective = learner.Objective(temperature=0.7, kl_coefficient=0.05, entropy_coefficient=0.02, dtype="float64", head_chunk=8)
optimizer, _ = learner.make_optimizer(config.Optimizer(learning_rate=1e-3), 10)
LORA = lora.Lora(rank=3)  # a rank that no axis divides
thin = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape), jax.eval_shape(lambda: lora.init(MODEL, LORA, jax.random.key(0))))


def step(sizes, settings=None):
    one = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1], axis_types=(AxisType.Auto,) * 3)
    device_mesh = mesh.make(sizes) if sizes else one
    frozen, shardings = None, mesh.shardings(device_mesh, MODEL, settings)
    if settings:
        frozen = jax.device_put(init, mesh.shardings(device_mesh, MODEL))
    params = jax.device_put(thin if settings else init, shardings)
    state = learner.init_state(optimizer, params)
    kernel = "plain" if sizes and sizes.tensor > 1 else "tiles"
    packs = packing.pack(groups, 32, mesh.shards(device_mesh), kernel=kernel, tile=(8, 4)).packs
    packs = [packing.place(p, mesh.rows(device_mesh)) for p in packs]
    packs = [replace(p, ref_logp=p.sampler_logp + jnp.cos(9 * p.sampler_logp)) for p in packs]
    lies = lambda tree: all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), tree, shardings)))
    trees = lambda params, state: [params, learner.zeros(params).gradient, *(optax.tree.get(state, k) for k in ("mu", "nu"))]
    before = all(map(lies, trees(params, state)))
    of_responses = {"kind": "gspo", "mean": "sequence_mean"} if settings else {}  # both ways, without more to compile
    whole = replace(objective, mesh=device_mesh, lora=settings, **of_responses)
    after, state, scalars = learner.update(MODEL, whole, optimizer, params, state, packs, frozen)
    pieces = lambda x: x.size // x.addressable_shards[0].data.size
    if settings:
        merged = lora.merge(frozen, after, settings, "float64")
        same = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), merged, frozen)
        return jax.device_get([after, merged]), jax.device_get(scalars), all(jax.tree.leaves(same))
    return jax.device_get(after), jax.device_get(scalars), dict(
        micro_batches=len(packs), tokens=[pieces(packs[0].tokens), len(packs[0].tokens)], embed=pieces(after["embed"]),
        kept=before and all(map(lies, trees(after, state))),
    )


def distance(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max() / (np.abs(y).max() or 1)), a, b)))


minus = lambda a, b: jax.tree.map(np.subtract, a, b)
params, scalars, facts = step(None)
report = {"one": facts, "scalars": {k: float(v) for k, v in scalars.items()}, "moved": distance(params, init)}
for name, sizes in {"data, fsdp": config.Mesh(data=2, fsdp=2), "fsdp, tensor": config.Mesh(data=1, fsdp=2, tensor=2)}.items():
    found, found_scalars, facts = step(sizes)
    facts["update"] = distance(minus(found, init), minus(params, init))
    report[name] = facts | {"params": distance(found, params), "scalars": distance(found_scalars, scalars)}
# What is drawn does not depend on the mesh: first adapters, and the rounding of moments kept in bfloat16.
def drawn(sizes):
    device_mesh = mesh.make(sizes)
    adapters = jax.jit(lora.init, static_argnums=(0, 1), out_shardings=mesh.shardings(device_mesh, MODEL, LORA))
    params = jax.device_put(jax.tree.map(np.float32, init), mesh.shardings(device_mesh, MODEL))
    narrow, _ = learner.make_optimizer(config.Optimizer(moments="bfloat16"), 10)
    state = learner.init_state(narrow, params)
    gradient = jax.tree.map(lambda p: p * p, params)
    zero = jnp.zeros(())
    _, state, _ = learner.apply(narrow, params, state, learner.Sums(gradient, zero, zero + 7, *[zero] * 6))
    assert {x.dtype for k in ("mu", "nu") for x in jax.tree.leaves(optax.tree.get(state, k))} == {jnp.dtype("bfloat16")}
    return jax.device_get([adapters(MODEL, LORA, jax.random.key(5)), optax.tree.get(state, "nu")])


same = lambda a, b: all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))
(few, few_nu), (many, many_nu) = drawn(config.Mesh(data=4)), drawn(config.Mesh(data=1, fsdp=2, tensor=2))
report["drawn"] = same(few, many)
share = [np.mean(a == b) for a, b in zip(jax.tree.leaves(few_nu), jax.tree.leaves(many_nu), strict=True)]
report["rounded"] = float(min(share))  # the norm that clips is summed in another order: a few may go the other way
[after, merged], scalars, _ = step(None, LORA)
for name, sizes in {"data, fsdp": config.Mesh(data=2, fsdp=2), "fsdp, tensor": config.Mesh(data=1, fsdp=2, tensor=2)}.items():
    [found, found_merged], found_scalars, kept = step(sizes, LORA)
    report["adapters, " + name] = dict(
        kept=kept, update=distance(minus(found, thin), minus(after, thin)),
        params=distance([found, found_merged], [after, merged]), scalars=distance(found_scalars, scalars),
    )
print(json.dumps(report))
"""


def test_four_devices_take_the_step_that_one_takes():
    variables = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0 and "Involuntary" not in done.stderr, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    print(report)
    assert report["drawn"] and report["rounded"] > 0.99
    assert report["moved"] > 1e-4 and report["scalars"]["clipped"] > 0
    for name, (shards, pieces) in {"data, fsdp": (4, 2), "fsdp, tensor": (2, 4)}.items():
        found = report[name]
        assert max(found["params"], found["scalars"]) < 1e-9, (name, found)
        assert found["update"] < 1e-8, (name, found)  # Adam divides rounding by the smallest gradients
        assert (found["tokens"], found["embed"], found["kept"]) == ([shards, shards], pieces, True)
        found = report["adapters, " + name]
        assert max(found["params"], found["scalars"]) < 1e-9 and found["update"] < 1e-8 and found["kept"], (name, found)
    assert [report[k]["micro_batches"] for k in ("one", "fsdp, tensor", "data, fsdp")] == [3, 2, 1]
