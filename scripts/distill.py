"""Asks a stronger model to think about rows whose right calls are known, and keeps the replies that make these calls.

    python -m scripts.distill --data.path calls.jsonl --out reasoning.jsonl --url https://api.openai.com/v1 --model NAME
    python -m grpo_jax.sft reason --data.path reasoning.jsonl ...

    rows -> `completions.Asking`, --concurrency at once -> completions.Server.ask -> `Journal`: every answer, on disk before
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
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data import command_line, jsonl, prompt
from data.command_line import plural
from data.example import Example
from eval import completions
from eval.completions import Answer, Asking, Server
from eval.lines import Lines
from grpo_jax import console, reward
from grpo_jax.config import run_main

TRUNCATED, REFUSED = "truncated", "refused"  # verdicts beside reward.REASONS: cut at a length limit; a filter's, or a refusal
LINE_EVERY = 30.0  # seconds between two lines of progress where there is no terminal


@dataclass(frozen=True)
class Data:
    #: Rows with right calls, as training takes them: a JSONL, JSON or Parquet file, a folder of them, or a hub id.
    path: str
    #: The text file of the system prompt, as training's --data.template; it must be the one that you will train with.
    template: str | None = None


@dataclass(frozen=True)
class Args:
    """Asks a stronger model for the thoughts before calls that are known to be right, and writes rows for supervised training.

    Any server that speaks OpenAI's /chat/completions will do. Replies with the right calls are kept. However it ends, the
    same command goes on where it stopped, and nothing answered is asked twice.

    python -m scripts.distill --data.path calls.jsonl --out reasoning.jsonl --url https://api.openai.com/v1 --model NAME
    """

    data: Data
    #: The rows to write, a .jsonl file. All answers are kept beside it, in OUT.journal: start again to go on.
    out: Path
    #: The server, up to and without /chat/completions: https://api.openai.com/v1, http://localhost:8000/v1, ...
    url: str
    #: The model's name there.
    model: str
    #: Requests for a row, at most, while none of its replies is right. Each costs a whole prompt. 1 for a first look; 2 to 4
    #: where too few rows are kept. A later start with more asks again for the rows that have none.
    attempts: int = 1
    #: Of sampling. Left out: the server's own, as some reasoning models take no other.
    temperature: float | None = None
    #: More fields of the request, as a JSON object: '{"max_tokens": 2048, "reasoning_effort": "low"}'.
    body: str = "{}"
    #: Only the first so many usable rows; a later start may raise it.
    limit: int | None = None
    #: Requests under way at once. Raise it until the rate on screen grows no more or the server limits it; for a server of your
    #: own, as many as it batches.
    concurrency: int = 16
    #: Seconds from a request to the end of its answer; then it is asked again, and may be charged twice. Raise it for long
    #: thoughts, or a busy server of your own.
    timeout: float = 300.0
    #: Times that a request is tried again after an error that may pass: rate limits, 5xx, no connection, no answer, rubbish.
    retries: int = 8
    #: Seconds before the first retry; they double up to a minute, and vary by half. What the server asks for comes first.
    backoff: float = 1.0
    #: The environment variable with the server's key. It may be unset, for a server that wants none.
    key_env: str = "OPENAI_API_KEY"
    #: Dollars for a million prompt tokens; with --price_out, to be shown what it costs.
    price_in: float | None = None
    #: Dollars for a million completion tokens, thoughts included.
    price_out: float | None = None


# ---------------------------------------------------------------- what an answer is worth


def verdict(answer: Answer, example: Example) -> str:
    """One of reward.REASONS, of which a reply that is kept has "correct"; or TRUNCATED or REFUSED."""
    if answer.finish in ("length", "content_filter"):
        return TRUNCATED if answer.finish == "length" else REFUSED
    return reward.judge(answer.text(), example.answer, "binary").reason


def row_of(example: Example, answer: Answer) -> dict[str, Any]:
    """The row of the project's format that a kept answer becomes; read again, it is the same task (the same id)."""
    reply = answer.text()
    thought = reply.partition("<think>")[2].partition("</think>")[0].strip()
    return jsonl.row_of(example) | {"reasoning": thought, "response": reply}


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
        self.answers: dict[str, list[Answer]] = {}  # by the row's id, in the order in which they came
        self._lines = Lines(path)
        lines = self._lines.found
        if not lines:
            self._lines.append({"settings": settings}, sync=True)
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
        if differ and not self.answers:  # of a start that was answered nothing, for a wrong --model, say
            self._lines.clear()
            self._lines.append({"settings": settings}, sync=True)
        elif differ:
            changes = "; ".join(f"{name} was {before.get(name)}, is {settings[name]}" for name in differ)
            raise ValueError(f"{path}: its answers are to other questions ({changes}): give another --out")

    def add(self, example_id: str, answer: Answer) -> None:
        """Returns when the answer is on disk."""
        self._lines.append({"id": example_id, **asdict(answer)}, sync=True)
        self.answers.setdefault(example_id, []).append(answer)

    def close(self) -> None:
        self._lines.close()


# ---------------------------------------------------------------- asking


class Distillation:
    """The rows, what is known of them, and the requests that are still to be made."""

    def __init__(self, args: Args, examples: Sequence[Example], template: str, journal: Journal, server: Server):
        self.args, self.examples, self.template, self.journal, self.server = args, examples, template, journal, server
        self.kept: dict[str, Answer] = {}  # by the row's id
        self.verdicts: Counter[str] = Counter()
        self.tokens_in = self.tokens_out = 0
        self.done = 0  # rows that need no further request
        for example in examples:
            for answer in journal.answers.get(example.id, []):
                self._count(example, answer)
            self.done += self._is_done(example)
        rows = [example for example in examples if not self._is_done(example)]
        self.asking = Asking(server, rows, args.concurrency, proven=bool(journal.answers))
        self._request = request_fields(args)
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
        """Asks for all that is missing; returns at the end, or early with `asking.problem` or `asking.signal` set."""
        await self.asking.run(
            lambda example: self._request | {"messages": prompt.messages(example, self.template)}, self._take, self._show()
        )

    def _take(self, example: Example, answer: Answer) -> bool:
        self.journal.add(example.id, answer)
        self._count(example, answer)
        done = self._is_done(example)
        self.done += done
        return done

    @property
    def left(self) -> Counter[str]:
        """Rows without an answer in this run, by what the server said last."""
        return Counter(failure.text for _, failure in self.asking.left)

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
        """What all answers so far cost, where prices are given; requests that failed are not in it."""
        if self.args.price_in is None or self.args.price_out is None:
            return None
        return (self.tokens_in * self.args.price_in + self.tokens_out * self.args.price_out) / 1e6

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
        rows += [("this run", f"{_replies(self.server.answered)} in {seconds:,.1f} s, {self.server.answered / seconds:,.1f}/s")]
        rows += [("unanswered", f"{plural(count, 'row')}: {text}") for text, count in self.left.most_common(5)]
        console.header("distilled", rows)
        if replies:
            known = [*reward.REASONS, TRUNCATED, REFUSED]
            counts = sorted(self.verdicts.items(), key=lambda item: (item[0] != "correct", known.index(item[0])))
            shown = [(reason, f"{count:>9,}  {count / replies:6.1%}") for reason, count in counts]
            console.header(f"replies: {replies:,}", shown)


def _replies(count: int) -> str:
    return "1 reply" if count == 1 else f"{count:,} replies"


def _short(number: int) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return str(number)


# ---------------------------------------------------------------- the program


def check(args: Args) -> None:
    """Everything that can be refused before anything is read."""
    for name, least in (("attempts", 1), ("concurrency", 1), ("retries", 0), ("limit", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            raise ValueError(f"--{name} {value}: give a number from {least} on")
    for name in ("timeout", "backoff"):
        if not 0 < getattr(args, name) < float("inf"):
            raise ValueError(f"--{name} {getattr(args, name)}: give a number of seconds above 0")
    prices = {"price_in": args.price_in, "price_out": args.price_out}
    for name, price in prices.items():
        if price is not None and not 0 <= price < float("inf"):
            raise ValueError(f"--{name} {price}: give dollars for a million tokens, from 0 on")
    lacking = [name for name, price in prices.items() if price is None]
    if len(lacking) == 1:
        raise ValueError(f"--{lacking[0]} is missing: the cost needs both prices; give 0 for what is free")
    if args.temperature is not None and not 0 <= args.temperature < float("inf"):
        raise ValueError(f"--temperature {args.temperature}: give a number from 0 on")
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


def distill(args: Args) -> Distillation:
    """Runs, or goes on, until all rows are done, and writes --out.

    Raises ValueError or FileNotFoundError for what a user can mend. Where it returns, rows may still be missing: `left`
    and `asking.signal` say why.
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
                ("done before", f"{plural(work.done, 'row')}, {_replies(work.verdicts.total())}, in {path}"),
                ("server", f"{args.url}, {'with' if key else 'without'} a key, {plural(args.concurrency, 'request')} at once"),
            ],
        )
        asyncio.run(work.run())
        write_rows(args.out, (row_of(row, work.kept[row.id]) for row in loaded.examples if row.id in work.kept))
    work.summary()
    if work.asking.problem:
        again = "then start the same command again: nothing answered is asked twice"
        raise ValueError(f"{work.asking.problem.text}: {completions.mend(work.asking.problem, args.key_env)}; {again}")
    return work


def main() -> None:
    work = distill(command_line.read(Args, "python -m scripts.distill", sys.argv[1:]))
    if missing := len(work.examples) - work.done:
        rows = f"{plural(missing, 'row')} {'is' if missing == 1 else 'are'} not done"
        console.warn(f"{rows}: start the same command again; nothing answered is asked twice")
        raise SystemExit(128 + work.asking.signal if work.asking.signal else 1)


if __name__ == "__main__":
    run_main(main)
