"""The decoder: sizes and configs as published, and every way of computing one sequence gives the same numbers."""

from __future__ import annotations

import math
import operator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import decoder
from models.attention import PromptCache, ResponseCache, RowSlots, Tiles, packed
from models.attention import causal as causal_attention
from models.decoder import SIZES, DecoderConfig, RopeScaling

QWEN = DecoderConfig("qwen2", 31, 24, 40, 3, 6, 2, 4, tied=False, norm_eps=1e-5)
LLAMA = DecoderConfig("llama", 29, 18, 20, 2, 9, 3, 2, rope_theta=1e4, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16), tied=True)
CONFIGS = pytest.mark.parametrize("config", [QWEN, LLAMA], ids=["qwen2", "llama"])
logits = jax.jit(decoder.logits, static_argnums=0)


def random_params(config, dtype=np.float64, seed=0):
    """Large and uneven weights: a wrong bias, norm or rotation shows in the first digit."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape) + (x.shape[-1:] == x.shape), dtype), decoder.shapes(config)
    )


def alone(config, params, *parts):
    """The logits of one sequence, computed by itself; padded to one width so that it is compiled once."""
    tokens = np.concatenate(parts)
    padded = np.zeros((1, 12), int)
    padded[0, : len(tokens)] = tokens
    return logits(config, params, padded, np.array([len(tokens)]))[0, : len(tokens)]


# ---------------------------------------------------------------- configs and shapes


@pytest.mark.parametrize(
    "name, count",
    [
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-14b", 14_770_033_664),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3.1-8b", 8_030_261_248),
    ],
)
def test_sizes_have_the_published_parameter_counts(name, count):
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(decoder.shapes(SIZES[name]))) == count


@CONFIGS
def test_every_array_has_its_axes(config):
    shapes, axes = decoder.shapes(config), decoder.logical_axes(config)
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    assert jax.tree.structure(axes, is_leaf=is_axes) == jax.tree.structure(shapes)
    for leaf, names in zip(jax.tree.leaves(shapes), jax.tree.leaves(axes, is_leaf=is_axes), strict=True):
        assert len(names) == leaf.ndim and all(isinstance(name, str) for name in names)
    assert axes["layers"]["attention"]["q"] == ("layers", "heads", "head_dim", "embed")


def test_init_fills_the_declared_shapes():
    params = decoder.init(QWEN, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), decoder.shapes(QWEN)
    )
    kernels = np.asarray(params["layers"]["ff"]["gate"])
    assert abs(kernels.std() - 0.02) < 0.002 and not np.array_equal(kernels[0], kernels[1])
    np.testing.assert_array_equal(params["layers"]["ff_norm"]["scale"], 1)
    np.testing.assert_array_equal(params["layers"]["attention"]["q_bias"], 0)


BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "attention_bias": False,
    "mlp_bias": False,
}
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 500000.0, "rope_scaling": SCALING, "torch_dtype": "bfloat16"},  # transformers 4.5x
        {
            "rope_parameters": {**SCALING, "rope_theta": 500000.0},
            "dtype": "bfloat16",
            "head_dim": 128,
            "pad_token_id": None,
        },  # 5.x
    ],
    ids=["4.5x", "5.x"],
)
def test_both_spellings_of_config_json_are_llama_3_1(spelling):
    assert DecoderConfig.from_hf({**BASE, **spelling}) == SIZES["llama-3.1-8b"]


@pytest.mark.parametrize(
    "spelling",
    [
        {
            "rope_theta": 1000000.0,
            "torch_dtype": "bfloat16",
            "sliding_window": 32768,
            "use_sliding_window": False,
            "max_window_layers": 21,
        },
        {
            "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
            "dtype": "bfloat16",
            "layer_types": ["full_attention"] * 24,
        },
    ],
    ids=["4.5x", "5.x"],
)
def test_both_spellings_of_config_json_are_qwen_2_5(spelling):
    raw = BASE | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
    }
    raw |= {
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
    raw |= {"max_position_embeddings": 32768, "bos_token_id": 151643, "eos_token_id": 151645}
    assert DecoderConfig.from_hf(raw | spelling) == replace(SIZES["qwen2.5-0.5b"], eos_token_ids=(151645,))


@pytest.mark.parametrize("name", SIZES)
def test_config_survives_the_way_out_and_back(name):
    assert DecoderConfig.from_hf(SIZES[name].to_hf("bfloat16")) == SIZES[name]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"architectures": ["MistralForCausalLM"]}, ["MistralForCausalLM", "Qwen2ForCausalLM"]),
        ({"architectures": None, "model_type": "gpt2"}, ["gpt2"]),
        ({"architectures": ["x" * 9999]}, [f"architecture '{'x' * 79} is not supported"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"hidden_act": "x" * 9999}, [f"hidden_act = '{'x' * 79} is not supported"]),
        ({"use_sliding_window": True}, ["use_sliding_window"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["rope_type", "yarn"]),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, ["factor", "missing"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"vocab_size": None}, ["vocab_size"]),
    ],
)
def test_from_hf_names_what_it_does_not_have(change, words):
    raw = {k: v for k, v in {**BASE, **change}.items() if v is not None}
    with pytest.raises(ValueError) as error:
        DecoderConfig.from_hf(raw, "some/config.json")
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in ["some/config.json", *words])


# ---------------------------------------------------------------- one sequence, computed in several ways


@CONFIGS
def test_padding_and_its_content_change_nothing(x64, config):
    params = random_params(config)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, config.vocab, (3, 7))
    lengths = np.array([7, 4, 1])
    out = logits(config, params, tokens, lengths)
    assert out.dtype == jnp.float64
    longer = rng.integers(0, config.vocab, (3, 12))
    for b, length in enumerate(lengths):
        longer[b, :length] = tokens[b, :length]
        np.testing.assert_array_equal(out[b, length:], 0)
        np.testing.assert_allclose(out[b, :length], alone(config, params, tokens[b, :length]), rtol=0, atol=1e-13)
    np.testing.assert_allclose(logits(config, params, longer, lengths)[:, :7], out, rtol=0, atol=1e-13)


def test_logits_are_at_least_float32():
    params = random_params(QWEN, jnp.bfloat16)
    assert logits(QWEN, params, jnp.zeros((1, 4), int), jnp.array([4])).dtype == jnp.float32


@CONFIGS
def test_packed_groups_equal_the_copied_sequences(x64, config):
    """The design's one idea: prompt once, then its responses, against each `prompt + response` by itself."""
    params, rng = random_params(config), np.random.default_rng(2)
    p, lengths, t = 5, [4, 2], 13
    tokens = rng.integers(0, config.vocab, t)
    starts = np.cumsum([p, *lengths])
    first = np.repeat([0, 5, 9, t], [5, 4, 2, 2])
    prompt_end = np.repeat([0, 5, 0], [5, 6, 2])
    positions = np.r_[np.arange(p), p + np.arange(4), p + np.arange(2), 0, 0]
    steps = np.array([(i, 2 * j, 2 * j + 1) for i in range(4) for j in range(i + 1)])
    layout = Tiles(*(jnp.asarray(x, jnp.int32)[None] for x in (first, 0 * first, prompt_end, steps)), tile=(4, 2))
    attend = lambda q, k, v, _: (packed(q, k, v, layout), None)  # noqa: E731
    rotations = decoder.rotation(config, positions[None])
    flat = jax.jit(lambda params: decoder.unembed(params, decoder.hidden(config, params, tokens[None], rotations, attend)[0]))(
        params
    )[0]
    for start, length in zip(starts, lengths, strict=False):
        expected = alone(config, params, tokens[:p], tokens[start : start + length])
        np.testing.assert_allclose(np.concatenate([flat[:p], flat[start : start + length]]), expected, rtol=0, atol=1e-12)


@CONFIGS
@pytest.mark.parametrize("form", [lambda layers: layers, decoder.halved], ids=["whole", "halved"])
def test_prefill_and_decode_equal_logits_of_the_whole_sequence(x64, form, config):
    """Three ragged prompts, two slots each, one of them empty; rows out of order, from different steps."""
    params, rng = random_params(config), np.random.default_rng(3)
    n, s, p, r = 3, 2, 6, 5
    p_length = np.array([6, 2, 4])
    prompts = rng.integers(0, config.vocab, (n, p))
    slot = np.array([4, 0, 5, 1, 2])  # of each row; slot 3, the second of group 1, is empty
    group, b = slot // s, len(slot)
    row = np.full(n * s, b)
    row[slot] = np.arange(b)
    slots = RowSlots(jnp.asarray(row.reshape(n, s)), jnp.asarray(slot))
    start, length = np.array([0, 3, 1, 0, 2]), np.array([5, 1, 3, 4, 2])
    responses = rng.integers(0, config.vocab, (b, r))

    layers = form(decoder.by_layer(params))
    cache, last = jax.jit(decoder.prefill, static_argnums=0)(config, layers, prompts, p_length)
    assert [k.shape for k in cache.k] == [(n, config.kv_heads, config.head_dim, p)] * config.layers
    assert [v.shape for v in cache.v] == [(n, config.kv_heads, p, config.head_dim)] * config.layers
    rubbish = 5.0 * rng.normal(size=(2, config.layers, b, config.kv_heads, r, config.head_dim))  # what earlier rows left
    wider = np.concatenate([rubbish, rubbish], 4)  # the second band
    bands = [
        tuple((jnp.asarray(a[:2]), jnp.asarray(b[2:])) for a, b in zip(x, y, strict=True))
        for x, y in zip(rubbish, wider, strict=True)
    ]
    bands[0] = jax.tree.map(lambda k: jnp.swapaxes(k, 2, 3), bands[0])
    own = ResponseCache(*bands, jnp.zeros(b, jnp.int32))
    step = jax.jit(decoder.decode_step, static_argnums=0)
    hidden = np.zeros((b, r + 1, config.d_model))
    hidden[:, 0] = np.asarray(last)[group]
    for t in range(8):
        at = np.asarray(own.length)
        rotations = decoder.rotation(config, p_length[group] + at)
        x, own = step(config, layers, responses[np.arange(b), np.minimum(at, r - 1)], rotations, cache, own, slots)
        live = (start <= t) & (at < length)
        hidden[live, at[live] + 1] = np.asarray(x)[live]
        own = ResponseCache(own.k, own.v, jnp.where(live, own.length, at))  # a row that waits writes over its own cell

    np.testing.assert_array_equal(own.length, length)
    found = decoder.unembed(params, jnp.asarray(hidden))
    for i in range(b):
        prompt = prompts[group[i], : p_length[group[i]]]
        expected = alone(config, params, prompt, responses[i, : length[i]])[len(prompt) - 1 :]
        np.testing.assert_allclose(found[i, : length[i] + 1], expected, rtol=0, atol=1e-12)


def test_halves_are_of_the_two_products_that_stand_alone():
    params = decoder.by_layer(random_params(QWEN, np.float32))
    for whole, layer in zip(params["layers"], decoder.halved(params)["layers"], strict=True):
        for part, name in (("attention", "o"), ("ff", "down")):
            first, second = layer[part].pop(name)
            assert len(first) == len(second) == QWEN.d_model // 2
            np.testing.assert_array_equal(np.concatenate([first, second]), whole[part].pop(name))
        rest, given = jax.tree.leaves(layer), jax.tree.leaves(whole)
        assert len(rest) == len(given) and all(map(operator.is_, rest, given))  # nothing else is copied


@pytest.mark.parametrize("dtype, error", [(jnp.float64, 1e-12), (jnp.float32, 1e-4), (jnp.bfloat16, 0.05)])
def test_gradient_of_the_norm_by_products_equals_autodiff(x64, dtype, error):
    key = jax.random.split(jax.random.key(0), 3)
    x, dy = (jax.random.normal(k, (2, 7, 48), dtype) for k in key[:2])
    scale = 1 + jax.random.normal(key[2], (48,), dtype)
    exact = [a.astype(jnp.float64) for a in (x, scale, dy)]
    _, pullback = jax.vjp(lambda x, scale: scale * x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5), *exact[:2])
    found = decoder._normed_by_products(1e-5, x, scale, dy)
    for a, b in zip(found, pullback(exact[2]), strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=error * float(abs(b).max()))


def test_a_full_response_cache_drops_what_does_not_fit(x64):
    params, b, r = random_params(QWEN), 2, 3
    ones = lambda *shape: (jnp.ones(shape),) * QWEN.layers  # noqa: E731
    heads, c = QWEN.kv_heads, QWEN.head_dim
    prompts = PromptCache(ones(1, heads, c, 1), ones(1, heads, 1, c), jnp.ones(1, int))
    full_k, full_v = (tuple((band,) for band in bands) for bands in (ones(b, heads, c, r), ones(b, heads, r, c)))
    full = ResponseCache(full_k, full_v, jnp.array([r, 1]))
    slots = RowSlots(jnp.array([[0, 1]]), jnp.array([0, 1]))
    _, after = jax.jit(decoder.decode_step, static_argnums=0)(
        QWEN, decoder.by_layer(params), jnp.array([1, 2]), decoder.rotation(QWEN, jnp.array([4, 2])), prompts, full, slots
    )
    assert len(after.k) == QWEN.layers
    for [k], [v] in zip(after.k, after.v, strict=True):
        for cache in (np.swapaxes(k, 2, 3), np.asarray(v)):
            np.testing.assert_array_equal(cache[0], 1)
            np.testing.assert_array_equal(cache[1, :, [0, 2]], 1)
            assert np.all(cache[1, :, 1] != 1)


def test_remat_gives_the_same_gradient(x64):
    config = replace(QWEN, layers=2)
    params = random_params(config)
    tokens = np.random.default_rng(4).integers(0, config.vocab, (2, 6))
    rotations = decoder.rotation(config, np.broadcast_to(np.arange(6), tokens.shape))

    def loss(params, remat):
        x, _ = decoder.hidden(
            config, params, tokens, rotations, lambda q, k, v, _: (causal_attention(q, k, v), None), remat=remat
        )
        logp = jax.nn.log_softmax(decoder.unembed(params, x[:, :-1]))
        return -jnp.take_along_axis(logp, tokens[:, 1:, None], -1).mean()

    kinds = ("none", "elementwise", "attention", "full")
    plain, *others = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, remat) for remat in kinds)
    for again in others:
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
            assert np.abs(a).max() > 0
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-13)
