"""The planner: its table of devices, its messages, its account of memory and of the rollout; real targets in slow tests."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import optax
import pytest

from grpo_jax import config, devices, flops, forecast, learner, plan, rollout
from grpo_jax import mesh as meshes
from grpo_jax.config import TrainConfig
from grpo_jax.devices import DEVICES, Device, Topology
from models import decoder

ROOT = Path(__file__).resolve().parents[2]
CPU = Device("cpu", "cpu", 1e9, 1e11, 1e10, 1e9, 1e9, 1)


@pytest.mark.parametrize(
    "text, count, local", [("v5e:8x8", 64, 4), ("v5p:4x4x4", 64, 4), ("h100:8", 8, 8), ("h100:4x8", 32, 8), ("v5e:1x1", 1, 1)]
)
def test_topologies(text, count, local):
    found = devices.parse(text)
    assert (found.count, found.local) == (count, local)


@pytest.mark.parametrize(
    "text, says",
    [
        ("b200:8", "unknown device 'b200'; known are v4, v5e"),
        ("v5e", "after the colon comes the shape of the machine, like v5e:4x4"),
        ("v5e:0x8", "after the colon"),
        ("v5p:8x8", "v5p has shapes of 3 numbers, like v5p:4x4x4"),
        ("h100:16", "a host has up to 8 GPUs; write h100:HOSTSx8"),
    ],
)
def test_wrong_topologies_are_one_line(text, says):
    with pytest.raises(ValueError, match=says):
        devices.parse(text)


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
def test_the_table_is_plausible(device):
    assert 15e9 < device.memory < 160e9
    assert 100 < device.flops / device.bandwidth < 700  # FLOPs a byte
    assert 4 < device.bandwidth / device.link < 15
    assert device.network <= device.link
    assert bool(device.target) == (device.platform == "gpu")


def test_a_compiler_that_is_missing_names_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[tpu\]'"):
        devices.open_(devices.parse("v5e:8x8"))
    with pytest.raises(ValueError, match=r"pip install -e '\.\[cuda\]'"):
        devices.open_(devices.parse("h100:8"))


@pytest.mark.parametrize(
    "words, says",
    [
        ([], "--topology is missing"),
        (["--topology", "v9:8"], "unknown device 'v9'"),
        (["--topology", "h100:8", "--rollout.rowz", "3"], "did you mean '--rollout.rows'"),
    ],
)
def test_a_wrong_command_line_is_one_line(words, says):
    done = subprocess.run(
        [sys.executable, "-m", "grpo_jax.plan", "tool-n1-7b", *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert says in done.stderr


def test_sizes_come_from_a_folder_or_from_the_name():
    assert forecast.model_of("Qwen/Qwen2.5-7B-Instruct")[1] == decoder.SIZES["qwen2.5-7b"]
    assert forecast.model_of("meta-llama/Llama-3.1-8B-Instruct")[1] == decoder.SIZES["llama-3.1-8b"]
    assert forecast.model_of("meta-llama/Meta-Llama-3-8B-Instruct")[1] == decoder.SIZES["llama-3-8b"]
    assert forecast.model_of(str(config.DEMO_MODEL))[1].layers > 0
    with pytest.raises(ValueError, match="not a size that is known: qwen2.5-0.5b"):
        forecast.model_of("mistralai/Mistral-7B")


@pytest.mark.parametrize(
    "text, size, mesh, tensor",
    [
        ("h100:8", "qwen2.5-7b", (1, 8, 1), 1),
        ("h100:4x8", "qwen2.5-14b", (2, 16, 1), 1),
        ("v5e:8x8", "qwen2.5-7b", (1, 64, 1), 2),
        ("v5e:8x8", "qwen2.5-14b", (1, 64, 1), 4),
        ("v5p:4x4x4", "qwen2.5-7b", (4, 16, 1), 1),
        ("h100:1", "qwen2.5-14b", (1, 1, 1), 1),
    ],
)
def test_default_meshes(text, size, mesh, tensor):
    where, model = devices.parse(text), decoder.SIZES[size]
    extents = where.extents if where.device.platform == "tpu" else (where.count,)
    assert meshes.default(extents, where.device.memory, model) == config.Mesh(*mesh)
    assert meshes.rollout_tensor(model, "bfloat16", where.local, int(where.device.memory)) == tensor
    given = config.Mesh(data=2, tensor=2)
    assert meshes.chosen(given, model, extents, where.device.memory) == given
    assert meshes.chosen(config.Mesh(), model, extents, None) == config.Mesh()
    assert meshes.chosen(config.Mesh(), model, extents, where.device.memory) == config.Mesh(*mesh)


def test_bytes_of_products():
    def f(w, x):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=3)[0]

    shapes = jax.ShapeDtypeStruct((8, 8), "bfloat16"), jax.ShapeDtypeStruct((4, 8), "bfloat16")
    assert flops.traffic(jax.make_jaxpr(f)(*shapes)) == 3 * 2 * (8 * 8 + 2 * 4 * 8)


def test_the_optimizer_state_has_the_shapes_that_it_will_have():
    device_mesh = meshes.make(config.Mesh())
    model = decoder.DecoderConfig("qwen2", 32, 24, 40, 2, 4, 2, 6, tied=False)
    params = jax.device_put(decoder.init(model, jax.random.key(0)), meshes.shardings(device_mesh, model))
    optimizer, _ = learner.make_optimizer(config.Optimizer(), 10)
    made, told = learner.init_state(optimizer, params), learner.state_shapes(optimizer, params)
    described = forecast.params_on(device_mesh, model, "float32")
    assert optax.tree_utils.tree_get_all_with_path(made, "count")
    for shapes in (told, learner.state_shapes(optimizer, described)):
        same = lambda x, y: (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, y.sharding)  # noqa: E731
        assert jax.tree.all(jax.tree.map(same, made, shapes))


def cpu_plan(monkeypatch, memory=4e9, **learn):
    monkeypatch.setattr(devices, "open_", lambda where: (jax.devices()[:1], jax.devices()[:1]))
    cfg = config.demo()
    cfg = replace(cfg, learner=replace(cfg.learner, **learn), rollout=replace(cfg.rollout, rows=32))
    return cfg, Topology(replace(CPU, memory=memory), (1,))


def test_a_whole_plan_with_the_compiler_of_this_machine(monkeypatch):
    cfg, where = cpu_plan(monkeypatch)
    compiled = {}
    found = forecast.draw_up(cfg, where, compiled)
    assert (
        list(found.programs) == ["longest", "gradient", "optimizer", "reference", "prefill", "decode"] and not found.failing()
    )
    memory = found.memory
    sums = {
        "gradient": memory.parameters + memory.gradients + memory.packs,
        "optimizer": memory.parameters + memory.optimizer + memory.gradients,
        "reference": memory.reference + memory.packs,
    }
    for name, size in sums.items():
        # What a program does not read of a pack is not handed to it; of a tiny model that counts.
        assert found.programs[name].arguments == pytest.approx(size, rel=0.05, abs=memory.packs), name
    assert memory.optimizer == pytest.approx(2 * memory.parameters, rel=0.01)
    assert memory.phases()["update"] == pytest.approx(
        memory.parameters + memory.optimizer + memory.reference + memory.gradients + memory.packs
        + max(memory.temporaries[n] for n in ("longest", "gradient", "optimizer"))
    )  # fmt: skip
    assert [x["phase"] for x in found.phases] == ["reshard", "prefill", "decode", "reference", "update"]
    assert all(x["expected_s"] >= x["roofline_s"] > 0 for x in found.phases)
    plan.show(found)
    again = json.loads(json.dumps(plan.figures(found, None)))
    assert again["fits"] and again["seconds_a_step"] > 0
    count = len(compiled)
    forecast.draw_up(cfg, where, compiled)
    assert len(compiled) == count  # nothing is compiled twice


def test_what_does_not_fit_gets_a_suggestion_that_does(monkeypatch):
    cfg, where = cpu_plan(monkeypatch)
    compiled = {}
    peak = forecast.draw_up(cfg, where, compiled).memory.phases()["update"]
    cfg, where = cpu_plan(monkeypatch, memory=0.9 * peak)
    found = forecast.draw_up(cfg, where, compiled)
    assert found.failing() == ["update"]
    said, better = plan.suggest(found, compiled)
    assert said.startswith("--learner.tokens_per_microbatch") and not better.failing()
    again = config.parse(
        TrainConfig, "grpo_jax.plan", ["demo", "--learner.remat", "none", "--rollout.rows", "32", *said.split()]
    )
    assert again == better.asked
    assert better.memory.phases()["update"] <= better.limit < peak


def test_what_a_suggestion_says_is_what_it_compiled():
    """Of every change: its words, added to the command that was given, make the config that was planned."""
    words = ["tool-n1-14b", "--mesh.data", "4", "--mesh.fsdp", "4", "--mesh.tensor", "2", "--learner.offload", "reference"]
    asked = config.parse(TrainConfig, "grpo_jax.plan", words)
    model = decoder.SIZES["qwen2.5-14b"]
    failing = forecast.Memory(*[10**12] * 8, {}, "none")
    found = forecast.Plan(
        asked, asked, model, devices.parse("h100:4x8"), {"data": 4, "fsdp": 4, "tensor": 2}, 1, "cudnn", 0, {}, failing, {}, []
    )
    assert set(found.failing()) == {"rollout", "reference", "update"}
    said = []
    for cfg in plan.changes(found):
        said.append(plan.options(asked, cfg))
        added = said[-1].split()
        options = dict(zip(words[1::2], words[2::2], strict=True)) | dict(zip(added[::2], added[1::2], strict=True))
        again = [word for pair in options.items() for word in pair]
        if "lora" in said[-1]:
            assert "--learner.offload none" in said[-1]
        assert config.parse(TrainConfig, "grpo_jax.plan", [words[0], *again]) == cfg
    assert said[0] == "--rollout.tensor 2" and "--mesh.data 1 --mesh.fsdp 16 --mesh.tensor 2" in said[3]
    assert "--model.path Qwen/Qwen2.5-0.5B-Instruct" in said[-1]


def test_the_rollout_is_seated_as_it_will_be(monkeypatch):
    """Calls, and places in them, of a real rollout with the same lengths."""
    cfg, where = cpu_plan(monkeypatch)
    model = decoder.DecoderConfig("qwen2", 32, 24, 40, 2, 4, 2, 6, tied=False)
    cfg = replace(cfg, rollout=replace(cfg.rollout, prompts_per_step=12, group_size=3, rows=8), learner=replace(cfg.learner, dtype="float32"))  # noqa: E501  # fmt: skip
    one = meshes.make(config.Mesh())
    job = forecast._Job(cfg, model, where, one, one, "tiles", {})
    sampling, limits, calls, _ = forecast.played(job, 10**9)
    groups = forecast.lengths(cfg)
    params = decoder.init(model, jax.random.key(0))
    prompts = [group.prompt + i for i, group in enumerate(groups)]
    sizes = [[len(r) for r in group.responses] for group in groups]
    _, usage = rollout.sample(model, params, prompts, sampling, lengths=sizes)
    assert usage.row_steps == sum(limits.steps * sum(shape.bands) for shape in calls)


PROGRAM = """
import json, sys
import jax
from grpo_jax import config, forecast, learner, packing
from grpo_jax import mesh as meshes
from models import decoder

if sys.argv[1] == "without":
    meshes.embedded = lambda x, mesh: x
mesh = meshes.make(config.Mesh(2, 4, 1))
model = decoder.DecoderConfig("qwen2", 64, 32, 48, 2, 4, 2, 8, tied=False)
params = forecast.params_on(mesh, model, "float32")
pack = packing.pack(forecast.groups_of([20], [[6, 7]]) * 8, 64, 8).packs[0]
args = model, learner.Objective(mesh=mesh), params, forecast.sums_on(mesh, params), forecast.pack_on(mesh, pack, False)
program = forecast.compile_("gradient", learner.accumulate, args, [0] * 8, {})
sizes = sum(map(forecast.shard_bytes, args[2:]))
print(json.dumps([len(program.warnings), program.arguments / sizes, program.traffic.total, program.traffic.unbounded]))
"""


@pytest.mark.parametrize("how", ["with", "without"])
def test_what_the_partitioner_replicates_against_its_will_is_counted_and_absent(how):
    """Eight devices, data 2 x fsdp 4; without the two steps of grpo_jax.mesh.embedded there is something to count."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    words = [sys.executable, "-c", PROGRAM, how]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    warnings, arguments, traffic, unbounded = json.loads(done.stdout.splitlines()[-1])
    assert (warnings > 0) == (how == "without")
    assert arguments == pytest.approx(1, abs=0.05)
    assert traffic > 0 and unbounded == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset, topology, package",
    [("tool-n1-7b", "h100:8", "jax_cuda13_plugin"), ("tool-n1-14b", "h100:4x8", "jax_cuda13_plugin"),
     ("tool-n1-7b", "v5p:4x4x4", "libtpu"), ("tool-n1-7b", "v5e:8x8", "libtpu")],
)  # fmt: skip
def test_real_targets(preset, topology, package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    words = [sys.executable, "-W", "ignore", "-m", "grpo_jax.plan", preset, "--topology", topology, "--json"]
    done = subprocess.run(words, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    while not found["fits"]:
        found = found["suggestion"]
    for program in found["programs"].values():
        assert not program["warnings"] and not program["traffic"]["unbounded"]
    memory = found["memory"]
    sums = memory["parameters"] + memory["gradients"] + memory["packs"]
    assert found["programs"]["gradient"]["arguments"] == pytest.approx(sums, rel=0.05)
    assert found["host_peak_gb"] < 20
