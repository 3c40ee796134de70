"""Grouped sampling: every prompt is prefilled once, all its responses read that one cache.

    sample     prompts -> Groups; the event loop on the host, over one pool of at most `Sampling.rows` response rows
    _admit     between two decode calls: rows that ended leave, rows from the queue take their places
    _prefill   prompts whose first response enters -> prompt cache and last hidden states
    _decode    a static number of tokens of every row in one jitted call
    pool_size  how many rows the memory of a device holds

The dense layers run over *rows* (responses), not groups: rows of one group enter and end at different times. Which row reads
which prompt is said by `RowSlots`. The host looks at the tokens once a call; who then sits where is decided in
grpo_jax.seating. Prompts queue longest first, so that the prompt cache only gets narrower. Replacing rows changes small
arrays only; caches are copied (`_repack`) when the shape of the pool changes.

Randomness: the key of a token is a fold of (seed, step, hash of the prompt's ids, sample, attempt, position in the
response). No key depends on a batch, a place or a device, so neither does a sample (on one kind of hardware), and a row that
had to leave for want of memory is drawn again alike.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from grpo_jax import hosts, seating
from grpo_jax import mesh as meshes
from grpo_jax.group import Group
from grpo_jax.packing import bucket
from grpo_jax.seating import Limits, Name, Shape, Swap
from models import attention, decoder
from models.attention import PromptCache, ResponseCache, RowSlots, wide
from models.decoder import DecoderConfig, Params

_PREFILL_TOKENS = 16384  # prompt tokens that one call prefills on a device; bounds its attention scores


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
    rows: int = 128  # responses decoded at once
    cache_bytes: int | None = None  # of all caches, on each device; None: no bound


@dataclass(frozen=True)
class Usage:
    """What a rollout took: row-steps computed, and those that made a token of a response."""

    row_steps: int
    tokens: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Pool:
    """What the device keeps between calls, of B rows over N prompts."""

    hidden: Array  # [B, D]  of each row's last token
    last: Array  # [N, D]  of each prompt's last token: where its responses begin
    prompts: PromptCache
    responses: ResponseCache  # its lengths are those of the last call


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Seats:
    """What the host says of the rows at each call. An idle row reads some prompt from position 0; nobody looks at it."""

    key: Array  # uint32 [B, words]  random key of each row
    length: Array  # int32 [B]  tokens drawn so far
    group: Array  # int32 [B]  place of the prompt
    slots: RowSlots


@dataclass
class _Book:
    """The host's account of a rollout."""

    waiting: deque[Name]
    unfinished: list[int]  # responses of each prompt that have not ended
    live: dict[Name, int] = field(default_factory=dict)  # responses in the pool -> tokens drawn
    seats: list[Name | None] = field(default_factory=list)  # of the rows; an ended one keeps its seat until the next call
    shape: Shape | None = None
    places: dict[int, int] = field(default_factory=dict)  # of the cached prompts
    tokens: dict[Name, list[np.ndarray]] = field(default_factory=dict)  # in pieces, one a call
    logp: dict[Name, list[np.ndarray]] = field(default_factory=dict)
    truncated: dict[Name, bool] = field(default_factory=dict)  # of the responses that have ended
    row_steps: int = 0


@dataclass(frozen=True)
class _Job:
    """What holds during a rollout. Prompts are counted by rank, in the order of the queue."""

    config: DecoderConfig
    params: Params
    sampling: Sampling
    prompts: list[np.ndarray]
    imposed: list[Sequence[int]] | None
    keys: np.ndarray  # [N, G, words]
    limits: Limits
    mesh: Mesh | None
    kernel: str  # of attention in learning; prompts take it too where it is a fused one

    def room(self, name: Name) -> int:
        """Tokens that the response may have."""
        return self.sampling.max_response_tokens if self.imposed is None else self.imposed[name[0]][name[1]]


def sample(
    config: DecoderConfig,
    params: Params,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    *,
    seed: int = 0,
    step: int = 0,
    mesh: Mesh | None = None,
    kernel: str = "tiles",
    attempts: Sequence[int] | None = None,
    lengths: Sequence[Sequence[int]] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    finished: Callable[[int, Group], None] = lambda index, group: None,
) -> tuple[list[Group], Usage]:
    """Samples `group_size` responses to each prompt (int32 ids [P]); returns the groups in the order of the prompts.

    With a mesh, rows and prompts are split over it as packs are; the parameters stay where they are (stacked, or by layer,
    which saves a copy of them: see models.decoder.by_layer). Log-probs are of the distribution that was sampled (logits /
    temperature, cut by top-k and top-p where they are on), or, when greedy, of the model's. A prompt that occurs twice gets
    other samples the second time ("attempt" in its key): `attempts` [N], by default counted within the call, are those of a
    batch of which these prompts are a part. `kernel` is that of learning (grpo_jax.inputs.attention_kernel); prompts take it
    where it is a fused one. `lengths` [N][G], for benchmarks and tests, imposes the tokens of each response: it is cut there,
    an end token before does not end it. `finished` gets each group, and the place of its prompt, as soon as its last response
    has ended. Raises ValueError for an empty prompt and for a length outside of 1 ... max_response_tokens.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError(f"prompt {[len(p) for p in prompts].index(0)} is empty: a response needs a token to follow")
    if lengths is not None and not all(1 <= r <= sampling.max_response_tokens for row in lengths for r in row):
        raise ValueError(f"imposed lengths must lie in 1 ... {sampling.max_response_tokens}, the longest response")
    if not prompts:
        return [], Usage(0, 0)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    params = params if isinstance(params["layers"], tuple) else _by_layer(params)
    if jax.default_backend() == "cpu" and (mesh is None or mesh.size == 1):
        params = decoder.halved(params)
    job = _job(config, params, prompts, sampling, order, (seed, step), mesh, kernel, attempts, lengths)
    g, total = sampling.group_size, len(prompts) * sampling.group_size
    book = _Book(deque((rank, j) for rank in range(len(prompts)) for j in range(g)), [g] * len(prompts))
    pool, groups = None, {}
    cut = (sampling.temperature, sampling.top_p, sampling.top_k)
    while book.live or book.waiting:
        pool = _admit(job, book, pool)
        pool, tokens, logp = _decode(config, cut, job.limits.steps, job.params, pool, _seats(job, book))
        for rank in _collect(job, book, np.asarray(tokens), np.asarray(logp)):  # waits for the device
            groups[order[rank]] = _group(job, book, rank)
            finished(order[rank], groups[order[rank]])
        progress(len(book.truncated), total)
    in_order = [groups[i] for i in range(len(prompts))]
    return in_order, Usage(book.row_steps, sum(group.response_tokens for group in in_order))


def _job(config, params, prompts, sampling, order, origin, mesh, kernel, attempts, lengths) -> _Job:
    """See `sample`; `order` has the indices of the prompts as they queue."""
    n, g, limit = len(prompts), sampling.group_size, sampling.max_response_tokens
    steps = min(sampling.decode_steps_per_call, limit)
    shards = 1 if mesh is None else meshes.shards(mesh)
    token = cache_bytes_a_token(config, params["embed"].dtype)
    fits = None if sampling.cache_bytes is None else sampling.cache_bytes * shards // token
    limits = Limits(min(sampling.rows, n * g), n, seating.widths(limit, steps), steps, shards, fits)
    attempts = attempts_of(prompts) if attempts is None else attempts
    hashes = [np.frombuffer(_digest(prompt)[:8], "<u4") for prompt in prompts]
    words = np.array([[*hashes[i], j, attempts[i]] for i in order for j in range(g)], np.uint32).reshape(-1, 4)
    keys = np.asarray(_row_keys(origin, words)).reshape(n, g, -1)
    imposed = None if lengths is None else [lengths[i] for i in order]
    return _Job(config, params, sampling, [prompts[i] for i in order], imposed, keys, limits, mesh, kernel)


def _digest(prompt: np.ndarray) -> bytes:
    return hashlib.sha256(np.asarray(prompt, np.int32).tobytes()).digest()


def attempts_of(prompts: Sequence[np.ndarray]) -> list[int]:
    """Of each prompt, how often it has occurred before in this batch."""
    seen: Counter[bytes] = Counter()
    attempts = []
    for prompt in prompts:
        attempts.append(seen[_digest(prompt)])
        seen[_digest(prompt)] += 1
    return attempts


@jax.jit
def _row_keys(origin: tuple[int, int], words: Array) -> Array:
    """The key of each row, as data: words [B, 4] = two of the prompt's hash, sample, attempt. A token folds in its position."""
    key = functools.reduce(jax.random.fold_in, origin, jax.random.key(0))
    return jax.random.key_data(jax.vmap(lambda w: functools.reduce(jax.random.fold_in, w, key))(words))


# ---------------------------------------------------------------- between two calls


def _admit(job: _Job, book: _Book, pool: _Pool | None) -> _Pool:
    """Lets rows in, and out where memory is short; brings the pool to the shape that they need."""
    lengths = [len(prompt) for prompt in job.prompts]
    shape, entering, leaving = seating.admit(book.shape, book.live, book.waiting, book.places, lengths, job.limits)
    for name in leaving:
        del book.live[name]
    book.waiting.extendleft(sorted(leaving, reverse=True))
    for name in entering:
        book.waiting.popleft()
        book.live[name], book.tokens[name], book.logp[name] = 0, [], []
    before, was = book.shape, {name: row for row, name in enumerate(book.seats) if name is not None}
    needs = {name: job.limits.need(length) for name, length in book.live.items()}
    book.seats, swaps = seating.reseat(book.seats, before, shape, needs)
    book.shape = shape

    if pool is None:
        pool = _empty(job, shape)
    elif (shape.prompts, shape.width) != (before.prompts, before.width):
        pool = _repack_prompts(book, pool, shape)
    pool = _prefill_new(job, book, pool)
    # Rows on their way through the queue have a place in `was` only if they never left it.
    fresh = len(pool.hidden)
    source = [0 if n is None else was[n] if book.live[n] else fresh + book.places[n[0]] for n in book.seats]
    responses = pool.responses
    if before is not None and before.bands != shape.bands:
        responses = _repack(responses, *_rows_of_bands([min(s, fresh - 1) for s in source], shape, job.limits))
    for swap in swaps:
        responses = _swap_rows(responses, shape, swap)
    return _place(job, replace(pool, hidden=_arrange(pool.hidden, pool.last, np.int32(source)), responses=responses))


def _prefill_new(job: _Job, book: _Book, pool: _Pool) -> _Pool:
    """Computes the prompts whose first response enters; of several at once, in calls of a power of two prompts."""
    new = sorted({rank for rank, _ in book.live} - book.places.keys())  # longest first
    taken, shards = set(book.places.values()), job.limits.shards
    free = [place for place in range(len(pool.last)) if place not in taken]
    split = None if job.mesh is None else meshes.rows(job.mesh)
    while new:
        width = bucket(len(job.prompts[new[0]]), 2)
        units = max(1, min(-(-len(new) // shards), _PREFILL_TOKENS // width))
        size = shards * 2 ** (units.bit_length() - 1)
        tokens, lengths = np.zeros((size, width), np.int32), np.ones(size, np.int32)
        places = np.full(size, len(pool.last), np.int32)  # out of range: what pads the call is dropped
        for i, rank in enumerate(new[:size]):
            prompt = job.prompts[rank]
            tokens[i, : len(prompt)], lengths[i] = prompt, len(prompt)
            places[i] = book.places[rank] = free.pop(0)
        new = new[size:]
        kernel = prefill_kernel(job.kernel, width)
        made = _prefill(job.config, kernel, job.mesh, job.params, *jax.device_put((tokens, lengths), split))
        prompts, last = _store(pool.prompts, pool.last, *made, places)
        pool = replace(pool, prompts=prompts, last=last)
    return pool


def prefill_kernel(kernel: str, width: int) -> str:
    """The kernel for prompts of that width, from that for packs: tiles are for packs, and splash wants multiples of 128."""
    return kernel if kernel == "cudnn" or (kernel == "splash" and width % 128 == 0) else "plain"


def _seats(job: _Job, book: _Book) -> _Seats:
    """Of the rows as they sit now."""
    b, g, shape = len(book.seats), job.sampling.group_size, book.shape
    key, length = np.zeros((b, job.keys.shape[2]), np.uint32), np.zeros(b, np.int32)
    group, slot, row = np.zeros(b, np.int32), np.zeros(b, np.int32), np.full((shape.prompts, g), b, np.int32)
    for at, name in enumerate(book.seats):
        if name is not None:
            (rank, j), place = name, book.places[name[0]]
            key[at], length[at], group[at], slot[at], row[place, j] = (
                job.keys[rank, j],
                book.live[name],
                place,
                place * g + j,
                at,
            )
    return _Seats(key, length, group, RowSlots(row, slot))


def _collect(job: _Job, book: _Book, tokens: np.ndarray, logp: np.ndarray) -> list[int]:
    """Adds what one call drew, [steps, B], to the responses; those that end leave the account of the live ones.

    Returns the prompts whose last response ended.
    """
    steps, ended = len(tokens), []
    book.row_steps += tokens.size
    is_end = np.isin(tokens, job.sampling.end_tokens if job.imposed is None else ())
    upto_end = np.where(is_end.any(0), is_end.argmax(0) + 1, steps + 1).tolist()
    tokens, logp = np.ascontiguousarray(tokens.T), np.ascontiguousarray(logp.T)
    for at, name in enumerate(book.seats):
        if name is None:
            continue
        room = job.room(name) - book.live[name]
        taken = min(upto_end[at], room, steps)
        book.tokens[name].append(tokens[at, :taken])
        book.logp[name].append(logp[at, :taken])
        book.live[name] += taken
        if taken == upto_end[at] or taken == room:
            book.truncated[name] = taken != upto_end[at]
            del book.live[name]
            book.unfinished[name[0]] -= 1
            if not book.unfinished[name[0]]:
                del book.places[name[0]]  # the prompt's cache leaves with its last response
                ended.append(name[0])
    return ended


def _group(job: _Job, book: _Book, rank: int) -> Group:
    names = [(rank, j) for j in range(job.sampling.group_size)]
    return Group(
        np.asarray(job.prompts[rank], np.int32),
        tuple(np.concatenate(book.tokens[n]) for n in names),
        tuple(np.concatenate(book.logp[n]) for n in names),
        tuple(book.truncated[n] for n in names),
    )


# ---------------------------------------------------------------- on the device


_TOKENS = (3, 2)  # the axis of the tokens in cached keys and in cached values


def _upto(axis: int, width: int) -> tuple[slice, ...]:
    """Of rows of a cache whose tokens lie along `axis`: the first `width` tokens."""
    return (slice(None),) * (axis - 1) + (slice(width),)


def _empty(job: _Job, shape: Shape) -> _Pool:
    config, dtype = job.config, job.params["embed"].dtype
    layers = range(config.layers)

    def zeros(axis, n, tokens):
        size = {axis: tokens, 5 - axis: config.head_dim}
        return jnp.zeros((n, config.kv_heads, size[2], size[3]), dtype)

    sizes = [(b, w) for b, w in zip(shape.bands, job.limits.widths, strict=True) if b]
    # Each is a buffer of its own, none one twice: the pool is donated.
    caches = (tuple(zeros(axis, shape.prompts, shape.width) for _ in layers) for axis in _TOKENS)
    prompts, rows = PromptCache(*caches, jnp.ones(shape.prompts, jnp.int32)), sum(shape.bands)
    caches = (tuple(tuple(zeros(axis, *size) for size in sizes) for _ in layers) for axis in _TOKENS)
    responses = ResponseCache(*caches, jnp.zeros(rows, jnp.int32))
    return _Pool(
        jnp.zeros((rows, config.d_model), dtype), jnp.zeros((shape.prompts, config.d_model), dtype), prompts, responses
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(
    config: DecoderConfig, kernel: str, mesh: Mesh | None, params: Params, tokens: Array, lengths: Array
) -> tuple[PromptCache, Array]:
    causal = meshes.by_rows(functools.partial(attention.in_rows, kernel=kernel), mesh, (config.heads, config.kv_heads))
    return decoder.prefill(config, params, tokens, lengths, causal)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _store(prompts: PromptCache, last: Array, new: PromptCache, hidden: Array, places: Array) -> tuple[PromptCache, Array]:
    """Writes prompts into their places; out of range: nowhere."""

    def stored(caches, parts, axis):
        at = [cache.at[places, *_upto(axis, part.shape[axis])] for cache, part in zip(caches, parts, strict=True)]
        return tuple(x.set(part, mode="drop") for x, part in zip(at, parts, strict=True))

    k, v = map(stored, (prompts.k, prompts.v), (new.k, new.v), _TOKENS)
    length = prompts.length.at[places].set(new.length, mode="drop")
    return PromptCache(k, v, length), last.at[places].set(hidden, mode="drop")


@jax.jit
def _arrange(hidden: Array, last: Array, source: Array) -> Array:
    """The hidden state that each row goes on from: that of a row of the last call, or, counted on from these, of a prompt."""
    return jnp.concatenate([hidden, last])[source]


_by_layer = jax.jit(decoder.by_layer)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _decode(
    config: DecoderConfig, cut: tuple[float, float, int], steps: int, params: Params, pool: _Pool, seats: _Seats
) -> tuple[_Pool, Array, Array]:
    """Draws `steps` tokens for every row: (pool, tokens [steps, B], logp [steps, B]). The pool is donated.

    `cut` is (temperature, top_p, top_k), and not all of `Sampling`: nothing else of it should compile this again.
    """
    keys = jax.random.wrap_key_data(seats.key)
    # Of all steps at once: inside the loop, XLA on CPU would make a token's angles anew for each of its heads and layers.
    positions = pool.prompts.length[seats.group] + seats.length + jnp.arange(steps)[:, None]

    def one(carry, rotations):
        hidden, responses = carry
        token, logp = choose(decoder.unembed(params, hidden), jax.vmap(jax.random.fold_in)(keys, responses.length), *cut)
        hidden, responses = decoder.decode_step(config, params, token, rotations, pool.prompts, responses, seats.slots)
        return (hidden, responses), (token, logp)

    begin = pool.hidden, replace(pool.responses, length=seats.length)
    (hidden, responses), (tokens, logp) = jax.lax.scan(one, begin, decoder.rotation(config, positions))
    return replace(pool, hidden=hidden, responses=responses), tokens, logp


def _resized(cache: Array, width: int, axis: int) -> Array:
    """A cache whose tokens lie along `axis`, with `width` of them; what is cut off is not in use."""
    cache = cache[:, *_upto(axis, width)]
    pads = [(0, 0)] * 4
    pads[axis] = (0, width - cache.shape[axis])
    return jnp.pad(cache, pads)


@functools.partial(jax.jit, static_argnums=2)
def _repack(responses: ResponseCache, rows: tuple[Array, ...], widths: tuple[int, ...]) -> ResponseCache:
    """Bands of other sizes: `rows` has, for each place of each band, the present row (over all bands) that moves there."""

    def gathered(bands, index, width, axis):
        start, found = 0, None
        for band in bands:
            here = _resized(band[jnp.clip(index - start, 0, band.shape[0] - 1)], width, axis)
            found = here if found is None else jnp.where((index >= start)[:, None, None, None], here, found)
            start += band.shape[0]
        return found

    def repacked(layers, axis):
        return tuple(tuple(gathered(bands, r, w, axis) for r, w in zip(rows, widths, strict=True)) for bands in layers)

    k, v = map(repacked, (responses.k, responses.v), _TOKENS)
    return ResponseCache(k, v, jnp.zeros(sum(map(len, rows)), jnp.int32))


def _rows_of_bands(rows: Sequence[int], shape: Shape, limits: Limits) -> tuple[tuple[np.ndarray, ...], tuple[int, ...]]:
    """The rows split by the bands that are not empty, and the widths of these."""
    parts = np.split(np.array(rows, np.int32), np.cumsum(shape.bands)[:-1])
    return tuple(p for p in parts if len(p)), tuple(w for p, w in zip(parts, limits.widths, strict=True) if len(p))


def _swap_rows(responses: ResponseCache, shape: Shape, swap: Swap) -> ResponseCache:
    index = [sum(count > 0 for count in shape.bands[:band]) for band in (swap.narrow, swap.broad)]  # empty bands are not kept
    size = 4 ** max(1, math.ceil(math.log(len(swap.low), 4)))  # few sizes; the rest lies out of range and is dropped
    low, high = (np.array(x + [2**30] * (size - len(x)), np.int32) for x in (swap.low, swap.high))
    return _swap(responses, *index, low, high)


@functools.partial(jax.jit, static_argnums=(1, 2), donate_argnums=0)
def _swap(responses: ResponseCache, narrow: int, broad: int, low: Array, high: Array) -> ResponseCache:
    """Rows of two bands change places, as far as the narrow one reaches: neither row is longer than that."""

    def swapped(bands, axis):
        bands = list(bands)
        reach = _upto(axis, bands[narrow].shape[axis])
        up = bands[narrow].at[low].get(mode="fill", fill_value=0)
        down = bands[broad].at[high, *reach].get(mode="fill", fill_value=0)
        bands[narrow] = bands[narrow].at[low].set(down, mode="drop")
        bands[broad] = bands[broad].at[high, *reach].set(up, mode="drop")
        return tuple(bands)

    k, v = (tuple(swapped(bands, a) for bands in layers) for layers, a in zip((responses.k, responses.v), _TOKENS, strict=True))
    return ResponseCache(k, v, responses.length)


def _repack_prompts(book: _Book, pool: _Pool, shape: Shape) -> _Pool:
    take = np.zeros(shape.prompts, np.int32)
    take[: len(book.places)] = list(book.places.values())
    book.places = {rank: place for place, rank in enumerate(book.places)}
    prompts, last = _resize_prompts(pool.prompts, pool.last, take, shape.width)
    return replace(pool, prompts=prompts, last=last)


@functools.partial(jax.jit, static_argnums=3)
def _resize_prompts(prompts: PromptCache, last: Array, take: Array, width: int) -> tuple[PromptCache, Array]:
    k, v = (tuple(_resized(x[take], width, a) for x in each) for each, a in zip((prompts.k, prompts.v), _TOKENS, strict=True))
    return PromptCache(k, v, prompts.length[take]), last[take]


def _place(job: _Job, pool: _Pool) -> _Pool:
    """Splits rows and prompts over the mesh, and the heads of caches over `tensor`."""
    return pool if job.mesh is None else jax.device_put(pool, places(pool, job.mesh, job.config))


def places(pool: _Pool, mesh: Mesh, config: DecoderConfig) -> _Pool:
    """The sharding of every array of a pool."""
    rows, caches = meshes.rows(mesh), meshes.caches(mesh, config.kv_heads)
    return jax.tree.map(lambda x: caches if x.ndim == 4 else rows, pool)


# ---------------------------------------------------------------- how many rows


# Of the memory that is free beside weights and optimizer: changing a pool's shape holds the old caches and the new for a
# moment, and logits and activations want their part.
_CACHE_SHARE = 0.4
_ROWS, _MOST_ROWS = 128, 1024


def pool_size(
    config: DecoderConfig, dtype: str, sampling: Sampling, max_prompt_tokens: int, free: int | None, shards: int
) -> tuple[int, int | None]:
    """(`Sampling.rows`, `Sampling.cache_bytes`) for devices with `free` bytes each, over which rows are split `shards` ways.

    A row is counted with 512 tokens of its own, for responses are mostly much shorter than they may be, with its share of
    a prompt of the longest kind of which half the rows have ended, and with four copies of its logits. Where longer
    responses come together, `cache_bytes` bounds them. At most 1024 rows a device: by then decoding is bound by arithmetic.
    Where a device tells nothing of its memory (a CPU), 128 rows, for decoding is bound by arithmetic there from a few dozen
    rows on; their caches are bounded by what the host has free now, shared by its devices, and unbounded where that is not
    known (no Linux).
    """
    if free is None:
        host = hosts.free_memory()
        return _ROWS, None if host is None else int(_CACHE_SHARE * host) // shards
    own, share = min(512, sampling.max_response_tokens), -(-2 * max_prompt_tokens // sampling.group_size)
    row = (own + share) * cache_bytes_a_token(config, dtype) + 4 * 4 * config.vocab
    cache = int(_CACHE_SHARE * max(0, free))
    return shards * max(1, min(_MOST_ROWS, cache // row)), cache


def cache_bytes_a_token(config: DecoderConfig, dtype: str) -> int:
    return 2 * config.layers * config.kv_heads * config.head_dim * jnp.dtype(dtype).itemsize


# ---------------------------------------------------------------- drawing a token


def choose(logits: Array, keys: Array, temperature: float, top_p: float = 1.0, top_k: int = 0) -> tuple[Array, Array]:
    """One token a row: logits [B, V], keys [B] -> (token int32 [B], its log-prob [B] under the distribution drawn from).

    By inverting the cumulative distribution at one uniform number a row, in two levels; that takes a few passes over the
    logits, where Gumbel noise would take V random numbers. The sum it needs also gives the log-prob.
    """
    if temperature == 0:
        token = jnp.argmax(logits, -1)
        return token.astype(jnp.int32), _logp(logits, token)
    scores = _cut(logits / temperature, top_p, top_k)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - top)
    b, v = weights.shape
    block = _block(v)
    blocks = jnp.pad(weights, ((0, 0), (0, -v % block))).reshape(b, -1, block)
    sums = blocks.sum(-1)
    total = sums.sum(-1)
    u = jax.vmap(lambda key: jax.random.uniform(key, dtype=wide(logits.dtype)))(keys)
    i, rest = _invert(sums, u * total)
    j, _ = _invert(jnp.take_along_axis(blocks, i[:, None, None], 1)[:, 0], rest)
    token = i * block + j
    logp = jnp.take_along_axis(scores - top, token[:, None], -1)[:, 0] - jnp.log(total)
    return token.astype(jnp.int32), logp


def _block(v: int) -> int:
    """A size of blocks near the root of v; one that divides v where there is one, for then nothing is padded."""
    root = max(1, int(v**0.5))
    near = [d for d in range(max(1, root // 4), 4 * root + 1) if v % d == 0]
    return min(near, key=lambda d: abs(d - root), default=root)


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
