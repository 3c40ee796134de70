"""Attention over groups: a prompt is causal, a response sees its prompt and itself.

The one place that knows how attention is computed, and by which kernel:

    causal   a plain sequence, in plain XLA; the reference where it is short, by tiles where it is long
    packed   flat rows of whole groups, for learning
             Tiles   plain XLA, everywhere: a tile of the flat row's queries with a few tiles of keys that it sees, one step
                     after another, with a flash backward pass; the responses of a group share the tiles of their prompt
             Rows    fused kernels (cuDNN on NVIDIA, splash on TPU): rows [prompt | response] are gathered in here
    decode   one new token a response row, for sampling: prompt cache + own cache, where the queries of a group stand side
             by side in one matrix, so that its prompt is read once

The dense layers never see any of it: their tokens lie flat. Scores, maxima and sums are in at least float32. No
log-sum-exp of a library kernel is differentiated: `jax.nn.dot_product_attention` stops the gradient of the one it returns.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

# Finite, so that a row in which every key is masked stays free of nan; it then merges with weight exp(MASKED - m) = 0.
MASKED = -1e30
# The longest plain sequence whose scores are held at once.
SQUARE = 512
# Tiles of keys that meet a tile of queries in one step: wide products, few steps, and on drawn lengths under 30 % padding.
KEY_TILES = 4
# Under this name the outputs of a pack's attention may be kept for the backward pass (see models.decoder.hidden, `remat`).
SAVED = "attention"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tiles:
    """A pack for attention by tiles: what the tokens of flat rows [B, T] see, and where something is seen at all.

    A token sees the interval [first, itself] of its own segment (a prompt or a response) and, in a response, the interval
    [prompt, prompt_end) of its prompt. Padding has first = T and sees nothing.
    """

    first: Array  # int32 [B, T]
    prompt: Array  # int32 [B, T]
    prompt_end: Array  # int32 [B, T]
    steps: Array  # int32 [B, S, 1 + n]  a tile of queries, and n tiles of keys in which it sees something; -1 for none
    tile: tuple[int, int] = field(default=(128, 64), metadata={"static": True})  # tokens in a tile of queries, and of keys


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """A pack for kernels that know plain causal sequences only: rows [prompt | one response], in rectangles.

    The rows of a flat row lie in a few rectangles of N rows of S cells. Cells are counted through all rectangles of a flat
    row, in order.
    """

    token: tuple[Array, ...]  # int32 [B, N, S] each: the token of each cell; T where there is none
    length: tuple[Array, ...]  # int32 [B, N] each: tokens of each row
    cells: Array  # int32 [B, T, G]  the cells of each token, of a prompt one in each row of its group; beyond the last: none
    kernel: str = field(metadata={"static": True})  # "cudnn", "splash", or "plain": XLA, the reference in tests


PackLayout = Tiles | Rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PromptCache:
    """Keys and values of N prompts in every layer; each is stored once, whatever the number of its responses.

    Keys lie as columns, for products with a few queries read both as they lie then; a library would transpose them first.
    """

    k: tuple[Array, ...]  # L arrays [N, K, C, P]
    v: tuple[Array, ...]  # L arrays [N, K, P, C]
    length: Array  # int32 [N]  tokens of each prompt


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ResponseCache:
    """Keys and values of the response tokens decoded so far, one row a response, in bands of rows with room for R tokens.

    The rows of the bands follow one another: B is the sum over the bands. So that one long response does not widen all.
    """

    k: tuple[tuple[Array, ...], ...]  # of each of L layers and each band: [B of the band, K, C, R of the band]
    v: tuple[tuple[Array, ...], ...]  # likewise [B of the band, K, R of the band, C]
    length: Array  # int32 [B]  tokens of each row that lie in the cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowSlots:
    """Which rows read which prompt: rows leave a group one by one, so a group's queries are gathered into slots."""

    row: Array  # int32 [N, S]  row in each slot of a group; B where the slot is empty
    slot: Array  # int32 [B]     n * S + s, the slot of each row


def wide(dtype) -> jnp.dtype:
    """The dtype of logits and reductions: at least float32, and float64 in the exactness tests."""
    return jnp.promote_types(dtype, jnp.float32)


def _part(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, Array, Array]:
    """Queries [..., K, M, C] against keys [..., K, C, S] and values [..., K, S, C]; mask broadcasts to [..., K, M, S].

    Returns (o [..., K, M, C], m [..., K, M], l [..., K, M]): the unnormalised output, the largest score, the sum of
    exponentials. The result of a merge does not depend on `m`, so no gradient flows through it.
    """
    scores = jnp.einsum("...mc,...cs->...ms", q, k, preferred_element_type=wide(q.dtype)) * q.shape[-1] ** -0.5
    scores = jnp.where(mask, scores, MASKED)
    m = jax.lax.stop_gradient(scores.max(-1))
    weights = jnp.exp(scores - m[..., None])
    o = jnp.einsum("...ms,...sc->...mc", weights.astype(v.dtype), v, preferred_element_type=wide(q.dtype))
    return o, m, weights.sum(-1)


def _merge(*parts: tuple[Array, Array, Array]) -> Array:
    """The softmax over the keys of all parts together: [..., C]."""
    m = parts[0][1]
    for part in parts[1:]:
        m = jnp.maximum(m, part[1])
    scales = [jnp.exp(part[1] - m) for part in parts]
    o = sum(part[0] * scale[..., None] for part, scale in zip(parts, scales, strict=True))
    return o / sum(part[2] * scale for part, scale in zip(parts, scales, strict=True))[..., None]


def _heads_first(q: Array, kv_heads: int) -> Array:
    """[..., T, H, C] -> [..., K, g*T, C]: the query heads that share a key head become rows of one matrix."""
    *lead, t, h, c = q.shape
    q = q.reshape(*lead, t, kv_heads, h // kv_heads, c)
    return jnp.moveaxis(q, -4, -2).reshape(*lead, kv_heads, (h // kv_heads) * t, c)


def _heads_last(o: Array, heads: int) -> Array:
    """The inverse: [..., K, g*T, C] -> [..., T, H, C]."""
    *lead, k, gt, c = o.shape
    g = heads // k
    return jnp.moveaxis(o.reshape(*lead, k, g, gt // g, c), -2, -4).reshape(*lead, gt // g, heads, c)


def causal(q: Array, k: Array, v: Array) -> Array:
    """Plain causal attention. q [..., T, H, C]; k, v [..., T, K, C] -> [..., T, H, C].

    Right padding needs no mask: no real token looks to its right. Sequences of more than SQUARE tokens go by tiles, one
    after another, so that scores take little memory and none are computed above the diagonal.
    """
    *lead, t, heads, c = q.shape
    if t > SQUARE:
        layout = _lower_triangle(t)
        flat = tuple(x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
        return jax.lax.map(lambda row: _in_tiles(*row, layout), flat).reshape(*lead, t, heads, c)
    kv_heads = k.shape[-2]
    mask = jnp.tile(jnp.tril(jnp.ones((t, t), bool)), (heads // kv_heads, 1))
    part = _part(_heads_first(q, kv_heads), jnp.moveaxis(k, -3, -1), jnp.moveaxis(v, -3, -2), mask)
    return _heads_last(_merge(part), heads).astype(q.dtype)


def packed(q: Array, k: Array, v: Array, layout: PackLayout) -> Array:
    """Attention of whole groups in flat rows. q [B, T, H, C]; k, v [B, T, K, C] -> [B, T, H, C]; padding tokens give 0.

    On several devices it must run under `jax.shard_map` over B (grpo_jax.mesh.by_rows): no kernel can be split by XLA.
    """
    if isinstance(layout, Rows):
        return _in_rows(q, k, v, layout)
    return jax.lax.map(lambda row: _in_tiles(*row), (q, k, v, layout))


# ---------------------------------------------------------------- packs by tiles: plain XLA, everywhere


def _in_tiles(q: Array, k: Array, v: Array, layout: Tiles) -> Array:
    """One flat row [T, ...] as tiles of queries against tiles of keys; only such as see each other are computed."""
    t, heads, c = q.shape
    kv_heads = k.shape[1]

    def cut(x, tile):  # [T, heads, C] -> [T / tile, K, g * tile, C]
        x = jnp.pad(x, ((0, -t % tile), (0, 0), (0, 0))).reshape(-1, tile, x.shape[1], c)
        return _heads_first(x, kv_heads)

    queries, keys = layout.tile
    steps = jnp.maximum(layout.steps, 0)  # any tile stands for none: it is not seen
    o = _tiles(cut(q, queries), cut(k, keys), cut(v, keys), steps, _seen(layout))
    return _heads_last(o, heads).reshape(-1, heads, c)[:t]


def _lower_triangle(t: int, tile: tuple[int, int] = (128, 64)) -> Tiles:
    """A plain sequence of t tokens as one prompt."""
    queries, keys = tile
    steps = tile_steps({i: range(-(-min(t, (i + 1) * queries) // keys)) for i in range(-(-t // queries))})
    none = np.zeros(t, np.int32)
    # Or XLA would make all masks while it compiles, value by value.
    return jax.lax.optimization_barrier(Tiles(none, none, none, steps, tile))


def tile_steps(seen: Mapping[int, Collection[int]]) -> np.ndarray:
    """`Tiles.steps` of one flat row, int32 [S, 1 + KEY_TILES], from the tiles of keys that each tile of queries sees."""
    steps = []
    for i, tiles in sorted(seen.items()):
        tiles = np.pad(sorted(tiles), (0, -len(tiles) % KEY_TILES), constant_values=-1)
        steps += [(i, *some) for some in tiles.reshape(-1, KEY_TILES)]
    return np.array(steps, np.int32).reshape(-1, 1 + KEY_TILES)


def _seen(layout: Tiles) -> Array:
    """Of each step, which of its queries see which of its keys: bool [S, queries, n * keys].

    Made before the steps and not in them, or XLA on CPU would find every mask anew for every score that it meets.
    """
    queries, keys = layout.tile
    i, j = layout.steps[:, :1], layout.steps[:, 1:, None]
    query = jnp.maximum(i, 0) * queries + jnp.arange(queries)
    key = jnp.where(j < 0, jnp.iinfo(jnp.int32).max, j * keys + jnp.arange(keys)).reshape(len(i), 1, -1)
    first, prompt, end = (_take(x, query)[..., None] for x in (layout.first, layout.prompt, layout.prompt_end))
    return ((first <= key) & (key <= query[..., None])) | ((prompt <= key) & (key < end))


def _scores(q: Array, k: Array, seen: Array) -> Array:
    """Scores [K, g * queries, keys] of q [K, g * queries, C] and k [K, keys, C]; MASKED but where seen [queries, keys]."""
    # Scaled here and not before: in bfloat16 a scaled query would be rounded once more than the sampler's.
    scores = jnp.einsum("kmc,ksc->kms", q, k, preferred_element_type=wide(q.dtype)) * q.shape[-1] ** -0.5
    return jnp.where(seen, scores.reshape(len(scores), -1, *seen.shape), MASKED).reshape(scores.shape)


def _gathered(x: Array, tiles: Array) -> Array:
    """Some tiles of x [T / keys, K, keys, C], one after another: [K, n * keys, C]."""
    return jnp.concatenate([x[j] for j in tiles], 1)


def _tiles_forward(q: Array, k: Array, v: Array, steps: Array, seen: Array) -> tuple[Array, Array]:
    """(o [T / queries, K, g * queries, C], log of the sum of exponentials, without C), both in the wide dtype."""
    dtype = wide(q.dtype)
    # What depends on the layout alone, autodiff would take out of the loop and keep: the masks, once for every head.
    q, seen = jax.lax.optimization_barrier((q, seen))

    def one(carry, step):  # a softmax that is brought up to date with further keys
        o, largest, total = carry
        (i, *tiles), seen = step
        scores = _scores(q[i], _gathered(k, tiles), seen)
        m = jnp.maximum(largest[i], scores.max(-1))
        weights, scale = jnp.exp(scores - m[..., None]), jnp.exp(largest[i] - m)
        new = jnp.einsum("kms,ksc->kmc", weights.astype(v.dtype), _gathered(v, tiles), preferred_element_type=dtype)
        total = _put(total, i, total[i] * scale + weights.sum(-1))
        return (_put(o, i, o[i] * scale[..., None] + new), _put(largest, i, m), total), None

    # It begins above MASKED, so that where a query sees nothing its weights are exp(MASKED - MASKED / 2) = 0.
    start = jnp.zeros(q.shape, dtype), jnp.full(q.shape[:-1], MASKED / 2, dtype), jnp.zeros(q.shape[:-1], dtype)
    (o, largest, total), _ = jax.lax.scan(one, start, (steps, seen))
    total = jnp.where(total > 0, total, 1)
    return o / total[..., None], largest + jnp.log(total)


def _put(x: Array, i: Array, value: Array) -> Array:
    """x with x[i] = value, in place inside a loop; `.at[i].set` would be a scatter there, with a test of its bounds."""
    return jax.lax.dynamic_update_index_in_dim(x, value, i, 0)


@jax.custom_vjp
def _tiles(q: Array, k: Array, v: Array, steps: Array, seen: Array) -> Array:
    return _tiles_forward(q, k, v, steps, seen)[0].astype(q.dtype)


def _tiles_saved(q, k, v, steps, seen):
    o, log_total = _tiles_forward(q, k, v, steps, seen)
    o, log_total = checkpoint_name(o.astype(q.dtype), SAVED), checkpoint_name(log_total, SAVED)
    return o, (q, k, v, steps, seen, o, log_total)


def _tiles_backward(saved, do):
    """The weights again from scores and `log_total`, tile by tile (FlashAttention, algorithm 4): no square array is kept."""
    q, k, v, steps, seen, o, log_total = saved
    dtype = wide(q.dtype)
    dot = functools.partial(jnp.einsum, preferred_element_type=dtype)
    mean = (do.astype(dtype) * o).sum(-1)  # of the gradient of the weights, under the weights

    def add(sums, tile):
        j, *new = tile
        return tuple(_put(x, j, x[j] + part) for x, part in zip(sums, new, strict=True)), None

    def one(carry, step):
        dq, dk, dv = carry
        (i, *tiles), seen = step
        k_i, v_i = _gathered(k, tiles), _gathered(v, tiles)
        weights = jnp.exp(_scores(q[i], k_i, seen) - log_total[i][..., None])
        dscores = weights * (dot("kmc,ksc->kms", do[i], v_i) - mean[i][..., None]) * q.shape[-1] ** -0.5
        weights, dscores = weights.astype(q.dtype), dscores.astype(q.dtype)
        dq = _put(dq, i, dq[i] + dot("kms,ksc->kmc", dscores, k_i))
        parts = (jnp.split(dot("kms,kmc->ksc", *xs), len(tiles), 1) for xs in ((dscores, q[i]), (weights, do[i])))
        # A loop: one after another in one program, each sum reads what the one before it wrote, and XLA copies all of dk, dv.
        (dk, dv), _ = jax.lax.scan(add, (dk, dv), (jnp.stack(tiles), *map(jnp.stack, parts)))
        return (dq, dk, dv), None

    gradients, _ = jax.lax.scan(one, tuple(jnp.zeros(x.shape, dtype) for x in (q, k, v)), (steps, seen))
    return *(g.astype(x.dtype) for g, x in zip(gradients, (q, k, v), strict=True)), None, None


_tiles.defvjp(_tiles_saved, _tiles_backward)


# ---------------------------------------------------------------- packs by rows: fused kernels


def _in_rows(q: Array, k: Array, v: Array, layout: Rows) -> Array:
    """Prompts are copied in here and nowhere else: the dense layers, which are most of the work, see flat tokens."""
    spread = jax.vmap(_spread)
    rectangles = [token.shape[1:] for token in layout.token]
    cells = [spread(x, layout) for x in (q, k, v)]
    parts, begin = [], 0
    for (n, s), length in zip(rectangles, layout.length, strict=True):
        rows = [x[:, begin : begin + n * s].reshape(-1, s, *x.shape[2:]) for x in cells]
        parts.append(in_rows(*rows, length.reshape(-1), layout.kernel).reshape(len(q), n * s, *q.shape[2:]))
        begin += n * s
    return jax.vmap(_collect)(jnp.concatenate(parts, 1), layout)


def _take(x: Array, index: Array) -> Array:
    """x[index], zeros where the index is out of range."""
    return x.at[index].get(mode="fill", fill_value=0)


def _tokens(layout: Rows) -> Array:
    """The token of every cell of one flat row, in order."""
    return jnp.concatenate([token.reshape(-1) for token in layout.token])


@jax.custom_vjp
def _spread(x: Array, layout: Rows) -> Array:
    """One flat row [T, ...] -> its cells; a prompt's gradient is the sum over its copies.

    Here and in `_collect` gradients are gathers, too: autodiff would make scatter-adds, which cost more than attention.
    """
    return _take(x, _tokens(layout))


def _spread_backward(layout: Rows, dcells: Array) -> tuple[Array, None]:
    copies = (_take(dcells, cell).astype(wide(dcells.dtype)) for cell in layout.cells.T)
    return sum(copies).astype(dcells.dtype), None


_spread.defvjp(lambda x, layout: (_spread(x, layout), layout), _spread_backward)


@jax.custom_vjp
def _collect(cells: Array, layout: Rows) -> Array:
    """Cells -> one flat row [T, ...]; of a prompt's copies the first is taken, so only that one gets a gradient."""
    return _take(cells, layout.cells[:, 0])


def _collect_backward(layout: Rows, dx: Array) -> tuple[Array, None]:
    token = _tokens(layout)
    is_first = _take(layout.cells[:, 0], token) == jnp.arange(len(token))
    return _take(dx, jnp.where(is_first, token, len(dx))), None


_collect.defvjp(lambda cells, layout: (_collect(cells, layout), layout), _collect_backward)


def in_rows(q: Array, k: Array, v: Array, length: Array, kernel: str) -> Array:
    """Causal attention of rows: q [B, S, H, C]; k, v [B, S, K, C]; length [B] -> [B, S, H, C], with no meaning beyond it."""
    match kernel:
        case "cudnn":  # the lengths let it skip the padding
            length = jnp.maximum(length, 1)
            attention = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
            return attention(q, k, v, query_seq_lengths=length, key_value_seq_lengths=length)
        case "splash":
            return splash(q, k, v)
        case "plain":
            return causal(q, k, v)
    raise ValueError(f"kernel = {kernel!r}: use 'cudnn', 'splash' or 'plain'")


def splash(q: Array, k: Array, v: Array, *, interpret: bool = False) -> Array:
    """Causal attention by the splash kernel of TPUs (`interpret` runs it anywhere, slowly): shapes as in `causal`.

    S must be a multiple of 128. The kernel takes no scale, so queries are scaled, and in bfloat16 rounded, before it.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    s, heads, c = q.shape[-3:]
    fit = lambda most: max(b for b in range(128, most + 1, 128) if s % b == 0)  # noqa: E731
    block, compute = fit(1024), fit(512)
    compute = compute if block % compute == 0 else block
    sizes = library.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=compute,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=compute, use_fused_bwd_kernel=True,
    )  # fmt: skip
    kernel = library.make_splash_mha(
        mask=library.MultiHeadMask([library.CausalMask((s, s))] * heads), head_shards=1, q_seq_shards=1,
        block_sizes=sizes, residual_checkpoint_name=SAVED, interpret=interpret,
    )  # fmt: skip
    heads_first = lambda x: jnp.moveaxis(x, -2, -3)  # noqa: E731
    return heads_first(jax.vmap(kernel)(heads_first(q * c**-0.5), heads_first(k), heads_first(v)))


def decode(
    q: Array,
    prompt: tuple[Array, Array, Array],
    own: tuple[tuple[Array, ...], tuple[Array, ...], Array],
    slots: RowSlots,
) -> Array:
    """One new token of every response row, in one layer.

    q [B, H, C]: of the new token. `prompt` = (k [N, K, C, P], v [N, K, P, C], length [N]); `own` = (k, v, length [B]): the
    rows' tokens with the new one, k in bands [rows of the band, K, C, R], v in bands [.., K, R, C]. Returns [B, H, C].
    """
    b, heads, c = q.shape
    k_p, v_p, p_length = prompt
    n, s = slots.row.shape
    kv_heads = k_p.shape[1]
    rows = q.reshape(b, kv_heads, heads // kv_heads, c)  # [B, K, g, C]

    gathered = rows.at[slots.row].get(mode="fill", fill_value=0)  # [N, S, K, g, C]
    gathered = jnp.moveaxis(gathered, 1, 2).reshape(n, kv_heads, -1, c)  # [N, K, S*g, C]
    in_prompt = (jnp.arange(k_p.shape[-1]) < p_length[:, None])[:, None, None, :]

    def by_row(x):  # [N, K, S*g, ...] -> [B, K, g, ...]
        x = x.reshape(n, kv_heads, s, heads // kv_heads, *x.shape[3:])
        return jnp.moveaxis(x, 2, 1).reshape(n * s, kv_heads, heads // kv_heads, *x.shape[4:])[slots.slot]

    shared = tuple(map(by_row, _part(gathered, k_p, v_p, in_prompt)))
    parts, start = [], 0
    for k_o, v_o in zip(*own[:2], strict=True):
        here = slice(start, start := start + k_o.shape[0])
        parts.append(_part(rows[here], k_o, v_o, (jnp.arange(k_o.shape[-1]) < own[2][here, None])[:, None, None, :]))
    return _merge(shared, tuple(map(jnp.concatenate, zip(*parts, strict=True)))).reshape(b, heads, c).astype(q.dtype)
