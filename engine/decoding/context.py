"""Drafts out of the context: what followed the latest tokens where they occurred before, in prompt or answer.

After prompt lookup decoding (A. Saxena, 2023); the lengths of matches and how many tokens are taken are our choice.
Such a draft costs nothing but the rows that it adds to the verification. How many pay is weighed as in
:mod:`engine.decoding.controller`: by how often matches of that length were right, and by what passes take here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.decoding.costs import RoundCosts

LENGTHS = (2, 3, 4, 5)  # of matches, in tokens
MAX_DRAFTS = 11
_LONGEST = LENGTHS[-1] + 3  # a match that drafts have made longer counts as one of this length at most
_PRIOR_RIGHT, _PRIOR_SEEN = 1.5, 2.5
_FADE = 0.998  # per observation: old luck counts less


@dataclass(frozen=True)
class Match:
    """An earlier occurrence of the latest ``length`` tokens, and what followed it there."""

    length: int = 0
    tokens: tuple[int, ...] = ()


NO_MATCH = Match()


class ContextIndex:
    """The short runs of tokens in one growing sequence."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = ids
        self._ends: dict[tuple[int, ...], int] = {}  # the latest end of each run
        self._done = 0

    def find(self, limit: int, drafts: Sequence[int] = ()) -> Match:
        """The latest earlier occurrence of the longest run that the sequence, with ``drafts`` behind it, ends with; and
        up to ``limit`` tokens that follow it there."""
        ids = self._ids
        for end in range(self._done + 1, len(ids)):  # a run at the very end has nothing behind it
            for length in LENGTHS:
                if length <= end:
                    self._ends[tuple(ids[end - length : end])] = end
        self._done = max(self._done, len(ids) - 1)
        latest = (*ids[-LENGTHS[-1] :], *drafts)
        for length in reversed(LENGTHS):
            earlier = self._ends.get(latest[-length:])
            if earlier is not None:
                return Match(length, tuple(ids[earlier : earlier + limit]))
        return NO_MATCH


class ContextDrafter:
    """Decides how much of a match is worth verifying; one per loaded model, so that what it learns carries over.

    Args:
        fixed: always as many as there are, up to this number: for tests and measurements.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self._fixed = fixed
        self._right = [_PRIOR_RIGHT] * (_LONGEST + 1)
        self._seen = [_PRIOR_SEEN] * (_LONGEST + 1)

    def choose(
        self, match: Match, limit: int, costs: RoundCosts, rate: float | None = None
    ) -> tuple[int, ...]:
        """The tokens of ``match`` to verify, at most ``limit``.

        Args:
            costs: of passes.
            rate: tokens per second that there are without them, at the usual pace; None: those of plain decoding.
        """
        count = min(len(match.tokens), limit, MAX_DRAFTS)
        if self._fixed is not None:
            return match.tokens[: min(count, self._fixed)]
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
        if self._fixed is not None:
            return match.tokens[: max(0, min(count, self._fixed))]
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
    return min(match.length + position, _LONGEST)
