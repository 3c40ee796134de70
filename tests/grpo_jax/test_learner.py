"""The learner in float64: the shared prompt against copied ones, any cutting against any other, and the optimizer step.

The reference computes every response by itself, its prompt copied in front of it, with `decoder.logits` and the loss's
functions. Distances are relative to the largest number of each array.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import fields, replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import config, learner, loss, mesh
from grpo_jax.group import Group
from grpo_jax.learner import Objective, Sums
from grpo_jax.packing import pack
from models import decoder, lora
from models.decoder import DecoderConfig
from models.lora import Lora
from tests.grpo_jax.copied import (
    ALL,
    EXACT,
    FIVE,
    ODD,
    ONE,
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


@functools.partial(jax.jit, static_argnums=(0, 1))
def copied(model, o, params, batch):
    """(gradient of the mean loss, {name: sum}) of what `copies` made."""

    def mean(params):
        logp, entropy = copied_logprobs(model, o.temperature, params, batch)
        mask, sampler = batch["mask"], batch["sampler"]
        total, count, clipped = loss.policy_loss(
            logp, old_of(sampler), batch["advantage"], mask, clip_low=o.clip_low, clip_high=o.clip_high
        )
        kl = jnp.where(mask, loss.kl_estimate(logp, reference_of(sampler), kind=o.kl_kind), 0).sum()
        entropy = jnp.where(mask, entropy, 0).sum()
        total = total + o.kl_coefficient * kl - o.entropy_coefficient * entropy
        gap = jnp.where(mask, jnp.abs(logp - sampler), 0)
        sums = dict(count=count, tokens=count, loss=total, kl=kl, entropy=entropy, clipped=clipped)
        return total / count, sums | dict(mismatch=gap.sum(), mismatch_max=gap.max())

    return jax.grad(mean, has_aux=True)(params)


def agree(model, objective, groups, packs, tolerance=EXACT):
    """Asserts that sums and gradient of the packs equal those of the copied computation; returns ours."""
    gradient, sums = accumulated(model, objective, params_of(model), packs)
    want_gradient, want = copied(model, objective, params_of(model), copies(groups))
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(want_gradient)) > 1e-5  # or equality would say nothing
    far = {"gradient": distance(gradient, want_gradient), "sums": distance(sums, want)}
    print(far)
    assert max(far.values()) < tolerance, far
    return gradient, sums


# The shared prompt


@pytest.mark.parametrize(
    "model, lengths",
    [(ODD, [ONE]), (ODD, TEN), (UNTIED, TEN)],
    ids=["one", "ten groups", "ten groups, untied, remat, k2, chunk of 1024"],
)
def test_the_shared_prompt_gives_the_loss_and_every_gradient_of_copied_ones(x64, model, lengths):
    objective = ALL if model is ODD else replace(ALL, remat="attention", kl_kind="k2", head_chunk=1024)
    groups = draw(model, lengths)
    (one,) = packs_of(groups)
    _, sums = agree(model, objective, groups, [one])
    assert sums["count"] == one.mask.sum() == sum(g.response_tokens for g in groups)
    assert 0 < sums["clipped"] < sums["count"] and sums["mismatch_max"] > 0.1
    if lengths is TEN:
        assert {len(g.responses) for g in groups} >= {1, 2, 5, 8}
        assert one.tokens.size > sum(g.tokens for g in groups) and one.mask.size > sums["count"]  # padding of both kinds


def test_an_empty_row_adds_nothing(x64):
    groups = draw(ODD, [FIVE])
    (one,) = packs_of(groups, shards=2)
    assert one.mask[0].any() and not one.mask[1].any()
    agree(ODD, ALL, groups, [one])


def test_log_probs_are_those_of_the_copied_prompts(x64):
    groups = draw(ODD, TEN)
    (one,) = packs_of(groups)
    found = np.asarray(learner.logprobs(ODD, ALL, params_of(ODD), one))
    assert found.shape == one.mask.shape and found.dtype == np.float64
    batch = copies(groups)
    want = np.asarray(copied_logprobs(ODD, ALL.temperature, params_of(ODD), batch)[0])
    by_token = lambda sampler, mask, logp: dict(zip(sampler[mask].tolist(), logp[mask].tolist(), strict=True))  # noqa: E731
    ours, theirs = by_token(one.sampler_logp, one.mask, found), by_token(batch["sampler"], batch["mask"], want)
    assert ours.keys() == theirs.keys() and len(ours) == one.mask.sum()
    assert max(abs(ours[k] - theirs[k]) for k in theirs) < 1e-12


def test_groups_without_variance_carry_the_gradient_of_the_kl(x64):
    groups = [replace(g, advantages=0 * g.advantages) for g in draw(ODD, TEN)]
    gradient, sums = agree(ODD, ALL, groups, packs_of(groups))
    terms = ALL.kl_coefficient * sums["kl"] - ALL.entropy_coefficient * sums["entropy"]
    np.testing.assert_allclose(sums["loss"], terms, rtol=1e-12)
    assert sums["kl"] > 0 and sums["clipped"] == 0 and optax.tree.norm(gradient) > 1e-2


def test_cross_entropy_is_the_mean_negative_log_prob(x64):
    groups = draw(ODD, TEN, temperature=1.0)
    objective = replace(ALL, kind="cross_entropy", temperature=1.0)
    packs = pack(groups, 1000).packs
    gradient, sums = accumulated(ODD, objective, params_of(ODD), packs)
    batch = copies(groups)

    @jax.jit
    @jax.value_and_grad
    def mean(params):
        logp, _ = copied_logprobs(ODD, 1.0, params, batch)
        return -jnp.where(batch["mask"], logp, 0).sum() / batch["mask"].sum()

    value, want = mean(params_of(ODD))
    assert sums["kl"] == sums["clipped"] == 0
    assert distance([sums["loss"] / sums["count"], gradient], [value, want]) < EXACT


# Cutting


@functools.cache
def whole():
    """Gradient, new parameters, optimizer state and scalars from one micro-batch."""
    packs = packs_of(draw(ODD, TEN))
    assert len(packs) == 1
    return accumulated(ODD, ALL, params_of(ODD), packs)[0], *updated(packs)


@functools.cache
def optimizer():
    return learner.make_optimizer(config.Optimizer(learning_rate=1e-3), 10)[0]


def updated(packs, objective=ALL, params=None, frozen=None):
    copy = functools.partial(jax.tree.map, jnp.copy)  # update takes what it is given
    params = copy(params_of(ODD) if params is None else params)
    return learner.update(ODD, objective, optimizer(), params, optimizer().init(params), packs, frozen)


@pytest.mark.parametrize(
    "budget, shards, shuffled, micro_batches, repeated",
    [(80, 1, False, 2, 0), (24, 1, True, 7, 1), (80, 2, False, 1, 0)],
    ids=["two", "seven, shuffled, one group split", "two shards"],
)
def test_cutting_changes_neither_gradient_nor_update(x64, budget, shards, shuffled, micro_batches, repeated):
    """Against one micro-batch of one row."""
    groups = draw(ODD, TEN)
    if shuffled:
        groups = [groups[i] for i in np.random.default_rng(0).permutation(len(groups))]
    packed, packs = pack(groups, budget, shards), packs_of(groups, budget, shards)
    assert (len(packs), packed.repeated_prompts, len(packs[0].tokens)) == (micro_batches, repeated, shards)
    want_gradient, want_params, want_state, want_scalars = whole()
    gradient, _ = accumulated(ODD, ALL, params_of(ODD), packs)
    params, state, scalars = updated(packs)
    minus = functools.partial(jax.tree.map, jnp.subtract)
    step, want_step = minus(params, params_of(ODD)), minus(want_params, params_of(ODD))
    assert float(jnp.abs(want_step["embed"]).max()) == pytest.approx(1e-3, rel=0.1)  # Adam's first step
    far = {
        "gradient": distance(gradient, want_gradient),
        "update": distance(step, want_step),
        "state": distance(state, want_state),
        "scalars": distance(scalars, want_scalars),
    }
    print(far)
    assert max(far.values()) < EXACT, far


def test_recomputation_and_chunks_of_the_head_change_nothing(x64):
    """Against no recomputation and chunks of 7; chunks of 1024 are compared with copied prompts above."""
    packs = packs_of(draw(ODD, [FIVE]), shards=2)
    want, want_sums = accumulated(ODD, ALL, params_of(ODD), packs)
    found, sums = accumulated(ODD, replace(ALL, remat="full", head_chunk=1), params_of(ODD), packs)
    assert distance([found, sums], [want, want_sums]) < EXACT


# Low-rank adapters

LORA = Lora(rank=3, alpha=5.0)
SOME = Lora(rank=2, alpha=3.0, targets=("q_proj", "o_proj", "down_proj"))
LLAMA = replace(UNTIED, architecture="llama")


def adapters_of(model, settings, b=0.3):
    """Adapters with both factors random."""
    rng = np.random.default_rng(2)
    made = lora.init(model, settings, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(b * rng.normal(size=x.shape), "float64"), made)


@pytest.mark.parametrize(
    "model, settings, remat",
    [(ODD, LORA, "none"), (ODD, SOME, "elementwise"), (LLAMA, LORA, "attention"), (LLAMA, SOME, "full")],
    ids=["qwen2 tied", "three targets", "llama untied", "llama, three targets"],
)
def test_the_gradient_of_adapters_is_that_of_the_merged_model_projected(x64, model, settings, remat):
    """With W + s b a: da = s b^T dW and db = s dW a^T."""
    objective = replace(ALL, lora=settings, remat=remat)
    packs, base, adapters = packs_of(draw(model, TEN)), params_of(model), adapters_of(model, settings)
    found, sums = accumulated(model, objective, adapters, packs, base)
    of_merged, want_sums = accumulated(model, ALL, lora.merge(base, adapters, settings, "float64"), packs)
    scale, want = settings.alpha / settings.rank, {"layers": {}}
    for part, matrices in adapters["layers"].items():
        for name, one in matrices.items():
            a = one["a"].reshape(model.layers, settings.rank, -1)
            b = one["b"].reshape(model.layers, -1, settings.rank)
            dw = of_merged["layers"][part][name].reshape(model.layers, b.shape[1], a.shape[2])
            da, db = scale * b.swapaxes(1, 2) @ dw, scale * dw @ a.swapaxes(1, 2)
            want["layers"].setdefault(part, {})[name] = {"a": da.reshape(one["a"].shape), "b": db.reshape(one["b"].shape)}
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(want)) > 1e-5
    far = {"gradient": distance(found, want), "sums": distance(sums, want_sums)}
    print(far)
    assert max(far.values()) < EXACT, far


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_new_adapters_change_no_log_prob_by_a_bit(x64, dtype):
    (one,) = packs_of(draw(ODD, TEN))
    objective, base = replace(ALL, dtype=dtype, lora=LORA), params_of(ODD)
    adapters = lora.init(ODD, LORA, jax.random.key(3))
    on = learner.logprobs(ODD, objective, adapters, one, base)
    off = learner.logprobs(ODD, objective, base, one)
    np.testing.assert_array_equal(on, off)


def test_cutting_changes_no_update_of_adapters(x64):
    objective, base, adapters = replace(ALL, lora=LORA), params_of(ODD), adapters_of(ODD, LORA)
    groups = draw(ODD, TEN)
    want = updated(packs_of(groups), objective, adapters, base)
    shuffled = [groups[i] for i in np.random.default_rng(0).permutation(len(groups))]
    found = updated(packs_of(shuffled, 24), objective, adapters, base)
    minus = functools.partial(jax.tree.map, jnp.subtract)
    far = [distance(minus(found[0], adapters), minus(want[0], adapters)), *map(distance, found[1:], want[1:])]
    assert max(far) < EXACT, far
    assert jax.tree.map(jnp.shape, optax.tree.get(found[1], "mu")) == jax.tree.map(jnp.shape, adapters)


# Dtypes and memory


def test_bfloat16_computation_keeps_float32_gradients_near_the_exact_ones(x64):
    packs = packs_of(draw(ODD, [FIVE]), shards=2)
    params = params_of(ODD, "float32")
    gradient, sums = accumulated(ODD, replace(ALL, dtype="bfloat16"), params, packs)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, params)
    assert all(jnp.isfinite(v) for v in sums.values())
    want, want_sums = accumulated(ODD, ALL, params_of(ODD), packs)
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])  # noqa: E731
    a, b = flat(gradient), flat(want)
    print(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b), np.linalg.norm(a - b) / np.linalg.norm(b))
    assert 1e-3 < np.linalg.norm(a - b) / np.linalg.norm(b) < 0.1  # the rounding of bfloat16, not of float32
    assert abs(sums["entropy"] - want_sums["entropy"]) < 0.02 * want_sums["entropy"]


def blank_group(prompt, responses):
    ids = tuple(np.zeros(r, np.int32) for r in responses)
    logp = tuple(r.astype(np.float32) for r in ids)
    return Group(np.zeros(prompt, np.int32), ids, logp, (False,) * len(ids), np.zeros(len(ids)))


@pytest.mark.parametrize("program", ["update", "logprobs"])
def test_memory_does_not_hold_the_logits_of_all_tokens(program):
    """Compiled, not run: 1024 more response tokens may cost no eighth of their logits, 622 MB."""
    model = DecoderConfig("qwen2", 151_936, 64, 128, 2, 4, 2, 16, tied=True)
    objective = Objective(kl_coefficient=1e-3, head_chunk=256)

    def temporary(tokens):
        (one,) = pack([blank_group(64, [tokens // 8] * 8)], 4096).packs
        assert one.mask.sum() == tokens
        params = decoder.shapes(model)
        if program == "logprobs":
            lowered = learner.logprobs.lower(model, objective, params, one)
        else:
            lowered = learner.accumulate.lower(model, objective, params, jax.eval_shape(learner.zeros, params), one)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    chunk = 256 * model.vocab * 4
    few, many = temporary(1024), temporary(2048)
    print(f"{few / 1e6:.0f} MB and {many / 1e6:.0f} MB, {few / chunk:.2f} chunks of logits")
    assert many - few < 1024 * model.vocab * 4 / 8
    assert few < 6 * chunk


def test_masks_of_attention_are_kept_once_for_all_heads():
    """In the compiled text: no array of truth values holds more than one mask a step of tiles."""
    packs = packs_of([blank_group(400, [100] * 9)], 2000)  # more steps than heads
    layout = packs[0].layout
    one_mask = layout.tile[0] * layout.tile[1] * (layout.steps.shape[2] - 1)
    params = decoder.shapes(ODD)
    text = (
        learner.accumulate.lower(ODD, Objective(), params, jax.eval_shape(learner.zeros, params), packs[0]).compile().as_text()
    )
    sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"= pred\[([\d,]+)\]", text)]
    assert max(sizes) == layout.steps.shape[1] * one_mask


# The optimizer step


def sums_of(gradient, count, **more):
    scalars = dict.fromkeys([f.name for f in fields(Sums)][1:], 0.0) | {"count": float(count)} | more
    return Sums(jax.tree.map(jnp.asarray, gradient), **{k: jnp.asarray(v) for k, v in scalars.items()})


def test_apply_is_adamw_of_the_mean_gradient_clipped_to_its_norm(x64):
    """Two steps, the first beyond the norm and the second within, against the formulas."""
    settings = config.Optimizer(learning_rate=0.1, weight_decay=0.5, clip_norm=2.0, b1=0.8, b2=0.9)
    adamw, _ = learner.make_optimizer(settings, 10)
    p, mu, nu = np.array([1.0, -2.0, 0.5]), np.zeros(3), np.zeros(3)
    params = {"w": jnp.asarray(p)}
    state = adamw.init(params)
    for t, (total, count, scale) in enumerate([([30.0, 40.0, 0.0], 10, 2 / 5), ([1.0, -2.0, 2.0], 4, 1.0)], start=1):
        mean = np.array(total) / count
        params, state, scalars = learner.apply(adamw, params, state, sums_of({"w": np.array(total)}, count, loss=7.0))
        assert float(scalars["grad_norm"]) == pytest.approx(np.linalg.norm(mean), rel=1e-12)  # before it is clipped
        assert (float(scalars["loss"]), float(scalars["count"])) == (7, count)
        g = mean * scale
        mu, nu = 0.8 * mu + 0.2 * g, 0.9 * nu + 0.1 * g * g
        p = p - 0.1 * (mu / (1 - 0.8**t) / (np.sqrt(nu / (1 - 0.9**t)) + 1e-8) + 0.5 * p)
        np.testing.assert_allclose(params["w"], p, rtol=1e-12)


def test_apply_without_a_token_divides_by_nothing():
    adamw, _ = learner.make_optimizer(config.Optimizer(weight_decay=0.0), 10)
    params = {"w": jnp.ones(2)}
    after, _, scalars = learner.apply(adamw, params, adamw.init(params), sums_of({"w": np.zeros(2, np.float32)}, 0))
    np.testing.assert_array_equal(after["w"], 1)
    assert float(scalars["grad_norm"]) == 0


def test_a_state_in_host_memory_is_there_again_after_the_step(x64):
    packs = packs_of(draw(ODD, [FIVE]), shards=2)
    params = jax.tree.map(jnp.copy, params_of(ODD))
    state = mesh.moved(optimizer().init(params), "pinned_host")
    found = learner.update(ODD, ALL, optimizer(), params, state, packs)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(found[1])} == {"pinned_host"}
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(updated(packs)))


def test_moments_in_bfloat16_follow_those_in_float32():
    """2000 steps of random gradients. Rounded to the nearest, the mean of the second moment is 1.19 times that of float32."""
    params = {"w": jnp.zeros(4_000)}

    @functools.partial(jax.jit, static_argnums=0)
    def after(optimizer):
        def step(state, key):
            gradient = {"w": 1e-3 * jax.random.normal(key, (4_000,))}
            updates, state = optimizer.update(gradient, state, params)
            return state, updates["w"]

        state, updates = jax.lax.scan(step, optimizer.init(params), jax.random.split(jax.random.key(0), 2000))
        return state, updates[-1]

    made = lambda moments: learner.make_optimizer(config.Optimizer(moments=moments, weight_decay=0.0, clip_norm=1e9), 10)[0]  # noqa: E731
    (full, want), (narrow, found), (again, _) = after(made("float32")), after(made("bfloat16")), after(made("bfloat16"))
    chex.assert_trees_all_equal(narrow, again)
    for name, scatter, mean in (("nu", 0.04, 2e-3), ("mu", 0.01, 1e-3)):
        of = lambda state: np.asarray(optax.tree.get(state, name)["w"], np.float64)  # noqa: B023, E731
        assert optax.tree.get(narrow, name)["w"].dtype == jnp.bfloat16 and optax.tree.get(full, name)["w"].dtype == jnp.float32
        far = of(narrow) - of(full)
        print(name, np.abs(of(narrow)).mean() / np.abs(of(full)).mean(), far.std() / np.sqrt((of(full) ** 2).mean()))
        assert abs(np.abs(of(narrow)).mean() / np.abs(of(full)).mean() - 1) < mean
        assert far.std() < scatter * np.sqrt((of(full) ** 2).mean())
    assert np.corrcoef(found, want)[0, 1] > 0.999


def test_rounding_at_random_goes_to_a_neighbour_and_is_right_in_the_mean():
    x = jnp.array([1.0, -2.5, 0.0, 1 + 2**-8, 1 + 2**-9, -(1 + 2**-9), 3e-30])
    drawn = jax.vmap(lambda key: learner._rounded_at_random(x, key))(jax.random.split(jax.random.key(0), 4000))
    assert drawn.dtype == jnp.bfloat16
    drawn = np.asarray(drawn, np.float64)
    np.testing.assert_array_equal(drawn[:, :3], np.broadcast_to([1.0, -2.5, 0.0], (4000, 3)))
    assert set(drawn[:, 3]) == {1.0, 1 + 2**-7} and set(drawn[:, 5]) == {-1.0, -(1 + 2**-7)}
    np.testing.assert_allclose(drawn.mean(0)[3:], np.asarray(x, np.float64)[3:], rtol=3e-4)


RATES = {
    "constant": (dict(), {0: 0.5, 5: 0.5, 100: 0.5}),
    "constant, warm-up": (dict(warmup=0.2), {0: 0.0, 5: 0.125, 19: 0.475, 20: 0.5, 100: 0.5}),
    "cosine": (dict(schedule="cosine"), {0: 0.5, 25: 0.25 * (1 + math.sqrt(0.5)), 50: 0.25, 100: 0.0, 120: 0.0}),
    "cosine, warm-up": (dict(schedule="cosine", warmup=0.2), {0: 0.0, 10: 0.25, 20: 0.5, 60: 0.25, 100: 0.0, 120: 0.0}),
    "all warm-up": (dict(schedule="cosine", warmup=1.0), {0: 0.0, 50: 0.25, 100: 0.5, 101: 0.0}),
}


@pytest.mark.parametrize("options, want", RATES.values(), ids=RATES)
def test_learning_rates_of_a_run_of_100_steps(options, want):
    _, schedule = learner.make_optimizer(config.Optimizer(learning_rate=0.5, **options), 100)
    for step, rate in want.items():
        assert float(schedule(step)) == pytest.approx(rate, abs=1e-6), step


def test_the_schedule_is_the_one_that_steps_take(x64):
    """The first step of a warm-up has rate 0, the second rate / warm-up steps."""
    adamw, _ = learner.make_optimizer(config.Optimizer(learning_rate=0.4, warmup=0.4, weight_decay=0.0, clip_norm=1e9), 10)
    params = {"w": jnp.zeros(1)}
    state = adamw.init(params)
    for want in (0.0, -0.1, -0.3):
        params, state, _ = learner.apply(adamw, params, state, sums_of({"w": np.ones(1)}, 1))
        np.testing.assert_allclose(params["w"], want, atol=1e-7)


def test_step_metrics_worked_by_hand():
    """Sums over the optimizer steps, divided once by 40 tokens; the mismatch is the first step's alone."""
    first = dict(tokens=10, count=10, loss=5.0, kl=1.0, entropy=20.0, clipped=0, mismatch=0.5, mismatch_max=0.25, grad_norm=3.0)
    second = dict(
        count=30, tokens=30, loss=-3.0, kl=3.0, entropy=30.0, clipped=6, mismatch=9.0, mismatch_max=2.0, grad_norm=1.0
    )
    first["skipped"] = second["skipped"] = 0.0
    assert learner.step_metrics([first, second]) == {
        "loss": 0.05,
        "kl/mean": 0.1,
        "entropy/mean": 1.25,
        "clip_fraction": 0.15,
        "grad_norm": 2.0,
        "rollout/logp_mismatch": 0.05,
        "rollout/logp_mismatch_max": 0.25,
        "learner/skipped": 0,
    }
    assert learner.step_metrics([dict.fromkeys(first, 0)]) == dict.fromkeys(learner.step_metrics([first]), 0.0)
