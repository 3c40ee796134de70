"""Lengths of prompts and responses as tool calling has them, for benchmarks and for tests of packing and sampling.

Fitted by hand to calls with tool schemas: prompts of some hundred tokens, short responses with a long tail.
"""

from __future__ import annotations

import numpy as np

PROMPT = dict(median=700, sigma=0.5, shortest=64, longest=4096)
RESPONSE = dict(median=120, sigma=0.917, shortest=8, longest=2048)


def draw(prompts: int, group_size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Log-normal lengths in tokens, clipped: (of prompts int64 [N], of their responses int64 [N, G])."""
    rng = np.random.default_rng(seed)
    return _lengths(rng, prompts, **PROMPT), _lengths(rng, (prompts, group_size), **RESPONSE)


def _lengths(rng: np.random.Generator, shape, *, median: float, sigma: float, shortest: int, longest: int) -> np.ndarray:
    return np.clip(np.rint(median * np.exp(sigma * rng.standard_normal(shape))), shortest, longest).astype(np.int64)
