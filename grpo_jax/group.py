"""The unit of everything: a group is one prompt and its G responses, ragged, on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Group:
    """One prompt and its responses as token ids; a response ends with its end-of-turn token unless it was truncated."""

    prompt: np.ndarray  # int32 [P]
    responses: tuple[np.ndarray, ...]  # G arrays int32 [R_i]
    sampler_logp: tuple[np.ndarray, ...]  # G arrays float [R_i], of the distribution that was sampled
    truncated: tuple[bool, ...]  # G: stopped by the length limit
    advantages: np.ndarray | None = None  # float [G], once rewards are known

    @property
    def tokens(self) -> int:
        """Tokens the group takes in a pack: its prompt once, and all its responses."""
        return len(self.prompt) + self.response_tokens

    @property
    def response_tokens(self) -> int:
        return sum(map(len, self.responses))

    @property
    def cells(self) -> int:
        """Pairs of a token and one that it sees: itself and what stands before it in its segment, and its prompt."""
        own = [len(self.prompt), *map(len, self.responses)]
        return sum(n * (n + 1) // 2 for n in own) + len(self.prompt) * self.response_tokens
