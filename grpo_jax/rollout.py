"""Grouped sampling: every prompt is prefilled once, all its responses read that one cache.

    sample     prompts -> Groups; the event loop on the host, in pools of at most `Sampling.rows` response rows
    _prefill   the pool's prompts -> prompt cache and last hidden states
    _decode    a static number of tokens of every row in one jitted call
    _repack    rows that ended leave, a prompt's cache leaves with its last row, the response cache grows

The dense layers run over *rows* (responses), not groups: rows of one group end at different times. Which row reads which
prompt is said by `RowSlots`. The host looks at the tokens between calls, ends rows at their end-of-turn token or at the
length limit, and repacks when the live rows fit a smaller bucket; `_Rows.live` is the seam where a pool would be refilled.

Randomness: the key of a token is a fold of (seed, step, hash of the prompt's ids, sample, attempt, position in the
response). No key depends on a batch, a bucket or a device, so neither does a sample (on one kind of hardware).
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax.group import Group
from grpo_jax.packing import bucket
from models import decoder
from models.attention import PromptCache, ResponseCache, RowSlots, wide
from models.decoder import DecoderConfig, Params

_PREFILL_TOKENS = 16384  # prompt tokens prefilled by one call; bounds its attention scores


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn."""

    end_tokens: tuple[int, ...]
    group_size: int = 1
    max_response_tokens: int = 512
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    decode_steps_per_call: int = 32
    rows: int = 512  # responses decoded at once


@dataclass(frozen=True)
class Usage:
    """What a rollout took: row-steps computed, and those that made a token of a response."""

    row_steps: int
    tokens: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Pool:
    """Device state of B rows over N prompts."""

    hidden: Array  # [B, D]  of each row's last token (at first its prompt's last)
    key: Array  # [B]  random key of each row
    group: Array  # int32 [B]  which prompt
    slots: RowSlots
    prompts: PromptCache
    responses: ResponseCache


@dataclass
class _Rows:
    """The host's account of the pool: for each device row the (group, sample) it holds, or None."""

    live: list[tuple[int, int] | None]
    tokens: dict[tuple[int, int], list[int]]
    logp: dict[tuple[int, int], list[float]]


def sample(
    config: DecoderConfig,
    params: Params,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    *,
    seed: int = 0,
    step: int = 0,
    mesh: Mesh | None = None,
    row_axes: tuple[str, ...] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Group], Usage]:
    """Samples `group_size` responses to each prompt (int32 ids [P]); returns the groups in the order of the prompts.

    With a mesh, rows and prompts are split over its axes `row_axes`; the parameters stay where they are. Log-probs are of
    the distribution that was sampled (logits / temperature, cut by top-k and top-p where they are on), or, when greedy, of
    the model's. A prompt that occurs twice in one call gets other samples the second time ("attempt" in its key).
    """
    attempts = _attempts(prompts)
    # Prompts of like length share a pool: its cache is as wide as its longest prompt.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    per_pool = max(1, sampling.rows // sampling.group_size)
    groups: list[Group | None] = [None] * len(prompts)
    used = made = 0
    for start in range(0, len(order), per_pool):
        members = order[start : start + per_pool]
        keys = [(_fingerprint(prompts[i]), attempts[i]) for i in members]
        report = lambda done, at=start: progress(at * sampling.group_size + done, len(prompts) * sampling.group_size)  # noqa: E731
        finished, steps = _run_pool(
            config, params, [prompts[i] for i in members], keys, sampling, (seed, step), mesh, row_axes, report
        )
        used += steps
        for i, group in zip(members, finished, strict=True):
            groups[i] = group
            made += group.response_tokens
    return groups, Usage(used, made)


def _fingerprint(prompt: np.ndarray) -> tuple[int, int]:
    digest = hashlib.sha256(np.asarray(prompt, np.int32).tobytes()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def _attempts(prompts: Sequence[np.ndarray]) -> list[int]:
    seen: Counter = Counter()
    attempts = []
    for prompt in prompts:
        key = np.asarray(prompt, np.int32).tobytes()
        attempts.append(seen[key])
        seen[key] += 1
    return attempts


def _run_pool(config, params, prompts, keys, sampling: Sampling, origin, mesh, row_axes, report) -> tuple[list[Group], int]:
    g, chunk, limit = sampling.group_size, sampling.decode_steps_per_call, sampling.max_response_tokens
    shards = 1 if mesh is None else int(np.prod([mesh.shape[a] for a in row_axes]))
    names = [(i, j) for i in range(len(prompts)) for j in range(g)]
    rows = _Rows(names + [None] * (-len(names) % shards), {n: [] for n in names}, {n: [] for n in names})
    capacity = min(limit, bucket(2 * chunk, 1))
    pool = _place(_start(config, params, prompts, keys, rows, sampling, origin, capacity, shards), mesh, row_axes)
    decoded = steps = 0
    ends = np.array(sampling.end_tokens)
    done: dict[tuple[int, int], bool] = {}  # -> truncated
    while True:
        pool, tokens, logp = _decode(config, sampling, chunk, params, pool)
        tokens, logp = np.asarray(tokens), np.asarray(logp)  # [chunk, B]; waits for the device
        decoded, steps = decoded + chunk, steps + tokens.size
        for b, name in enumerate(rows.live):
            if name is None:
                continue
            taken = min(chunk, limit - len(rows.tokens[name]))
            stop = np.flatnonzero(np.isin(tokens[:taken, b], ends))
            ended = len(stop) > 0
            taken = int(stop[0]) + 1 if ended else taken
            rows.tokens[name].extend(tokens[:taken, b].tolist())
            rows.logp[name].append(logp[:taken, b])
            if ended or len(rows.tokens[name]) >= limit:
                done[name] = not ended
                rows.live[b] = None
        report(len(done))
        alive = sum(name is not None for name in rows.live)
        if not alive:
            break
        wanted = -(-bucket(alive, 2) // shards) * shards
        room = min(limit, 2 * capacity) if decoded + chunk > capacity else capacity
        if wanted < len(rows.live) or room > capacity:
            pool, rows = _shrink(pool, rows, min(wanted, len(rows.live)), room, sampling, shards)
            pool, capacity = _place(pool, mesh, row_axes), room
    return [_group(prompt, i, g, rows, done) for i, prompt in enumerate(prompts)], steps


def _group(prompt, i: int, g: int, rows: _Rows, done) -> Group:
    names = [(i, j) for j in range(g)]
    return Group(
        np.asarray(prompt, np.int32),
        tuple(np.array(rows.tokens[n], np.int32) for n in names),
        tuple(np.concatenate(rows.logp[n]) for n in names),
        tuple(done[n] for n in names),
    )


def _start(config, params, prompts, keys, rows: _Rows, sampling: Sampling, origin, capacity: int, shards: int) -> _Pool:
    """Prefills the prompts and lays out the first rows."""
    g, n, b = sampling.group_size, -(-len(prompts) // shards) * shards, len(rows.live)
    width = bucket(max(map(len, prompts)), 2)
    at_once = min(n, max(1, _PREFILL_TOKENS // width))
    padded = -(-n // at_once) * at_once
    tokens, lengths = np.zeros((padded, width), np.int32), np.ones(padded, np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)], lengths[i] = prompt, len(prompt)
    parts = [_prefill(config, params, tokens[i : i + at_once], lengths[i : i + at_once]) for i in range(0, padded, at_once)]
    caches, hidden = zip(*parts, strict=True)
    prompt_cache = PromptCache(
        jnp.concatenate([c.k for c in caches], 1)[:, :n],
        jnp.concatenate([c.v for c in caches], 1)[:, :n],
        jnp.asarray(lengths[:n]),
    )
    group, slots = _slots(rows.live, list(range(n)), g)
    words = np.array(
        [(*keys[name[0]][0], name[1], keys[name[0]][1]) if name else (0, 0, 0, 0) for name in rows.live], np.uint32
    )
    empty = jnp.zeros((config.layers, b, config.kv_heads, capacity, config.head_dim), prompt_cache.k.dtype)
    # Two buffers, not one twice: the pool is donated.
    return _Pool(
        jnp.concatenate(hidden)[group],
        _row_keys(origin, words),
        group,
        slots,
        prompt_cache,
        ResponseCache(empty, empty.copy(), jnp.zeros(b, jnp.int32)),
    )


def _slots(live, groups: list[int], g: int) -> tuple[Array, RowSlots]:
    """Which prompt each row reads, for prompts kept in the order `groups`; empty rows read prompt 0 and are never looked at."""
    place = {group: i for i, group in enumerate(groups)}
    row, slot, group = (
        np.full((len(groups), g), len(live), np.int32),
        np.zeros(len(live), np.int32),
        np.zeros(len(live), np.int32),
    )
    for b, name in enumerate(live):
        if name is not None:
            i = place[name[0]]
            group[b], slot[b], row[i, name[1]] = i, i * g + name[1], b
    return jnp.asarray(group), RowSlots(jnp.asarray(row), jnp.asarray(slot))


@jax.jit
def _row_keys(origin, words: Array) -> Array:
    key = functools.reduce(jax.random.fold_in, origin, jax.random.key(0))
    return jax.vmap(lambda w: functools.reduce(jax.random.fold_in, w, key))(words)


@functools.partial(jax.jit, static_argnums=0)
def _prefill(config: DecoderConfig, params: Params, tokens: Array, lengths: Array) -> tuple[PromptCache, Array]:
    return decoder.prefill(config, params, tokens, lengths)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _decode(config: DecoderConfig, sampling: Sampling, steps: int, params: Params, pool: _Pool) -> tuple[_Pool, Array, Array]:
    """Draws `steps` tokens for every row: (pool, tokens [steps, B], logp [steps, B]). The pool is donated."""

    def one(carry, _):
        hidden, responses = carry
        keys = jax.vmap(jax.random.fold_in)(pool.key, responses.length)
        token, logp = choose(decoder.unembed(params, hidden), keys, sampling.temperature, sampling.top_p, sampling.top_k)
        hidden, responses = decoder.decode_step(config, params, token, pool.group, pool.prompts, responses, pool.slots)
        return (hidden, responses), (token, logp)

    (hidden, responses), (tokens, logp) = jax.lax.scan(one, (pool.hidden, pool.responses), None, length=steps)
    return _Pool(hidden, pool.key, pool.group, pool.slots, pool.prompts, responses), tokens, logp


def _shrink(pool: _Pool, rows: _Rows, b: int, capacity: int, sampling: Sampling, shards: int) -> tuple[_Pool, _Rows]:
    """Keeps the live rows, in b rows with room for `capacity` tokens, and the prompts that they still read."""
    kept = [i for i, name in enumerate(rows.live) if name is not None]
    live = [rows.live[i] for i in kept] + [None] * (b - len(kept))
    old_group = np.asarray(pool.group)
    place = {rows.live[i][0]: int(old_group[i]) for i in kept}  # group -> its index in the present prompt cache
    n = min(pool.prompts.length.shape[0], -(-bucket(len(place), 1) // shards) * shards)
    group, slots = _slots(live, [*place, *[-1] * (n - len(place))], sampling.group_size)
    take_rows = jnp.asarray(kept + [0] * (b - len(kept)))
    take_prompts = jnp.asarray([*place.values(), *[0] * (n - len(place))])
    return _repack(pool, take_rows, take_prompts, group, slots, capacity), _Rows(live, rows.tokens, rows.logp)


@functools.partial(jax.jit, static_argnums=5)
def _repack(pool: _Pool, take_rows: Array, take_prompts: Array, group: Array, slots: RowSlots, capacity: int) -> _Pool:
    def resized(x):  # [L, B, K, R, C]
        x = x[:, take_rows]
        return jnp.pad(x, [(0, 0)] * 3 + [(0, capacity - x.shape[3]), (0, 0)])

    prompts = PromptCache(pool.prompts.k[:, take_prompts], pool.prompts.v[:, take_prompts], pool.prompts.length[take_prompts])
    responses = ResponseCache(resized(pool.responses.k), resized(pool.responses.v), pool.responses.length[take_rows])
    return _Pool(pool.hidden[take_rows], pool.key[take_rows], group, slots, prompts, responses)


def _place(pool: _Pool, mesh: Mesh | None, row_axes: tuple[str, ...]) -> _Pool:
    """Splits rows and prompts over the mesh; the layer axis of the caches comes first."""
    if mesh is None:
        return pool
    lead, second = NamedSharding(mesh, PartitionSpec(row_axes)), NamedSharding(mesh, PartitionSpec(None, row_axes))
    return jax.device_put(
        pool,
        _Pool(
            lead,
            lead,
            lead,
            RowSlots(lead, lead),
            PromptCache(second, second, lead),
            ResponseCache(second, second, lead),
        ),
    )


# ---------------------------------------------------------------- drawing a token


def choose(logits: Array, keys: Array, temperature: float, top_p: float = 1.0, top_k: int = 0) -> tuple[Array, Array]:
    """One token a row: logits [B, V], keys [B] -> (token int32 [B], its log-prob [B] under the distribution drawn from).

    By inverting the cumulative distribution at one uniform number a row, in two levels; that takes a few passes over the
    logits, where Gumbel noise would take V random numbers.
    """
    if temperature == 0:
        token = jnp.argmax(logits, -1)
        return token.astype(jnp.int32), _logp(logits, token)
    scores = _cut(logits / temperature, top_p, top_k)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    b, v = weights.shape
    block = max(1, int(v**0.5))
    blocks = jnp.pad(weights, ((0, 0), (0, -v % block))).reshape(b, -1, block)
    sums = blocks.sum(-1)
    u = jax.vmap(lambda key: jax.random.uniform(key, dtype=wide(logits.dtype)))(keys)
    i, rest = _invert(sums, u * sums.sum(-1))
    j, _ = _invert(jnp.take_along_axis(blocks, i[:, None, None], 1)[:, 0], rest)
    token = i * block + j
    return token.astype(jnp.int32), _logp(scores, token)


def _invert(weights: Array, target: Array) -> tuple[Array, Array]:
    """The index at which the running sum of weights [B, n] passes target [B], and the target less the sum before it.

    Never an index of weight 0, whatever rounding does at the end of the sum.
    """
    upto = jnp.cumsum(weights, -1)
    index = (upto <= target[:, None]).sum(-1)
    last = weights.shape[-1] - 1 - jnp.argmax(weights[:, ::-1] > 0, -1)
    index = jnp.minimum(index, last)
    before = jnp.take_along_axis(upto - weights, index[:, None], -1)[:, 0]
    return index, target - before


def _cut(scores: Array, top_p: float, top_k: int) -> Array:
    """Scores with everything outside the top k, and outside the smallest set of probability top_p, at -inf."""
    if top_p >= 1 and top_k <= 0:
        return scores
    ordered = jnp.sort(scores, -1)[:, ::-1]
    keep = jnp.arange(scores.shape[-1]) < (top_k if top_k > 0 else scores.shape[-1])
    mass = jax.nn.softmax(jnp.where(keep, ordered, -jnp.inf), -1)
    keep = keep & (jnp.cumsum(mass, -1) - mass < top_p)
    lowest = jnp.min(jnp.where(keep, ordered, jnp.inf), -1, keepdims=True)
    return jnp.where(scores >= lowest, scores, -jnp.inf)


def _logp(scores: Array, token: Array) -> Array:
    return jnp.take_along_axis(scores, token[:, None], -1)[:, 0] - jax.nn.logsumexp(scores, -1)
