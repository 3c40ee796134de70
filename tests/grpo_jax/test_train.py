"""The program as people run it: a run that is killed and started again, damaged checkpoints, bad input, the export."""

import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data.example import make
from grpo_jax import alarms, batch, config, hosts, inputs, mesh, reward, rollout, train
from grpo_jax import run as run_module
from grpo_jax.config import TrainConfig
from grpo_jax.group import Group
from grpo_jax.inputs import Task
from grpo_jax.learner import Objective
from models import decoder, hf
from scripts import export_hf
from tests.grpo_jax.small_run import SMALL, STEPS, rows, small, words

ROOT = Path(__file__).resolve().parents[2]
BENCHMARK = "tests.grpo_jax.length_reward:benchmark"
OPTIONS = {**SMALL, "validation.benchmarks": BENCHMARK}


def command(model: str, folder: Path, **options) -> list[str]:
    options = {**OPTIONS, "model.path": model, "run.dir": str(folder), **options}
    return [sys.executable, "-W", "ignore", "-m", "grpo_jax.train", "demo", *words(options)]


def run(arguments: list[str], environment: dict) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def unbroken(tiny_model, environment, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    done = run(command(tiny_model, folder), environment)
    assert done.returncode == 0, done.stderr
    return folder


def kill_when(process: subprocess.Popen, ready) -> None:
    """SIGKILL as soon as `ready()`; fails if the process ends before."""
    while not ready():
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


def assert_same(folder: Path, unbroken: Path) -> None:
    assert rows(folder) == rows(unbroken)
    assert [row["step"] for row in rows(folder)] == list(range(STEPS + 1))
    assert (folder / "rollouts.jsonl").read_bytes() == (unbroken / "rollouts.jsonl").read_bytes()
    assert (folder / "hf" / "model.safetensors").read_bytes() == (unbroken / "hf" / "model.safetensors").read_bytes()
    assert (folder / "report.html").exists()


def steps_logged(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_the_run_learns_something(unbroken):
    """Else equality after a restart would show nothing: parameters, KL and samples must move."""
    found = rows(unbroken)
    assert found[1]["grad_norm"] > 0 and found[1]["kl/mean"] != found[-1]["kl/mean"] > 0
    assert found[1]["clip_fraction"] >= 0 and all(row["rollout/logp_mismatch_max"] < 1e-4 for row in found[1:])
    assert np.mean([row["groups/zero_variance"] for row in found[1:]]) < 1
    assert found[1]["reward/mean"] != found[2]["reward/mean"]
    answered = {row["step"]: row["val/benchmark/accuracy"] for row in found if "val/benchmark/accuracy" in row}
    assert list(answered) == [0, 3, 6] and {round(3 * share, 9) for share in answered.values()} <= {0, 1, 2, 3}


def test_killed_while_a_save_is_in_flight(tiny_model, environment, unbroken, tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen(command(tiny_model, folder), env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)

    def saving():
        names = [p.name for p in (folder / "checkpoints").glob("*")] if (folder / "checkpoints").exists() else []
        return steps_logged(folder) >= 5 and any("tmp" in name for name in names)

    kill_when(process, saving)
    again = run(command(tiny_model, folder), environment)
    assert again.returncode == 0, again.stderr
    assert "after step" in again.stdout and "after step 0" not in again.stdout
    assert_same(folder, unbroken)


def test_a_finished_run_started_again_changes_nothing(tiny_model, environment, unbroken, tmp_path):
    folder = shutil.copytree(unbroken, tmp_path / "run")
    again = run(command(tiny_model, folder), environment)
    assert again.returncode == 0, again.stderr
    assert_same(folder, unbroken)


def largest_file(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def damage(folder: Path, how: str) -> None:
    file = largest_file(folder / "state")
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 1
    else:
        del content[len(content) // 2 :]
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["flip", "truncate"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_used(how, tiny_model, environment, unbroken, tmp_path):
    folder = shutil.copytree(unbroken, tmp_path / "run")
    damage(folder / "checkpoints" / "6", how)
    again = run(command(tiny_model, folder), environment)
    assert again.returncode == 0, again.stderr
    assert "warning: checkpoint" in again.stdout and "damaged-6" in again.stdout and "after step 4" in again.stdout
    assert_same(folder, unbroken)


def test_all_checkpoints_damaged(tiny_model, environment, unbroken, tmp_path):
    folder = shutil.copytree(unbroken, tmp_path / "run")
    for step in (4, 6):
        damage(folder / "checkpoints" / str(step), "truncate")
    files = lambda: {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}  # noqa: E731
    before = files()
    again = run(command(tiny_model, folder), environment)
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1 and "every checkpoint is damaged" in again.stderr
    assert files() == before


def test_a_checkpoint_exports_as_the_run_does(environment, unbroken, tmp_path):
    script = [sys.executable, "-W", "ignore", str(ROOT / "scripts" / "export_hf.py"), "--dtype", "float32"]
    newest = run([*script, str(unbroken), str(tmp_path / "newest")], environment)
    assert newest.returncode == 0, newest.stderr
    assert (tmp_path / "newest" / "model.safetensors").read_bytes() == (unbroken / "hf" / "model.safetensors").read_bytes()
    older = run([*script, str(unbroken / "checkpoints" / "4"), str(tmp_path / "older")], environment)
    assert older.returncode == 0, older.stderr
    assert (tmp_path / "older" / "model.safetensors").read_bytes() != (unbroken / "hf" / "model.safetensors").read_bytes()
    for wrong in (
        tmp_path / "none",
        unbroken / "checkpoints",
        unbroken / "checkpoints" / "damaged-6",
        ROOT / "models" / "demo",
    ):
        with pytest.raises(ValueError, match="neither a run's folder nor"):
            export_hf.export(export_hf.Args(wrong, tmp_path / "out"))
    missing = run([*script, str(tmp_path / "none"), str(tmp_path / "out")], environment)
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1


def test_a_checkpoint_may_be_named_from_beside_it(unbroken, tmp_path, monkeypatch):
    monkeypatch.chdir(unbroken / "checkpoints")
    export_hf.export(export_hf.Args(Path("6"), tmp_path / "out", "float32"))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (unbroken / "hf" / "model.safetensors").read_bytes()


def test_a_run_at_work_is_left_alone_and_one_without_checkpoints_begins_anew(tiny_model, environment, unbroken, tmp_path):
    folder = shutil.copytree(unbroken, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    before = (folder / "metrics.jsonl").read_bytes()
    with (folder / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = run(command(tiny_model, folder), environment)
        assert second.returncode == 2 and "another process is at work" in second.stderr
        assert (folder / "metrics.jsonl").read_bytes() == before
    again = run(command(tiny_model, folder), environment)
    assert again.returncode == 0 and "no checkpoint to resume from; the run begins anew" in again.stdout
    assert_same(folder, unbroken)


def test_an_identity_field_refuses_and_an_operational_one_is_noted(tiny_model, environment, unbroken, tmp_path):
    folder = shutil.copytree(unbroken, tmp_path / "run")
    other = run(command(tiny_model, folder, **{"rollout.temperature": 0.9}), environment)
    assert other.returncode == 2 and "rollout.temperature: 0.7 -> 0.9" in other.stderr
    assert other.stderr.count("\n") == 1
    other = {"validation.benchmarks": "tests.grpo_jax.test_benchmarks:benchmark"}
    longer = run(command(tiny_model, folder, **{"run.steps": STEPS + 1, "checkpoint.keep": 3, **other}), environment)
    assert longer.returncode == 0, longer.stderr
    assert f"run.steps: {STEPS} -> {STEPS + 1}" in longer.stdout
    assert f"validation.benchmarks: {BENCHMARK} -> tests.grpo_jax.test_benchmarks:benchmark" in longer.stdout
    assert rows(folder)[: STEPS + 1] == rows(unbroken) and rows(folder)[-1]["step"] == STEPS + 1
    assert rows(folder)[-1]["val/benchmark/accuracy"] == 1.0  # the other one's verdict


def test_a_field_that_a_run_is_older_than_had_its_default(tiny_model, unbroken, tmp_path):
    folder = shutil.copytree(unbroken, tmp_path / "run")
    before = json.loads((folder / "config.json").read_text())
    del before["loss"]["objective"], before["lora"]
    (folder / "config.json").write_text(json.dumps(before))
    cfg = config.parse(TrainConfig, "grpo_jax.train", words({**OPTIONS, "model.path": tiny_model, "run.dir": str(folder)}))
    identity, _ = config.differences({k: v for k, v in before.items() if k != "program"}, cfg)
    assert identity == []
    older = {k: dict(v) for k, v in before.items() if k != "program"}
    older["learner"] |= older.pop("update")  # as runs had it before that section
    assert config.differences(older, cfg)[0] == []
    older["learner"]["passes"] = 3
    assert config.differences(older, cfg)[0] == ["update.passes: 3 -> 1"]
    other = replace(cfg, loss=replace(cfg.loss, objective="gspo"))
    assert config.differences(before, other)[0][0] == "loss.objective: ppo -> gspo"


def test_another_model_in_the_same_place_refuses(tiny_model, environment, unbroken, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    first = run(command(str(model), tmp_path / "run", **{"run.steps": 1}), environment)
    assert first.returncode == 0, first.stderr
    found, params = hf.load(model)
    params["norm"]["scale"] = params["norm"]["scale"] * 2
    hf.save(model, found, params, hf.load_tokenizer(model), dtype="float32")
    again = run(command(str(model), tmp_path / "run", **{"run.steps": 2}), environment)
    assert again.returncode == 2 and "initial weights" in again.stderr


# Bad input: one line that names what is wrong, exit code 2, nothing written.


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        config.run_main(lambda: train.train(config.parse(TrainConfig, "grpo_jax.train", arguments)))
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rollout.grup_size", "4"], "did you mean '--rollout.group_size'?"),
        (["demoo"], "did you mean 'demo'?"),
        (["--rollout.group_size", "many"], "--rollout.group_size"),
        (["--loss.normalize", "standard"], "'std', 'mean_only'"),
        (["--run.seed"], "--run.seed"),
        (["--rollout.group_size", "1"], "--loss.normalize mean_only"),
        (["--rollout.group_size", "1", "--loss.normalize", "rloo", "--rollout.refills", "2"], "one response never"),
        (["--loss.importance_cap", "2"], "give --update.recompute_old_logp"),
        (["--loss.importance_cap", "0.5", "--update.recompute_old_logp"], "below 1 it would weigh down every token"),
        (["--loss.clip_low", "2"], "give at most 1"),
        (["--reward.overlong_margin", "97"], "--reward.overlong_margin 97 is more than"),
        (["--loss.objective", "grpo"], "'ppo', 'gspo', 'cispo'"),
        (["--rollout.top_p", "0.9"], "--rollout.top_p must be 1"),
        (["--rollout.top_k", "5"], "--rollout.top_k 0"),
        (["--rollout.temperature", "0"], "above 0"),
        (["--run.seed", "-1"], "--run.seed -1 must lie in 0 ... 2147483647"),
        (["--run.seed", "2147483648"], "--run.seed 2147483648 must"),
        (["--reward.kind", "binry"], "did you mean 'binary'?"),
        (["--validation.benchmarks", "eval.bfcl:simpel_java"], "did you mean 'simple_java'?"),
        (["--validation.benchmarks", BENCHMARK, "--validation.limit", "0"], "--validation.limit 0 asks no benchmark either"),
        (["--learner.tokens_per_microbatch", "100"], "raise it"),
        (["--model.path", ""], "--model.path is missing"),
        (["tool-n1-7b"], "--data.path is missing"),
        (["--model.path", "no/such/folder"], "no such folder"),
        (["--mesh.tensor", "3"], "make the product fit"),
        (["--checkpoint.every", "0"], "--checkpoint.every 0: give a number from 1 on"),
        (["--rollout.group_size", "0"], "--rollout.group_size 0: give a number from 1 on"),
        (["--optimizer.learning_rate", "nan"], "--optimizer.learning_rate nan: give a number from 0 on"),
        (["--lora.rank", "4", "--learner.offload", "both"], "the reference is the frozen model itself"),
        (["--lora.targets", "q_proj,qproj"], "'qproj' is none of q_proj, k_proj"),
        (["--run.steps", "2", "tool-n1-7b"], "a preset like 'tool-n1-7b' comes first"),
        (["--data.template", "nowhere.txt"], "nowhere.txt: no such template file"),
    ],
)
def test_bad_options(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_bad_data(tiny_model, capsys, tmp_path):
    def says(path: Path) -> str:
        return refused(capsys, "--model.path", tiny_model, "--data.path", str(path), "--run.dir", str(tmp_path / "run"))

    assert "no such file" in says(tmp_path / "missing.jsonl")
    broken = tmp_path / "broken.jsonl"
    row = {
        "query": "q",
        "tools": [{"name": "f", "description": "", "parameters": {}}],
        "answers": [{"name": "f", "arguments": {}}],
    }
    broken.write_text(json.dumps(row) + "\n{" + json.dumps(row)[:20] + "\n")
    assert f"{broken}:2" in says(broken)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "no usable row" in says(empty)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_run_is_left_alone(tiny_model, capsys, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "is not empty and holds no run" in refused(capsys, "--model.path", tiny_model, "--run.dir", str(tmp_path))
    (tmp_path / "config.json").write_text('{"program": "grpo_jax.sft"}')
    assert "choose another --run.dir" in refused(capsys, "--model.path", tiny_model, "--run.dir", str(tmp_path))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def raises(error: BaseException):
    def program():
        raise error

    return program


def test_a_bug_shows_where_it_is_and_a_mistake_does_not(capsys):
    with pytest.raises(ValueError, match="of a user's own reward"):  # raised here: in no file of the program
        config.run_main(raises(ValueError("of a user's own reward")))
    with pytest.raises(ValueError, match="invalid literal"):
        config.run_main(lambda: json.loads("1", parse_int=lambda digits: int("x")))
    assert capsys.readouterr().err == ""
    for error, code, says in (
        (PermissionError(13, "Permission denied", "runs/mine"), 2, "error: [Errno 13] Permission denied: 'runs/mine'\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ):
        with pytest.raises(SystemExit) as stop:
            config.run_main(raises(error))
        assert stop.value.code == code and capsys.readouterr().err == says


def test_a_run_of_the_whole_model_has_no_adapter_to_export(unbroken, tmp_path):
    assert not (unbroken / "adapter").exists()
    with pytest.raises(ValueError, match="has no adapter; leave out --adapter"):
        export_hf.export(export_hf.Args(unbroken, tmp_path / "out", adapter=True))


def test_an_interrupted_run_waits_for_its_last_save(tiny_model, tmp_path, monkeypatch):
    steps = iter(range(2))
    learn = train.learn

    def interrupted(*arguments):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return learn(*arguments)

    monkeypatch.setattr(train, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(small(tiny_model, tmp_path / "run", **{"run.steps": 3, "checkpoint.every": 1}))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["1", "2"]


@pytest.mark.parametrize(
    "call, saved", [(1, 0), (4, 1), (6, 3), (7, 3), (8, 3)], ids=["begin", "rollout", "validation", "benchmark", "after it"]
)
def test_stopped_in_sampling_it_goes_on_as_if_it_had_not_been(call, saved, tiny_model, unbroken, tmp_path, monkeypatch):
    """Calls of the sampler: validation and benchmark, steps 1, 2, 3, validation and benchmark of step 3, steps 4, ..."""
    calls, respond = iter(range(1, 100)), batch.respond

    def stopped(*arguments):
        if next(calls) == call:
            raise hosts.Stopped
        return respond(*arguments)

    monkeypatch.setattr(batch, "respond", stopped)
    options = {**OPTIONS, "model.path": tiny_model, "run.dir": str(tmp_path / "run")}
    cfg = config.parse(TrainConfig, "grpo_jax.train", words(options))
    with pytest.raises(SystemExit) as stop:
        train.train(cfg)
    assert stop.value.code == hosts.STOPPED == 75
    found = [int(path.name) for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*")]
    assert max(found, default=0) == saved
    train.train(cfg)
    assert_same(tmp_path / "run", unbroken)


def test_a_row_that_waited_for_its_validation_is_written_once(tiny_model, unbroken, tmp_path, monkeypatch):
    """Stopped in the benchmark of step 3; resumed, and killed before the next checkpoint; resumed again."""
    options = {**OPTIONS, "checkpoint.every": 100, "model.path": tiny_model, "run.dir": str(tmp_path / "run")}
    cfg = config.parse(TrainConfig, "grpo_jax.train", words(options))
    respond = batch.respond
    for call, error in ((7, hosts.Stopped), (3, KeyboardInterrupt)):  # the second: after that validation, in step 4
        calls = iter(range(1, 100))

        def ended(*arguments, calls=calls, call=call, error=error):
            if next(calls) == call:
                raise error
            return respond(*arguments)

        monkeypatch.setattr(batch, "respond", ended)
        with monkeypatch.context() as patch, pytest.raises((SystemExit, KeyboardInterrupt)):
            if error is KeyboardInterrupt:
                patch.setattr(run_module, "save", lambda run: None)
            train.train(cfg)
    monkeypatch.setattr(batch, "respond", respond)
    train.train(cfg)
    assert_same(tmp_path / "run", unbroken)


def test_another_dtype_by_another_device_is_noted(tiny_model, tmp_path, monkeypatch, capsys):
    cfg = small(tiny_model, tmp_path / "run", **{"run.steps": 1})
    train.train(cfg)
    capsys.readouterr()
    monkeypatch.setattr(inputs, "compute_dtype", lambda _: "bfloat16")  # as `auto` is on an accelerator
    train.train(cfg)
    assert "changed  dtype: float32 -> bfloat16\n" in capsys.readouterr().out


def test_responses_are_judged_as_they_were_sampled(tiny_model):
    policy = inputs.load_policy(tiny_model)
    policy.tokenizer.clean_up_tokenization_spaces = True  # as Llama 3's says, and transformers 4 then does
    text = '<think>it does n\'t , say .</think><tool_call>[{"name": "f", "arguments": {"a": "yes , no ?"}}]</tool_call>'
    ids = np.array([*policy.tokenizer(text, add_special_tokens=False)["input_ids"], policy.end_tokens[0]], np.int32)
    group = Group(ids[:1], (ids, ids[:-1]), (np.zeros(len(ids)), np.zeros(len(ids) - 1)), (False, True))
    task = Task(make([], [], [{"name": "f", "arguments": {"a": "yes , no ?"}}], "test"), ids[:1])
    texts, scored = batch.score(policy, [task], [group], reward.each(reward.resolve("binary")))
    assert texts == [[text, text]] and [s.value for s in scored[0]] == [1.0, 1.0]


# ---------------------------------------------------------------- the sampler's pool


def test_the_pool_is_sized_once_a_run(monkeypatch):
    """From the memory that is free at first; a run that resumes keeps what its checkpoint says."""
    policy = SimpleNamespace(model=decoder.SIZES["qwen2.5-0.5b"], end_tokens=(1,))
    run = SimpleNamespace(
        policy=policy, objective=Objective(dtype="bfloat16"), local=mesh.local(1), meta={}, state={"params": {}}
    )
    run.meta["resolved"] = {"device": "some"}
    for free in (20 * 10**9, 10**9):
        monkeypatch.setattr(train, "free_memory", lambda *_, free=free: free)
        sampling = train.sampling_of(config.Rollout(), run)
        assert sampling.cache_bytes == 8 * 10**9
        assert (
            sampling.rows == rollout.pool_size(policy.model, "bfloat16", sampling, 4096, 20 * 10**9, mesh.shards(run.local))[0]
        )
        assert run.meta["resolved"] == {"device": "some", "rows": sampling.rows, "cache_bytes": sampling.cache_bytes}
    assert train.sampling_of(config.Rollout(rows=7), run).rows == 7


def test_a_sampler_that_disagrees_with_the_learner_is_told_once(capsys):
    run = lambda again: SimpleNamespace(  # noqa: E731
        said=set(), recent=deque(), meta={"config": {"update": {"recompute_old_logp": again}}}
    )
    state = run(False)
    run_module.watch(run(True), {"step": 0, "rollout/logp_mismatch": 0.5})
    for step, gap in ((1, 0.0), (2, alarms.MOST_MISMATCH), (3, float("nan")), (4, 0.06)):
        run_module.watch(state, {"step": step, "rollout/logp_mismatch": gap})
    run_module.watch(state, {"step": 5})  # a step in which no group had anything to teach
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("warning") == 1
    assert "step 3: the log-probs of sampler and learner differ by nan nats" in said


def test_out_of_memory_says_what_to_lower(capsys):
    with pytest.raises(SystemExit) as stop:
        config.run_main(raises(RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert "--learner.tokens_per_microbatch" in said and "allocate 9 bytes" in said
    with pytest.raises(RuntimeError, match="another"):
        config.run_main(raises(RuntimeError("another")))
