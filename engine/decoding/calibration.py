"""How often tokens of a given probability under the draft distribution turned out right. All our choice."""

from __future__ import annotations

import math
from collections.abc import MutableSequence
from typing import Any

from engine.kernels.plan_fields import BINS

_PRIOR = 3.0  # observations' worth of trust in the probability itself
_FADE = 0.998  # per observation: old luck counts less
_LATE, _LATE_PRIOR = 0.08, 3.0  # of what is late, likewise; observations' worth of trust in the calibration


class Calibration:
    """Counts by probability.

    Args:
        highest: the probabilities' upper end.
        memory: where to keep the counts, ``BINS`` numbers each: of right ones, and of all.
    """

    def __init__(
        self,
        highest: float = 1.0,
        memory: tuple[MutableSequence[float], MutableSequence[float]] | None = None,
    ) -> None:
        self._width = highest / BINS
        self._right, self._seen = memory or ([0.0] * BINS, [0.0] * BINS)
        for number in range(BINS):
            self._right[number], self._seen[number] = _PRIOR * (number + 0.5) * self._width, _PRIOR

    def chance(self, probability: float) -> float:
        """That a token of this probability is right."""
        number = self._bin(probability)
        return self._right[number] / self._seen[number]

    def learn(self, probability: float, was_right: bool) -> None:
        """Count one."""
        number = self._bin(probability)
        self._right[number] = self._right[number] * _FADE + was_right
        self._seen[number] = self._seen[number] * _FADE + 1

    def export(self) -> list[list[float]]:
        """Everything learnt, as JSON."""
        return [list(self._right), list(self._seen)]

    def restore(self, state: Any) -> None:
        """Take over what :meth:`export` gave.

        Raises:
            ValueError, TypeError: it is broken.
        """
        right, seen = ([number(value) for value in part] for part in state)
        if len(right) != BINS or len(seen) != BINS or min(seen) <= 0:
            raise ValueError(state)
        for place in range(BINS):
            self._right[place], self._seen[place] = right[place], seen[place]

    def _bin(self, probability: float) -> int:
        return min(BINS - 1, max(0, int(probability / self._width)))


class Drift:
    """How much more often than a :class:`Calibration` says drafts are right in one text, of late."""

    def __init__(self) -> None:
        self._right = self._expected = _LATE_PRIOR

    @property
    def factor(self) -> float:
        """Of chances."""
        return self._right / self._expected

    def learn(self, chance: float, was_right: bool) -> None:
        """Count one draft that had that chance."""
        self._right += _LATE * (_LATE_PRIOR - self._right) + was_right
        self._expected += _LATE * (_LATE_PRIOR - self._expected) + chance


def number(value: Any) -> float:
    """A finite number that is not negative.

    Raises:
        ValueError, TypeError: it is none.
    """
    found = float(value)
    if not math.isfinite(found) or found < 0:
        raise ValueError(value)
    return found
