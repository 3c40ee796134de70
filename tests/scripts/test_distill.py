"""Distillation against a local server that fails, stalls, limits, cuts connections and answers rubbish, as a test's plan says.

No assertion depends on how fast the machine is: where a request must not be tried again, its time is long.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from data import jsonl, prompt
from eval import completions
from eval.completions import Answer
from grpo_jax import reward
from scripts import distill
from scripts.distill import Args, Data
from tests.eval.bad_server import KEY, TOOLS, BadServer, right_reply

ROOT = Path(__file__).parents[2]


def write_rows(path: Path, count: int) -> Path:
    rows = [
        {
            "id": f"row {n}",
            "messages": [
                {"role": "user", "content": "Hello."},
                {"role": "assistant", "content": "", "calls": [{"name": "weather", "arguments": {"city": "Łódź", "at": 1.0}}]},
                {"role": "tool", "name": "weather", "content": "rain"},
                {"role": "user", "content": f"task {n}: the weather in Město {n}?"},
            ],
            "tools": TOOLS,
            "answers": [{"name": "weather", "arguments": {"city": f"Město {n}"}}],
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Distils `count` rows from a server; quick to try again."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def run(server, count=3, **options):
        rows = write_rows(tmp_path / "rows.jsonl", count)
        quick = dict(timeout=120.0, retries=4, backoff=0.02, concurrency=4)
        return distill.distill(Args(Data(str(rows)), tmp_path / "out.jsonl", server.url, "teacher", **quick | options))

    run.out, run.journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.journal"
    return run


def kept(path: Path) -> list[int]:
    return [int(example.extra["row_id"].split()[1]) for example in jsonl.load(path).examples] if path.read_text() else []


# ---------------------------------------------------------------- what is kept


def test_kept_rows_are_what_supervised_training_reads(ask, tmp_path):
    with BadServer(lambda row, nth: "wrong" if row == 1 else "good") as server:
        work = ask(server, 4)
    before = jsonl.load(tmp_path / "rows.jsonl").examples
    after = jsonl.load(ask.out)
    assert not after.dropped and [e.id for e in after.examples] == [before[i].id for i in (0, 2, 3)]
    for example, row in zip(after.examples, (0, 2, 3), strict=True):
        assert prompt.target(example) == right_reply(row) == example.extra["response"]
        assert example.extra["reasoning"] == f"Row {row} names a city." and example.source == "rows"
        assert prompt.messages(example) == prompt.messages(before[row])
    assert work.verdicts == {"correct": 3, "wrong_arguments": 1} and (work.tokens_in, work.tokens_out) == (400, 40)
    asked = {row: request for _, row, _, request in server.log}
    assert asked[2] == {"model": "teacher", "messages": prompt.messages(before[2])}
    assert server.keys == {f"Bearer {KEY}"}


def test_rows_where_calling_nothing_is_right_survive(tmp_path, monkeypatch):
    """As `data.build --no_call` writes them, without answers but with "no_call"."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    row = {"id": "row 0", "query": "task 0: thanks!", "tools": TOOLS, "answers": [], "no_call": True}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    thought = prompt.reply([], "Nothing is to be called.")
    with BadServer(lambda row, nth: ("say", {"content": thought})) as server:
        distill.distill(Args(Data(str(tmp_path / "rows.jsonl")), tmp_path / "out.jsonl", server.url, "teacher"))
    before, after = jsonl.load(tmp_path / "rows.jsonl"), jsonl.load(tmp_path / "out.jsonl")
    assert not after.dropped and [e.id for e in after.examples] == [e.id for e in before.examples]
    assert prompt.target(after.examples[0]) == thought and after.examples[0].extra["row_id"] == "row 0"


def test_template_temperature_and_body_reach_the_server(ask, tmp_path):
    (tmp_path / "mine.txt").write_text("Mine: {tools}")
    options = dict(temperature=0.5, body='{"max_tokens": 7}')
    with BadServer(lambda row, nth: "good") as server:
        rows = write_rows(tmp_path / "rows.jsonl", 1)
        data = Data(str(rows), str(tmp_path / "mine.txt"))
        distill.distill(Args(data, tmp_path / "out.jsonl", server.url + "/chat/completions", "m", **options))
    (_, _, _, request), *_ = server.log
    assert request.pop("messages")[0]["content"].startswith("Mine: {")
    assert request == {"model": "m", "temperature": 0.5, "max_tokens": 7}


def test_a_thought_kept_apart_becomes_the_think_block():
    calls = '<tool_call>\n[{"name": "f", "arguments": {}}]\n</tool_call>'
    example = jsonl.example_of({"query": "q", "tools": [{"name": "f"}], "answers": [{"name": "f", "arguments": {}}]}, "test")

    def of(content, thought="", finish="stop"):
        answer = Answer(content, thought, finish, 0, 0)
        return answer.text(), distill.verdict(answer, example)

    assert of("\n" + calls, " A <tool_call> is due.\n") == (f"<think>\nA [tool_call] is due.\n</think>\n{calls}", "correct")
    assert of(f"<think>\nShort.\n</think>\n{calls}", "Long.") == (f"<think>\nShort.\n</think>\n{calls}", "correct")
    assert of(calls) == (calls, "no_format")
    assert of("", "Long.")[1] == "no_format"
    assert of(f"<think></think>{calls}", finish="length")[1] == "truncated"
    assert of("I will not.", finish="content_filter")[1] == "refused"
    row = distill.row_of(example, Answer(calls, "Why.", "stop", 0, 0))
    assert row["reasoning"] == "Why." and reward.score(row["response"], row["answers"]) == 1


def test_thoughts_come_under_either_name(ask):
    def plan(row, nth):
        calls = right_reply(row).partition("</think>\n")[2]
        return "say", {"content": calls, ("reasoning_content", "reasoning")[row]: "Thought."}

    with BadServer(plan) as server:
        ask(server, 2)
    texts = [example.extra["response"] for example in jsonl.load(ask.out).examples]
    assert texts == [right_reply(row).replace(f"Row {row} names a city.", "Thought.") for row in range(2)]


def test_attempts_end_with_the_first_right_reply(ask):
    with BadServer(lambda row, nth: "good" if nth >= row else "wrong") as server:
        work = ask(server, 4, attempts=3)
        assert Counter(server.rows()) == {0: 1, 1: 2, 2: 3, 3: 3} and kept(ask.out) == [0, 1, 2]
        assert work.verdicts == {"correct": 3, "wrong_arguments": 6} and work.done == 4
        ask(server, 4, attempts=4)  # one more for the row that has none
        assert Counter(server.rows())[3] == 4 and len(server.log) == 10 and kept(ask.out) == [0, 1, 2, 3]
        work = ask(server, 4, attempts=4)
        assert len(server.log) == 10 and work.server.answered == 0 and work.tokens_in == 1000


# ---------------------------------------------------------------- a bad server

RUBBISH = ("rubbish", "none", "no choices", "cut", "hang up")


def test_all_that_may_pass_is_tried_again_and_every_answer_kept_once(ask):
    bad = [*[(what,) for what in RUBBISH], ("status", 500, b"oops"), ("status", 503, {"error": "full"}, {"Retry-After": "0"})]
    bad += [("status", 429, b""), ("status", 408, b"")]
    with BadServer(lambda row, nth: bad[(row + nth) % len(bad)] if nth < 1 + row % 3 else ("good",)) as server:
        work = ask(server, 20, concurrency=8)
    assert kept(ask.out) == list(range(20)) and not work.left and work.asking.problem is None
    assert sorted(server.rows("good")) == list(range(20)) and len(server.log) == 20 + sum(1 + row % 3 for row in range(20))
    assert len(ask.journal.read_text().splitlines()) == 21 and server.most_under_way <= 8


def test_a_request_that_stalls_is_asked_again(ask):
    with BadServer(lambda row, nth: "stall" if nth == 0 else "good") as server:
        work = ask(server, 3, timeout=1.0, retries=100)
    assert kept(ask.out) == [0, 1, 2] and work.server.answered == 3 and len(ask.journal.read_text().splitlines()) == 4
    assert sorted(server.rows("stall")) == [0, 1, 2]


def test_a_row_that_never_gets_an_answer_is_left_for_the_next_start(ask, capsys):
    poison = {"on": True}
    with BadServer(lambda row, nth: "rubbish" if row == 1 and poison["on"] else "good") as server:
        work = ask(server, 5, retries=2)
        assert kept(ask.out) == [0, 2, 3, 4] and work.done == 4 and sum(work.left.values()) == 1
        assert server.rows("rubbish") == [1, 1, 1] and "HTTP 200 with no completion in it: <html>" in capsys.readouterr().out
        poison["on"] = False
        ask(server, 5)
    assert kept(ask.out) == list(range(5)) and len(server.log) == 4 + 3 + 1


def test_retry_after_holds_everybody(ask):
    with BadServer(lambda row, nth: ("good",) if nth else ("status", 429, b"", {"Retry-After": "0.4"})) as server:
        ask(server, 1)
    (first, *_), (second, *_) = server.log
    assert second - first >= 0.4

    def used_up(row, nth):
        return "good", {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "300ms"} if row == 0 else None

    ask.journal.unlink()
    ask.out.unlink()
    with BadServer(used_up) as server:
        ask(server, 3, concurrency=1)
    times = [at for at, *_ in server.log]
    assert times[1] - times[0] >= 0.3


def test_most_requests_refused(ask):
    """Three of four, in the order in which they reach the server."""
    state = {"refused": 0}

    def plan(row, nth):
        state["refused"] = (state["refused"] + 1) % 4
        return ("status", 429, b"") if state["refused"] else ("good",)

    with BadServer(plan) as server:
        ask(server, 20, concurrency=8, retries=20, backoff=0.002)
    assert kept(ask.out) == list(range(20)) and len(server.log) == 80


@pytest.mark.parametrize(
    ("status", "body", "mends"),
    [
        (401, {"error": {"message": f"no such key: {KEY}"}}, "set OPENAI_API_KEY to a key of that server"),
        (403, {"detail": "not yours"}, "the key in OPENAI_API_KEY may not use this model"),
        (404, {"error": {"message": "no model"}}, "which ends before /chat/completions, and --model"),
        (400, {"object": "error", "message": "bad\nfield"}, "check --model, and what is asked for beside the messages"),
        (402, b"pay", "mend the account"),
        (429, {"error": {"message": "broke", "code": "insufficient_quota"}}, "mend the account"),
        (308, b"", "check the server's address"),
    ],
)
def test_what_no_retry_mends_stops_with_one_line(ask, status, body, mends):
    with BadServer(lambda row, nth: ("status", status, body)) as server, pytest.raises(ValueError) as error:
        ask(server, 50)
    text = str(error.value)
    assert text.startswith(f"HTTP {status}: ") and mends in text and "\n" not in text and KEY not in text
    assert text.endswith("; then start the same command again: nothing answered is asked twice")
    assert len(server.log) <= (completions.IN_A_ROW + 3 if status == 400 else 4) and kept(ask.out) == []


def test_a_server_that_asks_to_come_tomorrow_or_is_not_there(ask):
    with BadServer(lambda row, nth: ("status", 429, b"daily limit", {"Retry-After": "80000"})) as server:
        with pytest.raises(
            ValueError, match=r"^HTTP 429: daily limit \(to be asked again in 1,333 minutes\): mend the account, or"
        ):
            ask(server, 50)
        assert len(server.log) <= 4
    with pytest.raises(ValueError, match=r"^no connection to 127\.0\.0\.1:\d+ \(.*\): check the server's address, or wait"):
        ask(server, 50, retries=1)


def test_a_request_refused_among_answers_is_the_rows_own_fault(ask):
    too_long = ("status", 400, {"error": {"message": "maximum context length"}})
    with BadServer(lambda row, nth: ("good",) if row % 2 else too_long) as server:
        work = ask(server, 8, concurrency=1)
        assert kept(ask.out) == [1, 3, 5, 7] and work.left == {"HTTP 400: maximum context length": 4}
        assert len(server.log) == 8
    ask.journal.unlink()
    ask.out.unlink()
    with BadServer(lambda row, nth: too_long) as server, pytest.raises(ValueError, match="check --model, and what"):
        ask(server, 40, concurrency=1)
    assert len(server.log) == completions.IN_A_ROW
    ask.journal.unlink()
    ask.out.unlink()
    with BadServer(lambda row, nth: too_long) as server, pytest.raises(ValueError, match="check --model, and what"):
        ask(server, 2)  # a first try with few rows


@pytest.mark.parametrize("bad", [("status", 400, b"too long"), ("status", 500, b"oops")])
@pytest.mark.parametrize("concurrency", [1, 16])
def test_bad_rows_side_by_side_do_not_hold_up_the_others(ask, bad, concurrency):
    """At the beginning, where nothing is answered yet, and at the end, where nothing else is left."""
    with BadServer(lambda row, nth: bad if row < 16 else "good") as server:
        # What may be the server's trouble stops a start, though not at the same rows.
        for _ in range(12 if bad[1] == 500 else 1):
            with contextlib.suppress(ValueError):
                work = ask(server, 60, concurrency=concurrency, retries=0)
            if kept(ask.out) == list(range(16, 60)):
                break  # which rows come first is drawn: how many starts it takes is chance
        assert kept(ask.out) == list(range(16, 60))
        mark = len(server.log)
        if bad[1] == 400:
            assert work.asking.problem is None and work.left == {"HTTP 400: too long": 16} and work.done == 44
            work = ask(server, 60, concurrency=concurrency)  # asked again: a server may take them one day
            assert sorted(server.rows()[mark:]) == list(range(16)) and work.asking.problem is None and work.done == 44
    with BadServer(lambda row, nth: bad if row < completions.IN_A_ROW else "good") as server:
        ask(server, 60, concurrency=1, retries=0)
        assert len(kept(ask.out)) == 60 - completions.IN_A_ROW
        work = ask(server, 60, concurrency=1, retries=0)
        assert sum(work.left.values()) == completions.IN_A_ROW and work.asking.problem is None


# ---------------------------------------------------------------- the end, and the next start


def command(server, tmp_path, *options):
    words = [
        sys.executable,
        "-m",
        "scripts.distill",
        "--data.path",
        str(tmp_path / "rows.jsonl"),
        "--out",
        str(tmp_path / "out.jsonl"),
    ]
    words += ["--url", server.url, "--model", "teacher", "--backoff", "0.02", "--timeout", "120", *options]
    return subprocess.Popen(
        words, cwd=ROOT, env=os.environ | {"OPENAI_API_KEY": KEY}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def until(holds, seconds=120.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def test_killed_twice_nothing_answered_is_asked_again(tmp_path):
    """And no file, output or error has the key, although the server says it back."""
    count = 60
    write_rows(tmp_path / "rows.jsonl", count)
    bad = [("rubbish",), ("status", 500, KEY.encode()), ("cut",), ("status", 429, {"error": KEY}, {"Retry-After": "0.05"})]
    echo = ("say", {"content": f"<think>{KEY}</think>" + right_reply(7).partition("</think>")[2]})

    def plan(row, nth):
        if nth < row % 2:
            return bad[row // 2 % len(bad)]
        return echo if row == 7 else ("slow", 0.02)

    journal, said = tmp_path / "out.jsonl.journal", ""

    def answered():
        return {json.loads(line)["id"] for line in journal.read_text().split("\n")[1:-1]} if journal.exists() else set()

    with BadServer(plan) as server:
        ids = [example.id for example in jsonl.load(tmp_path / "rows.jsonl").examples]
        for goal in (15, 35):
            process, mark, before = command(server, tmp_path), len(server.log), {ids.index(one) for one in answered()}
            until(lambda goal=goal: journal.exists() and journal.read_bytes().count(b"\n") > goal)
            process.send_signal(signal.SIGKILL)
            said += "".join(process.communicate())
            assert process.returncode == -signal.SIGKILL and not (tmp_path / "out.jsonl").exists()
            assert not before & set(server.rows()[mark:])
            before = {ids.index(one) for one in answered()}
            with journal.open("ab") as file:
                file.write(b'{"id": "half a li')
        process, mark = command(server, tmp_path), len(server.log)
        said += "".join(process.communicate(timeout=240))
        assert process.returncode == 0
        assert not before & set(server.rows()[mark:]) and set(server.rows()[mark:]) | before == set(range(count))
    assert kept(tmp_path / "out.jsonl") == list(range(count))
    lines = [json.loads(line)["id"] for line in journal.read_text().splitlines()[1:]]
    assert sorted(lines) == sorted(ids)
    assert server.keys == {f"Bearer {KEY}"}
    for text in (said, *(file.read_text() for file in tmp_path.iterdir())):
        assert KEY not in text and KEY[3:] not in text
    assert "***" in (tmp_path / "out.jsonl").read_text()


def test_a_signal_waits_for_what_is_under_way_and_a_second_one_does_not(tmp_path):
    write_rows(tmp_path / "rows.jsonl", 40)
    journal, out = tmp_path / "out.jsonl.journal", tmp_path / "out.jsonl"
    for name, code, twice in (("SIGINT", 130, False), ("SIGTERM", 143, True)):
        with BadServer(lambda row, nth: "stall") as server:
            process = command(server, tmp_path, "--concurrency", "4")
            until(lambda server=server: server.under_way == 4)
            process.send_signal(signal.Signals[name])
            line = next(line for line in process.stdout if name in line)
            assert line == f"warning: {name}: waiting for 4 answers under way; a second signal ends at once\n"
            if twice:
                process.send_signal(signal.Signals[name])
            else:
                server.release.set()
            text, errors = process.communicate(timeout=120)
        assert process.returncode == code and not errors and len(server.log) == 4
        assert text.endswith("36 rows are not done: start the same command again; nothing answered is asked twice\n")
        assert journal.read_bytes().count(b"\n") == 5 and len(kept(out)) == 4
    assert not set(server.rows()) & set(kept(out))


def test_an_error_is_one_line_on_stderr(tmp_path):
    write_rows(tmp_path / "rows.jsonl", 2)
    with BadServer(lambda row, nth: ("status", 401, {"error": KEY})) as server:
        process = command(server, tmp_path)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and errors.count("\n") == 1 and errors.startswith("error: HTTP 401: ***: set OPENAI_API_KEY")


def test_the_journal_refuses_other_questions_and_damage_and_forgives_half_a_line(ask):
    with BadServer(lambda row, nth: "good") as server:
        ask(server, 3)
        for other in (dict(temperature=0.7), dict(body='{"top_p": 0.5}')):
            with pytest.raises(
                ValueError, match=r"its answers are to other questions \(request was .*, is .*\): give another --out$"
            ):
                ask(server, 3, **other)
        whole = ask.journal.read_bytes()
        ask.journal.write_bytes(whole[:-5])
        ask(server, 3)
        assert len(server.log) == 4 and kept(ask.out) == [0, 1, 2]
        assert sorted(ask.journal.read_bytes().splitlines()) == sorted(whole.splitlines())
        ask.journal.write_bytes(whole[:10])  # not even the first line
        ask(server, 3)
        assert len(server.log) == 7
        lines = whole.splitlines(keepends=True)
        for damaged in (b"not JSON\n", b"{}\n", b"[1]\n"):
            ask.journal.write_bytes(lines[0] + damaged + lines[2])
            with pytest.raises(ValueError, match=r"out\.jsonl\.journal:2: damaged: delete the line, whose answer is lost$"):
                ask(server, 3)
        ask.journal.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"journal:1: damaged: give another --out$"):
            ask(server, 3)
        ask.journal.unlink()
        with pytest.raises(ValueError, match="exists, and has no journal beside it: give another name"):
            ask(server, 3)
        assert len(server.log) == 7


def test_a_journal_without_answers_takes_other_settings(ask):
    """So a command that was wrong can be mended."""
    wrong = True
    with BadServer(lambda row, nth: ("status", 404, b"no such model") if wrong else ("good",)) as server:
        with pytest.raises(ValueError, match="check the server's address"):
            ask(server, 3, body='{"top_p": 2}')
        wrong = False
        ask(server, 3)
        assert kept(ask.out) == [0, 1, 2] and "top_p" not in ask.journal.read_text()
        ask(server, 3)
    assert len(ask.journal.read_text().splitlines()) == 4


def test_one_process_a_journal(tmp_path):
    first = distill.Journal(tmp_path / "j", {})
    with pytest.raises(ValueError, match="another process is writing it"):
        distill.Journal(tmp_path / "j", {})
    first.close()
    distill.Journal(tmp_path / "j", {}).close()


def test_data_may_grow_and_the_order_is_that_of_the_rows(ask):
    with BadServer(lambda row, nth: ("slow", 0.1 - 0.01 * row)) as server:
        ask(server, 8, limit=3, concurrency=8)
        assert kept(ask.out) == [0, 1, 2]
        ask(server, 8, concurrency=8)
    assert kept(ask.out) == list(range(8)) and len(server.log) == 8


# ---------------------------------------------------------------- parts


def test_help_names_the_command_that_works_without_an_install(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["distill.py", "--help"])
    with pytest.raises(SystemExit):
        distill.main()
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python -m scripts.distill ")
    assert "    python -m scripts.distill --data.path" in distill.__doc__
    texts = ("\nAsks a stronger model", "\npython -m scripts.distill --data.path", "--out PATH")
    places = [shown.index(text) for text in texts]
    assert places == sorted(places)
    assert "Journal" not in shown and "verdict" not in shown


def test_command_lines_that_cannot_be_meant(ask, monkeypatch):
    args = Args(Data("rows.jsonl"), Path("out.jsonl"), "http://localhost/v1", "m")
    for options, message in (
        (dict(attempts=0), "--attempts 0: give a number from 1 on"),
        (dict(retries=-1), "--retries -1: give a number from 0 on"),
        (dict(timeout=float("nan")), "--timeout nan: give a number of seconds above 0"),
        (dict(limit=0), "--limit 0: give a number from 1 on"),
        (dict(temperature=-1.0), "--temperature -1.0: give a number from 0 on"),
        (dict(price_in=-3.0, price_out=1.0), "--price_in -3.0: give dollars for a million tokens, from 0 on"),
        (dict(price_in=3.0), "--price_out is missing: the cost needs both prices"),
        (dict(attempts=2, temperature=0.0), "--temperature 0 gives the same reply"),
        (dict(body="[1]"), "--body: give a JSON object"),
        (dict(body='{"model": "other"}'), "--body: give a JSON object, without model"),
        (dict(out=Path("out.json")), "--out out.json: give a name that ends in .jsonl"),
        (dict(url="localhost:8000"), "'localhost:8000' is no server's address: give one like https"),
        (dict(url=f"https://me:{KEY}@host/v1"), "the server's address has a name or password in it"),
    ):
        with pytest.raises(ValueError) as error:
            distill.distill(replace(args, **options))
        assert message in str(error.value) and KEY not in str(error.value)
    for bad in (f"{KEY}\n{KEY}", f'"{KEY}"', KEY + "é"):
        monkeypatch.setenv("OPENAI_API_KEY", bad)
        with pytest.raises(ValueError, match="the key in OPENAI_API_KEY has a character that no key has") as error:
            distill.distill(args)
        assert KEY not in str(error.value)


def test_without_a_key_and_with_one_of_another_name(ask, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("LOCAL_KEY", " EMPTY\n")
    with BadServer(lambda row, nth: ("say", {"content": right_reply(row).replace("names", "is not EMPTY, names")})) as server:
        ask(server, 1)
        assert server.keys == {None}
        ask(server, 2, key_env="LOCAL_KEY")
        assert server.keys == {None, "Bearer EMPTY"}
    assert "not EMPTY" in ask.out.read_text()  # a placeholder is no secret, and may be a word of a reply


def test_numbers_on_the_way_and_at_the_end(ask, capsys, monkeypatch):
    monkeypatch.setattr(distill, "LINE_EVERY", 0.01)
    with BadServer(lambda row, nth: ("slow", 0.1)) as server:
        work = ask(server, 3, price_in=1000.0, price_out=5000.0)
    assert work.dollars() == pytest.approx((300 * 1000 + 30 * 5000) / 1e6)
    text = capsys.readouterr().out
    assert "3 of 3 kept" in text and "$0.45" in text and re.search(r"correct +3 +100\.0%", text)
    assert re.search(r"^0/3 rows  0\.0/s  0 in, 0 out  \$0\.00$", text, re.MULTILINE)
