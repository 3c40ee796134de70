"""Groups to packs: whole groups laid end to end in flat rows of tokens, all micro-batches of one compiled shape.

A pack [B, T] holds in each row `[prompt | response 1 | ... | response G | next group ...]`. Index arrays say the rest:
which position a token has (responses all start where their prompt ends), which token predicts which, and where the
rectangles of attention read (`models.attention.PackLayout`). All of it is made here, on the host, from lengths alone, so
that every host of a cluster builds the same packs; sizes are rounded up to few buckets, so that few shapes are compiled.

Only a group that is longer than a row by itself is split, between responses, and then its prompt is repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    layout: PackLayout  # rectangles of attention
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


def pack(groups: Sequence[Group], tokens_per_microbatch: int, shards: int = 1) -> Packed:
    """Packs groups (with advantages) into micro-batches of `shards` rows of at most `tokens_per_microbatch` tokens."""
    parts = [part for group in groups for part in split(group, tokens_per_microbatch)]
    rows = _bins(parts, tokens_per_microbatch, shards)
    most_responses = max((sum(g.response_tokens for g in row) for row in rows), default=0)
    t = min(bucket(max(sum(g.tokens for g in row) for row in rows), 8), tokens_per_microbatch)
    eighth = -(-t // 8)  # M is tied to T in eighths, so that the two do not multiply the number of shapes
    sizes = dict(
        t=t,
        m=min(t, eighth * -(-most_responses // eighth)),
        n=bucket(max(map(len, rows)), 4),
        g=max((len(p.responses) for p in parts), default=1),
        p=bucket(max((len(p.prompt) for p in parts), default=1), 2),
        r=bucket(max((len(r) for p in parts for r in p.responses), default=1), 2),
    )
    made = [_row(row, **sizes) for row in rows]
    packs = [jax.tree.map(lambda *x: np.stack(x), *made[i : i + shards]) for i in range(0, len(made), shards)]
    return Packed(packs, sum(p.tokens for p in parts), sum(p.response_tokens for p in parts), len(parts) - len(groups))


def _row(groups: Sequence[Group], *, t: int, m: int, n: int, g: int, p: int, r: int) -> Pack:
    """One flat row, without the leading B."""
    tokens, positions = np.zeros(t, np.int32), np.zeros(t, np.int32)
    prompt, response = np.full((n, p), t, np.int32), np.full((n, g, r), t, np.int32)
    cell = np.full(t, n * (p + g * r), np.int32)  # out of range: padding reads zeros
    source, target, mask = np.zeros(m, np.int32), np.zeros(m, np.int32), np.zeros(m, bool)
    logp_dtype = groups[0].sampler_logp[0].dtype if groups else np.float32
    advantage, sampler_logp = np.zeros(m, logp_dtype), np.zeros(m, logp_dtype)
    at = loss_at = 0
    for i, group in enumerate(groups):
        size = len(group.prompt)
        here = np.arange(at, at + size)
        tokens[here], positions[here], cell[here] = group.prompt, np.arange(size), i * p + np.arange(size)
        prompt[i, :size] = here
        at, last = at + size, at + size - 1
        for j, ids in enumerate(group.responses):
            here = np.arange(at, at + len(ids))
            tokens[here], positions[here] = ids, size + np.arange(len(ids))
            cell[here] = n * p + (i * g + j) * r + np.arange(len(ids))
            response[i, j, : len(ids)] = here
            there = slice(loss_at, loss_at + len(ids))
            source[there], target[there], mask[there] = np.concatenate([[last], here[:-1]])[: len(ids)], ids, True
            advantage[there] = 0.0 if group.advantages is None else group.advantages[j]
            sampler_logp[there] = group.sampler_logp[j]
            at, loss_at = at + len(ids), loss_at + len(ids)
    return Pack(
        tokens,
        positions,
        PackLayout(prompt, response, cell),
        source,
        target,
        mask,
        advantage,
        sampler_logp,
        sampler_logp.copy(),
    )


def place(pack: Pack, sharding: jax.sharding.Sharding | None) -> Pack:
    """The pack on the device(s), its rows split by `sharding` (over the leading axis B of every array)."""
    return jax.device_put(pack, sharding)
