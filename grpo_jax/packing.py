"""Groups to packs: whole groups laid end to end in flat rows of tokens, all micro-batches of one compiled shape.

A pack [B, T] holds in each row `[prompt | response 1 | ... | response G | next group ...]`. Index arrays say the rest:
which position a token has (responses all start where their prompt ends), which token predicts which, and what a token sees
(`models.attention.PackLayout`). All of it is made here, on the host, from lengths alone, so that every host of a cluster
builds the same packs; sizes are rounded up to few buckets, so that few shapes are compiled.

Only a group that is longer than a row by itself is split, between responses, and then its prompt is repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from grpo_jax.group import Group
from models.attention import PackLayout


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


def pack(groups: Sequence[Group], tokens_per_microbatch: int, shards: int = 1, *, tile: int = 128) -> Packed:
    """Packs groups (with advantages) into micro-batches of `shards` rows of at most `tokens_per_microbatch` tokens.

    T is the same for all of them. M, and the number of tiles that attention computes, follow each micro-batch: a row that
    holds long prompts needs more tiles, and would make all others pay for them.
    """
    parts = [part for group in groups for part in split(group, tokens_per_microbatch)]
    rows = _bins(parts, tokens_per_microbatch, shards)
    t = min(bucket(max(sum(g.tokens for g in row) for row in rows), 8), tokens_per_microbatch)
    made = sorted((_row(row, t, tile) for row in rows), key=lambda row: -row.layout.tiles.size)
    packs, launched_cells = [], 0
    for i in range(0, len(made), shards):
        some = made[i : i + shards]
        eighth = -(-t // 8)  # M is tied to T, so that the two do not multiply the number of shapes
        m = min(t, eighth * -(-max(row.mask.size for row in some) // eighth))
        tiles = bucket(max(len(row.layout.tiles) for row in some), 8)
        packs.append(jax.tree.map(lambda *x: np.stack(x), *(_widened(row, m, tiles) for row in some)))
        launched_cells += shards * tiles * tile * tile
    return Packed(
        packs,
        tokens=sum(part.tokens for part in parts),
        response_tokens=sum(part.response_tokens for part in parts),
        repeated_prompts=len(parts) - len(groups),
        launched_tokens=len(rows) * t,
        cells=sum(map(_cells, parts)),
        launched_cells=launched_cells,
    )


def _cells(group: Group) -> int:
    own = [len(group.prompt), *map(len, group.responses)]
    return sum(n * (n + 1) // 2 for n in own) + len(group.prompt) * group.response_tokens


def _row(groups: Sequence[Group], t: int, tile: int) -> Pack:
    """One flat row, without the leading B, M as large as it must be, and as many tiles as it needs."""
    tokens, positions = np.zeros(t, np.int32), np.zeros(t, np.int32)
    first, prompt, prompt_end = np.full(t, t, np.int32), np.zeros(t, np.int32), np.zeros(t, np.int32)
    tiles: set[tuple[int, int]] = set()
    m = sum(g.response_tokens for g in groups)
    source, target = np.zeros(m, np.int32), np.zeros(m, np.int32)
    logp_dtype = groups[0].sampler_logp[0].dtype if groups else np.float32
    advantage, sampler_logp = np.zeros(m, logp_dtype), np.zeros(m, logp_dtype)
    at = loss_at = 0

    def segment(ids: np.ndarray, position: int, start: int, end: int) -> slice:
        """Lays down a prompt or a response that sees the tokens [start, end) and itself."""
        here = slice(at, at + len(ids))
        tokens[here], positions[here] = ids, position + np.arange(len(ids))
        first[here], prompt[here], prompt_end[here] = at, start, end
        for i in range(at // tile, -(-here.stop // tile) if len(ids) else 0):
            tiles.update((i, j) for j in range(at // tile, i + 1))
            tiles.update((i, j) for j in range(start // tile, -(-end // tile)))
        return here

    for group in groups:
        begin, size = at, len(group.prompt)
        at = segment(group.prompt, 0, at, at).stop
        for j, ids in enumerate(group.responses):
            here, there = segment(ids, size, begin, begin + size), slice(loss_at, loss_at + len(ids))
            source[there] = np.concatenate([[begin + size - 1], np.arange(here.start, here.stop)])[: len(ids)]
            target[there] = ids
            advantage[there] = 0.0 if group.advantages is None else group.advantages[j]
            sampler_logp[there] = group.sampler_logp[j]
            at, loss_at = here.stop, there.stop
    pairs = np.array(sorted(tiles), np.int32).reshape(-1, 2)
    layout = PackLayout(first, prompt, prompt_end, pairs, tile)
    return Pack(tokens, positions, layout, source, target, np.ones(m, bool), advantage, sampler_logp, sampler_logp.copy())


def _widened(row: Pack, m: int, tiles: int) -> Pack:
    """The row with room for m response tokens and so many tiles; what is added is masked, and computes nothing."""
    fill = lambda x, to, value=0: np.pad(x, [(0, to - len(x))] + [(0, 0)] * (x.ndim - 1), constant_values=value)  # noqa: E731
    names = ("source", "target", "mask", "advantage", "sampler_logp", "old_logp")
    wide = {name: fill(getattr(row, name), m) for name in names}
    return replace(row, layout=replace(row.layout, tiles=fill(row.layout.tiles, tiles, -1)), **wide)


def place(pack: Pack, sharding: jax.sharding.Sharding | None) -> Pack:
    """The pack on the device(s), its rows split by `sharding` (over the leading axis B of every array)."""
    return jax.device_put(pack, sharding)
