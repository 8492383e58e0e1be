"""Which tokens can be drafted: the most frequent ones, and those of the text at hand.

A text uses the same few rare tokens again and again: names, numbers, words of its subject or of its language. A small draft
head that gives some of its rows to them drafts right as often as one several times its size (our choice; what it is worth:
assets/results/README.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from engine.decoding.ranking import Tokens

MOST_ROWS = 3072
_ROOM = 512  # rows for tokens of the text,
_SHARE = 5  # but one row in so many at most


class DraftVocabulary:
    """The token of each row of a draft head.

    Of the rows, which begin as the most frequent tokens', the last few go to tokens of the text, those that came first
    leaving first. Texts share them: what an earlier one has left there does no harm.

    Args:
        frequent: ``int64 [N]``, the most frequent first.
        end: no token from this one on joins.

    Attributes:
        tokens: ``int64 [N]``.
    """

    def __init__(self, frequent: Tensor, end: int) -> None:
        self.tokens: Tokens = frequent.numpy().copy()
        self._known, self._end = set(self.tokens.tolist()), end
        self._first = self._next = len(self.tokens) - min(_ROOM, len(self.tokens) // _SHARE)

    def join(self, ids: Sequence[int]) -> Iterable[tuple[int, int]]:
        """The rows that change so that the tokens of this text can be drafted, as far as they have room: each row's number
        and its new token."""
        changed = dict[int, int]()
        known, tokens = self._known, self.tokens
        for token in ids:
            if token in known or token >= self._end or self._first == len(tokens):
                continue
            row = self._next
            known.discard(int(tokens[row]))
            known.add(token)
            tokens[row] = changed[row] = token
            self._next = row + 1 if row + 1 < len(tokens) else self._first
        return changed.items()
