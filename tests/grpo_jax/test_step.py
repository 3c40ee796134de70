"""What a step of training does, by the options that change it; in this process, on the tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from grpo_jax import batch, checkpoint, config, hosts, inputs, loss, mesh, metrics, train
from models import decoder, hf
from scripts import export_hf
from tests.grpo_jax.small_run import end_of, rows, small


def test_old_log_probs_recomputed_are_those_of_the_sampler(tiny_model, tmp_path):
    """In loss and gradient of one optimizer step; Adam's step in float32 would amplify their rounding."""
    one = {"run.steps": 1, "update.prompts_per_minibatch": 3}
    sampled, _ = end_of(small(tiny_model, tmp_path / "a", **one))
    computed, _ = end_of(small(tiny_model, tmp_path / "b", **one, **{"update.recompute_old_logp": True}))
    for name in ("reward/mean", "clip_fraction"):
        assert computed[1][name] == sampled[1][name]
    for name in ("loss", "grad_norm"):
        assert computed[1][name] == pytest.approx(sampled[1][name], rel=1e-5, abs=1e-6)
    assert sampled[1]["grad_norm"] > 1e-2


def test_groups_of_equal_rewards_are_left_out_and_take_no_optimizer_step(tiny_model, tmp_path):
    options = {"loss.skip_zero_variance": True, "reward.kind": "format", "optimizer.schedule": "cosine"}
    found, after = end_of(small(tiny_model, tmp_path / "a", **options))
    _, params = hf.load(tiny_model)
    np.testing.assert_array_equal(after, np.asarray(params["layers"]["attention"]["q"]).astype(after.dtype))
    assert [row.get("groups/zero_variance") for row in found] == [None, 1, 1]
    assert [row["learning_rate"] for row in found] == [pytest.approx(1e-3)] * 3 and "grad_norm" not in found[-1]


def test_each_pass_takes_its_optimizer_steps(tiny_model, tmp_path):
    once, _ = end_of(small(tiny_model, tmp_path / "a", **{"run.steps": 1, "optimizer.schedule": "cosine"}))
    twice, _ = end_of(small(tiny_model, tmp_path / "b", **{"run.steps": 1, "optimizer.schedule": "cosine", "update.passes": 2}))
    assert once[1]["learning_rate"] == pytest.approx(1e-3 * (1 + np.cos(np.pi * 1 / 2)) / 2)  # the second step of two
    assert twice[1]["learning_rate"] == pytest.approx(1e-3 * (1 + np.cos(np.pi * 3 / 4)) / 2)  # the fourth of four
    assert twice[1]["clip_fraction"] >= once[1]["clip_fraction"]


def test_what_rests_in_host_memory_changes_nothing(tiny_model, tmp_path, monkeypatch):
    """One step with both there, a restart, and one more with none, against two steps with none."""
    resting, learn = [], train.learn
    kinds = lambda tree: {x.sharding.memory_kind for x in jax.tree.leaves(tree)}  # noqa: E731

    def watched(run, *rest):
        found = learn(run, *rest)
        resting.append([kinds(tree) for tree in (run.reference, run.state["optimizer"], run.state["params"])])
        return found

    monkeypatch.setattr(train, "learn", watched)
    unbroken, want = end_of(small(tiny_model, tmp_path / "a"))
    end_of(small(tiny_model, tmp_path / "b", **{"run.steps": 1, "learner.offload": "both"}))
    continued, found = end_of(small(tiny_model, tmp_path / "b"))
    assert continued == unbroken
    np.testing.assert_array_equal(found, want)
    host, device = {"pinned_host"}, {"device"}
    assert resting == [[device] * 3, [device] * 3, [host, host, device], [device] * 3]


ADAPTERS = {
    "lora.rank": 4,
    "lora.alpha": 8.0,
    "lora.targets": "q_proj,v_proj,down_proj",
    "optimizer.learning_rate": 1e-2,
    "update.prompts_per_minibatch": 3,  # one optimizer step a step: the first is taken where the policy is the reference
}


@pytest.fixture(scope="module")
def adapted(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "adapted"
    jax.config.update("jax_disable_most_optimizations", False)  # how much is rounded is to be that of real runs
    train.train(small(tiny_model, folder, **ADAPTERS, **{"run.steps": 3, "validation.limit": 4}))
    jax.config.update("jax_disable_most_optimizations", True)
    return folder


def test_adapters_learn_and_the_model_beside_them_is_the_reference(adapted):
    found = rows(adapted)
    assert found[1]["kl/mean"] == pytest.approx(0, abs=1e-6) and found[3]["kl/mean"] > 1e-4
    assert found[1]["grad_norm"] > 0 and found[1]["reward/mean"] != found[2]["reward/mean"]
    assert all(row["rollout/logp_mismatch_max"] < 1e-4 for row in found[1:])  # merged or beside it: rounding


def test_a_run_of_adapters_that_is_continued_ends_like_one_that_was_not_stopped(tiny_model, adapted, tmp_path, optimized):
    folder = tmp_path / "run"
    train.train(small(tiny_model, folder, **ADAPTERS, **{"run.steps": 1, "validation.limit": 4}))
    train.train(small(tiny_model, folder, **ADAPTERS, **{"run.steps": 3, "validation.limit": 4}))
    compared = lambda run: [{k: v for k, v in row.items() if not k.startswith("val/")} for row in rows(run)]  # noqa: E731
    assert compared(folder) == compared(adapted)
    for file in ("rollouts.jsonl", "hf/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (folder / file).read_bytes() == (adapted / file).read_bytes(), file


def test_a_checkpoint_holds_the_adapters_alone_and_exports_as_the_run_does(tiny_model, adapted, tmp_path, optimized):
    names = checkpoint.read_meta(adapted)["checksums"]
    assert len([name for name in names if name.startswith("params/")]) == 6  # two factors of three targets
    assert len([name for name in names if "/mu/" in name]) == 6
    source = adapted / "checkpoints" / "3"
    export_hf.export(export_hf.Args(source, tmp_path / "hf", "float32"))
    export_hf.export(export_hf.Args(adapted, tmp_path / "adapter", adapter=True))
    for file in ("hf/model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (tmp_path / file).read_bytes() == (adapted / file).read_bytes(), file
    model, base = hf.load(tiny_model)
    merged = hf.load(tmp_path / "hf")[1]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), merged, base)["layers"]
    assert moved["attention"] == {"q": True, "v": True} | dict.fromkeys(("k", "o", "q_bias", "k_bias", "v_bias"), False)
    assert moved["ff"] == {"gate": False, "up": False, "down": True}


def test_adapters_beside_another_model_are_refused(tiny_model, adapted, tmp_path, capsys):
    folder, model = shutil.copytree(adapted, tmp_path / "run"), shutil.copytree(tiny_model, tmp_path / "model")
    found, params = hf.load(model)
    params["norm"]["scale"] = params["norm"]["scale"] * 2
    hf.save(model, found, params, hf.load_tokenizer(model), dtype="float32")
    file = folder / "config.json"  # the same path, for the run
    file.write_text(file.read_text().replace(json.dumps(tiny_model), json.dumps(str(model))))
    with pytest.raises(ValueError, match="began with another initial weights"):
        train.train(small(str(model), folder, **ADAPTERS, **{"run.steps": 4}))
    with pytest.raises(ValueError, match="lora.rank: 4 -> 5"):
        train.train(small(str(model), folder, **ADAPTERS | {"lora.rank": 5}))


# ---------------------------------------------------------------- the algorithms that are not the paper's

DYNAMIC = {"reward.kind": "tests.grpo_jax.length_reward:of_some", "rollout.refills": 2, "checkpoint.every": 1}


@pytest.fixture(scope="module")
def refilled(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "refilled"
    train.train(small(tiny_model, folder, **DYNAMIC, **{"run.steps": 4}))
    return folder


def test_groups_of_equal_rewards_give_way_to_those_of_the_next_prompts(tiny_model, refilled):
    cfg = small(tiny_model, refilled, **DYNAMIC)
    policy = inputs.load_policy(tiny_model)
    tasks = inputs.load_tasks(cfg.data, policy, cfg.rollout.max_prompt_tokens, cfg.run.seed, 0).train
    found, kept = rows(refilled)[1:], metrics.read(refilled / "rollouts.jsonl")
    place = 0
    for row in found:
        ids = [one["id"] for one in kept if one["step"] == row["step"] and one["learned"]]
        sampled = [task.example.id for task in inputs.batch(tasks, row["rollout/prompts"], cfg.run.seed, place)]
        assert ids == [one for one in sampled if one in ids]  # in the order of the data, from where the last step ended
        assert len(ids) == 3 or row["rollout/prompts"] == 9
        place += row["rollout/prompts"]
        assert row["epoch"] == place / len(tasks)
        assert len(ids) == row["learner/prompts"] and sampled == [one["id"] for one in kept if one["step"] == row["step"]]
    assert all(len({one["value"] for one in group["responses"]}) > 1 for group in kept if group["learned"])
    assert {3, 6} & {row["rollout/prompts"] for row in found} and {6, 9} & {row["rollout/prompts"] for row in found}
    assert any(row["groups/zero_variance"] > 0 for row in found)  # of all that was sampled


@pytest.mark.parametrize("call", [3, 5])
def test_a_run_with_refills_goes_on_where_it_was_in_the_data(call, tiny_model, refilled, tmp_path, monkeypatch):
    calls, respond = iter(range(1, 100)), batch.respond

    def stopped(*arguments):
        if next(calls) == call:
            raise hosts.Stopped
        return respond(*arguments)

    monkeypatch.setattr(batch, "respond", stopped)
    cfg = small(tiny_model, tmp_path / "run", **DYNAMIC, **{"run.steps": 4})
    with pytest.raises(SystemExit):
        train.train(cfg)
    train.train(cfg)
    assert rows(tmp_path / "run") == rows(refilled)
    assert (tmp_path / "run" / "rollouts.jsonl").read_bytes() == (refilled / "rollouts.jsonl").read_bytes()


def test_a_prompt_that_comes_again_in_a_refill_gets_other_responses(tiny_model, tmp_path):
    """Six rows, of which none has a group with a difference: every step goes over them one and a half times."""
    data = tmp_path / "rows.jsonl"
    texts = [{"query": f"q {i}", "tools": [{"name": "f"}], "answers": [{"name": "f", "arguments": {}}]} for i in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in texts))
    seen: list[bytes] = []
    respond, options = batch.respond, {"data.path": str(data), "data.validation_fraction": 0.0, "reward.kind": "binary"}

    def watched(*arguments):
        groups, usage = respond(*arguments)
        seen.extend(b"".join(r.tobytes() for r in group.responses) for group in groups)
        return groups, usage

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "respond", watched)
        found, _ = end_of(small(tiny_model, tmp_path / "run", **options, **{"rollout.refills": 2, "run.steps": 1}))
    assert len(seen) == 9 == len(set(seen)) == found[1]["rollout/prompts"] and "grad_norm" not in found[1]


def test_responses_near_the_limit_lose_reward_in_training_alone(tiny_model, tmp_path):
    """Every response of the tiny model is cut at 12 tokens or shorter; the built-in verdict on all is 0."""
    options = {"reward.kind": "binary", "run.steps": 1, "validation.limit": 4}
    end_of(small(tiny_model, tmp_path / "a", **options, **{"reward.overlong_margin": 8, "reward.overlong_penalty": 0.5}))
    responses = [one for row in metrics.read(tmp_path / "a" / "rollouts.jsonl") for one in row["responses"]]
    want = [0.5 * float(loss.overlong(one["token_count"], 12, 8)) for one in responses]
    assert [one["value"] for one in responses] == pytest.approx(want) and min(want) == -0.5
    assert rows(tmp_path / "a")[1]["val/accuracy"] == 0


def test_gspo_clips_nothing_in_bfloat16_before_the_policy_moves(tiny_model, tmp_path):
    """Sampler and learner differ there by as much as its edges."""
    narrow = {"loss.objective": "gspo", "loss.mean": "sequence_mean", "loss.clip_low": 3e-4, "loss.clip_high": 4e-4}
    one = {"run.steps": 1, "update.prompts_per_minibatch": 3, "learner.dtype": "bfloat16"}
    found, _ = end_of(small(tiny_model, tmp_path / "a", **narrow, **one))
    assert found[1]["clip_fraction"] == 0 < 4e-4 < found[1]["rollout/logp_mismatch"]


def test_what_is_left_of_a_batch_is_shared_by_its_optimizer_steps(monkeypatch):
    monkeypatch.setattr(train, "pack", lambda run, groups: list(groups))
    run = SimpleNamespace(config=config.TrainConfig(update=config.Update(prompts_per_minibatch=4)))
    groups = [SimpleNamespace(advantages=np.ones(2), number=i) for i in range(13)]
    sizes = lambda n: [len(part) for part in train.pack_minibatches(run, groups[:n])]  # noqa: E731
    assert [sizes(n) for n in (0, 1, 4, 5, 8, 9, 13)] == [[], [1], [4], [2, 3], [4, 4], [3, 3, 3], [3, 3, 3, 4]]
    assert [g.number for part in train.pack_minibatches(run, groups) for g in part] == list(range(13))


def test_joined_batches_take_the_time_that_they_took(tiny_model, tmp_path, monkeypatch):
    """Three batches a step: seconds of sampling are those of all, each counted once."""
    told, joined = [], batch.joined

    def watched(batches):
        told.append((len(batches), sum(one.seconds for one in batches)))
        return joined(batches)

    monkeypatch.setattr(batch, "joined", watched)
    options = {"reward.kind": "binary", "rollout.refills": 2, "run.steps": 1}
    found, _ = end_of(small(tiny_model, tmp_path / "a", **options))
    timed = metrics.read(tmp_path / "a" / "metrics.jsonl")[1]
    assert [count for count, _ in told] == [1, 2, 3] and found[1]["rollout/prompts"] == 9
    assert told[-1][1] == pytest.approx(timed["time/rollout"])


def test_a_group_that_differs_in_length_alone_is_replaced(tiny_model, tmp_path, capsys):
    options = {"reward.kind": "binary", "rollout.refills": 1, "reward.overlong_margin": 12, "run.steps": 1}
    found, _ = end_of(small(tiny_model, tmp_path / "a", **options))  # all wrong, so no group is any better for its length
    assert (found[1]["rollout/prompts"], found[1]["learner/prompts"]) == (6, 0) and "grad_norm" not in found[1]
    assert [row["learned"] for row in metrics.read(tmp_path / "a" / "rollouts.jsonl")] == [False] * 6
    assert "step 1: of 6 prompts 0 have responses of different reward" in " ".join(capsys.readouterr().out.split())


def test_the_objective_has_what_the_options_say():
    of_loss = {"objective": "cispo", "mean": "constant", "clip_low": 0.1, "clip_high": 0.3, "importance_cap": 2.0}
    of_loss |= {"kl_coefficient": 0.5, "kl_kind": "k1", "entropy_coefficient": 0.25}
    cfg = config.TrainConfig(loss=config.Loss(**of_loss), rollout=config.Rollout(max_response_tokens=77, temperature=0.9))
    made = train.objective_of(cfg, mesh.make(config.Mesh()), decoder.SIZES["qwen2.5-0.5b"])
    assert {name: getattr(made, "kind" if name == "objective" else name) for name in of_loss} == of_loss
    assert (made.longest, made.temperature, made.unmoved) == (77, 0.9, False)


@pytest.mark.parametrize("name", ["dapo", "dr-grpo", "gspo"])
def test_presets_of_other_algorithms_differ_from_the_papers_in_their_algorithm_alone(name):
    made = {n: config.flat(config.to_dict(config.PRESETS[config.TrainConfig][n]())) for n in (name, "tool-n1-7b")}
    changed = {field for field, value in made[name].items() if value != made["tool-n1-7b"][field]}
    assert "run.dir" in changed and {field.split(".")[0] for field in changed} <= {"run", "loss", "rollout", "reward"}
