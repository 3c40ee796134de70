"""A user's own reward in processes of its own: where it hangs or dies, the run goes on.

    opened     --reward.kind, --reward.workers, --reward.timeout -> what scores the groups of a batch, while the run is open
    Workers    the processes and their time limit: one that is over it is killed, and a new one started
    main       such a process: groups in, scores out

A call that hangs cannot be ended from within its process (a regular expression does not even let other threads run); so the
limit is hard because the process is killed. A worker is a fresh interpreter: a fork of this process, in which JAX has many
threads, could wait for ever for a lock that one of them held. It imports neither JAX nor the main program. The two speak
JSON: what comes from a process that works on a model's text is read as data, and not unpickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from data.example import Example
from grpo_jax import reward
from grpo_jax.reward import CRASH, ERROR, TIMEOUT, Asked, Response, Rewards, Scored

START_SECONDS = 300.0  # that a worker may take to import the reward, which may load a model
_LOOK = 0.2  # seconds that the workers are waited for at a time
_FIELDS = ("messages", "tools", "answer", "source", "id", "extra")  # of an Example
_CODE = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from grpo_jax import workers; workers.main(int(sys.argv[1]))"


@contextlib.contextmanager
def opened(kind: str, count: int, timeout: float) -> Iterator[Rewards]:
    """What scores the groups of a batch by the reward `kind`. No error of a user's own is raised: see `reward.failed`.

    count: processes that call a reward of the user's own; 0 calls it in this one, where no limit can be kept. timeout: seconds
    that a call, which is a group, may take; 0 for any. Built-in rewards need neither. Raises ValueError as `reward.resolve`.
    """
    score_group = reward.resolve(kind)
    if kind in reward.KINDS:
        yield reward.each(score_group)
    elif not count:
        yield reward.each(reward.forgiving(score_group))
    else:
        with contextlib.closing(Workers(kind, count, timeout)) as workers:
            yield workers.score


class Worker:
    """One process, which starts for the group at `place` of a batch; later it is at work on another, or at rest (None)."""

    def __init__(self, kind: str, timeout: float, place: int):
        self.connection, theirs = Pipe()
        command = [sys.executable, "-c", _CODE, str(theirs.fileno()), json.dumps(sys.path)]
        # In a session of its own: a Ctrl-C is for the run, and what the reward starts can be ended with it. Where the reward
        # imports JAX, that takes the CPU: the accelerator is the run's.
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        descriptors = (theirs.fileno(),)
        self._process = subprocess.Popen(
            command, pass_fds=descriptors, stdin=subprocess.DEVNULL, start_new_session=True, env=environment
        )
        theirs.close()
        self.place: int | None = place
        self.ready, self.seconds = False, 0.0  # whether it has imported the reward; how long it is at that, or at its group
        self._send({"kind": kind, "timeout": timeout})

    def ask(self, place: int, asked: Asked) -> None:
        """Gives it a group. Raises ValueError where an example holds what is no JSON."""
        responses, example = asked
        self.place, self.seconds = place, 0.0
        texts = [[response.text, response.token_count, response.truncated] for response in responses]
        try:
            self._send({"responses": texts, "example": {name: getattr(example, name) for name in _FIELDS}})
        except TypeError as error:
            raise ValueError(f"example {example.id} cannot be given to a worker ({error}): take --reward.workers 0") from None

    def _send(self, message: dict[str, Any]) -> None:
        text = json.dumps(message).encode()
        with contextlib.suppress(OSError):  # it has died, and `receive` will tell
            self.connection.send_bytes(text)

    def receive(self) -> dict[str, Any] | None:
        """What it has to say; None where it has died."""
        try:
            return json.loads(self.connection.recv_bytes())
        except (OSError, EOFError, ValueError, RecursionError):
            return None

    def end(self, seconds: float) -> int:
        """Kills it, and what it has started, unless it ends by itself in that time. Returns its exit code."""
        self.connection.close()
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            return self._process.wait()


class Workers:
    """A user's own reward in `count` processes. They are started when they are needed, and kept."""

    def __init__(self, kind: str, count: int, timeout: float):
        self._kind, self._count, self._timeout = kind, count, timeout
        self._workers: list[Worker] = []

    def score(self, asked: Sequence[Asked], progress: Callable[[int], None]) -> list[list[Scored]]:
        """The scores of each group, in order, whichever worker they are from."""
        scored: dict[int, list[Scored]] = {}
        todo = iter(range(len(asked)))
        try:
            while len(scored) < len(asked):
                self._give(asked, todo)
                began = time.monotonic()
                speak = wait([worker.connection for worker in self._busy()], _LOOK)
                passed = min(time.monotonic() - began, 5 * _LOOK)  # if this process was stopped, that time is not the reward's
                for worker in self._busy():
                    worker.seconds += passed
                    place, count = worker.place, len(asked[worker.place][0])
                    if worker.connection in speak:
                        found = self._heard(worker, asked[place])
                    elif 0 < (limit := self._timeout if worker.ready else START_SECONDS) < worker.seconds:
                        self._dismiss(worker, 0.0)
                        found = reward.failed(TIMEOUT, count, f"it was not done after {limit:g} s (--reward.timeout)")
                    else:
                        found = None
                    if found is not None:
                        scored[place] = found
                progress(len(scored))
        finally:
            for worker in self._busy():
                self._dismiss(worker, 0.0)
        return [scored[place] for place in range(len(asked))]

    def _busy(self) -> list[Worker]:
        return [worker for worker in self._workers if worker.place is not None]

    def _give(self, asked: Sequence[Asked], todo: Iterator[int]) -> None:
        """A group to each worker that is at rest, and to new ones up to their number."""
        for worker in [worker for worker in self._workers if worker.place is None]:
            if (place := next(todo, None)) is None:
                return
            worker.ask(place, asked[place])
        while len(self._workers) < self._count and (place := next(todo, None)) is not None:
            self._workers.append(Worker(self._kind, self._timeout, place))

    def _heard(self, worker: Worker, asked: Asked) -> list[Scored] | None:
        """What comes of what a worker says: the scores of its group, or None where it has only become ready for it."""
        message, count = worker.receive(), len(asked[0])
        if message is None:
            code = self._dismiss(worker, 1.0)
            how = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
            return reward.failed(CRASH, count, f"its process ended with {how}")
        if "ready" in message:
            worker.ready = True
            worker.ask(worker.place, asked)
            return None
        worker.place = None
        if "scores" in message:
            return [Scored(value, reason, {}) for value, reason in message["scores"]]
        if not worker.ready:  # the reward cannot be imported there
            self._dismiss(worker, 1.0)
        return reward.failed(ERROR, count, message["trace"])

    def _dismiss(self, worker: Worker, seconds: float) -> int:
        self._workers.remove(worker)
        return worker.end(seconds)

    def close(self) -> None:
        """Ends all processes. They end by themselves, too, when this one dies."""
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.end(1.0)
        self._workers.clear()


# ---------------------------------------------------------------- in the process


def main(descriptor: int) -> None:
    """Scores the groups that come through the connection, until that ends."""
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    for one in (signal.SIGINT, signal.SIGTERM):  # a scheduler's, to all processes: the run says when this one ends
        signal.signal(one, lambda *_: None)  # not SIG_IGN, which the reward's own processes would inherit
    with contextlib.suppress(EOFError, OSError):
        settings = json.loads(connection.recv_bytes())
        try:
            score_group = reward.resolve(settings["kind"])
        except Exception as error:
            connection.send_bytes(json.dumps({"trace": reward.trace_of(error)}).encode())
            return
        connection.send_bytes(b'{"ready": true}')
        while True:
            message = json.loads(connection.recv_bytes())
            responses, example = [Response(*fields) for fields in message["responses"]], _example(message["example"])
            # Should the run be killed while this hangs, the system ends it.
            signal.setitimer(signal.ITIMER_REAL, 2 * settings["timeout"])
            said = _said(score_group, responses, example)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send_bytes(json.dumps(said).encode())


def _said(score_group: reward.Reward, responses: Sequence[Response], example: Example) -> dict[str, Any]:
    try:
        return {"scores": [[scored.value, scored.reason] for scored in score_group(responses, example)]}
    except (Exception, SystemExit) as error:
        return {"trace": reward.trace_of(error)}


def _example(fields: dict[str, Any]) -> Example:
    """The example as it was, where lists had been tuples."""
    return Example(**{**fields, **{name: tuple(fields[name]) for name in ("messages", "tools", "answer")}})
