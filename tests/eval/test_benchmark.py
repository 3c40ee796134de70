"""Benchmarks as training takes them (--validation.benchmarks)."""

import importlib.util

import pytest

from data import demo, prompt
from eval import bfcl
from eval.benchmark import Item, for_training
from grpo_jax import benchmarks
from grpo_jax.reward import Response, Scored


def test_two_items_that_ask_the_same_are_judged_each_by_its_own():
    example = demo.tasks(1, 0, held_out=True)[0]
    items = [Item(wanted, "c", example, {"wanted": wanted}) for wanted in ("yes", "no")]
    verdict = lambda text, item: Scored(float(item.given["wanted"] in text), "heard", {})  # noqa: E731
    examples, of_responses = for_training(items, verdict)
    said = [Response("yes", 1, False), Response("yes or no", 3, False)]
    assert [[scored.value for scored in of_responses(said, one)] for one in examples] == [[1.0, 1.0], [0.0, 1.0]]
    assert [one.id for one in examples] == [example.id] * 2


@pytest.mark.skipif(importlib.util.find_spec("bfcl_eval") is None, reason=f"needs {bfcl.INSTALL}")
def test_each_category_of_bfcl_has_a_name():
    found = benchmarks.read(",".join(f"eval.bfcl:{category}" for category in bfcl.CATEGORIES))
    assert {one.name: len(one.examples) for one in found} == bfcl.SIZES
    for one in found:
        example = one.examples[0]
        right, wrong = (Response(prompt.reply(calls, ""), 9, False) for calls in (example.answer, []))
        assert [scored.value for scored in one.verdict([right, wrong], example)] == [1.0, 0.0], one.name
