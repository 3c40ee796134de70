"""FLOPs: those that a traced program launches, and those that its true tokens need.

    count      a jaxpr -> the FLOPs of its matrix products, a scan's body times its length, recomputation included
    traffic    a jaxpr -> the bytes of these products' operands and results, likewise
    useful     groups -> what their tokens need however they are computed: no padding, no copies, no recomputation

XLA's own `cost_analysis` counts the body of a scan once, and so a model of any depth as one layer; hence the walk. Only
products count (2 FLOPs a multiply-add, as everyone reports them): norms, softmax and optimizer are left out. A program
split over devices is counted whole: shapes under `jit` are global, and the body of a `shard_map` counts once a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxprs_in_params

from grpo_jax.group import Group
from models.decoder import DecoderConfig


def count(program: ClosedJaxpr | Jaxpr) -> int:
    """FLOPs of a program: of `jax.make_jaxpr(f)(*args).jaxpr`, or of `jax.jit(f).trace(*args).jaxpr`; nothing is computed.

    Of a `cond` the most expensive branch counts. Raises ValueError for what cannot be counted: products in a
    `while_loop`, whose trips are not known before it runs, and convolutions.
    """
    return _walk(program, lambda eqn: KERNELS[eqn.primitive.name](eqn))


def traffic(program: ClosedJaxpr | Jaxpr) -> int:
    """Bytes of the operands and results of a program's products and kernels, counted as `count` counts FLOPs.

    A lower estimate of what goes through memory: each is read or written once, and everything elementwise is free.
    """
    return _walk(program, lambda eqn: sum(v.aval.size * v.aval.dtype.itemsize for v in (*eqn.invars, *eqn.outvars)))


def _walk(program: ClosedJaxpr | Jaxpr, leaf: Callable[[JaxprEqn], int]) -> int:
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    return sum(_equation(eqn, leaf) for eqn in jaxpr.eqns)


def _equation(eqn: JaxprEqn, leaf: Callable[[JaxprEqn], int]) -> int:
    name = eqn.primitive.name
    if name in KERNELS:
        return leaf(eqn)
    inner = [_walk(jaxpr, leaf) for jaxpr in jaxprs_in_params(eqn.params)]
    match name:
        case "scan":
            return eqn.params["length"] * sum(inner)
        case "cond":
            return max(inner)
        case "while":
            if any(inner):
                raise ValueError(
                    "products in a while_loop: its trip count is not known; use fori_loop with fixed bounds or scan"
                )
            return 0
        case "shard_map":
            # jax 0.10.0 calls them manual_axes. Over the other axes of the mesh the shapes are global.
            axes = eqn.params.get("newly_manual_axes", eqn.params.get("manual_axes"))
            return math.prod(eqn.params["mesh"].shape[axis] for axis in axes) * sum(inner)
        case "conv_general_dilated":
            raise ValueError("convolutions are not counted")
    return sum(inner)


def _dot(eqn: JaxprEqn) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2 * eqn.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)


def _pallas(eqn: JaxprEqn) -> int:
    """What the kernel declares; else its body times its grid, an upper bound where a mask lets it skip blocks."""
    if (declared := eqn.params["cost_estimate"]) is not None:
        return declared.flops
    return math.prod(eqn.params["grid_mapping"].grid) * count(eqn.params["jaxpr"])


def _cudnn(products: int) -> Callable[[JaxprEqn], int]:
    """Fused attention of `products` matrix products a cell: 2 forward, 5 backward, which computes the scores again.

    Padding that only sequence lengths tell apart counts as tokens; of a causal mask the lower triangle counts.
    """

    def flops(eqn: JaxprEqn) -> int:
        q, k = (v.aval.shape for v in eqn.invars[:2])
        heads_last = eqn.params["layout"] == 0  # [B, T, H, C], else [B, H, T, C]
        (t, heads), s = (q[1:3], k[1]) if heads_last else (q[2:0:-1], k[2])
        causal = eqn.params["mask_type"].name.endswith("CAUSAL")
        cells = sum(min(i + 1, s) for i in range(t)) if causal else t * s
        return 2 * products * q[0] * heads * cells * q[-1]

    return flops


# What a primitive itself computes; all others compute what the programs inside them do.
KERNELS: dict[str, Callable[[JaxprEqn], int]] = {
    "dot_general": _dot,
    "pallas_call": _pallas,
    "dot_product_attention_fwd_wrapper": _cudnn(2),
    "dot_product_attention_bwd_wrapper": _cudnn(5),
}


def useful(config: DecoderConfig, groups: Sequence[Group], *, backward: bool = False) -> int:
    """FLOPs that the tokens of the groups need: prompts once, the head at response tokens only, exact causal attention.

    The same for sampling them, for their log-probs and, with `backward` (three times as much), for learning from them.
    """
    tokens, responses = sum(g.tokens for g in groups), sum(g.response_tokens for g in groups)
    attention = 2 * 2 * sum(g.cells for g in groups) * config.heads * config.head_dim
    forward = config.layers * (2 * tokens * layer_weights(config) + attention) + 2 * responses * config.d_model * config.vocab
    return 3 * forward if backward else forward


def layer_weights(config: DecoderConfig) -> int:
    """Weights of one layer's matrices."""
    attention = (2 * config.heads + 2 * config.kv_heads) * config.head_dim
    return config.d_model * (attention + 3 * config.d_ff)
