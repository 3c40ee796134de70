"""Studies: their command lines are right ones, what has finished is not repeated, and the table says what happened."""

import json
import shlex
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
    assert "no/rows: no such file or folder" in said("rewards", data=here, test="no/rows")
    assert "--model" in said("sizes", data=here, test=here, model="mine")
    assert "from 1 on" in said("recipes", scale="demo", seeds=0)


def test_a_dry_run_prints_the_commands_and_does_nothing(tmp_path, capsys):
    assert study.run(Args("rewards", tmp_path / "out", "demo", seeds=1, dry_run=True)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and all(shlex.split(line)[:2] == ["python", "-m"] for line in lines)
    assert not (tmp_path / "out").exists()


# Running them


def writer(path, text):
    return ("-c", f"import sys; open({str(path)!r}, 'a').write({text!r}); print('said'); sys.exit({int(text == 'bad')})")


def test_what_has_finished_is_not_repeated_unless_what_it_began_from_changed(tmp_path):
    file, folder = tmp_path / "made", tmp_path / "row" / "seed-0"
    for chain in ([writer(file, "a")], [writer(file, "a")], [("other",), writer(file, "a")], [("other",), writer(file, "a")]):
        study.once("a run", folder, "train", chain)
    assert file.read_text() == "aa"
    assert (tmp_path / "row" / "seed-0.train.log").read_text() == "said\nsaid\n"
    study.once("a run", folder, "eval", [writer(file, "e")])
    assert file.read_text() == "aae"


def test_a_command_that_fails_tells_its_last_lines_and_runs_again_next_time(tmp_path):
    file, folder = tmp_path / "made", tmp_path / "row" / "seed-0"
    for _ in range(2):
        with pytest.raises(ChildProcessError, match=r"exit code 1: said \(.*seed-0.train.log\)"):
            study.once("a run", folder, "train", [writer(file, "bad")])
    assert file.read_text() == "badbad"


def test_a_study_that_is_interrupted_asks_its_run_to_stop_and_waits(tmp_path, monkeypatch):
    code = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(print('saved')))\n"
    code += "print('at work', flush=True)\ntime.sleep(60)"

    def interrupted(child, log, label):
        while "at work\n" not in log.read_text():
            pass
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study.once("a run", tmp_path / "seed-0", "train", [("-c", code)])
    assert (tmp_path / "seed-0.train.log").read_text().endswith("saved\n")
    assert not (tmp_path / "seed-0.train.json").exists()


SCORES = {"accuracy": 0.5, "calls": 0.75, "reasons": {"correct": 0.5, "no_format": 0.5}, "response_tokens": 40.0}


def test_a_run_that_fails_is_shown_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    rows = (
        Row("base", "The model itself", start="m"),
        Row("sft", "SFT", SFT, "demo"),
        Row("sft-rl", "SFT, then RL", GRPO, "demo", start="row:sft"),
        Row("rl", "RL", GRPO, "demo", paper=(1.0, 2.0, 1.5)),
    )
    done = []

    def once(label, folder, step, chain):
        name, seed = folder.parent.name, folder.name
        if (name, seed, step) == ("sft", "seed-1", "train"):
            raise ChildProcessError("exit code 2: error: no memory (a.log)")
        done.append((name, seed, step, len(chain)))
        (folder / "eval").mkdir(parents=True, exist_ok=True)
        sampled = {"calls": 0.3 if seed == "seed-0" else 0.4}
        (folder / "eval" / "scores.json").write_text(json.dumps({**SCORES, "sampled": sampled}))
        (folder / "metrics.jsonl").write_text('{"step": 0, "val/accuracy": 0.25}\n{"step": 4, "val/accuracy": 0.5}\n')

    monkeypatch.setattr(study, "once", once)
    monkeypatch.setitem(study.GRIDS, "recipes", lambda args: Study("Some runs", "Table 3", rows, ()))
    assert study.run(Args("recipes", tmp_path, "demo", seeds=2)) == 1
    assert ("sft-rl", "seed-0", "train", 2) in done and ("sft-rl", "seed-0", "eval", 3) in done
    assert ("rl", "seed-1", "eval", 2) in done and not [x for x in done if x[:2] == ("sft-rl", "seed-1")]
    text = (tmp_path / "study.md").read_text()
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
