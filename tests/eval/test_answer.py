"""The model that answers: greedy texts are the model's, what is handed out early is what is returned, and what is assumed."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data import demo, prompt
from eval import answer
from grpo_jax import inputs
from models import decoder, hf

TEMPLATE = prompt.load_template(demo.TEMPLATE)


@pytest.fixture(scope="module")
def model(tiny_model):
    return answer.open_model(inputs.load_policy(tiny_model))


def test_responses_are_those_of_the_plain_model_token_by_token(tiny_model, model):
    examples = demo.tasks(3, 0, held_out=True)
    found = answer.respond(model, examples, TEMPLATE, max_response_tokens=6)
    params = hf.load(tiny_model)[1]
    logits = jax.jit(decoder.logits, static_argnums=0)
    for example, row in zip(examples, found, strict=True):
        ids, drawn = prompt.encode(example, model.policy.tokenizer, TEMPLATE), []
        while len(drawn) < 6 and (not drawn or drawn[-1] not in model.policy.end_tokens):
            whole = np.pad(ids + drawn, (0, 256 - len(ids + drawn)))[None]  # of one length: compiled once
            at = len(ids + drawn)
            drawn.append(int(logits(model.policy.model, params, jnp.asarray(whole), jnp.array([at]))[0, at - 1].argmax()))
        ended = drawn[-1] in model.policy.end_tokens
        assert [(r.token_count, r.truncated) for r in row] == [(len(drawn), not ended)]
        assert row[0].text == model.policy.tokenizer.decode(drawn[: len(drawn) - ended])


def test_each_response_is_handed_out_with_its_prompt_as_soon_as_it_is_there(model):
    """Those without room first; the others are what is returned at the end."""
    examples = demo.tasks(6, 0, held_out=True)
    encoded = [prompt.encode(example, model.policy.tokenizer, TEMPLATE) for example in examples]
    room = sorted(map(len, encoded))[3]
    short = replace(model, policy=replace(model.policy, model=replace(model.policy.model, max_positions=room + 4)))
    told, shown = [], []

    def finished(place, text, responses):
        told.append((place, len(shown), responses))
        assert text == model.policy.tokenizer.decode(encoded[place])

    progress = lambda done, total: shown.append(done)  # noqa: E731
    found = answer.respond(short, examples, TEMPLATE, 4, rows=2, progress=progress, finished=finished)
    assert {place: responses for place, _, responses in told} == dict(enumerate(found))
    assert len(told) == 6 and [bool(responses) for *_, responses in told] == sorted(bool(responses) for responses in found)
    assert not all(found) and [calls for _, calls, _ in told][-1] > 0


def test_samples_do_not_depend_on_which_examples_are_asked(model):
    """With the attempts of all: the second of two equal ones gets its own, alone or beside the first."""
    [example] = demo.tasks(1, 0, held_out=True)
    sampled = dict(max_response_tokens=12, temperature=3.0)
    first, second = answer.respond(model, [example] * 2, TEMPLATE, attempts=[0, 1], **sampled)
    assert first != second
    assert answer.respond(model, [example], TEMPLATE, attempts=[1], **sampled) == [second]


def test_the_template_is_that_of_the_run_unless_one_is_given(tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("mine {tools}")
    folder = tmp_path / "run"
    (folder / "hf").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"data": {"template": str(own)}}))

    def text(model, path, template=None):
        return answer.template_of(str(model), template, demo=path == "demo")

    assert text(folder, "rows.jsonl") == text(folder, "demo") == "mine {tools}"
    assert text(folder, "rows.jsonl", str(demo.TEMPLATE)) == TEMPLATE == text("a/model", "demo")
    assert text("a/model", "rows.jsonl") == prompt.load_template()


def test_the_length_of_responses_is_the_runs_or_what_the_context_leaves(tmp_path, model):
    examples, policy = demo.tasks(5, 0, held_out=True), model.policy
    longest = max(len(prompt.encode(example, policy.tokenizer, TEMPLATE)) for example in examples)

    def tokens(context, path="a/model"):
        changed = replace(policy, model=replace(policy.model, max_positions=context))
        return answer.response_tokens(str(path), changed, examples, TEMPLATE)

    assert tokens(100_000) == answer.MOST_TOKENS and tokens(longest + 4000) == 4000
    assert tokens(longest + 10) == (longest + 10) // 2
    unknown = replace(policy, model=replace(policy.model, max_positions=1000))
    assert answer.response_tokens("a/model", unknown, (), TEMPLATE) == 500
    (tmp_path / "hf").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"rollout": {"max_response_tokens": 123}}))
    assert tokens(100_000, tmp_path) == 123
    (tmp_path / "config.json").write_text(json.dumps({"batch": {"max_tokens": 7}}))  # a supervised run's
    assert tokens(100_000, tmp_path) == answer.MOST_TOKENS
