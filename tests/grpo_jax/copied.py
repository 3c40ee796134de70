"""What the tests of the learner compare: random groups in packs, and the same responses with their prompts copied.

All in float64. Distances are relative to the largest number of each array.
"""

from __future__ import annotations

import functools
from dataclasses import fields, replace

import chex
import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import learner
from grpo_jax.group import Group
from grpo_jax.learner import Objective
from grpo_jax.packing import pack
from models import decoder
from models.decoder import DecoderConfig

EXACT = 1e-9
ODD = DecoderConfig("qwen2", 31, 18, 20, 2, 9, 3, 2, tied=True)  # 3 query heads to each of 3 key heads
UNTIED = DecoderConfig("qwen2", 29, 24, 20, 2, 6, 2, 4, tied=False)
# Every term of the loss at once, with a temperature, clip edges and a chunk of the head that divides nothing.
ALL = Objective(
    temperature=0.7,
    clip_low=0.2,
    clip_high=0.3,
    kl_coefficient=0.05,
    entropy_coefficient=0.02,
    dtype="float64",
    remat="none",
    head_chunk=7,
)

# (prompt length, response lengths) of each group
ONE, FIVE, EIGHT = (6, [8]), (9, [1, 6, 3, 2, 6]), (1, [2, 3, 1, 1, 3, 4, 1, 2])
TEN = [(5, [4]), (3, [5, 1]), (7, [1, 6, 3, 2, 6]), EIGHT, (4, [3, 3, 1]), (6, [2, 2]), (2, [6, 1, 4]), (8, [2, 1, 1])]
TEN += [(3, [7, 2]), (9, [3])]


@functools.cache
def params_of(model, dtype="float64"):
    """Large and uneven weights: a term that is missing or wrong shows in the first digit."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape) + (x.shape[-1:] == x.shape), dtype), decoder.shapes(model)
    )


def draw(model, lengths, temperature=ALL.temperature):
    """Groups with random tokens and advantages; their sampler's log-probs are near the policy's own."""
    rng = np.random.default_rng(1)
    groups = []
    for p, rs in lengths:
        prompt, *ids = (rng.integers(0, model.vocab, n).astype(np.int32) for n in (p, *rs))
        blank = tuple(np.zeros(r) for r in rs)
        groups.append(Group(prompt, tuple(ids), blank, (False,) * len(rs), rng.normal(size=len(rs))))
    rows = iter(np.asarray(copied_logprobs(model, temperature, params_of(model), copies(groups))[0]))
    noisy = lambda r, row: row[: len(r)] + 0.3 * rng.normal(size=len(r))  # noqa: E731
    return [replace(g, sampler_logp=tuple(noisy(r, next(rows)) for r in g.responses)) for g in groups]


def old_of(sampler_logp):
    return sampler_logp + 0.2 * jnp.sin(50 * sampler_logp)


def reference_of(sampler_logp):
    return sampler_logp + 0.5 * jnp.cos(40 * sampler_logp)


def packs_of(groups, budget=1000, shards=1):
    """Packs whose old and reference log-probs differ from the sampler's, as functions of it: so wherever a token may lie."""
    return [
        replace(one, old_logp=old_of(one.sampler_logp), ref_logp=reference_of(one.sampler_logp))
        for one in pack(groups, budget, shards).packs
    ]


# The reference: prompts copied


def copies(groups, rows=32, width=18, longest=8):
    """Every response as `[prompt | response]`, all in one padded batch of a fixed size, so that it is compiled once."""
    tokens, lengths = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)
    source, target = np.zeros((rows, longest), np.int32), np.zeros((rows, longest), np.int32)
    mask, sampler, advantage = np.zeros((rows, longest), bool), np.zeros((rows, longest)), np.zeros((rows, 1))
    every = [(g.prompt, *one) for g in groups for one in zip(g.responses, g.sampler_logp, g.advantages, strict=True)]
    for i, (prompt, ids, logp, a) in enumerate(every):
        p, r = len(prompt), len(ids)
        tokens[i, : p + r], lengths[i] = np.concatenate([prompt, ids]), p + r
        source[i, :r] = p - 1 + np.arange(r)
        target[i, :r], mask[i, :r], sampler[i, :r], advantage[i] = ids, True, logp, a
    names = ("tokens", "lengths", "source", "target", "mask", "sampler", "advantage")
    return dict(zip(names, (tokens, lengths, source, target, mask, sampler, advantage), strict=True))


@functools.partial(jax.jit, static_argnums=(0, 1))
def copied_logprobs(model, temperature, params, batch):
    scores = decoder.logits(model, params, batch["tokens"], batch["lengths"]) / temperature
    logp = jax.nn.log_softmax(jnp.take_along_axis(scores, batch["source"][..., None], axis=1))
    return jnp.take_along_axis(logp, batch["target"][..., None], -1)[..., 0], -(jnp.exp(logp) * logp).sum(-1)


# Ours, and the distance between the two


def accumulated(model, objective, params, packs, frozen=None):
    """(gradient of the mean loss, {name: sum}) of packs."""
    sums = learner.zeros(params)
    for one in packs:
        sums = learner.accumulate(model, objective, params, sums, one, frozen)
    scalars = {f.name: getattr(sums, f.name) for f in fields(sums) if f.name != "gradient"}
    return jax.tree.map(lambda g: g / sums.count, sums.gradient), scalars


def distance(found, want):
    """The largest difference of two trees, each array relative to its largest number."""
    chex.assert_trees_all_equal_shapes(found, want)

    def relative(a, b):
        a, b = np.asarray(a), np.asarray(b)
        return float(np.abs(a - b).max() / (np.abs(b).max() or 1.0))

    return max(jax.tree.leaves(jax.tree.map(relative, found, want)))
