"""From hidden states to log-probs, entropies and losses of tokens, without ever holding the logits of all of them.

    token_logprobs   forward only: the reference model, validation, old log-probs
    token_losses     a loss of each token's own log-prob and entropy, its gradient made in the same pass

Both run the output matrix over a chunk of tokens at a time; an array of [tokens, vocabulary] does not exist.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from models.attention import wide


def token_logprobs(
    weights: Array, x: Array, targets: Array, *, temperature: float = 1.0, chunk: int = 1024
) -> tuple[Array, Array]:
    """Log-probs and entropies of logits / temperature: x [M, D], targets [M] -> (logp [M], entropy [M]), nats.

    weights [V, D] is the output matrix, `models.decoder.head(params)`. It runs over `chunk` tokens at a time at most. To
    differentiate, use `token_losses`.
    """
    chunks, join = _chunks((x, targets), chunk)
    statistics = lambda xs: _statistics(_scores(weights, xs[0], temperature), xs[1])[:2]  # noqa: E731
    return join(jax.lax.map(statistics, chunks))


def token_losses(
    per_token: Callable, weights: Array, x: Array, targets: Array, given: Any, *, temperature: float = 1.0, chunk: int = 1024
) -> tuple[Array, Any]:
    """The sum over tokens of a loss that depends on each token's log-prob and entropy alone, and what is noted beside it.

    `per_token(logp [m], entropy [m], given) -> (loss [m], notes)` sees m of the M tokens at a time; `given` and `notes` are
    trees of arrays with such an axis. Differentiable in weights [V, D] and x [M, D]: the gradient is made in the forward
    pass, chunk by chunk, while the scores are there, so that they need not be computed a second time.
    """
    return _token_losses(per_token, temperature, chunk, weights, x, targets, given)


def _chunks(arrays: Any, most: int) -> tuple[Any, Callable]:
    """A tree of arrays [M, ...] -> ([chunks, m, ...], padded with zeros; what makes [M, ...] of such arrays again)."""
    size = jax.tree.leaves(arrays)[0].shape[0]
    count = -(-size // most)
    pad = lambda x: jnp.pad(x, [(0, -size % count)] + [(0, 0)] * (x.ndim - 1)).reshape(count, -1, *x.shape[1:])  # noqa: E731
    return jax.tree.map(pad, arrays), lambda made: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:size], made)


def _scores(weights: Array, x: Array, temperature: float) -> Array:
    return jnp.einsum("md,vd->mv", x, weights, preferred_element_type=wide(x.dtype)) / temperature


def _statistics(scores: Array, targets: Array) -> tuple[Array, Array, Array]:
    """(log-prob of the target, entropy, log of the sum of exponentials), each [m], of scores [m, V]."""
    m, v = scores.shape
    largest = scores.max(-1)
    # Both sums in one pass over the scores, which is what this costs; in blocks, so that float32 sums stay exact.
    block = min(v & -v, 256)
    terms = jnp.exp(scores - largest[:, None]).reshape(m, -1, block)
    add = lambda a, b: (a[0] + b[0], a[1] + b[1])  # noqa: E731
    zero = jnp.zeros((), scores.dtype)
    parts = jax.lax.reduce((terms, terms * scores.reshape(terms.shape)), (zero, zero), add, (2,))
    total, weighted = (part.sum(-1) for part in parts)
    log_total = largest + jnp.log(total)
    return jnp.take_along_axis(scores, targets[:, None], -1)[:, 0] - log_total, log_total - weighted / total, log_total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _token_losses(per_token, temperature, chunk, weights, x, targets, given):
    chunks, join = _chunks((x, targets, given), chunk)

    def one(_, some):
        x, targets, given = some
        logp, entropy, _ = _statistics(_scores(weights, x, temperature), targets)
        loss, notes = per_token(logp, entropy, given)
        return None, (loss, notes)

    loss, notes = join(jax.lax.scan(one, None, chunks)[1])
    return loss.sum(), notes


def _token_losses_forward(per_token, temperature, chunk, *primals):
    learned = primals[0].perturbed  # of a frozen output matrix the gradient is not computed
    weights, x, targets, given = jax.tree.map(lambda primal: primal.value, primals)
    (x, targets, given), join = _chunks((x, targets, given), chunk)

    def one(dweights, some):
        x, targets, given = some
        scores = _scores(weights, x, temperature)
        logp, entropy, log_total = _statistics(scores, targets)
        loss, pullback, notes = jax.vjp(lambda *stats: per_token(*stats, given), logp, entropy, has_aux=True)
        dlogp, dentropy = (d[:, None] for d in pullback(jnp.ones_like(loss)))
        logp_of_all = scores - log_total[:, None]
        is_target = jnp.arange(scores.shape[1]) == targets[:, None]
        dscores = jnp.where(is_target, dlogp, 0)
        dscores -= jnp.exp(logp_of_all) * (dlogp + dentropy * (logp_of_all + entropy[:, None]))
        dscores = (dscores / temperature).astype(x.dtype)
        if learned:
            dweights += jnp.einsum("mv,md->vd", dscores, x, preferred_element_type=dweights.dtype)
        return dweights, (loss, notes, dscores @ weights)

    none_yet = jnp.zeros(weights.shape, wide(x.dtype)) if learned else None
    dweights, made = jax.lax.scan(one, none_yet, (x, targets, given))
    loss, notes, dx = join(made)
    return (loss.sum(), notes), (dx, dweights.astype(weights.dtype) if learned else None)


def _token_losses_backward(per_token, temperature, chunk, saved, gradients):
    dx, dweights = saved
    scale = gradients[0].astype(dx.dtype)  # notes carry no gradient
    return None if dweights is None else scale * dweights, scale * dx, None, None


_token_losses.defvjp(_token_losses_forward, _token_losses_backward, symbolic_zeros=True)
