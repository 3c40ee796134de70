"""The mathematics of GRPO, as pure functions of arrays: advantages, clipped objective, KL estimators, entropy.

Every reduction returns (sum, count) and is divided once, by whoever holds the whole mini-batch; so no result depends on
how a batch was cut. Departures from the released Tool-N1 code, which averages inside each micro-batch: the mean runs over
all response tokens of the mini-batch. Exponents are clamped before `exp`, so that gradients stay finite far from the edges.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

# exp(20) = 5e8 is far beyond every clip edge and still finite, in value and gradient, in every dtype.
_LARGEST_LOG_RATIO = 20.0
_LARGEST_KL = 10.0


def group_advantages(rewards: Array, *, normalize: str = "std", eps: float = 1e-6) -> Array:
    """Advantages within each group: rewards [N, G] -> [N, G].

    "std": (r - mean) / (std + eps) with the unbiased standard deviation (ddof = 1); "mean_only": r - mean. Exactly 0 where
    the largest reward of a group equals the smallest, whatever rounding does to the mean; a group of one has mean 0 and
    standard deviation 1. Source: Tool-N1, section 3.1 and its released code. Raises ValueError for another `normalize`.
    """
    if normalize not in ("std", "mean_only"):
        raise ValueError(f"normalize = {normalize!r}: use 'std' or 'mean_only'")
    rewards = jnp.asarray(rewards, jnp.promote_types(jnp.asarray(rewards).dtype, jnp.float32))
    if rewards.shape[1] == 1:
        return rewards / (1 + eps) if normalize == "std" else rewards
    centred = rewards - rewards.mean(1, keepdims=True)
    scaled = centred / (jnp.std(rewards, axis=1, ddof=1, keepdims=True) + eps) if normalize == "std" else centred
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


def aggregate(x: Array, mask: Array, kind: str = "token_mean") -> tuple[Array, Array]:
    """(sum, count) of x over the true places of mask, both of the shape of x; their quotient is the mean over tokens."""
    if kind != "token_mean":
        raise ValueError(f"kind = {kind!r}: the only aggregation is 'token_mean'")
    x = jnp.asarray(x)
    mask = jnp.broadcast_to(mask, x.shape)
    return jnp.where(mask, x, 0).sum(), mask.sum()


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
