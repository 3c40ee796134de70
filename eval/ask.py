"""Benchmarks put to a model: each reply judged and on disk as soon as it is there, then the scores.

    by_sampler    a model that we load, answering by the sampler and the prompt of training
    by_server     one behind a server of OpenAI's /chat/completions, asked the same
    by_file       replies that were made elsewhere
    run           one of them, as the options say -> scores.json, scores.md and the tables on the terminal

The same command again goes on where it stopped (eval.record); replies of a file are judged anew each time.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import progress

from data import prompt
from data.command_line import plural
from eval import answer, completions, record, replies, report, scores, selection
from eval.benchmark import Item
from eval.completions import Answer, Asking
from eval.record import NO_REPLY, Results
from eval.selection import Benchmark
from grpo_jax import checkpoint, console, inputs
from grpo_jax.reward import Response

if TYPE_CHECKING:
    from eval.run import Args

LINE_EVERY = 30.0  # seconds between two lines of progress where there is no terminal
BACKOFF = 1.0  # seconds before a server is asked again for the first time

Asked = tuple[Benchmark, Item]


def run(args: Args) -> dict[str, Any]:
    """Answers, or reads, what is missing, and returns the scores. `args` are those of eval.run, checked."""
    options = {"bfcl": args.bfcl, "api_bank": args.api_bank, "acebench": args.acebench}
    benchmarks = selection.choose(args.benchmarks, args.categories, args.limit, options)
    template = answer.template_of(args.model if not args.endpoint else "", args.data.template)
    how = by_file if args.replies else by_server if args.endpoint else by_sampler
    found, settings = how(args, benchmarks, template)
    rows = {
        benchmark.name: [found[benchmark.name].get(item.id) or _unanswered(benchmark, item) for item in benchmark.items]
        for benchmark in benchmarks
    }
    result = {
        "model": args.model or str(args.replies),
        "model_fingerprint": settings["model_fingerprint"],
        "replies": settings["replies"],
        "endpoint": args.endpoint,
        **{name: settings[name] for name in ("max_response_tokens", "temperature", "template_fingerprint")},
        "benchmarks": {benchmark.name: scores.of(benchmark, rows[benchmark.name]) for benchmark in benchmarks},
    }
    _write(args.out, result, settings)
    for name in rows:
        console.CONSOLE.print(scores.shown(name, result["benchmarks"][name]), soft_wrap=not console.CONSOLE.is_terminal)
    _warn(rows, settings)
    console.header("", [("written", f"{args.out}: scores.md, scores.json, {', '.join(f'{name}.jsonl' for name in rows)}")])
    return result


def _unanswered(benchmark: Benchmark, item: Item) -> record.Row:
    return record.row(benchmark, item, "", missing=NO_REPLY)


def _write(out: Path, result: dict[str, Any], settings: dict[str, Any]) -> None:
    """Both files; with the scores of other benchmarks that the same model answered in this folder before."""
    file = out / "scores.json"
    before = record.read(file)["benchmarks"] if file.exists() else {}
    names = [name for name in selection.MODULES if name in result["benchmarks"] or name in before]
    result["benchmarks"] = {name: result["benchmarks"].get(name) or before[name] for name in names}
    report.write(file, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    report.write(out / "scores.md", scores.page(result))


def _warn(rows: dict[str, list[record.Row]], settings: dict[str, Any]) -> None:
    said = {
        answer.TOO_LONG: "too long for the model, and counted as wrong",
        NO_REPLY: "without a reply, and counted as wrong",
    }
    for name, some in rows.items():
        reasons = Counter(row["reason"] for row in some)
        for reason, words in said.items():
            if reasons[reason]:
                console.warn(f"{words}: {reasons[reason]:,} of {plural(len(some), 'item')} of {name}")


def _settings(benchmarks: Sequence[Benchmark], template: str | None, **others: Any) -> dict[str, Any]:
    """What all results of a folder share; all that is not said is None."""
    names = ("model_fingerprint", "tokenizer_fingerprint", "request", "replies", "temperature", "max_response_tokens")
    return {
        **dict.fromkeys(names),
        **others,
        "template_fingerprint": None if template is None else checkpoint.fingerprint(template),
        "benchmarks": {benchmark.name: benchmark.settings() for benchmark in benchmarks},
    }


Found = tuple[dict[str, dict[str, record.Row]], dict[str, Any]]  # results by benchmark and id, and the settings they share


# ---------------------------------------------------------------- by whom


def by_sampler(args: Args, benchmarks: Sequence[Benchmark], template: str) -> Found:
    """All benchmarks in one queue, so that the sampler's rows stay busy until the last item."""
    policy = inputs.load_policy(args.model)
    longest = args.max_response_tokens or answer.response_tokens(args.model, policy, (), template)
    answer.room_for_prompt(policy, longest)
    temperature = args.temperature or 0.0
    tokenizer = inputs.tokenizer_fingerprint(policy)
    decoding = {"tokenizer_fingerprint": tokenizer, "temperature": temperature, "max_response_tokens": longest}
    settings = _settings(benchmarks, template, **decoding)
    known = {name: value for name, value in settings.items() if name != "model_fingerprint"}
    record.settle(args.out, known)  # refuses before the weights load, which may take minutes
    args.out.mkdir(parents=True, exist_ok=True)
    model = answer.open_model(policy, args.tensor)
    settings["model_fingerprint"] = model.fingerprint
    with Results(args.out, settings, benchmarks) as results, Watch(results, benchmarks) as watch:
        asked = [(benchmark, item) for benchmark in benchmarks for item in benchmark.items]
        repeats = _repeats([item for _, item in asked])
        todo = [place for place, (benchmark, item) in enumerate(asked) if item.id not in results.rows[benchmark.name]]

        def finished(place: int, text: str, responses: list[Response]) -> None:
            benchmark, item = asked[todo[place]]
            if responses:
                [said] = responses
                given = {"token_count": said.token_count, "truncated": said.truncated}
                results.add(benchmark.name, record.row(benchmark, item, said.text, prompt=text, **given))
            else:
                results.add(benchmark.name, record.row(benchmark, item, "", prompt=text, missing=answer.TOO_LONG))

        answer.respond(
            model,
            [asked[place][1].example for place in todo],
            template,
            longest,
            temperature=temperature,
            attempts=[repeats[place] for place in todo],
            rows=args.rows,
            progress=lambda done, total: watch.at_work(),
            finished=finished,
        )
        return results.rows, settings


def _repeats(items: Sequence[Item]) -> list[int]:
    """Of each item, how often its example has come before: the same sample each time, whichever others are asked with it."""
    seen: Counter[str] = Counter()
    found = []
    for item in items:
        found.append(seen[item.example.id])
        seen[item.example.id] += 1
    return found


def by_server(args: Args, benchmarks: Sequence[Benchmark], template: str) -> Found:
    """Leaves out what the server would not answer. Raises ValueError where it answers nobody; at a signal, SystemExit."""
    temperature, longest = args.temperature or 0.0, args.max_response_tokens or answer.MOST_TOKENS
    fields = {"model": args.model, "temperature": temperature, "max_tokens": longest} | _body(args.server.body)
    request = {name: value for name, value in fields.items() if value is not None}
    settings = _settings(benchmarks, template, request=request, temperature=temperature, max_response_tokens=longest)
    key, at_once = completions.read_key(args.server.key_env), args.server.concurrency
    limits = {"timeout": args.server.timeout, "retries": args.server.retries, "backoff": BACKOFF}
    server = completions.Server(args.endpoint, key, at_once=at_once, **limits)
    with Results(args.out, settings, benchmarks) as results, Watch(results, benchmarks) as watch:
        todo = [(benchmark, item) for benchmark in benchmarks for item in benchmark.items]
        todo = [(benchmark, item) for benchmark, item in todo if item.id not in results.rows[benchmark.name]]
        asking = Asking(server, todo, at_once, proven=any(results.rows.values()))

        def body(asked: Asked) -> dict[str, Any]:
            return request | {"messages": prompt.messages(asked[1].example, template)}

        def take(asked: Asked, said: Answer) -> bool:
            benchmark, item = asked
            chat = "\n\n".join(f"{turn['role']}:\n{turn['content']}" for turn in prompt.messages(item.example, template))
            given = {"token_count": said.tokens_out or None, "truncated": said.finish == "length"}
            results.add(benchmark.name, record.row(benchmark, item, said.text(), prompt=chat, **given))
            return True

        watch.at_work()
        asyncio.run(asking.run(body, take))
    again = "the same command goes on: nothing answered is asked twice"
    if asking.problem:
        raise ValueError(f"{asking.problem.text}: {completions.mend(asking.problem, args.server.key_env)}; then {again}")
    if asking.signal:
        console.warn(f"{plural(len(todo) - watch.new, 'item')} not answered: {again}")
        raise SystemExit(128 + asking.signal)
    for text, count in Counter(failure.text for _, failure in asking.left).most_common(5):
        console.warn(f"no answer to {plural(count, 'item')} ({text}); the same command asks them again")
    return results.rows, settings


def _body(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except ValueError:
        fields = None
    if not isinstance(fields, dict) or fields.keys() & {"model", "messages", "n", "stream"}:
        raise ValueError(f"--server.body {text}: give a JSON object, without model, messages, n and stream")
    return fields


def by_file(args: Args, benchmarks: Sequence[Benchmark], template: str) -> Found:
    """Judges the replies of a file; items that it lacks have none. What the folder has of an earlier start is replaced."""
    ids = {benchmark.name: benchmark.ids for benchmark in benchmarks}
    found = replies.assigned(args.replies, replies.read(args.replies), ids)
    settings = _settings(benchmarks, None, replies=str(args.replies))
    with Results(args.out, settings, benchmarks, anew=True) as results, Watch(results, benchmarks) as watch:
        watch.at_work()
        for benchmark in benchmarks:
            for item in benchmark.items:
                results.add(benchmark.name, _judged(benchmark, item, found.get((benchmark.name, item.id))))
    return results.rows, settings


def _judged(benchmark: Benchmark, item: Item, reply: replies.Reply | None) -> record.Row:
    if reply is None:
        return record.row(benchmark, item, "", missing=NO_REPLY)
    missing = reply.reason if reply.reason in (NO_REPLY, answer.TOO_LONG) else None
    given = {"token_count": reply.token_count, "truncated": reply.truncated, "missing": missing}
    return record.row(benchmark, item, reply.output, **given)


# ---------------------------------------------------------------- what a person sees meanwhile


class Watch:
    """How many items are done and how many of them right: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, results: Results, benchmarks: Sequence[Benchmark]):
        rows = [row for found in results.rows.values() for row in found.values()]
        self.total = sum(len(benchmark.items) for benchmark in benchmarks)
        self.done, self.right, self.new = len(rows), sum(row["value"] >= 1 for row in rows), 0
        text, times = progress.TextColumn, (progress.TimeElapsedColumn(), progress.TimeRemainingColumn())
        columns = (text("{task.description}"), progress.BarColumn(), text("{task.fields[numbers]}"))
        silent = not console.CONSOLE.is_terminal
        self._bar = progress.Progress(*columns, *times, console=console.CONSOLE, transient=True, disable=silent)
        self._task = self._bar.add_task("preparing", total=None, numbers=self._numbers())
        self._said = time.monotonic()
        results.added = self._count

    def __enter__(self) -> Watch:
        if self.done:
            console.note(f"{self.done:,} of {plural(self.total, 'item')} are there from an earlier start")
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def at_work(self) -> None:
        """The first answers are being made."""
        self._bar.update(self._task, description="answering", total=self.total, completed=self.done)

    def _numbers(self) -> str:
        right = f", {self.right / self.done:.1%} right" if self.done else ""
        return f"{self.done:,}/{self.total:,}{right}"

    def _count(self, row: record.Row) -> None:
        self.done, self.right, self.new = self.done + 1, self.right + (row["value"] >= 1), self.new + 1
        self._bar.update(self._task, completed=self.done, numbers=self._numbers())
        if not console.CONSOLE.is_terminal and time.monotonic() - self._said > LINE_EVERY:
            self._said = time.monotonic()
            console.note(self._numbers())
