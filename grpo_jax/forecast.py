"""What a training step will take on a machine that is not here: its programs, compiled ahead of time, and what follows.

    draw_up     config, topology -> Plan
    Program     what the compiler says of a program's memory and messages
    Memory      what lies on a device at the same time, phase by phase
    times       a step of drawn lengths (data/lengths.py): packed and seated as in training, at the roofline and below it

Prefill and decoding are compiled for the devices of one host, the reference pass, the gradient of a micro-batch and the
optimizer step for all. Memory is that of the longest prompts and responses which the config allows; time is that of the drawn.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data import lengths as drawn
from grpo_jax import collectives, config, console, devices, flops, inputs, learner, packing, rollout, seating, train
from grpo_jax import mesh as meshes
from grpo_jax.collectives import Traffic
from grpo_jax.config import TrainConfig
from grpo_jax.devices import Topology
from grpo_jax.group import Group
from grpo_jax.packing import Pack, bucket
from grpo_jax.rollout import Sampling
from grpo_jax.seating import Limits, Shape
from models import attention, decoder, lora
from models.decoder import DecoderConfig, Params

# What of a device's peaks a step is expected to reach: of launched FLOPs in learning and prefill, of the memory's rate in
# decoding, of the links. Assumptions, not measurements; docs/scale.md says where they come from.
MFU, BANDWIDTH, LINK = 0.40, 0.60, 0.60
# Of a device's memory; the rest is for the runtime, for buffers of messages, and for what does not pack without gaps.
USABLE = 0.95


@dataclass(frozen=True)
class Program:
    """A compiled program; bytes are of one device."""

    seconds: float  # of compilation
    arguments: int
    temporaries: int  # a lower bound where the compiler refused
    traffic: Traffic
    warnings: tuple[str, ...] = ()  # of the partitioner: what it replicates against its will
    refused: str = ""  # what the compiler said, where the program needs more memory than there is


@dataclass(frozen=True)
class Memory:
    """Bytes of one device: what lives always, and what lives in one phase beside it."""

    parameters: int  # that are learned
    frozen: int  # beside them, with LoRA; it is the reference, too
    optimizer: int
    reference: int
    gradients: int
    rollout_weights: int
    kv_pool: int
    packs: int
    temporaries: dict[str, int]  # by program
    offload: str  # what of optimizer and reference is there in its own phase only

    def phases(self) -> dict[str, int]:
        """The peak of each phase of a step."""
        optimizer, reference = ((self.offload in (name, "both")) for name in ("optimizer", "reference"))
        base = self.parameters + self.frozen
        always = base + (0 if optimizer else self.optimizer) + (0 if reference else self.reference)
        most = lambda *names: max((self.temporaries.get(n, 0) for n in names), default=0)  # noqa: E731
        return {
            "rollout": always + self.rollout_weights + self.kv_pool + most("prefill", "decode"),
            "reference": always + (self.reference if reference else 0) + self.packs + most("reference"),
            "update": self.gradients + max(
                always + self.packs + most("gradient", "longest"),
                always + (self.optimizer if optimizer else 0) + most("optimizer"),
            ),
        }  # fmt: skip


@dataclass(frozen=True)
class Plan:
    asked: TrainConfig  # what was asked for
    cfg: TrainConfig  # ... with what follows from it: mesh and dtype
    model: DecoderConfig
    where: Topology
    mesh: dict[str, int]
    tensor: int  # of the rollout
    kernel: str
    rows: int  # of the rollout, on a host
    programs: dict[str, Program]
    memory: Memory
    packs: dict[str, tuple[int, ...]]  # by program: tokens, response tokens, cells of attention's rectangles
    phases: list[dict[str, Any]]  # of a step: name, seconds and what they come from

    @property
    def limit(self) -> float:
        return USABLE * self.where.device.memory

    def failing(self) -> list[str]:
        """What does not fit."""
        refused = {"gradient": "update", "longest": "update", "optimizer": "update", "reference": "reference"}
        over = [phase for phase, size in self.memory.phases().items() if size > self.limit]
        return over + [p for n, x in self.programs.items() if x.refused and (p := refused.get(n, "rollout")) not in over]


# ---------------------------------------------------------------- what is compiled


def model_of(path: str) -> tuple[str, DecoderConfig]:
    """(name, network) of a local folder with a config.json, or of a known size by its hub name."""
    if (file := Path(path) / "config.json").is_file():
        return path, DecoderConfig.from_hf(json.loads(file.read_text()), str(file))
    name = path.partition("@")[0].rsplit("/", 1)[-1].lower().removeprefix("meta-").removesuffix("-instruct")
    if name not in decoder.SIZES:
        raise ValueError(
            f"--model.path {path!r}: no folder with a config.json, and not a size that is known: {', '.join(decoder.SIZES)}"
        )
    return name, decoder.SIZES[name]


def shard_bytes(tree: Any) -> int:
    """Bytes on each device of a tree of ShapeDtypeStructs."""
    sizes = lambda x: x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)  # noqa: E731
    return sum(math.prod(sizes(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _on(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def params_on(mesh: Mesh, model: DecoderConfig, dtype: str) -> Params:
    """The parameters as ShapeDtypeStructs with their shardings."""
    lies = meshes.shardings(mesh, model)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), decoder.shapes(model), lies)


def by_layer(params: Params, layers: int) -> Params:
    """ShapeDtypeStructs of stacked parameters as those of models.decoder.by_layer."""

    one = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=meshes.of_one_layer(x.sharding))  # noqa: E731
    return {**params, "layers": (jax.tree.map(one, params["layers"]),) * layers}


def adapters_on(mesh: Mesh, model: DecoderConfig, settings: lora.Lora) -> Params:
    """The adapters, likewise."""
    lies = meshes.shardings(mesh, model, settings)
    shapes = lora.shapes(model, settings)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, lies)


def sums_on(mesh: Mesh, params: Params) -> learner.Sums:
    """The learner's sums, likewise."""
    sums = jax.eval_shape(learner.zeros, params)
    gradient = jax.tree.map(lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p.sharding), sums.gradient, params)
    return replace(_on(replace(sums, gradient=None), NamedSharding(mesh, PartitionSpec())), gradient=gradient)


def pack_on(mesh: Mesh, pack: Pack, reference: bool) -> Pack:
    return _on(replace(pack, ref_logp=pack.old_logp if reference else None), meshes.rows(mesh))


def groups_of(prompts: Sequence[int], responses: Sequence[Sequence[int]]) -> list[Group]:
    """Groups of these lengths; their tokens mean nothing."""
    zeros = lambda n: np.zeros(int(n), np.int32)  # noqa: E731
    logp = lambda row: tuple(np.zeros(int(n), np.float32) for n in row)  # noqa: E731
    return [
        Group(zeros(p), tuple(map(zeros, row)), logp(row), (False,) * len(row), np.ones(len(row), np.float32))
        for p, row in zip(prompts, responses, strict=True)
    ]  # fmt: skip


def cells(pack: Pack) -> int:
    """Places of the rectangles that fused attention gathers, in one row of a pack."""
    return sum(math.prod(x.shape[1:]) for x in pack.layout.token) if isinstance(pack.layout, attention.Rows) else 0


@contextlib.contextmanager
def _partitioner_warnings(found: list[str]) -> Iterator[None]:
    """Collects what the partitioner writes to the process's stderr of arrays that it replicates against its will."""
    sys.stderr.flush()
    with tempfile.TemporaryFile("w+") as file:
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            found += [line.strip() for line in file if "involuntary" in line.lower()]


def compile_(name: str, f: Any, args: tuple, hosts: Sequence[int], compiled: dict[str, Program]) -> Program:
    """The jitted f of `args`, compiled for the devices of their shardings; `compiled` keeps what was, by its text."""
    lowered = f.trace(*args).lower()
    key = f"{name} {len(hosts)} {lowered.as_text()}"
    if key in compiled:
        return compiled[key]
    warnings: list[str] = []
    began, arguments = time.perf_counter(), shard_bytes([x for x in jax.tree.leaves(args) if hasattr(x, "sharding")])
    with _partitioner_warnings(warnings):
        try:
            done, refused = lowered.compile(), ""
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refused = " ".join(str(error).split())[:300]
    if refused:
        # TPUs: "... the total memory required for HLO temporaries (24.74G) exceeds available HBM (15.75G)", or of a program.
        wants = [float(x) * 2**30 for x in re.findall(r"\((\d+(?:\.\d+)?)G\)|Used (\d+(?:\.\d+)?)G", refused) for x in x if x]
        program = Program(time.perf_counter() - began, arguments, int(max(wants, default=0)), Traffic(), (), refused)
    else:
        memory = done.memory_analysis()
        # What is not written over an argument comes beside the temporaries.
        beside = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        traffic = collectives.read(done.as_text(), hosts)
        program = Program(
            time.perf_counter() - began, memory.argument_size_in_bytes, beside, traffic, tuple(dict.fromkeys(warnings))
        )  # fmt: skip
    compiled[key] = program
    said = f"does not compile: {refused}" if refused else f"{program.temporaries / 1e9:.2f} GB of temporaries"
    console.note(f"compiled {name}: {program.seconds:.0f} s, {said}")
    for warning in program.warnings:
        console.warn(f"{name}: {warning[:400]}")
    return program


@dataclass(frozen=True)
class _Job:
    """What the programs of a plan have in common."""

    cfg: TrainConfig
    model: DecoderConfig
    where: Topology
    mesh: Mesh
    host: Mesh  # of one host, for the rollout
    kernel: str
    compiled: dict[str, Program]

    def compile(self, name: str, f: Any, *args: Any, host: bool = False) -> Program:
        mesh = self.host if host else self.mesh
        hosts = [device.process_index for device in mesh.devices.flat]
        return compile_(name, f, args, hosts, self.compiled)

    @property
    def objective(self) -> learner.Objective:
        return train.objective_of(self.cfg, self.mesh, self.model, self.where.device.platform)


def told(where: Topology) -> int:
    """What jax will say that a device's memory is: of a GPU with XLA_PYTHON_CLIENT_MEM_FRACTION at USABLE."""
    return int(where.device.memory * (USABLE if where.device.platform == "gpu" else 1))


def draw_up(cfg: TrainConfig, where: Topology, compiled: dict[str, Program], *, hurry: bool = False) -> Plan:
    """The plan of a config on a machine. In a hurry, it ends with the first program that does not fit.

    Raises ValueError for a mesh or an option that does not suit the model or the machine, before anything is compiled.
    """
    asked, (_, model) = cfg, model_of(cfg.model.path)
    train.check_options(cfg)
    extents = where.extents if where.device.platform == "tpu" else (where.count,)
    settings = inputs.adapters(cfg.lora)
    cfg = replace(cfg, mesh=meshes.chosen(cfg.mesh, model, extents, told(where), lora=settings is not None))
    longest = cfg.rollout.max_prompt_tokens + cfg.rollout.max_response_tokens
    inputs.check_context(cfg.model.path, model, longest, "--rollout.max_prompt_tokens and --rollout.max_response_tokens")
    everything, local = devices.open_(where)
    dtype = "bfloat16" if cfg.learner.dtype == "auto" else cfg.learner.dtype
    cfg = replace(cfg, learner=replace(cfg.learner, dtype=dtype))
    mesh = meshes.make(cfg.mesh, everything)
    frozen = None if settings is None else params_on(mesh, model, dtype)
    params = params_on(mesh, model, "float32") if settings is None else adapters_on(mesh, model, settings)
    tensor = cfg.rollout.tensor or meshes.rollout_tensor(model, dtype, where.local, told(where))
    meshes.check_tensor(tensor, where.local)
    host = meshes.make(config.Mesh(data=where.local // tensor, fsdp=1, tensor=tensor), local)
    meshes.shardings(host, model, section="rollout")  # refuses what it does not divide
    kernel = inputs.attention_kernel(cfg.learner, model, where.device.platform)
    job = _Job(cfg, model, where, mesh, host, kernel, compiled)

    optimizer, _ = learner.make_optimizer(cfg.optimizer, 1000)
    state, sums = learner.state_shapes(optimizer, params), sums_on(mesh, params)
    with_reference = bool(cfg.loss.kl_coefficient)
    reference = params_on(mesh, model, dtype) if with_reference and frozen is None else {}
    packs = dict(zip(("longest", "gradient"), heaviest_packs(job), strict=True))
    local_params = by_layer(params_on(host, model, dtype), model.layers)
    parts = [shard_bytes(x) for x in (params, frozen, state, reference, sums)]
    plan = Plan(
        asked, cfg, model, where, dict(mesh.shape), tensor, kernel, 0, {}, Memory(*parts, 0, 0, 0, {}, cfg.learner.offload),
        {n: (*p.tokens.shape[1:], *p.source.shape[1:], cells(p)) for n, p in packs.items()}, [],
    )  # fmt: skip

    def add(name: str, program: Program, **parts: int) -> bool:
        """Adds a program; whether to go on."""
        nonlocal plan
        memory = replace(plan.memory, temporaries=plan.memory.temporaries | {name: program.temporaries}, **parts)
        plan = replace(plan, programs={**plan.programs, name: program}, memory=memory)
        return not (hurry and plan.failing())

    for name, pack in packs.items():
        placed = pack_on(mesh, pack, with_reference)
        program = job.compile(name, learner.accumulate, model, job.objective, params, sums, placed, frozen)
        if not add(name, program, packs=max(plan.memory.packs, shard_bytes(placed))):
            return plan
    if not add("optimizer", job.compile("optimizer", learner.apply, optimizer, params, state, sums)):
        return plan
    if with_reference:
        placed = pack_on(mesh, packs["longest"], False)
        program = job.compile("reference", learner.logprobs, model, job.objective, reference or frozen, placed)
        if not add("reference", program):
            return plan
    # In sampling, as grpo_jax.run.free_memory finds it: beside the state and the weights to sample with.
    free = int(plan.limit - plan.memory.phases()["rollout"] - shard_bytes(local_params))
    sampling, limits, calls, prompts = played(job, free)
    plan = replace(plan, rows=limits.rows)
    held = dict(rollout_weights=shard_bytes(local_params), kv_pool=sampling.cache_bytes or 0)
    if not add("prefill", job.compile("prefill", rollout._prefill, *prefill_arguments(job, local_params), host=True), **held):
        return plan
    largest = max(calls, key=lambda shape: seating.cache_tokens(shape, limits))
    program = job.compile("decode", rollout._decode, *decode_arguments(job, local_params, sampling, limits, largest), host=True)
    add("decode", program)
    return replace(plan, phases=times(job, plan, (params, sums, frozen), local_params, limits, calls, prompts))


def heaviest_packs(job: _Job) -> tuple[Pack, Pack]:
    """Packs of the longest groups that the config allows, and of drawn ones: the compiler says which take more memory.

    The longest have more tokens, the drawn ones more and emptier rectangles where attention is by a fused kernel.
    """
    cfg, shards = job.cfg, meshes.shards(job.mesh)
    longest = groups_of([cfg.rollout.max_prompt_tokens], [[cfg.rollout.max_response_tokens] * cfg.rollout.group_size])
    of = lambda groups: packing.pack(groups, cfg.learner.tokens_per_microbatch, shards, kernel=job.kernel).packs  # noqa: E731
    weight = lambda pack: (cells(pack) + pack.tokens.shape[1], pack.source.shape[1])  # noqa: E731
    packs = of(longest * shards), of(lengths(cfg)[: cfg.update.prompts_per_minibatch])
    return tuple(max(some, key=weight) for some in packs)


def lengths(cfg: TrainConfig) -> list[Group]:
    """The groups of one step, of drawn lengths."""
    n, g = cfg.rollout.prompts_per_step, cfg.rollout.group_size
    prompts, responses = drawn.draw(n, g)
    prompts = np.minimum(prompts, cfg.rollout.max_prompt_tokens)
    return groups_of(prompts, np.minimum(responses, cfg.rollout.max_response_tokens))


# ---------------------------------------------------------------- the rollout


def played(job: _Job, free: int) -> tuple[Sampling, Limits, list[Shape], list[int]]:
    """The seating of one host's rollout of drawn lengths: (.., .., pool of each decode call, prompt lengths)."""
    cfg, shards = job.cfg.rollout, meshes.shards(job.host)
    sampling = Sampling(
        (), cfg.group_size, cfg.max_response_tokens, cfg.temperature, decode_steps_per_call=cfg.decode_steps_per_call
    )  # fmt: skip
    dtype = job.cfg.learner.dtype
    rows, cache = rollout.pool_size(job.model, dtype, sampling, cfg.max_prompt_tokens, max(0, free), shards)
    sampling = replace(sampling, rows=cfg.rows or rows, cache_bytes=cache)
    hosts = job.where.count // job.where.local
    groups = lengths(job.cfg)[::hosts]
    groups.sort(key=lambda group: -len(group.prompt))
    prompts = [len(group.prompt) for group in groups]
    limit, steps = cfg.max_response_tokens, min(cfg.decode_steps_per_call, cfg.max_response_tokens)
    most = min(sampling.rows, len(groups) * cfg.group_size)
    fits = cache * shards // rollout.cache_bytes_a_token(job.model, dtype)
    limits = Limits(most, len(groups), seating.widths(limit, steps), steps, shards, fits)
    waiting = deque((rank, j) for rank in range(len(groups)) for j in range(cfg.group_size))
    left, live, places = [cfg.group_size] * len(groups), {}, {}
    shape, calls = None, []
    while live or waiting:
        shape, entering, leaving = seating.admit(shape, live, waiting, places, prompts, limits)
        for name in leaving:
            del live[name]
        waiting.extendleft(sorted(leaving, reverse=True))
        for name in entering:
            waiting.popleft()
            live[name] = 0
            places.setdefault(name[0], 0)
        calls.append(shape)
        for name in list(live):
            live[name] += steps
            if live[name] >= len(groups[name[0]].responses[name[1]]):
                del live[name]
                left[name[0]] -= 1
                if not left[name[0]]:
                    del places[name[0]]
    return sampling, limits, calls, prompts


def prefill_arguments(job: _Job, params: Params) -> tuple:
    """Of the largest call of grpo_jax.rollout._prefill."""
    width, shards = bucket(job.cfg.rollout.max_prompt_tokens, 2), meshes.shards(job.host)
    size = shards * 2 ** (max(1, rollout._PREFILL_TOKENS // width).bit_length() - 1)
    shapes = (jax.ShapeDtypeStruct((size, width), "int32"), jax.ShapeDtypeStruct((size,), "int32"))
    return job.model, rollout.prefill_kernel(job.kernel, width), job.host, params, *_on(shapes, meshes.rows(job.host))


def decode_arguments(job: _Job, params: Params, sampling: Sampling, limits: Limits, shape: Shape) -> tuple:
    """Of grpo_jax.rollout._decode for a pool of that shape."""

    asked = rollout._Job(job.model, params, sampling, [], None, np.zeros((0, 0, 2), np.uint32), limits, job.host, job.kernel)
    pool = jax.eval_shape(lambda: rollout._empty(asked, shape))
    lies = rollout.places(pool, job.host, job.model)
    pool = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), pool, lies)
    rows, like = sum(shape.bands), lambda *extents: np.zeros(extents, np.int32)
    slots = attention.RowSlots(like(shape.prompts, sampling.group_size), like(rows))
    seats = rollout._Seats(np.zeros((rows, 2), np.uint32), like(rows), like(rows), slots)
    seats = _on(seats, NamedSharding(job.host, PartitionSpec()))
    return job.model, (sampling.temperature, 1.0, 0), limits.steps, params, pool, seats


# ---------------------------------------------------------------- seconds


def times(
    job: _Job,
    plan: Plan,
    learned: tuple[Params, Any, Params | None],
    local_params: Params,
    limits: Limits,
    calls: list[Shape],
    prompts: list[int],
) -> list[dict[str, Any]]:
    """The phases of a step of drawn lengths: what a device computes, moves and receives in each, and in how many seconds."""
    cfg, model, chip, count = job.cfg, job.model, job.where.device, job.where.count
    learns = cfg.update.passes * -(-cfg.rollout.prompts_per_step // cfg.update.prompts_per_minibatch)
    shards = meshes.shards(job.mesh)
    # The first mini-batch stands for all of a step.
    some = lengths(cfg)[: cfg.update.prompts_per_minibatch]
    packs = packing.pack(some, cfg.learner.tokens_per_microbatch, shards, kernel=job.kernel).packs
    one = {tuple(x.shape for x in jax.tree.leaves(p)): p for p in packs}
    shapes = Counter(tuple(x.shape for x in jax.tree.leaves(p)) for p in packs)
    rows: list[dict[str, Any]] = []

    def add(name: str, launched: float, moved: float, received: Traffic) -> None:
        ideal = (launched / chip.flops, moved / chip.bandwidth, received.local / chip.link + received.across / chip.network)
        real = (ideal[0] / MFU, ideal[1] / BANDWIDTH, ideal[2] / LINK)
        bound = ("FLOPs", "memory", "links")[real.index(max(real))]
        rows.append(
            {"phase": name, "tflops": launched / 1e12, "memory_gb": moved / 1e9, "link_gb": received.total / 1e9,
             "roofline_s": max(ideal), "expected_s": max(real), "bound": bound}
        )  # fmt: skip

    weights = shard_bytes(local_params)
    hosts = job.where.count // job.where.local
    add("reshard", 0, 2 * weights, Traffic(local=weights * (hosts == 1), across=weights * (hosts > 1)))
    launched = moved = 0
    for width, number in Counter(bucket(p, 2) for p in prompts).items():
        size = 2 ** (max(1, rollout._PREFILL_TOKENS // width).bit_length() - 1)  # prompts of one call on a device
        shape = (jax.ShapeDtypeStruct((size, width), "int32"), jax.ShapeDtypeStruct((size,), "int32"))
        args = model, rollout.prefill_kernel(job.kernel, width), None, _on(local_params, None), *shape
        program = rollout._prefill.trace(*args).jaxpr
        launched, moved = launched + number / size * flops.count(program), moved + number / size * flops.traffic(program)
    calls_of_prefill = -(-sum(prompts) // (rollout._PREFILL_TOKENS * meshes.shards(job.host)))
    add("prefill", launched / job.where.local, moved / job.where.local, _times(plan, "prefill", calls_of_prefill))
    token = rollout.cache_bytes_a_token(model, cfg.learner.dtype)
    launched = moved = 0
    for shape in calls:
        a_row = 2 * (model.layers * flops.layer_weights(model) + model.d_model * model.vocab)
        launched += limits.steps * sum(shape.bands) * a_row / job.where.local
        # A step reads the weights, all cache there is place for, and the logits a few times.
        logits = 4 * 4 * sum(shape.bands) * model.vocab / job.where.local
        cache = seating.cache_tokens(shape, limits) * token / meshes.shards(job.host)
        moved += limits.steps * (weights + cache + logits)
    add("decode", launched, moved, _times(plan, "decode", len(calls)))
    steps = {"reference": 1, "gradient": learns} if cfg.loss.kl_coefficient else {"gradient": learns}
    batches = -(-cfg.rollout.prompts_per_step // cfg.update.prompts_per_minibatch)
    for name, phase in (("reference", "reference"), ("gradient", "update")):
        if name not in steps:
            continue
        number = batches if name == "reference" else learns
        launched = moved = 0
        for shape, times_ in shapes.items():
            whole, row = (
                _traced(job, name, *learned, pack, mesh) for pack, mesh in ((one[shape], job.mesh), (_row(one[shape]), None))
            )
            launched += times_ * flops.count(whole) / count
            moved += times_ * flops.traffic(row) / job.mesh.shape["tensor"]
        state = 3 * (plan.memory.parameters + plan.memory.optimizer + plan.memory.gradients) if name == "gradient" else 0
        received = _times(plan, name, number * len(packs))
        if name == "gradient" and "optimizer" in plan.programs:
            received = _sum(received, _times(plan, "optimizer", number))
        add(phase, number * launched, number * (moved + state), received)
    return rows


def _traced(job: _Job, name: str, params: Params, sums: Any, frozen: Params | None, pack: Pack, mesh: Mesh | None) -> Any:
    """The jaxpr of a learner's program; with mesh None, that of one device that holds all weights."""
    objective = replace(job.objective, mesh=mesh)
    pack = _on(replace(pack, ref_logp=pack.old_logp if name == "gradient" and job.cfg.loss.kl_coefficient else None), None)
    if name == "reference":
        cast = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, job.cfg.learner.dtype), frozen or params)
        return learner.logprobs.trace(job.model, objective, cast, pack).jaxpr
    return learner.accumulate.trace(job.model, objective, _on(params, None), _on(sums, None), pack, _on(frozen, None)).jaxpr


def _row(pack: Pack) -> Pack:
    return jax.tree.map(lambda x: x[:1], pack)


def _times(plan: Plan, name: str, number: int) -> Traffic:
    one = plan.programs[name].traffic if name in plan.programs else Traffic()
    by_kind = {kind: number * size for kind, size in one.by_kind.items()}
    return Traffic(by_kind, number * one.local, number * one.across, one.unbounded)


def _sum(a: Traffic, b: Traffic) -> Traffic:
    return Traffic({}, a.local + b.local, a.across + b.across)
