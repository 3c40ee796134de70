"""Whether a run fits a machine, and how long its step takes, before the machine is rented.

    python -m grpo_jax.plan tool-n1-7b --topology h100:8                  and the options of grpo_jax.train

The programs of a training step are compiled with the real compiler of the TPU or GPU, on a machine that has neither
(grpo_jax.forecast); no weights and no data are read.

    changes      where it does not fit, what to try, the cheapest first
    suggest      the first of these that fits, compiled like the plan itself
    show         what a person sees;   figures: all of it as JSON
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from rich.table import Table

from grpo_jax import config, console, devices, inputs
from grpo_jax.config import TrainConfig
from grpo_jax.forecast import BANDWIDTH, LINK, MFU, USABLE, Plan, Program, draw_up, model_of
from models import decoder
from models.decoder import DecoderConfig

# ---------------------------------------------------------------- what to change


def changes(plan: Plan) -> Iterator[TrainConfig]:
    """What may make a plan fit, the cheapest first; each goes on from the one before, as far as that helps."""
    cfg, count, model = plan.asked, plan.where.count, plan.model
    tensor = plan.mesh["tensor"]
    if "rollout" in plan.failing():
        wider = [n for n in range(plan.tensor + 1, plan.where.local + 1) if plan.where.local % n == 0 and model.heads % n == 0]
        for n in wider:
            cfg = replace(cfg, rollout=replace(cfg.rollout, tensor=n))
            yield cfg
    most = _most_fsdp(count // tensor, model)
    if plan.mesh["fsdp"] < most:
        cfg = replace(cfg, mesh=config.Mesh(count // tensor // most, most, tensor))
        yield cfg
    if "update" in plan.failing() or "reference" in plan.failing():
        now, least = cfg.learner.tokens_per_microbatch, _least(cfg)
        for tokens in dict.fromkeys(n for n in (now // 2, least) if least <= n < now):
            cfg = replace(cfg, learner=replace(cfg.learner, tokens_per_microbatch=tokens))
            yield cfg
        if inputs.remat(cfg.learner, plan.kernel) != "full":
            cfg = replace(cfg, learner=replace(cfg.learner, remat="full"))
            yield cfg
    if cfg.learner.offload == "none" and not cfg.lora.rank:
        cfg = replace(cfg, learner=replace(cfg.learner, offload="both"))
        yield cfg
    if "update" in plan.failing():
        for n in (2, 4):
            if n > tensor and count % n == 0 and not (model.heads % n or model.kv_heads % n):
                most = _most_fsdp(count // n, model)
                yield replace(cfg, mesh=config.Mesh(count // n // most, most, n))
    if not cfg.lora.rank:
        learner = replace(cfg.learner, offload="none")
        yield replace(cfg, lora=replace(cfg.lora, rank=16), mesh=plan.asked.mesh, learner=learner)
    sizes = {path: decoder.parameters(decoder.SIZES[name]) for path, name in _hub().items()}
    own = decoder.parameters(model)
    for path in sorted((path for path in sizes if sizes[path] < own), key=lambda path: -sizes[path]):
        yield replace(cfg, mesh=plan.asked.mesh, model=config.Model(path=path))


def _most_fsdp(devices: int, model: DecoderConfig) -> int:
    return max(n for n in range(1, devices + 1) if devices % n == 0 and model.d_model % n == 0)


def _least(cfg: TrainConfig) -> int:
    """Tokens that a micro-batch must hold."""
    return cfg.rollout.max_prompt_tokens + cfg.rollout.max_response_tokens


def _hub() -> dict[str, str]:
    """The models of the presets: hub id -> size."""
    paths = [make().model.path for name, make in config.PRESETS[TrainConfig].items() if name != "demo"]
    return {path: model_of(path)[0] for path in paths if "Qwen" in path}


def options(before: TrainConfig, after: TrainConfig) -> str:
    """What to add to the command line of one config to have another."""
    old, new = (config.flat(config.to_dict(one)) for one in (before, after))
    whole = before.mesh != after.mesh  # one size of a mesh makes sense beside the two others only
    return " ".join(
        f"--{name} {value}"
        for name, value in new.items()
        if value is not None and (value != old[name] or (whole and name.startswith("mesh.")))
    )


def suggest(plan: Plan, compiled: dict[str, Program]) -> tuple[str, Plan] | None:
    """The first change that has been found to fit, every program compiled; None where none does."""
    for cfg in changes(plan):
        said = options(plan.asked, cfg)
        console.note(f"trying {said}")
        try:
            attempt = draw_up(cfg, plan.where, compiled, hurry=True)
        except ValueError as error:  # a mesh that does not divide this model
            console.note(f"  {error}")
            continue
        if not attempt.failing():
            return said, attempt
        console.note(f"  does not fit: {', '.join(attempt.failing())}")
    return None


# ---------------------------------------------------------------- what a person sees


_SAID = {"longest": "gradient, longest groups", "gradient": "gradient, drawn lengths"}


def show(plan: Plan) -> None:
    """The tables of a plan."""
    mesh = " ".join(f"--mesh.{axis} {size}" for axis, size in plan.mesh.items())
    console.note(f"{mesh}; rollout on each host, weights over {plan.tensor} devices; attention by {plan.kernel}")
    memory, gb = plan.memory, lambda n: f"{n / 1e9:,.2f}"
    parts = {"learned parameters": memory.parameters, "frozen parameters": memory.frozen, "optimizer": memory.optimizer,
             "reference": memory.reference, "gradient sums": memory.gradients, "packs": memory.packs,
             "rollout weights": memory.rollout_weights, "KV pool, at most": memory.kv_pool}  # fmt: skip
    table = Table(title="a device's memory, GB", title_justify="left")
    for name in ("part", "GB"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for name, size in parts.items():
        table.add_row(name, gb(size))
    for name, size in memory.temporaries.items():
        table.add_row(f"temporaries of {_SAID.get(name, name)}", gb(size))
    table.add_section()
    for name, size in memory.phases().items():
        table.add_row(f"peak in {name}", gb(size))
    table.add_row(f"a program may have ({USABLE:.0%} of {plan.where.device.memory / 1e9:.1f})", gb(plan.limit))
    console.CONSOLE.print(table)
    table = Table(title="one step of drawn lengths, of each device", title_justify="left")
    for name in ("phase", "TFLOP", "memory GB", "links GB", "roofline s", "expected s", "bound by"):
        table.add_column(name, justify="left" if name in ("phase", "bound by") else "right")
    for x in plan.phases:
        numbers = [f"{x[k]:,.1f}" for k in ("tflops", "memory_gb", "link_gb", "roofline_s", "expected_s")]
        table.add_row(x["phase"], *numbers, x["bound"])
    console.CONSOLE.print(table)
    rollout, seconds = plan.cfg.rollout, sum(x["expected_s"] for x in plan.phases)
    console.note(
        f"a step of {rollout.prompts_per_step} prompts x {rollout.group_size}: about {seconds:.0f} s, if {MFU:.0%} of the "
        f"FLOP rate, {BANDWIDTH:.0%} of the memory's and {LINK:.0%} of the links' are reached; nothing of this is measured"
    )
    for name, program in plan.programs.items():
        if program.refused:
            console.warn(f"the compiler refused {name}: its messages are not known, and not in these seconds")


def figures(plan: Plan, suggestion: tuple[str, Plan] | None) -> dict[str, Any]:
    """All of it as plain JSON."""
    return {
        "topology": str(plan.where), "model": plan.cfg.model.path, "mesh": plan.mesh, "rollout_tensor": plan.tensor,
        "attention": plan.kernel, "rows": plan.rows, "packs": plan.packs,
        "memory": asdict(plan.memory), "peaks": plan.memory.phases(), "limit": plan.limit,
        "programs": {n: asdict(p) | {"link_bytes": p.traffic.total} for n, p in plan.programs.items()},
        "phases": plan.phases, "seconds_a_step": sum(x["expected_s"] for x in plan.phases),
        "roofline_seconds_a_step": sum(x["roofline_s"] for x in plan.phases), "fits": not plan.failing(),
        "does_not_fit": plan.failing(), "compile_seconds": sum(p.seconds for p in plan.programs.values()),
        "host_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "suggestion": suggestion and {"options": suggestion[0], **figures(suggestion[1], None)},
    }  # fmt: skip


def main() -> None:
    """The program; see above."""
    words, as_json = [w for w in sys.argv[1:] if w != "--json"], "--json" in sys.argv
    where = None
    for i, word in enumerate(words):
        if word.split("=")[0] == "--topology":
            value = word.partition("=")[2] or "".join(words[i + 1 : i + 2])
            if not value:
                break
            words[i : i + 1 + ("=" not in word)] = []
            where = devices.parse(value)
            break
    if where is None and "--help" not in words:
        raise ValueError("--topology is missing: v5e:8x8, v5p:4x4x4, h100:8, h100:4x8 (hosts x GPUs), ...")
    if "--help" in words:
        print(
            "--topology v5e:8x8 | v5p:4x4x4 | h100:8 | h100:4x8 (hosts x GPUs): the machine to plan for. --json: figures last."
        )
    cfg = config.parse(TrainConfig, "grpo_jax.plan", words)
    devices.prepare()
    name, model = model_of(cfg.model.path)
    compiled: dict[str, Program] = {}
    console.header(f"planning {name} on {where}", [("devices", f"{where.count}, {where.local} of each host")])
    plan = draw_up(cfg, where, compiled)
    show(plan)
    warned = sum(len(p.warnings) for p in plan.programs.values())
    console.note(f"arrays replicated against the partitioner's will: {warned}")
    unbounded = sum(p.traffic.unbounded for p in plan.programs.values())
    if unbounded:
        console.warn(f"{unbounded} collectives stand in loops of unknown length, and are counted once")
    suggestion = None
    if not plan.failing():
        console.note("fits")
        if where.device.platform == "gpu":
            console.note(f"with XLA_PYTHON_CLIENT_MEM_FRACTION={USABLE} in the environment; jax takes 0.75 otherwise")
    else:
        console.note(f"does not fit: {', '.join(plan.failing())}")
        suggestion = suggest(plan, compiled)
        if suggestion is None:
            console.note("nothing that was tried fits")
        else:
            show(suggestion[1])
            console.note(f"fits, compiled: {suggestion[0]}")
    if as_json:
        print(json.dumps(figures(plan, suggestion)))


if __name__ == "__main__":
    config.run_main(main)
