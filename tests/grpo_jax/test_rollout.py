"""Sampling groups: against a sampler that recomputes everything, and under every way of cutting the same work."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import hosts, learner, packing, rollout, seating
from grpo_jax.learner import Objective
from grpo_jax.rollout import Sampling, Usage
from models import decoder
from models.decoder import DecoderConfig

MODEL = DecoderConfig("qwen2", 17, 16, 24, 2, 4, 2, 4, tied=False)
SAMPLING = Sampling((12, 14), group_size=3, max_response_tokens=12, temperature=0.7, decode_steps_per_call=4)
AT_ONCE = replace(SAMPLING, decode_steps_per_call=12)  # one call, where compaction is not the question
WIDTH = 24  # of the recomputed sequences: one shape


def random_params(dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape) + (x.shape[-1:] == x.shape), dtype), decoder.shapes(MODEL)
    )


def ragged_prompts(lengths, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, MODEL.vocab, length).astype(np.int32) for length in lengths]


PROMPTS = ragged_prompts([10, 12, 9, 11, 12])  # padded to one width; nearly all of the tests' time is compilation


def draw(prompts, sampling=SAMPLING, **where):
    return rollout.sample(MODEL, random_params(), prompts, sampling, **where)[0]


def assert_same(found, expected, atol=1e-12):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.prompt, b.prompt)
        assert [r.tolist() for r in a.responses] == [r.tolist() for r in b.responses]
        assert a.truncated == b.truncated
        for x, y in zip(a.sampler_logp, b.sampler_logp, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=atol)


def ids(group):
    return [r.tolist() for r in group.responses]


# ---------------------------------------------------------------- against the plain sampler


@jax.jit
def next_logits(params, tokens, length):
    """Of one padded sequence [WIDTH], computed from its first token on: [V]."""
    return decoder.logits(MODEL, params, tokens[None], length[None])[0, length - 1]


def slow_response(params, prompt, sampling, seed, step, number, attempt=0):
    """One response as the documentation has it, with nothing kept between tokens: (ids, log-probs, truncated)."""
    digest = hashlib.sha256(prompt.astype(np.int32).tobytes()).digest()
    words = [int.from_bytes(digest[i : i + 4], "little") for i in (0, 4)]
    row_key = functools.reduce(jax.random.fold_in, [seed, step, *words, number, attempt], jax.random.key(0))
    tokens, logp = [], []
    while len(tokens) < sampling.max_response_tokens:
        padded = np.zeros(WIDTH, np.int32)
        padded[: len(prompt) + len(tokens)] = [*prompt, *tokens]
        scores = np.asarray(next_logits(params, padded, np.int32(len(prompt) + len(tokens)))) / sampling.temperature
        p = np.exp(scores - scores.max())
        p /= p.sum()
        u = float(jax.random.uniform(jax.random.fold_in(row_key, len(tokens)), dtype=np.float64))
        tokens.append(int(np.searchsorted(np.cumsum(p), u, side="right")))
        logp.append(np.log(p[tokens[-1]]))
        if tokens[-1] in sampling.end_tokens:
            return tokens, logp, False
    return tokens, logp, True


@pytest.mark.parametrize("group_size, sampling", [(1, AT_ONCE), (5, SAMPLING)])
def test_equals_a_sampler_that_recomputes_the_sequence_for_every_token(x64, group_size, sampling):
    prompts, sampling = ragged_prompts([3, 9, 1, 6, 4, 5]), replace(sampling, group_size=group_size)
    params = random_params()
    lengths, last = set(), Counter()
    for prompt, group in zip(prompts, draw(prompts, sampling, seed=1, step=8), strict=True):
        np.testing.assert_array_equal(group.prompt, prompt)
        assert len(group.responses) == len(group.sampler_logp) == len(group.truncated) == group_size
        for j in range(group_size):
            tokens, logp, truncated = slow_response(params, prompt, sampling, 1, 8, j)
            assert (group.responses[j].tolist(), group.truncated[j]) == (tokens, truncated)
            assert group.responses[j].dtype == np.int32 and group.sampler_logp[j].dtype == np.float64
            np.testing.assert_allclose(group.sampler_logp[j], logp, rtol=0, atol=1e-10)
            lengths.add(len(tokens))
            last["truncated" if truncated else tokens[-1]] += 1
    # The cases meant were there: both end tokens, the limit, an end in the first and in a later call.
    assert set(last) == {12, 14, "truncated"} and min(lengths) <= 4 < max(lengths - {12}) and len(lengths) >= 4


# ---------------------------------------------------------------- the same tokens, however the work is cut


@pytest.mark.parametrize("steps, n", [(1, 2), (3, 5), (64, 5)])
def test_steps_per_call_change_nothing(x64, steps, n):
    assert_same(draw(PROMPTS[:n], replace(SAMPLING, decode_steps_per_call=steps)), draw(PROMPTS)[:n])


@pytest.mark.parametrize(
    "rows, n, sampling", [(2, 2, SAMPLING), (7, 5, AT_ONCE)], ids=["less than a group", "two groups and a part"]
)
def test_pool_size_changes_nothing(x64, rows, n, sampling):
    assert_same(draw(PROMPTS[:n], replace(sampling, rows=rows)), draw(PROMPTS)[:n])


# ---------------------------------------------------------------- rows that come and go, bands, and want of memory


@pytest.fixture
def fine_bands(monkeypatch):
    """Bands of 4, 8 and 12 tokens for `SAMPLING`, where the defaults give one."""
    monkeypatch.setattr(seating, "_NARROWEST", 1)
    monkeypatch.setattr(seating, "_FACTOR", 2)


RAGGED = [[2, 12, 1], [4, 5, 3], [12, 2, 9], [1, 1, 7], [6, 3, 10]]  # runaways beside short responses


def imposed(rows=4, lengths=RAGGED, **options):
    """Responses of these lengths to PROMPTS, and what the pool did: groups, usage."""
    sampling = replace(SAMPLING, rows=rows, **options)
    return rollout.sample(MODEL, random_params(), PROMPTS, sampling, lengths=lengths)


@pytest.fixture
def wide(x64):
    return imposed(rows=15)


def test_imposed_lengths_cut_what_would_have_been_drawn_anyway(wide):
    groups, usage = wide
    endless = draw(PROMPTS, replace(SAMPLING, end_tokens=()))
    for group, whole, lengths in zip(groups, endless, RAGGED, strict=True):
        assert ids(group) == [r[:length] for r, length in zip(ids(whole), lengths, strict=True)]
        assert group.truncated == (True, True, True)
    assert usage.tokens == sum(map(sum, RAGGED))
    for bad in (0, 13):
        with pytest.raises(ValueError, match=r"1 \.\.\. 12"):
            imposed(lengths=[[bad, 1, 1]] * 5)


@pytest.mark.parametrize("rows, steps", [(4, 4), (7, 3)])
def test_bands_change_nothing(wide, fine_bands, calls, rows, steps):
    found, usage = imposed(rows, decode_steps_per_call=steps)
    assert_same(found, wide[0])
    pools = [pool for _, (pool, *_) in calls["_decode"]]
    sizes = {tuple((v[0], v[2]) for v in pool.responses.v[0]) for pool in pools}
    assert all(sum(b for b, _ in size) <= rows for size in sizes)
    assert any(len(size) > 1 for size in sizes)  # short rows and long ones, apart
    assert usage.row_steps == sum(pool.hidden[0] for pool in pools) * steps


def test_rows_that_leave_for_want_of_memory_are_drawn_again_alike(x64, fine_bands, monkeypatch):
    left, stored, admit, store = [], [], seating.admit, rollout._store
    monkeypatch.setattr(seating, "admit", lambda *args: (out := admit(*args), left.extend(out[2]))[0])
    monkeypatch.setattr(rollout, "_store", lambda *args: (stored.append(np.sum(args[4] < len(args[1]))), store(*args))[1])
    lengths = [[12, 12, 12], [12, 12, 11], [12, 2, 12], [1, 12, 12], [12, 3, 12]]
    expected, plain = imposed(8, lengths)
    assert not left and sum(stored) == 5  # each prompt is computed once
    tokens = 140  # 60 or more for prompts: eight rows fit while they have 8 tokens each, not with 12
    found, usage = imposed(8, lengths, cache_bytes=tokens * rollout.cache_bytes_a_token(MODEL, "float64"))
    assert_same(found, expected)
    assert left and sum(stored) == 5 + 5
    assert usage.tokens == plain.tokens and usage.row_steps > plain.row_steps  # what was drawn twice is not counted twice


LENGTHS = np.random.default_rng(0)
DRAWN = (  # tokens of 256 prompts, and of 5 responses to each
    np.clip(np.exp(LENGTHS.normal(np.log(700), 0.5, 256)), 64, 4096).astype(int),
    np.clip(np.exp(LENGTHS.normal(np.log(120), 0.917, (256, 5))), 8, 2048).astype(int),
)


def test_slots_are_used_and_shapes_few_on_lengths_like_real_ones():
    """Prompts are cut to a 64th, which changes nothing in who sits where; responses are as drawn."""
    config = DecoderConfig("qwen2", 16, 8, 8, 1, 1, 1, 8)
    params = decoder.init(config, jax.random.key(0))
    prompts = [np.zeros(-(-p // 64), np.int32) for p in DRAWN[0]]
    sampling = Sampling((0,), 5, 2048, decode_steps_per_call=16, rows=80)
    rollout._decode.clear_cache()
    groups, usage = rollout.sample(config, params, prompts, sampling, lengths=DRAWN[1].tolist())
    assert [[len(r) for r in group.responses] for group in groups] == DRAWN[1].tolist()
    print(usage.tokens / usage.row_steps, rollout._decode._cache_size())
    assert usage.tokens == DRAWN[1].sum() and usage.tokens / usage.row_steps >= 0.93
    assert rollout._decode._cache_size() <= 26


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        rollout.sample(MODEL, random_params(np.float32), [PROMPTS[0], PROMPTS[1][:0]], SAMPLING)


def test_the_pool_is_as_large_as_memory_allows(monkeypatch):
    model, sampling = decoder.SIZES["qwen2.5-0.5b"], Sampling((1,), 5, 8192)
    for host, cache in ((None, None), (10**9, 10**8)):  # a CPU: the host's memory, over its 4 devices
        monkeypatch.setattr(hosts, "free_memory", lambda host=host: host)
        assert rollout.pool_size(model, "float32", sampling, 4096, None, 4) == (128, cache)
    token = rollout.cache_bytes_a_token(model, "bfloat16")
    assert token == 12288
    rows, cache = rollout.pool_size(model, "bfloat16", sampling, 4096, 20 * 10**9, 1)
    assert cache == 8 * 10**9 and rows == cache // ((512 + 1639) * token + 16 * model.vocab) == 277
    assert rollout.pool_size(model, "bfloat16", sampling, 4096, 20 * 10**9, 4) == (4 * 277, cache)
    assert rollout.pool_size(model, "bfloat16", sampling, 4096, 10**12, 1)[0] == 1024
    assert rollout.pool_size(model, "bfloat16", sampling, 4096, -1, 1) == (1, 0)


def test_prefilling_in_parts_changes_nothing(x64, monkeypatch):
    expected = draw(PROMPTS)
    monkeypatch.setattr(rollout, "_PREFILL_TOKENS", 24)  # two prompts of width 12 a call, an odd one in the last
    assert_same(draw(PROMPTS), expected)


def test_order_and_company_of_prompts_change_nothing(x64):
    expected, order = draw(PROMPTS), [3, 0, 4, 2, 1]
    assert_same(draw([PROMPTS[i] for i in order]), [expected[i] for i in order])
    assert_same(draw(PROMPTS[1:3], AT_ONCE), expected[1:3])
    assert_same(draw([*ragged_prompts([16, 2], seed=9), PROMPTS[0]], AT_ONCE)[2:], expected[:1])  # a wider cache
    five = draw(PROMPTS, replace(AT_ONCE, group_size=5))  # more samples of a prompt leave the first ones as they are
    assert [ids(group)[:3] for group in five] == [ids(group) for group in expected]


def test_rows_that_end_change_nothing_in_those_that_go_on(x64):
    """Without end tokens no row leaves before the limit, so nothing is ever compacted."""
    endless = draw(PROMPTS, replace(SAMPLING, end_tokens=()))
    for group, whole in zip(draw(PROMPTS), endless, strict=True):
        for response, logp, full, full_logp in zip(
            group.responses, group.sampler_logp, whole.responses, whole.sampler_logp, strict=True
        ):
            assert len(full) == 12
            np.testing.assert_array_equal(response, full[: len(response)])
            np.testing.assert_allclose(logp, full_logp[: len(logp)], rtol=0, atol=1e-12)


def test_seed_step_sample_and_attempt_each_give_other_tokens(x64):
    endless = replace(AT_ONCE, end_tokens=())
    twice = [PROMPTS[1], PROMPTS[0], PROMPTS[1]]
    runs = [draw(twice, endless), draw(twice, endless, seed=1), draw(twice, endless, step=1)]
    responses = [tuple(r) for run in runs for group in run for r in ids(group)]
    assert len(set(responses)) == len(responses) == 27


def test_attempts_of_a_repeated_prompt_do_not_depend_on_order(x64):
    a, b = PROMPTS[1], PROMPTS[0]
    one, two = draw([a, b, a], AT_ONCE), draw([b, a, a], AT_ONCE)
    assert_same([two[i] for i in (1, 0, 2)], one)
    assert slow_response(random_params(), a, AT_ONCE, 0, 0, 2, attempt=1)[0] == ids(one[2])[2]


# ---------------------------------------------------------------- the learner sees the same log-probs


@pytest.mark.parametrize("dtype, atol", [("float32", 1e-4), ("float64", 1e-10)])
def test_log_probs_equal_the_learners(request, dtype, atol):
    if dtype == "float64":
        request.getfixturevalue("x64")
    params = random_params(dtype)
    groups, usage = rollout.sample(MODEL, params, PROMPTS, SAMPLING, seed=3)
    groups = [replace(g, advantages=np.array([1.0, -0.5, -0.5], dtype)) for g in groups]
    packed = packing.pack(groups, 96)
    assert len(packed.packs) > 1 and packed.response_tokens == usage.tokens
    objective = Objective(temperature=0.7, dtype=dtype, remat="none", head_chunk=16)
    for pack in packed.packs:
        logp = learner.logprobs(MODEL, objective, params, pack)
        np.testing.assert_allclose(np.asarray(logp)[pack.mask], pack.sampler_logp[pack.mask], rtol=0, atol=atol)
    if dtype == "float32":  # what a training step reports of it
        sums = learner.zeros(params)
        for pack in packed.packs:
            sums = learner.accumulate(MODEL, objective, params, sums, pack)
        assert sums.count == usage.tokens and sums.clipped == 0 and 0 < sums.mismatch_max < atol


def test_greedy_is_the_argmax_of_the_whole_sequence():
    params, prompts = random_params(np.float32), PROMPTS[:3]
    greedy = Sampling((), group_size=2, max_response_tokens=64, temperature=0.0, decode_steps_per_call=32)
    groups, usage = rollout.sample(MODEL, params, prompts, greedy)
    assert usage == Usage(6 * 64, 6 * 64)
    for prompt, group in zip(prompts, groups, strict=True):
        assert ids(group)[0] == ids(group)[1] and group.truncated == (True, True)
        whole = np.zeros((1, 76), np.int32)
        length = len(prompt) + 64
        whole[0, :length] = np.concatenate([prompt, group.responses[0]])
        scores = jax.jit(decoder.logits, static_argnums=0)(MODEL, params, whole, np.array([length]))[0]
        scores = scores[len(prompt) - 1 : length - 1]
        np.testing.assert_array_equal(group.responses[0], scores.argmax(-1))
        np.testing.assert_allclose(group.sampler_logp[0], jax.nn.log_softmax(scores).max(-1), rtol=0, atol=1e-4)


# ---------------------------------------------------------------- what is computed


def counter(vocab=16):
    """A model whose likeliest next token is the last one plus one: lengths of greedy responses are known by hand."""
    config = replace(MODEL, vocab=vocab, d_model=vocab)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), decoder.shapes(config))
    params |= {"embed": jnp.eye(vocab), "head": jnp.roll(jnp.eye(vocab), 1, axis=0)}
    params["norm"]["scale"] = jnp.ones(vocab)
    return config, params


@pytest.fixture
def calls(monkeypatch):
    """What passes through the compiled functions: name -> list of (arguments, result's shapes)."""
    seen = {"_prefill": [], "_decode": [], "_repack": []}

    def watched(name, function, *args):
        before = jax.tree.map(np.shape, args)
        out = function(*args)
        seen[name].append((before, jax.tree.map(np.shape, out)))
        return out

    for name in seen:
        monkeypatch.setattr(rollout, name, functools.partial(watched, name, getattr(rollout, name)))
    return seen


def test_prompts_are_computed_once_and_leave_with_their_last_row(calls):
    config, params = counter()
    prompts = [np.array(p, np.int32) for p in ([3, 4, 5], [14], [7, 7, 12], [1, 9])]
    sampling = Sampling((15,), group_size=2, max_response_tokens=6, temperature=0.0, decode_steps_per_call=2)
    shown, told = [], []
    groups, usage = rollout.sample(
        config,
        params,
        prompts,
        sampling,
        progress=lambda *x: shown.append(x),
        finished=lambda index, group: told.append((len(shown), index, group)),
    )
    counted = [[6, 7, 8, 9, 10, 11], [15], [13, 14, 15], [10, 11, 12, 13, 14, 15]]
    assert [ids(g) for g in groups] == [[c, c] for c in counted]
    assert [g.truncated for g in groups] == [(True, True), (False, False), (False, False), (False, False)]

    # 4 prompts of bucket 3, not 8.
    [((*_, tokens, _), (cache, hidden))] = calls["_prefill"]
    assert tokens == (4, 3) and cache.v == ((4, 2, 3, 4),) * 2 and hidden == (4, 16)
    # 8 rows; then 6 (the prompt [14] leaves, 3 prompts are kept in 4 places); then 4 of 2 prompts.
    pools = [pool for _, (pool, *_) in calls["_decode"]]
    assert [p.responses.v for p in pools] == [(((8, 2, 6, 4),),) * 2, (((6, 2, 6, 4),),) * 2, (((4, 2, 6, 4),),) * 2]
    assert [p.prompts.v for p in pools] == [((4, 2, 3, 4),) * 2, ((4, 2, 3, 4),) * 2, ((2, 2, 3, 4),) * 2]
    assert [seats.slots.row for (*_, seats), _ in calls["_decode"]] == [(4, 2), (4, 2), (2, 2)]
    assert len(calls["_repack"]) == 2
    assert usage == Usage(row_steps=2 * 8 + 2 * 6 + 2 * 4, tokens=2 * (6 + 1 + 3 + 6))
    assert shown == [(2, 8), (4, 8), (8, 8)]
    # Each group as soon as its last response has ended, while others go on.
    assert [(call, index) for call, index, _ in told] == [(0, 1), (1, 2), (2, 0), (2, 3)]
    assert all(group is groups[index] for _, index, group in told)


def test_a_pool_shrinks_as_rows_of_a_group_end_one_by_one(calls):
    sampling = replace(SAMPLING, end_tokens=(8, 12, 14), decode_steps_per_call=2)
    groups, usage = rollout.sample(MODEL, random_params(np.float32), PROMPTS, sampling)
    lengths = np.array([[len(r) for r in g.responses] for g in groups])
    computed = sum(tokens[0] * tokens[1] for _, (_, tokens, _) in calls["_decode"])
    assert usage == Usage(computed, lengths.sum()) and usage.row_steps >= usage.tokens
    for call, (_, (pool, tokens, _)) in enumerate(calls["_decode"]):
        live = lengths > 2 * call  # as the call begins
        assert tokens[1] == min(15, packing.bucket(int(live.sum()), 2))
        assert pool.prompts.length[0] == min(5, packing.bucket(int(live.any(1).sum()), 1))
    assert pool.prompts.length[0] < 5 and pool.responses.length[0] < 15


def test_a_call_writes_its_caches_in_place(monkeypatch, optimized):
    """In the compiled text: the loop over tokens copies no cache, of prompts or of responses."""
    decode, texts = rollout._decode, []

    def compiled(*args):
        texts.append(decode.lower(*args).compile().as_text())
        return decode(*args)

    monkeypatch.setattr(rollout, "_decode", compiled)
    rollout.sample(MODEL, random_params(np.float32), PROMPTS, replace(SAMPLING, end_tokens=()))
    text = texts[0]
    caches = [f"f32[{n},{MODEL.kv_heads},{width},{MODEL.head_dim}]" for n, width in ((15, 12), (5, 12))]
    assert all(cache in text for cache in caches)
    assert not [line for line in text.splitlines() if " copy(" in line and any(f"= {cache}" in line for cache in caches)]


def test_nothing_is_compiled_twice(monkeypatch):
    monkeypatch.setattr(seating, "_NARROWEST", 2)
    params, endless = random_params(np.float32), replace(SAMPLING, end_tokens=())
    functions = (rollout._prefill, rollout._decode, rollout._repack, rollout._store, rollout._arrange, rollout._row_keys)
    rollout._decode.clear_cache()
    rollout.sample(MODEL, params, PROMPTS, endless)
    assert rollout._decode._cache_size() == 2  # room for 8 tokens and for 12, in three calls
    before = [f._cache_size() for f in functions]
    others = ragged_prompts([12, 9, 9, 10, 11], seed=2)
    rollout.sample(MODEL, params, others, replace(endless, rows=20), seed=7, step=3)
    assert [f._cache_size() for f in functions] == before


def test_no_prompts_are_no_groups():
    assert rollout.sample(MODEL, random_params(np.float32), [], SAMPLING) == ([], Usage(0, 0))


# ---------------------------------------------------------------- a mesh

ON_A_MESH = """
import jax, numpy as np
jax.config.update("jax_enable_x64", True)
from dataclasses import replace
from grpo_jax import config, mesh, rollout, seating
from models import attention
from test_rollout import AT_ONCE, MODEL, PROMPTS, SAMPLING, assert_same, random_params

split = []
def watched(function, *args):
    shape = lambda x: (x.shape, x.sharding.shard_shape(x.shape))
    split.append(jax.tree.map(shape, args[4:] if function is prefill else args[4]))
    return function(*args)

prefill, decode = rollout._prefill, rollout._decode
rollout._prefill, rollout._decode = (lambda *args, f=f: watched(f, *args) for f in (prefill, decode))
params, expected = random_params(seed=3), rollout.sample(MODEL, random_params(seed=3), PROMPTS, AT_ONCE)[0]
devices = mesh.make(config.Mesh(fsdp=2))
assert dict(devices.shape) == {"data": 2, "fsdp": 2, "tensor": 1}
placed = jax.device_put(params, mesh.shardings(devices, MODEL))
assert placed["embed"].sharding.shard_shape(placed["embed"].shape) == (17, 8)
del split[:]
attention.SQUARE = 8  # longer prompts go by tiles, on each device its own
found, usage = rollout.sample(MODEL, placed, PROMPTS, SAMPLING, mesh=devices)
assert_same(found, expected)
assert split[0] == (((8, 12), (2, 12)), ((8,), (2,))), split[0]
for pool in split[1:]:
    [((rows, *_), part)] = pool.responses.k[0]
    assert part[0] * 4 == rows
    assert pool.hidden[1][0] * 4 == rows
    (prompts, *_), part = pool.prompts.k[0]
    assert part[0] * 4 == prompts
assert split[1].responses.k[0][0][0][0] == 16 and usage.row_steps % 16 == 0
seating._NARROWEST, seating._FACTOR = 1, 2
found, _ = rollout.sample(MODEL, placed, PROMPTS, replace(SAMPLING, rows=8), mesh=devices)
assert_same(found, expected)
bands = {tuple(shape[0] for shape, _ in pool.responses.k[0]) for pool in split[1:] if hasattr(pool, "responses")}
assert (4, 4) in bands and all(b % 4 == 0 for sizes in bands for b in sizes), bands
print("the same")
"""


def test_a_mesh_gives_the_same_tokens():
    here = Path(__file__).parent
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent.parent)]),
    }
    done = subprocess.run([sys.executable, "-c", ON_A_MESH], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout == "the same\n", done.stderr
