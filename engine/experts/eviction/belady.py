"""Belady's policy: that expert leaves whose next use is farthest in the future. The bound for all others.

It needs the future, so it replays a trace that an earlier run of the same request has recorded (L. A. Belady,
"A study of replacement algorithms for a virtual-storage computer", 1966).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence

from engine.experts.store import Key

Trace = Sequence[tuple[int, Sequence[int]]]  # of each layer's turn: the layer, and what its router chose


class Belady:
    """``trace``: all turns to come, in order. Behind its end nothing is needed any more."""

    name = "belady"

    def __init__(self, trace: Trace) -> None:
        self._turn = 0
        self._uses: defaultdict[Key, list[int]] = defaultdict(list)
        for turn, (layer, numbers) in enumerate(trace):
            for number in numbers:
                self._uses[layer, number].append(turn)

    def used(self, layer: int, numbers: Sequence[int]) -> None:
        self._turn += 1

    def worth(self, key: Key) -> int:
        uses = self._uses[key]
        at = bisect_left(uses, self._turn)
        return -uses[at] if at < len(uses) else -(1 << 62)
