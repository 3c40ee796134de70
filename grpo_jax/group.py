"""The unit of everything: a group is one prompt and its G responses, ragged, on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def flat(groups: Sequence[Group]) -> dict[str, np.ndarray]:
    """The responses of groups of equal size in four arrays: a form in which hosts give them to each other."""
    joined = lambda rows, dtype: np.concatenate([np.zeros(0, dtype), *rows])  # noqa: E731
    every = [(*one,) for group in groups for one in zip(group.responses, group.sampler_logp, strict=True)]
    return {
        "length": np.array([[len(r) for r in group.responses] for group in groups], np.int32),
        "truncated": np.array([group.truncated for group in groups], bool),
        "tokens": joined([tokens for tokens, _ in every], np.int32),
        "logp": joined([logp for _, logp in every], np.float32),
    }


def ragged(prompts: Sequence[np.ndarray], arrays: Mapping[str, np.ndarray]) -> list[Group]:
    """The inverse of `flat`, with the prompts of the groups."""
    length = arrays["length"]
    ends = np.cumsum(length)[:-1]
    tokens, logp = (iter(np.split(arrays[name], ends)) for name in ("tokens", "logp"))
    take = lambda rows, n: tuple(next(rows) for _ in range(n))  # noqa: E731
    return [
        Group(prompt, take(tokens, length.shape[1]), take(logp, length.shape[1]), tuple(map(bool, cut)))
        for prompt, cut in zip(prompts, arrays["truncated"], strict=True)
    ]
