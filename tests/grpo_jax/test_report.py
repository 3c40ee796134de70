"""The report without a browser: what it reads, compares, says and writes; tests/grpo_jax/test_report_browser.py shows it."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import random
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from data import example, prompt
from grpo_jax import run as run_module
from grpo_jax.metrics import Log
from grpo_jax.report import __main__ as command
from grpo_jax.report import calls, panels, reading, server, words
from grpo_jax.report import page as pages
from grpo_jax.report.reading import Reading
from grpo_jax.reward import judge, parse_calls
from tests.grpo_jax import made_run


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return made_run.make(tmp_path_factory.mktemp("made") / "one", steps=12, groups=3)


def read(folder: Path, most: int = 1000) -> Reading:
    found = Reading(folder, most)
    found.update()
    return found


def parts_of(file: Path) -> dict[str, object]:
    """The parts of a page, as its script reads them."""
    found = re.findall(r'<script type="application/octet-stream" id="([\w-]+)">([\w+/=]+)</script>', file.read_text())
    return {name: json.loads(gzip.decompress(base64.b64decode(text))) for name, text in found}


# ---------------------------------------------------------------- what a response says


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("", []),
        ("words", ["words"]),
        ("<think>a</think>b<tool_call>[]</tool_call>c", ["think:<think>a</think>", "b", "call:<tool_call>[]</tool_call>", "c"]),
        (
            "<tool_call>1</tool_call><think>a</think><tool_call>2</tool_call>",  # the last block is the one that is read
            ["<tool_call>1</tool_call>", "think:<think>a</think>", "call:<tool_call>2</tool_call>"],
        ),
        (
            "<think>a<tool_call>[]</tool_call>b</think>",
            ["think:<think>a", "call:<tool_call>[]</tool_call>", "think:b</think>"],
        ),
        ("<think>never closed<tool_call>nor this", ["<think>never closed<tool_call>nor this"]),
    ],
)
def test_thought_and_calls_are_set_apart(text, kinds):
    found = calls.pieces(text)
    assert [f"{kind}:{piece}" if kind else piece for kind, piece in found] == kinds
    assert "".join(piece for _, piece in found) == text


RIGHT = [{"name": "f", "arguments": {"a": 1, "b": "x", "c": {"d": [1, 2], "e": None}}}]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"a": 1, "b": "x", "c": {"d": [1, 2], "e": None}}, {}),
        ({"c": {"e": None, "d": [1, 2]}, "b": "x", "a": 1}, {}),  # the order of keys is nobody's concern
        ({"a": 2, "b": "x", "c": {"d": [1, 2], "e": None}}, {"a": ("value", "2", "1")}),
        ({"a": "1", "b": "x", "c": {"d": [1, 2], "e": None}}, {"a": ("type", '"1"', "1")}),
        ({"a": 1.0, "b": "x", "c": {"d": [1, 2], "e": None}}, {"a": ("type", "1.0", "1")}),
        ({"a": True, "b": "x", "c": {"d": [1, 2], "e": None}}, {"a": ("type", "true", "1")}),
        ({"b": "x", "c": {"d": [1, 2], "e": None}}, {"a": ("missing", None, "1")}),
        ({"a": 1, "b": "x", "c": {"d": [1, 2], "e": None}, "z": 0}, {"z": ("extra", "0", None)}),
        ({"a": 1, "b": "x", "c": {"d": [1, 3], "e": None}}, {"c.d[1]": ("value", "3", "2")}),
        ({"a": 1, "b": "x", "c": {"d": [1], "e": None}}, {"c.d": ("value", "[1]", "[1, 2]")}),
        ({"a": 1, "b": "x", "c": {"d": [1, 2], "e": 0}}, {"c.e": ("type", "0", "null")}),
        ({"a": 1, "b": "x", "c": None}, {"c": ("type", "null", '{"d": [1, 2], "e": null}')}),
    ],
)
def test_arguments_are_compared_one_by_one(arguments, expected):
    (entry,) = calls.compare([{"name": "f", "arguments": arguments}], RIGHT)
    assert entry["mark"] == "" and entry["name"] == "f"
    assert {path: (mark, given, right) for mark, path, given, right in entry["arguments"] if mark} == expected


def test_calls_are_paired_whatever_their_order():
    call = lambda name, **arguments: {"name": name, "arguments": arguments}  # noqa: E731
    answer = [call("f", a=1), call("f", a=2, b=2), call("g"), call("h", x=1)]
    given = [call("i", x=1), call("f", a=2, b=3), call("f", a=1), call("g"), call("f", a=9)]
    found = calls.compare(given, answer)
    assert [(e["mark"], e["name"], e.get("wanted")) for e in found] == [
        ("", "f", None), ("", "f", None), ("", "g", None), ("name", "i", "h"), ("extra_call", "f", None),
    ]  # fmt: skip
    assert [row[0] for row in found[1]["arguments"]] == ["", "value"] and [row[0] for row in found[3]["arguments"]] == [""]
    assert [e["mark"] for e in calls.compare([], answer)] == ["missing_call"] * 4
    assert calls.compare([], []) == []


@pytest.mark.parametrize("seed", range(5))
def test_calls_without_a_difference_are_those_that_the_reward_calls_right(seed):
    chance = random.Random(seed)
    for number in range(60):
        task = made_run.task(chance, number)
        text = made_run.reply(chance, task["answer"][0], chance.randrange(10))
        found = parse_calls(text)
        same = found is not None and not calls.marks(calls.compare(found, task["answer"]))
        assert same == bool(judge(text, task["answer"]).parts["match"])


def test_a_response_without_measure_is_shown_in_part():
    many = [{"name": "n" * 10_000, "arguments": {str(i): "v" * 5000 for i in range(3)}} for _ in range(300)]
    (missing, *extra) = calls.compare(many, RIGHT)
    assert missing["mark"] == "name" and len(extra) == calls.MOST_ROWS
    assert len(json.dumps(extra[:1])) < 500_000 and len(extra[0]["name"]) == calls.MOST_NAME
    deep: dict = {}
    for _ in range(480):
        deep = {"a": deep}
    assert calls.compare([{"name": "f", "arguments": deep}], [{"name": "f", "arguments": deep}])[0]["arguments"][0][0] == ""


# ---------------------------------------------------------------- what a run's folder holds


def test_the_prompt_is_cut_into_turns_and_tools():
    task = example.make(
        [
            {"role": "user", "content": "Is it cold?"},
            {"role": "assistant", "content": "Where?"},
            {"role": "user", "content": "Oslo"},
        ],
        [
            {"name": "weather", "description": "Of a city.", "parameters": {}},
            {"name": "time", "description": "Now.", "parameters": {}},
        ],
        [],
        "test",
    )
    chat = prompt.messages(task)
    qwen = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in chat) + "<|im_start|>assistant\n"
    llama = "<|begin_of_text|>" + "".join(
        f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content']}<|eot_id|>" for m in chat
    )
    for text in (qwen, llama + "<|start_header_id|>assistant<|end_header_id|>\n\n"):
        turns, tools = reading._without_tools(reading.turns_of(text))
        assert [role for role, _ in turns] == ["system", "user", "assistant", "user"]
        assert turns[-1][1] == "Oslo" and [name for name, _ in tools] == ["weather", "time"]
        assert "[2 tools, listed apart]" in turns[0][1] and "Of a city." not in turns[0][1]
        assert "read_thermometer" in turns[0][1]  # the template's example is no tool on offer
    assert reading.turns_of("plain words") == [("prompt", "plain words")]


def test_a_run_is_read_whole_and_prompts_are_kept_once(made):
    found = read(made)
    rows = [json.loads(line) for line in (made / "rollouts.jsonl").read_text().splitlines()]
    columns = found.groups.columns
    assert found.count == len(rows) == 36 and columns["step"] == [row["step"] for row in rows]
    assert columns["reward"] == [[r["value"] for r in row["responses"]] for row in rows]
    assert [[found.groups.reasons[i] for i in some] for some in columns["reason"]] == [
        [r["reason"] for r in row["responses"]] for row in rows
    ]
    ids = [found.groups.tasks[task][0] for task in columns["task"]]
    assert ids == [row["id"] for row in rows] and len(found.groups.tasks) == len({*ids}) < len(rows)
    right = [[not bits for bits in some] for some in columns["marks"]]
    parsed = [[r["reason"] not in ("bad_json", "no_format") for r in row["responses"]] for row in rows]
    reasons = [[r["reason"] == "correct" for r in row["responses"]] for row in rows]
    for marks, readable, correct in zip(right, parsed, reasons, strict=True):
        assert [m for m, known in zip(marks, readable, strict=True) if known] == [
            c for c, known in zip(correct, readable, strict=True) if known
        ]


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl"])
def test_a_last_line_that_was_cut_off_is_left_out_and_said_so(tmp_path, name, capsys):
    folder = made_run.make(tmp_path / "run", steps=4, groups=2)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: -len(whole.splitlines()[-1]) // 2])
    command.run(command.Args((folder,)))
    assert f"{name}: the last line has no end, and is left out" in capsys.readouterr().out
    shown = parts_of(folder / "report.html")["runs"]["runs"][0]
    assert shown["metrics"]["step"] == ([0, 1, 2, 3] if name == "metrics.jsonl" else [0, 1, 2, 3, 4])
    assert shown["groups"] == (8 if name == "metrics.jsonl" else 7)
    warned = [item["text"] for item in shown["summary"] if item["warning"]]
    assert f"The last line of {name} has no end (the run is writing it, or was killed there), and is left out here." in warned


@pytest.mark.parametrize(
    ("name", "line", "told"),
    [
        ("metrics.jsonl", "half a row\n", "metrics.jsonl, line 3: not a row of a step"),
        ("rollouts.jsonl", '{"step": 9, "id"\n', "rollouts.jsonl, line 3: not a row of a step"),
        ("rollouts.jsonl", '{"step": 9, "id": "x"}\n', "rollouts.jsonl, line 3: not a group of responses"),
        ("config.json", None, "config.json: not JSON"),
    ],
)
def test_a_file_that_is_damaged_elsewhere_is_one_clear_line(tmp_path, name, line, told):
    folder = made_run.make(tmp_path / "run", steps=2, groups=2)
    path = folder / name
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], line, *lines[2:]]) if line else "{")
    with pytest.raises(ValueError, match=re.escape(told)):
        read(folder)
    with pytest.raises(ValueError, match=re.escape(told)):  # and again: it is not passed over
        read(folder)


def test_a_run_is_read_on_where_the_reading_stopped(tmp_path):
    folder = made_run.make(tmp_path / "run", steps=20, groups=4)
    file = folder / "rollouts.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:70]) + lines[70][:50])
    found = read(folder)
    assert found.count == 70 and found.torn == ["rollouts.jsonl"] and not found.update()
    with file.open("ab") as more:
        more.write(whole[len(b"".join(lines[:70])) + 50 :])
    assert found.update() and found.count == 80 and not found.torn
    fresh = read(folder)
    assert found.groups.index() == fresh.groups.index() and found.groups.chunks == fresh.groups.chunks
    Log.open(folder, 5, tensorboard=False).close()  # the run starts again from step 5
    assert found.update() and found.count == 20 and found.rows[-1]["step"] == 5 and found.begun == 1
    (folder / "hf").mkdir()
    assert found.update() and not found.update()


def test_of_a_long_run_the_first_groups_of_each_step_are_kept(tmp_path, capsys):
    folder = made_run.make(tmp_path / "run", steps=10, groups=6)
    command.run(command.Args((folder,), groups=20))
    assert "20 of 60 groups (--groups)" in capsys.readouterr().out
    index = parts_of(folder / "report.html")["index-0"]
    assert index["step"] == [step for step in range(1, 11) for _ in range(2)]
    rows = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert [index["tasks"][task][0] for task in index["task"]] == [rows[6 * s + k]["id"] for s in range(10) for k in (0, 1)]


# ---------------------------------------------------------------- what it says


def test_wilsons_interval():
    assert words.wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # Wilson's own formula, by hand
    assert words.wilson(0.0, 20)[0] == 0.0 and words.wilson(0.0, 20)[1] == pytest.approx(0.1611, abs=1e-4)
    assert words.wilson(1.0, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)


def told(folder: Path) -> dict[str, str]:
    """The text of each title of the summary."""
    items: dict[str, str] = {}
    for item in words.summary(read(folder)):
        items[item["title"]] = f"{items[item['title']]} {item['text']}" if item["title"] in items else item["text"]
    return items


def test_the_summary_says_what_a_person_would_ask(made):
    found = told(made)
    assert found["State"] == "12 of 12 steps so far: it is still running, or was stopped."
    assert found["Accuracy"] == (
        "Validation accuracy rose from 25.0% (95 % interval 19.5 to 31.4) in step 0 to 95.0% (95 % interval 91.0 to 97.3) in "
        "step 12, on 200 held-out rows."
    )
    assert re.match(
        r"The mean reward of sampled responses rose from 0\.\d{3} ± 0\.\d{3} in step 1 to 1\.000 ± 0\.000", found["Reward"]
    )
    assert found["What fails"] == "In the validation of step 12, of all responses: the right tool with other arguments 5.0%."
    assert found["Export"].startswith("None yet")
    assert found["Warning"].startswith("In the last 1 step 100% of the groups had equal rewards and taught nothing")


def test_a_finished_run_says_where_its_export_lies(tmp_path):
    folder = made_run.make(tmp_path / "run", steps=2)
    (folder / "hf").mkdir()
    found = told(folder)
    assert found["State"] == "Finished, after 2 steps." and str(folder / "hf") in found["Export"]


def write_rows(folder: Path, rows: list[dict], config: dict | None = None) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_difference_that_may_be_chance_is_called_so(tmp_path):
    row = lambda step, share, count: {"step": step, "val/accuracy": share, "val/count": count, "val/b/accuracy": share}  # noqa: E731
    found = told(write_rows(tmp_path / "run", [row(0, 0.5, 20), row(5, 0.7, 20), row(9, 0.6, 20)]))
    assert found["Accuracy"] == (
        "Validation accuracy went from 50.0% (95 % interval 29.9 to 70.1) in step 0 to 60.0% (95 % interval 38.7 to 78.1) in "
        "step 9, on 20 held-out rows; the difference may be chance. The best was 70.0%, in step 5."
    )
    assert found["Benchmark b"].startswith("Validation accuracy went from 50.0% in step 0 to 60.0% in step 9, on benchmark b.")
    fell = told(write_rows(tmp_path / "fell", [row(0, 0.9, 500), row(9, 0.1, 500)]))
    assert fell["Accuracy"].startswith("Validation accuracy fell from 90.0%")
    once = told(write_rows(tmp_path / "once", [{"step": 0, "val/accuracy": 0.5}]))
    assert once["Accuracy"] == "50.0% of the held-out rows were right in step 0, the only validation."


def test_what_a_run_warned_of_is_in_the_summary(tmp_path):
    config = {"rollout": {"prompts_per_step": 8, "refills": 2}, "update": {"recompute_old_logp": False}}
    rows = [
        {
            "step": step,
            "reward/mean": 0.5,
            "rollout/logp_mismatch": 0.5 if step == 2 else 0.0,
            "learner/prompts": 8 if step == 1 else 5,
            "groups/zero_variance": 0.95,
            "response_tokens/truncated_share": 0.5,
            "loss": None if step == 3 else 1.0,
            "learner/skipped": int(step == 3),
        }
        for step in (1, 2, 3)
    ]
    found = words.warnings(read(write_rows(tmp_path / "run", rows, config)))
    assert [text[:38] for text in found] == [
        "In 3 steps, first in step 1: 50% of th",
        "In 1 step, first in step 2: the log-pr",
        "In 2 steps, first in step 2: of 8 prom",
        "In 1 step, first in step 3, optimizer ",
        "In the last 1 step 95% of the groups h",
        "loss was no finite number in 1 step, f",
    ]


def test_supervised_training_and_a_run_that_has_just_begun_have_a_page(tmp_path):
    sft = write_rows(tmp_path / "sft", [{"step": s, "loss": 2.0 - s, "val/loss": 3.0 - s, "grad_norm": 1.0} for s in (0, 1)])
    assert told(sft)["Loss"] == "The validation loss went from 3.0000 in step 0 to 2.0000 in step 1 (nats a token)."
    begun = write_rows(tmp_path / "begun", [], {"run": {"steps": 5}})
    page = pages.write([sft, begun], tmp_path / "report.html")
    assert page.runs()["sections"][0]["title"] == "Supervised training"
    assert page.runs()["runs"][1]["summary"][0]["text"] == "0 of 5 steps so far: it is still running, or was stopped."


def test_every_metric_has_one_panel(made):
    names = read(made).names + ["val/bfcl/accuracy"]
    shown = [one["metric"] for section in panels.sections(names) for panel in section["panels"] for one in panel["series"]]
    assert sorted(shown) == sorted(names)
    assert [panel["title"] for panel in panels.sections(names)[0]["panels"]] == [title for _, title in panels.PANELS]
    assert panels.sections([]) == []


# ---------------------------------------------------------------- the file


def test_the_file_is_whole_small_and_asks_for_nothing(made):
    pages.write([made], made / "report.html")
    text = (made / "report.html").read_text()
    parts = parts_of(made / "report.html")
    assert {"runs", "index-0", "groups-0-0", "tasks-0-0"} == {*parts}
    assert len(text) - sum(map(len, re.findall(r'octet-stream" id="[\w-]+">([\w+/=]+)<', text))) < 200_000
    assert not re.search(r"""(src|href)=["'](?!#)""", text.split("</style>")[1].split("<script")[0])
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(script) == 1 and "Leon Sorokin" in script[0]  # uPlot's licence goes with it
    for what, content in (("script-src", script[0]), ("style-src", re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1])):
        assert f"{what} 'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy and "connect-src 'none'" in policy
    assert not list(made.glob("*.tmp"))


def test_what_was_written_comes_through_as_it_was(tmp_path):
    text = "</script><script>alert(1)</script>\x00\ud800 \u202e" + "x" * 1_000_000
    folder = made_run.make(tmp_path / "<b>&{{STYLE}}", steps=1, groups=1)
    row = json.loads((folder / "rollouts.jsonl").read_text())
    row["responses"][0]["text"] = row["responses"][0]["reason"] = text
    (folder / "rollouts.jsonl").write_text(json.dumps(row) + "\n")
    pages.write([folder], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "alert(1)" not in html and "<title>&lt;b&gt;&amp;{{STYLE}} · grpo_jax</title>" in html
    parts = parts_of(tmp_path / "report.html")
    assert parts["groups-0-0"][0][0]["pieces"] == [["", text]] and text in parts["index-0"]["reasons"]


def test_runs_are_named_apart_and_told_by_what_differs(tmp_path):
    one = made_run.make(tmp_path / "x" / "run", steps=1)
    two = made_run.make(tmp_path / "y" / "run", steps=1, seed=3, optimizer__learning_rate=1e-5)
    shown = pages.Page([one, two, two]).runs()
    assert [run["name"] for run in shown["runs"]] == ["x/run", "y/run (1)", "y/run (2)"]
    assert shown["differing"] == ["optimizer.learning_rate"]
    assert shown["runs"][1]["label"] == "y/run (1), learning_rate 1e-05"


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], "no run: give the folder of one"),
        (["nowhere"], "nowhere: no metrics.jsonl in it: give the folder of a run"),
        (["RUN", "--groups", "0"], "--groups 0: give at least 1"),
        (["RUN", "--out", "."], "--out .: this is a folder: give a file"),
        (["RUN", "--outt", "x"], "unknown option '--outt': did you mean '--out'?"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(made, args, told, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report", *(str(made) if word == "RUN" else word for word in args)])
    with pytest.raises(SystemExit) as stop:
        command.config.run_main(command.main)
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and shown.startswith(f"error: {told}") and shown.count("\n") == 1


# ---------------------------------------------------------------- live, and at the end of a run


def test_the_server_answers_this_machine_alone_and_says_when_nothing_is_new(tmp_path):
    folder = made_run.make(tmp_path / "run", steps=3, groups=2)
    shown = server.make(pages.Page([folder]), 0)
    threading.Thread(target=shown.serve_forever, daemon=True).start()
    assert shown.server_address[0] == "127.0.0.1"

    def ask(path: str, host: str = "127.0.0.1") -> tuple[int, bytes]:
        request = urllib.request.Request(f"http://127.0.0.1:{shown.server_port}{path}", headers={"Host": f"{host}:1"})
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    value = lambda body: json.loads(gzip.decompress(body))  # noqa: E731
    try:
        status, html = ask("/")
        assert (
            status == 200 and b'data-live="yes"' in html and b"connect-src 'self'" in html and b'octet-stream" id' not in html
        )
        runs = value(ask("/data/runs")[1])
        assert ask(f"/data/runs?since={runs['version']}")[0] == 204
        assert len(value(ask("/data/groups-0-0")[1])) == 6 and len(value(ask("/data/index-0")[1])["step"]) == 6
        for name in ("groups-0-9", "groups-9-0", "index", "groups-0-x", "../config.json", "groups-0--1", "index-" + "9" * 5000):
            assert ask(f"/data/{name}")[0] == 404
        assert ask("/", "attacker.example")[0] == 403
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "reward/mean": 1.0}\n')
        newer = value(ask(f"/data/runs?since={runs['version']}")[1])
        assert newer["version"] > runs["version"] and newer["runs"][0]["metrics"]["step"] == [0, 1, 2, 3, 4]
        with (folder / "metrics.jsonl").open("a") as file:
            file.write("damage\n")
        for _ in range(2):
            status, body = ask(f"/data/runs?since={newer['version']}")
            assert status == 500 and b"line 6: not a row of a step" in body
    finally:
        shown.shutdown()
        shown.server_close()


def test_a_port_that_is_taken_is_said(made):
    taken = server.make(pages.Page([made]), 0)
    with taken, pytest.raises(OSError, match=f"--port {taken.server_port}: .*give another one"):
        command.run(command.Args((made,), serve=True, port=taken.server_port))


def test_a_page_that_cannot_be_made_fails_no_run(tmp_path, capsys):
    folder = made_run.make(tmp_path / "run", steps=1)
    assert run_module.report_page(folder) == folder / "report.html" and (folder / "report.html").exists()
    (folder / "rollouts.jsonl").write_text("damage\n")
    assert run_module.report_page(folder) is None
    assert "report.html could not be made (ValueError: " in capsys.readouterr().out
