"""The mathematics of the loss against float64 numpy written from the formulas, and against cases worked out by hand."""

from __future__ import annotations

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo_jax import loss

WAYS = pytest.mark.parametrize("way", ["plain", "jit"])
KINDS = ("k1", "k2", "k3")


def run(way, function, *args, **static):
    """The function as it is, or compiled with its keywords fixed."""
    bound = functools.partial(function, **static)
    return (jax.jit(bound) if way == "jit" else bound)(*args)


compiled = functools.partial(run, "jit")


def close(found, want, tolerance=1e-13):
    chex.assert_trees_all_close(found, jnp.asarray(want), rtol=tolerance, atol=tolerance)


# The formulas, in numpy


def advantages_of(rewards, normalize="std", eps=1e-6):
    out = []
    for row in np.asarray(rewards, np.float64):
        mean, std = (row.mean(), row.std(ddof=1)) if len(row) > 1 else (0.0, 1.0)
        if len(row) > 1 and (row == row[0]).all():
            out.append(np.zeros_like(row))
        else:
            out.append((row - mean) / (std + eps) if normalize == "std" else row - mean)
    return np.array(out)


def objective_of(logp, old, advantage, low, high):
    ratio = np.exp(logp - old)
    plain, limited = ratio * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage
    return -np.minimum(plain, limited), limited < plain


def kl_of(logp, ref, kind):
    d = np.asarray(ref) - np.asarray(logp)
    return {"k1": -d, "k2": d**2 / 2, "k3": np.clip(np.exp(d) - d - 1, -10, 10)}[kind]


# Advantages


@WAYS
@pytest.mark.parametrize("normalize", ["std", "mean_only"])
@pytest.mark.parametrize("group", [1, 2, 5, 8])
def test_advantages_equal_the_formula(x64, way, normalize, group):
    rewards = np.random.default_rng(group).normal(size=(4, group))
    rewards[2] = 0.7
    found = run(way, loss.group_advantages, rewards, normalize=normalize)
    chex.assert_shape(found, (4, group))
    assert found.dtype == jnp.float64
    close(found, advantages_of(rewards, normalize))


def test_advantages_worked_by_hand(x64):
    """Rewards 1, 0, 0, 0: mean 1/4 and, with ddof = 1, std sqrt((9 + 3) / 16 / 3) = 1/2."""
    found = compiled(loss.group_advantages, jnp.array([[1.0, 0.0, 0.0, 0.0]]), eps=0.0)
    close(found, [[1.5, -0.5, -0.5, -0.5]])
    found = compiled(loss.group_advantages, jnp.array([[1.0, 0.0, 0.0, 0.0]]), normalize="mean_only")
    close(found, [[0.75, -0.25, -0.25, -0.25]])
    close(compiled(loss.group_advantages, jnp.array([[2.0, 0.0]]), eps=0.5), [[1 / (2**0.5 + 0.5), -1 / (2**0.5 + 0.5)]])


def test_a_group_of_one_has_mean_0_and_std_1(x64):
    rewards = jnp.array([[1.0], [0.0], [-0.2]])
    close(compiled(loss.group_advantages, rewards), rewards / (1 + 1e-6), 0)
    close(compiled(loss.group_advantages, rewards, normalize="mean_only"), rewards, 0)


@WAYS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("group", [3, 6, 7])
def test_equal_rewards_give_exactly_0(x64, way, dtype, group):
    """A mean of 0.2s or 0.4s is rounded, and eps would blow its error up."""
    rewards = jnp.asarray(np.repeat([[0.2], [0.4], [0.0], [-0.2]], group, axis=1), dtype)
    for normalize in ("std", "mean_only"):
        chex.assert_trees_all_equal(run(way, loss.group_advantages, rewards, normalize=normalize), jnp.zeros_like(rewards))


def test_rewards_may_be_whole_numbers():
    found = loss.group_advantages(np.array([[1, 0, 0, 0]]), normalize="mean_only")
    chex.assert_trees_all_equal(found, jnp.array([[0.75, -0.25, -0.25, -0.25]], jnp.float32))


def test_unknown_kinds_are_refused():
    x = jnp.zeros((1, 2))
    with pytest.raises(ValueError, match="'zscore'.*'std', 'mean_only' or 'rloo'"):
        loss.group_advantages(x, normalize="zscore")
    with pytest.raises(ValueError, match="'mean'.*'token_mean', 'sequence_mean' or 'constant'"):
        loss.aggregate(x, x > 0, kind="mean")
    with pytest.raises(ValueError, match="'k4'.*'k3', 'k1' or 'k2'"):
        loss.kl_estimate(x, x, kind="k4")


# Properties. Rewards are tenths, as rewards are; few sizes, so that few are compiled.

TENTHS = st.integers(-20, 20).map(lambda n: n / 10)
REWARDS = st.sampled_from([1, 2, 5]).flatmap(lambda g: st.lists(TENTHS, min_size=g, max_size=g)).map(lambda row: [row])
PROPERTY = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # x64 may last for all examples
)
advantages_jit = jax.jit(loss.group_advantages, static_argnames=("normalize",))


@PROPERTY
@given(rewards=REWARDS, constant=st.integers(-1000, 1000).map(lambda n: n / 10))
def test_adding_a_constant_to_the_rewards_changes_nothing(x64, rewards, constant):
    rewards = np.array(rewards)
    if rewards.shape[1] > 1:  # a group of one has no baseline
        close(advantages_jit(rewards + constant), advantages_jit(rewards), 1e-10)


@PROPERTY
@given(rewards=REWARDS, scale=st.sampled_from([0.01, 0.3, 7.0, 1e4]))
def test_scaling_the_rewards_changes_nothing_but_through_eps(x64, rewards, scale):
    rewards = np.array(rewards)
    if rewards.shape[1] > 1:
        found = advantages_jit(rewards * scale)
        close(found, advantages_jit(rewards, eps=1e-6 / scale), 1e-10)
        close(found, advantages_jit(rewards), 1e-2)
    close(advantages_jit(rewards * scale, normalize="mean_only"), scale * advantages_jit(rewards, normalize="mean_only"), 1e-9)


@PROPERTY
@given(rewards=REWARDS, seed=st.integers(0, 2**32 - 1))
def test_permuting_a_group_permutes_its_advantages(x64, rewards, seed):
    rewards = np.array(rewards)
    order = np.random.default_rng(seed).permutation(rewards.shape[1])
    close(advantages_jit(rewards[:, order]), advantages_jit(rewards)[:, order], 1e-12)


@PROPERTY
@given(rewards=REWARDS)
def test_advantages_have_mean_0_and_the_sign_of_the_rewards(x64, rewards):
    rewards = np.array(rewards)
    found = advantages_jit(rewards)
    if rewards.shape[1] > 1:
        assert abs(float(found.mean())) < 1e-9
        spread = rewards.max() > rewards.min()
        assert abs(float(jnp.std(found, ddof=1)) - spread) < 1e-4
        assert np.all(np.sign(found[rewards == rewards.max()]) == spread)


# The clipped objective

EDGES = {"symmetric": (0.2, 0.2), "asymmetric": (0.2, 0.28), "wide": (0.6, 0.1)}


@WAYS
@pytest.mark.parametrize("low, high", EDGES.values(), ids=EDGES)
def test_objective_equals_the_formula(x64, way, low, high):
    rng = np.random.default_rng(0)
    logp, old = rng.normal(size=(2, 6, 50)) * 0.4 - 1
    advantage = rng.normal(size=(6, 1))
    found, clipped = run(way, loss.token_objective, logp, old, advantage, clip_low=low, clip_high=high)
    want, want_clipped = objective_of(logp, old, advantage, low, high)
    chex.assert_shape([found, clipped], (6, 50))
    close(found, want)
    np.testing.assert_array_equal(clipped, want_clipped)
    assert 0.1 < want_clipped.mean() < 0.9


# ratio, advantage -> loss, clipped; clip_low = 0.25 and clip_high = 0.5, so that the edges 0.75 and 1.5 are exact.
BY_HAND = [
    (1.0, 2.0, -2.0, False),
    (1.0, -2.0, 2.0, False),
    (1.4, 2.0, -2.8, False),  # inside
    (1.4, -2.0, 2.8, False),
    (2.0, 2.0, -3.0, True),  # above, and wanted: no more than 1.5 of it
    (2.0, -2.0, 4.0, False),  # above, and unwanted: pushed back
    (0.5, 2.0, -1.0, False),  # below, and wanted: pulled back
    (0.5, -2.0, 1.5, True),  # below, and unwanted: no less than 0.75 of it
    (1.6, 2.0, -3.0, True),
    (0.7, -2.0, 1.5, True),
    (2.0, 0.0, 0.0, False),
    (0.5, 0.0, 0.0, False),
]


def test_objective_and_its_gradient_worked_by_hand(x64):
    ratio, advantage, want, want_clipped = map(np.array, zip(*BY_HAND, strict=True))
    logp, old = np.log(ratio) - 3, np.full(len(ratio), -3.0)
    objective = functools.partial(loss.token_objective, clip_low=0.25, clip_high=0.5)
    found, clipped = compiled(objective, logp, old, advantage)
    close(found, want, 1e-14)
    np.testing.assert_array_equal(clipped, want_clipped)
    gradient = compiled(jax.grad(lambda x: objective(x, old, advantage)[0].sum()), logp)
    close(gradient, np.where(want_clipped, 0, -ratio * advantage), 1e-14)  # d ratio / d logp = ratio
    np.testing.assert_array_equal(gradient[want_clipped], 0)


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("d", [0.2, -0.2])
def test_a_ratio_exactly_at_an_edge_is_not_clipped_and_just_beyond_is(x64, advantage, d):
    logp, old = jnp.array([d]), jnp.zeros(1)
    ratio = float(jnp.exp(logp)[0])
    edge = ratio - 1 if d > 0 else 1 - ratio
    assert (1 + edge if d > 0 else 1 - edge) == ratio  # so that the case is what its name says
    wanted = (d > 0) == (advantage > 0)  # the side on which the objective stops paying
    name = "clip_high" if d > 0 else "clip_low"
    for width, clipped in [(edge, False), (edge - 1e-9, wanted), (edge + 1e-9, False)]:
        found, at = compiled(loss.token_objective, logp, old, jnp.array([advantage]), **{name: width})
        assert bool(at[0]) is clipped
        close(found, [-advantage * ratio], 1e-8)


def test_objective_and_gradient_stay_finite_far_from_the_edges():
    logp = jnp.array([200.0, -200.0, 200.0, -200.0])
    advantage = jnp.array([1.0, 1.0, -1.0, -1.0])
    objective = lambda x: loss.token_objective(x, jnp.zeros(4), advantage)  # noqa: E731
    found, clipped = objective(logp)
    assert found[0] == np.float32(-1.2) and found[3] == np.float32(0.8)
    np.testing.assert_array_equal(clipped, [True, False, False, True])
    chex.assert_tree_all_finite((found, jax.grad(lambda x: objective(x)[0].sum())(logp)))


# Sums and counts


@WAYS
def test_aggregate_and_policy_loss_are_sums_and_counts(x64, way):
    rng = np.random.default_rng(1)
    logp, old = rng.normal(size=(2, 3, 7)) * 0.5
    advantage, mask = rng.normal(size=(3, 1)), rng.random((3, 7)) < 0.6
    mask[1] = False
    want, clipped = objective_of(logp, old, advantage, 0.2, 0.28)
    total, count = run(way, loss.aggregate, want, mask)
    close(total, want[mask].sum())
    assert int(count) == mask.sum()
    total, count, clipped_count = run(way, loss.policy_loss, logp, old, advantage, mask, clip_low=0.2, clip_high=0.28)
    chex.assert_shape([total, count, clipped_count], ())
    close(total, want[mask].sum())
    assert (int(count), int(clipped_count)) == (mask.sum(), clipped[mask].sum())
    assert 0 < clipped[mask].sum() < clipped.sum()


def test_an_all_false_mask_gives_0_and_no_gradient():
    x, mask = jnp.array([[1.0, -2.0]]), jnp.zeros((1, 2), bool)
    assert [float(v) for v in compiled(loss.aggregate, x, mask)] == [0, 0]
    assert [float(v) for v in compiled(loss.policy_loss, x, x - 1, x, mask)] == [0, 0, 0]
    np.testing.assert_array_equal(compiled(jax.grad(lambda y: loss.policy_loss(y, x, x, mask)[0]), x), 0)


def test_what_lies_under_the_mask_does_not_matter():
    x, mask = jnp.array([1.0, jnp.nan, jnp.inf, 3.0]), jnp.array([True, False, False, True])
    assert [float(v) for v in compiled(loss.aggregate, x, mask)] == [4, 2]


def test_a_sum_cut_in_two_is_the_same_sum(x64):
    rng = np.random.default_rng(2)
    logp, old, advantage = rng.normal(size=(3, 9))
    mask = rng.random(9) < 0.7
    whole = loss.policy_loss(logp, old, advantage, mask)
    cut = [loss.policy_loss(logp[s], old[s], advantage[s], mask[s]) for s in (slice(0, 4), slice(4, 9))]
    close(jnp.stack([a + b for a, b in zip(*cut, strict=True)]), jnp.stack(whole))


# KL and entropy


@WAYS
@pytest.mark.parametrize("kind", KINDS)
def test_kl_equals_the_formula_with_its_gradient(x64, way, kind):
    d = np.linspace(-10.5, 2.55, 60)  # k3 stays below 10 in here
    logp = -np.linspace(0.1, 9, 60)
    found = run(way, loss.kl_estimate, logp, logp + d, kind=kind)
    close(found, kl_of(logp, logp + d, kind))
    gradient = run(way, jax.grad(lambda x: loss.kl_estimate(x, logp + d, kind=kind).sum()), logp)
    # d falls as logp rises: -(exp(d) - 1), 1 and -d
    close(gradient, {"k1": np.ones(60), "k2": -d, "k3": 1 - np.exp(d)}[kind], 1e-12)


def test_kl_worked_by_hand(x64):
    logp, ref = jnp.array([-1.0]), jnp.array([-1.0 + math.log(2)])
    for kind, want in [("k3", 1 - math.log(2)), ("k1", -math.log(2)), ("k2", math.log(2) ** 2 / 2)]:
        close(loss.kl_estimate(logp, ref, kind=kind), [want], 1e-15)
        assert float(loss.kl_estimate(logp, logp, kind=kind)[0]) == 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_k3_is_clamped_and_its_gradient_finite_far_out(x64, dtype):
    d = jnp.asarray([100.0, -100.0, 1e4, -1e4, 19.0, 2.7, -11.1], dtype)  # the last two: just beyond the clamp
    logp = jnp.full(d.shape, -1.0, dtype)
    found = compiled(loss.kl_estimate, logp, logp + d)
    chex.assert_trees_all_equal(found, jnp.full(d.shape, 10.0, dtype))
    gradient = compiled(jax.grad(lambda x: loss.kl_estimate(x, logp + d).sum()), logp)
    chex.assert_trees_all_equal(gradient, jnp.zeros_like(logp))


def test_k3_is_never_negative_in_float32():
    """exp(d) - d - 1 cancels near 0: whatever is left of it must be rounding."""
    logp = jnp.linspace(-1e-3, 1e-3, 1001, dtype=jnp.float32)
    assert float(loss.kl_estimate(logp, jnp.zeros(1001)).min()) > -2e-7


@WAYS
def test_entropy_equals_the_formula(x64, way):
    logits = np.random.default_rng(3).normal(size=(4, 3, 11)) * 3
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    found = run(way, loss.entropy, logits)
    chex.assert_shape(found, (4, 3))
    close(found, -(p * np.log(p)).sum(-1))
    close(run(way, loss.entropy, logits + 1e4), found, 1e-9)


def test_entropy_worked_by_hand(x64):
    logits = jnp.log(jnp.array([[0.25, 0.25, 0.25, 0.25], [0.5, 0.25, 0.125, 0.125], [1.0, 1e-300, 1e-300, 1e-300]]))
    close(compiled(loss.entropy, logits), [2 * math.log(2), 1.75 * math.log(2), 0.0], 1e-15)
    gradient = compiled(jax.grad(lambda x: loss.entropy(x).sum()), logits)
    p = np.exp(logits)
    want = -p * (logits + np.array([2, 1.75, 0])[:, None] * math.log(2))  # -p (log p + H)
    close(gradient, want, 1e-14)


# The kin of GRPO


@WAYS
@pytest.mark.parametrize("group", [2, 5])
def test_rloo_compares_with_the_mean_of_the_others(x64, way, group):
    rewards = np.random.default_rng(group).normal(size=(4, group))
    rewards[2] = 0.1
    want = np.array([[r - np.delete(row, i).mean() for i, r in enumerate(row)] for row in rewards])
    found = run(way, loss.group_advantages, rewards, normalize="rloo")
    close(found, want)
    np.testing.assert_array_equal(found[2], 0)


RAGGED = (4, 1, 7, 3)  # tokens of the responses of one row


def ragged_row(seed=3):
    """(logp, old, advantage, mask, response), each [17], of four responses with two masked places after them."""
    rng = np.random.default_rng(seed)
    starts = np.cumsum([0, *RAGGED[:-1]])
    response = np.concatenate([np.repeat(starts, RAGGED), [0, 0]])
    advantage = np.concatenate([np.repeat(rng.normal(size=4), RAGGED), [0, 0]])
    return *rng.normal(size=(2, 17)) * 0.3, advantage, np.arange(17) < 15, response


@WAYS
def test_the_ratio_of_a_response_is_the_geometric_mean_of_its_tokens(x64, way):
    logp, old, _, mask, response = ragged_row()
    found = np.asarray(run(way, loss.sequence_log_ratio, logp, old, mask, response))
    parts = np.split((logp - old)[:15], np.cumsum(RAGGED)[:-1])
    close(found, np.concatenate([*(np.full(len(p), p.mean()) for p in parts), [0, 0]]))
    rows = [np.stack([x, x[::-1] if x.dtype == float else x]) for x in (logp, old, mask, response)]
    assert run(way, loss.sequence_log_ratio, *rows).shape == (2, 17)


def test_straight_has_one_value_and_another_gradient(x64):
    value, slope = compiled(jax.value_and_grad(lambda logp: jnp.exp(loss.straight(0.5, logp))), -3.0)
    close(jnp.stack([value, slope]), [math.exp(0.5), math.exp(0.5)])


@WAYS
def test_cispo_equals_the_formula_and_no_gradient_is_cut(x64, way):
    logp, old, advantage, *_ = ragged_row()
    weight = np.clip(np.exp(logp - old), 0.6, 1.2)
    found, clipped = run(way, loss.cispo_objective, logp, old, advantage, clip_low=0.4, clip_high=0.2)
    close(found, -weight * advantage * logp)
    np.testing.assert_array_equal(clipped, weight != np.exp(logp - old))
    slope = jax.grad(lambda x: loss.cispo_objective(x, old, advantage, clip_low=0.4, clip_high=0.2)[0].sum())(logp)
    close(slope, -weight * advantage)
    assert clipped[:15].any() and not clipped[:15].all()


def test_importance_weights_are_capped_and_constant(x64):
    old, sampler = jnp.array([-1.0, -1.0, -5.0, 300.0]), jnp.array([-1.5, -3.0, -1.0, -300.0])
    close(compiled(loss.importance_weight, old, sampler, 2.0), [math.exp(0.5), 2.0, math.exp(-4), 2.0])
    np.testing.assert_array_equal(jax.grad(lambda x: loss.importance_weight(x, sampler, 2.0).sum())(old), 0)


def test_overlong_worked_by_hand():
    """DAPO's own numbers, a fifth of them: up to 16384 of 20480 free, then evenly down to -1."""
    found = loss.overlong(np.array([1, 16384, 17408, 18432, 20480, 30000]), 20480, 4096)
    np.testing.assert_allclose(found, [0, 0, -0.25, -0.5, -1, -1])


@WAYS
@pytest.mark.parametrize("kind", ["token_mean", "sequence_mean", "constant"])
def test_means_equal_the_formula(x64, way, kind):
    x, _, _, mask, response = ragged_row()
    parts = np.split(x[:15], np.cumsum(RAGGED)[:-1])
    want = {
        "token_mean": np.concatenate(parts).mean(),
        "sequence_mean": np.mean([p.mean() for p in parts]),
        "constant": sum(p.sum() for p in parts) / (4 * 9),
    }
    total, count = run(way, loss.aggregate, x, mask, kind=kind, response=response, longest=9)
    close(total / count, want[kind])
    close(count, 15 if kind == "token_mean" else 4)
