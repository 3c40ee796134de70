"""One decoder for Qwen2.5 and Llama 3: RMSNorm, rotary embedding, grouped-query attention, SwiGLU.

The modules (`Decoder`, `Block`, ...) only declare: shapes, initialisers and logical axes, in Flax NNX. They are split
once into a graph, cached for a frozen `DecoderConfig`, and a plain nested dict of arrays, the *parameters*. From there on
everything is a pure function of (config, params, arrays):

    init            parameters from a key
    hidden          tokens -> hidden states, the layers under one `lax.scan`; the caller says how tokens attend
    logits          a plain padded batch -> [B, T, V]; for tests, evaluation of texts, and as the reference
    prefill         prompts -> their cache and last hidden state
    decode_step     one token of every response row, each reading its group's one prompt cache

A computation runs in the dtype of the parameters it is given; norms, rotation, scores and logits in at least float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from models import attention
from models.attention import PromptCache, ResponseCache, RowSlots, wide

# Logical axis names are read by grpo_jax.mesh; without this, flax wants a mesh at construction.
nnx.use_eager_sharding(False)

Params = dict[str, Any]
MOST_LAYERS = 10_000  # of a config.json that is believed


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the slow rotary frequencies (`rope_type: llama3`)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that fixes the network. Field names follow the axis letters; `from_hf` reads a config.json."""

    architecture: str  # "qwen2" or "llama"
    vocab: int  # V
    d_model: int  # D
    d_ff: int  # F
    layers: int  # L
    heads: int  # H
    kv_heads: int  # K
    head_dim: int  # C
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tied: bool = True  # the head is the embedding
    max_positions: int = 32768
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def qkv_bias(self) -> bool:
        return self.architecture == "qwen2"

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], source: str = "config.json") -> DecoderConfig:
        """Reads a Hugging Face config.json, of transformers 4.5x (`rope_theta`) or 5.x (`rope_parameters`).

        Raises ValueError, naming `source` and the field, for an architecture or a variation this decoder does not have.
        """
        names = {"Qwen2ForCausalLM": "qwen2", "LlamaForCausalLM": "llama"}
        declared = raw.get("architectures")
        declared = declared[0] if isinstance(declared, list) and declared else declared or None
        architecture = names.get(str(declared)) or (raw.get("model_type") if declared is None else None)
        if architecture not in names.values():
            found = declared or raw.get("model_type")
            raise ValueError(f"{source}: architecture {found!r:.80} is not supported; known are {', '.join(names)}")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        rope = rope if isinstance(rope, dict) else {"rope_type": rope}
        kind = rope.get("rope_type", rope.get("type", "default"))
        unsupported = {
            "hidden_act": raw.get("hidden_act", "silu") != "silu",
            "use_sliding_window": bool(raw.get("use_sliding_window")),
            "rope_type": kind not in ("default", "llama3"),
            "attention_bias": architecture == "llama" and bool(raw.get("attention_bias")),
            "mlp_bias": bool(raw.get("mlp_bias")),
        }
        for field, bad in unsupported.items():
            if bad:
                value = kind if field == "rope_type" else raw[field]
                raise ValueError(f"{source}: {field} = {value!r:.80} is not supported for {declared or architecture}")
        try:
            scaling = None
            if kind == "llama3":
                scaling = RopeScaling(
                    float(rope["factor"]),
                    float(rope["low_freq_factor"]),
                    float(rope["high_freq_factor"]),
                    int(rope["original_max_position_embeddings"]),
                )
            heads, d_model = int(raw["num_attention_heads"]), int(raw["hidden_size"])
            eos = raw.get("eos_token_id")
            config = cls(
                architecture=architecture,
                vocab=int(raw["vocab_size"]),
                d_model=d_model,
                d_ff=int(raw["intermediate_size"]),
                layers=int(raw["num_hidden_layers"]),
                heads=heads,
                kv_heads=int(raw.get("num_key_value_heads") or heads),
                head_dim=int(raw.get("head_dim") or d_model // heads),
                rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))),
                rope_scaling=scaling,
                norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
                tied=bool(raw.get("tie_word_embeddings", False)),
                max_positions=int(raw.get("max_position_embeddings", 32768)),
                bos_token_id=raw.get("bos_token_id"),
                eos_token_ids=() if eos is None else tuple(map(int, eos if isinstance(eos, (list, tuple)) else (eos,))),
            )
        except KeyError as missing:
            raise ValueError(f"{source}: field {missing} is missing") from None
        except (TypeError, ValueError, ArithmeticError) as error:
            raise ValueError(f"{source}: a field is no number ({' '.join(str(error).split()):.100})") from None
        sizes = (
            config.vocab,
            config.d_model,
            config.d_ff,
            config.heads,
            config.kv_heads,
            config.head_dim,
            config.max_positions,
        )
        if not (0 < config.layers <= MOST_LAYERS and all(0 < size < 2**31 for size in sizes)):
            raise ValueError(f"{source}: its sizes are those of no network ({config!s:.300})")
        return config

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """The config.json of this network, in the spelling that transformers 4.5x, 5.x and vLLM all read."""
        rope: dict[str, Any] = {}
        if self.rope_scaling is not None:
            s = self.rope_scaling
            rope["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": s.factor,
                "low_freq_factor": s.low_freq_factor,
                "high_freq_factor": s.high_freq_factor,
                "original_max_position_embeddings": s.original_max_positions,
            }
        eos = list(self.eos_token_ids)
        return {
            "architectures": [{"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[self.architecture]],
            "model_type": self.architecture,
            "vocab_size": self.vocab,
            "hidden_size": self.d_model,
            "intermediate_size": self.d_ff,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rope_theta": self.rope_theta,
            **rope,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": self.max_positions,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
            "initializer_range": 0.02,
            "use_cache": True,
            "torch_dtype": dtype,
            "transformers_version": "4.51.0",  # without one, 4.57 takes any tokenizer beside it for a broken one of Mistral's
        }


def _qwen(vocab: int, d_model: int, d_ff: int, layers: int, heads: int, kv_heads: int, tied: bool) -> DecoderConfig:
    return DecoderConfig(
        "qwen2",
        vocab,
        d_model,
        d_ff,
        layers,
        heads,
        kv_heads,
        d_model // heads,
        tied=tied,
        bos_token_id=151643,
        eos_token_ids=(151645, 151643),
    )


_LLAMA3 = DecoderConfig(
    "llama",
    128256,
    4096,
    14336,
    32,
    32,
    8,
    128,
    rope_theta=5e5,
    norm_eps=1e-5,
    tied=False,
    max_positions=8192,
    bos_token_id=128000,
    eos_token_ids=(128009, 128001),
)
SIZES: dict[str, DecoderConfig] = {
    "qwen2.5-0.5b": _qwen(151936, 896, 4864, 24, 14, 2, True),
    "qwen2.5-1.5b": _qwen(151936, 1536, 8960, 28, 12, 2, True),
    "qwen2.5-3b": _qwen(151936, 2048, 11008, 36, 16, 2, True),
    "qwen2.5-7b": _qwen(152064, 3584, 18944, 28, 28, 4, False),
    "qwen2.5-14b": _qwen(152064, 5120, 13824, 48, 40, 8, False),
    "llama-3-8b": _LLAMA3,
    "llama-3.1-8b": DecoderConfig(
        **{
            **vars(_LLAMA3),
            "rope_scaling": RopeScaling(),
            "max_positions": 131072,
            "eos_token_ids": (128001, 128008, 128009),
        }
    ),
}


# ---------------------------------------------------------------- the modules: shapes, initialisers, logical axes


_NORMAL = nnx.initializers.normal(0.02)


def _param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], init: Callable = _NORMAL) -> nnx.Param:
    return nnx.Param(init(rngs.params(), shape, jnp.float32), out_sharding=axes)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapted:
    """A weight with a product of low rank beside it, `weight + b a`; may stand in the tree where a matrix of a layer does."""

    weight: Array  # [O, I]
    a: Array  # [r, I]
    b: Array  # [O, r]


def _linear(x: Array, w: Array | Adapted | tuple[Array, ...], inputs: int = 1) -> Array:
    """x [..., I] times w [O, I]: [..., O], where I stands for the last `inputs` axes of both and O for all others of w.

    A tuple has the matrix in parts, cut along O, its only other axis then (see `halved`).

    Weights lie as Hugging Face's do, outputs first: on a CPU products of many rows, forward and backward, are faster for it;
    those of few rows, as in decoding, hardly (docs/performance.md).
    """
    if isinstance(w, Adapted):
        return _linear(x, w.weight, inputs) + _linear(_linear(x, w.a, inputs), w.b)
    if isinstance(w, tuple):
        return jnp.concatenate([_linear(x, part, inputs) for part in w], -1)
    size = math.prod(w.shape[-inputs:])
    y = _matmul(x.reshape(-1, size), w.reshape(-1, size))
    return y.reshape(*x.shape[:-inputs], *w.shape[:-inputs])


@jax.custom_vjp
def _matmul(x: Array, w: Array) -> Array:
    return x @ w.T


def _matmul_forward(x: Any, w: Any) -> tuple[Array, tuple[Array | None, Array | None]]:
    # What is not learned is told by `perturbed`: of a frozen weight the gradient is not computed, nor its input kept.
    return x.value @ w.value.T, (x.value if w.perturbed else None, w.value if x.perturbed else None)


def _matmul_backward(saved: tuple[Array | None, Array | None], dy: Array) -> tuple[Array | None, Array | None]:
    x, w = saved
    if x is not None:
        # The barrier keeps XLA on CPU from fusing what made x and dy into a strided copy of them; 1.5 to 2 times faster.
        x, dy = jax.lax.optimization_barrier((x, dy))
    return None if w is None else dy @ w, None if x is None else dy.T @ x


_matmul.defvjp(_matmul_forward, _matmul_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _normed(x: Array, scale: Array, eps: float) -> Array:
    """x [..., D] over its root mean square, times scale [D] (RMSNorm)."""
    y = x.astype(wide(x.dtype))
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return scale * y.astype(x.dtype)


def _normed_backward(eps: float, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    def by_autodiff(x: Array, scale: Array, dy: Array) -> tuple[Array, Array]:
        return jax.vjp(lambda x, scale: _normed.fun(x, scale, eps), x, scale)[1](dy)

    return jax.lax.platform_dependent(*saved, dy, cpu=functools.partial(_normed_by_products, eps), default=by_autodiff)


def _normed_by_products(eps: float, x: Array, scale: Array, dy: Array) -> tuple[Array, Array]:
    """The gradient with its two sums as products with a vector: on a CPU 1.5 instead of 28 ms (2816 x 576).

    Sums over an axis of two arrays' product, as autodiff makes them, XLA hands to a library that is slow at them.
    """
    dtype = wide(x.dtype)
    x, dy = jax.lax.optimization_barrier((x, dy))
    y, dy_wide, scale_wide = x.astype(dtype), dy.astype(dtype), scale.astype(dtype)
    r = jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    product = jax.lax.optimization_barrier(dy_wide * y)
    along = product @ scale_wide / x.shape[-1]
    dscale = r.reshape(-1) @ product.reshape(-1, x.shape[-1])
    dx = r * (dy_wide * scale_wide - y * (r * r * along[..., None]))
    return dx.astype(x.dtype), dscale.astype(scale.dtype)


_normed.defvjp(lambda x, scale, eps: (_normed(x, scale, eps), (x, scale)), _normed_backward)


class Norm(nnx.Module):
    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.eps = config.norm_eps
        self.scale = _param(rngs, (config.d_model,), ("embed",), nnx.initializers.ones)

    def __call__(self, x: Array) -> Array:
        return _normed(x, self.scale[...], self.eps)


class Attention(nnx.Module):
    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        d, h, k, c = config.d_model, config.heads, config.kv_heads, config.head_dim
        self.q = _param(rngs, (h, c, d), ("heads", "head_dim", "embed"))
        self.k = _param(rngs, (k, c, d), ("kv_heads", "head_dim", "embed"))
        self.v = _param(rngs, (k, c, d), ("kv_heads", "head_dim", "embed"))
        self.o = _param(rngs, (d, h, c), ("embed", "heads", "head_dim"))
        if config.qkv_bias:
            zeros = nnx.initializers.zeros
            self.q_bias = _param(rngs, (h, c), ("heads", "head_dim"), zeros)
            self.k_bias = _param(rngs, (k, c), ("kv_heads", "head_dim"), zeros)
            self.v_bias = _param(rngs, (k, c), ("kv_heads", "head_dim"), zeros)
        self.qkv_bias = config.qkv_bias

    def __call__(self, x: Array, rotation: tuple[Array, Array], attend: Callable) -> tuple[Array, Any]:
        q, k, v = (_linear(x, w.get_value()) for w in (self.q, self.k, self.v))
        if self.qkv_bias:
            q, k, v = q + self.q_bias[...], k + self.k_bias[...], v + self.v_bias[...]
        o, out = attend(_rotate(q, rotation), _rotate(k, rotation), v)
        return _linear(o, self.o.get_value(), 2), out


class FeedForward(nnx.Module):
    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.gate = _param(rngs, (config.d_ff, config.d_model), ("ff", "embed"))
        self.up = _param(rngs, (config.d_ff, config.d_model), ("ff", "embed"))
        self.down = _param(rngs, (config.d_model, config.d_ff), ("embed", "ff"))

    def __call__(self, x: Array) -> Array:
        gate, up, down = (w.get_value() for w in (self.gate, self.up, self.down))
        return _linear(jax.nn.silu(_linear(x, gate)) * _linear(x, up), down)


class Block(nnx.Module):
    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.attention_norm = Norm(config, rngs)
        self.attention = Attention(config, rngs)
        self.ff_norm = Norm(config, rngs)
        self.ff = FeedForward(config, rngs)

    def __call__(self, x: Array, rotation: tuple[Array, Array], attend: Callable) -> tuple[Array, Any]:
        with jax.named_scope("attention"):
            y, out = self.attention(self.attention_norm(x), rotation, attend)
        with jax.named_scope("ff"):
            x = x + y
            return x + self.ff(self.ff_norm(x)), out


class Decoder(nnx.Module):
    """`layers` is one Block whose parameters carry a leading axis L."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs)

        self.embed = _param(rngs, (config.vocab, config.d_model), ("vocab", "embed"))
        self.layers = stack(rngs)
        self.norm = Norm(config, rngs)
        if not config.tied:
            self.head = _param(rngs, (config.vocab, config.d_model), ("vocab", "embed"))


@functools.cache
def _block_and_norm(config: DecoderConfig) -> tuple[nnx.GraphDef, nnx.GraphDef]:
    part = lambda kind: nnx.split(nnx.eval_shape(lambda: kind(config, nnx.Rngs(0))))[0]  # noqa: E731
    return part(Block), part(Norm)


@functools.cache
def _graph(config: DecoderConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))


def shapes(config: DecoderConfig) -> Params:
    """The parameters as `jax.ShapeDtypeStruct`s (float32): what an import must fill."""
    return nnx.to_pure_dict(_graph(config)[1])


def parameters(config: DecoderConfig) -> int:
    """How many there are."""
    return sum(x.size for x in jax.tree.leaves(shapes(config)))


def logical_axes(config: DecoderConfig) -> Params:
    """The parameters' tree with a tuple of logical axis names for each array; read by grpo_jax.mesh."""
    return nnx.to_pure_dict(
        jax.tree.map(
            lambda p: p.get_metadata()["out_sharding"], _graph(config)[1], is_leaf=lambda x: isinstance(x, nnx.Variable)
        )
    )


@functools.partial(jax.jit, static_argnums=0)
def init(config: DecoderConfig, key: Array) -> Params:
    """Random float32 parameters: normal(0.02) kernels, zero biases, unit norms."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(key))))


# ---------------------------------------------------------------- pure functions


def rotation(config: DecoderConfig, positions: Array) -> tuple[Array, Array]:
    """cos and sin, [..., T, 1, C/2], of rotary embedding (with llama3 scaling where the config has it)."""
    # On the host in float64 and rounded once: an error of a frequency is multiplied by the position, and devices differ
    # in their powers.
    frequency = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    if (s := config.rope_scaling) is not None:
        turns = s.original_max_positions * frequency / (2 * np.pi)  # full turns within the original context
        smooth = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1)
        frequency = frequency * (smooth + (1 - smooth) / s.factor)
    dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    angle = positions[..., None, None] * jnp.asarray(frequency, dtype)
    return jnp.cos(angle), jnp.sin(angle)


def _rotate(x: Array, rotation: tuple[Array, Array]) -> Array:
    cos, sin = rotation
    a, b = jnp.split(x.astype(wide(x.dtype)), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def hidden(
    config: DecoderConfig,
    params: Params,
    tokens: Array,
    rotations: tuple[Array, Array],
    attend: Callable,
    caches: Any = None,
    *,
    remat: str = "none",
    place: Callable[[Array], Array] = lambda x: x,
) -> tuple[Array, Any]:
    """Runs the layers. tokens [...] int32, `rotation` of their positions -> (hidden states [..., D] after the last norm, outs).

    `attend(q [..., H, C], k [..., K, C], v [..., K, C], cache) -> (o [..., H, C], out)`; `caches` has a leading axis L and
    is handed over layer by layer, the `out`s come back stacked; or, where the parameters are `by_layer`, both are tuples
    over the layers. `remat` says what of a layer the backward pass finds kept: everything ("none"), its products with
    weights and the output of its attention ("elementwise" parts are computed again), its input and the output of its
    attention ("attention"), or its input alone ("full"). `place` says where the embeddings [..., D] of the tokens lie.
    """
    block, norm = _block_and_norm(config)
    x, layers = place(params["embed"][tokens]), params["layers"]

    def layer(x, given):
        weights, cache = given
        return nnx.merge(block, weights)(x, rotations, lambda q, k, v: attend(q, k, v, cache))

    if isinstance(layers, tuple):
        outs = []
        for given in zip(layers, caches, strict=True):
            x, out = layer(x, given)
            outs.append(out)
        return nnx.merge(norm, params["norm"])(x), tuple(outs)

    policies = jax.checkpoint_policies
    # cuDNN's call does not name what it keeps, so it is known by its primitive.
    fused = lambda primitive, *_, **__: primitive.name == "dot_product_attention_fwd_wrapper"  # noqa: E731
    attended = policies.save_from_both_policies(policies.save_only_these_names(attention.SAVED), fused)
    products = policies.save_from_both_policies(attended, policies.dots_with_no_batch_dims_saveable)
    kept = {"elementwise": products, "attention": attended, "full": policies.nothing_saveable}
    if remat not in ("none", *kept):
        raise ValueError(f"remat = {remat!r}: use 'none', 'elementwise', 'attention' or 'full'")
    body = layer if remat == "none" else jax.checkpoint(layer, policy=kept[remat], prevent_cse=False)
    x, outs = jax.lax.scan(body, x, (layers, caches))
    return nnx.merge(norm, params["norm"])(x), outs


def by_layer(params: Params) -> Params:
    """The parameters with a tuple of layers instead of stacked ones, for sampling.

    A scan over stacked layers copies every layer's weights out before it uses them. Where few tokens pass through, as in
    decoding, that is most of the time.
    """
    stacked = params["layers"]
    count = jax.tree.leaves(stacked)[0].shape[0]
    return {**params, "layers": tuple(jax.tree.map(lambda x: x[i], stacked) for i in range(count))}  # noqa: B023


@jax.jit
def _halves(w: Array) -> tuple[Array, ...]:
    return tuple(jnp.split(w, [len(w) // 2]))


def halved(params: Params) -> Params:
    """Parameters `by_layer` whose matrices `o` and `down` are cut into two halves of their outputs, for sampling on a CPU.

    There a product of few rows and few outputs runs in one thread, but products that do not wait for each other run side by
    side. Queries have keys and values beside them, gate has up; these two would be alone. To be called outside of `jax.jit`,
    which would copy the other arrays too.
    """

    def one(layer: Params) -> Params:
        attention, ff = layer["attention"], layer["ff"]
        return {**layer, "attention": {**attention, "o": _halves(attention["o"])}, "ff": {**ff, "down": _halves(ff["down"])}}

    return {**params, "layers": tuple(map(one, params["layers"]))}


def head(params: Params) -> Array:
    """The output matrix [V, D]: its own, or the embedding."""
    return params.get("head", params["embed"])


def unembed(params: Params, x: Array) -> Array:
    """Logits [..., V] of hidden states [..., D], in at least float32."""
    return jnp.einsum("...d,vd->...v", x, head(params), preferred_element_type=wide(x.dtype))


def logits(config: DecoderConfig, params: Params, tokens: Array, lengths: Array) -> Array:
    """Logits of right-padded sequences: tokens [B, T], lengths [B] -> [B, T, V], at least float32; 0 at padding."""
    t = tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(t), tokens.shape)
    x, _ = hidden(config, params, tokens, rotation(config, positions), lambda q, k, v, _: (attention.causal(q, k, v), None))
    return jnp.where((positions < lengths[:, None])[..., None], unembed(params, x), 0)


def prefill(
    config: DecoderConfig, params: Params, tokens: Array, lengths: Array, causal: Callable | None = None
) -> tuple[PromptCache, Array]:
    """Prompts [N, P], right padded, lengths [N] -> (their cache, the hidden state [N, D] of each prompt's last token).

    The parameters are `by_layer`, as for `decode_step`: a scan would want a second copy of them, stacked.
    `causal(q, k, v, lengths)` is the attention of rows, by default in plain XLA.
    """
    causal = causal or (lambda q, k, v, _: attention.causal(q, k, v))

    def attend(q, k, v, _):
        return causal(q, k, v, lengths), (jnp.moveaxis(k, -3, -1), jnp.moveaxis(v, -3, -2))

    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    # Or XLA on CPU would make the angles anew for each head of each layer.
    rotations = jax.lax.optimization_barrier(rotation(config, positions))
    x, caches = hidden(config, params, tokens, rotations, attend, (None,) * config.layers)
    k, v = zip(*caches, strict=True)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return PromptCache(k, v, lengths), last


def decode_step(
    config: DecoderConfig,
    params: Params,
    tokens: Array,
    rotations: tuple[Array, Array],
    prompts: PromptCache,
    responses: ResponseCache,
    slots: RowSlots,
) -> tuple[Array, ResponseCache]:
    """One token of every row: tokens [B] int32 -> (hidden [B, D], the longer response cache).

    `rotations` is `rotation` of the tokens' positions, prompt + response [B]. The parameters must be `by_layer`.
    """

    def attend(q, k, v, cache):
        prompt_k, prompt_v, *own = cache
        # Written before they are read: a cache that is read as it was, too, is copied in every step.
        k, v = written(own[0], k, True), written(own[1], v, False)
        return attention.decode(q, (prompt_k, prompt_v, prompts.length), (k, v, responses.length + 1), slots), (k, v)

    def written(bands, new, columns):
        start, found = 0, []
        for cache in bands:
            here = slice(start, start := start + cache.shape[0])
            row, token = jnp.arange(cache.shape[0]), responses.length[here]
            at = cache.at[row, :, :, token] if columns else cache.at[row, :, token]
            found.append(at.set(new[here], mode="drop"))
        return tuple(found)

    caches = tuple(zip(prompts.k, prompts.v, responses.k, responses.v, strict=True))
    x, outs = hidden(config, params, tokens, rotations, attend, caches)
    k, v = zip(*outs, strict=True)
    return x, ResponseCache(k, v, responses.length + 1)
