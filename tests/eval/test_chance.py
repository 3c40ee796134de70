"""Intervals are those of the bootstrap over items, means by their formula; McNemar's p is a count of coin tosses."""

import itertools
from math import comb

import numpy as np
import pytest

from eval import acebench, api_bank, bfcl, chance
from eval.chance import ALL, Pairs


def plain(counts):
    """A benchmark without means of its own."""
    return {}


def test_shares_are_the_categories_all_items_and_the_benchmarks_means():
    counts = {"simple_python": (3, 4), "simple_java": (1, 2), "simple_javascript": (0, 1), "multiple": (0, 0)}
    found = chance.shares(counts, bfcl.aggregates)
    assert found == {
        "simple_python": 0.75, "simple_java": 0.5, "simple_javascript": 0.0, ALL: 4 / 7, "simple": pytest.approx(1.25 / 3),
    }  # fmt: skip
    assert chance.shares({}, plain) == {}


@pytest.mark.parametrize("module", [bfcl, api_bank, acebench])
def test_means_of_many_draws_at_once_are_those_of_each_alone(module):
    draws = {name: (np.array([0, 1, place % 3, 3]), 3) for place, name in enumerate(module.CATEGORIES)}
    found = chance.shares(draws, module.aggregates)
    for one in range(4):
        alone = chance.shares({name: (int(right[one]), all_) for name, (right, all_) in draws.items()}, module.aggregates)
        assert {name: share[one] for name, share in found.items()} == pytest.approx(alone)


def test_an_interval_is_where_95_percent_of_the_resampled_scores_lie():
    assert chance.intervals({"a": (2, 2), "b": (0, 3)}, plain) == {"a": (1.0, 1.0), "b": (0.0, 0.0), ALL: (0.4, 0.4)}
    # of two items, one right, a quarter of the draws have none and a quarter both
    assert chance.intervals({"a": (1, 2)}, plain)["a"] == (0.0, 1.0)
    right, total = 30, 40  # the 2.5 % and 97.5 % points of Binomial(40, 3/4), by enumeration
    weights = [comb(total, k) * right**k * (total - right) ** (total - k) / total**total for k in range(total + 1)]
    below = list(itertools.accumulate(weights))
    ends = tuple(next(k for k in range(total + 1) if below[k] >= tail) / total for tail in (0.025, 0.975))
    assert chance.intervals({"a": (right, total)}, plain)["a"] == ends == (0.6, 0.875)


def test_the_interval_of_a_mean_is_that_of_items_drawn_anew_by_category():
    generator = np.random.default_rng(5)
    verdicts = {name: generator.random(20 + 7 * place) < 0.7 for place, name in enumerate(bfcl.CATEGORIES)}
    counts = {name: (int(some.sum()), len(some)) for name, some in verdicts.items()}
    drawn = []
    for _ in range(4000):
        again = {name: (int(generator.choice(some, len(some)).sum()), len(some)) for name, some in verdicts.items()}
        drawn.append(bfcl.aggregates(again)["overall"])
    low, high = np.quantile(drawn, (0.025, 0.975))
    found = chance.intervals(counts, bfcl.aggregates)["overall"]
    assert found == pytest.approx((low, high), abs=0.006)
    assert high - low > 0.05  # so that the line above can fail
    assert chance.intervals(counts, bfcl.aggregates)["overall"] == found


def test_a_difference_is_drawn_by_pairs():
    alike = {"a": Pairs(50, 0, 0, 50)}  # the same verdicts: no difference, in no draw
    assert chance.differences(alike, plain)["a"] == (0.0, 0.0, 0.0)
    before = np.repeat([1, 0, 1, 0], (40, 25, 10, 25))
    after = np.repeat([1, 1, 0, 0], (40, 25, 10, 25))
    picks = np.random.default_rng(1).integers(0, 100, (10_000, 100))
    low, high = np.quantile((after - before)[picks].mean(1), (0.025, 0.975))
    found = chance.differences({"a": Pairs(40, 25, 10, 25), "empty": Pairs(0, 0, 0, 0)}, plain)
    assert found.keys() == {"a", ALL} and found["a"] == found[ALL]
    assert found["a"] == pytest.approx((0.15, low, high), abs=0.0101)
    apart = chance.intervals({"a": (65, 100)}, plain)["a"]
    assert high - low < 2**0.5 * (apart[1] - apart[0])  # narrower than of two models on other items


def test_the_difference_of_a_mean_is_the_difference_of_the_means():
    pairs = {name: Pairs(3, place % 4, 2, 5) for place, name in enumerate(bfcl.CATEGORIES)}
    base = bfcl.aggregates({name: (p.both + p.lost, sum(p)) for name, p in pairs.items()})
    other = bfcl.aggregates({name: (p.both + p.won, sum(p)) for name, p in pairs.items()})
    found = chance.differences(pairs, bfcl.aggregates)
    for mean in ("simple", "non_live", "live", "overall"):
        difference, low, high = found[mean]
        assert difference == pytest.approx(other[mean] - base[mean]) and low < difference < high


@pytest.mark.parametrize("won, lost", [(won, lost) for won in range(7) for lost in range(7)])
def test_mcnemar_is_the_share_of_coin_tosses_at_least_as_unequal(won, lost):
    tosses = [sum(toss) for toss in itertools.product((0, 1), repeat=won + lost)]
    unequal = abs(won - lost)
    as_unequal = sum(abs(2 * heads - won - lost) >= unequal for heads in tosses)
    assert chance.mcnemar(won, lost) == as_unequal / len(tosses)


def test_mcnemar_of_many_items():
    assert chance.mcnemar(10, 2) == pytest.approx(158 / 4096)  # 2 (1 + 12 + 66) / 2^12
    assert chance.mcnemar(1200, 1300) == chance.mcnemar(1300, 1200) == pytest.approx(0.0476819, abs=1e-7)
    assert 0 <= chance.mcnemar(2501, 0) < 1e-300
