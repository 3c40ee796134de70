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
import math
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
    rows: int = 512  # responses decoded at once, in whole groups, at least one


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


_Name = tuple[int, int]  # of a response: (prompt, sample), both counted within its pool


@dataclass
class _Rows:
    """The host's account of a pool."""

    live: list[_Name | None]  # the response that each device row works on; None: the row is idle
    tokens: dict[_Name, list[int]]
    logp: dict[_Name, list[np.ndarray]]  # in pieces, one a call
    truncated: dict[_Name, bool]  # of the responses that have ended


@dataclass(frozen=True)
class _Job:
    """What all pools of one rollout share."""

    config: DecoderConfig
    params: Params
    sampling: Sampling
    origin: tuple[int, int]  # seed, step
    mesh: Mesh | None
    row_axes: tuple[str, ...]

    @property
    def shards(self) -> int:
        """Rows and prompts come in multiples of this."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[a] for a in self.row_axes)


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
    job = _Job(config, params, sampling, (seed, step), mesh, row_axes)
    identities = _identities(prompts)
    # Prompts of like length share a pool: its cache is as wide as its longest prompt.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    g, total = sampling.group_size, len(prompts) * sampling.group_size
    per_pool = max(1, sampling.rows // g)
    groups: dict[int, Group] = {}
    row_steps = 0
    for start in range(0, len(order), per_pool):
        members = order[start : start + per_pool]
        chosen, words = [prompts[i] for i in members], [identities[i] for i in members]
        made, steps = _run_pool(job, chosen, words, lambda done, before=start * g: progress(before + done, total))
        groups.update(zip(members, made, strict=True))
        row_steps += steps
    in_order = [groups[i] for i in range(len(prompts))]
    return in_order, Usage(row_steps, sum(group.response_tokens for group in in_order))


def _identities(prompts: Sequence[np.ndarray]) -> list[tuple[int, int, int]]:
    """Of each prompt: two words of the hash of its ids, and its attempt: how often it has occurred before in this call."""
    seen: Counter[bytes] = Counter()
    identities = []
    for prompt in prompts:
        digest = hashlib.sha256(np.asarray(prompt, np.int32).tobytes()).digest()
        identities.append((int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"), seen[digest]))
        seen[digest] += 1
    return identities


def _run_pool(
    job: _Job, prompts: Sequence[np.ndarray], identities: Sequence[tuple[int, int, int]], report: Callable[[int], None]
) -> tuple[list[Group], int]:
    """All responses to the prompts of one pool: (their groups, the row-steps it took). Reports the responses that ended."""
    sampling, shards = job.sampling, job.shards
    limit, cut = sampling.max_response_tokens, (sampling.temperature, sampling.top_p, sampling.top_k)
    names = [(i, j) for i in range(len(prompts)) for j in range(sampling.group_size)]
    rows = _Rows(names + [None] * (-len(names) % shards), {n: [] for n in names}, {n: [] for n in names}, {})
    chunk = min(sampling.decode_steps_per_call, limit)
    capacity = min(limit, bucket(2 * chunk, 1))
    pool = _place(job, _start(job, prompts, identities, rows.live, capacity))
    decoded = row_steps = 0
    while True:
        pool, tokens, logp = _decode(job.config, cut, chunk, job.params, pool)
        _collect(rows, np.asarray(tokens), np.asarray(logp), sampling)  # waits for the device
        decoded, row_steps = decoded + chunk, row_steps + tokens.size
        report(len(rows.truncated))
        alive = sum(name is not None for name in rows.live)
        if not alive:
            return [_group(prompt, i, sampling.group_size, rows) for i, prompt in enumerate(prompts)], row_steps
        size = min(len(rows.live), _multiple(bucket(alive, 2), shards))
        room = min(limit, 2 * capacity) if decoded + chunk > capacity else capacity
        if size < len(rows.live) or room > capacity:
            pool, rows.live = _shrink(job, pool, rows.live, size, room)
            pool, capacity = _place(job, pool), room


def _collect(rows: _Rows, tokens: np.ndarray, logp: np.ndarray, sampling: Sampling) -> None:
    """Adds what one call drew, [steps, B], to the live responses; the rows of those that end become idle."""
    is_end = np.isin(tokens, sampling.end_tokens)
    for b, name in enumerate(rows.live):
        if name is None:
            continue
        room = sampling.max_response_tokens - len(rows.tokens[name])
        ends = np.flatnonzero(is_end[:room, b])
        taken = ends[0] + 1 if len(ends) else min(room, len(tokens))
        rows.tokens[name].extend(tokens[:taken, b].tolist())
        rows.logp[name].append(logp[:taken, b])
        if len(ends) or taken == room:
            rows.truncated[name] = not len(ends)
            rows.live[b] = None


def _group(prompt: np.ndarray, i: int, g: int, rows: _Rows) -> Group:
    names = [(i, j) for j in range(g)]
    return Group(
        np.asarray(prompt, np.int32),
        tuple(np.array(rows.tokens[n], np.int32) for n in names),
        tuple(np.concatenate(rows.logp[n]) for n in names),
        tuple(rows.truncated[n] for n in names),
    )


def _multiple(n: int, of: int) -> int:
    """n rounded up."""
    return -(-n // of) * of


def _start(
    job: _Job,
    prompts: Sequence[np.ndarray],
    identities: Sequence[tuple[int, int, int]],
    live: Sequence[_Name | None],
    capacity: int,
) -> _Pool:
    """Prefills the prompts and lays out the first rows, with room for `capacity` tokens each."""
    config, b, n = job.config, len(live), _multiple(len(prompts), job.shards)
    width = bucket(max(map(len, prompts)), 2)
    at_once = min(n, _multiple(max(1, _PREFILL_TOKENS // width), job.shards))
    padded = _multiple(n, at_once)
    tokens, lengths = np.zeros((padded, width), np.int32), np.ones(padded, np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)], lengths[i] = prompt, len(prompt)
    split = None if job.mesh is None else NamedSharding(job.mesh, PartitionSpec(job.row_axes))
    parts = [
        _prefill(config, job.params, *jax.device_put((tokens[i : i + at_once], lengths[i : i + at_once]), split))
        for i in range(0, padded, at_once)
    ]
    caches, hidden = zip(*parts, strict=True)
    prompt_cache = PromptCache(
        jnp.concatenate([c.k for c in caches], 1)[:, :n],
        jnp.concatenate([c.v for c in caches], 1)[:, :n],
        jnp.asarray(lengths[:n]),
    )
    group, slots = _slots(live, range(n), job.sampling.group_size)
    words = np.zeros((b, 4), np.uint32)
    for row, name in enumerate(live):
        if name is not None:
            low, high, attempt = identities[name[0]]
            words[row] = low, high, name[1], attempt
    empty = jnp.zeros((config.layers, b, config.kv_heads, capacity, config.head_dim), prompt_cache.k.dtype)
    # Two buffers, not one twice: the pool is donated.
    responses = ResponseCache(empty, empty.copy(), jnp.zeros(b, jnp.int32))
    return _Pool(jnp.concatenate(hidden)[group], _row_keys(job.origin, words), group, slots, prompt_cache, responses)


def _slots(live: Sequence[_Name | None], prompts: Sequence[int], g: int) -> tuple[Array, RowSlots]:
    """Which prompt each row reads, for prompts cached in the order given; idle rows read the first and are never looked at."""
    place = {prompt: i for i, prompt in enumerate(prompts)}
    group, slot = np.zeros(len(live), np.int32), np.zeros(len(live), np.int32)
    row = np.full((len(prompts), g), len(live), np.int32)
    for b, name in enumerate(live):
        if name is not None:
            i = place[name[0]]
            group[b], slot[b], row[i, name[1]] = i, i * g + name[1], b
    return jnp.asarray(group), RowSlots(jnp.asarray(row), jnp.asarray(slot))


@jax.jit
def _row_keys(origin: tuple[int, int], words: Array) -> Array:
    """The key of each row: words [B, 4] = two of the prompt's hash, sample, attempt. A token folds in its position too."""
    key = functools.reduce(jax.random.fold_in, origin, jax.random.key(0))
    return jax.vmap(lambda w: functools.reduce(jax.random.fold_in, w, key))(words)


@functools.partial(jax.jit, static_argnums=0)
def _prefill(config: DecoderConfig, params: Params, tokens: Array, lengths: Array) -> tuple[PromptCache, Array]:
    return decoder.prefill(config, params, tokens, lengths)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _decode(
    config: DecoderConfig, cut: tuple[float, float, int], steps: int, params: Params, pool: _Pool
) -> tuple[_Pool, Array, Array]:
    """Draws `steps` tokens for every row: (pool, tokens [steps, B], logp [steps, B]). The pool is donated.

    `cut` is (temperature, top_p, top_k), and not all of `Sampling`: nothing else of it should compile this again.
    """

    def one(carry, _):
        hidden, responses = carry
        keys = jax.vmap(jax.random.fold_in)(pool.key, responses.length)
        token, logp = choose(decoder.unembed(params, hidden), keys, *cut)
        hidden, responses = decoder.decode_step(config, params, token, pool.group, pool.prompts, responses, pool.slots)
        return (hidden, responses), (token, logp)

    (hidden, responses), (tokens, logp) = jax.lax.scan(one, (pool.hidden, pool.responses), None, length=steps)
    return _Pool(hidden, pool.key, pool.group, pool.slots, pool.prompts, responses), tokens, logp


def _shrink(job: _Job, pool: _Pool, live: Sequence[_Name | None], b: int, capacity: int) -> tuple[_Pool, list[_Name | None]]:
    """Keeps the live rows, in b rows with room for `capacity` tokens, and the prompts that they still read."""
    kept = [i for i, name in enumerate(live) if name is not None]
    now = [live[i] for i in kept] + [None] * (b - len(kept))
    old_group = np.asarray(pool.group)
    place = {live[i][0]: int(old_group[i]) for i in kept}  # prompt -> its index in the present cache
    n = min(pool.prompts.length.shape[0], _multiple(bucket(len(place), 1), job.shards))
    group, slots = _slots(now, [*place, *[-1] * (n - len(place))], job.sampling.group_size)
    take_rows = jnp.asarray(kept + [0] * (b - len(kept)))
    take_prompts = jnp.asarray([*place.values(), *[0] * (n - len(place))])
    return _repack(pool, take_rows, take_prompts, group, slots, capacity), now


@functools.partial(jax.jit, static_argnums=5)
def _repack(pool: _Pool, take_rows: Array, take_prompts: Array, group: Array, slots: RowSlots, capacity: int) -> _Pool:
    def resized(x):  # [L, B, K, R, C]
        x = x[:, take_rows]
        return jnp.pad(x, [(0, 0)] * 3 + [(0, capacity - x.shape[3]), (0, 0)])

    prompts = PromptCache(pool.prompts.k[:, take_prompts], pool.prompts.v[:, take_prompts], pool.prompts.length[take_prompts])
    responses = ResponseCache(resized(pool.responses.k), resized(pool.responses.v), pool.responses.length[take_rows])
    return _Pool(pool.hidden[take_rows], pool.key[take_rows], group, slots, prompts, responses)


def _place(job: _Job, pool: _Pool) -> _Pool:
    """Splits rows and prompts over the mesh; the layer axis of the caches comes first."""
    if job.mesh is None:
        return pool
    lead, second = (NamedSharding(job.mesh, PartitionSpec(*axes)) for axes in ([job.row_axes], [None, job.row_axes]))
    caches = PromptCache(second, second, lead), ResponseCache(second, second, lead)
    return jax.device_put(pool, _Pool(lead, lead, lead, RowSlots(lead, lead), *caches))


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

    Never an index of weight 0, whatever rounding does.
    """
    upto = jnp.cumsum(weights, -1)
    # The target may round to below the first weight or to above the sum of all: the first or last index there is.
    passed = (upto > target[:, None]) & (weights > 0)
    last = weights.shape[-1] - 1 - jnp.argmax(weights[:, ::-1] > 0, -1)
    index = jnp.where(passed.any(-1), jnp.argmax(passed, -1), last)
    before = jnp.take_along_axis(upto - weights, index[:, None], -1)[:, 0]
    return index, target - before


def _cut(scores: Array, top_p: float, top_k: int) -> Array:
    """Scores with everything outside the top k, and then outside the smallest set of probability top_p, at -inf.

    top_p counts within the top k. Tokens that tie with the last one kept are kept too.
    """
    if top_p >= 1 and top_k <= 0:
        return scores
    ordered = jnp.sort(scores, -1)[:, ::-1]
    keep = jnp.arange(scores.shape[-1]) < (top_k if top_k > 0 else scores.shape[-1])
    if top_p < 1:  # at 1, rounding of the sum would still cut the tail
        mass = jax.nn.softmax(jnp.where(keep, ordered, -jnp.inf), -1)
        keep = keep & (jnp.cumsum(mass, -1) - mass < top_p)
    lowest = jnp.min(jnp.where(keep, ordered, jnp.inf), -1, keepdims=True)
    return jnp.where(scores >= lowest, scores, -jnp.inf)


def _logp(scores: Array, token: Array) -> Array:
    return jnp.take_along_axis(scores, token[:, None], -1)[:, 0] - jax.nn.logsumexp(scores, -1)
