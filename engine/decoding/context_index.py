"""Where a growing text's latest tokens occurred in it before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from engine.decoding.native_code import native_or_none
from engine.decoding.native_memory import address, numbers
from engine.kernels import round_fields as fields
from engine.kernels.round_fields import LENGTHS

_ROOM = 256  # tokens, at first; more by doubling
_SPARSE = 4  # places in the table for each run


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


class NativeIndex(ContextIndex):
    """The same in memory that native code looks at by itself as well, in the middle of a round.

    Args:
        find: :func:`engine.kernels.native.load_matches`'s.

    Attributes:
        address: where that is (:mod:`engine.kernels.round_fields`).
    """

    def __init__(self, ids: Sequence[int], find: Callable[[int, int, int], None]) -> None:
        self._ids, self._find = ids, find
        block = np.zeros(fields.NUM_INDEX_FIELDS, np.int64)
        self._block, self._words, self.address = block, numbers(block), address(block)
        self._known = self._room = 0  # tokens
        self.follow()

    def find(self, limit: int, drafts: Sequence[int] = ()) -> Match:
        """As :meth:`ContextIndex.find`."""
        known = self.follow()
        for place, draft in enumerate(drafts, known):
            self._text[place] = draft
        self._find(self.address, known, known + len(drafts))
        length, first = self._words[fields.FOUND_LENGTH], self._words[fields.FOUND]
        return Match(length, tuple(self._ids[first : first + limit])) if length else NO_MATCH

    def follow(self) -> int:
        """Catch up with the sequence; returns its length."""
        ids = self._ids
        if len(ids) > self._room:
            self._make_room(len(ids))
        for place in range(self._known, len(ids)):
            self._text[place] = ids[place]
        self._known = len(ids)
        return self._known

    def _make_room(self, length: int) -> None:
        self._room, self._known = max(_ROOM, 2 * length), 0
        text = np.zeros(self._room + fields.MOST_ROWS, np.int64)  # drafts lie behind the text for a moment
        num_places = 1 << (_SPARSE * len(LENGTHS) * self._room - 1).bit_length()
        table = np.zeros(num_places, np.int64)
        self._memory, self._text = (text, table), numbers(text)
        words = self._words
        words[fields.TEXT], words[fields.TABLE] = address(text), address(table)
        words[fields.NUM_PLACES], words[fields.NUM_KNOWN] = num_places, 0


def index_of(ids: Sequence[int]) -> ContextIndex:
    """An index of the sequence ``ids``, which may only grow."""
    find = _native_find()
    return ContextIndex(ids) if find is None else NativeIndex(ids, find)


@cache
def _native_find() -> Callable[[int, int, int], None] | None:
    def load() -> Callable[[int, int, int], None]:
        from engine.kernels.native import load_matches

        return load_matches()

    return native_or_none(load, "matches in the context are looked for by Python")
