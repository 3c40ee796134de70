"""Supervised fine-tuning, by the way of the data that GRPO takes: a group of one response, cross-entropy on its tokens.

`python -m grpo_jax.sft --help`. A row is imitated by its "response", or by its right calls after its "reasoning"
(data.prompt.target). The result is a Hugging Face folder to start GRPO from: `grpo_jax.train --model.path RUN/hf`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from grpo_jax import checkpoint, config, console, hosts, inputs, learner, mesh
from grpo_jax.config import SftConfig
from grpo_jax.console import Progress
from grpo_jax.group import Group
from grpo_jax.inputs import Policy, Task, Tasks
from grpo_jax.learner import Objective
from grpo_jax.run import (
    Clock,
    Run,
    cache_compilations,
    end_step,
    finish,
    guarded,
    memory,
    open_run,
    pack,
    padding,
    report,
    sampler_mesh,
)


def sft(cfg: SftConfig) -> None:
    """Runs, or resumes, the run of `cfg.run.dir`. Raises ValueError or FileNotFoundError for what a user can mend."""
    hosts.start(cfg.hosts)
    memory_of_device = hosts.memory()
    device_mesh, local, policy, tasks = hosts.together(lambda: prepare(cfg, memory_of_device))
    hosts.agree(lambda: inputs.identity(cfg, policy, tasks))
    steps = inputs.steps_of(cfg.run, len(tasks.train), cfg.batch.rows_per_step)
    remat = inputs.remat(cfg.learner, inputs.attention_kernel(cfg.learner, policy.model))
    objective = Objective(
        "cross_entropy", dtype=inputs.compute_dtype(cfg.learner), remat=remat, mesh=device_mesh,
        lora=inputs.adapters(cfg.lora),
    )  # fmt: skip
    without = [task for task in tasks.train if not {"reasoning", "response"} & task.example.extra.keys()]
    console.header(
        f"SFT: {cfg.model.path}",
        [
            ("data", tasks.summary()),
            ("replies", f"{len(without):,} of {len(tasks.train):,} are calls without a thought before them"),
            ("learned", inputs.learned(policy.model, objective.lora)),
            ("run", f"{steps:,} steps of {cfg.batch.rows_per_step:,} rows, in {cfg.run.dir}"),
            ("devices", inputs.devices(device_mesh, cfg.learner, policy.model)),
        ],
    )
    run = open_run(cfg, "grpo_jax.sft", policy, tasks, objective, steps, device_mesh, local)
    with guarded(run), Progress(steps, run.step) as show:
        if run.step == 0:
            report(run, show, {"step": 0, **validate(run, tasks.validation, show)})
        for step in range(run.step + 1, steps + 1):
            if any(asked for asked, _ in hosts.gather(run.stop.asked())):
                raise hosts.Stopped
            clock = Clock()
            batch = inputs.batch(tasks.train, cfg.batch.rows_per_step, cfg.run.seed, step)
            show.phase("update")
            with clock.time("update"):
                packed = pack(run, [group_of(task) for task in batch])
                params, optimizer, sums = learner.update(
                    policy.model,
                    objective,
                    run.optimizer,
                    run.state["params"],
                    run.state["optimizer"],
                    packed.packs,
                    run.frozen,
                )
                run.state = {"params": params, "optimizer": optimizer}
                sums = jax.device_get(sums)
            row = {
                "step": step,
                "epoch": step * len(batch) / len(tasks.train),
                "loss": float(sums["loss"] / max(sums["count"], 1)),
                "grad_norm": float(sums["grad_norm"]),
                "learner/tokens_per_second": packed.tokens / clock.seconds["update"],
            }
            row |= clock.metrics() | padding([packed]) | memory()
            if step == steps or (cfg.validation.every and step % cfg.validation.every == 0):
                row |= validate(run, tasks.validation, show)
            end_step(run, show, row, step == steps)
    finish(run)


def prepare(cfg: SftConfig, memory_of_device: int | None) -> tuple[Mesh, Mesh, Policy, Tasks]:
    """As grpo_jax.train.prepare."""
    inputs.require(cfg)
    checkpoint.compare(cfg, "grpo_jax.sft")
    if cfg.learner.tokens_per_microbatch < cfg.batch.max_tokens:
        raise ValueError(
            f"--learner.tokens_per_microbatch {cfg.learner.tokens_per_microbatch} is less than "
            f"--batch.max_tokens {cfg.batch.max_tokens}; raise it"
        )
    policy = inputs.load_policy(cfg.model.path)
    device_mesh = mesh.make(mesh.chosen(cfg.mesh, policy.model, mesh.extents(), memory_of_device, lora=cfg.lora.rank > 0))
    mesh.shardings(device_mesh, policy.model)  # refuses what does not divide
    local = sampler_mesh(policy.model, inputs.compute_dtype(cfg.learner), None, memory_of_device)
    inputs.check_context(policy, cfg.batch.max_tokens, "--batch.max_tokens")
    tasks = inputs.load_tasks(cfg.data, policy, cfg.batch.max_tokens, cfg.run.seed, cfg.validation.limit, with_target=True)
    return device_mesh, local, policy, tasks


def group_of(task: Task) -> Group:
    """A row as a group of one; no sampler, so no log-probs."""
    return Group(task.prompt, (task.target,), (np.zeros(len(task.target), np.float32),), (False,))


def validate(run: Run, tasks: Sequence[Task], show: Progress) -> dict[str, float]:
    """Mean cross-entropy of the held-out targets, in nats a token."""
    if not tasks:
        return {}
    show.phase("validation")
    total = count = 0.0
    for one in pack(run, [group_of(task) for task in tasks]).packs:
        logp = learner.logprobs(run.policy.model, run.objective, run.state["params"], one, run.frozen)
        total -= float((logp * one.mask).sum())
        count += int(one.mask.sum())
    return {"val/loss": total / count}


def main() -> None:
    cache_compilations()
    sft(config.parse(SftConfig, "grpo_jax.sft", sys.argv[1:]))


if __name__ == "__main__":
    config.run_main(main)
