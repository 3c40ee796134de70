"""Low-rank adapters (LoRA, Hu et al. 2021): a frozen model, and beside some of its matrices a product of two thin ones.

A matrix W [O, I] acts as W + alpha / rank * b a, with a [r, I] and b [O, r]. The *adapters* are a tree like the
parameters', with {"a", "b"} in the place of each target and nothing elsewhere; they are all that is learned.

    init          the first adapters: b is 0, so that they change nothing yet
    join          model and adapters -> parameters that `models.decoder` computes with, each factor by itself: for learning
    merge         model and adapters -> plain parameters, the products added in: for sampling and export
    logical_axes  for the table of grpo_jax.mesh; the rank is never split

Names, initial values and scale are those of PEFT, and `models.hf.save_adapter` writes what it loads. There is no dropout:
sampler and learner must be one policy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from models import decoder
from models.attention import wide
from models.decoder import Adapted, DecoderConfig, Params

# PEFT's name -> (part of a layer, our matrix there, how many of its axes are inputs).
TARGETS = {
    "q_proj": ("attention", "q", 1),
    "k_proj": ("attention", "k", 1),
    "v_proj": ("attention", "v", 1),
    "o_proj": ("attention", "o", 2),
    "gate_proj": ("ff", "gate", 1),
    "up_proj": ("ff", "up", 1),
    "down_proj": ("ff", "down", 1),
}


@dataclass(frozen=True)
class Lora:
    """Which matrices have adapters, and of what kind; static under jit."""

    rank: int
    alpha: float = 16.0
    targets: tuple[str, ...] = tuple(TARGETS)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def init(config: DecoderConfig, lora: Lora, key: Array) -> Params:
    """Adapters in float32: a is uniform within 1 / sqrt(I), b is 0. Those of a matrix do not depend on the other targets."""
    weights = decoder.shapes(config)["layers"]

    def pair(name: str) -> dict[str, Array]:
        part, matrix, inputs = TARGETS[name]
        layers, *shape = weights[part][matrix].shape
        bound = 1 / math.sqrt(math.prod(shape[-inputs:]))
        own = jax.random.fold_in(key, list(TARGETS).index(name))
        a = jax.random.uniform(own, (layers, lora.rank, *shape[-inputs:]), jnp.float32, -bound, bound)
        return {"a": a, "b": jnp.zeros((layers, *shape[:-inputs], lora.rank), jnp.float32)}

    return _tree(lora, pair)


def shapes(config: DecoderConfig, lora: Lora) -> Params:
    """The adapters as `jax.ShapeDtypeStruct`s."""
    return jax.eval_shape(lambda: init(config, lora, jax.random.key(0)))


def logical_axes(config: DecoderConfig, lora: Lora) -> Params:
    """The adapters' tree with a tuple of logical axis names for each array; those of a matrix are its own, and `rank`."""
    axes = decoder.logical_axes(config)["layers"]

    def pair(name: str) -> dict[str, tuple[str, ...]]:
        part, matrix, inputs = TARGETS[name]
        layers, *of_matrix = axes[part][matrix]
        return {"a": (layers, "rank", *of_matrix[-inputs:]), "b": (layers, *of_matrix[:-inputs], "rank")}

    return _tree(lora, pair)


def _tree(lora: Lora, pair: Callable[[str], Any]) -> Params:
    layers: Params = {}
    for name in lora.targets:
        part, matrix, _ = TARGETS[name]
        layers.setdefault(part, {})[matrix] = pair(name)
    return {"layers": layers}


def join(base: Params, adapters: Params, lora: Lora) -> Params:
    """Parameters whose targets are `models.decoder.Adapted`; differentiable in the adapters.

    No matrix of a target's size is made, neither here nor for the gradient.
    """
    scaled = lambda w, one: Adapted(w, one["a"], one["b"] * lora.scale)  # noqa: E731
    return _replaced(base, adapters, scaled)


def merge(base: Params, adapters: Params, lora: Lora, dtype: Any) -> Params:
    """Plain parameters in `dtype`: W + alpha / rank * b a, computed in at least float32 and rounded once, layer by layer.

    Arrays that no adapter changes are those of `base` where they have that dtype already.
    """
    joined = join(base, adapters, lora)
    return jax.tree.map(lambda leaf: plain(leaf, dtype), joined, is_leaf=lambda leaf: isinstance(leaf, Adapted))


def plain(weight: Array | Adapted, dtype: Any) -> Array:
    """A weight of some layers, [L, ...], in `dtype`; the product beside it, if it has one, added in. See `merge`."""
    return _summed(jnp.dtype(dtype), weight) if isinstance(weight, Adapted) else weight.astype(dtype)


@functools.partial(jax.jit, static_argnums=0)
def _summed(dtype: Any, weight: Adapted) -> Array:
    def of_layer(given: tuple[Array, Array, Array]) -> Array:
        w, a, b = (x.astype(wide(x.dtype)) for x in given)
        product = b.reshape(-1, b.shape[-1]) @ a.reshape(a.shape[0], -1)
        return (w + product.reshape(w.shape)).astype(dtype)

    # Not all layers at once: the sums in float32 would take twice the memory of a model in bfloat16.
    with jax.default_matmul_precision("highest"):
        return jax.lax.map(of_layer, (weight.weight, weight.a, weight.b))


def _replaced(base: Params, adapters: Params, one: Callable[[Array, dict[str, Array]], Any]) -> Params:
    layers = dict(base["layers"])
    for part, matrices in adapters["layers"].items():
        layers[part] = {**layers[part], **{name: one(layers[part][name], pair) for name, pair in matrices.items()}}
    return {**base, "layers": layers}
