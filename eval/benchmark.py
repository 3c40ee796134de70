"""What every benchmark is made of: items to answer, and what the verdict on an answer needs.

A benchmark is a module (eval.bfcl, eval.api_bank, eval.acebench) with

    CATEGORIES                          its parts, in the order of its tables
    items(...) -> list[Item]            the tasks of some categories, in the order of its files
    verdict(text, item) -> Scored       value 1.0 or 0.0, the reason, and what else its protocols count, in `parts`
    aggregates(counts) -> {name: share}     the benchmark's own means, from {category: (right, all)}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data.example import Example


@dataclass(frozen=True)
class Item:
    """One task of a benchmark."""

    id: str  # the benchmark's own
    category: str
    example: Example  # what the model is asked
    given: dict[str, Any]  # what the verdict needs besides the reply
