"""Studies: their command lines are right ones, what has finished is not repeated, and the table says what happened."""

import contextlib
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

from data import demo, jsonl
from eval import report, run, study
from eval.report import Outcome
from eval.study import GRPO, SFT, Args, Row, Study
from grpo_jax import config, inputs
from grpo_jax.config import SftConfig, TrainConfig
from grpo_jax.reward import parse_calls

OF_PAPER = dict(data="d", toolace="t", xlam="x", reasoning="r", test="e", scale="paper")


def grid(name, out=Path("out"), **more):
    args = Args(name, out, **more)
    made = study.GRIDS[name](args)
    return made, study.jobs(args, made)


def parsed(train):
    """The config that a training command asks for."""
    assert train[0] == "-m"
    kind = {SFT: SftConfig, GRPO: TrainConfig}[train[1]]
    return config.parse(kind, train[1], train[2:])


def asked(name, **more):
    """row -> config, of seed 1."""
    return {job.row.name: parsed(job.train) for job in grid(name, **more)[1] if job.train and job.seed == 1}


# The grids


@pytest.mark.parametrize("name, scale", [(n, s) for n in study.GRIDS for s in ("demo", "paper") if (n, s) != ("sizes", "demo")])
def test_every_command_is_one_that_its_program_takes(name, scale):
    made, jobs = grid(name, **{**OF_PAPER, "scale": scale})
    for job in jobs:
        if job.train:
            cfg = parsed(job.train)
            assert cfg.run.dir == str(job.folder) and cfg.run.seed == job.seed
            inputs.require(cfg)
        args = tyro.cli(run.Args, args=list(job.evaluate[2:]), use_underscores=True)
        assert args.out == job.folder / "eval" and args.model in (str(job.folder), job.row.start)
        assert args.data.path == ("demo" if scale == "demo" else "e")
    trained = [row.name for row in made.rows if row.program]
    assert [job.row.name for job in jobs if job.train] == 3 * trained  # seed by seed
    assert sum(job.train is None for job in jobs) == len(made.rows) - len(trained)  # what nobody trained is scored once


@pytest.mark.parametrize("scale", ["demo", "paper"])
def test_all_recipes_see_the_same_rows(scale):
    cfgs = asked("recipes", **{**OF_PAPER, "scale": scale})
    whole = cfgs["rl-100"].data.end
    shares = {name: (cfg.data.begin / whole, cfg.data.end / whole) for name, cfg in cfgs.items()}
    first, second, both = (0, 0.5), (0.5, 1), (0, 1)
    assert shares == {
        "no-reason-sft-50": first, "no-reason-sft-100": both, "reason-sft-50": first, "reason-sft-100": both,
        "reason-sft-rl": second, "rl-50": second, "rl-100": both,
    }  # fmt: skip
    assert len({cfg.data.path for cfg in cfgs.values()}) == 1
    assert cfgs["reason-sft-rl"].model.path == cfgs["reason-sft-50"].run.dir == "out/reason-sft-50/seed-1"
    assert {cfg.model.path for name, cfg in cfgs.items() if name != "reason-sft-rl"} == {
        str(config.DEMO_MODEL) if scale == "demo" else study.PAPER
    }
    assert [name for name, cfg in cfgs.items() if cfg.data.replies == "calls"] == ["no-reason-sft-50", "no-reason-sft-100"]


def test_a_demo_recipe_takes_each_of_its_rows_as_often_as_it_says():
    for cfg in asked("recipes", scale="demo").values():
        rows = round((cfg.data.end - cfg.data.begin) * 4096)
        supervised = isinstance(cfg, SftConfig)
        size = cfg.batch.rows_per_step if supervised else cfg.rollout.prompts_per_step
        assert rows in (192, 384) and cfg.run.steps * size == (5 if supervised else 1) * rows


def test_the_rewards_differ_in_the_reward_alone():
    for scale in ("demo", "paper"):
        cfgs = asked("rewards", **{**OF_PAPER, "scale": scale})
        cfgs.pop("half-thinking", None)
        assert [cfg.reward.kind for cfg in cfgs.values()] == ["format", "format_and_names", "binary_no_reasoning", "binary"]
        alike = {replace(cfg, reward=config.Reward(), run=replace(cfg.run, dir="")) for cfg in cfgs.values()}
        assert len(alike) == 1


def test_the_demo_studies_write_rows_of_which_every_one_is_used(tmp_path):
    study._half_thinking(tmp_path)
    rows = jsonl.load(tmp_path / "half_thinking.jsonl")
    replies = [row.extra["response"] for row in rows.examples]
    assert len(replies) == 640 and not rows.dropped
    assert ["<think>" in reply for reply in replies] == [True, False] * 320
    assert all(parse_calls(reply) for reply in replies)
    assert 0.1 < sum(parse_calls(r) == list(e.answer) for r, e in zip(replies, rows.examples, strict=True)) / 640 < 0.4
    study._two_sources(tmp_path)
    counts = {"single": (384, 0), "parallel": (0, 384), "both": (192, 192)}
    for name, wanted in counts.items():
        calls = [len(row.answer) for row in jsonl.load(tmp_path / f"{name}.jsonl").examples]
        assert (calls.count(1), calls.count(2)) == wanted
    held_out = {row.id for row in jsonl.load(tmp_path / "validation.jsonl").examples}
    assert held_out == {task.id for task in demo.tasks(128, 0, held_out=True)}
    before = (tmp_path / "both.jsonl").stat().st_mtime_ns
    study._two_sources(tmp_path)
    assert (tmp_path / "both.jsonl").stat().st_mtime_ns == before  # runs that resume read it


def test_sizes_are_the_presets_before_and_after():
    made, jobs = grid("sizes", **OF_PAPER)
    assert len(made.rows) == 14 and {job.row.start for job in jobs if not job.train} == {
        make().model.path for name, make in config.PRESETS[TrainConfig].items() if name != "demo"
    }
    with pytest.raises(ValueError, match="comes with one demo model"):
        grid("sizes", scale="demo")


def test_further_options_and_another_model_reach_their_runs():
    cfgs = asked("recipes", scale="demo", model="mine", sft="--run.steps 7", train="--run.steps 9 --reward.kind format")
    assert {cfg.run.steps for cfg in cfgs.values() if isinstance(cfg, SftConfig)} == {7}
    assert {(cfg.run.steps, cfg.reward.kind) for cfg in cfgs.values() if isinstance(cfg, TrainConfig)} == {(9, "format")}
    assert {cfg.model.path for cfg in cfgs.values()} == {"mine", "out/reason-sft-50/seed-1"}


def test_what_the_papers_scale_lacks_is_said_before_anything_runs(tmp_path):
    def said(name, **more):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            study.run(Args(name, tmp_path / "out", **more))
        assert not (tmp_path / "out").exists() and "\n" not in str(error.value)
        return str(error.value)

    assert "lacks --reasoning: rows with a stronger model's reasoning" in said("recipes")
    assert "--data" in said("rewards", test="t") and "--test" not in said("rewards", test="t")
    assert all(f"--{name}:" in said("data") for name in ("toolace", "xlam", "data", "test"))
    here = str(tmp_path)
    assert "no/such/rows: no such file or folder" in said("rewards", data=here, test="no/such/rows")
    assert "--model" in said("sizes", data=here, test=here, model="mine")
    assert "from 1 on" in said("recipes", scale="demo", seeds=0)
    assert "--scale demo, which is not the default, needs none of it" in said("data")
    assert "unknown option '--run.stepz'" in said("recipes", scale="demo", train="--run.stepz 1")


def test_what_a_study_does_not_read_or_cannot_be_meant_is_said_before_anything_runs(tmp_path):
    def said(name, **more):
        for dry_run in (False, True):
            with pytest.raises(ValueError) as error:
                study.run(Args(name, tmp_path / "out", **{"scale": "demo", "dry_run": dry_run, **more}))
            assert not (tmp_path / "out").exists() and "\n" not in str(error.value)
        return str(error.value)

    assert said("recipes", train="--run.step 3") == "--train: unknown option '--run.step': did you mean '--run.steps'?"
    assert said("recipes", sft="--run.steps 0").startswith("--sft: --run.steps 0: give a number from 1 on")
    assert "--train: for help, ask the program itself: python -m grpo_jax.train" in said("recipes", train="--help")
    assert said("recipes", train="--model.path 'my") == '--train: no closing quotation in "--model.path \'my": mend the quotes'
    for more in ({"train": "--run.dir x"}, {"sft": "--run.seed 7"}):
        assert "--run.dir and --run.seed are the study's own: leave them out" in said("recipes", **more)
    assert said("rewards", data="d", test="t").startswith("study rewards at demo scale does not read --data, --test")
    paper = dict(scale="paper", data="org/rows", test="org/test")
    assert "does not read --xlam, --reasoning" in said("rewards", xlam="x", reasoning="r", **paper)
    assert "--sft: study rewards at paper scale has no supervised run" in said("rewards", sft="--run.steps 3", **paper)


def test_rows_of_the_hub_will_do(tmp_path, capsys):
    assert study.run(Args("rewards", tmp_path / "out", data="org/rows", test="org/test", dry_run=True)) == 0
    assert "--data.path org/rows" in capsys.readouterr().out


def test_a_dry_run_prints_the_commands_and_does_nothing(tmp_path, capsys):
    assert study.run(Args("rewards", tmp_path / "out", "demo", seeds=1, dry_run=True)) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    path = tmp_path / "out" / "half_thinking.jsonl"
    assert shown.err == f"not written in a dry run; the study does at its start: {path}\n"
    assert len(lines) == 10 and all(shlex.split(line)[:2] == ["python", "-m"] for line in lines)
    assert not (tmp_path / "out").exists()


def test_another_study_is_not_written_over(tmp_path):
    (tmp_path / "study.md").write_text(kept := "# Rewards, another day\n\nA table.\n")
    with pytest.raises(ValueError, match=r"holds another study \(Rewards, another day\); give this one a folder"):
        study.run(Args("recipes", tmp_path, "demo"))
    assert [file.read_text() for file in tmp_path.iterdir()] == [kept]


# Running them


# A program as training is: it goes on in its folder, refuses one that began with another WORD, and leaves hf/ at the end.
FAKE = """
import json, pathlib, sys
folder, word, code = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
file = folder / "config.json"
if file.exists() and json.loads(file.read_text()) != word:
    sys.exit("error: the run began with another word")
folder.mkdir(parents=True, exist_ok=True)
file.write_text(json.dumps(word))
print("said", word)
if code == 0:
    (folder / "hf").mkdir(exist_ok=True)
sys.exit(code)
"""


def fake(folder, word="a", code=0):
    return ("-c", FAKE, str(folder), word, str(code))


def train(folder, word="a", *, reads=None, differs=(), code=0):
    return study.once("a run", folder, "train", fake(folder, word, code), folder / "hf", reads or {}, differs)


def said(folder):
    return folder.with_name("seed-0.train.log").read_text().split("\n")[:-1]


def test_what_has_finished_is_not_repeated(tmp_path):
    folder = tmp_path / "row" / "seed-0"
    first = train(folder)
    assert train(folder) == first and said(folder) == ["said a"]
    assert train(folder, reads={}) == first
    eval_of = ("-c", f"open({str(tmp_path / 'made')!r}, 'a').write('e')")
    for reads in ({"the model": "1"}, {"the model": "1"}, {"the model": "2"}):
        study.once("a run", folder, "eval", eval_of, tmp_path / "made", reads)
    assert (tmp_path / "made").read_text() == "ee" and folder.is_dir()  # scores are written over
    study.once("a run", folder, "eval", (*eval_of, "more"), tmp_path / "made", {"the model": "2"})
    assert (tmp_path / "made").read_text() == "eee"


@pytest.mark.parametrize("code", [0, 1])  # a run that had finished, and one that had not
def test_a_run_that_began_from_something_else_is_moved_aside_and_repeated(tmp_path, capsys, code):
    folder = tmp_path / "row" / "seed-0"
    with contextlib.ExitStack() as stack:
        if code:
            stack.enter_context(pytest.raises(ChildProcessError))
        train(folder, "a", reads={"rows.jsonl": "1", "start": "2"}, code=code)
    train(folder, "b", reads={"rows.jsonl": "3", "start": "2"})
    train(folder, "c", reads={"rows.jsonl": "3", "start": "2"}, differs=["learning_rate: 1 -> 2"])
    assert said(folder) == ["said a", "said b", "said c"]
    places = {"seed-0-stale-1": "a", "seed-0-stale-2": "b", "seed-0": "c"}
    assert {name: json.loads((tmp_path / "row" / name / "config.json").read_text()) for name in places} == places
    told = capsys.readouterr().out
    assert "begins anew, since this changed: rows.jsonl; the run until now is in" in told and "seed-0-stale-1" in told
    assert "since this changed: learning_rate: 1 -> 2;" in told


def test_a_run_that_another_process_is_at_work_on_is_not_moved(tmp_path):
    folder = tmp_path / "seed-0"
    train(folder)
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is at work on this run"):
            train(folder, "b", reads={"rows.jsonl": "1"})
    assert folder.is_dir() and not (tmp_path / "seed-0-stale-1").exists()
    train(folder, "b", reads={"rows.jsonl": "1"})
    assert said(folder) == ["said a", "said b"]


def test_a_run_whose_folder_was_deleted_is_repeated(tmp_path):
    folder = tmp_path / "seed-0"
    first = train(folder)
    shutil.rmtree(folder)
    assert train(folder) > first and said(folder) == ["said a", "said a"] and (folder / "hf").is_dir()


def test_a_changed_command_goes_on_in_its_folder_where_it_can(tmp_path):
    folder = tmp_path / "seed-0"
    study.once("a run", folder, "train", fake(folder), folder / "hf", {})
    study.once("a run", folder, "train", (*fake(folder), "--more"), folder / "hf", {})
    assert said(folder) == ["said a", "said a"] and not (tmp_path / "seed-0-stale-1").exists()


def test_which_changes_make_it_another_run(tmp_path):
    def job(*options):
        row = Row("row", "A row", SFT, "demo", options)
        return study.jobs(Args("recipes", tmp_path, "demo", seeds=1), Study("", "", (row,), ()))[0]

    first = job()
    assert study.differences(first) == []  # there is none
    first.folder.mkdir(parents=True)
    (first.folder / "config.json").write_text(json.dumps({"program": SFT, **config.to_dict(study.parsed(first.train))}))
    assert study.differences(first) == []
    assert study.differences(job("--learner.remat", "full", "--validation.every", "3")) == []
    assert study.differences(job("--optimizer.learning_rate", "7")) == ["optimizer.learning_rate: 0.001 -> 7.0"]
    assert study.differences(job("--run.steps", "3")) == [f"run.steps: {study.parsed(first.train).run.steps} -> 3"]
    (first.folder / "config.json").write_text(json.dumps({"program": GRPO, **config.to_dict(study.parsed(first.train))}))
    assert study.differences(first) == [f"program: {GRPO} -> {SFT}"]


def test_inputs_are_known_by_their_content(tmp_path):
    rows, model, template = tmp_path / "rows", tmp_path / "model", tmp_path / "template.txt"
    (model / "hf").mkdir(parents=True)
    rows.mkdir()
    for file in (rows / "a.jsonl", rows / "notes.txt", model / "hf" / "weights", model / "log", template):
        file.write_text("1")

    def reads(start=None):
        options = ("--data.path", str(rows), "--data.template", str(template), "--model.path", str(model))
        study_of = Study("", "", (Row("row", "A row", GRPO, "demo", options), Row("raw", "Raw", start=str(model))), ())
        trained, raw = study.jobs(Args("recipes", tmp_path, "demo", seeds=1), study_of)
        return study.inputs(trained, start), study.scored_inputs(raw, str(rows), None)

    train, scored = reads()
    assert set(train) == {str(rows), str(template), str(model)} and set(scored) == {str(rows), str(model)}
    for irrelevant in (rows / "notes.txt", model / "log"):
        irrelevant.write_text("other")
    os.utime(rows / "a.jsonl", (1, 1))
    assert reads() == (train, scored)
    for file, place in ((rows / "a.jsonl", rows), (template, template), (model / "hf" / "weights", model)):
        file.write_text("other")
        now = reads()
        assert {name for name in train if now[0][name] != train[name]} == {str(place)}
        assert {name for name in scored if now[1][name] != scored[name]} == {str(place)} & set(scored)
        train, scored = now
    assert reads("weights of a row")[0][str(model)] == "weights of a row"
    jobs = grid("recipes", scale="demo", model="org/name")[1]
    assert set(study.inputs(jobs[1], None)) == {str(demo.TEMPLATE)} and study.scored_inputs(jobs[0], "demo", None) == {}


def test_a_command_that_fails_tells_its_last_lines_and_runs_again_next_time(tmp_path):
    folder = tmp_path / "row" / "seed-0"
    for _ in range(2):
        with pytest.raises(ChildProcessError, match=r"exit code 1: said a \(.*seed-0.train.log\)"):
            train(folder, code=1)
    assert said(folder) == ["said a", "said a"]


def test_a_study_that_is_interrupted_asks_its_run_to_stop_and_waits(tmp_path):
    child = (
        "import signal, sys, time\n"
        "def asked(*_):\n    print('asked', flush=True)\n    time.sleep(1)\n    sys.exit(print('saved'))\n"
        "signal.signal(signal.SIGTERM, asked)\nprint('at work', flush=True)\ntime.sleep(60)"
    )
    code = (
        "from pathlib import Path\nfrom eval import study\n"
        f"study.once('a run', Path({str(tmp_path / 'seed-0')!r}), 'train', ('-c', {child!r}), Path('none'), {{}})"
    )
    root = Path(study.__file__).parent.parent
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=root, **pipes)
    log = tmp_path / "seed-0.train.log"
    for word, one in (("at work", signal.SIGINT), ("asked", signal.SIGINT), ("asked", signal.SIGTERM)):  # the last ones ignored
        until = time.monotonic() + 60
        while not (log.exists() and word in log.read_text()) and time.monotonic() < until:
            time.sleep(0.02)
        parent.send_signal(one)
    out, errors = parent.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors and log.read_text() == "at work\nasked\nsaved\n"
    assert "a run: stopping; waiting for process " in out
    assert json.loads((tmp_path / "seed-0.train.json").read_text())["finished"] == 0


SCORES = {
    "rows": 1000, "dropped": {"no_query": 2}, "model_fingerprint": "f", "accuracy": 0.5, "calls": 0.75,
    "reasons": {"correct": 0.5, "no_format": 0.5}, "response_tokens": 40.0,
}  # fmt: skip


def test_a_run_that_fails_is_shown_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    rows = (
        Row("base", "The model itself", start="m"),
        Row("sft", "SFT", SFT, "demo"),
        Row("sft-rl", "SFT, then RL", GRPO, "demo", start="row:sft"),
        Row("rl", "RL", GRPO, "demo", paper=(1.0, 2.0, 1.5)),
    )
    done = []

    def once(label, folder, step, command, made, reads, differs=()):
        name, seed = folder.parent.name, folder.name
        if (name, seed, step) == ("sft", "seed-1", "train"):
            raise ChildProcessError("exit code 2: error: no memory (a.log)")
        done.append((name, seed, step, reads))
        (folder / "eval").mkdir(parents=True, exist_ok=True)
        sampled = {"calls": 0.3 if seed == "seed-0" else 0.4}
        (folder / "eval" / "scores.json").write_text(json.dumps({**SCORES, "sampled": sampled}))
        (folder / "metrics.jsonl").write_text('{"step": 0, "val/accuracy": 0.25}\n{"step": 4, "val/accuracy": 0.5}\n')

    monkeypatch.setattr(study, "once", once)
    monkeypatch.setitem(study.GRIDS, "recipes", lambda args: Study("Some runs", "Table 3", rows, ()))
    assert study.run(Args("recipes", tmp_path, "demo", seeds=2)) == 1
    steps = {(name, seed, step): reads for name, seed, step, reads in done}
    assert steps["sft-rl", "seed-0", "train"][str(tmp_path / "sft" / "seed-0")] == "f"  # another model, another run
    assert ("sft-rl", "seed-0", "eval") in steps and ("rl", "seed-1", "eval") in steps
    assert not [place for place in steps if place[:2] == ("sft-rl", "seed-1")]
    text = (tmp_path / "study.md").read_text()
    assert "--seeds 2`. Scored on 1,000 rows (2 more were unusable). Accuracy: right calls after a thought" in text
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert table[:5] == [
        ["", "paper: non-live", "paper: live", "paper: mean", "accuracy", "right calls", "sampled", "runs"],
        ["The model itself", "", "", "", "50.0", "75.0", "30.0", "1"],
        ["SFT", "", "", "", "50.0", "75.0", "30.0", "1, 1 failed"],
        ["SFT, then RL", "", "", "", "50.0", "75.0", "30.0", "1, 1 failed"],
        ["RL", "1.00", "2.00", "1.50", "50.0 ± 0.0", "75.0 ± 0.0", "35.0 ± 7.1", "2"],
    ]
    assert table[5:7] == [["", "no format", "tokens a response"], ["The model itself", "50.0", "40.0"]]
    assert (
        "- sft, seed 1: exit code 2: error: no memory (a.log)" in text and "- sft-rl, seed 1: not run, since sft failed" in text
    )
    assert "python -m grpo_jax.train demo --run.dir" in text and "Table 3" in text
    assert "no memory" in capsys.readouterr().out
    for name in ("accuracy.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_papers_numbers_average_as_it_says():
    for name in ("recipes", "rewards", "data", "sizes"):
        for row in grid(name, **OF_PAPER)[0].rows:
            if row.paper:
                assert row.paper[2] == pytest.approx(sum(row.paper[:2]) / 2, abs=0.011), row


def test_plots_of_no_results_say_so(tmp_path):
    labels = {"a": "A", "b": "B"}
    report.accuracy(tmp_path / "accuracy.png", labels, {("a", 0): Outcome(), ("b", 0): Outcome(problem="lost")})
    report.curves(tmp_path / "curves.png", labels, {"a": [tmp_path / "nowhere"]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accuracy.png", "curves.png"]


@pytest.mark.slow
def test_a_study_from_end_to_end(tmp_path):
    args = Args("rewards", tmp_path, "demo", seeds=1, limit=8, sft="--run.steps 1", train="--run.steps 1 --validation.limit 4")
    assert study.run(args) == 0
    first = (tmp_path / "study.md").read_text()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("scores.json")}
    assert study.run(args) == 0 and (tmp_path / "study.md").read_text() == first
    assert len(times) == 5 and all(path.stat().st_mtime_ns == time for path, time in times.items())


@pytest.mark.slow
def test_runs_begin_anew_with_the_real_programs_where_they_must(tmp_path, tiny_model, monkeypatch):
    """The row that began from a row whose options changed too: training would refuse to go on with either."""
    small = (
        "--batch.max_tokens 512 --learner.tokens_per_microbatch 512 --batch.rows_per_step 2 --run.steps 1 --validation.limit 0"
    )
    options = (*small.split(), "--run.no_tensorboard")
    rows = (Row("one", "One", SFT, "demo", options, tiny_model), Row("two", "Two", SFT, "demo", options, "row:one"))
    evaluation = ("--data.path", "demo", "--max_response_tokens", "4", "--samples", "1", "--limit", "2")
    monkeypatch.setitem(study.GRIDS, "recipes", lambda args: Study("Two runs", "no table", rows, evaluation))
    out, folders = tmp_path / "out", lambda: sorted(path.name for path in (tmp_path / "out").glob("*/seed-0*/"))
    args = Args("recipes", out, "demo", seeds=1, sft="--optimizer.learning_rate 1e-3")
    assert study.run(args) == 0 and folders() == ["seed-0", "seed-0"]
    assert study.run(replace(args, sft="--optimizer.learning_rate 2e-3")) == 0
    assert folders() == ["seed-0", "seed-0", "seed-0-stale-1", "seed-0-stale-1"]
    shutil.rmtree(out / "two" / "seed-0")
    assert study.run(replace(args, sft="--optimizer.learning_rate 2e-3")) == 0 and len(folders()) == 4
