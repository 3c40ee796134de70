"""Drawing a token: the distribution that `rollout.choose` draws from, at its edges too, and the log-prob that it tells."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import rollout

choose = jax.jit(rollout.choose, static_argnums=(2, 3, 4))


def softmax(logits, temperature=1.0):
    scores = np.asarray(logits, np.float64) / temperature
    p = np.exp(scores - scores.max())
    return p / p.sum()


def chi_square(tokens, p):
    counts = np.bincount(tokens, minlength=len(p))
    assert len(counts) == len(p) and min(len(tokens) * p) >= 5
    return ((counts - len(tokens) * p) ** 2 / (len(tokens) * p)).sum()


# At p = 0.001, for as many degrees of freedom as tokens less one.
@pytest.mark.parametrize("v, critical", [(3, 13.816), (50, 85.351)])
def test_frequencies_are_those_of_the_softmax_at_the_temperature(v, critical):
    logits, n = np.random.default_rng(2).normal(size=v).astype(np.float32), 30_000
    keys = jax.random.split(jax.random.key(5), n)
    tokens, logp = choose(jnp.broadcast_to(logits, (n, v)), keys, 0.7)
    p = softmax(logits, 0.7)
    assert chi_square(tokens, p) < critical < chi_square(tokens, softmax(logits))
    np.testing.assert_allclose(logp, np.log(p)[tokens], rtol=0, atol=1e-5)


@pytest.fixture
def at(monkeypatch):
    """choose at given uniform numbers: (logits [V], u [B], ...) -> (tokens, logp)."""
    monkeypatch.setattr(jax.random, "uniform", lambda key, dtype: key.astype(dtype))

    def drawn(logits, u, temperature=1.0, top_p=1.0, top_k=0):
        logits = jnp.asarray(logits)
        rows = jnp.broadcast_to(logits, (len(u), len(logits)))
        # Many settings at few shapes are faster not compiled as a whole.
        function = choose if top_p == 1 and top_k == 0 else rollout.choose
        tokens, logp = function(rows, jnp.asarray(u, logits.dtype), temperature, top_p, top_k)
        return np.asarray(tokens), np.asarray(logp)

    return drawn


def grid(n):
    return (np.arange(n) + 0.5) / n


@pytest.mark.parametrize("v", [1, 2, 3, 10, 16, 50, 97, 1000])
def test_every_token_has_its_share_of_the_unit_interval(at, v):
    logits, n = (2 * np.random.default_rng(v).normal(size=v)).astype(np.float32), 4000
    tokens, logp = at(logits, grid(n), 0.7)
    p = softmax(logits, 0.7)
    assert tokens.dtype == np.int32 and np.all(np.diff(tokens) >= 0)
    assert np.abs(np.bincount(tokens, minlength=v) - n * p).max() < 1.01
    np.testing.assert_allclose(logp, np.log(p)[tokens], rtol=0, atol=1e-5)


def beside(x, steps):
    """The float32 that lies `steps` floats above x, or below."""
    x = np.float32(x)
    for _ in range(abs(steps)):
        x = np.nextafter(x, np.float32(np.copysign(np.inf, steps)))
    return x


@pytest.mark.parametrize("zero", [-np.inf, -300.0], ids=["-inf", "underflow"])
@pytest.mark.parametrize("v", [2, 7, 900])
def test_tokens_of_probability_0_are_never_drawn(at, v, zero):
    """At u = 0, next to 1, and round every step of the cumulative distribution, where rounding decides."""
    for seed in range(8):
        rng = np.random.default_rng(seed)
        logits = rng.normal(size=v).astype(np.float32)
        impossible = rng.random(v) < 0.8
        impossible[rng.integers(v)] = False
        logits[impossible] = zero
        edges = np.cumsum(softmax(logits)).astype(np.float32)
        u = np.concatenate([[0, 2.0**-24], *(beside(edges, k) for k in range(-3, 4))])
        tokens, logp = at(logits, np.clip(u, 0, beside(1, -1)))
        assert not impossible[tokens].any() and np.all(np.isfinite(logp))


def test_invert_at_the_edges():
    weights = jnp.asarray([[0.0, 1.0, 0.0, 2.0, 0.0]], jnp.float32)
    cases = [(-1e-9, 1), (0, 1), (0.5, 1), (beside(1, -1), 1), (1, 3), (2.5, 3), (beside(3, -1), 3), (3, 3), (4, 3)]
    target = jnp.asarray([t for t, _ in cases], jnp.float32)
    index, rest = rollout._invert(jnp.broadcast_to(weights, (len(cases), 5)), target)
    assert index.tolist() == [i for _, i in cases]
    np.testing.assert_array_equal(rest, target - jnp.asarray([0, 0, 0, 0, 1, 1, 1, 1, 1]))
    assert rollout._invert(jnp.ones((1, 1)), jnp.ones(1))[0].tolist() == [0]


P = np.array([0.1, 0.4, 0.2, 0.3])
TIED = np.array([0.2, 0.3, 0.2, 0.3])


@pytest.mark.parametrize(
    "p, temperature, top_p, top_k, support",
    [
        (P, 1.0, 1.0, 1, {1}),
        (P, 1.0, 1.0, 2, {1, 3}),
        (P, 1.0, 1.0, 3, {1, 2, 3}),
        (P, 1.0, 1.0, 9, {0, 1, 2, 3}),  # more than there are
        (P, 1.0, 1e-6, 0, {1}),  # the likeliest always stays
        (P, 1.0, 0.39, 0, {1}),
        (P, 1.0, 0.41, 0, {1, 3}),
        (P, 1.0, 0.69, 0, {1, 3}),
        (P, 1.0, 0.71, 0, {1, 2, 3}),
        (P, 1.0, 0.95, 0, {0, 1, 2, 3}),
        (P, 0.5, 0.5, 0, {1}),  # the temperature comes first: 0.53 0.3 0.13 0.03
        (P, 0.5, 0.55, 0, {1, 3}),
        (P, 1.0, 0.55, 2, {1}),  # top-p counts within the top k: 4/7 3/7
        (P, 1.0, 0.6, 2, {1, 3}),
        (TIED, 1.0, 1.0, 1, {1, 3}),  # ties with the last one kept are kept too
        (TIED, 1.0, 1.0, 3, {0, 1, 2, 3}),
        (TIED, 1.0, 0.2, 0, {1, 3}),
        (TIED, 1.0, 0.7, 0, {0, 1, 2, 3}),
    ],
)
def test_top_k_and_top_p_keep_exactly_their_tokens(at, p, temperature, top_p, top_k, support):
    tokens, logp = at(np.log(p).astype(np.float32), grid(200), temperature, top_p, top_k)
    assert set(tokens.tolist()) == support
    kept = np.where(np.isin(np.arange(4), list(support)), p ** (1 / temperature), 0)
    kept /= kept.sum()
    assert np.abs(np.bincount(tokens, minlength=4) - 200 * kept).max() < 1.01
    np.testing.assert_allclose(logp, np.log(kept[tokens]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("v", [3, 50, 1000])
def test_cuts_that_cut_nothing_are_off(at, v):
    logits = np.random.default_rng(3).normal(size=v).astype(np.float32)
    logits[v // 2] = 30  # the sum over the others is lost in rounding
    for a, b in zip(at(logits, grid(500)), at(logits, grid(500), top_p=1.0, top_k=v), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(rollout._cut(logits[None], 1.0, v)[0], logits)
    assert np.isfinite(rollout._cut(logits[None], 1.0, 2)).sum() == 2


def test_temperature_0_is_argmax_with_the_models_log_prob():
    logits = np.random.default_rng(4).normal(size=(20, 50)).astype(np.float32)
    tokens, logp = choose(logits, jax.random.split(jax.random.key(0), 20), 0.0)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    np.testing.assert_allclose(logp, [np.log(softmax(row).max()) for row in logits], rtol=0, atol=1e-6)
