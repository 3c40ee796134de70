"""What the policy makes of some tasks: responses, scored, of all hosts together, and what of them is learned from.

    draw       the batch of a step: the next prompts answered, scored, with their advantages
    exchange   some tasks answered and scored; each host answers its share, and all know the whole
    score      texts and rewards of responses, in plain Python on the host

`draw` is where DAPO's dynamic sampling is: groups of equal rewards give way to those of the next prompts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from grpo_jax import console, hosts, inputs, loss, rollout
from grpo_jax.config import TrainConfig
from grpo_jax.console import Progress
from grpo_jax.group import Group, flat, ragged
from grpo_jax.inputs import Policy, Task
from grpo_jax.reward import Response, Rewards, Scored
from grpo_jax.rollout import Sampling, Usage
from grpo_jax.run import Clock, Run, weights
from models.decoder import Params

LOOK_EVERY = 0.2  # seconds between two looks at whether to stop, while responses are scored
LONGEST_TRACE = 4000  # characters that are shown of where a user's reward failed


@dataclass(frozen=True)
class Batch:
    """What the policy made of some tasks, and what came of it; in the order of the tasks."""

    tasks: Sequence[Task]
    groups: list[Group]
    texts: list[list[str]]
    scored: list[list[Scored]]
    usage: Usage  # of all hosts together
    seconds: float  # of sampling, on the host that took longest


def draw(
    run: Run, tasks: Sequence[Task], sampling: Sampling, score_groups: Rewards, show: Progress, clock: Clock, step: int
) -> tuple[Batch, Batch]:
    """(all that is sampled in a step, what of it is learned from), with advantages; moves no place in the data by itself.

    They are the same, but where groups of equal rewards are replaced (--rollout.refills): then batch after batch is sampled
    until there are enough groups that teach something, or the refills are used up, and the first of them are taken.
    """
    settings, began = run.config.rollout, place(run)
    n, batches = settings.prompts_per_step, []
    verdict: list[list[float]] = []  # of each group, as the reward function gave it: length is no difference to learn from
    while True:
        earlier = [task for batch in batches for task in batch.tasks]
        prompts = inputs.batch(tasks, n, run.config.run.seed, began + len(earlier))
        batch = exchange(run, prompts, sampling, score_groups, show, "rollout", clock, step, earlier)
        verdict += [[s.value for s in row] for row in batch.scored]
        batches.append(with_advantages(run.config, batch))
        sampled = joined(batches)
        if not settings.refills:
            return sampled, sampled
        different = [i for i, verdicts in enumerate(verdict) if max(verdicts) > min(verdicts)]
        if len(different) >= n or len(batches) > settings.refills:
            return sampled, chosen(sampled, different[:n])


def place(run: Run) -> int:
    """How many prompts the run has taken from its data, in all steps before."""
    return run.meta.get("place", run.step * run.config.rollout.prompts_per_step)


def with_advantages(config: TrainConfig, batch: Batch) -> Batch:
    """The batch with the advantage of each response, which knows nothing but its group; rewards as training sees them."""
    rewards = np.array([[s.value for s in row] for row in batch.scored])
    if margin := config.reward.overlong_margin:
        lengths = np.array([[len(r) for r in group.responses] for group in batch.groups])
        rewards = rewards + config.reward.overlong_penalty * np.asarray(
            loss.overlong(lengths, config.rollout.max_response_tokens, margin)
        )
    advantages = np.asarray(loss.group_advantages(rewards, normalize=config.loss.normalize))
    groups = [replace(g, advantages=a) for g, a in zip(batch.groups, advantages, strict=True)]
    scored = [
        [replace(s, value=float(v)) for s, v in zip(*row, strict=True)] for row in zip(batch.scored, rewards, strict=True)
    ]
    return replace(batch, groups=groups, scored=scored)


def joined(batches: Sequence[Batch]) -> Batch:
    """Several batches as one."""
    one = lambda name: [x for batch in batches for x in getattr(batch, name)]  # noqa: E731
    usage = Usage(*(sum(getattr(batch.usage, f.name) for batch in batches) for f in fields(Usage)))
    seconds = sum(batch.seconds for batch in batches)
    return Batch(one("tasks"), one("groups"), one("texts"), one("scored"), usage, seconds)


def chosen(batch: Batch, keep: Sequence[int]) -> Batch:
    """Some groups of a batch; what it took to sample them stays what all took."""
    pick = lambda items: [items[i] for i in keep]  # noqa: E731
    return replace(
        batch, tasks=pick(batch.tasks), groups=pick(batch.groups), texts=pick(batch.texts), scored=pick(batch.scored)
    )


def exchange(
    run: Run,
    tasks: Sequence[Task],
    sampling: Sampling,
    score_groups: Rewards,
    show: Progress,
    phase: str,
    clock: Clock,
    step: int = 0,
    earlier: Sequence[Task] = (),
) -> Batch:
    """Responses of the present policy to the tasks, scored. Each host answers its share, and all then know the whole.

    `earlier` are the tasks that were answered before in this step: the same prompt gets other responses.
    Raises `hosts.Stopped`, on all hosts, where one was asked to stop.
    """
    hosts.halt(run.stop)
    every = rollout.attempts_of([task.prompt for task in (*earlier, *tasks)])
    mine, attempts = hosts.share(tasks), hosts.share(every[len(earlier) :])
    found: dict[str, Any] = {"stopped": True}
    arrays = {}
    params, before = weights(run), clock.seconds.get(phase, 0.0)
    try:
        with clock.time(phase):
            groups, usage = respond(run, params, mine, attempts, sampling, show, phase, step)
        with clock.time("reward"):
            texts, scored = score(run.policy, mine, groups, score_groups, watcher(run, show, len(mine)))
        found = {
            "stopped": run.stop.asked(),
            "texts": texts,
            "scores": [[(float(s.value), s.reason) for s in row] for row in scored],
            "traces": {s.reason: s.trace for row in reversed(scored) for s in row if s.trace},
            "usage": (usage.row_steps, usage.tokens),
            "seconds": clock.seconds[phase] - before,
        }
        arrays = flat(groups)
    except hosts.Stopped:
        pass
    del params
    with clock.time("exchange"):  # with the wait for the host that takes longest
        told = hosts.gather(found, arrays)
    if any(one["stopped"] for one, _ in told):
        raise hosts.Stopped
    for one, _ in told:
        tell_failures(run, phase, one["traces"])
    return assembled(tasks, told)


def assembled(tasks: Sequence[Task], told: Sequence[tuple[dict[str, Any], dict[str, np.ndarray]]]) -> Batch:
    """The batch from what every host has `told` of its share."""
    shares = []
    for i, (found, arrays) in enumerate(told):
        groups = ragged([task.prompt for task in tasks[i :: len(told)]], arrays)
        shares.append(list(zip(groups, found["texts"], found["scores"], strict=True)))
    groups, texts, scores = (list(x) for x in zip(*hosts.whole(shares), strict=True))
    scored = [[Scored(value, reason, {}) for value, reason in row] for row in scores]
    usage = Usage(*(sum(found["usage"][i] for found, _ in told) for i in range(2)))
    return Batch(tasks, groups, texts, scored, usage, max(found["seconds"] for found, _ in told))


def respond(
    run: Run,
    params: Params,
    tasks: Sequence[Task],
    attempts: Sequence[int],
    sampling: Sampling,
    show: Progress,
    phase: str,
    step: int,
) -> tuple[list[Group], Usage]:
    """Responses to the prompts of this host's tasks; raises `hosts.Stopped` soon after the run was asked to stop."""

    def progress(done: int, total: int) -> None:
        show.phase(phase, done, total)
        if run.stop.asked():
            raise hosts.Stopped

    return rollout.sample(
        run.policy.model,
        params,
        [task.prompt for task in tasks],
        sampling,
        seed=run.config.run.seed,
        step=step,
        mesh=run.local,
        kernel=run.kernel,
        attempts=attempts,
        progress=progress,
    )


def watcher(run: Run, show: Progress, total: int) -> Callable[[int], None]:
    """Shows how many groups are scored; raises `hosts.Stopped` soon after the run was asked to stop."""
    shown = -LOOK_EVERY

    def progress(done: int) -> None:
        nonlocal shown
        if time.monotonic() - shown > LOOK_EVERY:
            shown = time.monotonic()
            show.phase("reward", done, total)
            if run.stop.asked():
                raise hosts.Stopped

    return progress


def tell_failures(run: Run, phase: str, traces: Mapping[str, str]) -> None:
    """Warns, once a run for each reason, of calls of the user's own reward or of a verdict that came to nothing."""
    ours = phase in ("rollout", "validation")
    what = f"the reward {run.config.reward.kind}" if ours else f"the verdict of benchmark {phase}"
    for reason, trace in traces.items():
        if f"{what} {reason}" not in run.said:
            run.said.add(f"{what} {reason}")
            counted = f"score 0, and count in reason/{reason}" if ours else "count as wrong"
            console.warn(
                f"{what} failed. All responses of that group {counted}; so it is with further ones, of which nothing is "
                f"said. {console.visible(trace[-LONGEST_TRACE:])}"
            )


def score(
    policy: Policy,
    batch: Sequence[Task],
    groups: Sequence[Group],
    score_groups: Rewards,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[list[str]], list[list[Scored]]]:
    """The texts of all responses, without their end-of-turn token, and their scores."""
    texts, asked = [], []
    for task, group in zip(batch, groups, strict=True):
        ids = [r if cut else r[:-1] for r, cut in zip(group.responses, group.truncated, strict=True)]
        # Special tokens stay: where a tokenizer calls the format's tags special, they must not vanish from the text.
        # No cleaning: transformers 4 would, for Llama 3, take the space out of " ," and " .", inside arguments too.
        decoded = [policy.tokenizer.decode(r, skip_special_tokens=False, clean_up_tokenization_spaces=False) for r in ids]
        responses = [Response(t, len(r), cut) for t, r, cut in zip(decoded, group.responses, group.truncated, strict=True)]
        texts.append(decoded)
        asked.append((responses, task.example))
    return texts, score_groups(asked, progress)
