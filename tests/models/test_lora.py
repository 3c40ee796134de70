"""Adapters: their first values, and that beside a model and merged into it they are one function."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import decoder, lora
from models.decoder import DecoderConfig
from models.lora import Lora

QWEN = DecoderConfig("qwen2", 31, 18, 20, 2, 9, 3, 2, tied=True)
LLAMA = DecoderConfig("llama", 29, 24, 20, 2, 6, 2, 4, tied=False)
ALL = Lora(rank=4, alpha=6.0)


def model(config, dtype="float32"):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape) + (x.shape[-1:] == x.shape), dtype), decoder.shapes(config)
    )


def moved(adapters):
    """Adapters as they are after some training: b is not 0."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), adapters)


def logits(config, params):
    tokens = np.random.default_rng(2).integers(0, config.vocab, (2, 9))
    return np.asarray(decoder.logits(config, params, tokens, np.array([9, 6])))


def test_first_values_are_those_of_peft():
    adapters = lora.init(QWEN, ALL, jax.random.key(0))["layers"]
    assert all(not pair["b"].any() for part in adapters.values() for pair in part.values())
    for a, inputs in ((adapters["attention"]["o"]["a"], 18), (adapters["ff"]["down"]["a"], 20)):
        bound = 1 / np.sqrt(inputs)  # kaiming_uniform with a = sqrt(5)
        assert 0.9 * bound < float(jnp.abs(a).max()) <= bound
        assert float(a.std()) == pytest.approx(bound / np.sqrt(3), rel=0.15)
    assert not np.array_equal(adapters["attention"]["q"]["a"], adapters["attention"]["k"]["a"])
    assert not np.array_equal(adapters["attention"]["q"]["a"][0], adapters["attention"]["q"]["a"][1])


def test_other_targets_do_not_change_the_first_values():
    few = lora.init(QWEN, Lora(4, targets=("down_proj", "v_proj")), jax.random.key(0))["layers"]
    every = lora.init(QWEN, ALL, jax.random.key(0))["layers"]
    assert {part: set(matrices) for part, matrices in few.items()} == {"attention": {"v"}, "ff": {"down"}}
    np.testing.assert_array_equal(few["attention"]["v"]["a"], every["attention"]["v"]["a"])
    np.testing.assert_array_equal(few["ff"]["down"]["a"], every["ff"]["down"]["a"])


def test_logical_axes_name_every_axis_of_the_adapters():
    axes, adapters = lora.logical_axes(LLAMA, ALL), jax.eval_shape(lambda: lora.init(LLAMA, ALL, jax.random.key(0)))
    jax.tree.map(lambda names, x: len(names) == x.ndim or pytest.fail(f"{names} {x}"), axes, adapters, is_leaf=is_axes)
    assert axes["layers"]["attention"]["o"] == {"a": ("layers", "rank", "heads", "head_dim"), "b": ("layers", "embed", "rank")}


def is_axes(x):
    return isinstance(x, tuple)


@pytest.mark.parametrize("config", [QWEN, LLAMA], ids=["qwen2 tied", "llama untied"])
@pytest.mark.parametrize("targets", [ALL.targets, ("q_proj", "v_proj")], ids=["all", "two"])
def test_beside_the_model_and_merged_into_it_they_are_one_function(config, targets):
    settings, base = Lora(4, 6.0, targets), model(config)
    adapters = moved(lora.init(config, settings, jax.random.key(0)))
    beside = logits(config, lora.join(base, adapters, settings))
    merged = lora.merge(base, adapters, settings, "float32")
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, base)
    assert np.abs(beside - logits(config, merged)).max() < 1e-4
    assert np.abs(beside - logits(config, base)).max() > 0.1


def test_merged_weights_are_rounded_once(x64):
    base = model(QWEN, "bfloat16")
    adapters = moved(lora.init(QWEN, ALL, jax.random.key(0)))
    merged = lora.merge(base, adapters, ALL, "bfloat16")
    pair, weight = adapters["layers"]["attention"]["q"], np.asarray(base["layers"]["attention"]["q"], np.float64)
    a, b = (np.asarray(pair[k], np.float64) for k in "ab")
    exact = weight + 6.0 / 4 * np.einsum("lrd,lhcr->lhcd", a, b)
    found = np.asarray(merged["layers"]["attention"]["q"], np.float64)
    assert np.abs(found / exact - 1).max() <= 2**-8 * 1.001  # half a unit in the last of 8 places
    assert merged["embed"] is base["embed"] and merged["layers"]["ff_norm"]["scale"] is base["layers"]["ff_norm"]["scale"]
