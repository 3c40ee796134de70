"""The mathematics of GRPO and its kin, as pure functions of arrays: advantages, objectives, means, KL estimators, entropy.

    advantages   group_advantages
    objectives   token_objective (PPO's, GRPO's), the same of sequence_log_ratio (GSPO), cispo_objective; importance_weight
    means        token_weights, aggregate: over tokens, over responses, or over responses of a constant length (Dr. GRPO)
    the rest     kl_estimate, entropy, overlong

The defaults are Tool-N1's. Every reduction returns (sum, count) and is divided once, by whoever holds the whole mini-batch; so
no result depends on how a batch was cut. Departures from the released Tool-N1 code, which averages inside each micro-batch:
the mean runs over all response tokens of the mini-batch. Exponents are clamped before `exp`, so that gradients stay finite far
from the edges.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

# exp(20) = 5e8 is far beyond every clip edge and still finite, in value and gradient, in every dtype.
_LARGEST_LOG_RATIO = 20.0
_LARGEST_KL = 10.0


def group_advantages(rewards: Array, *, normalize: str = "std", eps: float = 1e-6) -> Array:
    """Advantages within each group: rewards [N, G] -> [N, G].

    "std": (r - mean) / (std + eps) with the unbiased standard deviation (ddof = 1); "mean_only": r - mean (Dr. GRPO,
    arXiv 2503.20783, section 3); "rloo": r - the mean of the others, which is G / (G - 1) times that (RLOO,
    arXiv 2402.14740). Exactly 0 where the largest reward of a group equals the smallest, whatever rounding does
    to the mean; a group of one has mean 0 and standard deviation 1. Source: Tool-N1, section 3.1 and its released code.
    Raises ValueError for another `normalize`.
    """
    if normalize not in ("std", "mean_only", "rloo"):
        raise ValueError(f"normalize = {normalize!r}: use 'std', 'mean_only' or 'rloo'")
    rewards = jnp.asarray(rewards, jnp.promote_types(jnp.asarray(rewards).dtype, jnp.float32))
    if rewards.shape[1] == 1:
        return rewards / (1 + eps) if normalize == "std" else rewards
    centred = rewards - rewards.mean(1, keepdims=True)
    match normalize:
        case "std":
            scaled = centred / (jnp.std(rewards, axis=1, ddof=1, keepdims=True) + eps)
        case "mean_only":
            scaled = centred
        case "rloo":
            scaled = centred * (rewards.shape[1] / (rewards.shape[1] - 1))
    equal = rewards.max(1, keepdims=True) == rewards.min(1, keepdims=True)
    return jnp.where(equal, 0.0, scaled)


def token_objective(
    logp: Array, old_logp: Array, advantages: Array, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> tuple[Array, Array]:
    """The clipped objective of each token, as a loss: max(-ratio * A, -clip(ratio, 1 - clip_low, 1 + clip_high) * A).

    logp, old_logp [...]; advantages broadcast to [...]. Returns (loss [...], clipped [...] bool: the clipped branch is
    strictly the larger loss, so the token gives no gradient). Source: PPO, equation 7; Tool-N1, section 3.1.
    """
    ratio = jnp.exp(jnp.clip(logp - old_logp, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO))
    plain = -ratio * advantages
    limited = -jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages
    return jnp.maximum(plain, limited), limited > plain


def sequence_log_ratio(logp: Array, old_logp: Array, mask: Array, response: Array) -> Array:
    """The log of GSPO's ratio, at each token of its response: the mean of logp - old_logp over that response.

    All [..., M], `response` as in `token_weights`; masked places hold 0. Source: GSPO, arXiv 2507.18071, section 4.1.
    """
    return _total(jnp.where(mask, logp - old_logp, 0), response) * _share(mask, response)


def straight(log_ratio: Array, logp: Array) -> Array:
    """log_ratio [...] in value, with the gradient of logp [...].

    So every token of a response can carry the ratio of the whole, and the gradient of its own log-prob; the mean over the
    response then has the gradient of GSPO. Source: GSPO, arXiv 2507.18071, section 4.3 (GSPO-token).
    """
    return jax.lax.stop_gradient(log_ratio) + (logp - jax.lax.stop_gradient(logp))  # in this order: what is added is 0


def cispo_objective(
    logp: Array, old_logp: Array, advantages: Array, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> tuple[Array, Array]:
    """REINFORCE weighted by the clipped ratio, of which no gradient is taken: -clip(ratio) * A * logp; no token is left out.

    Shapes as in `token_objective`; clipped: where the ratio lies outside. The paper has no lower bound (clip_low = 1).
    Source: CISPO, in MiniMax-M1, arXiv 2506.13585, section 3.1.
    """
    ratio = jnp.exp(jnp.clip(logp - old_logp, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO))
    limited = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    return -jax.lax.stop_gradient(limited) * advantages * logp, limited != ratio


def importance_weight(old_logp: Array, sampler_logp: Array, cap: float) -> Array:
    """min(exp(old_logp - sampler_logp), cap) of each token: corrects for a sampler that is not quite the old policy.

    All [...]; a constant to the gradient. Source: Yao et al., "Your efficient RL framework secretly brings you off-policy RL
    training" (2025), truncated importance sampling.
    """
    ratio = jnp.exp(jnp.clip(old_logp - sampler_logp, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO))
    return jax.lax.stop_gradient(jnp.minimum(ratio, cap))


def overlong(lengths: Array, longest: int, margin: int) -> Array:
    """DAPO's soft punishment of long responses: int [...] -> [...], 0 up to longest - margin tokens, then evenly down to -1.

    Source: DAPO, arXiv 2503.14476, section 3.4.
    """
    return jnp.clip((longest - margin - jnp.asarray(lengths)) / margin, -1.0, 0.0)


def token_weights(
    mask: Array, kind: str = "token_mean", response: Array | None = None, longest: int | None = None
) -> tuple[Array, Array]:
    """(what each token counts in a mean [..., M], what all of them count together); 0 where mask [..., M] is false.

    "token_mean": 1 a token, together their number. "sequence_mean": 1 / tokens of its response, together the number of
    responses (GRPO as first published, arXiv 2402.03300, section 4.1). "constant": 1 / longest, together the number of
    responses, so that a long response counts more (Dr. GRPO, arXiv 2503.20783, section 3). response: int [..., M], which
    of its row a token belongs to, from 0 to below M. Raises ValueError for another `kind`.
    """
    match kind:
        case "token_mean":
            return mask, mask.sum()
        case "sequence_mean":
            share = _share(mask, response)
            return share, share.sum()
        case "constant":
            return mask / longest, _share(mask, response).sum()
    raise ValueError(f"kind = {kind!r}: use 'token_mean', 'sequence_mean' or 'constant'")


def aggregate(
    x: Array, mask: Array, kind: str = "token_mean", *, response: Array | None = None, longest: int | None = None
) -> tuple[Array, Array]:
    """(sum, count) of x over the true places of mask, both of the shape of x, weighed as `token_weights` says; their quotient
    is the mean of that kind."""
    x = jnp.asarray(x)
    mask = jnp.broadcast_to(mask, x.shape)
    weight, count = token_weights(mask, kind, response, longest)
    return (jnp.where(mask, x, 0) * weight).sum(), count


@functools.partial(jnp.vectorize, signature="(m),(m)->(m)")
def _total(x: Array, response: Array) -> Array:
    """At each place the sum of x over all places of the same response."""
    return jnp.zeros_like(x).at[response].add(x)[response]


def _share(mask: Array, response: Array) -> Array:
    """1 / tokens of the response, at each true place of mask; else 0."""
    return mask / jnp.maximum(_total(mask.astype(int), response), 1)


def policy_loss(
    logp: Array, old_logp: Array, advantages: Array, mask: Array, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> tuple[Array, Array, Array]:
    """`token_objective` summed over the true places of mask: (sum, count, clipped_count)."""
    loss, clipped = token_objective(logp, old_logp, advantages, clip_low=clip_low, clip_high=clip_high)
    total, count = aggregate(loss, mask)
    return total, count, aggregate(clipped, mask)[0]


def kl_estimate(logp: Array, ref_logp: Array, *, kind: str = "k3") -> Array:
    """An estimate [...] of KL(policy || reference) from the log-probs [...] of tokens that the policy sampled.

    With d = ref_logp - logp: "k3" is exp(d) - d - 1, its value clamped to [-10, 10] (so its gradient is 0 beyond);
    "k1" is -d; "k2" is d * d / 2. Source: Schulman, "Approximating KL divergence" (2020); the clamp is Tool-N1's.
    """
    d = ref_logp - logp
    match kind:
        case "k3":
            d = jnp.clip(d, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
            return jnp.clip(jnp.exp(d) - d - 1, -_LARGEST_KL, _LARGEST_KL)
        case "k1":
            return -d
        case "k2":
            return d * d / 2
    raise ValueError(f"kind = {kind!r}: use 'k3', 'k1' or 'k2'")


def entropy(logits: Array) -> Array:
    """Entropy in nats of the distributions with these logits: [..., V] -> [...]."""
    shifted = logits - logits.max(-1, keepdims=True)
    weights = jnp.exp(shifted)
    total = weights.sum(-1)
    return jnp.log(total) - (weights * shifted).sum(-1) / total
