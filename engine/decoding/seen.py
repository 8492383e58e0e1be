"""Which tokens a growing text holds: what a repetition penalty asks before each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.decoding.ranking import Tokens

_ROOM = 256  # different tokens; more by doubling


class SeenTokens:
    """The different tokens of one text, kept up with as it grows: to look at all of a long one for each token would take
    as long as choosing the token.

    Attributes:
        mask: which tokens of the vocabulary are in it, bool ``[V]``.
    """

    def __init__(self) -> None:
        self._history: Sequence[int] = ()
        self._length, self._last = 0, -1  # as it was seen last
        self._tokens: Tokens = np.empty(_ROOM, np.int64)
        self._count = 0
        self.mask: np.ndarray[Any, np.dtype[np.bool_]] = np.zeros(0, np.bool_)

    @property
    def tokens(self) -> Tokens:
        """In the order in which they came, each once."""
        return self._tokens[: self._count]

    def follow(self, history: Sequence[int], size: int) -> None:
        """Catch up with ``history``; the mask then has ``size`` tokens at least. A sequence that it was given before may only
        have grown since; with another it starts over."""
        length = self._length
        if (
            history is not self._history
            or len(history) < length
            or (length and history[length - 1] != self._last)
        ):
            self._history, self._length, self._count = history, 0, 0
            self.mask[:] = False
        fresh = history[self._length :]
        if (size := max(size, max(fresh, default=0) + 1)) > len(self.mask):
            self.mask = np.append(self.mask, np.zeros(size - len(self.mask), np.bool_))
        for token in fresh:
            if not self.mask[token]:
                self.mask[token] = True
                if self._count == len(self._tokens):
                    self._tokens = np.append(self._tokens, np.empty_like(self._tokens))
                self._tokens[self._count] = token
                self._count += 1
            self._last = token
        self._length = len(history)
