"""What a model makes of tasks it was not trained on: greedy responses, verdicts, scores. `python -m eval.run --help`

    open_model    a Hugging Face folder, a hub id or a finished run -> Model, on this host's devices
    respond       Model and Examples -> Responses, by the sampler and the prompt of training
    judged        Examples, Responses and a verdict (a grpo_jax.reward.Reward) -> Answers
    summarize     Answers -> what scores.json has of them

A benchmark is Examples and a verdict.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich import progress

from data import command_line, demo, jsonl, prompt
from data.example import Example
from eval import report
from grpo_jax import batch, checkpoint, config, console, hosts, inputs, mesh, reward, rollout
from grpo_jax.inputs import Policy, Task
from grpo_jax.reward import Response, Reward
from grpo_jax.rollout import Sampling
from grpo_jax.run import cache_compilations, free_memory
from models.decoder import Params

DEMO_ROWS = 256
_DEMO_SEED = 1  # runs on the demo's tasks validate on those of seed 0
TOO_LONG = "prompt_too_long"  # the reason of a task that the model's context has no room for; it counts as wrong


@dataclass(frozen=True)
class Data:
    path: str
    """Rows to answer: a JSONL, JSON or Parquet file, a folder of them, a hub id; or `demo`, held-out tasks that the program
    makes, others than a run validates on."""
    template: str | None = None
    """A text file that replaces the built-in thinking template. Left out: that of the run, where --model is one."""


@dataclass(frozen=True)
class Args:
    """Greedy responses of a model to rows of tool calls, each with its verdict, and the scores."""

    model: str
    """A Hugging Face folder, a hub id, or the folder of a finished run."""
    data: Data
    out: Path
    """The folder to write: responses.jsonl (and samples.jsonl) with verdicts, and scores.json."""
    limit: int | None = None
    """Rows to answer, at most: of a file's, some by a fixed shuffle; of the demo's, 256 if left out."""
    max_response_tokens: int = 4096
    """A response that reaches this length is stopped."""
    samples: int = 0
    """Also draw so many responses to each row. How many of them are right tells how sure a model is, where the greedy ones of
    two models are alike."""
    temperature: float = 0.7
    """Of those."""
    rows: int | None = None
    """Responses decoded at once. Left out: what the device's memory holds (128 on a CPU)."""
    tensor: int | None = None
    """Devices that share one copy of the weights. Left out: as few as hold it."""


@dataclass(frozen=True)
class Model:
    """A model that is ready to answer."""

    policy: Policy
    params: Params  # by layer, in the compute dtype
    local: Mesh
    free: int | None  # bytes of a device beside the weights; None: not known
    fingerprint: str  # of the weights


@dataclass(frozen=True)
class Answer:
    """One response and what it is worth."""

    id: str  # of the example
    text: str
    token_count: int
    truncated: bool
    verdict: float  # what the verdict function gives; 1 is right
    reason: str
    calls: bool  # whether the calls are right, with a think block or without


def open_model(path: str, tensor: int | None = None) -> Model:
    """Loads it; `path` as in `inputs.model_folder`. Raises ValueError or FileNotFoundError for what does not fit."""
    policy = inputs.load_policy(path)
    dtype = inputs.compute_dtype(config.Learner())
    tensor = tensor or mesh.rollout_tensor(policy.model, dtype, jax.local_device_count(), hosts.memory())
    local = mesh.local(tensor)
    mesh.shardings(local, policy.model, section="rollout")  # refuses what does not divide
    free = free_memory(policy.model, dtype, local)
    stored = inputs.load_params(policy, local, None)
    print_of_weights = checkpoint.fingerprint(checkpoint.checksums(stored))
    return Model(policy, mesh.host_copy(stored, policy.model, dtype, tensor), local, free, print_of_weights)


def respond(
    model: Model,
    examples: Sequence[Example],
    template: str | None = None,
    max_response_tokens: int = 4096,
    *,
    samples: int = 1,
    temperature: float = 0.0,
    rows: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[Response]]:
    """`samples` responses to each example, in their order; none where its prompt leaves no room for them.

    `template` is the text of one, as `data.prompt.load_template` returns it. At temperature 0, the default, greedy; above,
    the same ones each time (of seed 0).
    """
    policy, room = model.policy, model.policy.model.max_positions - max_response_tokens
    if room < 1:
        raise ValueError(
            f"--max_response_tokens {max_response_tokens:,} leaves no room for a prompt: {policy.path} is made for "
            f"{policy.model.max_positions:,} tokens; lower it"
        )
    encoded = [np.array(prompt.encode(example, policy.tokenizer, template), np.int32) for example in examples]
    fit = [i for i, ids in enumerate(encoded) if len(ids) <= room]
    tasks = [Task(examples[i], encoded[i]) for i in fit]
    longest = max((len(task.prompt) for task in tasks), default=1)
    learner, sampling = config.Learner(), Sampling(policy.end_tokens, samples, max_response_tokens, temperature)
    dtype, shards = inputs.compute_dtype(learner), mesh.shards(model.local)
    found, cache = rollout.pool_size(policy.model, dtype, sampling, longest, model.free, shards)
    groups, _ = rollout.sample(
        policy.model,
        model.params,
        [task.prompt for task in tasks],
        replace(sampling, rows=rows or found, cache_bytes=cache),
        mesh=model.local,
        kernel=inputs.attention_kernel(learner, policy.model),
        progress=progress,
    )
    # A reward that hands back what it is given: so the texts are those that training scores.
    _, read = batch.score(policy, tasks, groups, lambda responses, example: responses)
    by_place = dict(zip(fit, read, strict=True))
    return [by_place.get(i, []) for i in range(len(examples))]


def judged(examples: Sequence[Example], responses: Sequence[Sequence[Response]], verdict: Reward) -> list[Answer]:
    """Every response with its verdict; a task without any is wrong, once."""
    answers = []
    for example, row in zip(examples, responses, strict=True):
        for response, scored in zip(row, verdict(row, example), strict=True) if row else ():
            calls = reward.score(response.text, example.answer, "binary_no_reasoning") == 1
            value = float(scored.value)
            written = (response.text, response.token_count, response.truncated)
            answers.append(Answer(example.id, *written, value, scored.reason, calls))
        if not row:
            answers.append(Answer(example.id, "", 0, False, 0.0, TOO_LONG, False))
    return answers


def summarize(answers: Sequence[Answer]) -> dict[str, Any]:
    """Shares over all answers, those without a response among them; mean response tokens over those that have one."""
    rows = len(answers)
    answered = [answer for answer in answers if answer.reason != TOO_LONG]
    return {
        "accuracy": sum(answer.verdict >= 1 for answer in answers) / rows,
        "calls": sum(answer.calls for answer in answers) / rows,
        "reasons": {reason: count / rows for reason, count in Counter(answer.reason for answer in answers).most_common()},
        "response_tokens": sum(answer.token_count for answer in answered) / max(1, len(answered)),
        "truncated": sum(answer.truncated for answer in answers) / rows,
    }


def examples_of(path: str, limit: int | None) -> jsonl.Loaded:
    """The rows of `path`, or the demo's test tasks; at most `limit`; `dropped` is of all rows of `path`."""
    if path == "demo":
        return jsonl.Loaded(demo.tasks(limit or DEMO_ROWS, seed=_DEMO_SEED, held_out=True), {})
    loaded = jsonl.load(path)
    return replace(loaded, examples=jsonl.split(loaded.examples, 0.0, 0)[0][:limit])


def template_of(args: Args) -> str:
    """The text of the template: the one given, else that of the run, else the demo's for the demo's tasks."""
    path, file = args.data.template, Path(args.model) / "config.json"
    if path is None and (Path(args.model) / "hf").is_dir() and file.is_file():
        path = json.loads(file.read_text())["data"]["template"]
    elif path is None and args.data.path == "demo":
        path = str(config.DEMO_TEMPLATE)
    return prompt.load_template(path)


def run(args: Args) -> dict[str, Any]:
    """Answers the rows, writes both files and returns the scores."""
    for name in ("limit", "max_response_tokens", "rows", "tensor"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value}: give a number from 1 on")
    if args.samples < 0 or not args.temperature > 0:
        raise ValueError(f"--samples {args.samples} --temperature {args.temperature}: give a number from 0 on, and one above 0")
    template, loaded = template_of(args), examples_of(args.data.path, args.limit)
    examples = loaded.examples
    if loaded.dropped:
        why = ", ".join(f"{reason} {count:,}" for reason, count in loaded.dropped.items())
        console.warn(f"{sum(loaded.dropped.values()):,} rows of {args.data.path} are not scored, and in no share: {why}")
    model = open_model(args.model, args.tensor)
    answers = {"responses": _answers(args, model, examples, template, 1, 0.0)}
    if args.samples:
        answers["samples"] = _answers(args, model, examples, template, args.samples, args.temperature)
    greedy = answers["responses"]
    if missing := sum(answer.reason == TOO_LONG for answer in greedy):
        console.warn(f"{missing:,} of {len(examples):,} prompts are too long for the model; they count as wrong")
    scores = {"rows": len(examples), "dropped": loaded.dropped, **summarize(greedy)}
    if args.samples:
        scores["sampled"] = {"samples": args.samples, "temperature": args.temperature, **summarize(answers["samples"])}
    scores |= {
        "model": args.model,
        "model_fingerprint": model.fingerprint,
        "data": args.data.path,
        "data_fingerprint": checkpoint.fingerprint([[example.id for example in examples], template]),
        "max_response_tokens": args.max_response_tokens,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name, some in answers.items():
        lines = [json.dumps(vars(answer), ensure_ascii=False) + "\n" for answer in some]
        report.write(args.out / f"{name}.jsonl", "".join(lines))
    report.write(args.out / "scores.json", json.dumps(scores, indent=2, ensure_ascii=False) + "\n")
    console.header(
        f"{args.model} on {len(examples):,} rows of {args.data.path}",
        [
            ("accuracy", f"{scores['accuracy']:.1%}"),
            ("right calls", f"{scores['calls']:.1%}"),
            *([("sampled", f"{scores['sampled']['accuracy']:.1%} accuracy")] if args.samples else []),
            *((reason, f"{share:.1%}") for reason, share in scores["reasons"].items()),
            ("tokens", f"{scores['response_tokens']:.1f} a response"),
            ("written", str(args.out)),
        ],
    )
    return scores


def _answers(
    args: Args, model: Model, examples: Sequence[Example], template: str, samples: int, temperature: float
) -> list[Answer]:
    """Responses with a progress bar, judged."""
    columns = (progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeElapsedColumn())
    silent = not console.CONSOLE.is_terminal
    with progress.Progress("responses", *columns, console=console.CONSOLE, transient=True, disable=silent) as bar:
        shown = bar.add_task("responses", total=samples * len(examples))
        responses = respond(
            model,
            examples,
            template,
            args.max_response_tokens,
            samples=samples,
            temperature=temperature,
            rows=args.rows,
            progress=lambda done, total: bar.update(shown, completed=done, total=total),
        )
    return judged(examples, responses, reward.resolve("binary"))


def main() -> None:
    cache_compilations()
    run(command_line.read(Args, "python -m eval.run", sys.argv[1:]))


if __name__ == "__main__":
    config.run_main(main)
