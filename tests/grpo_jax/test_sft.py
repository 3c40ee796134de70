"""Supervised training: its loss against the plain model, and a run that is stopped, continued, and refused other rows."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data import demo
from data.example import make
from grpo_jax import config, inputs, metrics, sft
from grpo_jax.config import SftConfig
from grpo_jax.inputs import Task, Tasks
from models import decoder, hf, lora


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    examples = [(e.messages[0]["content"], e.tools, e.answer, e.extra["reasoning"]) for e in demo.tasks(24, 0, held_out=False)]
    names = ("query", "tools", "answers", "reasoning")
    path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in examples))
    return path


def settings(model, rows, folder, steps) -> SftConfig:
    return SftConfig(
        run=config.Run(dir=str(folder), steps=steps, tensorboard=False),
        model=config.Model(path=model),
        data=config.Data(path=str(rows), template=str(demo.TEMPLATE)),
        batch=config.Batch(rows_per_step=4, max_tokens=400),
        optimizer=config.Optimizer(learning_rate=1e-2),
        learner=config.Learner(tokens_per_microbatch=1024, remat="none"),
        checkpoint=config.Checkpoint(every=2),
        validation=config.Validation(every=2, limit=3),
        export=config.Export(dtype="float32"),
    )


@pytest.fixture(scope="module")
def unbroken(tiny_model, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    sft.sft(settings(tiny_model, rows, folder, 4))
    return folder


def untimed(folder):
    timed = ("time/", "memory/", "learner/tokens_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in metrics.read(folder / "metrics.jsonl")]


def test_the_loss_is_the_cross_entropy_of_the_targets_and_falls(tiny_model, rows, unbroken):
    policy = inputs.load_policy(tiny_model)
    cfg = settings(tiny_model, rows, unbroken, 4)
    tasks = inputs.load_tasks(cfg.data, policy, 400, 0, 3, with_target=True)
    total = count = 0
    for task in tasks.validation:
        whole = np.concatenate([task.prompt, task.target])[None]
        logits = decoder.logits(policy.model, hf.load(tiny_model)[1], jnp.asarray(whole), jnp.array([whole.size]))
        logp = np.asarray(jax.nn.log_softmax(logits.astype(jnp.float32)))[0, len(task.prompt) - 1 : -1]
        total -= logp[np.arange(len(task.target)), task.target].sum()
        count += len(task.target)
    found = untimed(unbroken)
    assert found[0]["val/loss"] == pytest.approx(total / count, rel=1e-5)
    assert found[-1]["val/loss"] < found[0]["val/loss"] - 0.5
    assert [row["step"] for row in found] == [0, 1, 2, 3, 4] and ["val/loss" in row for row in found] == [1, 0, 1, 0, 1]
    assert all(row["learning_rate"] == pytest.approx(1e-2) for row in found)


def test_a_run_that_is_continued_ends_like_one_that_was_not_stopped(tiny_model, rows, unbroken, tmp_path, capsys):
    sft.sft(settings(tiny_model, rows, tmp_path / "run", 2))
    sft.sft(settings(tiny_model, rows, tmp_path / "run", 4))
    assert untimed(tmp_path / "run") == untimed(unbroken)
    for file in ("hf/model.safetensors", "curves.png", "report.html"):
        assert (tmp_path / "run" / file).exists()
    weights = [(folder / "hf" / "model.safetensors").read_bytes() for folder in (tmp_path / "run", unbroken)]
    assert weights[0] == weights[1]
    shown = capsys.readouterr().out
    assert "0 of 22 are calls after an empty thought" in shown and "resuming" in shown and "run.steps: 2 -> 4" in shown
    before, after = untimed(unbroken)[0]["val/loss"], untimed(unbroken)[-1]["val/loss"]
    assert f"loss {before:15.4f}{after:8.4f}{after - before:+12.4f}" in shown


def test_adapters_learn_too(tiny_model, rows, tmp_path):
    cfg = replace(settings(tiny_model, rows, tmp_path / "run", 4), lora=config.Lora(rank=4))
    sft.sft(cfg)
    found = untimed(tmp_path / "run")
    assert found[-1]["val/loss"] < found[0]["val/loss"] - 0.2
    sft.sft(replace(cfg, run=replace(cfg.run, dir=str(tmp_path / "on"), steps=1), model=config.Model(f"{cfg.run.dir}/hf")))
    assert untimed(tmp_path / "on")[0]["val/loss"] == pytest.approx(found[-1]["val/loss"], rel=1e-5)  # the export is the model


def test_the_calls_alone_are_other_targets_of_the_same_rows(tiny_model, rows, tmp_path, capsys):
    cfg = settings(tiny_model, rows, tmp_path / "run", 2)
    calls = replace(cfg, data=replace(cfg.data, replies="calls", end=0.5))
    sft.sft(calls)
    assert "all 11 are calls alone" in capsys.readouterr().out
    policy = inputs.load_policy(str(tmp_path / "run"))  # the run's folder stands for its model
    assert policy.path == str(tmp_path / "run" / "hf")
    for other in (
        replace(calls, data=replace(calls.data, end=1.0)),
        replace(calls, data=replace(calls.data, replies="reasoning")),
    ):
        with pytest.raises(ValueError, match="holds a run with other values of data"):
            sft.sft(other)


def test_other_replies_to_the_same_tasks_are_other_data(tiny_model, rows, unbroken, tmp_path):
    other = tmp_path / "rows.jsonl"
    other.write_text(rows.read_text())
    cfg = settings(tiny_model, other, tmp_path / "run", 2)
    sft.sft(cfg)
    other.write_text(rows.read_text().replace('"reasoning": "', '"reasoning": "So: '))
    with pytest.raises(ValueError, match="the run began with another data"):
        sft.sft(replace(cfg, run=replace(cfg.run, steps=4)))


@pytest.mark.parametrize("preset, replies", [("tool-n1-reason", "reasoning"), ("tool-n1-no-reason", "calls")])
def test_the_papers_supervised_recipe(preset, replies):
    cfg = config.parse(SftConfig, "grpo_jax.sft", [preset, "--data.path", "rows"])
    assert cfg.data.replies == replies and cfg.run.epochs == 5 and inputs.adapters(cfg.lora).rank == 8
    assert inputs.adapters(cfg.lora).targets == tuple(lora.TARGETS)  # all linear layers
    assert (cfg.batch.rows_per_step, cfg.batch.max_tokens) == (32, 2048)
    assert (cfg.optimizer.learning_rate, cfg.optimizer.schedule, cfg.optimizer.warmup) == (1e-4, "cosine", 0.1)
    sft.check(cfg)


def test_a_row_longer_than_a_microbatch_is_refused_before_anything_is_read(tmp_path):
    cfg = settings("no/such/model", "no/such/rows", tmp_path / "run", 2)
    with pytest.raises(ValueError, match="--learner.tokens_per_microbatch 100 is less than --batch.max_tokens 400"):
        sft.sft(replace(cfg, learner=replace(cfg.learner, tokens_per_microbatch=100)))


def test_benchmarks_are_refused_since_nothing_is_sampled(tmp_path):
    cfg = settings("no/such/model", "no/such/rows", tmp_path / "run", 2)
    with pytest.raises(ValueError, match="^--validation.benchmarks: supervised training samples no responses"):
        sft.sft(replace(cfg, validation=replace(cfg.validation, benchmarks="eval.bfcl:multiple")))


def test_empty_thoughts_are_not_taught_unsaid(capsys):
    bare = [
        Task(make([], [], [], "test", extra), np.zeros(1, np.int32)) for extra in ({}, {"reasoning": "so"}, {"response": "x"})
    ]
    shown = sft.replies(config.SftConfig(), Tasks(bare, [], {}))
    assert shown == "1 of 3 are calls after an empty thought"
    assert "1 of 3 rows have no thought, and teach an empty one" in " ".join(capsys.readouterr().out.split())
    sft.replies(config.SftConfig(), Tasks(bare[1:], [], {}))
    assert capsys.readouterr().out == ""
