"""What a run reads: rows in the right place and order, every dropped one counted, and what does not fit refused."""

import dataclasses
import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from data import demo, prompt
from grpo_jax import config, inputs
from grpo_jax.config import Data, SftConfig, TrainConfig
from models import decoder, hf

TOOL = {"name": "weather", "description": "", "parameters": {"city": {"type": "string"}}}


def rows(count, words=1, **more):
    call = {"name": "weather", "arguments": {"city": "Oslo"}}
    return [{"query": f"Oslo {i} " * words, "tools": [TOOL], "answers": [call], **more} for i in range(count)]


def write(path, some):
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return str(path)


@pytest.fixture(scope="module")
def policy(tiny_model):
    return inputs.load_policy(tiny_model)


def load(policy, data, limit=100, **more):
    return inputs.load_tasks(replace(data, template=str(demo.TEMPLATE)), policy, 400, 0, limit, **more)


# Rows


def test_validation_rows_come_from_their_file_in_no_order_of_it(policy, tmp_path):
    train = write(tmp_path / "train.jsonl", [*rows(20), *rows(2, words=200), {**rows(1)[0], "answers": []}])
    held_out = write(tmp_path / "held_out.jsonl", [*rows(30, source="held out"), {"query": "no tools"}, 5])
    data = Data(path=train, validation_path=held_out)
    tasks = load(policy, data)
    assert len(tasks.train) == 20 and len(tasks.validation) == 30
    assert {task.example.source for task in tasks.validation} == {"held out"}
    assert tasks.dropped == {"no_call": 1, "too_long": 2, "tools_do_not_parse": 1, "not_an_object": 1}
    assert tasks.summary().startswith("20 training rows, 30 for validation; dropped as ")
    assert "; dropped as too_long: 2" in tasks.summary()
    some = [task.example.messages[0]["content"] for task in load(policy, data, limit=10).validation]
    assert len(some) == 10 and some != [row["query"] for row in rows(10)]
    with pytest.raises(ValueError, match="no row to validate on is left"):
        load(policy, replace(data, validation_path=write(tmp_path / "long.jsonl", rows(3, words=200))))


def test_the_fraction_is_held_out_and_the_rest_trained_on(policy, tmp_path):
    tasks = load(policy, Data(path=write(tmp_path / "rows.jsonl", rows(20)), validation_fraction=0.25))
    assert (len(tasks.train), len(tasks.validation)) == (15, 5)
    assert len({task.example.id for task in tasks.train + tasks.validation}) == 20
    with pytest.raises(ValueError, match=r"no row to train on is left \(0 training rows.*; dropped as too_long: 3\)"):
        load(policy, Data(path=write(tmp_path / "long.jsonl", rows(3, words=200))))


def test_two_runs_of_a_share_each_have_no_row_in_common_and_all_of_them_together(policy, tmp_path):
    path = write(tmp_path / "rows.jsonl", [*rows(17), *rows(4, words=200)])  # a limit on length must not move the cut

    def ids(begin, end, path=path):
        data = Data(path=path, template=str(demo.TEMPLATE), validation_fraction=0.2, begin=begin, end=end)
        tasks = inputs.load_tasks(data, policy, 400, 3, 5)
        return [task.example.id for task in tasks.train], [task.example.id for task in tasks.validation]

    (first, held_out), (second, same) = ids(0, 0.5), ids(0.5, 1)
    assert first + second == ids(0, 1)[0] and not set(first) & set(second) and held_out == same
    assert abs(len(first) - len(second)) <= 5 and min(len(first), len(second)) >= 4
    assert [len(ids(begin, end, "demo")[0]) for begin, end in ((0, 1 / 64), (1 / 64, 1 / 16))] == [64, 192]
    with pytest.raises(ValueError, match="no row to train on is left"):
        ids(0, 0.01)


def test_training_rows_of_some_sources(policy, tmp_path):
    """Those that data.build changed are of the source they came from; validation keeps rows of all."""
    names = ["toolace", "xlam", "xlam-masked", "xlamlike"] * 10
    path = tmp_path / "rows.jsonl"
    row = {"tools": [{"name": "f"}], "answers": [{"name": "f", "arguments": {}}]}
    rows = [row | {"query": f"q {i}", "source": name} for i, name in enumerate(names)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def loaded(sources):
        return load(policy, Data(path=str(path), template=str(demo.TEMPLATE), sources=sources), limit=100)

    sources = lambda tasks: {task.example.source for task in tasks}  # noqa: E731
    every, some = loaded(None), loaded("xlam")
    assert sources(some.train) == {"xlam", "xlam-masked"}
    assert sources(loaded(" toolace, xlamlike").train) == {"toolace", "xlamlike"}
    assert [t.example.id for t in some.validation] == [t.example.id for t in every.validation]
    assert some.dropped["other_source"] == len(every.train) - len(some.train) > 10
    with pytest.raises(ValueError, match="--data.sources glaive: .* but of toolace, xlam, xlam-masked, xlamlike"):
        loaded("glaive")


@pytest.mark.parametrize("begin, end", [(-0.1, 1.0), (0.5, 0.5), (0.6, 0.4), (0.0, 1.1), (float("nan"), 1.0)])
def test_a_share_that_is_none_is_refused(begin, end):
    data = Data(path="rows", begin=begin, end=end)
    for kind in (TrainConfig, SftConfig):
        with pytest.raises(ValueError, match="give 0 <= begin < end <= 1"):
            inputs.require(kind(model=config.Model("model"), data=data))


def test_the_folder_of_a_run_stands_for_its_model(tiny_model, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="run: this run has not finished, so it has no model yet; start its own"):
        inputs.load_policy(str(run))
    (run / "hf").symlink_to(tiny_model)
    assert inputs.load_policy(str(run)).path == str(run / "hf")
    assert inputs.load_policy(tiny_model).path == tiny_model


def test_few_long_rows_are_left_out_quietly_and_many_are_warned_of(policy, tmp_path, capsys):
    for long in (5, 6):
        load(policy, Data(path=write(tmp_path / "rows.jsonl", [*rows(5), *rows(long, words=200)]), validation_fraction=0))
        shown = capsys.readouterr().out
        assert ("warning: 6 of 11 rows take more than 400 tokens" in shown) == (long == 6)


def test_targets_are_the_text_and_the_end_token_and_part_of_the_fingerprint(policy, tmp_path):
    def tasks(reasoning):
        path = write(tmp_path / "rows.jsonl", rows(3, reasoning=reasoning))
        return load(policy, Data(path=path, validation_fraction=0), with_target=True)

    first = tasks("Oslo it is.").train[0]
    text = policy.tokenizer.decode(first.target[:-1])
    assert text == prompt.target(first.example) and "Oslo it is." in text
    assert first.target[-1] == policy.tokenizer.eos_token_id
    assert tasks("Oslo it is.").fingerprint() == tasks("Oslo it is.").fingerprint() != tasks("Why not.").fingerprint()


def test_targets_may_be_the_calls_alone(policy, tmp_path):
    for extra in ({"reasoning": "Oslo it is."}, {"response": "a whole reply"}, {}):
        data = Data(path=write(tmp_path / "rows.jsonl", rows(3, **extra)), validation_fraction=0, replies="calls")
        task = load(policy, data, with_target=True).train[0]
        text = policy.tokenizer.decode(task.target[:-1])
        assert text == '<tool_call>\n[{"name": "weather", "arguments": {"city": "Oslo"}}]\n</tool_call>'


def test_a_tokenizer_without_an_end_token_takes_the_models(tiny_model):
    policy = inputs.load_policy(tiny_model)
    policy.tokenizer.eos_token = None
    example = demo.sft_rows(1, 0, 0.0)[0]
    assert inputs.target_ids(example, policy)[-1] == policy.end_tokens[0]


def test_the_demo_is_taught_with_its_thoughts(policy):
    some = load(policy, Data(path="demo"), limit=2, with_target=True).validation
    assert [policy.tokenizer.decode(task.target[:-1]) for task in some] == [demo.clean_reply(task.example) for task in some]


def test_batches_take_every_row_once_an_epoch():
    tasks = list(range(10))
    taken = [row for place in range(0, 20, 4) for row in inputs.batch(tasks, 4, 0, place)]
    assert sorted(taken[:10]) == sorted(taken[10:]) == tasks and taken[:10] != taken[10:]
    assert inputs.batch(tasks, 4, 0, 8) == taken[8:12] and inputs.batch(tasks, 4, 1, 8) != taken[8:12]
    assert inputs.batch(tasks, 7, 0, 5) == taken[5:12]
    assert Counter(inputs.batch(tasks, 25, 0, 0)).most_common()[0][1] == 3


def test_steps_are_given_or_what_the_epochs_take():
    assert inputs.steps_of(config.Run(steps=3, epochs=9.0), 100, 10) == 3
    assert inputs.steps_of(config.Run(epochs=2.5), 100, 10) == 25
    assert inputs.steps_of(config.Run(epochs=0.001), 100, 10) == 1


# What does not fit


def test_a_tokenizer_that_is_larger_than_the_vocabulary_is_refused(tiny_model, tmp_path):
    model, params = hf.load(tiny_model)
    tokenizer = hf.load_tokenizer(tiny_model)
    tokenizer.add_tokens(["<|one_too_many|>"])
    hf.save(tmp_path / "model", model, params, tokenizer)
    with pytest.raises(ValueError, match=f"{model.vocab + 1} tokens in the tokenizer, {model.vocab} in the model"):
        inputs.load_policy(str(tmp_path / "model"))


def test_remat_follows_the_kernel_unless_it_is_given():
    kinds = {kernel: inputs.remat(config.Learner(), kernel) for kernel in ("tiles", "cudnn", "splash")}
    assert kinds == {"tiles": "attention", "cudnn": "full", "splash": "full"}
    assert inputs.remat(config.Learner(remat="attention"), "cudnn") == "attention"


def test_more_tokens_than_the_model_was_made_for_are_refused(policy):
    inputs.check_context(policy.path, policy.model, policy.model.max_positions, "--these")
    with pytest.raises(ValueError, match="--these allow 1,025 tokens; .* is made for 1,024; lower them"):
        inputs.check_context(policy.path, policy.model, policy.model.max_positions + 1, "--these")


@pytest.mark.parametrize("preset", [name for name in config.PRESETS[config.TrainConfig] if name != "demo"])
def test_the_lengths_of_a_preset_fit_its_model(preset):
    cfg = config.PRESETS[config.TrainConfig][preset]()
    model = decoder.SIZES[cfg.model.path.split("/")[1].lower().removeprefix("meta-").removesuffix("-instruct")]
    assert cfg.rollout.max_prompt_tokens + cfg.rollout.max_response_tokens <= model.max_positions


def test_every_number_of_the_presets_is_in_its_range_and_none_may_be_below():
    for kind, presets in config.PRESETS.items():
        for preset in presets.values():
            config.check_numbers(preset())
        for section in dataclasses.fields(kind):
            for field in dataclasses.fields(getattr(kind(), section.name)):
                value = getattr(getattr(kind(), section.name), field.name)
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    changed = replace(getattr(kind(), section.name), **{field.name: -1})
                    with pytest.raises(ValueError, match=f"--{section.name}.{field.name} -1: give a number from [01] on"):
                        config.check_numbers(replace(kind(), **{section.name: changed}))


@pytest.mark.parametrize("kind", [TrainConfig, SftConfig])
def test_what_may_be_0(kind):
    made = kind(validation=config.Validation(every=0, limit=0), optimizer=config.Optimizer(learning_rate=0, weight_decay=0.0))
    config.check_numbers(replace(made, run=config.Run(seed=0)))
    for bad in (config.Run(steps=0), config.Run(epochs=float("nan")), config.Run(epochs=float("inf"))):
        with pytest.raises(ValueError, match="--run"):
            config.check_numbers(replace(made, run=bad))


def test_prompts_are_int32(policy):
    assert load(policy, Data(path="demo"), limit=1).validation[0].prompt.dtype == np.int32


@pytest.mark.parametrize(
    "platform, dtype, head_dim, wanted",
    [
        ("cpu", "auto", 64, "tiles"),
        ("gpu", "auto", 128, "cudnn"),
        ("gpu", "float32", 128, "tiles"),
        ("gpu", "bfloat16", 160, "tiles"),
        ("tpu", "auto", 64, "splash"),
    ],
)
def test_the_kernel_of_attention_follows_the_device(monkeypatch, platform, dtype, head_dim, wanted):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    model = SimpleNamespace(head_dim=head_dim)
    assert inputs.attention_kernel(config.Learner(dtype=dtype), model) == wanted
    for kernel in ("tiles", wanted):
        assert inputs.attention_kernel(config.Learner(dtype=dtype, attention=kernel), model) == kernel
    for kernel in {"cudnn", "splash"} - {wanted}:
        with pytest.raises(ValueError, match=f"--learner.attention {kernel} (needs|computes|takes)"):
            inputs.attention_kernel(config.Learner(dtype=dtype, attention=kernel), model)
