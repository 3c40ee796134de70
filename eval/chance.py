"""How much of a score, or of a difference between two, may be chance: bootstrap intervals over items, McNemar's exact test.

The bootstrap draws the items of each category anew, with replacement (stratified). An item is right or wrong, so the number of
right ones among the n drawn is Binomial(n, right / n), and of pairs of replies to one item the four numbers (both right, won,
lost, neither) are multinomial. Drawing these is the bootstrap over items, not an approximation of it, and takes milliseconds.
All draws go as arrays through the benchmark's own `aggregates`, so that the interval of a mean is that of its formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

DRAWS = 10_000
SEED = 0
TAILS = (0.025, 0.975)  # a 95 % interval, by percentiles
ALL = "all items"

Counts = Mapping[str, tuple[Any, int]]  # category: (right, all); right may be an array [DRAWS]
Aggregates = Callable[[Counts], dict[str, Any]]  # eval.bfcl.aggregates and the like


class Pairs(NamedTuple):
    """Of items that two models answered: how many went which way."""

    both: int  # right in both
    won: int  # wrong in the base, right in the other
    lost: int  # right in the base, wrong in the other
    neither: int


def shares(counts: Counts, aggregates: Aggregates) -> dict[str, Any]:
    """Shares of 1: of each category that has items, of all items alike (ALL), and the benchmark's own means."""
    counts = {category: (right, total) for category, (right, total) in counts.items() if total}
    found = {category: right / total for category, (right, total) in counts.items()}
    total = sum(total for _, total in counts.values())
    return found | ({ALL: sum(right for right, _ in counts.values()) / total} if total else {}) | aggregates(counts)


def intervals(counts: Counts, aggregates: Aggregates) -> dict[str, tuple[float, float]]:
    """The 95 % bootstrap interval (low, high) of each of `shares`. The same for the same counts."""
    chance = np.random.default_rng(SEED)
    drawn = {name: (chance.binomial(total, right / total, DRAWS), total) for name, (right, total) in counts.items() if total}
    return {name: _ends(draws) for name, draws in shares(drawn, aggregates).items()}


def differences(pairs: Mapping[str, Pairs], aggregates: Aggregates) -> dict[str, tuple[float, float, float]]:
    """(difference, low, high) of each of `shares`, the other model's minus the base's, with its paired bootstrap interval."""
    chance = np.random.default_rng(SEED)
    sizes = {name: sum(some) for name, some in pairs.items() if sum(some)}
    drawn = {name: chance.multinomial(size, np.array(pairs[name]) / size, DRAWS).T for name, size in sizes.items()}
    found, draws = (_difference(cells, sizes, aggregates) for cells in (pairs, drawn))
    return {name: (found[name], *_ends(draws[name])) for name in found}


def mcnemar(won: int, lost: int) -> float:
    """The exact two-sided p-value of McNemar's test.

    Were the two models equally good, each item on which they differ would be won or lost like the toss of a coin. This is the
    probability that tosses come out at least as unequal as these: twice P(X <= min(won, lost)) for X ~ Binomial(won + lost,
    1/2), and at most 1. Summed in whole numbers, so exact up to the last rounding.
    """
    tosses = won + lost
    ways = term = 1
    for heads in range(min(won, lost)):
        term = term * (tosses - heads) // (heads + 1)
        ways += term
    return min(1.0, 2 * ways / 2**tosses)


def _difference(pairs: Mapping[str, Any], sizes: Mapping[str, int], aggregates: Aggregates) -> dict[str, Any]:
    base, other = {}, {}
    for name, size in sizes.items():
        both, won, lost, _ = pairs[name]
        base[name], other[name] = (both + lost, size), (both + won, size)
    before, after = shares(base, aggregates), shares(other, aggregates)
    return {name: after[name] - before[name] for name in before}


def _ends(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(draws, TAILS)
    return float(low), float(high)
