"""What a server says, how long it wants nobody to ask, and when retries are used up; the rest of it in test_distill.py."""

from __future__ import annotations

import asyncio
import email.utils
import json
import time

import pytest

from eval import completions
from eval.completions import Answer, Failure
from tests.eval.bad_server import completion


@pytest.mark.parametrize(
    ("kind", "others_answered", "tries"),
    [("limited", 1, 50), ("down", 1, 50), ("again", 1, 3), ("limited", 0, 3), ("down", 0, 3)],
)
def test_retries_are_used_up_where_nothing_is_answered(monkeypatch, kind, others_answered, tries):
    """Or where the row itself may be at fault."""

    async def send(self, request):
        sent.append(request)
        self.answered += others_answered
        return Failure("no", kind) if len(sent) < 50 else Answer("yes", "", "stop", 0, 0)

    async def ask_once():
        async with completions.Server("http://localhost", "", at_once=1, timeout=1, retries=2, backoff=1e-4) as server:
            return await server.ask({})

    sent = []
    monkeypatch.setattr(completions.Server, "_send", send)
    assert isinstance(asyncio.run(ask_once()), Answer if tries == 50 else Failure) and len(sent) == tries


def test_what_a_server_says():
    def read(value, status=200):
        return completions.read_reply(status, {}, value if isinstance(value, bytes) else json.dumps(value).encode())

    assert read(completion({"content": "x"})) == Answer("x", "", "stop", 100, 10)
    assert read(completion({"content": None}, "length")) == Answer("", "", "length", 100, 10)
    assert read(completion({"content": None, "refusal": "no"})) == Answer("", "", "content_filter", 100, 10)
    assert read(completion({"content": "\ud800 x"}, None)) == Answer("? x", "", "", 100, 10)
    for usage in (None, 3, {"prompt_tokens": 1.5}, {}):
        assert read(completion({"content": "x"}) | {"usage": usage}) == Answer("x", "", "stop", 0, 0)
    odd = [
        b"",
        b"[" * 100_000,
        b"\xff",
        None,
        1,
        "x",
        [],
        {},
        {"choices": None},
        {"choices": [None]},
        {"choices": [{"message": 1}]},
    ]
    odd += [
        completion({}),
        completion({"content": [1]}),
        completion({"content": " "}),
        {"choices": {}},
        {"error": {"message": "full"}},
    ]
    for value in odd:
        failure = read(value)
        assert isinstance(failure, Failure) and failure.kind == "again" and "\n" not in failure.text and len(failure.text) < 300
    kinds = {
        400: "row",
        413: "row",
        422: "row",
        401: "fatal",
        404: "fatal",
        301: "fatal",
        429: "limited",
        500: "again",
        529: "again",
    }
    assert {status: read(b"", status).kind for status in kinds} == kinds
    assert read({"error": {"message": "a\x1b[31m\n b"}}, 500).text == "HTTP 500: a [31m b"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "-7"}, 0),
        ({"retry-after": "soon"}, None),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s"}, 360),
        ({"x-ratelimit-remaining-requests": "3", "x-ratelimit-reset-requests": "6m0s"}, None),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "120ms"}, 0.12),
        ({"x-ratelimit-remaining-tokens": "-1", "x-ratelimit-reset-tokens": "9"}, None),
        ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "1h2m3.5s"}, 3723.5),
        ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "2 hours"}, None),
        ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "1..5s"}, None),
    ],
)
def test_wanted_wait(headers, seconds):
    found = completions.wanted_wait(headers)
    assert found is None if seconds is None else found == pytest.approx(seconds)


def test_wanted_wait_until_a_point_in_time():
    hour = time.time() + 3600
    for headers in (
        {"retry-after": email.utils.formatdate(hour, usegmt=True)},
        {"x-ratelimit-remaining": "0", "x-ratelimit-reset": str(int(hour))},
        {"x-ratelimit-remaining": "0", "x-ratelimit-reset": str(int(1000 * hour))},
    ):
        assert 3400 < completions.wanted_wait(headers) <= 3600
