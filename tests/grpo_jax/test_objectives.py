"""The other objectives and means, as the learner computes them, against formulas written here, in float64, on copied prompts.

The reference sees every response by itself in a padded rectangle, writes each loss as its paper does, response by response,
and takes the gradient by plain autodiff.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import learner
from tests.grpo_jax.copied import (
    ALL,
    EXACT,
    ODD,
    TEN,
    UNTIED,
    accumulated,
    copied_logprobs,
    copies,
    distance,
    draw,
    old_of,
    packs_of,
    params_of,
    reference_of,
)  # fmt: skip

LONGEST = 11
OBJECTIVES = {
    "ppo": {},
    "clip-higher": {"clip_low": 0.1, "clip_high": 0.28},
    "dr-grpo": {"mean": "constant", "longest": LONGEST},
    "by response": {"mean": "sequence_mean"},
    "gspo": {"kind": "gspo", "mean": "sequence_mean", "clip_low": 3e-2, "clip_high": 4e-2},
    "gspo over tokens": {"kind": "gspo", "clip_low": 3e-2, "clip_high": 4e-2},
    "cispo": {"kind": "cispo", "clip_low": 0.9, "clip_high": 0.1},
    "truncated importance": {"importance_cap": 1.05},
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def written_out(model, o, params, batch):
    """(gradient, (value, share of clipped tokens)) of the loss as the papers write it."""

    def mean(params):
        logp, entropy = copied_logprobs(model, o.temperature, params, batch)
        mask, sampler, a = batch["mask"], batch["sampler"], batch["advantage"]
        old, length = old_of(sampler), batch["mask"].sum(1)
        real, length = length > 0, jnp.maximum(length, 1)
        ratio = jnp.exp(logp - old)
        if o.kind == "gspo":  # one ratio a response, the geometric mean of its tokens'
            ratio = jnp.exp(jnp.where(mask, logp - old, 0).sum(1) / length)[:, None] * jnp.ones_like(logp)
        edged = jnp.clip(ratio, 1 - o.clip_low, 1 + o.clip_high)
        if o.kind == "cispo":
            terms, clipped = -jax.lax.stop_gradient(edged) * a * logp, edged != ratio
        else:
            terms, clipped = -jnp.minimum(ratio * a, edged * a), edged * a < ratio * a
        if o.importance_cap:
            terms *= jnp.minimum(jnp.exp(old - sampler), o.importance_cap)
        d = reference_of(sampler) - logp
        terms += o.kl_coefficient * (jnp.exp(d) - d - 1) - o.entropy_coefficient * entropy
        sums = jnp.where(mask, terms, 0).sum(1)
        value = {
            "token_mean": sums.sum() / mask.sum(),
            "sequence_mean": (sums / length).sum() / real.sum(),
            "constant": sums.sum() / (real.sum() * LONGEST),
        }[o.mean]
        return value, (value, jnp.where(mask, clipped, 0).sum() / mask.sum())

    return jax.grad(mean, has_aux=True)(params)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_every_gradient_are_those_of_the_formula(x64, name):
    model = UNTIED if name == "gspo" else ODD
    objective = replace(ALL, **OBJECTIVES[name])
    groups = draw(model, TEN)
    gradient, sums = accumulated(model, objective, params_of(model), packs_of(groups))
    want, (value, clipped) = written_out(model, objective, params_of(model), copies(groups))
    assert distance(gradient, want) < EXACT
    assert float(sums["loss"] / sums["count"]) == pytest.approx(float(value), rel=EXACT)
    share = float(sums["clipped"] / sums["tokens"])
    assert share == pytest.approx(float(clipped), rel=EXACT) and 0.02 < share < 0.98  # both branches are taken


@pytest.mark.parametrize("name", ["gspo", "dr-grpo", "by response"])
def test_cutting_changes_no_gradient(x64, name):
    """Many small micro-batches of two rows each, a group split between its responses among them, against one."""
    objective = replace(ALL, **OBJECTIVES[name])
    groups = draw(ODD, TEN)
    whole, sums = accumulated(ODD, objective, params_of(ODD), packs_of(groups))
    packs = packs_of(groups, budget=20, shards=2)
    cut, cut_sums = accumulated(ODD, objective, params_of(ODD), packs)
    assert len(packs) > 2 and float(sums["count"]) == pytest.approx(sum(len(g.responses) for g in groups), rel=1e-12)
    assert distance([cut, cut_sums], [whole, sums]) < EXACT


def test_what_differs_by_no_token_is_ppo(x64):
    """Responses of one token: a response is its token, and the mean over responses that over tokens."""
    groups = draw(ODD, [(5, [1, 1, 1]), (3, [1, 1])])
    ppo, sums = accumulated(ODD, ALL, params_of(ODD), packs_of(groups))
    gspo, gspo_sums = accumulated(ODD, replace(ALL, kind="gspo", mean="sequence_mean"), params_of(ODD), packs_of(groups))
    assert distance([gspo, gspo_sums], [ppo, sums]) < EXACT


def test_metrics_are_means_over_tokens_whatever_the_mean_of_the_loss():
    step = dict(
        loss=6.0,
        count=3.0,
        tokens=30.0,
        kl=3.0,
        entropy=15.0,
        clipped=6.0,
        mismatch=0.3,
        mismatch_max=0.1,
        grad_norm=2.0,
        skipped=0,
    )
    found = learner.step_metrics([{k: np.float32(v) for k, v in step.items()}])
    want = {"loss": 2.0, "kl/mean": 0.1, "entropy/mean": 0.5, "clip_fraction": 0.2, "rollout/logp_mismatch": 0.01}
    assert {k: found[k] for k in want} == pytest.approx(want)
