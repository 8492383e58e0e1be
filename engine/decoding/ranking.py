"""Which token to draft: how a draft distribution's tokens are put in order."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import numpy as np

Floats: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Tokens: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Ranked: TypeAlias = tuple[tuple[int, float], ...]
MOST_OTHERS = 3  # beside a draft


class Rank(Protocol):
    """A way to put tokens in order."""

    def __call__(self, tokens: Tokens, weights: Floats, total: float, position: int, least: float) -> Ranked:
        """The best token, and up to ``MOST_OTHERS`` behind it, with the chance of each to be right.

        Args:
            tokens: of the draft distribution.
            weights: theirs, the largest 1. The call may change them.
            total: of the whole distribution's weights.
            position: that the token is for: how many are before it.
            least: the chance from which on other tokens than the best one are asked for.
        """


def likeliest(tokens: Tokens, weights: Floats, total: float, position: int, least: float) -> Ranked:
    """By probability: for greedy decoding."""
    best = int(weights.argmax())
    found = [(int(tokens[best]), 1 / total)]
    while len(found) <= MOST_OTHERS and 1 - found[0][1] > least:
        weights[best] = 0
        best = int(weights.argmax())
        if (chance := float(weights[best]) / total) < least:
            break
        found.append((int(tokens[best]), chance))
    return tuple(found)
