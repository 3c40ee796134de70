"""Who sits where in the pool of a rollout: plain Python over names and lengths, nothing of the device.

A pool has places for B response rows and N prompts. The places of the rows come in *bands* of growing width (tokens of
cache), so that one runaway response does not make every row's cache as wide as its own. Before each decode call

    admit     who is in the pool: rows from the queue while they fit, and the shape that they need
    reseat    which place each row takes, and which rows change places for it

Every distinct `Shape` is a compilation of the decode step, so that shapes change in coarse steps and with hysteresis. A
place may be wider than its row needs, never narrower: the spare places of a wide band serve any row.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from grpo_jax.packing import bucket

Name = tuple[int, int]  # of a response: (rank of its prompt in the queue, sample); names sort as they queue


@dataclass(frozen=True)
class Shape:
    """Of a pool's caches."""

    bands: tuple[int, ...]  # rows of each width; their sum is B
    prompts: int  # N, places of prompts
    width: int  # P, tokens of such a place


@dataclass(frozen=True)
class Limits:
    """What holds during a whole rollout."""

    rows: int  # places for rows, at most
    prompts: int  # places for prompts, at most
    widths: tuple[int, ...]  # tokens of cache of a row in each band, growing; the last holds the longest response
    steps: int  # tokens that a decode call adds
    shards: int  # counts of places are multiples of it
    cache_tokens: int | None  # that all caches of a pool may hold together; None: no bound

    def need(self, length: int) -> int:
        """The narrowest band that a row of `length` tokens can spend the next call in."""
        return bisect.bisect_left(self.widths, min(length + self.steps, self.widths[-1]))


@dataclass(frozen=True)
class Swap:
    """Rows of two bands change places: row low[i] of band `narrow` and row high[i] of band `broad`."""

    narrow: int
    broad: int
    low: list[int]
    high: list[int]


def widths(limit: int, steps: int) -> tuple[int, ...]:
    """Of the bands: from `_NARROWEST` calls' tokens up by factors of `_FACTOR` to the longest response, `limit`."""
    found = [min(limit, bucket(_NARROWEST * steps, 1))]
    while found[-1] < limit:
        found.append(min(limit, _FACTOR * found[-1]))
    return tuple(found)


# On lognormal lengths a factor of 2 reads 0.7 times the cache tokens and compiles 1.4 times the shapes (docs/log.md).
_NARROWEST, _FACTOR = 16, 4


def cache_tokens(shape: Shape, limits: Limits) -> int:
    """Tokens of cache that a pool of this shape has room for."""
    return sum(b * w for b, w in zip(shape.bands, limits.widths, strict=True)) + shape.prompts * shape.width


def admit(
    present: Shape | None,
    live: Mapping[Name, int],
    waiting: Iterable[Name],
    prompts: Mapping[int, int],
    lengths: Sequence[int],
    limits: Limits,
) -> tuple[Shape, list[Name], list[Name]]:
    """(the next shape, the waiting names that enter, the live names that go back to the queue).

    `live` maps the rows in the pool to their tokens, `prompts` the ranks of the prompts cached so far, which all have rows
    to come, to their places; `lengths` has the tokens of every prompt. Rows enter while there are places. Where the
    caches would exceed `limits.cache_tokens`, fewer enter, and then the youngest rows leave; one always stays.
    """
    rows = sorted(live, key=lambda name: (-live[name], name))
    queue = list(itertools.islice(waiting, limits.rows - len(rows) + 1))
    all_in = len(rows) + len(queue) <= limits.rows
    rows += queue[: limits.rows - len(rows)]
    alive = len(rows)
    while True:
        chosen = rows[:alive]
        needs = [limits.need(live.get(name, 0)) for name in chosen]
        cached = [lengths[rank] for rank in {*prompts, *(rank for rank, _ in chosen)}]
        liked = _shape(present, needs, cached, all_in and alive == len(rows), limits)
        for shape in (liked, _shape(None, needs, cached, True, limits)):  # hysteresis and spare places give way to the bound
            if limits.cache_tokens is None or cache_tokens(shape, limits) <= limits.cache_tokens or alive == 1:
                return shape, [name for name in chosen if name not in live], [name for name in rows[alive:] if name in live]
        alive = max(n for n in range(1, alive) if bucket(n, 2) == n)


def _shape(present: Shape | None, needs: Sequence[int], lengths: Sequence[int], all_in: bool, limits: Limits) -> Shape:
    """For rows that need these bands, and prompts of these lengths; like `present` where that does."""
    whole = lambda n: _multiple(n, limits.shards)  # noqa: E731
    at_least = [min(whole(limits.rows), whole(bucket(len(needs), 2)))]  # places in this band and the wider ones
    for j in range(1, len(limits.widths)):
        demand = sum(need >= j for need in needs)
        count = whole(bucket(max(demand, 2), 1)) if demand else 0
        held = sum(present.bands[j:]) if present else 0
        at_least.append(min(at_least[-1], held if demand <= held <= 4 * count else count))
    bands = tuple(a - b for a, b in zip(at_least, [*at_least[1:], 0], strict=True))

    n, width = len(lengths), bucket(max(lengths), 2)
    if present is None:
        # Once rows come and go, about twice the prompts have a response in the pool as when it was filled.
        places = bucket(n if all_in else 2 * n, 2)
    else:
        places = present.prompts if n <= present.prompts else bucket(n, 2)
        places = min(places, bucket(n, 1)) if all_in else places
        width = present.width if present.width // 2 < width <= present.width else width
    return Shape(bands, min(whole(places), whole(limits.prompts)), width)


def reseat(
    seats: Sequence[Name | None], before: Shape | None, after: Shape, needs: Mapping[Name, int]
) -> tuple[list[Name | None], list[Swap]]:
    """The places of the rows `needs` (name -> band), and the swaps that bring them there, in order, where bands are kept.

    `seats` are the present places, widest band last. Where the bands change, every row may have moved: the pool is copied.
    """
    if before is None or before.bands != after.bands:
        placed = sorted(needs, key=lambda name: needs[name])
        return [None] * (sum(after.bands) - len(placed)) + placed, []
    now = [name if name in needs else None for name in seats]
    starts = [0, *itertools.accumulate(after.bands)]
    swaps = []
    need_at = lambda place: -1 if now[place] is None else needs[now[place]]  # noqa: E731
    for band in range(len(after.bands) - 1, 0, -1):
        # In bands this wide there are enough places without a row that needs them; see _shape.
        rising = [p for p in range(starts[band]) if need_at(p) == band]
        free = sorted(
            (p for p in range(starts[band], len(now)) if need_at(p) < band), key=lambda p: (_band(p, starts), need_at(p))
        )
        pairs: dict[tuple[int, int], Swap] = {}
        for p, q in zip(rising, free, strict=False):
            a, b = _band(p, starts), _band(q, starts)
            swap = pairs.setdefault((a, b), Swap(a, b, [], []))
            swap.low.append(p - starts[a])
            swap.high.append(q - starts[b])
            now[p], now[q] = now[q], now[p]
        swaps += pairs.values()
    seated = set(now)
    idle = (p for p, name in enumerate(now) if name is None)
    for name, place in zip([n for n in needs if n not in seated], list(idle), strict=False):
        now[place] = name
    return now, swaps


def _band(place: int, starts: Sequence[int]) -> int:
    return bisect.bisect_right(starts, place) - 1


def _multiple(n: int, of: int) -> int:
    """n rounded up."""
    return -(-n // of) * of
