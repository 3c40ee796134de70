"""Groups to packs: whole groups laid end to end in flat rows of tokens, all micro-batches of one compiled shape.

A pack [B, T] holds in each row `[prompt | response 1 | ... | response G | next group ...]`. Index arrays say the rest:
which position a token has (responses all start where their prompt ends), which token predicts which, and what a token sees
(`models.attention.PackLayout`). All of it is made here, on the host, from lengths alone, so that every host of a cluster
builds the same packs; sizes are rounded up to few buckets, so that few shapes are compiled.

Only a group that is longer than a row by itself is split, between responses, and then its prompt is repeated.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from grpo_jax.group import Group
from models.attention import KEY_TILES, PackLayout, Rows, Tiles, tile_steps


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pack:
    """One micro-batch. M counts the response tokens of a row, the only places where log-probs are wanted."""

    tokens: jax.Array  # int32 [B, T]
    positions: jax.Array  # int32 [B, T]  position within prompt + own response
    layout: PackLayout  # what attention computes
    source: jax.Array  # int32 [B, M]  index in the row of the token whose hidden state predicts ...
    target: jax.Array  # int32 [B, M]  ... this response token (the first of each response: the prompt's last token)
    mask: jax.Array  # bool [B, M]   a real response token
    response: jax.Array  # int32 [B, M]  which response of its row it belongs to: the place in M where that begins
    advantage: jax.Array  # float [B, M]
    sampler_logp: jax.Array  # float [B, M]  log-prob under the distribution that was sampled
    old_logp: jax.Array  # float [B, M]  log-prob under the policy before this step's updates; the sampler's, or recomputed
    ref_logp: jax.Array | None = None  # float [B, M]  log-prob under the reference, where a KL term wants it


@dataclass(frozen=True)
class Packed:
    """The micro-batches of a mini-batch, and what it took to make them."""

    packs: list[Pack]
    tokens: int  # real tokens, prompts counted once a row that holds them
    response_tokens: int  # places with a loss
    repeated_prompts: int  # times a prompt was repeated because its group did not fit a row
    launched_tokens: int  # places for tokens, padding included
    cells: int  # pairs of a token and a token that it sees
    launched_cells: int  # pairs of places that attention computes, for one query head in one layer


def bucket(n: int, steps: int) -> int:
    """n rounded up to one of `steps` evenly spaced sizes per power of two: at most 1/steps of padding."""
    unit = max(1, 2 ** max(0, (max(n, 1) - 1).bit_length() - 1) // steps)
    return -(-max(n, 1) // unit) * unit


def split(group: Group, row_tokens: int) -> list[Group]:
    """The group itself, or, where it is longer than a row, its parts; the prompt is repeated in each.

    Raises ValueError where the prompt and one response do not fit.
    """
    if group.tokens <= row_tokens:
        return [group]
    parts: list[list[int]] = []
    room = 0
    for i, response in enumerate(group.responses):
        if len(group.prompt) + len(response) > row_tokens:
            raise ValueError(
                f"a prompt of {len(group.prompt)} and a response of {len(response)} tokens exceed "
                f"learner.tokens_per_microbatch = {row_tokens}; raise it"
            )
        if not parts or len(response) > room:
            parts.append([])
            room = row_tokens - len(group.prompt)
        parts[-1].append(i)
        room -= len(response)
    return [_subset(group, part) for part in parts]


def _subset(group: Group, keep: list[int]) -> Group:
    pick = lambda items: tuple(items[i] for i in keep)  # noqa: E731
    advantages = None if group.advantages is None else group.advantages[keep]
    return Group(group.prompt, pick(group.responses), pick(group.sampler_logp), pick(group.truncated), advantages)


def _bins(groups: Sequence[Group], row_tokens: int, shards: int) -> list[list[Group]]:
    """Longest first into the emptiest of as few rows as hold them: rows of nearly equal length, a multiple of `shards`."""
    order = sorted(range(len(groups)), key=lambda i: (-groups[i].tokens, i))
    micro = max(1, -(-sum(g.tokens for g in groups) // (row_tokens * shards)))
    while True:
        rows: list[list[Group]] = [[] for _ in range(micro * shards)]
        load = [0] * len(rows)
        for i in order:
            lightest = load.index(min(load))
            rows[lightest].append(groups[i])
            load[lightest] += groups[i].tokens
        if max(load) <= row_tokens:
            return rows
        micro += 1


def pack(
    groups: Sequence[Group],
    tokens_per_microbatch: int,
    shards: int = 1,
    *,
    kernel: str = "tiles",
    tile: tuple[int, int] = (128, 64),
) -> Packed:
    """Packs groups (with advantages) into micro-batches of `shards` rows of at most `tokens_per_microbatch` tokens.

    `kernel` computes their attention: "tiles" (of `tile` tokens: queries, keys), or one of those that
    `models.attention.Rows` names. T is the same for all micro-batches. M and the number of steps through the tiles follow
    each one: a row that holds long prompts needs more, and would make all others pay for them. Raises ValueError for no
    groups, and as `split` does.
    """
    if not groups:
        raise ValueError("no groups to pack")
    parts = [part for group in groups for part in split(group, tokens_per_microbatch)]
    rows = _bins(parts, tokens_per_microbatch, shards)
    t = min(bucket(max(sum(g.tokens for g in row) for row in rows), 8), tokens_per_microbatch)
    if kernel == "tiles":
        layouts = [_tiles(row, t, tile) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: -len(layouts[i].steps))  # like beside like
    else:
        widths = _rectangles(rows)
        copies = max(len(group.responses) for group in parts)
        layouts, order = [_rows(row, t, widths, copies, kernel) for row in rows], range(len(rows))
    packs, launched_cells = [], 0
    for i in range(0, len(rows), shards):
        some = [(rows[j], layouts[j]) for j in order[i : i + shards]]
        eighth = -(-t // 8)  # M is tied to T, so that the two do not multiply the number of shapes
        m = min(t, eighth * -(-max(sum(g.response_tokens for g in row) for row, _ in some) // eighth))
        if kernel == "tiles":
            most = bucket(max(len(layout.steps) for _, layout in some), 8)
            some = [(row, _with_steps(layout, most)) for row, layout in some]
            launched_cells += shards * most * KEY_TILES * math.prod(tile)
        else:
            launched_cells += shards * sum(n * s * (s + 1) // 2 for s, n in widths.items())
        packs.append(jax.tree.map(lambda *x: np.stack(x), *(_row(row, layout, t, m) for row, layout in some)))
    return Packed(
        packs,
        tokens=sum(part.tokens for part in parts),
        response_tokens=sum(part.response_tokens for part in parts),
        repeated_prompts=len(parts) - len(groups),
        launched_tokens=len(rows) * t,
        cells=sum(part.cells for part in parts),
        launched_cells=launched_cells,
    )


def _places(groups: Sequence[Group]) -> list[tuple[slice, list[slice]]]:
    """Where each group's prompt and responses lie in their flat row."""
    ends = np.cumsum([0, *(len(x) for g in groups for x in (g.prompt, *g.responses))]).tolist()
    segments = iter(map(slice, ends[:-1], ends[1:]))
    return [(next(segments), [next(segments) for _ in g.responses]) for g in groups]


def _row(groups: Sequence[Group], layout: PackLayout, t: int, m: int) -> Pack:
    """One flat row, without the leading B."""
    tokens, positions = np.zeros(t, np.int32), np.zeros(t, np.int32)
    source, target, mask = np.zeros(m, np.int32), np.zeros(m, np.int32), np.zeros(m, bool)
    logp_dtype = groups[0].sampler_logp[0].dtype if groups else np.float32
    advantage, sampler_logp, response = np.zeros(m, logp_dtype), np.zeros(m, logp_dtype), np.zeros(m, np.int32)
    at = 0
    for group, (prompt, responses) in zip(groups, _places(groups), strict=True):
        size = len(group.prompt)
        tokens[prompt], positions[prompt] = group.prompt, np.arange(size)
        for j, (ids, here) in enumerate(zip(group.responses, responses, strict=True)):
            there = slice(at, at := at + len(ids))
            tokens[here], positions[here] = ids, size + np.arange(len(ids))
            source[there] = np.concatenate([[prompt.stop - 1], np.arange(here.start, here.stop)])[: len(ids)]
            target[there], mask[there], sampler_logp[there] = ids, True, group.sampler_logp[j]
            response[there] = there.start
            advantage[there] = 0.0 if group.advantages is None else group.advantages[j]
    return Pack(tokens, positions, layout, source, target, mask, response, advantage, sampler_logp, sampler_logp.copy())


def _tiles(groups: Sequence[Group], t: int, tile: tuple[int, int]) -> Tiles:
    """As many steps as the row needs."""
    first, prompt, prompt_end = np.full(t, t, np.int32), np.zeros(t, np.int32), np.zeros(t, np.int32)
    queries, keys = tile
    seen: dict[int, set[int]] = defaultdict(set)  # tile of queries -> tiles of keys
    for ours, responses in _places(groups):
        for own in (ours, *responses):
            end = ours.start if own is ours else ours.stop  # a prompt sees no prompt
            first[own], prompt[own], prompt_end[own] = own.start, ours.start, end
            for i in range(own.start // queries, -(-own.stop // queries) if own.stop > own.start else 0):
                last = min(own.stop, (i + 1) * queries)  # of the segment's tokens in this tile
                seen[i].update(range(own.start // keys, -(-last // keys)), range(ours.start // keys, -(-end // keys)))
    return Tiles(first, prompt, prompt_end, tile_steps(seen), tile)


def _with_steps(layout: Tiles, most: int) -> Tiles:
    more = most - len(layout.steps)
    return replace(layout, steps=np.pad(layout.steps, ((0, more), (0, 0)), constant_values=-1))


def _widths(group: Group) -> list[int]:
    """Of the rows [prompt | response]: multiples of 128, as splash wants it; powers of two, as each is a call of the kernel."""
    return [max(128, bucket(len(group.prompt) + len(response), 1)) for response in group.responses]


def _rectangles(rows: Sequence[Sequence[Group]]) -> dict[int, int]:
    """S -> N of the rectangles that hold the rows of any flat row, the widest first.

    A row may lie in a wider rectangle than its own: so there are as many places of at least a width as the flat row with
    most rows of that width needs, and not the sum of what different flat rows need of each.
    """
    needs = [Counter(width for group in row for width in _widths(group)) for row in rows]
    rectangles, places = {}, 0
    for s in sorted({width for need in needs for width in need}, reverse=True):
        most = bucket(max(sum(count for width, count in need.items() if width >= s) for need in needs), 2)
        if most > places:
            rectangles[s], places = most - places, most
    return rectangles


def _rows(groups: Sequence[Group], t: int, rectangles: dict[int, int], copies: int, kernel: str) -> Rows:
    """One flat row's, with room for so many `copies` of a token."""
    token = {s: np.full((n, s), t, np.int32) for s, n in rectangles.items()}
    length = {s: np.zeros(n, np.int32) for s, n in rectangles.items()}
    begins = dict(zip(rectangles, np.cumsum([0, *(x.size for x in token.values())]).tolist(), strict=False))
    cells = np.full((t, copies), sum(x.size for x in token.values()), np.int32)
    free = ((s, i) for s, n in rectangles.items() for i in range(n))
    every = [
        (width, prompt, own, j)
        for group, (prompt, responses) in zip(groups, _places(groups), strict=True)
        for j, (width, own) in enumerate(zip(_widths(group), responses, strict=True))
    ]
    for _, prompt, own, j in sorted(every, key=lambda one: -one[0]):  # the widest first
        s, i = next(free)
        size, end = prompt.stop - prompt.start, prompt.stop - prompt.start + own.stop - own.start
        begin = begins[s] + i * s
        token[s][i, :size], token[s][i, size:end], length[s][i] = np.r_[prompt], np.r_[own], end
        cells[prompt, j], cells[own, 0] = begin + np.arange(size), begin + np.arange(size, end)
    return Rows(tuple(token.values()), tuple(length.values()), cells, kernel)


def place(pack: Pack, sharding: jax.sharding.Sharding | None) -> Pack:
    """The pack on the device(s), its rows split by `sharding` (over the leading axis B of every array).

    Every host knows the whole pack and gives its own devices their rows.
    """
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), pack)
