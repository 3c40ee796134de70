"""Every token of every group is found at its place in the packs, and few shapes and little padding are needed."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import lengths
from grpo_jax import packing
from grpo_jax.group import Group
from grpo_jax.packing import bucket, pack, split

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
UNEVEN = [(7, [4]), (3, [5, 1]), (9, [1, 6, 3, 2, 6]), (1, [1]), (4, [2, 8, 1, 1, 3, 3, 1, 2]), (12, [1, 9])]


def make(lengths):
    """Groups of these (prompt length, response lengths), in which no two numbers are the same.

    Then a number says whose it is: token ids count up from 1, the sampler's log-probs down from -1, advantages from 100.
    """
    groups, token, logp, advantage = [], 1, -1.0, 100.0
    for p, responses in lengths:
        prompt = np.arange(token, token + p, dtype=np.int32)
        token += p
        ids, logps = [], []
        for r in responses:
            ids.append(np.arange(token, token + r, dtype=np.int32))
            logps.append(logp - np.arange(r))
            token, logp = token + r, logp - r
        advantages = advantage + np.arange(len(responses))
        advantage += len(responses)
        groups.append(Group(prompt, tuple(ids), tuple(logps), (False,) * len(responses), advantages))
    return groups


def shape(one):
    return tuple(x.shape for x in jax.tree.leaves(one))


def check(groups, budget, shards=1, tile=(8, 4)):
    """Reads every pack back, and compares it with the groups token by token. Returns what `pack` did."""
    packed = pack(groups, budget, shards, tile=tile)
    assert len({one.tokens.shape for one in packed.packs}) == 1
    found, prompts, tokens, losses = Counter(), Counter(), 0, 0
    for one in packed.packs:
        assert len(one.tokens) == shards and one.tokens.shape[1] <= budget
        for row in range(shards):
            here = rows_of(one)[row]
            responses = read(here)
            found.update(responses)
            prompts.update({prompt for prompt, _ in responses})
            tokens += real_tokens(here)
            losses += int(here.mask.sum())
    wanted = Counter(
        (tuple(g.prompt.tolist()), tuple(zip(r.tolist(), logp.tolist(), [a] * len(r), strict=True)))
        for g in groups
        for r, logp, a in zip(g.responses, g.sampler_logp, g.advantages.tolist(), strict=True)
    )
    assert found == wanted
    assert losses == packed.response_tokens == sum(g.response_tokens for g in groups)
    assert packed.repeated_prompts == prompts.total() - len(groups)
    repeated = sum(len(prompt) * (count - 1) for prompt, count in prompts.items())
    assert tokens == packed.tokens == sum(g.tokens for g in groups) + repeated
    assert packed.launched_tokens == sum(one.tokens.size for one in packed.packs)
    assert packed.cells == sum(int(seen(row).sum()) for one in packed.packs for row in rows_of(one))
    assert packed.launched_cells == sum(one.layout.steps[..., 1:].size * math.prod(tile) for one in packed.packs)
    return packed


def rows_of(one):
    return [jax.tree.map(lambda x: x[b], one) for b in range(len(one.tokens))]  # noqa: B023


def real_tokens(row):
    return int((row.layout.first < len(row.tokens)).sum())


def seen(row):
    """The mask [T, T] that a layout stands for."""
    at, layout = np.arange(len(row.tokens)), row.layout
    first, prompt, prompt_end = (x[:, None] for x in (layout.first, layout.prompt, layout.prompt_end))
    return ((first <= at) & (at <= at[:, None])) | ((prompt <= at) & (at < prompt_end))


def read(row):
    """(prompt, ((token, sampler log-prob, advantage), ...)) of every response of one row, and that all else is padding."""
    t, layout = len(row.tokens), row.layout
    real = layout.first < t
    assert not row.tokens[~real].any() and not row.positions[~real].any() and not layout.prompt_end[~real].any()
    np.testing.assert_array_equal(row.old_logp, row.sampler_logp)
    assert row.ref_logp is None
    for field in (row.source, row.target, row.advantage, row.sampler_logp):
        assert not field[~row.mask].any()

    # Every pair of tiles in which something is seen is there, once, and no other; no step is without one.
    mask = np.pad(seen(row), [(0, -t % size) for size in layout.tile])
    wanted = np.argwhere(mask.reshape(len(mask) // layout.tile[0], layout.tile[0], -1, layout.tile[1]).any((1, 3)))
    steps = layout.steps[layout.steps[:, 0] >= 0]
    pairs = [(i, j) for i, *keys in steps.tolist() for j in keys if j >= 0]
    np.testing.assert_array_equal(np.reshape(pairs, (-1, 2)), wanted)
    assert (steps[:, 1] >= 0).all() and (layout.steps[len(steps) :] == -1).all()

    responses = []
    for start in np.unique(layout.first[real]):
        own = np.flatnonzero(layout.first == start)
        np.testing.assert_array_equal(own, start + np.arange(len(own)))
        begin, end = layout.prompt[start], layout.prompt_end[start]
        assert (layout.prompt[own] == begin).all() and (layout.prompt_end[own] == end).all()
        np.testing.assert_array_equal(row.positions[own], (end - begin) + np.arange(len(own)))
        if begin == end:
            continue  # a prompt
        assert layout.first[begin] == begin and layout.prompt_end[begin] == layout.prompt[begin]  # what it sees is a prompt
        predicts = np.concatenate([[end - 1], own[:-1]])
        # Ids are all different, so that source and target name one place of the M.
        pairs = zip(predicts, row.tokens[own], strict=True)
        places = [np.flatnonzero(row.mask & (row.source == source) & (row.target == token)) for source, token in pairs]
        assert all(len(found) == 1 for found in places)
        at = np.concatenate(places)
        triples = zip(row.tokens[own].tolist(), row.sampler_logp[at].tolist(), row.advantage[at].tolist(), strict=True)
        responses.append((tuple(row.tokens[begin:end].tolist()), tuple(triples)))
    assert sum(len(triples) for _, triples in responses) == row.mask.sum()
    return responses


# Places


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("budget", [24, 40, 61, 1000])
def test_every_token_is_at_its_place(budget, shards):
    packed = check(make(UNEVEN), budget, shards)
    assert (packed.repeated_prompts > 0) == (budget == 24)  # the groups of 27 and 25 tokens
    if budget == 1000:
        assert len(packed.packs) == 1


@PROPERTY
@given(
    sizes=st.lists(st.tuples(st.integers(1, 12), st.lists(st.integers(1, 10), min_size=1, max_size=6)), min_size=1, max_size=9),
    budget=st.integers(22, 90),
    shards=st.integers(1, 3),
)
def test_every_token_of_any_groups_is_at_its_place(sizes, budget, shards):
    check(make(sizes), budget, shards)


def test_one_group_worked_by_hand():
    """Prompt 1 2 3, responses 4 5 and 6: 6 tokens, in a row of 6."""
    (one,) = pack(make([(3, [2, 1])]), 100).packs
    want = {
        "tokens": [1, 2, 3, 4, 5, 6],
        "positions": [0, 1, 2, 3, 4, 3],
        "source": [2, 3, 2],
        "target": [4, 5, 6],
        "mask": [True] * 3,
        "advantage": [100, 100, 101],
        "sampler_logp": [-1, -2, -3],
        "old_logp": [-1, -2, -3],
    }
    for name, value in want.items():
        np.testing.assert_array_equal(getattr(one, name), [value], name)
    np.testing.assert_array_equal(one.layout.first, [[0, 0, 0, 3, 3, 5]])
    np.testing.assert_array_equal(one.layout.prompt, [[0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(one.layout.prompt_end, [[0, 0, 0, 3, 3, 3]])
    np.testing.assert_array_equal(one.layout.steps, [[[0, 0, -1, -1, -1]]])
    integers = (one.tokens, one.positions, one.source, one.target, *jax.tree.leaves(one.layout))
    assert {x.dtype for x in integers} == {np.dtype(np.int32)}


def test_an_empty_row_is_all_padding():
    groups = make([(3, [2, 1])])
    (one,) = check(groups, 100, shards=3).packs
    assert [one.mask[b].sum() for b in range(3)] == [3, 0, 0]
    assert not one.tokens[1:].any() and (one.layout.first[1:] == 6).all() and (one.layout.steps[1:] == -1).all()


def test_groups_without_advantages_or_in_float32_keep_their_kind():
    (group,) = make([(3, [2, 1])])
    group = replace(group, advantages=None, sampler_logp=tuple(x.astype(np.float32) for x in group.sampler_logp))
    (one,) = pack([group], 100).packs
    assert not one.advantage.any() and one.mask.sum() == 3
    assert one.sampler_logp.dtype == one.advantage.dtype == one.old_logp.dtype == np.float32


# Budget and splitting


def test_a_group_longer_than_a_row_is_split_between_responses_and_its_prompt_counted_again():
    (group,) = make([(5, [4, 3, 6, 2, 1])])  # 21 tokens; a row of 12 has 7 beside the prompt
    parts = split(group, 12)
    assert [[len(r) for r in part.responses] for part in parts] == [[4, 3], [6], [2, 1]]
    assert [part.advantages.tolist() for part in parts] == [[100, 101], [102], [103, 104]]
    assert all(part.prompt is group.prompt and len(part.truncated) == len(part.responses) for part in parts)
    packed = check([group], 12)
    assert (packed.repeated_prompts, packed.tokens, packed.response_tokens) == (2, 21 + 10, 16)
    assert split(group, 21) == [group] and pack([group], 21).repeated_prompts == 0


def test_a_prompt_and_response_that_fit_no_row_are_refused_with_the_option_to_raise():
    groups = make([(5, [4, 8])])
    with pytest.raises(ValueError) as error:
        pack(groups, 12)
    assert str(error.value) == ("a prompt of 5 and a response of 8 tokens exceed learner.tokens_per_microbatch = 12; raise it")
    check(groups, 13)


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_rows_hold_no_more_than_the_budget_and_are_evenly_full(shards):
    lengths = np.random.default_rng(0).integers(1, 20, (60, 6))
    groups = make([(p, rs) for p, *rs in lengths.tolist()])
    packed = check(groups, 200, shards)
    rows = [real_tokens(row) for one in packed.packs for row in rows_of(one)]
    assert max(rows) <= 200
    assert len(packed.packs) <= -(-packed.tokens // (200 * shards)) + 1  # one more than must be
    assert max(rows) - min(rows) <= max(g.tokens for g in groups)


def test_no_groups_are_refused():
    with pytest.raises(ValueError, match="no groups to pack"):
        pack([], 100)


# Shapes


@settings(max_examples=300, deadline=None, derandomize=True)
@given(n=st.integers(0, 10**7), steps=st.sampled_from([1, 2, 4, 8, 16]))
@example(n=0, steps=8)
@example(n=1, steps=1)
@example(n=2**20, steps=8)
@example(n=2**20 + 1, steps=8)
def test_bucket_is_no_less_and_little_more(n, steps):
    size = bucket(n, steps)
    assert max(n, 1) <= size < max(n, 1) * (1 + 1 / steps) + 1e-9
    assert bucket(size, steps) == size  # so that sizes are few:
    assert bucket(n + 1, steps) >= size


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_bucket_has_so_many_sizes_a_power_of_two(steps):
    assert len({bucket(n, steps) for n in range(1025, 2049)}) == steps
    assert [bucket(n, 2) for n in range(1, 10)] == [1, 2, 3, 4, 6, 6, 8, 8, 12]


def test_packing_depends_on_nothing_but_the_groups():
    """The same groups give the same packs; in another order, where no two are equally long, too."""
    groups = make(UNEVEN)
    assert len({g.tokens for g in groups}) == len(groups)
    first = pack(groups, 60, 2).packs
    for seed in range(10):
        order = np.random.default_rng(seed).permutation(len(groups))
        again = pack([groups[i] for i in order], 60, 2).packs
        jax.tree.map(np.testing.assert_array_equal, again, first)
    same = make(UNEVEN)[2]
    equal = [pack([same] * 5, 60, 2).packs for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, *equal)


# (groups a mini-batch, responses, budget, median prompt, median response, batches) -> (most shapes, most padding)
SCENARIOS = {
    "Tool-N1": ((256, 5, 30720, 1000, 200, 40), (10, 0.05)),
    "quarter": ((64, 5, 30720, 1000, 200, 200), (40, 0.05)),
    "laptop": ((16, 8, 16384, 150, 50, 200), (45, 0.05)),
}


@pytest.mark.parametrize("drawn, limits", SCENARIOS.values(), ids=SCENARIOS)
def test_random_lengths_need_few_shapes_and_little_padding(drawn, limits):
    """A shape is a compilation. Lengths are log-normal, with the heavy tails of prompts (0.4) and answers (0.6)."""
    n, g, budget, prompt, response, batches = drawn
    most_shapes, most_padding = limits
    shapes, padding = Counter(), []
    for seed in range(batches):
        rng = np.random.default_rng(seed)
        p = np.clip(rng.lognormal(np.log(prompt), 0.4, n).astype(int), 1, budget // 4)
        r = np.clip(rng.lognormal(np.log(response), 0.6, (n, g)).astype(int), 1, budget // 4)
        blank = np.zeros(budget, np.int32)
        groups = [
            Group(blank[:a], tuple(blank[:b] for b in bs), tuple(blank[:b] for b in bs), (False,) * g, np.zeros(g))
            for a, bs in zip(p, r, strict=True)
        ]
        packed = pack(groups, budget)
        shapes.update(map(shape, packed.packs))
        padding.append(1 - packed.tokens / packed.launched_tokens)
    print(f"{len(shapes)} shapes in {batches} batches, {np.mean(padding):.3f} padding, at most {max(padding):.3f}")
    assert len(shapes) <= most_shapes, shapes
    assert np.mean(padding) < most_padding and max(padding) < 1 / 8


def test_padding_on_lengths_like_real_ones():
    """256 tool-calling groups of 5 in micro-batches as by default: of tokens, and of pairs of tokens in attention.

    A pair counts only where the one sees the other, so the upper half of a causal square is padding too.
    """
    prompts, responses = lengths.draw(256, 5)
    blank = np.zeros(4096, np.int32)
    groups = [
        Group(blank[:p], tuple(blank[:r] for r in rs), tuple(np.zeros(r, np.float32) for r in rs), (False,) * 5, np.zeros(5))
        for p, rs in zip(prompts, responses, strict=True)
    ]
    packed = pack(groups, 30720)
    tokens, cells = 1 - packed.tokens / packed.launched_tokens, 1 - packed.cells / packed.launched_cells
    print(f"{len(packed.packs)} packs of {len(set(map(shape, packed.packs)))} shapes, tokens {tokens:.3f}, cells {cells:.3f}")
    assert 0 < tokens < 0.08 and 0 < cells < 0.30
    assert len(set(map(shape, packed.packs))) <= 6


def test_rows_lie_in_rectangles_that_another_flat_row_needs():
    """As many places of at least a width as the flat row with most such rows needs; two counts a power of two."""
    groups = make([(300, [10, 10]), (100, [10] * 5), (100, [100, 300])])  # widths 512 512; 128 x 5; 256 512
    rows = [[group] for group in groups]
    assert packing._rectangles(rows) == {512: 2, 128: 4}  # 5 rows: 6 places
    assert packing._rectangles(rows[1:]) == {512: 1, 256: 1, 128: 4}
    assert packing._rectangles(rows[1:2]) == {128: 6}
    packed = pack(groups, 600, 3, kernel="plain")
    ((wide, narrow),) = [one.layout.length for one in packed.packs]
    assert sorted(map(tuple, np.concatenate([wide, narrow], 1).tolist())) == [
        (110, 110, 110, 110, 110, 0),
        (310, 310, 0, 0, 0, 0),
        (400, 200, 0, 0, 0, 0),
    ]
    assert packed.launched_cells == 3 * (2 * 512 * 513 + 4 * 128 * 129) // 2
