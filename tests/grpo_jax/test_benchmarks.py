"""Benchmarks in training: what a name leads to, which tasks are asked, and that each counts."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from data import demo, jsonl
from grpo_jax import benchmarks, config, inputs, metrics, train
from grpo_jax.reward import Scored
from tests.grpo_jax import length_reward
from tests.grpo_jax.small_run import rows, small

HERE = "tests.grpo_jax.test_benchmarks"
OURS = "tests.grpo_jax.length_reward:benchmark"
SETTINGS = config.Data(template=str(demo.TEMPLATE))


@pytest.fixture(scope="module")
def policy(tiny_model):
    return inputs.load_policy(tiny_model)


def benchmark():
    return demo.tasks(3, 0, held_out=True), lambda responses, example: [Scored(1.0, "right", {}) for _ in responses]


def reason():
    return benchmark()


def with_arguments(path):
    return benchmark()


def one_thing():
    return demo.tasks(3, 0, held_out=True)


def no_function():
    return demo.tasks(3, 0, held_out=True), "verdict"


def rows_for_examples():
    return [{"query": "What?"}], length_reward.score


def empty():
    return [], length_reward.score


def test_names_are_of_the_functions_and_of_the_paths_where_two_share_one():
    assert benchmarks.read(None) == []
    found = benchmarks.read(f"{OURS}, {HERE}:reason,{OURS}")
    assert [one.name for one in found] == ["benchmark", f"{HERE}.reason"]  # val/reason/... are the reasons of rows
    found = benchmarks.read(f"{OURS},{HERE}:benchmark")
    assert [one.name for one in found] == [OURS.replace(":", "."), f"{HERE}.benchmark"]
    assert [len(one.examples) for one in found] == [3, 3]
    assert all(metrics.benchmark_of(f"val/{one.name}/accuracy") == one.name for one in found)


@pytest.mark.parametrize(
    ("paths", "says"),
    [
        ("", "'' is no package.module:function"),
        (f"{OURS},", "'' is no package.module:function"),
        ("eval.bfcl.simple_python", "'eval.bfcl.simple_python' is no package.module:function"),
        ("no_such_package:calls", "benchmark 'no_such_package:calls': cannot import the module 'no_such_package'"),
        (f"{HERE}:benchmrk", "has no function 'benchmrk': did you mean 'benchmark'?"),
        ("eval.bfcl:simple_pythn", "has no function 'simple_pythn': did you mean 'simple_python'?"),
        (f"{HERE}:with_arguments", "takes arguments (missing a required argument: 'path'); give a function that takes none"),
        (f"{HERE}:one_thing", "return (examples, verdict), a list and a function"),
        (f"{HERE}:no_function", "return (examples, verdict), a list and a function"),
        (f"{HERE}:rows_for_examples", "has {'query': 'What?'} among its examples; make them with data.example.make"),
        (f"{HERE}:empty", "has no examples"),
    ],
)
def test_what_is_no_benchmark_is_one_line(paths, says):
    with pytest.raises(ValueError) as error:
        benchmarks.read(paths)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_some_of_many_tasks_are_spread_over_all_and_long_ones_stay_in_the_count(policy, capsys):
    examples = demo.tasks(20, 0, held_out=True)
    whole = benchmarks.Benchmark("tasks", examples, length_reward.score)
    asked = benchmarks.encoded(whole, policy, SETTINGS, 400, 6)
    assert [task.example for task in asked.tasks] == [examples[i] for i in (0, 3, 6, 10, 13, 16)]
    assert (asked.count, asked.of) == (6, 20)
    every = benchmarks.encoded(whole, policy, SETTINGS, 400, 30)
    assert [task.example for task in every.tasks] == examples and every.count == 20
    assert benchmarks.summary([asked, every]) == "tasks 6 of 20, tasks 20"
    assert capsys.readouterr().out == ""
    lengths = [len(task.prompt) for task in every.tasks]
    most = sorted(lengths)[9]
    short = benchmarks.encoded(whole, policy, SETTINGS, most, 30)
    missing = sum(length > most for length in lengths)
    assert 0 < missing == 20 - len(short.tasks) and short.count == 20
    said = f"warning: {missing} of 20 prompts of benchmark tasks take more than --rollout.max_prompt_tokens {most} "
    assert f"{said}(the longest {max(lengths)}), and" in " ".join(capsys.readouterr().out.split())
    said = "all of 6 prompts of benchmark tasks take more than --rollout.max_prompt_tokens 3 "
    longest = max(len(task.prompt) for task in asked.tasks)
    with pytest.raises(ValueError, match=re.escape(f"{said}(the longest {longest}); raise that")):
        benchmarks.encoded(whole, policy, SETTINGS, 3, 6)


def test_hosts_that_were_given_other_tasks_differ(policy):
    asked = benchmarks.encoded(benchmarks.read(OURS)[0], policy, SETTINGS, 400, 9)
    other = replace(asked, tasks=asked.tasks[:2])
    assert benchmarks.identity([asked]) == benchmarks.identity([asked]) != benchmarks.identity([other])


def test_every_task_counts_once_those_that_were_not_asked_as_wrong(policy, monkeypatch):
    """Two tasks that are one, and three whose prompts are too long: 3 right of 6."""
    asked = replace(benchmarks.encoded(benchmarks.read(OURS)[0], policy, SETTINGS, 400, 9), count=6)
    calls = []

    def exchange(run, tasks, sampling, verdict, show, phase, clock):
        calls.append((phase, len(tasks), sampling.temperature, sampling.group_size))
        return SimpleNamespace(scored=[[Scored(1.0, "custom", {})] for _ in tasks], groups=[])

    monkeypatch.setattr(train, "exchange", exchange)
    sampling = train.Sampling((1,), group_size=5, temperature=0.7)
    row = train.validate(None, [], [asked], sampling, length_reward.score, None)
    assert row == {"val/benchmark/accuracy": 0.5, "time/validation": 0}
    assert calls == [("benchmark", 3, 0.0, 1)]
    assert train.validate(None, [], [], sampling, length_reward.score, None) == {}


def test_a_run_without_rows_to_validate_on_still_answers_benchmarks(tiny_model, tmp_path, capsys):
    options = {"run.steps": 1, "validation.limit": 2, "validation.benchmarks": f"{OURS},{HERE}:benchmark"}
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(jsonl.row_of(task)) + "\n" for task in demo.tasks(4, 1, held_out=False)))
    train.train(small(tiny_model, tmp_path / "run", **options, **{"data.path": data, "data.validation_fraction": 0}))
    names = (OURS.replace(":", "."), f"{HERE}.benchmark")
    found = [{name: row[f"val/{name}/accuracy"] for name in names} for row in rows(tmp_path / "run")]
    assert [row[names[1]] for row in found] == [1.0, 1.0] and "val/accuracy" not in rows(tmp_path / "run")[0]
    assert all(row[names[0]] in (0.0, 0.5, 1.0) for row in found)
    shown = capsys.readouterr().out
    assert f"benchmarks     {names[0]} 2 of 3, {names[1]} 2 of 3" in shown
    assert [line.split() for line in shown.splitlines() if line.startswith(names[1])] == [
        [names[1], "100.0%", "100.0%", "+0.0"]
    ]
