"""GRPO as Tool-N1 runs it: sample groups, score them, take advantages, pack, learn. `python -m grpo_jax.train --help`

From a prompt to a gradient:

    batch.draw              the next prompts -> a batch of groups with their advantages. Inside:
        rollout.sample          prompts -> groups of responses, each prompt computed once
        score                   groups -> rewards, in plain Python on the host
        loss.group_advantages   rewards -> advantages
    packing.pack            groups -> packs of one compiled shape
    learner.update          packs -> gradient, optimizer step

Departures from the released Tool-N1 code: one mean over all response tokens of a mini-batch (see grpo_jax.loss); the
sampler's log-probs serve as the old ones, since sampler and learner share weights and differ by rounding only, and
their distance is measured every step.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from data.command_line import plural
from grpo_jax import benchmarks, checkpoint, config, console, hosts, inputs, learner, mesh, metrics, reward, rollout, workers
from grpo_jax.batch import Batch, draw, exchange, place
from grpo_jax.benchmarks import Asked, Benchmark
from grpo_jax.config import TrainConfig
from grpo_jax.console import Progress
from grpo_jax.group import Group
from grpo_jax.inputs import Policy, Task, Tasks
from grpo_jax.learner import Objective
from grpo_jax.packing import Pack, Packed
from grpo_jax.reward import Rewards
from grpo_jax.rollout import Sampling
from grpo_jax.run import (
    Clock,
    Run,
    begin,
    cache_compilations,
    end_step,
    finish,
    free_memory,
    guarded,
    memory,
    note_skipped,
    open_run,
    pack,
    padding,
    report,
    stoppable,
    update,
    watch,
    watching,
)  # fmt: skip
from models.decoder import DecoderConfig


def train(cfg: TrainConfig) -> None:
    """Runs, or resumes, the run of `cfg.run.dir`. Raises ValueError or FileNotFoundError for what a user can mend."""
    hosts.start(cfg.hosts)
    with stoppable(cfg.run) as stop:
        _train(cfg, stop)


def _train(cfg: TrainConfig, stop: hosts.Stop) -> None:
    found = hosts.together(lambda: check(cfg))
    most = cfg.rollout.max_prompt_tokens
    ready = begin(
        cfg,
        lambda policy: inputs.load_tasks(cfg.data, policy, most, cfg.run.seed, cfg.validation.limit),
        most + cfg.rollout.max_response_tokens,
        "--rollout.max_prompt_tokens and --rollout.max_response_tokens",
        cfg.rollout.tensor,
    )
    policy, tasks = ready.policy, ready.tasks
    asked = hosts.together(lambda: [benchmarks.encoded(one, policy, cfg.data, most, cfg.validation.limit) for one in found])
    hosts.agree(lambda: benchmarks.identity(asked))
    steps = inputs.steps_of(cfg.run, len(tasks.train), cfg.rollout.prompts_per_step)
    introduce(cfg, policy, tasks, asked, steps, ready.mesh)
    objective = objective_of(cfg, ready.mesh, policy.model)
    run = open_run(cfg, "grpo_jax.train", ready, objective, steps * minibatches(cfg), stop)
    sampling = sampling_of(cfg.rollout, run)
    scoring = workers.opened(cfg.reward.kind, cfg.reward.workers, cfg.reward.timeout)
    with guarded(run), Progress(steps, run.step) as show, watching(run, show), scoring as score_groups:
        validated = functools.partial(validate, run, tasks.validation, asked, sampling, score_groups, show)
        if "pending" in run.meta:  # it was stopped in the validation of its last step
            row = run.meta["pending"]
            end_step(run, show, row | validated(), row["step"] == steps)
        elif run.step == 0:
            report(run, show, {"step": 0, **validated()})
        for step in range(run.step + 1, steps + 1):
            hosts.halt(run.stop, run.longest)
            clock = Clock()
            sampled, batch = draw(run, tasks.train, sampling, score_groups, show, clock, step)
            packed = pack_minibatches(run, batch.groups)
            with clock.time("reference"):
                minibatch_packs = add_reference(run, [one.packs for one in packed], show)
            hosts.halt(run.stop)  # from here on the step is ended
            with clock.time("update"):
                done = learn(run, minibatch_packs, show)
            learned = learner.step_metrics(done) if done else {}  # else no group had anything to teach
            note_skipped(run, step, done, batch.tasks, batch.groups)
            taken = place(run) + len(sampled.tasks)
            row = {"step": step, "epoch": taken / len(tasks.train)}
            row |= metrics.summarize(sampled.groups, sampled.scored) | learned
            row |= speeds(sampled, batch, clock) | padding(packed) | memory()
            if run.log:
                run.log.rollouts(rollout_rows(step, sampled, batch, policy))
            watch(run, row)
            run.meta["place"] = taken
            if step == steps or (cfg.validation.every and step % cfg.validation.every == 0):
                run.step, run.whole, run.meta["pending"] = step, True, metrics.plain(row)
                row |= validated()
            end_step(run, show, row, step == steps)
    finish(run)


def check(cfg: TrainConfig) -> list[Benchmark]:
    """Everything that can be refused before anything is read; returns the benchmarks."""
    inputs.require(cfg)
    check_options(cfg)
    checkpoint.compare(cfg, "grpo_jax.train")
    reward.resolve(cfg.reward.kind)
    return benchmarks.read(cfg.validation.benchmarks)


def check_options(cfg: TrainConfig) -> None:
    """Raises ValueError for options that do not go together."""
    inputs.check_options(cfg)
    if cfg.rollout.top_p != 1 or cfg.rollout.top_k != 0:
        raise ValueError(
            "--rollout.top_p must be 1 and --rollout.top_k 0 in training: the loss takes log-probs of the whole distribution"
        )
    if cfg.rollout.temperature <= 0:
        raise ValueError(f"--rollout.temperature {cfg.rollout.temperature}: training samples, so it must be above 0")
    if cfg.rollout.group_size == 1 and cfg.loss.normalize == "std":
        raise ValueError(
            "--rollout.group_size 1 with --loss.normalize std: one response has no spread to divide by; "
            "take 2 or more, or --loss.normalize mean_only"
        )
    if cfg.rollout.group_size == 1 and (cfg.rollout.refills or cfg.loss.skip_zero_variance):
        raise ValueError(
            "--rollout.group_size 1 with --rollout.refills or --loss.skip_zero_variance: the rewards of one response never "
            "differ; take 2 or more"
        )
    if 0 < cfg.loss.importance_cap < 1:
        raise ValueError(
            f"--loss.importance_cap {cfg.loss.importance_cap}: below 1 it would weigh down every token; give 2, say"
        )
    if cfg.loss.clip_low > 1:
        raise ValueError(f"--loss.clip_low {cfg.loss.clip_low}: a ratio is never below 0, so give at most 1")
    if cfg.loss.importance_cap and not cfg.update.recompute_old_logp:
        raise ValueError(
            "--loss.importance_cap compares the learner's log-probs with the sampler's: give --update.recompute_old_logp, too"
        )
    if cfg.reward.overlong_margin > cfg.rollout.max_response_tokens:
        raise ValueError(
            f"--reward.overlong_margin {cfg.reward.overlong_margin} is more than --rollout.max_response_tokens "
            f"{cfg.rollout.max_response_tokens}; lower it"
        )
    if cfg.validation.benchmarks and not cfg.validation.limit:
        raise ValueError("--validation.limit 0 asks no benchmark either: raise it, or leave out --validation.benchmarks")
    longest = cfg.rollout.max_prompt_tokens + cfg.rollout.max_response_tokens
    if cfg.learner.tokens_per_microbatch < longest:
        raise ValueError(
            f"--learner.tokens_per_microbatch {cfg.learner.tokens_per_microbatch} is too small for the longest prompt and "
            f"response ({longest} tokens); raise it, or lower --rollout.max_prompt_tokens or --rollout.max_response_tokens"
        )


def sampling_of(settings: config.Rollout, run: Run) -> Sampling:
    """How to sample. The size of the pool is resolved once a run, from the memory of the device, and kept in `run.meta`."""
    sampling = Sampling(
        run.policy.end_tokens, settings.group_size, settings.max_response_tokens, settings.temperature,
        decode_steps_per_call=settings.decode_steps_per_call,
    )  # fmt: skip
    resolved = run.meta["resolved"]
    if "rows" not in resolved:
        free = free_memory(run.policy.model, run.objective.dtype, run.local)
        here = rollout.pool_size(
            run.policy.model, run.objective.dtype, sampling, settings.max_prompt_tokens, free, mesh.shards(run.local)
        )
        resolved["rows"], resolved["cache_bytes"] = min(tuple(found) for found, _ in hosts.gather(here))
    sampling = replace(sampling, rows=settings.rows or resolved["rows"], cache_bytes=resolved["cache_bytes"])
    bound = "" if sampling.cache_bytes is None else f", their caches in {sampling.cache_bytes / 1e9:.3g} GB a device"
    console.note(f"sampling: up to {sampling.rows:,} responses at once{bound} (--rollout.rows)")
    return sampling


def objective_of(cfg: TrainConfig, device_mesh: Mesh, model: DecoderConfig, platform: str | None = None) -> Objective:
    """`platform` as in grpo_jax.inputs.attention_kernel."""
    remat = inputs.remat(cfg.learner, inputs.attention_kernel(cfg.learner, model, platform))
    of_loss = ("clip_low", "clip_high", "mean", "importance_cap", "kl_coefficient", "kl_kind", "entropy_coefficient")
    return Objective(
        cfg.loss.objective, cfg.rollout.temperature, **{name: getattr(cfg.loss, name) for name in of_loss},
        longest=cfg.rollout.max_response_tokens, dtype=inputs.compute_dtype(cfg.learner), remat=remat, mesh=device_mesh,
        lora=inputs.adapters(cfg.lora),
    )  # fmt: skip


def minibatches(cfg: TrainConfig) -> int:
    """Optimizer steps a step."""
    return cfg.update.passes * -(-cfg.rollout.prompts_per_step // cfg.update.prompts_per_minibatch)


def introduce(cfg: TrainConfig, policy: Policy, tasks: Tasks, asked: Sequence[Asked], steps: int, device_mesh: Mesh) -> None:
    """Prints the arithmetic of the run."""
    if cfg.loss.objective == "gspo" and cfg.loss.clip_high > 0.05:
        console.warn(
            f"--loss.clip_high {cfg.loss.clip_high} clips next to nothing with --loss.objective gspo, whose ratios are of "
            "whole responses; the paper has --loss.clip_low 3e-4 --loss.clip_high 4e-4"
        )
    n, g = cfg.rollout.prompts_per_step, cfg.rollout.group_size
    updates = f"{plural(minibatches(cfg), 'optimizer step')} of {plural(min(n, cfg.update.prompts_per_minibatch), 'prompt')}"
    console.header(
        f"GRPO: {cfg.model.path}",
        [
            ("data", tasks.summary()),
            *([("benchmarks", benchmarks.summary(asked))] if asked else []),
            ("a step", f"{plural(n, 'prompt')} x {g} = {plural(n * g, 'response')}; {updates}"),
            ("a micro-batch", f"{cfg.learner.tokens_per_microbatch:,} tokens a device at most, prompts counted once a group"),
            ("learned", inputs.learned(policy.model, inputs.adapters(cfg.lora))),
            ("run", f"{plural(steps, 'step')} = {steps * n / len(tasks.train):.3g} epochs, in {cfg.run.dir}"),
            ("devices", inputs.devices(device_mesh, cfg.learner, policy.model)),
        ],
    )


def pack_minibatches(run: Run, groups: Sequence[Group]) -> list[Packed]:
    """The micro-batches of each mini-batch, on the devices."""
    if run.config.loss.skip_zero_variance:
        groups = [g for g in groups if np.any(g.advantages != 0)]
    count = -(-len(groups) // run.config.update.prompts_per_minibatch)
    # As even as can be: where groups were left out, one that is over must not take an optimizer step of its own.
    ends = [i * len(groups) // count for i in range(count + 1)] if count else []
    return [pack(run, groups[i:j]) for i, j in zip(ends, ends[1:], strict=False)]


def add_reference(run: Run, minibatch_packs: list[list[Pack]], show: Progress) -> list[list[Pack]]:
    """Packs with the reference's log-probs, and with the old ones recomputed where the config wants that."""
    if run.reference is None and not run.config.update.recompute_old_logp:
        return minibatch_packs
    show.phase("reference")
    logprobs = functools.partial(learner.logprobs, run.policy.model, run.objective)
    reference = run.reference and mesh.moved(run.reference, "device")

    def added(pack: Pack) -> Pack:
        if run.config.update.recompute_old_logp:
            pack = replace(pack, old_logp=logprobs(run.state["params"], pack, run.frozen))
        return pack if reference is None else replace(pack, ref_logp=logprobs(reference, pack))

    return jax.block_until_ready([[added(pack) for pack in packs] for packs in minibatch_packs])


def learn(run: Run, minibatch_packs: list[list[Pack]], show: Progress) -> list[dict[str, Any]]:
    """One optimizer step a mini-batch and pass, and what came of each; changes `run.state`."""
    done, total = [], run.config.update.passes * len(minibatch_packs)
    for packs in minibatch_packs * run.config.update.passes:
        show.phase("update", len(done), total)
        # GSPO's edges lie within what two programs round in bfloat16; in the first step no program need be asked.
        objective = replace(run.objective, unmoved=run.objective.kind == "gspo" and not done)
        done.append(update(run, objective, packs))
    return done


def validate(
    run: Run, tasks: Sequence[Task], asked: Sequence[Asked], sampling: Sampling, score_groups: Rewards, show: Progress
) -> dict[str, Any]:
    """Greedy responses to the held-out rows: the share with a reward of at least 1, and the reasons. To benchmarks, likewise:
    the share that their verdicts call right; a verdict that fails calls nothing right."""
    clock, greedy, row = Clock(), replace(sampling, temperature=0.0, group_size=1), {}
    right = lambda batch: sum(scored[0].value >= 1 for scored in batch.scored)  # noqa: E731
    if tasks:
        batch = exchange(run, tasks, greedy, score_groups, show, "validation", clock)
        row["val/accuracy"], row["val/count"] = right(batch) / len(tasks), len(tasks)
        summary = metrics.summarize(batch.groups, batch.scored)
        row |= {f"val/{k}": v for k, v in summary.items() if k.startswith(("reason/", "response_tokens/mean"))}
    for one in asked:
        batch = exchange(run, one.tasks, greedy, reward.each(reward.forgiving(one.verdict)), show, one.name, clock)
        row[f"val/{one.name}/accuracy"] = right(batch) / one.count
    return row | {"time/validation": sum(clock.seconds.values())} if row else {}


def speeds(sampled: Batch, batch: Batch, clock: Clock) -> dict[str, float]:
    times = clock.metrics()
    learning = times["time/update"] + times["time/reference"]
    return {
        **times,
        "rollout/prompts": len(sampled.tasks),
        "learner/prompts": len(batch.tasks),
        "rollout/tokens_per_second": sampled.usage.tokens / sampled.seconds,
        "rollout/slot_utilization": sampled.usage.tokens / sampled.usage.row_steps,
        "learner/tokens_per_second": sum(g.tokens for g in batch.groups) / learning,
    }


def rollout_rows(step: int, sampled: Batch, batch: Batch, policy: Policy) -> list[dict]:
    """The rows of rollouts.jsonl: one a group that was sampled; "learned" is whether it is in the batch."""
    rows, learned = [], {id(group) for group in batch.groups}
    for task, group, decoded, scores in zip(sampled.tasks, sampled.groups, sampled.texts, sampled.scored, strict=True):
        responses = [
            {
                "text": t,
                "token_count": len(r),
                "truncated": cut,
                "value": s.value,
                "reason": s.reason,
                "advantage": float(a),
            }
            for t, r, cut, s, a in zip(decoded, group.responses, group.truncated, scores, group.advantages, strict=True)
        ]
        prompt = policy.tokenizer.decode(group.prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        rows.append(
            {
                "step": step,
                "id": task.example.id,
                "prompt": prompt,
                "answer": list(task.example.answer),
                "learned": id(group) in learned,
                "responses": responses,
            }
        )
    return rows


def main() -> None:
    cache_compilations()
    train(config.parse(TrainConfig, "grpo_jax.train", sys.argv[1:]))


if __name__ == "__main__":
    config.run_main(main)
