"""A chat model behind a server that speaks OpenAI's /chat/completions: questions, asked until they are answered or cannot be.

    Server.ask(request) -> Answer, or the Failure that stood at last, or None where `stop` was set before there was either
    Asking.run          many questions, some at once; gives up where the server is not well, ends in order at a signal

Rate limits, 5xx, no connection, no answer in time and rubbish are tried again, after a time that doubles and varies by half;
what the server asks for (Retry-After, x-ratelimit-*) comes first and holds all questions. The key goes into one header, and is
cut out of all that the server says before anything else reads it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Generic, Literal, TypeVar

import httpx2

from data import prompt
from data.command_line import plural
from grpo_jax import console

LONGEST_BACKOFF = 60.0  # seconds
LONGEST_WAIT = 900.0  # seconds; a server that asks for more is left for another day
IN_A_ROW = 10  # questions left without an answer, with no answer in between, before nothing more is asked
SECRET = 16  # characters of the shortest key that is cut out of replies: "EMPTY", for a local server, may well be a word there


@dataclass(frozen=True)
class Answer:
    """What the model said to one request."""

    content: str
    thought: str  # what the server keeps apart from the content, as servers of reasoning models do; mostly empty
    finish: str  # "stop", "length", "content_filter", ...; empty where the server does not say
    tokens_in: int
    tokens_out: int

    def text(self) -> str:
        """The whole reply. A thought that the server kept apart stands before it, unless the content has one of its own."""
        content = self.content.strip()
        if self.thought.strip() and "<think>" not in content:
            return f"{prompt.think(self.thought)}\n{content}"
        return content


@dataclass(frozen=True)
class Failure:
    """Why a request has no answer."""

    text: str
    kind: Literal[
        "again",  # may pass, or may be this row's fault
        "down",  # nobody there: may pass, and is no row's fault
        "limited",  # too many requests: the same
        "row",  # the server will not take this request
        "fatal",  # it will not take any
    ]
    status: int = 0  # of the response, if there was one
    wait: float | None = None  # seconds that the server wants, before anybody asks again


class Server:
    """Asks one server; `async with` opens and closes its connections. All questions share its rate limits."""

    def __init__(self, url: str, key: str, *, at_once: int, timeout: float, retries: int, backoff: float):
        """key: empty for none. timeout: seconds a request. backoff: seconds before the first of the retries."""
        self.stop = asyncio.Event()  # set: nothing more is asked, what is under way is waited for
        self.answered = self.under_way = 0  # requests
        self._url, self._key = endpoint(url), key
        self._timeout, self._retries, self._backoff = timeout, retries, backoff
        self._not_before = 0.0  # time.monotonic() from which the server may be asked again
        self._client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(timeout, connect=min(timeout, 20.0)),
            limits=httpx2.Limits(max_connections=at_once, max_keepalive_connections=at_once),
        )

    async def __aenter__(self) -> Server:
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._client.__aexit__(*error)

    async def ask(self, request: dict[str, Any]) -> Answer | Failure | None:
        """request: the body of /chat/completions."""
        tries, answered = 0, self.answered
        while True:
            while (wait := self.held()) > 0 and not self.stop.is_set():
                await self._pause(wait)
            if self.stop.is_set():
                return None
            result = await self._send(request)
            if isinstance(result, Answer) or result.kind in ("row", "fatal"):
                return result
            if (result.wait or 0) > LONGEST_WAIT:
                return Failure(f"{result.text} (to be asked again in {result.wait / 60:,.0f} minutes)", "fatal", result.status)
            # Where others are answered, a full or absent server is being got through: no reason to give up.
            if result.kind == "again" or self.answered == answered:
                tries += 1
            answered = self.answered
            if tries > self._retries:
                return result
            backoff = min(LONGEST_BACKOFF, self._backoff * 2 ** max(0, tries - 1)) * random.uniform(0.5, 1.5)
            if result.wait is not None or result.kind == "limited":
                self._hold(backoff if result.wait is None else result.wait)
                backoff = random.uniform(0.0, self._backoff)  # after that: not all at the same moment
            await self._pause(self.held() + backoff)

    def held(self) -> float:
        """Seconds for which the server wants nobody to ask."""
        return max(0.0, self._not_before - time.monotonic())

    async def _send(self, request: dict[str, Any]) -> Answer | Failure:
        """One request. Whatever the network and the server do ends as a Failure, with no trace of the key."""
        self.under_way += 1
        try:
            async with asyncio.timeout(self._timeout):
                response = await self._client.post(self._url, json=request)
        except (TimeoutError, httpx2.ReadTimeout, httpx2.WriteTimeout):
            return Failure(f"no answer within {self._timeout:g} s", "again")
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            return Failure(f"no connection to {self._url.host}:{self._url.port or ''} ({error})".replace(":)", ")"), "down")
        except httpx2.RequestError as error:
            return Failure(f"the connection broke ({type(error).__name__})", "again")
        finally:
            self.under_way -= 1
        text = response.content
        if len(self._key) >= SECRET:
            text = text.replace(self._key.encode(), b"***")
        result = read_reply(response.status_code, response.headers, text)
        if isinstance(result, Answer):
            self.answered += 1
            self._hold(min(wanted_wait(response.headers) or 0.0, LONGEST_WAIT))
        return result

    def _hold(self, seconds: float) -> None:
        """Nobody asks for so long."""
        self._not_before = max(self._not_before, time.monotonic() + seconds)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.stop.wait(), seconds)


# ---------------------------------------------------------------- many questions

Row = TypeVar("Row")


class Asking(Generic[Row]):
    """Puts the questions of some rows to a server, several at once, until all are answered or asking has stopped."""

    def __init__(self, server: Server, rows: Sequence[Row], at_once: int, proven: bool):
        """proven: whether the server has answered such questions before, so that one it refuses is that question's fault."""
        self.left: list[tuple[Row, Failure]] = []  # rows without an answer, and what the server said last
        self.problem: Failure | None = None  # why nothing more is asked
        self.signal: int | None = None
        self._server, self._at_once, self._proven = server, at_once, proven
        self._enough = min(IN_A_ROW, len(rows))
        self._rows = list(reversed(rows))  # that nobody has taken yet, the first one last
        self._open = 0  # rows that were taken and are not done
        self._left_in_a_row = 0

    async def run(
        self,
        request: Callable[[Row], dict[str, Any]],
        take: Callable[[Row, Answer], bool],
        show: Coroutine | None = None,
    ) -> None:
        """Returns at the end, or early with `problem` or `signal` set.

        request: the body of the question of a row. take: is given each answer; whether its row is done, else it is asked
        again. show: runs beside it, until the end.
        """
        loop, both = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
        async with self._server:
            workers = [asyncio.create_task(self._work(request, take)) for _ in range(self._at_once)]
            tasks = workers if show is None else [*workers, asyncio.create_task(show)]
            for one in both:
                loop.add_signal_handler(one, self._interrupt, one, workers)
            try:
                await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
            finally:
                for task in tasks:
                    task.cancel()
                ended = await asyncio.gather(*tasks, return_exceptions=True)
                for one in both:
                    loop.remove_signal_handler(one)
        for error in ended:
            if isinstance(error, Exception):
                raise error

    def _interrupt(self, number: int, workers: Sequence[asyncio.Task]) -> None:
        if self.signal is not None:
            for task in workers:
                task.cancel()
        elif count := self._server.under_way:
            name = signal.Signals(number).name
            console.warn(f"{name}: waiting for {plural(count, 'answer')} under way; a second signal ends at once")
        self.signal = number
        self._server.stop.set()

    def _next(self) -> Row:
        """The first row; then, until one is answered and again after one is not, any: bad rows may stand side by side, and
        each start would stop at the same ones."""
        known_good = self._server.answered and not self._left_in_a_row
        first = known_good or not self._open
        self._open += 1
        return self._rows.pop(-1 if first else random.randrange(len(self._rows)))

    async def _work(self, request: Callable[[Row], dict[str, Any]], take: Callable[[Row, Answer], bool]) -> None:
        """Takes rows, one after the other, until there are none or asking has stopped."""
        stop = self._server.stop
        while self._rows:
            row, done = self._next(), False
            while not (stop.is_set() or done):
                result = await self._server.ask(request(row))
                if isinstance(result, Answer):
                    self._proven, self._left_in_a_row = True, 0
                    done = take(row, result)
                elif result is not None:
                    self._leave(row, result)
                    break
            self._open -= done
            if stop.is_set():
                return

    def _leave(self, row: Row, failure: Failure) -> None:
        """Leaves a row without an answer; where that seems not to be the row's fault, stops asking.

        An answer shows that the server takes such requests. What it rejects after that is the row's fault, however many
        they are; and at the end there is nothing to stop.
        """
        self.left.append((row, failure))
        if failure.kind == "row" and self._proven:
            return
        self._left_in_a_row += 1
        many = self._left_in_a_row >= self._enough and (self._rows or not self._proven)
        if failure.kind in ("fatal", "down", "limited") or many:
            self.problem = self.problem or failure
            self._server.stop.set()


def mend(failure: Failure, key_env: str) -> str:
    """What to do about a failure that stopped the questions."""
    match failure.kind, failure.status:
        case _, 401:
            return f"set {key_env} to a key of that server"
        case _, 403:
            return f"the key in {key_env} may not use this model; take another"
        case _, 404:
            return "check the server's address, which ends before /chat/completions, and --model"
        case "fatal", 402 | 429 | 503:
            return "mend the account, or wait"
        case "row", _:
            return "check --model, and what is asked for beside the messages (temperature, length, other fields)"
        case "limited", _:
            return "ask for less at once, or wait"
    return "check the server's address, or wait until it is well again"


# ---------------------------------------------------------------- what a server says


def read_reply(status: int, headers: Mapping[str, str], body: bytes) -> Answer | Failure:
    """The answer in a response to /chat/completions, or what is wrong with it. Never raises, whatever the body."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if 200 <= status < 300:
        return _answer(value) or Failure(f"HTTP {status} with no completion in it: {_said(value, body)}", "again", status)
    text, wait = f"HTTP {status}: {_said(value, body)}", wanted_wait(headers)
    if status == 429 and b"insufficient_quota" in body:
        return Failure(text, "fatal", status)
    if status == 429:
        return Failure(text, "limited", status, wait)
    if status >= 500 or status in (408, 409, 425):
        return Failure(text, "again", status, wait)
    return Failure(text, "row" if status in (400, 413, 422) else "fatal", status)


def _answer(value: Any) -> Answer | None:
    """None where the value is no completion, or an empty one without a reason: servers in trouble send such."""
    try:
        choice, usage = value["choices"][0], value.get("usage")
        message, finish = choice["message"], choice.get("finish_reason") or ""
        content = message.get("content") or ""
        thought = message.get("reasoning_content") or message.get("reasoning") or ""  # vLLM, DeepSeek; OpenRouter
        if message.get("refusal"):
            finish = "content_filter"
    except (KeyError, IndexError, TypeError, AttributeError):
        return None
    texts = (content, thought, finish)
    if not all(isinstance(text, str) for text in texts):
        return None
    counts = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
    tokens = [count if isinstance(count, int) else 0 for count in counts]  # for show; no reason to pay for a reply again
    if not (content.strip() or thought.strip() or finish in ("length", "content_filter")):
        return None
    return Answer(*(text.encode(errors="replace").decode() for text in texts), *tokens)  # half a surrogate pair is no text


def _said(value: Any, body: bytes) -> str:
    """What a server says is wrong, in one line."""
    said = value
    for key in ("error", "message", "detail"):
        said = said[key] if isinstance(said, dict) and said.get(key) else said
    text = said if isinstance(said, str) else body.decode(errors="replace")
    return " ".join("".join(c if c.isprintable() else " " for c in text[:1000]).split())[:200] or "nothing"


def wanted_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server wants nobody to ask: Retry-After, else until what is used up is there again; None if neither."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        if name in headers:
            with contextlib.suppress(ValueError):
                return max(0.0, float(headers[name]) * unit)
            with contextlib.suppress(ValueError):
                return max(0.0, parsedate_to_datetime(headers[name]).timestamp() - time.time())
    waits = [
        wait
        for what in ("-requests", "-tokens", "")
        if headers.get(f"x-ratelimit-remaining{what}") == "0"
        and (wait := _duration(headers.get(f"x-ratelimit-reset{what}", ""))) is not None
    ]
    return max(waits, default=None)


def _duration(text: str) -> float | None:
    """Seconds of "6m0s", "120ms", "1.5", or until a point in time as seconds or milliseconds since 1970. None: not readable."""
    with contextlib.suppress(ValueError):
        number = float(text)
        if number > 1e9:
            number = (number / 1000 if number > 1e11 else number) - time.time()
        return max(0.0, number) if number < 1e9 else None
    units = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3}
    if not re.fullmatch(r"([\d.]+(ms|[dhms]))+", text):
        return None
    with contextlib.suppress(ValueError):
        return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)(ms|[dhms])", text))
    return None


# ---------------------------------------------------------------- where it is, and its key


def endpoint(url: str) -> httpx2.URL:
    try:
        base = httpx2.URL(url)
    except httpx2.InvalidURL:
        base = httpx2.URL("")
    if base.scheme not in ("http", "https") or not base.host:
        raise ValueError(f"{url!r} is no server's address: give one like https://api.openai.com/v1")
    if base.userinfo:
        raise ValueError("the server's address has a name or password in it: give the key in the environment")
    return base.copy_with(path=base.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions")


def read_key(name: str) -> str:
    """The key in that environment variable; empty where it is unset. The error does not say what is in it."""
    key = os.environ.get(name, "").strip()
    if not re.fullmatch(r"[!#-\[\]-~]*", key):
        raise ValueError(f"the key in {name} has a character that no key has: copy it again")
    return key
