"""The program as people run it: a run that is killed and started again, damaged checkpoints, bad input, the export."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from grpo_jax import config, mesh, metrics, rollout, train
from grpo_jax.config import TrainConfig
from grpo_jax.learner import Objective
from models import decoder, hf

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
SMALL = {
    "run.steps": STEPS,
    "checkpoint.every": 2,
    "validation.limit": 4,
    "validation.every": 3,
    "rollout.prompts_per_step": 3,
    "rollout.group_size": 3,
    "rollout.max_prompt_tokens": 400,
    "rollout.max_response_tokens": 12,
    "rollout.decode_steps_per_call": 4,
    "learner.prompts_per_minibatch": 2,
    "learner.tokens_per_microbatch": 2048,
    "loss.kl_coefficient": 0.1,
    "optimizer.learning_rate": 1e-3,
    "reward.kind": "tests.grpo_jax.length_reward:score",
}


def words(options: dict) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def command(model: str, folder: Path, **options) -> list[str]:
    options = {**SMALL, "model.path": model, "run.dir": str(folder), **options}
    return [sys.executable, "-W", "ignore", "-m", "grpo_jax.train", "demo", *words(options)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict:
    cache = tmp_path_factory.mktemp("compiled")
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


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


def rows(folder: Path) -> list[dict]:
    """metrics.jsonl without what a clock or the machine's memory decides."""
    timed = ("time/", "memory/", "rollout/tokens_per_second", "learner/tokens_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in metrics.read(folder / "metrics.jsonl")]


def assert_same(folder: Path, unbroken: Path) -> None:
    assert rows(folder) == rows(unbroken)
    assert [row["step"] for row in rows(folder)] == list(range(STEPS + 1))
    assert (folder / "rollouts.jsonl").read_bytes() == (unbroken / "rollouts.jsonl").read_bytes()
    assert (folder / "hf" / "model.safetensors").read_bytes() == (unbroken / "hf" / "model.safetensors").read_bytes()


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


def test_killed_in_step_4_resumes_bit_equal(tiny_model, environment, unbroken, tmp_path):
    process = subprocess.Popen(command(tiny_model, tmp_path / "run"), env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
    kill_when(process, lambda: steps_logged(tmp_path / "run") >= 4)  # steps 0 to 3 are logged
    again = run(command(tiny_model, tmp_path / "run"), environment)
    assert again.returncode == 0, again.stderr
    assert "after step 2" in again.stdout or "after step 4" in again.stdout
    assert_same(tmp_path / "run", unbroken)


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
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    again = run(command(tiny_model, folder), environment)
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1 and "every checkpoint is damaged" in again.stderr
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_checkpoint_exports_as_the_run_does(environment, unbroken, tmp_path):
    script = [sys.executable, "-W", "ignore", str(ROOT / "scripts" / "export_hf.py"), "--dtype", "float32"]
    newest = run([*script, str(unbroken), str(tmp_path / "newest")], environment)
    assert newest.returncode == 0, newest.stderr
    assert (tmp_path / "newest" / "model.safetensors").read_bytes() == (unbroken / "hf" / "model.safetensors").read_bytes()
    older = run([*script, str(unbroken / "checkpoints" / "4"), str(tmp_path / "older")], environment)
    assert older.returncode == 0, older.stderr
    assert (tmp_path / "older" / "model.safetensors").read_bytes() != (unbroken / "hf" / "model.safetensors").read_bytes()
    missing = run([*script, str(tmp_path / "none"), str(tmp_path / "out")], environment)
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1


def test_an_identity_field_refuses_and_an_operational_one_is_noted(tiny_model, environment, unbroken, tmp_path):
    folder = shutil.copytree(unbroken, tmp_path / "run")
    other = run(command(tiny_model, folder, **{"rollout.temperature": 0.9}), environment)
    assert other.returncode == 2 and "rollout.temperature: 0.7 -> 0.9" in other.stderr
    assert other.stderr.count("\n") == 1
    longer = run(command(tiny_model, folder, **{"run.steps": STEPS + 1, "checkpoint.keep": 3}), environment)
    assert longer.returncode == 0, longer.stderr
    assert f"run.steps: {STEPS} -> {STEPS + 1}" in longer.stdout
    assert rows(folder)[: STEPS + 1] == rows(unbroken) and rows(folder)[-1]["step"] == STEPS + 1


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
        (["--rollout.top_p", "0.9"], "--rollout.top_p must be 1"),
        (["--rollout.top_k", "5"], "--rollout.top_k 0"),
        (["--rollout.temperature", "0"], "above 0"),
        (["--run.seed", "-1"], "--run.seed -1 must lie in 0 ... 2147483647"),
        (["--run.seed", "2147483648"], "--run.seed 2147483648 must"),
        (["--reward.kind", "binry"], "did you mean 'binary'?"),
        (["--learner.tokens_per_microbatch", "100"], "raise it"),
        (["--model.path", ""], "--model.path is missing"),
        (["tool-n1-7b"], "--data.path is missing"),
        (["--model.path", "no/such/folder"], "no such folder"),
        (["--mesh.tensor", "3"], "make the product fit"),
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


# ---------------------------------------------------------------- the sampler's pool


def test_the_pool_is_sized_once_a_run(monkeypatch):
    """From the memory that is free at first; a run that resumes keeps what its checkpoint says."""
    policy = SimpleNamespace(model=decoder.SIZES["qwen2.5-0.5b"], end_tokens=(1,))
    run = SimpleNamespace(policy=policy, objective=Objective(dtype="bfloat16"), mesh=mesh.make(config.Mesh()), meta={})
    run.meta["resolved"] = {"device": "some"}
    for free in (20 * 10**9, 10**9):
        monkeypatch.setattr(train, "free_memory", lambda run, free=free: free)
        sampling = train.sampling_of(config.Rollout(), run)
        assert sampling.cache_bytes == 8 * 10**9
        assert (
            sampling.rows == rollout.pool_size(policy.model, "bfloat16", sampling, 4096, 20 * 10**9, mesh.shards(run.mesh))[0]
        )
        assert run.meta["resolved"] == {"device": "some", "rows": sampling.rows, "cache_bytes": sampling.cache_bytes}
    assert train.sampling_of(config.Rollout(rows=7), run).rows == 7
