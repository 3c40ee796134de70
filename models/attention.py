"""Attention over groups: a prompt is causal, a response sees its prompt and itself.

The one place that knows how attention is computed. Everything is built from one piece, `_part` (one block of queries
against one block of keys, left unnormalised), and its inverse, `_merge` (the softmax over several parts):

    causal   a plain sequence                                          one part
    packed   flat rows of whole groups, for learning                   prompts: one part; responses: prompt + own
    decode   one new token a response row, for sampling                prompt cache + own cache + the token itself

In `packed` and `decode` the keys of a prompt are multiplied once for all responses of its group: the queries of the
group stand side by side in one matrix. Rectangles (and so padding) exist only in here; the dense layers see flat tokens.

The parts keep their own maximum and sum in at least float32 and are plain differentiable arithmetic. That is why no
log-sum-exp of a library kernel is used here: `jax.nn.dot_product_attention` stops the gradient of the one it returns.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

# Finite, so that a row in which every key is masked stays free of nan; it then merges with weight exp(MASKED - m) = 0.
MASKED = -1e30


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackLayout:
    """Where the groups of flat token rows [B, T] lie. An index equal to T means "no token here"."""

    prompt: Array  # int32 [B, N, P]     index in the row of each prompt token, right padded
    response: Array  # int32 [B, N, G, R]  index in the row of each response token, right padded
    cell: Array  # int32 [B, T]        inverse of the two: index of a token in [N*P prompt cells | N*G*R response cells]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PromptCache:
    """Keys and values of N prompts in every layer; each is stored once, whatever the number of its responses."""

    k: Array  # [L, N, K, P, C]
    v: Array  # [L, N, K, P, C]
    length: Array  # int32 [N]  tokens of each prompt


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ResponseCache:
    """Keys and values of the response tokens decoded so far, one row a response, in bands of rows with room for R tokens.

    The rows of the bands follow one another: B is the sum over the bands. So that one long response does not widen all.
    """

    k: tuple[Array, ...]  # [L, B of the band, K, R of the band, C]
    v: tuple[Array, ...]  # likewise
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
    """Queries [..., K, M, C] against keys [..., K, S, C]; mask broadcasts to [..., K, M, S].

    Returns (o [..., K, M, C], m [..., K, M], l [..., K, M]): the unnormalised output, the largest score, the sum of
    exponentials. The result of a merge does not depend on `m`, so no gradient flows through it.
    """
    scores = jnp.einsum("...mc,...sc->...ms", q, k, preferred_element_type=wide(q.dtype)) * q.shape[-1] ** -0.5
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

    Right padding needs no mask: no real token looks to its right.
    """
    *_, t, heads, _ = q.shape
    kv_heads = k.shape[-2]
    mask = jnp.tile(jnp.tril(jnp.ones((t, t), bool)), (heads // kv_heads, 1))
    o = _merge(_part(_heads_first(q, kv_heads), jnp.moveaxis(k, -2, -3), jnp.moveaxis(v, -2, -3), mask))
    return _heads_last(o, heads).astype(q.dtype)


def packed(q: Array, k: Array, v: Array, layout: PackLayout) -> Array:
    """Attention of whole groups in flat rows. q [B, T, H, C]; k, v [B, T, K, C] -> [B, T, H, C]; padding tokens give 0."""
    return jax.vmap(_packed_row)(q, k, v, layout)


def _packed_row(q: Array, k: Array, v: Array, layout: PackLayout) -> Array:
    t, heads, kv_heads = *q.shape[:2], k.shape[-2]
    n, p = layout.prompt.shape
    _, g, r = layout.response.shape
    tokens = jnp.concatenate([layout.prompt.reshape(-1), layout.response.reshape(-1)])  # of every cell

    def rectangles(x):  # [T, heads, C] -> prompts [N, P, heads, C], responses [N, G, R, heads, C]
        x = _permute(x, tokens, layout.cell)
        return x[: n * p].reshape(n, p, *x.shape[1:]), x[n * p :].reshape(n, g, r, *x.shape[1:])

    (q_p, q_r), (k_p, k_r), (v_p, v_r) = map(rectangles, (q, k, v))
    o_p = causal(q_p, k_p, v_p)

    shared = _part(  # all responses of a group against their one prompt: [N, K, g*G*R, C] x [N, K, P, C]
        _heads_first(q_r.reshape(n, g * r, heads, -1), kv_heads),
        jnp.moveaxis(k_p, -2, -3),
        jnp.moveaxis(v_p, -2, -3),
        (layout.prompt < t)[:, None, None, :],
    )
    own_mask = jnp.tile(jnp.tril(jnp.ones((r, r), bool)), (heads // kv_heads, 1))
    own = _part(_heads_first(q_r, kv_heads), jnp.moveaxis(k_r, -2, -3), jnp.moveaxis(v_r, -2, -3), own_mask)

    def by_response(x):  # [N, K, g*G*R, ...] -> [N, G, K, g*R, ...], the order of `own`
        x = x.reshape(n, kv_heads, heads // kv_heads, g, r, *x.shape[3:])
        return jnp.moveaxis(x, 3, 1).reshape(n, g, kv_heads, (heads // kv_heads) * r, *x.shape[5:])

    o_r = _heads_last(_merge(tuple(map(by_response, shared)), own), heads).astype(q.dtype)
    cells = jnp.concatenate([o_p.reshape(-1, *q.shape[1:]), o_r.reshape(-1, *q.shape[1:])])
    return _permute(cells, layout.cell, tokens)


@jax.custom_vjp
def _permute(x: Array, index: Array, inverse: Array) -> Array:
    """x[index], zeros where the index is out of range; `inverse` undoes it, so that the gradient is a gather too.

    Autodiff would make it a scatter-add, which costs more than the attention itself on CPU.
    """
    return x.at[index].get(mode="fill", fill_value=0)


def _permute_forward(x, index, inverse):
    return _permute(x, index, inverse), (index, inverse)


def _permute_backward(saved, gradient):
    index, inverse = saved
    return _permute(gradient, inverse, index), None, None


_permute.defvjp(_permute_forward, _permute_backward)


def decode(
    q: Array,
    k: Array,
    v: Array,
    prompt: tuple[Array, Array, Array],
    own: tuple[tuple[Array, ...], tuple[Array, ...], Array],
    slots: RowSlots,
) -> Array:
    """One new token of every response row, in one layer.

    q [B, H, C]; k, v [B, K, C]: the new token. `prompt` = (k [N, K, P, C], v, length [N]); `own` = (k, v, length [B]): the
    rows' earlier tokens, k and v in bands [rows of the band, K, R, C]. Returns [B, H, C].
    """
    b, heads, c = q.shape
    kv_heads = k.shape[-2]
    rows = q.reshape(b, kv_heads, heads // kv_heads, c)  # [B, K, g, C]

    n, s = slots.row.shape
    gathered = rows.at[slots.row].get(mode="fill", fill_value=0)  # [N, S, K, g, C]
    gathered = jnp.moveaxis(gathered, 1, 2).reshape(n, kv_heads, -1, c)  # [N, K, S*g, C]
    k_p, v_p, p_length = prompt
    in_prompt = (jnp.arange(k_p.shape[-2]) < p_length[:, None])[:, None, None, :]

    def by_row(x):  # [N, K, S*g, ...] -> [B, K, g, ...]
        x = x.reshape(n, kv_heads, s, heads // kv_heads, *x.shape[3:])
        return jnp.moveaxis(x, 2, 1).reshape(n * s, kv_heads, heads // kv_heads, *x.shape[4:])[slots.slot]

    shared = tuple(map(by_row, _part(gathered, k_p, v_p, in_prompt)))
    earlier, start = [], 0
    for k_o, v_o in zip(*own[:2], strict=True):
        here = slice(start, start := start + k_o.shape[0])
        earlier.append(_part(rows[here], k_o, v_o, (jnp.arange(k_o.shape[-2]) < own[2][here, None])[:, None, None, :]))
    earlier = tuple(map(jnp.concatenate, zip(*earlier, strict=True)))
    itself = _part(rows, k[:, :, None], v[:, :, None], jnp.ones((), bool))
    return _merge(shared, earlier, itself).reshape(b, heads, c).astype(q.dtype)
