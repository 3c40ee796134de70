"""From packs to new parameters: log-probs with the prompt shared, losses as sums, one optimizer step a mini-batch.

    logprobs     pack -> log-probs and entropies of its response tokens; also serves the reference model
    accumulate   one micro-batch added to the running `Sums` of gradient, loss and statistics; one dispatch
    apply        the optimizer step, from sums divided by the mini-batch's token count; one dispatch

Master parameters stay in their own dtype (float32); the forward pass runs in `Objective.dtype`. With low-rank adapters
(`Objective.lora`), `params` are these, and the model beside which they stand is handed over as `frozen`. The mean runs over all
response tokens of the mini-batch, so that its cutting into micro-batches changes nothing (a departure from the released
Tool-N1 code, see grpo_jax.loss).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax import config, loss, mesh
from grpo_jax.packing import Pack
from models import attention, decoder
from models import lora as adapters
from models.decoder import DecoderConfig, Params
from models.logprobs import token_logprobs, token_losses
from models.lora import Lora


@dataclass(frozen=True)
class Objective:
    """What is minimised, and how it is computed; static under jit."""

    kind: str = "ppo"  # the token's clipped ratio; "gspo", "cispo"; or "cross_entropy" (SFT: -logp of the response)
    temperature: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    mean: str = "token_mean"  # how tokens are weighed, see grpo_jax.loss.token_weights
    longest: int = 1  # tokens of a response, of the mean "constant"
    importance_cap: float = 0.0  # of the weight that corrects for the sampler; 0: no such weight
    unmoved: bool = False  # the policy is still that of the old log-probs: GSPO's ratios are 1, and not what rounding makes
    kl_coefficient: float = 0.0
    kl_kind: str = "k3"
    entropy_coefficient: float = 0.0
    dtype: str = "float32"  # of the forward and backward pass
    remat: str = "attention"  # what of a layer is kept for the backward pass, see models.decoder.hidden
    head_chunk: int = 1024  # tokens whose logits a device holds at a time
    mesh: Mesh | None = None  # of the parameters and packs, where there are several devices
    lora: Lora | None = None  # of the adapters that are learned; None: the whole model is


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sums:
    """Running sums over the response tokens of a mini-batch; divided once, the first two by `count`, the others by `tokens`."""

    gradient: Params
    loss: Array
    count: Array  # what the tokens count together in the mean of the loss; their number, in a mean over tokens
    tokens: Array
    kl: Array
    entropy: Array
    clipped: Array
    mismatch: Array  # |learner's - sampler's log-prob|; meaningful before the first optimizer step of a rollout
    mismatch_max: Array  # the largest, not a sum


def zeros(params: Params) -> Sums:
    """The empty sums, gradients in at least float32, laid out like the parameters."""
    like = lambda p: jnp.zeros_like(p, attention.wide(p.dtype))  # noqa: E731
    dtype = attention.wide(jax.tree.leaves(params)[0].dtype)
    return Sums(jax.tree.map(like, params), *(jnp.zeros((), dtype) for _ in range(8)))


def cast(params: Params, dtype: str) -> Params:
    return jax.tree.map(lambda p: p.astype(dtype), params)


def _whole(objective: Objective, params: Params, frozen: Params | None) -> Params:
    """The model in the dtype of the computation; where there is a frozen one, with `params` as its adapters."""
    return cast(params if frozen is None else adapters.join(frozen, params, objective.lora), objective.dtype)


def _response_states(model: DecoderConfig, objective: Objective, params: Params, pack: Pack) -> tuple[Array, Array]:
    """(the hidden states [B, M, D] that predict the response tokens, the output matrix [V, D])."""
    kernel = mesh.by_rows(attention.packed, objective.mesh, (model.heads, model.kv_heads))
    attend = lambda q, k, v, _: (kernel(q, k, v, pack.layout), None)  # noqa: E731
    rotations = decoder.rotation(model, pack.positions)
    place = functools.partial(mesh.embedded, mesh=objective.mesh)
    x, _ = decoder.hidden(model, params, pack.tokens, rotations, attend, remat=objective.remat, place=place)
    # The matrix is gathered once, or every chunk of the head would gather it.
    return jnp.take_along_axis(x, pack.source[..., None], axis=1), mesh.gathered(decoder.head(params), objective.mesh)


def _chunk(objective: Objective, pack: Pack) -> int:
    """Tokens of each row [M] at a time: rows are split over the devices of a mesh."""
    rows = pack.tokens.shape[0] // (1 if objective.mesh is None else mesh.shards(objective.mesh))
    return max(1, objective.head_chunk // max(1, rows))


@functools.partial(jax.jit, static_argnums=(0, 1))
def logprobs(model: DecoderConfig, objective: Objective, params: Params, pack: Pack, frozen: Params | None = None) -> Array:
    """Log-probs [B, M] of the response tokens of a pack; the value at masked places has no meaning."""
    x, weights = _response_states(model, objective, _whole(objective, params, frozen), pack)
    return _token_logprobs(objective, pack, weights, x)


def _token_logprobs(objective: Objective, pack: Pack, weights: Array, x: Array) -> Array:
    head = functools.partial(token_logprobs, temperature=objective.temperature, chunk=_chunk(objective, pack))
    return jax.vmap(lambda x, target: head(weights, x, target)[0])(x, pack.target)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Given:
    """What the loss of a token depends on besides its own log-prob and entropy."""

    pack: Pack  # of it: what is [B, M]
    weight: Array | None  # [B, M]  of its place in the mean; None: 1
    log_ratio: Array | None  # [B, M]  of its whole response, for "gspo"


def _given(objective: Objective, pack: Pack, weights: Array, x: Array) -> tuple[Given, Array]:
    """(what is known of the tokens, what they count together); weights and x as `_response_states` returns them."""
    weight, count = loss.token_weights(pack.mask, objective.mean, pack.response, objective.longest)
    log_ratio = jnp.zeros_like(pack.old_logp) if objective.kind == "gspo" else None
    if objective.kind == "gspo" and not objective.unmoved:  # of whole responses, so before the head's chunks are gone through
        logp = _token_logprobs(objective, pack, weights, x)
        log_ratio = loss.sequence_log_ratio(logp, pack.old_logp, pack.mask, pack.response)
    of_tokens = replace(pack, tokens=None, positions=None, layout=None, source=None, target=None)
    return Given(of_tokens, None if objective.mean == "token_mean" else weight, log_ratio), count


def _per_token(objective: Objective, logp: Array, entropy: Array, given: Given) -> tuple[Array, dict[str, Array]]:
    """(loss, {name: what is noted}) of some tokens, each [m] and 0 where masked."""
    pack = given.pack
    masked = lambda x: jnp.where(pack.mask, x, 0)  # noqa: E731
    notes = {"entropy": entropy, "mismatch": jnp.abs(logp - pack.sampler_logp)}
    if objective.kind == "cross_entropy":
        return masked(-logp), jax.tree.map(masked, notes | {"kl": jnp.zeros_like(logp), "clipped": jnp.zeros_like(logp)})
    edges = {"clip_low": objective.clip_low, "clip_high": objective.clip_high}
    match objective.kind:
        case "ppo":
            token_loss, clipped = loss.token_objective(logp, pack.old_logp, pack.advantage, **edges)
        case "gspo":
            log_ratio = loss.straight(given.log_ratio, logp)
            token_loss, clipped = loss.token_objective(log_ratio, jnp.zeros_like(logp), pack.advantage, **edges)
        case "cispo":
            token_loss, clipped = loss.cispo_objective(logp, pack.old_logp, pack.advantage, **edges)
    if objective.importance_cap:
        token_loss *= loss.importance_weight(pack.old_logp, pack.sampler_logp, objective.importance_cap)
    kl = jnp.zeros_like(logp)
    if pack.ref_logp is not None:
        kl = loss.kl_estimate(logp, pack.ref_logp, kind=objective.kl_kind)
        token_loss += objective.kl_coefficient * kl
    if objective.entropy_coefficient:
        token_loss -= objective.entropy_coefficient * entropy
    if given.weight is not None:
        token_loss *= given.weight
    return masked(token_loss), jax.tree.map(masked, notes | {"kl": kl, "clipped": clipped.astype(logp.dtype)})


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def accumulate(
    model: DecoderConfig, objective: Objective, params: Params, sums: Sums, pack: Pack, frozen: Params | None = None
) -> Sums:
    """The sums with one micro-batch added; `sums` is donated. Of `frozen` no gradient is computed."""
    head = functools.partial(
        token_losses, functools.partial(_per_token, objective),
        temperature=objective.temperature, chunk=_chunk(objective, pack),
    )  # fmt: skip

    def total(params):
        x, weights = _response_states(model, objective, _whole(objective, params, frozen), pack)
        given, count = _given(objective, pack, *jax.lax.stop_gradient((weights, x)))
        losses, notes = jax.vmap(lambda *of_row: head(weights, *of_row))(x, pack.target, given)
        return losses.sum(), (count, notes)

    (value, (count, notes)), gradient = jax.value_and_grad(total, has_aux=True)(params)
    return Sums(
        jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums.gradient, gradient),
        sums.loss + value,
        sums.count + count,
        sums.tokens + pack.mask.sum(),
        sums.kl + notes["kl"].sum(),
        sums.entropy + notes["entropy"].sum(),
        sums.clipped + notes["clipped"].sum(),
        sums.mismatch + notes["mismatch"].sum(),
        jnp.maximum(sums.mismatch_max, notes["mismatch"].max()),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def apply(
    optimizer: optax.GradientTransformation, params: Params, state: optax.OptState, sums: Sums
) -> tuple[Params, optax.OptState, dict[str, Array]]:
    """One optimizer step; parameters and state are donated. Also returns the sums' scalars and the gradient's norm.

    Where loss, gradient or the log-probs of learner or sampler are not finite, parameters and state come back as they were, and
    "skipped" is 1, else 0.
    """
    count = jnp.maximum(sums.count, 1)
    gradient = jax.tree.map(lambda g: g / count.astype(g.dtype), sums.gradient)
    norm = optax.tree.norm(gradient)
    sound = jnp.isfinite(sums.loss) & jnp.isfinite(sums.mismatch) & jnp.isfinite(norm)
    updates, after = optimizer.update(gradient, state, params)
    chosen = lambda new, old: jax.tree.map(functools.partial(jnp.where, sound), new, old)  # noqa: E731
    scalars = {f.name: getattr(sums, f.name) for f in fields(sums) if f.name != "gradient"}
    scalars |= {"grad_norm": norm, "skipped": 1 - sound.astype(norm.dtype)}
    return chosen(optax.apply_updates(params, updates), params), chosen(after, state), scalars


def update(
    model: DecoderConfig,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    params: Params,
    state: optax.OptState,
    packs: Sequence[Pack],
    frozen: Params | None = None,
) -> tuple[Params, optax.OptState, dict[str, Array]]:
    """One optimizer step from the micro-batches of a mini-batch; parameters and state are donated.

    A state that rests in host memory is on the device for the optimizer's step only, and rests there again.
    """
    sums = zeros(params)
    for pack in packs:
        sums = accumulate(model, objective, params, sums, pack, frozen)
    if all(x.sharding.memory_kind != "pinned_host" for x in jax.tree.leaves(state)):
        return apply(optimizer, params, state, sums)
    here = mesh.moved(state, "device")
    jax.tree.map(lambda x: x.delete(), state)  # else the host holds it twice until the caller lets go
    params, state, scalars = apply(optimizer, params, here, sums)
    return params, mesh.moved(state, "pinned_host"), scalars


def step_metrics(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The metrics of a rollout from what its optimizer steps returned, in order: sums over all of them, divided once.

    Steps that were skipped are counted, and in nothing else.
    """
    skipped = {"learner/skipped": sum(int(s["skipped"]) for s in steps)}
    steps = [s for s in steps if not s["skipped"]]
    if not steps:
        return skipped
    total = lambda name: sum(float(s[name]) for s in steps)  # noqa: E731
    tokens = max(total("tokens"), 1.0)
    first = steps[0]  # later ones compare the sampler with a policy that has moved on
    return {
        "loss": total("loss") / max(total("count"), 1.0),
        "kl/mean": total("kl") / tokens,
        "entropy/mean": total("entropy") / tokens,
        "clip_fraction": total("clipped") / tokens,
        "grad_norm": total("grad_norm") / len(steps),
        "rollout/logp_mismatch": float(first["mismatch"]) / max(float(first["tokens"]), 1.0),
        "rollout/logp_mismatch_max": float(first["mismatch_max"]),
        **skipped,
    }


def init_state(optimizer: optax.GradientTransformation, params: Params) -> optax.OptState:
    """The optimizer's state, its moments laid out over the devices like the parameters, its counters on all of them."""
    layout = jax.tree.map(lambda x: x.sharding, state_shapes(optimizer, params))
    return jax.jit(optimizer.init, out_shardings=layout)(params)


def state_shapes(optimizer: optax.GradientTransformation, params: Params) -> optax.OptState:
    """`init_state` as ShapeDtypeStructs; the parameters may be such, too, with shardings."""
    everywhere = NamedSharding(jax.tree.leaves(params)[0].sharding.mesh, PartitionSpec())
    like_param = lambda _, p: p.sharding  # noqa: E731
    shapes = jax.eval_shape(optimizer.init, params)
    layout = optax.tree_map_params(optimizer, like_param, shapes, params, transform_non_params=lambda _: everywhere)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout)


def make_optimizer(settings: config.Optimizer, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW behind clipping by global norm, and its learning rate by optimizer step, for a run of `steps` of them."""
    warmup = round(settings.warmup * steps)
    rate = settings.learning_rate
    schedule = (
        optax.constant_schedule(rate)
        if settings.schedule == "constant"
        else optax.cosine_decay_schedule(rate, max(1, steps - warmup))
    )
    if warmup:
        schedule = optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), schedule], [warmup])
    adam = optax.scale_by_adam(b1=settings.b1, b2=settings.b2)
    if settings.moments == "bfloat16":
        adam = _kept_in_bfloat16(adam)
    decayed = optax.add_decayed_weights(settings.weight_decay)
    adamw = optax.chain(adam, decayed, optax.scale_by_learning_rate(schedule))
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), adamw), schedule


def _kept_in_bfloat16(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adam whose moments are kept in bfloat16 between the steps, and computed in the gradient's dtype.

    A step changes the second moment by about 0.1 %, and neighbours in bfloat16 are 0.4 to 0.8 % apart: rounded to the nearest,
    it is changed by large gradients only. After 2000 steps of random ones its mean is 1.19 times that of float32. So it is
    rounded up or down at random, right in the mean: 1.000 times, each number within 3.4 % (the update within 1.7 %). What is
    drawn follows from the count of steps: a run that resumes, on another mesh too, draws the same. The first moment changes
    by 10 % a step and is rounded to the nearest.
    """

    def init(params: Params) -> optax.OptState:
        return narrow(adam.init(params), lambda nu: nu.astype(jnp.bfloat16))

    def update(gradient: Params, state: optax.OptState, params: Params | None = None) -> tuple[Params, optax.OptState]:
        wide = lambda moment: jax.tree.map(lambda x, g: x.astype(g.dtype), moment, gradient)  # noqa: E731
        updates, after = adam.update(gradient, state._replace(mu=wide(state.mu), nu=wide(state.nu)), params)
        keys = iter(jax.random.split(jax.random.fold_in(jax.random.key(0), state.count), len(jax.tree.leaves(gradient))))
        return updates, narrow(after, lambda nu: _rounded_at_random(nu, next(keys)))

    def narrow(state: optax.OptState, second: Callable[[Array], Array]) -> optax.OptState:
        first = lambda mu: mu.astype(jnp.bfloat16)  # noqa: E731
        return state._replace(mu=jax.tree.map(first, state.mu), nu=jax.tree.map(second, state.nu))

    return optax.GradientTransformation(init, update)


def _rounded_at_random(x: Array, key: Array) -> Array:
    """Finite numbers in bfloat16, rounded up with the probability that makes the mean right, else down."""
    # bfloat16 is the upper half of float32's bits: a random lower half, added, carries into it as often as it should.
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    upper = (bits + jax.random.bits(key, x.shape, jnp.uint16)) >> 16
    return jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
