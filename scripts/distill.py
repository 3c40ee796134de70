"""Asks a stronger model to think about rows whose right calls are known, and keeps the replies that make these calls.

    python -m scripts.distill --data.path calls.jsonl --out reasoning.jsonl --url https://api.openai.com/v1 --model NAME
    python -m grpo_jax.sft reason --data.path reasoning.jsonl ...

    rows -> `Distillation.work`, --concurrency at once -> completions.Server.ask -> `Journal`: every answer, on disk before
            it counts -> `verdict` -> `write_rows`: --out

The prompt is that of training (data.prompt), over any server that speaks OpenAI's /chat/completions. A reply is kept where the
binary reward is 1 (the paper's rule for its reasoning data), as a row with "response", the whole reply, which is what
supervised training imitates, and "reasoning", the thought alone. Of a row with several attempts the first such reply is kept.

Nothing answered is asked twice, however the program ends: each answer is appended to OUT.journal and synced before the next
request of its row; the journal, not --out, is the memory, and --out is made from it anew at every end. Only a request that
was under way when the program was killed is asked again.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data import jsonl, prompt
from data.example import Example
from grpo_jax import console, reward
from grpo_jax.config import run_main
from scripts import completions
from scripts.completions import Answer, Failure, Server

TRUNCATED, REFUSED = "truncated", "refused"  # verdicts beside reward.REASONS: cut at a length limit; a filter's, or a refusal
IN_A_ROW = 10  # rows left without an answer, with no answer in between, before the program gives up
LINE_EVERY = 30.0  # seconds between two lines of progress where there is no terminal


@dataclass(frozen=True)
class Data:
    path: str
    """Rows with right calls, as training takes them: a JSONL, JSON or Parquet file, a folder of them, or a hub id."""
    template: str | None = None
    """The text file of the system prompt, as training's --data.template; it must be the one that you will train with."""


@dataclass(frozen=True)
class Args:
    """From rows of right calls to rows with a thought before them, by a model behind an OpenAI-compatible server."""

    data: Data
    out: Path
    """The rows to write, a .jsonl file. All answers are kept beside it, in OUT.journal: start again to go on."""
    url: str
    """The server, up to and without /chat/completions: https://api.openai.com/v1, http://localhost:8000/v1, ..."""
    model: str
    """The model's name there."""
    attempts: int = 1
    """Requests for a row, at most, while none of its replies is right. Each costs a whole prompt."""
    temperature: float | None = None
    """Of sampling. Left out: the server's own, as some reasoning models take no other."""
    body: str = "{}"
    """More fields of the request, as a JSON object: '{"max_tokens": 2048, "reasoning_effort": "low"}'."""
    limit: int | None = None
    """Only the first so many usable rows; a later start may raise it."""
    concurrency: int = 16
    """Requests under way at once."""
    timeout: float = 300.0
    """Seconds from a request to the end of its answer."""
    retries: int = 8
    """Times that a request is tried again after an error that may pass: rate limits, 5xx, no connection, no answer, rubbish."""
    backoff: float = 1.0
    """Seconds before the first retry; they double up to a minute, and vary by half. What the server asks for comes first."""
    key_env: str = "OPENAI_API_KEY"
    """The environment variable with the server's key. It may be unset, for a server that wants none."""
    price_in: float | None = None
    """Dollars for a million prompt tokens, to be shown what it costs."""
    price_out: float | None = None
    """Dollars for a million completion tokens, thoughts included."""


# ---------------------------------------------------------------- what an answer is worth


def reply_text(answer: Answer) -> str:
    """The whole reply. A thought that the server kept apart stands before it, unless the content has one of its own."""
    content = answer.content.strip()
    if answer.thought.strip() and "<think>" not in content:
        return f"{prompt.think(answer.thought)}\n{content}"
    return content


def verdict(answer: Answer, example: Example) -> str:
    """One of reward.REASONS, of which a reply that is kept has "correct"; or TRUNCATED or REFUSED."""
    if answer.finish in ("length", "content_filter"):
        return TRUNCATED if answer.finish == "length" else REFUSED
    return reward.judge(reply_text(answer), example.answer, "binary").reason


def row_of(example: Example, answer: Answer) -> dict[str, Any]:
    """The row of the project's format that a kept answer becomes; read again, it is the same task (the same id)."""
    reply = reply_text(answer)
    row = {"messages": example.messages, "tools": example.tools, "answers": example.answer, "source": example.source}
    if "row_id" in example.extra:
        row["id"] = example.extra["row_id"]
    thought = reply.partition("<think>")[2].partition("</think>")[0].strip()
    return row | {"reasoning": thought, "response": reply}


def write_rows(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Replaces the file in one move, so that it is never half a file."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


class Journal:
    """All answers so far, in a file to which they are only ever appended: first a line of settings, then one an answer."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        """Opens it, for this process alone. Raises ValueError where it is damaged, in use, or of other settings."""
        self.path = path
        self.answers: dict[str, list[Answer]] = {}  # by the row's id, in the order in which they came
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{path}: another process is writing it: wait for its end, or give another --out") from None
        self._file.seek(0)
        whole = self._file.read()
        end = whole.rfind(b"\n") + 1
        self._file.truncate(end)  # a kill can leave half a line behind the last whole one
        lines = whole[:end].splitlines()
        if not lines:
            self._append({"settings": settings})
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if number == 1:
                    before = dict(row["settings"])
                else:
                    self.answers.setdefault(row.pop("id"), []).append(Answer(**row))
            except (ValueError, KeyError, TypeError, AttributeError):
                mended = "delete the line, whose answer is lost" if number > 1 else "give another --out"
                raise ValueError(f"{path}:{number}: damaged: {mended}") from None
        differ = [name for name in settings if lines and before.get(name) != settings[name]]
        if differ:
            changes = "; ".join(f"{name} was {before.get(name)}, is {settings[name]}" for name in differ)
            raise ValueError(f"{path}: its answers are to other questions ({changes}): give another --out")

    def add(self, example_id: str, answer: Answer) -> None:
        """Returns when the answer is on disk."""
        self._append({"id": example_id, **asdict(answer)})
        self.answers.setdefault(example_id, []).append(answer)

    def close(self) -> None:
        self._file.close()

    def _append(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


# ---------------------------------------------------------------- asking


class Distillation:
    """The rows, what is known of them, and the requests that are still to be made."""

    def __init__(self, args: Args, examples: Sequence[Example], template: str, journal: Journal, server: Server):
        self.args, self.examples, self.template, self.journal, self.server = args, examples, template, journal, server
        self.kept: dict[str, Answer] = {}  # by the row's id
        self.verdicts: Counter[str] = Counter()
        self.tokens_in = self.tokens_out = 0
        self.done = 0  # rows that need no further request
        self.left: Counter[str] = Counter()  # rows without an answer in this run, by what the server said last
        self.problem: Failure | None = None  # why nothing more is asked
        self.signal: int | None = None
        for example in examples:
            for answer in journal.answers.get(example.id, []):
                self._count(example, answer)
            self.done += self._is_done(example)
        self._request = request_fields(args)
        self._rows: list[Example] = []  # that nobody has taken yet, the first one last
        self._left_in_a_row = 0
        self._began = time.monotonic()

    def _count(self, example: Example, answer: Answer) -> None:
        reason = verdict(answer, example)
        self.verdicts[reason] += 1
        self.tokens_in += answer.tokens_in
        self.tokens_out += answer.tokens_out
        if reason == "correct":
            self.kept.setdefault(example.id, answer)

    def _is_done(self, example: Example) -> bool:
        return example.id in self.kept or len(self.journal.answers.get(example.id, [])) >= self.args.attempts

    async def run(self) -> None:
        """Asks for all that is missing; returns at the end, or early with `problem` or `signal` set."""
        self._rows = [example for example in reversed(self.examples) if not self._is_done(example)]
        loop, both = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
        async with self.server:
            workers = [asyncio.create_task(self.work()) for _ in range(self.args.concurrency)]
            shown = asyncio.create_task(self._show())
            for one in both:
                loop.add_signal_handler(one, self._interrupt, one, workers)
            try:
                await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
            finally:
                for task in [*workers, shown]:
                    task.cancel()
                ended = await asyncio.gather(*workers, shown, return_exceptions=True)
                for one in both:
                    loop.remove_signal_handler(one)
        for error in ended:
            if isinstance(error, Exception):
                raise error

    def _interrupt(self, number: int, workers: Sequence[asyncio.Task]) -> None:
        if self.signal is not None:
            for task in workers:
                task.cancel()
        elif count := self.server.under_way:
            name = signal.Signals(number).name
            console.warn(f"{name}: waiting for {count:,} answers under way; a second signal ends at once")
        self.signal = number
        self.server.stop.set()

    def _take(self) -> Example:
        """The first row; then, until one is answered and again after one is not, any: bad rows may stand side by side, and
        each start would stop at the same ones."""
        known_good = self.server.answered and not self._left_in_a_row
        first = known_good or len(self._rows) == len(self.examples) - self.done
        return self._rows.pop(-1 if first else random.randrange(len(self._rows)))

    async def work(self) -> None:
        """Takes rows, one after the other, until there are none or asking has stopped."""
        stop = self.server.stop
        while self._rows:
            example = self._take()
            while not stop.is_set() and not self._is_done(example):
                request = self._request | {"messages": prompt.messages(example, self.template)}
                result = await self.server.ask(request)
                if isinstance(result, Answer):
                    self.journal.add(example.id, result)
                    self._count(example, result)
                    self._left_in_a_row = 0
                elif result is not None:
                    self._leave(result)
                    break
            self.done += self._is_done(example)
            if stop.is_set():
                return

    def _leave(self, failure: Failure) -> None:
        """Leaves a row without an answer; where that seems not to be the row's fault, stops asking.

        An answer in the journal shows that the server takes such requests. What it rejects after that is the row's fault,
        however many they are; and at the end there is nothing to stop.
        """
        self.left[failure.text] += 1
        if failure.kind == "row" and self.journal.answers:
            return
        self._left_in_a_row += 1
        many = self._left_in_a_row >= min(IN_A_ROW, len(self.examples)) and (self._rows or not self.journal.answers)
        if failure.kind in ("fatal", "down", "limited") or many:
            self.problem = self.problem or failure
            self.server.stop.set()

    def numbers(self) -> str:
        """What a person watches, in one line."""
        replies = self.verdicts.total()
        cells = [f"kept {self.verdicts['correct'] / replies:.1%}"] if replies else []
        held = self.server.held()
        cells += [f"waiting {held:,.0f} s" if held > 1 else f"{self.server.answered / (time.monotonic() - self._began):,.1f}/s"]
        cells += [f"{_short(self.tokens_in)} in, {_short(self.tokens_out)} out"]
        cells += [f"${self.dollars():,.2f}"] if self.dollars() is not None else []
        return "  ".join(cells)

    def dollars(self) -> float | None:
        """What all answers so far cost, as far as prices are given; requests that failed are not in it."""
        if self.args.price_in is None and self.args.price_out is None:
            return None
        return (self.tokens_in * (self.args.price_in or 0) + self.tokens_out * (self.args.price_out or 0)) / 1e6

    async def _show(self) -> None:
        columns = (
            TextColumn("rows"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
        )
        terminal = console.CONSOLE.is_terminal
        with Progress(*columns, console=console.CONSOLE, transient=True, disable=not terminal) as progress:
            bar = progress.add_task("", total=len(self.examples), completed=self.done, numbers=self.numbers())
            while True:
                await asyncio.sleep(0.25 if terminal else LINE_EVERY)
                progress.update(bar, completed=self.done, numbers=self.numbers())
                if not terminal:
                    console.note(f"{self.done:,}/{len(self.examples):,} rows  {self.numbers()}")

    def summary(self) -> None:
        """Prints what was kept, what was not and why, and what it took."""
        replies, seconds = self.verdicts.total(), time.monotonic() - self._began
        rows = [("rows", f"{len(self.kept):,} of {len(self.examples):,} kept, in {self.args.out}")]
        rows += [("tokens", f"{self.tokens_in:,} in, {self.tokens_out:,} out")]
        rows += [("cost", f"${self.dollars():,.2f} at the prices given")] if self.dollars() is not None else []
        rows += [("this run", f"{self.server.answered:,} replies in {seconds:,.1f} s, {self.server.answered / seconds:,.1f}/s")]
        rows += [("unanswered", f"{count:,} rows: {text}") for text, count in self.left.most_common(5)]
        console.header("distilled", rows)
        if replies:
            known = [*reward.REASONS, TRUNCATED, REFUSED]
            counts = sorted(self.verdicts.items(), key=lambda item: (item[0] != "correct", known.index(item[0])))
            shown = [(reason, f"{count:>9,}  {count / replies:6.1%}") for reason, count in counts]
            console.header(f"replies: {replies:,}", shown)


def _short(number: int) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return str(number)


# ---------------------------------------------------------------- the program


def check(args: Args) -> None:
    """Everything that can be refused before anything is read."""
    for name, least in (("attempts", 1), ("concurrency", 1), ("retries", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: give a number from {least} on")
    for name in ("timeout", "backoff"):
        if not 0 < getattr(args, name) < float("inf"):
            raise ValueError(f"--{name} {getattr(args, name)}: give a number of seconds above 0")
    if args.temperature == 0 and args.attempts > 1:
        raise ValueError(
            "--temperature 0 gives the same reply at every one of --attempts: raise the one, or leave out the other"
        )
    if args.out.suffix != ".jsonl":
        raise ValueError(f"--out {args.out}: give a name that ends in .jsonl, as training wants it")


def request_fields(args: Args) -> dict[str, Any]:
    """A request but for its messages. ValueError where --body is no JSON object, or says what another option says."""
    try:
        fields = json.loads(args.body)
    except ValueError:
        fields = None
    if not isinstance(fields, dict) or fields.keys() & {"model", "messages", "temperature", "n", "stream"}:
        raise ValueError("--body: give a JSON object, without model, messages, temperature, n and stream")
    return fields | {"model": args.model} | ({} if args.temperature is None else {"temperature": args.temperature})


def mend(failure: Failure, key_env: str) -> str:
    """What to do about a failure that stopped the program."""
    match failure.kind, failure.status:
        case _, 401:
            return f"set {key_env} to a key of that server"
        case _, 403:
            return f"the key in {key_env} may not use this model; take another"
        case _, 404:
            return "check --url, which ends before /chat/completions, and --model"
        case "fatal", 402 | 429 | 503:
            return "mend the account, or wait"
        case "row", _:
            return "check --model, --temperature and --body"
        case "limited", _:
            return "lower --concurrency, or wait"
    return "check --url, or wait until the server is well again"


def distill(args: Args) -> Distillation:
    """Runs, or goes on, until all rows are done, and writes --out.

    Raises ValueError or FileNotFoundError for what a user can mend. Where it returns, rows may still be missing: `signal`
    and `left` say why.
    """
    check(args)
    request, template = request_fields(args), prompt.load_template(args.data.template)
    key, limits = completions.read_key(args.key_env), dict(timeout=args.timeout, retries=args.retries, backoff=args.backoff)
    server = Server(args.url, key, at_once=args.concurrency, **limits)
    path = args.out.with_name(args.out.name + ".journal")
    if args.out.exists() and not path.exists():
        raise ValueError(f"--out {args.out}: exists, and has no journal beside it: give another name")
    loaded = jsonl.load(args.data.path, limit=args.limit)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"request": request, "template": hashlib.sha256(template.encode()).hexdigest()[:16]}
    with contextlib.closing(Journal(path, settings)) as journal:
        work = Distillation(args, loaded.examples, template, journal, server)
        dropped = ", ".join(f"{reason} {count:,}" for reason, count in loaded.dropped.items())
        console.header(
            f"distill: {args.model}",
            [
                ("rows", f"{len(loaded.examples):,}" + (f"; dropped: {dropped}" if dropped else "")),
                ("done before", f"{work.done:,} rows, {work.verdicts.total():,} replies, in {path}"),
                ("server", f"{args.url}, {'with' if key else 'without'} a key, {args.concurrency:,} requests at once"),
            ],
        )
        asyncio.run(work.run())
        write_rows(args.out, (row_of(row, work.kept[row.id]) for row in loaded.examples if row.id in work.kept))
    work.summary()
    if work.problem:
        again = "then start the same command again: nothing answered is asked twice"
        raise ValueError(f"{work.problem.text}: {mend(work.problem, args.key_env)}; {again}")
    return work


def main() -> None:
    words = sys.argv[1:]
    work = distill(tyro.cli(Args, prog="python -m scripts.distill", args=words, description=__doc__, use_underscores=True))
    if missing := len(work.examples) - work.done:
        console.warn(f"{missing:,} rows are not done: start the same command again; nothing answered is asked twice")
        raise SystemExit(128 + work.signal if work.signal else 1)


if __name__ == "__main__":
    run_main(main)
