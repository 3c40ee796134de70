"""What a model makes of tasks it was not trained on: responses, verdicts, scores. `python -m eval.run --help`

    rows of data      respond (eval.answer) -> judged, by the reward of training -> summarize -> scores.json
    benchmarks        eval.ask

A benchmark is Examples and a verdict.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from rich import progress

from data import command_line, demo, jsonl
from data.command_line import plural
from data.example import Example
from eval import ask, report
from eval.answer import TOO_LONG, Model, open_model, respond, response_tokens, room_for_prompt, template_of
from eval.selection import AceBench, ApiBank, Bfcl
from grpo_jax import checkpoint, config, console, inputs, reward
from grpo_jax.reward import Response, Reward
from grpo_jax.run import cache_compilations

DEMO_ROWS = 256
SAMPLES_AT = 0.7  # the temperature of training
_DEMO_SEED = 1  # runs on the demo's tasks validate on those of seed 0


@dataclass(frozen=True)
class Data:
    #: Rows to answer: a JSONL, JSON or Parquet file, a folder of them, a hub id; or `demo`, held-out tasks that the program
    #: makes, others than a run validates on.
    path: str = ""
    #: A text file that replaces the built-in thinking template, of rows and of benchmarks. Left out: that of the run,
    #: where --model is one.
    template: str | None = None


@dataclass(frozen=True)
class Server:
    """Of --endpoint."""

    #: Requests under way at once. Raise it until the rate grows no more or the server limits it; for a server of your own, as
    #: many as it batches.
    concurrency: int = 16
    #: Seconds from a request to the end of its answer; then it is asked again. Raise it for long thoughts, or a busy server.
    timeout: float = 300.0
    #: Times that a request is tried again after an error that may pass: rate limits, 5xx, no connection, no answer, rubbish.
    retries: int = 8
    #: The environment variable with the server's key. It may be unset, for a server that wants none.
    key_env: str = "OPENAI_API_KEY"
    #: More fields of a request, as a JSON object: '{"reasoning_effort": "low"}'. null takes one of ours out, for models that
    #: refuse it: '{"temperature": null, "max_tokens": null, "max_completion_tokens": 4096}'.
    body: str = "{}"


@dataclass(frozen=True)
class Args:
    """What a model makes of benchmarks of tool calls (BFCL, API-Bank, ACEBench), or of rows of your own: responses and scores.

    python -m eval.run --model DIR --benchmarks bfcl --out scores/bfcl

    python -m eval.run --model DIR --data.path rows.jsonl --out scores/rows

    An evaluation on benchmarks that was stopped goes on with the same command.
    """

    #: The folder to write. Of benchmarks: NAME.jsonl, a line an item as soon as it is answered, scores.json, scores.md; of
    #: rows: responses.jsonl (and samples.jsonl) with verdicts, each as soon as it is whole, and scores.json.
    out: Path
    #: A Hugging Face folder, a hub id, or the folder of a finished run. With --endpoint: the model's name there;
    #: with --replies: a name for the scores, if you like.
    model: str = ""
    data: Data = Data()
    #: bfcl, api_bank, acebench, or several with commas between. BFCL comes with a package, the others' files are yours to
    #: fetch; what is missing is said, with the command.
    benchmarks: str | None = None
    #: Some categories of the benchmarks, with commas between, for a look at one kind of task. Means that need others, too, are
    #: left out.
    categories: str | None = None
    #: For a first look. Of benchmarks: items of each category, at most, in equal steps over its file, the same ones each time.
    #: Of rows: so many in all; of a file's, some by a fixed shuffle; of the demo's, 256 if left out.
    limit: int | None = None
    bfcl: Bfcl = Bfcl()
    api_bank: ApiBank = ApiBank()
    acebench: AceBench = AceBench()
    #: Judge replies to benchmarks that were made elsewhere, without a model: JSON lines of {"id": ..., "output": ...},
    #: and "benchmark" where two have the id. What it lacks counts as wrong. The files NAME.jsonl of this program are such
    #: files.
    replies: Path | None = None
    #: Put benchmarks to a server of OpenAI's /chat/completions (vLLM, SGLang, llama.cpp, a provider) instead of loading a
    #: model, with the same prompts and verdicts: http://localhost:8000/v1.
    endpoint: str | None = None
    server: Server = Server()
    #: A response that reaches this length is stopped, and mostly wrong. Left out: what the run trained with, where --model is
    #: one of reinforcement learning; else half of the model's context, or of rows what the longest leaves of it; at most 4096.
    #: Lower it for speed, the same for all models that you compare.
    max_response_tokens: int | None = None
    #: Of rows: also draw so many responses to each. How many of them are right tells how sure a model is, where the greedy ones
    #: of two models are alike.
    samples: int = 0
    #: Of benchmarks: 0 if left out, the most likely reply, as published numbers mostly are; above, drawn, the same each time.
    #: Of --samples: 0.7 if left out, as in training (unless you changed it), to see what it learns from; other temperatures
    #: give scores that do not compare.
    temperature: float | None = None
    #: Responses decoded at once. Left out: what the device's memory holds (128 on a CPU). Lower it where memory runs out.
    rows: int | None = None
    #: Devices that share one copy of the weights, a divisor of this host's. Left out: as few as hold it. Raise it where memory
    #: runs out at the least --rows, or to answer few rows sooner.
    tensor: int | None = None


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


def run(args: Args) -> dict[str, Any]:
    """Answers benchmarks or rows, writes the files and returns the scores."""
    check(args)
    return ask.run(args) if args.benchmarks is not None else on_rows(args)


def check(args: Args) -> None:
    """Refuses what is out of its range or goes unread."""
    for name in ("limit", "max_response_tokens", "rows", "tensor"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value}: give a number from 1 on")
    for name, least in (("concurrency", 1), ("retries", 0)):
        if (value := getattr(args.server, name)) < least:
            raise ValueError(f"--server.{name} {value}: give a number from {least} on")
    if not 0 < args.server.timeout < float("inf"):
        raise ValueError(f"--server.timeout {args.server.timeout}: give a number of seconds above 0")
    if args.samples < 0:
        raise ValueError(f"--samples {args.samples}: give a number from 0 on")
    if args.temperature is not None and not (0 if args.benchmarks else 1e-9) <= args.temperature < float("inf"):
        raise ValueError(f"--temperature {args.temperature}: give a number {'from 0 on' if args.benchmarks else 'above 0'}")
    if args.tensor and jax.local_device_count() % args.tensor:
        raise ValueError(
            f"--tensor {args.tensor}: give a number that divides the {plural(jax.local_device_count(), 'device')} of this host"
        )
    if (args.benchmarks is None) == (not args.data.path):
        raise ValueError("give either --benchmarks bfcl,api_bank,acebench or --data.path, rows of your own")
    if args.replies and args.endpoint:
        raise ValueError("--replies and --endpoint: give one of the two")
    if not (args.model or args.replies):
        raise ValueError("--model is missing: give a folder, a hub id or a finished run (with --endpoint: its name there)")
    own = {"bfcl": Bfcl(), "api_bank": ApiBank(), "acebench": AceBench()}
    unread = {
        "--data.path": {"categories": None, "replies": None, "endpoint": None, "server": Server(), **own},
        "--benchmarks": {"samples": 0},
        "--replies": {
            **{"max_response_tokens": None, "temperature": None, "rows": None, "tensor": None},
            **{"data": Data(), "server": Server()},
        },
        "--endpoint": {"rows": None, "tensor": None},
    }
    given = (args.data.path, args.benchmarks, args.replies, args.endpoint)
    for (option, names), value in zip(unread.items(), given, strict=True):
        for name, off in names.items():
            if value and getattr(args, name) != off:
                named = name if name not in own and name not in ("data", "server") else f"{name}.*"
                raise ValueError(f"--{named} is not read with {option}: leave it out")
    if args.out.exists() and not args.out.is_dir():
        raise FileExistsError(f"--out {args.out}: this is a file: give a folder")


def on_rows(args: Args) -> dict[str, Any]:
    """Answers rows by greedy responses, and by --samples, judged by the reward of training."""
    if (args.out / "settings.json").exists():
        raise ValueError(f"{args.out}: holds an evaluation on benchmarks: give another --out")
    template = template_of(args.model, args.data.template, demo=args.data.path == "demo")
    temperature = SAMPLES_AT if args.temperature is None else args.temperature
    loaded = examples_of(args.data.path, args.limit)
    examples = loaded.examples
    if loaded.dropped:
        why = ", ".join(f"{reason} {count:,}" for reason, count in loaded.dropped.items())
        one, count = sum(loaded.dropped.values()) == 1, plural(sum(loaded.dropped.values()), "row")
        console.warn(f"{count} of {args.data.path} {'is' if one else 'are'} not scored, and in no share: {why}")
    policy = inputs.load_policy(args.model)
    if args.max_response_tokens is None:
        args = replace(args, max_response_tokens=response_tokens(args.model, policy, examples, template))
    room_for_prompt(policy, args.max_response_tokens)
    args.out.mkdir(parents=True, exist_ok=True)
    model = open_model(policy, args.tensor)
    greedy = _answers(args, model, examples, template, 1, 0.0)
    for name in ("scores.json", "samples.jsonl"):  # of an earlier evaluation: they would not belong to these responses
        (args.out / name).unlink(missing_ok=True)
    _write(args.out / "responses.jsonl", greedy)
    if args.samples:
        sampled = _answers(args, model, examples, template, args.samples, temperature)
        _write(args.out / "samples.jsonl", sampled)
    if missing := sum(answer.reason == TOO_LONG for answer in greedy):
        console.warn(f"too long for the model, and counted as wrong: {missing:,} of {plural(len(examples), 'prompt')}")
    scores = {"rows": len(examples), "dropped": loaded.dropped, **summarize(greedy)}
    if args.samples:
        scores["sampled"] = {"samples": args.samples, "temperature": temperature, **summarize(sampled)}
    scores |= {
        "model": args.model,
        "model_fingerprint": model.fingerprint,
        "data": args.data.path,
        "data_fingerprint": checkpoint.fingerprint([[example.id for example in examples], template]),
        "max_response_tokens": args.max_response_tokens,
    }
    report.write(args.out / "scores.json", json.dumps(scores, indent=2, ensure_ascii=False) + "\n")
    console.header(
        f"{args.model} on {plural(len(examples), 'row')} of {args.data.path}",
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


def _write(path: Path, answers: Sequence[Answer]) -> None:
    report.write(path, "".join(json.dumps(vars(answer), ensure_ascii=False) + "\n" for answer in answers))


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
