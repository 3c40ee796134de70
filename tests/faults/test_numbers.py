"""What is not finite: it never reaches the parameters, it is counted and kept, and too much of it ends the run; and alarms."""

import json
from collections import deque
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import alarms, config, group, learner, metrics, train
from grpo_jax import run as run_module
from models import hf
from tests.grpo_jax.small_run import rows, small


def sums_of(gradient, **scalars) -> learner.Sums:
    given = {"loss": 3.0, "count": 7.0, "tokens": 7.0, "kl": 0.0, "entropy": 1.0, "clipped": 0.0, "mismatch": 0.5}
    given |= {"mismatch_max": 0.1} | scalars
    return learner.Sums(gradient, **{name: jnp.float32(value) for name, value in given.items()})


def adam():
    optimizer, _ = learner.make_optimizer(config.Optimizer(learning_rate=1e-2), 10)
    params = {"w": jnp.linspace(-1, 1, 50), "b": jnp.ones(3)}
    _, state = optimizer.update(jax.tree.map(jnp.cos, params), optimizer.init(params), params)  # moments are not 0
    return optimizer, params, state


def bits(tree) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


GRADIENT = {"w": np.linspace(2, 5, 50, dtype=np.float32), "b": np.ones(3, np.float32)}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["gradient", "loss", "mismatch"])
def test_what_is_not_finite_changes_no_bit_of_parameters_and_state(where, bad):
    optimizer, params, state = adam()
    before = bits((params, state))
    gradient = jax.tree.map(np.copy, GRADIENT)
    if where == "gradient":
        gradient["w"][17] = bad
    sums = sums_of(jax.tree.map(jnp.asarray, gradient), **({} if where == "gradient" else {where: bad}))
    params, state, scalars = learner.apply(optimizer, params, state, sums)
    assert bits((params, state)) == before and bool(scalars["skipped"])


def test_what_is_finite_takes_the_step_of_the_optimizer_bit_for_bit():
    optimizer, params, state = adam()

    sums = sums_of(jax.tree.map(jnp.asarray, GRADIENT))

    @jax.jit
    def plain(params, state, sums):
        gradient = jax.tree.map(lambda g: g / sums.count, sums.gradient)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    want = bits(plain(params, state, sums))
    params, state, scalars = learner.apply(optimizer, params, state, sums)
    assert bits((params, state)) == want and not scalars["skipped"]


def test_steps_that_were_left_out_are_in_no_mean():
    names = ("loss", "count", "tokens", "kl", "entropy", "clipped", "grad_norm", "mismatch", "mismatch_max")
    one = dict.fromkeys(names, 2.0) | {"skipped": False}
    bad = dict.fromkeys(names, np.nan) | {"skipped": True}
    assert learner.step_metrics([bad, one, bad]) == learner.step_metrics([one]) | {"learner/skipped": 2}
    assert learner.step_metrics([bad]) == {"learner/skipped": 1}


# ---------------------------------------------------------------- in a run


def poisoned(monkeypatch, calls: set[int]) -> None:
    """One advantage of the so-manieth mini-batches is not a number, as a broken reward or an overflow would make it."""
    count, pack = iter(range(1, 1000)), train.pack

    def with_nan(run, groups):
        if next(count) in calls:
            groups = [replace(groups[0], advantages=groups[0].advantages * np.nan), *groups[1:]]
        return pack(run, groups)

    monkeypatch.setattr(train, "pack", with_nan)


def test_a_run_goes_on_without_the_batches_that_are_not_finite(tiny_model, tmp_path, monkeypatch, capsys):
    """Two mini-batches a step: the third is the first of step 2."""
    poisoned(monkeypatch, {3})
    cfg = small(tiny_model, tmp_path / "run", **{"run.steps": 3})
    train.train(cfg)
    found = rows(tmp_path / "run")
    assert [row["learner/skipped"] for row in found[1:]] == [0, 1, 0]
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in found[1:])
    _, params = hf.load(tmp_path / "run" / "hf")
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(params))
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: step 2: 1 of 2 optimizer steps left out, for grad_norm, loss not finite; its batch is in" in said
    with np.load(tmp_path / "run" / "skipped" / "step-2.npz", allow_pickle=False) as kept:
        about, lengths = json.loads(str(kept["about"])), kept["prompt_length"]
        groups = group.ragged(np.split(kept["prompts"], np.cumsum(lengths)[:-1]), kept)
        advantages = kept["advantages"]
    rollouts = [row for row in metrics.read(tmp_path / "run" / "rollouts.jsonl") if row["step"] == 2]
    assert about["ids"] == [row["id"] for row in rollouts] and [u["skipped"] for u in about["updates"]] == [1, 0]
    assert about["updates"][0]["loss"] is None and about["updates"][1]["loss"] is not None
    for one, advantage, row in zip(groups, advantages, rollouts, strict=True):
        assert [len(r) for r in one.responses] == [r["token_count"] for r in row["responses"]]
        np.testing.assert_array_equal(advantage, [r["advantage"] for r in row["responses"]])


def test_too_many_in_a_row_end_the_run_with_its_last_step_saved(tiny_model, tmp_path, monkeypatch):
    """Mini-batches 5 to 8: both of step 3, both of step 4, which is one more than three."""
    folder = tmp_path / "run"
    poisoned(monkeypatch, {5, 6, 7, 8})
    options = {"run.steps": 5, "checkpoint.every": 100, "optimizer.skips": 3}
    with pytest.raises(
        run_module.Diverged, match=r"4 optimizer steps in a row .* the last in step 4; .*skipped has their batches"
    ):
        train.train(small(tiny_model, folder, **options))
    assert sorted(path.name for path in (folder / "skipped").iterdir()) == ["step-3.npz", "step-4.npz"]
    assert [row["learner/skipped"] for row in rows(folder)[1:]] == [0, 0, 2, 2]
    assert "loss" not in rows(folder)[4] and "reward/mean" in rows(folder)[4]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["4"]
    monkeypatch.undo()
    train.train(small(tiny_model, folder, **options))  # the same command goes on past them
    assert [row["step"] for row in rows(folder)] == [0, 1, 2, 3, 4, 5] and rows(folder)[5]["learner/skipped"] == 0


def test_each_batch_that_is_kept_is_one_of_few(tmp_path, capsys):
    made = config.TrainConfig(run=config.Run(dir=str(tmp_path)))
    state = SimpleNamespace(config=made, skipped=1)
    one = group.Group(np.arange(3), (np.arange(2),), (np.zeros(2),), (False,), np.zeros(1))
    task = SimpleNamespace(example=SimpleNamespace(id="ab"))
    for step in range(20):
        run_module.note_skipped(state, step, [{"skipped": np.array(step > 2), "loss": np.float32(np.nan)}], [task], [one])
    kept = [int(path.stem.removeprefix("step-")) for path in (tmp_path / "skipped").iterdir()]
    assert sorted(kept) == list(range(3, 3 + run_module.KEPT_SKIPS))


# ---------------------------------------------------------------- alarms


def test_each_alarm_sounds_once(capsys):
    run = SimpleNamespace(said=set(), recent=deque(maxlen=alarms.STUCK), meta={"config": {}})
    well = {"reward/std": 0.2, "reward/mean": 0.5, "entropy/mean": 0.3, "response_tokens/truncated_share": 0.1}
    well["rollout/logp_mismatch"] = 1e-5

    def told(step, **changed) -> str:
        run_module.watch(run, {"step": step, **well, **{name.replace("__", "/"): value for name, value in changed.items()}})
        return " ".join(capsys.readouterr().out.split())

    assert told(1) == ""
    for step in range(2, 2 + alarms.STUCK - 1):
        assert told(step, reward__std=0.0, reward__mean=0.0) == ""
    assert "all responses of 5 steps had the reward 0, so they teach nothing; see reason/*" in told(
        9, reward__std=0.0, reward__mean=0.0
    )
    assert "step 10: the entropy has fallen to 0.0005 nats" in told(10, entropy__mean=5e-4)
    assert "step 11: 60% of the responses were cut at the length limit" in told(11, response_tokens__truncated_share=0.6)
    assert "step 12: the log-probs of sampler and learner differ by 0.500 nats" in told(12, rollout__logp_mismatch=0.5)
    everything = dict(reward__std=0.0, reward__mean=1.0, entropy__mean=0.0, response_tokens__truncated_share=1.0)
    assert [told(step, **everything, rollout__logp_mismatch=1.0) for step in range(13, 20)] == [""] * 7
    run.said.clear()
    assert "the reward 1, so they teach nothing; the data holds nothing more" in told(20, reward__std=0.0, reward__mean=1.0)


def test_a_reward_that_only_now_and_then_is_equal_is_none():
    run = SimpleNamespace(said=set(), recent=deque(maxlen=alarms.STUCK), meta={"config": {}})
    for step in range(50):
        run_module.watch(run, {"step": step, "reward/std": float(step % alarms.STUCK == 0), "reward/mean": 1.0})
    assert not run.said


def test_a_save_is_kept_of_the_last_whole_step_when_a_reward_raises(tiny_model, tmp_path, monkeypatch):
    """A bug that is no fault of the state: with a checkpoint every 100 steps, nothing of two is lost."""
    calls, draw = iter(range(1, 100)), train.draw

    def raising(*arguments):
        if next(calls) == 3:
            raise KeyError("a user's own")
        return draw(*arguments)

    monkeypatch.setattr(train, "draw", raising)
    with pytest.raises(KeyError):
        train.train(small(tiny_model, tmp_path / "run", **{"run.steps": 4, "checkpoint.every": 100}))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]
