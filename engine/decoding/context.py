"""Drafts out of the context: what followed the latest tokens where they occurred before, in prompt or answer.

After prompt lookup decoding (A. Saxena, 2023); the lengths of matches and how many tokens are taken are our choice.
Such a draft costs nothing but the rows that it adds to the verification. How many pay is weighed as in
:mod:`engine.decoding.controller`: by how often matches of that length were right, and by what passes take here.
"""

from __future__ import annotations

import numpy as np

from engine.decoding.context_index import Match
from engine.decoding.costs import RoundCosts
from engine.decoding.native_memory import address, numbers
from engine.kernels.round_fields import LONGEST_MATCH

MAX_DRAFTS = 11
_PRIOR_RIGHT, _PRIOR_SEEN = 1.5, 2.5
_FADE = 0.998  # per observation: old luck counts less


class ContextDrafter:
    """Decides how much of a match is worth verifying; one per loaded model, so that what it learns carries over.

    Args:
        fixed: always as many as there are, up to this number: for tests and measurements.

    Attributes:
        luck: addresses of what it has learnt, for native code.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self.fixed = fixed
        right, seen = (np.full(LONGEST_MATCH + 1, prior) for prior in (_PRIOR_RIGHT, _PRIOR_SEEN))
        self._right, self._seen = numbers(right), numbers(seen)
        self.luck = address(right), address(seen)

    def choose(
        self, match: Match, limit: int, costs: RoundCosts, rate: float | None = None
    ) -> tuple[int, ...]:
        """The tokens of ``match`` to verify, at most ``limit``.

        Args:
            costs: of passes.
            rate: tokens per second that there are without them, at the usual pace; None: those of plain decoding.
        """
        count = min(len(match.tokens), limit, MAX_DRAFTS)
        if self.fixed is not None:
            return match.tokens[: min(count, self.fixed)]
        best, best_rate = 0, rate or 1 / costs.plain()
        chance = tokens = 1.0
        for drafts in range(1, count + 1):
            chance *= self._luck(match, drafts - 1)
            tokens += chance
            if tokens / costs.verify(drafts) > best_rate:
                best, best_rate = drafts, tokens / costs.verify(drafts)
        return match.tokens[:best]

    def extend(
        self, match: Match, limit: int, num_drafts: int, chance: float, costs: RoundCosts, rate: float
    ) -> tuple[int, ...]:
        """The tokens of ``match`` to verify behind other drafts: each is taken if the chance that all up to it are
        right is worth the row that it adds.

        Args:
            num_drafts: that are verified without them.
            chance: that all of those are right.
            costs: of passes.
            rate: tokens per second that time is worth, at the usual pace.
        """
        count = min(len(match.tokens), limit, MAX_DRAFTS - num_drafts)
        if self.fixed is not None:
            return match.tokens[: max(0, min(count, self.fixed))]
        for more in range(count):
            chance *= self._luck(match, more)
            drafts = num_drafts + more
            if chance <= rate * (costs.verify(drafts + 1) - costs.verify(drafts)):
                return match.tokens[:more]
        return match.tokens[: max(0, count)]

    def observe(self, match: Match, num_drafts: int, num_accepted: int) -> None:
        """Learn how far a match was right."""
        for position in range(min(num_accepted + 1, num_drafts)):
            length = _class(match, position)
            self._right[length] = self._right[length] * _FADE + (position < num_accepted)
            self._seen[length] = self._seen[length] * _FADE + 1

    def _luck(self, match: Match, position: int) -> float:
        """The chance that a token is right if those before it are."""
        length = _class(match, position)
        return self._right[length] / self._seen[length]


def _class(match: Match, position: int) -> int:
    """The token's match, those before it counted in."""
    return min(match.length + position, LONGEST_MATCH)
