"""FLOPs by hand, by structure (scans, gradients, recomputation, kernels), and of the learner at the 7B shape."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from grpo_jax import flops, learner, packing
from grpo_jax.group import Group
from grpo_jax.learner import Objective
from models import decoder, lora
from models.decoder import SIZES, DecoderConfig
from models.lora import Lora

TINY = DecoderConfig("qwen2", 31, 24, 40, 2, 6, 2, 4)
X, W = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 16), jnp.float32)
PRODUCT = 2 * 8 * 16 * 16


def counted(f, *args):
    return flops.count(jax.make_jaxpr(f)(*args))


def groups_of(lengths):
    """Groups of token 0 by (prompt length, response lengths)."""
    zeros = lambda n: np.zeros(n, np.int32)  # noqa: E731
    return [
        Group(zeros(p), tuple(map(zeros, rs)), tuple(np.zeros(r, np.float32) for r in rs), (False,) * len(rs), np.ones(len(rs)))
        for p, rs in lengths
    ]


def copies(groups):
    """The same as groups of one response each."""
    rows = [(len(g.prompt), [len(r)]) for g in groups for r in g.responses]
    return groups_of(rows)


def test_a_product_counts_two_a_multiply_add():
    a, b = jax.ShapeDtypeStruct((3, 5, 7), jnp.float32), jax.ShapeDtypeStruct((3, 7, 11), jnp.bfloat16)
    assert counted(lambda a, b: a @ b, a, b) == 2 * 3 * 5 * 7 * 11
    assert counted(lambda a, b: jnp.einsum("ijk,lkm->ijlm", a, b), a, b) == 2 * 3 * 5 * 7 * 3 * 11
    assert counted(lambda a: jnp.exp(a).sum(), a) == 0


def test_scan_counts_its_length_where_xla_does_not():
    def layers(n, x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.broadcast_to(w, (n, 16, 16)))[0]

    assert counted(partial(layers, 2), X, W) == 2 * PRODUCT
    assert counted(partial(layers, 4), X, W) == 4 * PRODUCT
    by_xla = [jax.jit(partial(layers, n)).lower(X, W).compile().cost_analysis()["flops"] for n in (2, 4)]
    assert by_xla[1] < 1.1 * by_xla[0]


def test_gradient_is_three_and_recomputed_four_times_the_forward_pass():
    layer = lambda x, w: jnp.tanh(x @ w)  # noqa: E731
    loss = lambda layer, x, w: layer(x, w).sum()  # noqa: E731
    assert counted(jax.grad(partial(loss, layer), (0, 1)), X, W) == 3 * PRODUCT
    assert counted(jax.grad(partial(loss, jax.checkpoint(layer)), (0, 1)), X, W) == 4 * PRODUCT


def test_calls_branches_and_loops():
    @jax.custom_vjp
    def custom(x, w):
        return x @ w

    custom.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, dy: (dy @ saved[1].T, saved[0].T @ dy))
    assert counted(jax.jit(custom), X, W) == PRODUCT
    assert counted(jax.grad(lambda x, w: custom(x, w).sum(), (0, 1)), X, W) == 3 * PRODUCT
    assert counted(jax.nn.relu, X) == 0  # a custom_jvp
    branches = [lambda x, w: x, lambda x, w: x @ w, lambda x, w: x @ w @ w]
    assert counted(lambda x, w: jax.lax.switch(x[0, 0].astype(int), branches, x, w), X, W) == 2 * PRODUCT
    assert counted(lambda x, w: jax.lax.fori_loop(0, 5, lambda _, x: x @ w, x), X, W) == 5 * PRODUCT
    assert counted(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, x), X) == 0
    with pytest.raises(ValueError, match="trip count is not known"):
        counted(lambda x, w: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x), X, W)
    with pytest.raises(ValueError, match="convolutions"):
        counted(lambda x, w: jnp.convolve(x[0], w[0]), X, W)


def test_shard_map_counts_once_a_device():
    rows, whole = PartitionSpec("a"), PartitionSpec()
    over = partial(jax.shard_map, lambda x, w: x @ w, in_specs=(rows, whole), out_specs=rows)
    assert counted(over(mesh=AbstractMesh((4,), ("a",), axis_types=(AxisType.Auto,))), X, W) == PRODUCT
    both = AbstractMesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    assert counted(over(mesh=both), X, W) == 2 * PRODUCT  # every row is computed twice, once along b
    assert counted(jax.jit(over(mesh=both, axis_names={"a"})), X, W) == PRODUCT


@pytest.mark.parametrize("declared", [None, 12345])
def test_pallas_counts_its_grid_or_what_it_declares(declared):
    def kernel(x, w, o):
        o[...] = x[...] @ w[...]

    cost = declared and pl.CostEstimate(flops=declared, bytes_accessed=0, transcendentals=0)
    specs = [pl.BlockSpec((4, 16), lambda i: (i, 0)), pl.BlockSpec((16, 16), lambda i: (0, 0))]
    call = pl.pallas_call(kernel, X, grid=(2,), in_specs=specs, out_specs=specs[0], cost_estimate=cost)
    assert counted(call, X, W) == declared or PRODUCT


@pytest.mark.parametrize("mask, cells", [("NO_MASK", 12 * 12), ("CAUSAL", 12 * 13 // 2)])
@pytest.mark.parametrize("layout", ["BTNH", "BNTH"])
def test_cudnn_attention(monkeypatch, mask, cells, layout):
    cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    shape = lambda heads: (2, 12, heads, 64) if layout == "BTNH" else (2, heads, 12, 64)  # noqa: E731
    q, k = (jax.ShapeDtypeStruct(shape(heads), jnp.bfloat16) for heads in (4, 2))
    attend = partial(cudnn.dot_product_attention, mask_type=cudnn.MaskType[mask], qkv_layout=layout)
    forward = 4 * 2 * 4 * cells * 64
    assert counted(attend, q, k, k) == forward
    gradient = jax.grad(lambda *qkv: attend(*qkv).astype(jnp.float32).sum(), (0, 1, 2))
    assert counted(gradient, q, k, k) == 3.5 * forward


def test_useful_is_what_a_plain_forward_pass_counts_less_its_masked_cells():
    """`decoder.logits` of one sequence: all positions get a head, and attention computes the whole square."""
    p, r = 5, 3
    t = p + r
    tokens, lengths = jax.ShapeDtypeStruct((1, t), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    plain = counted(partial(decoder.logits, TINY), decoder.shapes(TINY), tokens, lengths)
    masked = TINY.layers * 4 * (t * t - t * (t + 1) // 2) * TINY.heads * TINY.head_dim
    heads = 2 * p * TINY.d_model * TINY.vocab
    [group] = groups_of([(p, [r])])
    assert flops.useful(TINY, [group]) == plain - masked - heads
    assert flops.useful(TINY, [group], backward=True) == 3 * flops.useful(TINY, [group])


def test_useful_counts_a_prompt_once():
    shared = groups_of([(50, [4, 7, 9])])
    repeated = 2 * flops.useful(TINY, groups_of([(50, [])]))
    assert flops.useful(TINY, copies(shared)) - flops.useful(TINY, shared) == repeated
    assert shared[0].cells == 50 * 51 // 2 + 20 * 50 + 10 + 28 + 45


def update(model, groups, objective, tokens_per_microbatch):
    """FLOPs of the learner's micro-batches; of shapes alone, no parameter exists."""
    params, frozen = decoder.shapes(model), None
    if objective.lora is not None:
        params, frozen = jax.eval_shape(lambda: lora.init(model, objective.lora, jax.random.key(0))), params
    sums = jax.eval_shape(learner.zeros, params)
    packs = packing.pack(groups, tokens_per_microbatch).packs
    return sum(flops.count(learner.accumulate.trace(model, objective, params, sums, pack, frozen).jaxpr) for pack in packs)


def test_learner_recomputes_what_remat_says():
    """The forward pass of the layers' matrices, or that of attention too; nothing else changes."""
    groups = groups_of([(40, [8, 8])])
    plain, elementwise, some, full = (
        update(TINY, groups, Objective(remat=remat, head_chunk=8), 64) for remat in ("none", "elementwise", "attention", "full")
    )
    assert elementwise == plain
    assert plain > flops.useful(TINY, groups, backward=True)
    attention = 2 * 2 * TINY.layers * TINY.heads * TINY.head_dim * packing.pack(groups, 64).launched_cells
    down = 2 * 56 * TINY.layers * TINY.d_ff * TINY.d_model  # nobody asks for a layer's last product again
    assert some - plain == 2 * 56 * TINY.layers * flops.layer_weights(TINY) - down
    assert full - some == attention


def test_shared_prompts_take_at_most_37_percent_at_7b():
    """1000 prompt tokens, 5 responses of 200: 2000 tokens a group against 6000 with the prompt copied."""
    model, objective = SIZES["qwen2.5-7b"], Objective(kl_coefficient=1e-3, dtype="bfloat16")
    groups = groups_of([(1000, [200] * 5)] * 4)
    shared, copied = (update(model, some, objective, 8192) for some in (groups, copies(groups)))
    print(f"{shared / copied:.3f}")
    assert shared / copied <= 0.37
    assert shared >= flops.useful(model, groups, backward=True)


@pytest.mark.parametrize("remat, least, most", [("none", 0.66, 0.69), ("attention", 0.73, 0.76)])
def test_adapters_save_the_gradients_of_the_matrices(remat, least, most):
    """Of the passes forward, backward to the inputs, backward to the weights, the last; with a second forward pass, of four."""
    model, objective = SIZES["qwen2.5-7b"], Objective(kl_coefficient=1e-3, dtype="bfloat16", remat=remat)
    groups = groups_of([(200, [100] * 5)] * 4)
    whole, thin = (update(model, groups, replace(objective, lora=settings), 8192) for settings in (None, Lora(rank=16)))
    print(f"{thin / whole:.3f}")
    assert least < thin / whole < most


def test_the_program_of_a_deep_model_is_no_larger_than_that_of_a_shallow_one():
    """So that compile time does not grow with depth: the 14B update, lowered, with 4 and with 48 layers."""
    objective = Objective(kl_coefficient=1e-3, dtype="bfloat16")
    [pack] = packing.pack(groups_of([(1000, [200] * 5)] * 4), 8192).packs
    sizes = []
    for layers in (4, 48):
        model = replace(SIZES["qwen2.5-14b"], layers=layers)
        params = decoder.shapes(model)
        sums = jax.eval_shape(learner.zeros, params)
        sizes.append(len(learner.accumulate.lower(model, objective, params, sums, pack).as_text()))
    assert abs(sizes[1] / sizes[0] - 1) < 0.05, sizes
