"""Benchmarks that a run answers at each validation, beside its own held-out rows: --validation.benchmarks

    read       names, package.module:function with commas between -> Benchmarks; nothing of the run is needed for it
    encoded    a Benchmark and the policy -> Asked: the prompts of the tasks that are asked

The function that a name leads to takes no arguments and returns (examples, verdict): tasks, and a function of their responses
as rewards are, (responses, example) -> a number or a `Scored` for each; 1 or more is right. `eval.benchmark.for_training`
makes both from a benchmark's items.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from data import prompt
from data.example import Example
from grpo_jax import checkpoint, config, console, reward
from grpo_jax.inputs import Policy, Task
from grpo_jax.reward import Reward

Item = TypeVar("Item")

_TAKEN = ("reason", "response_tokens")  # of val/<name>/..., by what validation on rows measures


@dataclass(frozen=True)
class Benchmark:
    """Tasks to answer, and what is right."""

    name: str  # in the metrics: val/<name>/accuracy
    examples: list[Example]
    verdict: Reward


@dataclass(frozen=True)
class Asked:
    """The tasks of a benchmark that a run asks."""

    name: str
    tasks: list[Task]  # those whose prompt fits
    count: int  # with those whose prompt does not, which are wrong
    of: int  # the benchmark has
    verdict: Reward


def read(paths: str | None) -> list[Benchmark]:
    """The benchmarks that --validation.benchmarks names; each function is called once, here.

    A benchmark's name is that of its function, or `package.module.function` where that is not its alone.
    Raises ValueError, in one line, for what is no path, a path that leads to no function, and a function that returns something
    else; what the function itself raises passes through.
    """
    named = list(dict.fromkeys(path.strip() for path in paths.split(","))) if paths is not None else []
    if wrong := [path for path in named if not reward.is_path(path)]:
        raise ValueError(f"--validation.benchmarks {paths}: {wrong[0]!r} is no package.module:function")
    uses = Counter([*_TAKEN, *(path.partition(":")[2] for path in named)])
    found = []
    for path in named:
        label, function = f"benchmark {path!r}", path.partition(":")[2]
        examples, verdict = _called(reward.imported(path, "benchmark"), label)
        name = function if uses[function] == 1 else path.replace(":", ".")
        found.append(Benchmark(name, examples, reward.checked(verdict, label)))
    return found


def _called(function: Callable[[], Any], label: str) -> tuple[list[Example], Callable[..., Any]]:
    """What a benchmark's function returns, or a ValueError that begins with the label."""
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError) as error:  # ValueError: a function of C may not tell
        raise ValueError(f"{label} takes arguments ({error}); give a function that takes none") from None
    result = function()
    examples, verdict = result if isinstance(result, tuple) and len(result) == 2 else (None, None)
    if not isinstance(examples, Sequence) or not callable(verdict):
        raise ValueError(f"{label} returned {result!r:.80}; return (examples, verdict), a list and a function")
    if strange := [example for example in examples if not isinstance(example, Example)]:
        raise ValueError(f"{label} has {strange[0]!r:.80} among its examples; make them with data.example.make")
    if not examples:
        raise ValueError(f"{label} has no examples")
    return list(examples), verdict


def encoded(benchmark: Benchmark, policy: Policy, settings: config.Data, most: int, limit: int) -> Asked:
    """Prompts in token ids, of `limit` tasks spread evenly where there are more, always the same ones.

    Prompts of more than `most` tokens are not asked, and count as wrong, since scores over other tasks do not compare; how
    many is said. Raises ValueError where none is left.
    """
    template = prompt.load_template(settings.template)
    encode = lambda example: np.array(prompt.encode(example, policy.tokenizer, template), np.int32)  # noqa: E731
    every = [Task(example, encode(example)) for example in spread(benchmark.examples, limit)]
    tasks = [task for task in every if len(task.prompt) <= most]
    long = f"of {len(every):,} prompts of benchmark {benchmark.name} take more than --rollout.max_prompt_tokens {most:,}"
    long += f" (the longest {max(len(task.prompt) for task in every):,})"
    if not tasks:
        raise ValueError(f"all {long}; raise that, or leave the benchmark out")
    if len(tasks) < len(every):
        console.warn(f"{len(every) - len(tasks):,} {long}, and count as wrong")
    return Asked(benchmark.name, tasks, len(every), len(benchmark.examples), benchmark.verdict)


def spread(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most `limit` of them, in equal steps from the first on: files are sorted, so their beginning is not like the rest."""
    count = len(items) if limit is None else min(limit, len(items))
    return [items[place * len(items) // count] for place in range(count)]


def summary(asked: Sequence[Asked]) -> str:
    """What is asked, for the header of a run."""
    counts = [f"{one.count:,}" if one.count == one.of else f"{one.count:,} of {one.of:,}" for one in asked]
    return ", ".join(f"{one.name} {count}" for one, count in zip(asked, counts, strict=True))


def identity(asked: Sequence[Asked]) -> dict[str, str]:
    """What all hosts of a run must have alike, as in grpo_jax.inputs.identity."""
    tasks = [[one.name, [[task.example.id, task.prompt.tolist()] for task in one.tasks]] for one in asked]
    return {"--validation.benchmarks": checkpoint.fingerprint(tasks)}
