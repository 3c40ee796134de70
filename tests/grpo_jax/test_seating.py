"""Who sits where: whole rollouts played on the host, with random lengths."""

from __future__ import annotations

import itertools
from collections import deque

import numpy as np
import pytest

from grpo_jax import seating
from grpo_jax.seating import Limits


def play(limits: Limits, prompts: list[int], responses: np.ndarray) -> dict[str, int]:
    """Plays a rollout, with a token of cache for each row's name, and checks every step of it; returns counts."""
    n, g = responses.shape
    waiting = deque(itertools.product(range(n), range(g)))
    live, cached, unfinished, finished = {}, {}, [g] * n, []
    shape, seats, content = None, [], []  # content: what lies in each place of the caches
    counts = {"calls": 0, "evicted": 0, "swapped": 0, "shapes": set(), "rows": 0}
    while live or waiting:
        before = shape
        shape, entering, leaving = seating.admit(before, live, waiting, cached, prompts, limits)
        assert not (entering and leaving) and entering == list(itertools.islice(waiting, len(entering)))
        oldest = max(live, key=live.get, default=None)
        for name in leaving:
            assert name != oldest
            del live[name]
        waiting.extendleft(sorted(leaving, reverse=True))
        for name in entering:
            assert name == waiting.popleft()
            live[name] = 0
        cached = {rank: 0 for rank in {*cached, *(rank for rank, _ in live)}}

        # The shape holds everything, in counts that the shards divide, and keeps to the memory where it can.
        assert len(live) <= sum(shape.bands) and len(cached) <= shape.prompts
        assert shape.width >= max(prompts[rank] for rank in cached)
        assert all(count % limits.shards == 0 for count in (*shape.bands, shape.prompts))
        if limits.cache_tokens is not None and len(live) > 1:
            assert seating.cache_tokens(shape, limits) <= limits.cache_tokens
        elif limits.cache_tokens is None:
            assert len(live) == min(limits.rows, len(live) + len(waiting))

        # Every row has one place, wide enough, and what it has cached so far is there.
        was = list(seats)
        seats, swaps = seating.reseat(was, before, shape, {name: limits.need(length) for name, length in live.items()})
        starts = [0, *itertools.accumulate(shape.bands)]
        if before is None or before.bands != shape.bands:
            content = [name if name in was else None for name in seats]
        for swap in swaps:
            assert swap.narrow < swap.broad and len(set(swap.low)) == len(set(swap.high)) == len(swap.low)
            for low, high in zip(swap.low, swap.high, strict=True):
                p, q = starts[swap.narrow] + low, starts[swap.broad] + high
                assert p < starts[swap.narrow + 1] and q < starts[swap.broad + 1]
                content[p], content[q] = content[q], content[p]
        assert sorted(name for name in seats if name) == sorted(live) and len(seats) == sum(shape.bands)
        for place, name in enumerate(seats):
            if name is not None:
                width = next(w for w, end in zip(limits.widths, starts[1:], strict=True) if place < end)
                assert width >= min(live[name] + limits.steps, limits.widths[-1])
                assert live[name] == 0 or content[place] == name
        content = list(seats)

        counts["calls"] += 1
        counts["rows"] += len(seats)
        counts["evicted"] += len(leaving)
        counts["swapped"] += sum(len(swap.low) for swap in swaps)
        counts["shapes"].add(shape)
        for name in list(live):
            live[name] += limits.steps
            if live[name] >= responses[name]:
                del live[name]
                finished.append(name)
                unfinished[name[0]] -= 1
                if not unfinished[name[0]]:
                    del cached[name[0]]
    assert sorted(finished) == list(itertools.product(range(n), range(g)))
    return counts | {"shapes": len(counts["shapes"])}


def lengths(n, g, limit, seed):
    rng = np.random.default_rng(seed)
    prompts = sorted(np.clip(np.exp(rng.normal(np.log(60), 0.5, n)), 1, 400).astype(int).tolist(), reverse=True)
    return prompts, np.clip(np.exp(rng.normal(np.log(30), 1.1, (n, g))), 1, limit).astype(int)


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("rows", [1, 3, 16, 41, 10_000])
@pytest.mark.parametrize("first, factor", [(1, 2), (2, 4), (1000, 2)])
def test_every_row_always_has_a_place_that_is_wide_enough(monkeypatch, shards, rows, first, factor):
    monkeypatch.setattr(seating, "_NARROWEST", first)
    monkeypatch.setattr(seating, "_FACTOR", factor)
    prompts, responses = lengths(30, 4, 300, seed=rows)
    limits = Limits(min(rows, 120), 30, seating.widths(300, 8), 8, shards, None)
    counts = play(limits, prompts, responses)
    assert counts["evicted"] == 0
    if first < 1000 and rows in (16, 41):
        assert counts["swapped"] > 0


@pytest.mark.parametrize("cache_tokens", [1, 2000, 4000, 8000, 40_000])
def test_the_bound_of_memory_is_kept_and_everything_ends(monkeypatch, cache_tokens):
    monkeypatch.setattr(seating, "_NARROWEST", 2)
    prompts, responses = lengths(30, 4, 300, seed=1)
    counts = play(Limits(24, 30, seating.widths(300, 8), 8, 1, cache_tokens), prompts, responses)
    assert (counts["evicted"] > 0) == (1 < cache_tokens < 8000)


def test_one_runaway_widens_few_rows():
    limits = Limits(512, 400, seating.widths(8192, 32), 32, 1, None)
    assert limits.widths == (512, 2048, 8192)
    live = {(i, 0): 100 for i in range(400)} | {(0, 1): 5000}
    shape, _, _ = seating.admit(None, live, [], {}, [64] * 400, limits)
    assert shape.bands == (510, 0, 2)
    assert seating.cache_tokens(shape, limits) < 1.2 * (512 * 512 + 400 * 64)


def test_widths():
    assert seating.widths(96, 16) == (96,)
    assert seating.widths(2048, 16) == (256, 1024, 2048)
    assert seating.widths(1, 1) == (1,)
