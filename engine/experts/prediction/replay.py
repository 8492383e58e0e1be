"""Predictors that are told the future: the oracle, which is the bound for all others, and its opposite."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from engine.experts.eviction.belady import Trace
from engine.experts.store import Key


class Oracle:
    """Names what the next ``lookahead`` layers' routers will choose, from the trace of an earlier run of the
    same request."""

    name = "oracle"
    informs = False

    def __init__(self, trace: Trace, lookahead: int = 1) -> None:
        self._trace, self._lookahead = trace, lookahead
        self._layers = {layer for layer, _ in trace}
        self._turn = 0

    def predict(self, layer: int, hidden: Tensor) -> Sequence[Key]:
        if layer in self._layers:
            while self._turn < len(self._trace) and self._trace[self._turn][0] != layer:
                self._turn += 1  # a turn that nobody watched
            self._turn += 1
        coming = self._trace[self._turn : self._turn + self._lookahead]
        return [(later, number) for later, numbers in coming for number in numbers]


class AlwaysWrong:
    """Names, for the next layer, experts that its router will not choose. For tests: it must cost speed alone."""

    name = "always wrong"
    informs = False

    def __init__(self, trace: Trace, num_experts: int) -> None:
        self._oracle, self._num_experts = Oracle(trace), num_experts

    def predict(self, layer: int, hidden: Tensor) -> Sequence[Key]:
        right = self._oracle.predict(layer, hidden)
        layers = dict.fromkeys(key[0] for key in right)
        every = [(later, number) for later in layers for number in range(self._num_experts)]
        return [key for key in every if key not in right]
