"""Which tokens a growing text holds: what a repetition penalty asks before each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.decoding.native_memory import address
from engine.decoding.ranking import Tokens

_ROOM = 256  # different tokens; more by doubling


class SeenTokens:
    """The different tokens of one text, kept up with as it grows: to look at all of a long one for each token would take
    as long as choosing the token.

    Attributes:
        mask: which tokens of the vocabulary are in it, bool ``[V]``.
        count: how many there are.
        mask_address, tokens_address: where native code finds them.
    """

    def __init__(self) -> None:
        self._history: Sequence[int] = ()
        self._length, self._last = 0, -1  # as it was seen last
        self.count = 0
        self._take_tokens(np.empty(_ROOM, np.int64))
        self._take_mask(np.zeros(0, np.bool_))

    @property
    def tokens(self) -> Tokens:
        """In the order in which they came, each once."""
        return self._tokens[: self.count]

    def follow(self, history: Sequence[int], size: int) -> None:
        """Catch up with ``history``; the mask then has ``size`` tokens at least. A sequence that it was given before may only
        have grown since; with another it starts over."""
        length = self._length
        if history is self._history and len(history) == length + 1 and history[length - 1] == self._last:
            token = history[length]  # as it is from step to step
            if token < len(self._is_in) >= size:
                self._length, self._last = length + 1, token
                if not self._is_in[token]:
                    self._add(token)
                return
        if (
            history is not self._history
            or len(history) < length
            or (length and history[length - 1] != self._last)
        ):
            self._history, self._length, self.count = history, 0, 0
            self.mask[:] = False
        fresh = history[self._length :]
        if (size := max(size, max(fresh, default=0) + 1)) > len(self.mask):
            self._take_mask(np.append(self.mask, np.zeros(size - len(self.mask), np.bool_)))
        for token in fresh:
            if not self._is_in[token]:
                self._add(token)
            self._last = token
        self._length = len(history)

    def make_room(self, more: int) -> None:
        """Have room for so many more tokens where native code finds them."""
        if self.count + more > len(self._tokens):
            self._take_tokens(np.append(self._tokens, np.empty_like(self._tokens)))

    def _add(self, token: int) -> None:
        self._is_in[token] = True
        if self.count == len(self._tokens):
            self._take_tokens(np.append(self._tokens, np.empty_like(self._tokens)))
        self._places[self.count] = token
        self.count += 1

    def _take_tokens(self, tokens: Tokens) -> None:
        self._tokens, self._places, self.tokens_address = tokens, tokens.data, address(tokens)

    def _take_mask(self, mask: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
        self.mask, self._is_in, self.mask_address = mask, mask.data, address(mask)
