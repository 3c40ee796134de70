"""Evaluation: greedy texts are the model's, verdicts are counted right, and what does not fit is said."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from data import demo, jsonl, prompt
from eval import run
from eval.run import Args, Data, Server
from eval.selection import Bfcl
from grpo_jax import inputs, reward
from grpo_jax.reward import Response, Scored

TEMPLATE = prompt.load_template(demo.TEMPLATE)


@pytest.fixture(scope="module")
def model(tiny_model):
    return run.open_model(inputs.load_policy(tiny_model))


def test_a_prompt_without_room_for_a_response_has_none_and_counts_as_wrong(model):
    examples = demo.tasks(12, 0, held_out=True)
    lengths = [len(prompt.encode(example, model.policy.tokenizer, TEMPLATE)) for example in examples]
    room = int(np.median(lengths))
    short = replace(model, policy=replace(model.policy, model=replace(model.policy.model, max_positions=room + 2)))
    found = run.respond(short, examples, TEMPLATE, max_response_tokens=2)
    assert [not row for row in found] == [length > room for length in lengths]
    answers = run.judged(examples, found, reward.resolve("binary"))
    assert [answer.reason == run.TOO_LONG for answer in answers] == [length > room for length in lengths]
    scores = run.summarize(answers)
    assert scores["reasons"][run.TOO_LONG] == sum(length > room for length in lengths) / 12
    assert scores["response_tokens"] <= 2
    with pytest.raises(ValueError, match=f"--max_response_tokens 4,096 leaves no room for a prompt: .* {room + 2} tokens"):
        run.respond(short, examples, TEMPLATE)


def test_accuracy_wants_a_thought_and_right_calls_do_not():
    example = demo.tasks(1, 0, held_out=True)[0]
    right, wrong = demo.clean_reply(example), prompt.reply([{"name": "f", "arguments": {}}], "Hm.")
    calls = prompt.reply(example.answer, None)
    responses = [[Response(right, 40, False)], [Response(calls, 30, False)], [Response(wrong, 20, True)], []]
    answers = run.judged([example] * 4, responses, reward.resolve("binary"))
    assert [(a.verdict, a.calls) for a in answers] == [(1.0, True), (0.0, True), (0.0, False), (0.0, False)]
    scores = run.summarize(answers)
    assert (scores["accuracy"], scores["calls"], scores["truncated"]) == (0.25, 0.5, 0.25)
    assert scores["response_tokens"] == 30 and sum(scores["reasons"].values()) == 1
    assert scores["reasons"]["correct"] == scores["reasons"]["no_format"] == 0.25


def test_a_benchmark_brings_its_own_verdict():
    example = demo.tasks(1, 0, held_out=True)[0]
    verdict = lambda responses, example: [Scored(float("yes" in r.text), "heard", {}) for r in responses]  # noqa: E731
    answers = run.judged([example], [[Response("yes", 1, False), Response("no", 1, False)]], verdict)
    assert run.summarize(answers)["accuracy"] == 0.5 and {answer.reason for answer in answers} == {"heard"}


def test_the_files_of_an_evaluation(tiny_model, tmp_path, capsys):
    args = Args(tmp_path / "out", tiny_model, Data("demo"), limit=4, max_response_tokens=4)
    scores = run.run(args)
    assert scores == json.loads((tmp_path / "out" / "scores.json").read_text()) and scores["rows"] == 4
    assert scores["dropped"] == {}
    rows = [json.loads(line) for line in (tmp_path / "out" / "responses.jsonl").read_text().splitlines()]
    tasks = demo.tasks(4, seed=1, held_out=True)  # not those that a run validates on
    assert [row["id"] for row in rows] == [task.id for task in tasks]
    assert set(rows[0]) == {"id", "text", "token_count", "truncated", "verdict", "reason", "calls"}
    shown = capsys.readouterr().out
    assert "accuracy" in shown and "tokens" in shown and "4 rows of demo" in shown
    again = run.run(replace(args, out=tmp_path / "again", samples=3, temperature=1.0))
    sampled = again.pop("sampled")
    assert again == scores and (sampled["samples"], sampled["temperature"]) == (3, 1.0)
    drawn = [json.loads(line) for line in (tmp_path / "again" / "samples.jsonl").read_text().splitlines()]
    assert [row["id"] for row in drawn] == [task.id for task in tasks for _ in range(3)]
    assert len({row["text"] for row in drawn}) > len({row["text"] for row in rows})
    assert not (tmp_path / "out" / "samples.jsonl").exists()
    assert run.run(replace(args, limit=3, out=tmp_path / "few"))["data_fingerprint"] != scores["data_fingerprint"]


def write_rows(path, tasks, *lines):
    lines = [*(json.dumps({"messages": t.messages, "tools": t.tools, "answers": t.answer}) + "\n" for t in tasks), *lines]
    path.write_text("".join(lines))
    return lines


def test_rows_of_a_file_are_taken_in_an_order_of_their_own(tmp_path):
    path = tmp_path / "rows.jsonl"
    tasks = demo.tasks(20, 3, held_out=True)
    lines = write_rows(path, tasks)
    some = [example.id for example in run.examples_of(str(path), 5).examples]
    path.write_text("".join(reversed(lines)))
    again = [example.id for example in run.examples_of(str(path), 5).examples]
    assert again == some != [task.id for task in tasks[:5]]
    assert len(run.examples_of(str(path), None).examples) == 20
    assert len(run.examples_of("demo", None).examples) == run.DEMO_ROWS


def test_rows_that_cannot_be_scored_are_told(tiny_model, tmp_path, capsys):
    tasks = demo.tasks(4, 3, held_out=True)
    write_rows(tmp_path / "rows.jsonl", [*tasks, tasks[0]], "[]\n", '{"query": "What?", "tools": "none"}\n')
    args = Args(tmp_path / "out", tiny_model, Data(str(tmp_path / "rows.jsonl")), limit=2, max_response_tokens=2)
    scores = run.run(args)
    assert scores["rows"] == 2
    assert scores["dropped"] == {jsonl.DUPLICATE: 1, jsonl.NOT_AN_OBJECT: 1, jsonl.TOOLS_DO_NOT_PARSE: 1}
    told = "3 rows of .*rows.jsonl are not scored, and in no share: duplicate 1, not_an_object 1, tools_do_not_parse 1"
    assert re.search(told, capsys.readouterr().out)


def test_what_cannot_be_evaluated_is_one_clear_line(tiny_model, tmp_path):
    args = Args(tmp_path / "out", tiny_model, Data("demo"))
    for name in ("limit", "max_response_tokens", "rows", "tensor"):
        with pytest.raises(ValueError, match=f"--{name} 0: give a number from 1 on"):
            run.run(replace(args, **{name: 0}))
    for bad, message in (
        (dict(samples=-1), "--samples -1: give a number from 0 on"),
        (dict(temperature=0.0), "--temperature 0.0: give a number above 0"),
        (dict(benchmarks="bfcl", data=Data(), temperature=-1.0), "--temperature -1.0: give a number from 0 on"),
        (dict(benchmarks="bfcl"), "give either --benchmarks bfcl,api_bank,acebench or --data.path"),
        (dict(data=Data()), "give either --benchmarks bfcl,api_bank,acebench or --data.path"),
        (dict(model=""), "--model is missing"),
        (dict(categories="parallel"), "--categories is not read with --data.path: leave it out"),
        (dict(bfcl=Bfcl("last")), "--bfcl.* is not read with --data.path: leave it out"),
        (dict(replies=tmp_path), "--replies is not read with --data.path: leave it out"),
        (dict(benchmarks="bfcl", data=Data(), samples=1), "--samples is not read with --benchmarks: leave it out"),
        (dict(benchmarks="bfcl", data=Data(), replies=tmp_path, rows=1), "--rows is not read with --replies: leave it out"),
        (
            dict(benchmarks="bfcl", data=Data(template="x"), replies=tmp_path),
            "--data.* is not read with --replies: leave it out",
        ),
        (dict(server=Server(retries=1)), "--server.* is not read with --data.path: leave it out"),
        (
            dict(benchmarks="bfcl", data=Data(), endpoint="http://x", tensor=1),
            "--tensor is not read with --endpoint",
        ),
        (dict(benchmarks="bfcl", data=Data(), endpoint="http://x", replies=tmp_path), "--replies and --endpoint: give one"),
        (dict(server=Server(concurrency=0)), "--server.concurrency 0: give a number from 1 on"),
        (dict(server=Server(retries=-1)), "--server.retries -1: give a number from 0 on"),
        (dict(server=Server(timeout=float("nan"))), "--server.timeout nan: give a number of seconds above 0"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            run.run(replace(args, **bad))
    with pytest.raises(ValueError, match="leaves no room for a prompt"):
        run.run(replace(args, limit=1, max_response_tokens=1_000_000))
    with pytest.raises(ValueError, match=r"^--tensor 3: give a number that divides the \d+ devices? of this host"):
        run.run(replace(args, tensor=3))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="this run has not finished"):
        run.run(replace(args, model=str(tmp_path / "run")))
    assert not (tmp_path / "out").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match="other: holds an evaluation on benchmarks: give another --out"):
        run.run(replace(args, out=tmp_path / "other"))
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError, match="out: this is a file: give a folder"):
        run.run(replace(args, model="no/such/model"))  # which comes later
    assert inputs.model_folder("org/name") == "org/name"


def test_a_folder_is_made_before_the_model_loads_and_responses_are_written_before_samples(tiny_model, tmp_path, monkeypatch):
    args = Args(tmp_path / "out", tiny_model, Data("demo"), limit=2, max_response_tokens=2, samples=1)
    load, answer, seen = run.open_model, run._answers, []

    def opened(*given):
        assert args.out.is_dir()
        return load(*given)

    def answered(*given):
        seen.append(sorted(file.name for file in args.out.iterdir()))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return answer(*given)

    monkeypatch.setattr(run, "open_model", opened)
    monkeypatch.setattr(run, "_answers", answered)
    run.run(args)
    with pytest.raises(KeyboardInterrupt):  # the old scores are not those of the new responses
        run.run(args)
    assert seen == [[], ["responses.jsonl"], ["responses.jsonl", "samples.jsonl", "scores.json"], ["responses.jsonl"]]
