"""A user's own reward that raises, returns what it must not, hangs or dies: its group scores 0, is counted, and all goes on."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from data import demo
from data.example import make
from grpo_jax import batch, reward, train, workers
from grpo_jax.reward import CRASH, ERROR, TIMEOUT, Response
from tests.faults import rewards
from tests.grpo_jax.small_run import rows, small

ROOT = Path(__file__).resolve().parents[2]
HERE = "tests.faults.rewards"
TIMEOUT_SECONDS = 5.0  # long beside what a good call takes on a busy machine


def groups(good: int, bad: int) -> list[reward.Asked]:
    """Groups of three responses, good and bad in turns as long as there are both."""
    found: dict[bool, list] = {True: [], False: []}
    for number in range(100):
        example = make(
            [{"role": "user", "content": f"question {number}"}], [], [{"name": "f", "arguments": {"a": [1.5]}}], "test"
        )
        responses = [Response("ab" * number, 2, False), Response("", 0, True), Response("é \u2028 <tool_call>", 9, False)]
        found[rewards.is_bad(example)].append((responses, example))
    mixed = [one for pair in zip(found[True], found[False], strict=False) for one in pair]
    wanted = {True: bad, False: good}
    return [one for one in mixed if (wanted := {**wanted, (b := rewards.is_bad(one[1])): wanted[b] - 1})[b] >= 0]


def scored(name: str, count: int, asked: list, timeout: float = TIMEOUT_SECONDS) -> list[list[reward.Scored]]:
    with workers.opened(f"{HERE}:{name}", count, timeout) as score:
        return score(asked, lambda done: None)


def assert_policy(found, asked, reason: str, said: str) -> None:
    """Bad groups score 0 for that reason, and their trace says what happened; the others are scored as ever."""
    assert len(found) == len(asked)
    for row, (responses, example) in zip(found, asked, strict=True):
        if rewards.is_bad(example):
            assert [(one.value, one.reason) for one in row] == [(0.0, reason)] * len(responses)
            assert said in row[0].trace
        else:
            assert row == rewards.good(responses, example)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raises", "ZeroDivisionError: division by zero"),
        ("nan", "returned nan for response 0; return finite numbers"),
        ("infinite", "returned inf for response 0"),
        ("text", "returned '1.0' for response 0"),
        ("nothing", "returned None; return a list"),
        ("too_few", "returned 2 values for 3 responses"),
        ("endless", "returned over 3 values for 3 responses"),
        ("odd_reason", "gives None as the reason of response 0"),
    ],
)
def test_an_error_scores_0_and_the_others_are_scored_as_ever(name, said, count):
    asked = groups(3, 2)
    found = scored(name, count, asked)
    assert_policy(found, asked, ERROR, said)
    trace = next(row[0].trace for row in found if row[0].trace)
    assert ("rewards.py" in trace) == (name == "raises")  # where in the user's code; of our own frames nothing
    assert "reward.py" not in trace.replace("rewards.py", "") and "workers.py" not in trace


@pytest.mark.parametrize(
    ("name", "reason", "said"),
    [
        ("sleeps", TIMEOUT, "not done after 5 s (--reward.timeout)"),
        ("hangs", TIMEOUT, "not done after 5 s (--reward.timeout)"),
        ("dies", CRASH, "signal 11"),
        ("exits", CRASH, "exit code 3"),
        ("leaves", ERROR, "SystemExit: no more"),
        ("speaks", ERROR, "RuntimeError: "),
    ],
)
def test_a_call_that_hangs_or_ends_its_process_scores_0(name, reason, said, capfd):
    asked = groups(4, 2 if reason == CRASH else 1)
    assert_policy(scored(name, 2, asked), asked, reason, said)


def test_the_same_with_workers_as_without():
    asked = groups(20, 0)
    expected = [rewards.good(*one) for one in asked]
    assert [scored("good", count, asked) for count in (0, 1, 3)] == [expected] * 3


def test_workers_are_processes_that_are_kept_and_know_no_jax():
    asked = groups(6, 0)
    assert "jax" in sys.modules
    with workers.opened(f"{HERE}:process", 2, TIMEOUT_SECONDS) as score:
        first, second = (Counter(row[0].value for row in score(asked, lambda done: None)) for _ in range(2))
        assert len(first) == 2 and second.keys() <= first.keys() and os.getpid() not in first
        for process in first:
            os.kill(int(process), signal.SIGTERM)  # a scheduler's, to all: the run decides
        assert Counter(row[0].value for row in score(asked, lambda done: None)).keys() <= first.keys()
    assert not any(alive(int(process)) for process in first)
    assert scored("modules", 1, asked[:1])[0][0].value == 0.0


def alive(process: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, 0)
        return True
    return False


def test_what_progress_raises_ends_a_call_that_hangs(monkeypatch):
    class Stopped(Exception):
        pass

    made, worker = [], workers.Worker

    def start(*args):
        made.append(worker(*args))
        return made[-1]

    def stop(done):
        if made[0].ready:
            raise Stopped

    monkeypatch.setattr(workers, "Worker", start)
    with workers.opened(f"{HERE}:sleeps", 1, 0) as score:
        with pytest.raises(Stopped):
            score(groups(0, 1), stop)
        asked = groups(2, 0)
        assert score(asked, lambda done: None) == [rewards.good(*one) for one in asked]
    assert len(made) == 2 and all(one._process.returncode is not None for one in made)


def test_workers_end_with_a_run_that_is_killed():
    code = (
        "import sys, time\nfrom grpo_jax import workers\nfrom tests.faults.test_rewards import groups\n"
        f"with workers.opened('{HERE}:process', 1, 0) as score:\n"
        "    print(int(score(groups(1, 0), lambda done: None)[0][0].value), flush=True)\n    time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    process = int(run.stdout.readline())
    assert alive(process)
    run.kill()
    run.wait()
    began = time.monotonic()
    while alive(process):
        assert time.monotonic() - began < 120
        time.sleep(0.05)


def test_a_reward_that_a_worker_cannot_import(tmp_path, monkeypatch):
    (tmp_path / "reward_for_one_process.py").write_text(
        "import sys\nif 'pytest' not in sys.modules:\n    raise RuntimeError('not here')\ndef score(responses, example): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with workers.opened("reward_for_one_process:score", 1, 0) as score:
        found = score(groups(2, 0), lambda done: None)
    assert [row[0].reason for row in found] == [ERROR, ERROR] and "not here" in found[0][0].trace


def test_an_example_that_is_no_json_is_refused():
    [(responses, example)] = groups(1, 0)
    with pytest.raises(ValueError, match="cannot be given to a worker .* take --reward.workers 0$"):
        scored("good", 1, [(responses, replace(example, extra={"held": object()}))])


def test_built_in_rewards_stay_in_this_process(monkeypatch):
    monkeypatch.setattr(workers, "Workers", None)
    [(responses, example)] = groups(1, 0)
    for kind in reward.KINDS:
        with workers.opened(kind, 4, 1.0) as score:
            expected = [[reward.judge(response.text, example.answer, kind) for response in responses]]
            assert score([(responses, example)], lambda done: None) == expected
    with pytest.raises(ValueError, match="did you mean 'binary'"), workers.opened("binery", 1, 1.0):
        pass


def test_the_first_failure_of_each_reason_is_shown_once(capsys):
    run = SimpleNamespace(said=set(), config=SimpleNamespace(reward=SimpleNamespace(kind="mine:score")))
    batch.tell_failures(run, "rollout", {ERROR: "\x1b[2J \ud800 first", CRASH: "signal 9"})
    batch.tell_failures(run, "validation", {ERROR: "second"})
    shown = capsys.readouterr().out
    assert shown.count("warning: the reward mine:score failed.") == 2 and "reason/reward_crash" in shown
    assert "\\x1b[2J \\ud800 first" in shown and "second" not in shown and "\x1b" not in shown


# ---------------------------------------------------------------- in a run


@pytest.mark.parametrize("name", ["hangs", "dies"])
def test_a_run_goes_on(name, tiny_model, tmp_path, capsys):
    options = {"reward.kind": f"{HERE}:{name}", "reward.timeout": 2, "reward.workers": 2, "rollout.prompts_per_step": 4}
    train.train(small(tiny_model, tmp_path / "run", **options))
    reason = {"hangs": TIMEOUT, "dies": CRASH}[name]
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == [0, 1, 2]
    failed = [row.get(f"reason/{reason}", 0.0) for row in found]
    assert max(failed) > 0 and all(
        row[f"reason/{reason}"] + row["reason/letters"] == 1 for row in found if f"reason/{reason}" in row
    )
    assert capsys.readouterr().out.count(f"warning: the reward {HERE}:{name} failed.") == 1
    assert (tmp_path / "run" / "hf" / "model.safetensors").exists()


def test_a_run_is_the_same_with_workers_as_without(tiny_model, tmp_path):
    for count in (0, 2):
        options = {"reward.kind": f"{HERE}:raises", "reward.workers": count, "validation.limit": 4}
        train.train(small(tiny_model, tmp_path / str(count), **options))
    assert rows(tmp_path / "0") == rows(tmp_path / "2")
    for file in ("rollouts.jsonl", "hf/model.safetensors"):
        assert (tmp_path / "0" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()


def bench():
    """Eight tasks; the verdict of some raises, all others are right."""
    tasks = demo.tasks(8, seed=7, held_out=True)
    return tasks, lambda responses, example: rewards.raises(responses, example) and [1.0] * len(responses)


def test_a_benchmarks_verdict_that_raises_counts_as_wrong(tiny_model, tmp_path, capsys):
    options = {"validation.limit": 8, "validation.benchmarks": "tests.faults.test_rewards:bench"}
    train.train(small(tiny_model, tmp_path / "run", **options))
    good = sum(not rewards.is_bad(example) for example in bench()[0]) / 8
    assert 0 < good < 1
    assert [row["val/bench/accuracy"] for row in rows(tmp_path / "run") if "val/bench/accuracy" in row] == [good, good]
    shown = capsys.readouterr().out
    assert shown.count("warning: the verdict of benchmark bench failed. All responses of that group count as wrong") == 1
    assert "ZeroDivisionError" in shown
