"""Which token to draft: how a draft distribution's tokens are put in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

Floats: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Tokens: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Ranked: TypeAlias = tuple[tuple[int, float], ...]
MOST_OTHERS = 3  # beside a draft


@dataclass(frozen=True)
class Candidates:
    """A draft distribution.

    Attributes:
        tokens: that may be drafted, int64 ``[N]``.
        weights: theirs, float32 ``[N]``, the largest 1. Who puts them in order may change them.
        total: of the whole distribution's weights.
        best: the logit of the largest.
    """

    tokens: Tokens
    weights: Floats
    total: float
    best: float


class Rank(Protocol):
    """A way to put tokens in order."""

    def __call__(self, found: Candidates, least: float) -> Ranked:
        """The best token, and up to ``MOST_OTHERS`` behind it, with the chance of each to be right.

        Args:
            least: the chance from which on other tokens than the best one are asked for.
        """


def likeliest(found: Candidates, least: float) -> Ranked:
    """By probability: for greedy decoding."""
    tokens, weights, total = found.tokens, found.weights, found.total
    best = int(weights.argmax())
    ranked = [(int(tokens[best]), 1 / total)]
    while len(ranked) <= MOST_OTHERS and 1 - ranked[0][1] > least:
        weights[best] = 0
        best = int(weights.argmax())
        if (chance := float(weights[best]) / total) < least:
            break
        ranked.append((int(tokens[best]), chance))
    return tuple(ranked)
