"""Supervised fine-tuning, by the way of the data that GRPO takes: a group of one response, cross-entropy on its tokens.

`python -m grpo_jax.sft --help`. A row is imitated by its "response", or by its right calls after its "reasoning"
(data.prompt.target), or, with `--data.replies calls`, by the right calls alone. The run's folder is a model to start GRPO
from: `grpo_jax.train --model.path RUN`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from data.command_line import plural
from grpo_jax import checkpoint, config, console, hosts, inputs, learner
from grpo_jax.config import SftConfig
from grpo_jax.console import Progress
from grpo_jax.group import Group
from grpo_jax.inputs import Task, Tasks
from grpo_jax.learner import Objective
from grpo_jax.run import (
    Clock,
    Run,
    begin,
    cache_compilations,
    end_step,
    finish,
    guarded,
    memory,
    note_skipped,
    open_run,
    pack,
    padding,
    report,
    stoppable,
    update,
    watching,
)


def sft(cfg: SftConfig) -> None:
    """Runs, or resumes, the run of `cfg.run.dir`. Raises ValueError or FileNotFoundError for what a user can mend."""
    hosts.start(cfg.hosts)
    with stoppable(cfg.run) as stop:
        _sft(cfg, stop)


def _sft(cfg: SftConfig, stop: hosts.Stop) -> None:
    hosts.together(lambda: check(cfg))
    most = cfg.batch.max_tokens
    ready = begin(
        cfg,
        lambda policy: inputs.load_tasks(cfg.data, policy, most, cfg.run.seed, cfg.validation.limit, with_target=True),
        most,
        "--batch.max_tokens",
    )
    policy, tasks = ready.policy, ready.tasks
    steps = inputs.steps_of(cfg.run, len(tasks.train), cfg.batch.rows_per_step)
    remat = inputs.remat(cfg.learner, inputs.attention_kernel(cfg.learner, policy.model))
    objective = Objective(
        "cross_entropy", dtype=inputs.compute_dtype(cfg.learner), remat=remat, mesh=ready.mesh,
        lora=inputs.adapters(cfg.lora),
    )  # fmt: skip
    console.header(
        f"SFT: {cfg.model.path}",
        [
            ("data", tasks.summary()),
            ("replies", replies(cfg, tasks)),
            ("learned", inputs.learned(policy.model, objective.lora)),
            ("run", f"{plural(steps, 'step')} of {plural(cfg.batch.rows_per_step, 'row')}, in {cfg.run.dir}"),
            ("devices", inputs.devices(ready.mesh, cfg.learner, policy.model)),
        ],
    )
    run = open_run(cfg, "grpo_jax.sft", ready, objective, steps, stop)
    with guarded(run), Progress(steps, run.step) as show, watching(run, show):
        if run.step == 0:
            report(run, show, {"step": 0, **validate(run, tasks.validation, show)})
        for step in range(run.step + 1, steps + 1):
            hosts.halt(run.stop, run.longest)
            clock = Clock()
            batch = inputs.batch(tasks.train, cfg.batch.rows_per_step, cfg.run.seed, (step - 1) * cfg.batch.rows_per_step)
            show.phase("update")
            with clock.time("update"):
                packed = pack(run, [group_of(task) for task in batch])
                sums = update(run, objective, packed.packs)
            note_skipped(run, step, [sums], batch, [group_of(task) for task in batch])
            row = {
                "step": step,
                "epoch": step * len(batch) / len(tasks.train),
                "loss": float(sums["loss"] / max(sums["count"], 1)),
                "grad_norm": float(sums["grad_norm"]),
                "learner/skipped": int(sums["skipped"]),
                "learner/tokens_per_second": packed.tokens / clock.seconds["update"],
            }
            row |= clock.metrics() | padding([packed]) | memory()
            if step == steps or (cfg.validation.every and step % cfg.validation.every == 0):
                row |= validate(run, tasks.validation, show)
            end_step(run, show, row, step == steps)
    finish(run)


def check(cfg: SftConfig) -> None:
    """Everything that can be refused before anything is read."""
    inputs.require(cfg)
    checkpoint.compare(cfg, "grpo_jax.sft")
    if cfg.validation.benchmarks:
        raise ValueError("--validation.benchmarks: supervised training samples no responses; score its model with eval.run")
    if cfg.learner.tokens_per_microbatch < cfg.batch.max_tokens:
        raise ValueError(
            f"--learner.tokens_per_microbatch {cfg.learner.tokens_per_microbatch} is less than "
            f"--batch.max_tokens {cfg.batch.max_tokens}; raise it"
        )


def replies(cfg: SftConfig, tasks: Tasks) -> str:
    """What is imitated, for the header. Warns where an empty thought is, because nobody wants to teach that."""
    count = f"{len(tasks.train):,}"
    if cfg.data.replies == "calls":
        return f"all {count} are calls alone, without a think block"
    empty = sum(not {"reasoning", "response"} & task.example.extra.keys() for task in tasks.train)
    if empty:
        console.warn(
            f"{empty:,} of {count} rows have no thought, and teach an empty one: get thoughts (python -m scripts.distill), "
            "leave them out, or take --data.replies calls"
        )
    return f"{empty:,} of {count} are calls after an empty thought"


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
