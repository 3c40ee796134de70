"""`causal`, `packed` and `decode` against a numpy softmax over a mask that is written out pair by pair."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.group import Group
from grpo_jax.packing import pack
from models import attention
from models.attention import RowSlots, Tiles

K, REPEAT, C = 2, 3, 4  # 6 query heads over 2 key heads
H = K * REPEAT
causal, packed, decode = map(jax.jit, (attention.causal, attention.packed, attention.decode))

# (prompt length, response lengths) of each group: 1, 2 and 5 responses, an empty response, empty groups and slots.
ONE = [(7, [4])]
TWO = [(3, [5, 1]), (6, [2, 4])]
FIVE = [(9, [1, 6, 3, 2, 6])]
MIXED = [(4, [2]), (1, [3, 6]), (5, [1, 2, 0, 4, 5]), (2, []), (0, [])]


def dense(q, k, v, mask, numpy=np):
    """q [T, H, C], k and v [T, K, C], mask [T, T] -> [T, H, C]; a query that sees nothing gives 0."""
    k, v = (numpy.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = numpy.einsum("thc,shc->hts", q, k) / np.sqrt(q.shape[-1])
    scores = numpy.where(mask, scores, -np.inf)
    weights = numpy.where(mask, numpy.exp(scores - numpy.maximum(scores.max(-1, keepdims=True), -1e30)), 0)
    return numpy.einsum("hts,shc->thc", weights / numpy.maximum(weights.sum(-1, keepdims=True), 1e-300), v)


def lay_out(groups, t, tile=(4, 2), count=None, at_once=3):
    """One flat row of the groups: (Tiles of numpy [1, ...], mask [T, T]); the tiles are read off the mask."""
    first, prompt, prompt_end, mask, at = np.full(t, t), np.zeros(t), np.zeros(t), np.zeros((t, t), bool), 0
    for p_length, lengths in groups:
        begin, segments = at, [(p_length, 0), *((length, p_length) for length in lengths)]
        for length, seen in segments:
            own = np.arange(at, at + length)
            first[own], prompt[own], prompt_end[own] = at, begin, begin + seen
            for a, query in enumerate(own):
                mask[query, begin : begin + seen] = True
                mask[query, own[: a + 1]] = True
            at += length
    assert at <= t
    padded = np.pad(mask, [(0, -t % size) for size in tile])
    steps = []
    for i, row in enumerate(padded.reshape(len(padded) // tile[0], tile[0], -1, tile[1]).any((1, 3))):
        keys = np.flatnonzero(row)
        steps += [[i, *keys[j : j + at_once]] for j in range(0, len(keys), at_once)]
    steps += [[]] * ((count or len(steps)) - len(steps))
    steps = np.array([step + [-1] * (1 + at_once - len(step)) for step in steps]).reshape(-1, 1 + at_once)
    return Tiles(*(x[None].astype(np.int32) for x in (first, prompt, prompt_end, steps)), tile), mask


def draw(rng, *lead, scale=2.0):
    return tuple(scale * rng.normal(size=(*lead, heads, C)) for heads in (H, K, K))


@pytest.mark.parametrize("t", [1, 2, 9])
def test_causal_equals_a_softmax_over_the_lower_triangle(x64, t):
    q, k, v = draw(np.random.default_rng(t), 3, t)
    out = causal(*map(jnp.asarray, (q, k, v)))
    assert out.dtype == jnp.float64
    for b in range(3):
        np.testing.assert_allclose(out[b], dense(q[b], k[b], v[b], np.tril(np.ones((t, t), bool))), rtol=0, atol=1e-13)


@pytest.mark.parametrize("t", [9, 128, 300, 512])
def test_causal_by_tiles_is_the_same(x64, monkeypatch, t):
    x = tuple(map(jnp.asarray, draw(np.random.default_rng(t), 2, 3, t)))
    expected = causal(*x)
    monkeypatch.setattr(attention, "SQUARE", 8)
    np.testing.assert_allclose(jax.jit(lambda *x: attention.causal(*x))(*x), expected, rtol=0, atol=1e-13)


def test_causal_of_a_long_sequence_holds_no_square(optimized):
    """Or the longest prompts of a benchmark, 8000 tokens, would take gigabytes."""
    t = 8192
    shapes = [jax.ShapeDtypeStruct((1, t, heads, C), jnp.float32) for heads in (H, K, K)]
    temporaries = jax.jit(lambda *x: attention.causal(*x)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < 0.2 * 4 * H * t * t


def test_causal_does_not_see_what_lies_to_the_right(x64):
    q, k, v = draw(np.random.default_rng(0), 8)
    before = causal(*map(jnp.asarray, (q, k, v)))
    k[5:], v[5:] = 1e3, -1e3
    np.testing.assert_array_equal(causal(*map(jnp.asarray, (q, k, v)))[:5], before[:5])


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 4), (4, 1), (9, 3)])
def test_causal_pairs_query_heads_with_their_key_head(x64, heads, kv_heads):
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(5, h, C)) for h in (heads, kv_heads, kv_heads))
    np.testing.assert_allclose(
        causal(*map(jnp.asarray, (q, k, v))), dense(q, k, v, np.tril(np.ones((5, 5), bool))), rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("tile", [(1, 1), (3, 2), (4, 8), (128, 64)])
@pytest.mark.parametrize("groups", [ONE, TWO, FIVE, MIXED], ids=["one", "two", "five", "mixed"])
def test_packed_equals_a_softmax_over_the_written_mask(x64, groups, tile):
    rng = np.random.default_rng(2)
    t = sum(p + sum(rs) for p, rs in groups) + 5
    layout, mask = lay_out(groups, t, tile)
    q, k, v = draw(rng, 1, t)
    out = packed(*map(jnp.asarray, (q, k, v)), layout)[0]
    np.testing.assert_allclose(out, dense(q[0], k[0], v[0], mask), rtol=0, atol=1e-13)
    np.testing.assert_array_equal(out[~mask.any(-1)], 0)  # padding


def test_packed_rows_are_independent_and_empty_tiles_change_nothing(x64):
    rng = np.random.default_rng(3)
    t = 64
    rows = [lay_out(groups, t, count=100) for groups in (ONE, TWO, FIVE, MIXED, [])]  # more than any row needs
    layout = jax.tree.map(lambda *x: jnp.concatenate(x), *(row for row, _ in rows))
    q, k, v = draw(rng, len(rows), t)
    out = packed(*map(jnp.asarray, (q, k, v)), layout)
    for b, (_, mask) in enumerate(rows):
        np.testing.assert_allclose(out[b], dense(q[b], k[b], v[b], mask), rtol=0, atol=1e-13)


@pytest.mark.parametrize("groups", [ONE, MIXED], ids=["one", "mixed"])
def test_gradient_of_packed_equals_that_of_the_dense_mask(x64, groups):
    rng = np.random.default_rng(4)
    t = sum(p + sum(rs) for p, rs in groups) + 3
    layout, mask = lay_out(groups, t)
    qkv = tuple(map(jnp.asarray, draw(rng, 1, t)))
    w = jnp.asarray(rng.normal(size=(t, H, C)))

    def ours(qkv):
        return jnp.sum(w * jnp.sin(packed(*qkv, layout)[0]))

    def plain(qkv):
        # Padding sees itself here, because 0/0 has no gradient; its output is then left out.
        out = dense(*(x[0] for x in qkv), mask | np.eye(t, dtype=bool), numpy=jnp)
        return jnp.sum(w * jnp.sin(jnp.where(mask.any(-1)[:, None, None], out, 0)))

    (value, grads), (expected, plain_grads) = (jax.jit(jax.value_and_grad(f))(qkv) for f in (ours, plain))
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for grad, want in zip(grads, plain_grads, strict=True):
        assert np.abs(want).max() > 0.1
        np.testing.assert_allclose(grad, want, rtol=0, atol=1e-10)


def test_gradient_of_packed_copies_no_sum_in_its_loop(optimized):
    """In the compiled text: sums of the gradients of keys and values are added to in place."""
    t, tile = 48, (4, 3)
    layout, _ = lay_out(FIVE + TWO, t, tile)
    shapes = [jax.ShapeDtypeStruct((1, t, heads, C), jnp.float32) for heads in (H, K, K)]
    text = jax.jit(jax.grad(lambda *x: attention.packed(*x, layout).sum(), (0, 1, 2))).lower(*shapes).compile().as_text()
    sums = f"f32[{t // tile[1]},{K},{tile[1]},{C}]"
    assert sums in text
    assert sum(" copy(" in line and f"= {sums}" in line for line in text.splitlines()) <= 2  # zeros, before the loop


def test_gradient_of_packed_is_finite_where_every_key_is_masked():
    layout, _ = lay_out([], 4, count=2)
    qkv = tuple(jnp.asarray(x, jnp.float32) for x in draw(np.random.default_rng(5), 1, 4))
    for grad in jax.jit(jax.grad(lambda qkv: packed(*qkv, layout).sum()))(qkv):
        np.testing.assert_array_equal(grad, 0)


def test_rows_equal_tiles_in_outputs_and_gradients(x64):
    """Kernels for plain causal sequences, fed with copied prompts, against the tiles, through a whole pack of each."""
    rng = np.random.default_rng(8)
    ids = lambda n: rng.integers(0, 9, n).astype(np.int32)  # noqa: E731
    lengths = [*ONE, *TWO, *FIVE, (4, [2]), (200, [60, 3]), (5, [1, 2, 4, 4, 5]), (140, [7])]
    groups = [
        Group(ids(p), tuple(map(ids, rs)), tuple(np.zeros(r) for r in rs), (False,) * len(rs), np.zeros(len(rs)))
        for p, rs in lengths
    ]
    tiles, rows = (pack(groups, 300, 2, kernel=kernel).packs for kernel in ("tiles", "plain"))
    assert len(rows) == len(tiles) == 1 and [token.shape[1:] for token in rows[0].layout.token] == [
        (1, 512),  # one flat row has rows of 512 and 256, the other one of 256 and 16 of 128: 17 in all, rounded up to 24
        (1, 256),
        (22, 128),
    ]
    qkv = tuple(map(jnp.asarray, draw(rng, *rows[0].tokens.shape)))
    w = jnp.asarray(rng.normal(size=qkv[0].shape))

    def run(layout):
        return jax.jit(jax.value_and_grad(lambda qkv: jnp.sum(w * jnp.sin(packed(*qkv, layout)))))(qkv)

    (value, found), (expected, want) = run(rows[0].layout), run(tiles[0].layout)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for a, b in zip(found, want, strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("s", [128, 640])
def test_splash_interpreted_equals_plain_causal_attention(s):
    rng = np.random.default_rng(9)
    qkv = tuple(jnp.asarray(rng.normal(size=(2, s, heads, 64)), jnp.float32) for heads in (4, 2, 2))
    w = jnp.asarray(rng.normal(size=qkv[0].shape), jnp.float32)
    run = lambda f: jax.jit(jax.value_and_grad(lambda qkv: jnp.sum(w * f(*qkv))))(qkv)  # noqa: E731
    (value, found), (expected, want) = run(functools.partial(attention.splash, interpret=True)), run(causal)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


def test_a_kernel_that_is_not_known_is_refused():
    q, k, v = (jnp.ones((1, 128, heads, C)) for heads in (H, K, K))
    with pytest.raises(ValueError, match="use 'cudnn', 'splash' or 'plain'"):
        attention.in_rows(q, k, v, jnp.ones(1, int), "flash")


def test_bfloat16_stays_near_float64():
    rng = np.random.default_rng(6)
    layout, mask = lay_out(MIXED, 64)
    qkv = tuple(jnp.asarray(x, jnp.bfloat16) for x in draw(rng, 1, 64, scale=1.0))
    out = packed(*qkv, layout)
    assert out.dtype == jnp.bfloat16
    q, k, v = (np.asarray(x[0], np.float64) for x in qkv)
    np.testing.assert_allclose(np.asarray(out[0], np.float64), dense(q, k, v, mask), rtol=0, atol=0.03)


@pytest.mark.parametrize("slots_per_group, wide_rows", [(1, 0), (2, 2), (5, 7)])
def test_decode_equals_a_softmax_over_prompt_and_own_tokens(x64, slots_per_group, wide_rows):
    """The last `wide_rows` rows lie in a band with more room."""
    rng = np.random.default_rng(7)
    n, s, p, r = 4, slots_per_group, 6, 5
    p_length = np.array([6, 1, 3, 4])
    live = rng.permutation(n * s)[: max(1, n * s - 2)]  # two slots (with one a group: two groups) are empty
    b = len(live)
    row = np.full(n * s, b)
    row[live] = np.arange(b)
    o_length = rng.integers(1, r + 1, b)
    o_length[0] = 1  # a row's first token sees only its prompt and itself
    q, _, _ = draw(rng, b)
    # What lies beyond the lengths is rubbish of earlier rows, and must not be seen.
    k_p, v_p = (3 * rng.normal(size=(n, K, p, C)) for _ in range(2))
    k_o, v_o = (3 * rng.normal(size=(b, K, r, C)) for _ in range(2))
    spare = 3 * rng.normal(size=(wide_rows, K, 4, C))

    def bands(x):
        cut = b - wide_rows
        return tuple(map(jnp.asarray, (x[:cut], np.concatenate([x[cut:], spare], 2)) if wide_rows else (x,)))

    columns = lambda k: jnp.swapaxes(k, 2, 3)  # noqa: E731  as keys lie
    out = decode(
        jnp.asarray(q),
        (columns(k_p), jnp.asarray(v_p), jnp.asarray(p_length)),
        (tuple(map(columns, bands(k_o))), bands(v_o), jnp.asarray(o_length)),
        RowSlots(jnp.asarray(row.reshape(n, s)), jnp.asarray(live)),
    )
    for i in range(b):
        group = live[i] // s
        keys, values = (
            np.concatenate([prompt[group, :, : p_length[group]], own[i, :, : o_length[i]]], axis=1).swapaxes(0, 1)
            for prompt, own in ((k_p, k_o), (v_p, v_o))
        )
        t = len(keys)
        queries = np.zeros((t, H, C))
        queries[-1] = q[i]
        np.testing.assert_allclose(out[i], dense(queries, keys, values, np.ones((t, t), bool))[-1], rtol=0, atol=1e-13)
