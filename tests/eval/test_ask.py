"""Benchmarks put to a model, to a server and to a file of replies: what is kept, what is counted, and how a stop goes on.

The last test is of the real benchmarks, from the folder that GRPO_JAX_BENCHMARKS names (see test_api_bank and test_acebench).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from data import demo, prompt
from eval import acebench, answer, api_bank, ask, bfcl, record, run, selection
from eval.run import Args, Data, Server
from eval.selection import AceBench, ApiBank
from grpo_jax import inputs
from tests.eval.bad_server import KEY, TOOLS, BadServer, right_reply
from tests.eval.test_acebench import RIGHT, write

BENCHMARKS = os.environ.get("GRPO_JAX_BENCHMARKS")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def args(tmp_path) -> Args:
    """API-Bank of eight tasks, the last too long for the tiny model and the first two alike."""
    rows = [
        {
            "id": f"row {n}",
            "tools": TOOLS,
            "history": [{"role": "user", "content": f"task {max(n, 1)}: the weather?" + 4000 * " rain" * (n == 7)}],
            "answer": {"name": "weather", "arguments": {"city": f"Město {max(n, 1)}"}},
        }
        for n in range(8)
    ]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark = ApiBank(str(tmp_path / "tasks.jsonl"))
    return Args(tmp_path / "out", data=Data(template=str(demo.TEMPLATE)), benchmarks="api_bank", api_bank=benchmark)


def lines(args, name="api_bank") -> dict[str, dict]:
    text = (args.out / f"{name}.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line) for line in text.split("\n")[:-1]]
    assert len({row["id"] for row in found}) == len(found)
    return {row["id"]: row for row in found}


def of_file(args, *rows) -> Args:
    path = args.out.with_name("replies.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return replace(args, replies=path, data=Data())


# ---------------------------------------------------------------- a file of replies


def test_replies_of_a_file_are_counted_by_every_protocol(args, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    typed = prompt.reply(
        [{"name": "weather", "arguments": {"city": " Město 2 "}}], "So."
    )  # right by our rules, not by ToolRL's
    replies = [
        {"id": "row 1", "output": right_reply(1), "token_count": 20},
        {"id": "row 2", "output": typed, "token_count": 30, "truncated": True},
        {"id": "row 3", "output": right_reply(4)},
        {"id": "row 4", "output": "I \ud800 cannot."},
        {"id": "row 5", "output": right_reply(5), "reason": "prompt_too_long"},
    ]
    scores = run.run(of_file(args, *replies))
    assert scores == json.loads((args.out / "scores.json").read_text())
    assert (scores["model"], scores["replies"]) == (str(args.out.with_name("replies.jsonl")),) * 2
    assert {scores[name] for name in ("model_fingerprint", "endpoint", "temperature", "max_response_tokens")} == {None}
    found = scores["benchmarks"]["api_bank"]
    assert (found["items"], found["right"], found["categories"]) == (8, 2, {"call": [2, 8]})
    assert found["aggregates"] == {"accuracy": 0.25, "accuracy_394": 0.25, "accuracy_reachable": 0.25}
    assert found["protocols"]["toolrl"]["categories"] == {"call": [1, 8]}
    assert found["protocols"]["accuracy"] == {name: found[name] for name in ("categories", "aggregates")}
    reasons = {"correct": 2, "wrong_argument": 1, "no_call": 1, "prompt_too_long": 1, "no_reply": 3}
    assert found["reasons"] == reasons and (found["response_tokens"], found["truncated"]) == (25, 1 / 8)
    assert found["options"] == {"path": args.api_bank.path, "layout": "one_message", "categories": ["call"], "limit": None}
    kept = lines(args)
    assert kept["row 2"]["calls"] == [{"name": "weather", "arguments": {"city": " Město 2 "}}]
    assert kept["row 2"]["parts"] == {"accuracy": 1.0, "toolrl": 0.0} and kept["row 2"]["value"] == 1
    assert kept["row 4"]["output"] == "I \ud800 cannot." and kept["row 4"]["calls"] is None
    assert kept["row 0"] == {
        "id": "row 0", "category": "call", "prompt": "", "output": "", "token_count": None, "truncated": False, "calls": None,
        "value": 0.0, "reason": "no_reply", "parts": {"accuracy": 0.0, "toolrl": 0.0},
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert re.search(r"api_bank +right +of +accuracy +toolrl\ncall +2 +8 +25\.00 +12\.50\n", shown)
    assert (
        "\nwrong: no_reply 3, wrong_argument 1, no_call 1, prompt_too_long 1\n" in shown
    )  # not broken where it is no terminal
    assert "warning: without a reply, and counted as wrong: 3 of 8 items of api_bank" in shown
    assert "| accuracy_394 |  |  | 25.00 | 12.50 |" in (args.out / "scores.md").read_text()


def test_what_the_program_wrote_is_a_file_of_replies(args, tmp_path):
    replies = [{"id": f"row {n}", "output": right_reply(n), "token_count": n} for n in (1, 2, 3, 5)]
    first = run.run(of_file(args, *replies))
    again = run.run(replace(args, data=Data(), replies=args.out / "api_bank.jsonl", out=tmp_path / "again"))
    assert again["benchmarks"] == first["benchmarks"]
    assert lines(replace(args, out=tmp_path / "again")) == lines(args)
    with pytest.raises(ValueError, match=r"out: holds results of another evaluation \(replies was .*, is .*api_bank.jsonl\)"):
        run.run(replace(args, data=Data(), replies=args.out / "api_bank.jsonl"))


def test_replies_are_judged_anew_each_time_and_other_benchmarks_stay(args, tmp_path):
    for category in acebench.CATEGORIES:
        write(tmp_path / "ace", category, [({}, {"Book.room": RIGHT})])
    one, two = ({"id": f"row {n}", "output": right_reply(n), "benchmark": "api_bank"} for n in (1, 2))
    other = {"id": "atom_bool_0", "output": prompt.reply([], ""), "benchmark": "acebench"}
    run.run(of_file(args, one, other))
    more = of_file(args, one, other, two)
    assert run.run(more)["benchmarks"]["api_bank"]["right"] == 2 and len(lines(args)) == 8
    found = run.run(replace(more, benchmarks="acebench", acebench=AceBench(str(tmp_path / "ace"))))
    assert list(found["benchmarks"]) == ["api_bank", "acebench"] and found["benchmarks"]["api_bank"]["right"] == 2
    ace = found["benchmarks"]["acebench"]
    assert (ace["items"], ace["reasons"]) == (8, {"no_reply": 7, "wrong_count": 1})
    assert list(ace["protocols"]) == ["official", "official_nostrip", "strict"]
    page = (args.out / "scores.md").read_text()
    assert page.index("| api_bank |") < page.index("| acebench |")


# ---------------------------------------------------------------- a model of ours


@pytest.fixture
def sampled(args, tiny_model):
    return replace(args, model=tiny_model, max_response_tokens=6, rows=3)


def test_a_killed_evaluation_goes_on_and_is_as_one_that_was_not(sampled, tmp_path, monkeypatch):
    whole = run.run(replace(sampled, out=tmp_path / "whole", temperature=2.0))
    rows = lines(replace(sampled, out=tmp_path / "whole"))
    assert [name for name, row in rows.items() if row["reason"] == "prompt_too_long"] == ["row 7"]
    assert rows["row 0"]["output"] != rows["row 1"]["output"] and rows["row 0"]["prompt"] == rows["row 1"]["prompt"]
    assert "task 3: the weather?" in rows["row 3"]["prompt"] and rows["row 7"]["prompt"].count(" rain") == 4000
    assert all(0 < row["token_count"] <= 6 for name, row in rows.items() if name != "row 7")
    assert whole["model_fingerprint"] == run.open_model(inputs.load_policy(sampled.model)).fingerprint
    assert (whole["temperature"], whole["max_response_tokens"]) == (2.0, 6)

    sampled = replace(sampled, temperature=2.0)
    add, asked, respond = record.Results.add, [], answer.respond

    def killed(self, benchmark, result):
        if len(self.rows[benchmark]) == 4:
            raise KeyboardInterrupt
        add(self, benchmark, result)

    with monkeypatch.context() as patch:
        patch.setattr(record.Results, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            run.run(sampled)
    assert not (sampled.out / "scores.json").exists()
    with (sampled.out / "api_bank.jsonl").open("ab") as file:
        file.write(b'{"id": "row 6", "cate')  # half a line
    monkeypatch.setattr(answer, "respond", lambda model, examples, *more, **named: (
        asked.extend(examples), respond(model, examples, *more, **named))[1])  # fmt: skip
    assert run.run(sampled) == whole and len(asked) == 4
    assert lines(sampled) == rows
    assert run.run(sampled) == whole and len(asked) == 4  # nothing is left


def test_a_folder_of_another_evaluation_is_refused_in_a_line_that_names_what_differs(sampled, tmp_path):
    sampled = replace(sampled, categories="call", limit=1)
    run.run(sampled)
    (tmp_path / "mine.txt").write_text("Mine: {tools}")
    for change, names in (
        (dict(max_response_tokens=5), r"max_response_tokens was 6, is 5"),
        (dict(temperature=0.5), r"temperature was 0\.0, is 0\.5"),
        (dict(data=Data(template=str(tmp_path / "mine.txt"))), r"template_fingerprint was \w+, is \w+"),
        (dict(api_bank=replace(sampled.api_bank, layout="turns")), r"api_bank\.layout was one_message, is turns; .*"),
        (dict(limit=2), r"api_bank\.limit was 1, is 2; api_bank\.items_fingerprint was .*"),
        (dict(endpoint="http://x", rows=None), r"model_fingerprint was \w+, is None; .*"),
    ):
        with pytest.raises(ValueError, match=rf"out: holds results of another evaluation \({names}\): give another --out$"):
            run.run(replace(sampled, **change))
    settings = sampled.out / "settings.json"
    settings.write_text(settings.read_text().replace('"model_fingerprint": "', '"model_fingerprint": "other'))
    with pytest.raises(ValueError, match=r"model_fingerprint was other\w+, is \w+"):
        run.run(sampled)
    settings.write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json: damaged: restore it, or give another --out"):
        run.run(sampled)
    settings.unlink()
    with pytest.raises(ValueError, match=r"api_bank\.jsonl: no settings\.json beside it says whose results these are"):
        run.run(sampled)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "responses.jsonl").write_text("")
    with pytest.raises(ValueError, match="rows: holds an evaluation on rows of data: give another --out"):
        run.run(replace(sampled, out=tmp_path / "rows"))


def test_settings_of_a_start_that_came_to_nothing_are_replaced(args):
    first = of_file(args, {"id": "row 1", "output": ""})
    run.run(first)
    (args.out / "api_bank.jsonl").write_text("")
    other = replace(first, replies=first.replies.rename(first.replies.with_name("other.jsonl")))
    assert run.run(other)["replies"] == str(other.replies)


def test_a_folder_that_another_process_is_at_work_in_is_left_alone(args, tmp_path):
    """Even before that has a result, and for another benchmark: the settings are of the whole folder."""
    for category in acebench.CATEGORIES:
        write(tmp_path / "ace", category, [({}, {"Book.room": RIGHT})])
    both = {"api_bank": args.api_bank, "acebench": AceBench(str(tmp_path / "ace"))}
    benchmark, elsewhere = selection.choose("api_bank,acebench", None, None, both)
    of = {"id": "row 1", "output": right_reply(1), "benchmark": "api_bank"}
    first = of_file(args, of, {"id": elsewhere.items[0].id, "output": "", "benchmark": "acebench"})
    settings = {"temperature": 0.5, "benchmarks": {"api_bank": benchmark.settings()}}
    with record.Results(args.out, settings, [benchmark]):
        before = {file.name: file.read_bytes() for file in args.out.iterdir()}
        for other in (first, replace(first, benchmarks="acebench", acebench=both["acebench"])):
            with pytest.raises(ValueError, match="out: another process is writing it: wait for its end"):
                run.run(other)
        assert {file.name: file.read_bytes() for file in args.out.iterdir()} == before
    assert run.run(first)["benchmarks"]["api_bank"]["right"] == 1


# ---------------------------------------------------------------- a server


def asked_of(args, server, **options) -> Args:
    return replace(args, model="teacher", endpoint=server.url, server=Server(**{"concurrency": 3, **options}))


def test_a_server_is_asked_the_same_and_what_it_refuses_is_asked_again(args, monkeypatch, capsys):
    monkeypatch.setattr(ask, "BACKOFF", 0.01)
    refuses = True

    def plan(row, nth):
        if row == 7 and refuses:
            return "status", 400, {"error": {"message": f"maximum context length ({KEY})"}}
        thought = {"content": right_reply(5).partition("</think>\n")[2], "reasoning_content": "Hm."}
        return {3: ("wrong",), 4: ("say", {"content": right_reply(4)}, "length"), 5: ("say", thought)}.get(
            row, ("rubbish",) if row == 6 and nth == 0 else ("good",)
        )

    with BadServer(plan) as server:
        todo = asked_of(args, server)
        scores = run.run(todo)
        assert scores["endpoint"] == server.url and (scores["model"], scores["temperature"]) == ("teacher", 0.0)
        found = scores["benchmarks"]["api_bank"]
        assert (found["right"], found["reasons"]) == (6, {"correct": 6, "wrong_argument": 1, "no_reply": 1})
        assert found["truncated"] == 1 / 8 and found["response_tokens"] == 10
        kept, shown = lines(args), capsys.readouterr().out
        assert "row 7" not in kept and kept["row 5"]["output"].startswith("<think>\nHm.\n</think>")
        assert "no answer to 1 item (HTTP 400: maximum context length (***)); the same command asks them again" in shown
        [example] = [item.example for item in api_bank.items(args.api_bank.path) if item.id == "row 3"]
        chat = prompt.messages(example, prompt.load_template(demo.TEMPLATE))
        [request] = [request for _, row, _, request in server.log if row == 3]
        assert request == {"model": "teacher", "temperature": 0.0, "max_tokens": 4096, "messages": chat}
        assert kept["row 3"]["prompt"] == f"system:\n{chat[0]['content']}\n\nuser:\n{chat[1]['content']}"
        assert server.keys == {f"Bearer {KEY}"} and server.most_under_way <= 3
        refuses, before = False, len(server.log)
        assert run.run(todo)["benchmarks"]["api_bank"]["right"] == 7 and server.rows()[before:] == [7]
        with pytest.raises(ValueError, match="request was .*, is "):
            run.run(replace(todo, model="another"))
    for file in args.out.iterdir():
        assert KEY not in file.read_text()


def test_fields_of_a_request_can_be_added_and_taken_out(args):
    body = '{"temperature": null, "max_tokens": null, "max_completion_tokens": 7, "seed": 1}'
    with BadServer(lambda row, nth: "good") as server:
        run.run(asked_of(args, server, body=body))
        request = server.log[0][-1]
        assert {name: request[name] for name in request.keys() - {"messages"}} == {
            "model": "teacher",
            "max_completion_tokens": 7,
            "seed": 1,
        }
        for wrong in ("[]", "{", '{"model": "x"}', '{"messages": []}'):
            with pytest.raises(ValueError, match=re.escape(f"--server.body {wrong}: give a JSON object, without model")):
                run.run(asked_of(args, server, body=wrong))


def test_a_server_that_answers_nobody_is_one_line_and_keeps_what_is_there(args):
    def plan(row, nth):
        return ("good",) if row in (2, 3) else ("status", 401, {"error": "no"})

    stops = pytest.raises(ValueError, match=r"^HTTP 401: no: set OPENAI_API_KEY to a key .*; then the same command goes on")
    with BadServer(plan) as server, stops:
        run.run(asked_of(args, server, concurrency=1))
    assert not (args.out / "scores.json").exists()
    with pytest.raises(ValueError, match="'localhost' is no server's address"):
        run.run(replace(args, out=args.out / "else", model="x", endpoint="localhost"))


def test_a_signal_keeps_what_is_answered(args):
    with BadServer(lambda row, nth: "stall" if row > 2 else "good") as server:
        words = ["-m", "eval.run", "--out", args.out, "--benchmarks", "api_bank", "--api_bank.path", args.api_bank.path]
        words += ["--endpoint", server.url, "--model", "teacher", "--server.concurrency", "4"]
        process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        while len(server.rows("stall")) < 4:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert "SIGINT: waiting for 4 answers under way" in process.stdout.readline()
        server.release.set()
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and len(lines(args)) == 7
    assert said == "warning: 1 item not answered: the same command goes on: nothing answered is asked twice\n"


# ---------------------------------------------------------------- the benchmarks themselves


def test_right_answers_of_the_real_benchmarks(tmp_path):
    """Their ground truth as replies, through the command."""
    if BENCHMARKS is None or importlib.util.find_spec("bfcl_eval") is None:
        pytest.skip(f"GRPO_JAX_BENCHMARKS names no folder with the benchmarks' files, or BFCL is missing: {bfcl.INSTALL}")
    folder = Path(BENCHMARKS)
    bank = next(folder / name for name in ("level-1-api.json", "apibank_level1_call.jsonl") if (folder / name).is_file())
    items = [*bfcl.items(), *api_bank.items(bank), *acebench.items(folder / "acebench_en")]
    replies = tmp_path / "replies.jsonl"
    replies.write_text(
        "".join(json.dumps({"id": item.id, "output": prompt.reply(item.example.answer, "So.")}) + "\n" for item in items)
    )
    words = ["--benchmarks", "bfcl,api_bank,acebench", "--api_bank.path", bank, "--acebench.path", folder / "acebench_en"]
    words += ["--replies", replies, "--out", tmp_path / "out"]
    subprocess.run([sys.executable, "-m", "eval.run", *map(str, words)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    found = json.loads((tmp_path / "out" / "scores.json").read_text())["benchmarks"]
    right = dict(bfcl.SIZES) | {"simple_java": 97, "live_simple": 256, "live_multiple": 1051}
    assert found["bfcl"]["categories"] == {name: [right[name], size] for name, size in bfcl.SIZES.items()}
    means = {name: round(100 * share, 2) for name, share in found["bfcl"]["aggregates"].items()}
    assert (means["non_live"], means["live"]) == (99.75, 99.70)
    assert found["api_bank"]["categories"] == {name: [size, size] for name, size in api_bank.SIZES.items()}
    assert found["api_bank"]["protocols"]["toolrl"]["aggregates"]["accuracy"] == 1
    means = {name: round(100 * p["aggregates"]["acebench"], 1) for name, p in found["acebench"]["protocols"].items()}
    assert means == {"official": 93.0, "official_nostrip": 99.9, "strict": 100.0}
    assert Counter(found["bfcl"]["reasons"]) == {"correct": 2494, "missing_argument": 4, "wrong_argument": 3}
