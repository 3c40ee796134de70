"""What every benchmark is made of: items to answer, and what the verdict on an answer needs.

A benchmark is a module (eval.bfcl, eval.api_bank, eval.acebench) with

    CATEGORIES                          its parts, in the order of its tables
    items(...) -> list[Item]            the tasks of some categories, in the order of its files
    verdict(text, item) -> Scored       value 1.0 or 0.0, the reason, and what else its protocols count, in `parts`
    aggregates(counts) -> {name: share}     the benchmark's own means, from {category: (right, all)}

Training takes a function without arguments (--validation.benchmarks package.module:function). That of a benchmark whose files
are yours is two lines, in a module of your own:

    from eval import api_bank
    from eval.benchmark import for_training

    def calls():
        return for_training(api_bank.items("level-1-api.json"), api_bank.verdict)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data.example import Example
from grpo_jax.reward import Response, Reward, Scored


@dataclass(frozen=True)
class Item:
    """One task of a benchmark."""

    id: str  # the benchmark's own
    category: str
    example: Example  # what the model is asked
    given: dict[str, Any]  # what the verdict needs besides the reply


def for_training(items: Sequence[Item], verdict: Callable[[str, Item], Scored]) -> tuple[list[Example], Reward]:
    """What --validation.benchmarks wants of a function: the examples of the items, and their verdict as a reward is called.

    An example carries its item in `extra`: ids will not do, for two items may ask the same and want another reply.
    """
    examples = [replace(item.example, extra={**item.example.extra, "item": item}) for item in items]

    def of_responses(responses: Sequence[Response], example: Example) -> list[Scored]:
        return [verdict(response.text, example.extra["item"]) for response in responses]

    return examples, of_responses
