"""Predictors that are told the future: the oracle, which is the bound for all others, and its opposite."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from engine.experts.eviction.belady import Trace
from engine.experts.store import Key
from engine.kernels import turn_fields as fields


class Oracle:
    """Names what the next ``lookahead`` layers' routers will choose, from the trace of an earlier run of the
    same request."""

    name = "oracle"
    informs = False

    def __init__(self, trace: Trace, lookahead: int = 1) -> None:
        self._trace, self._lookahead = trace, lookahead
        self._turn = np.zeros(1, np.int64)
        self._layers = np.array([layer for layer, _ in trace], np.int64)
        self._firsts = np.cumsum([0, *(len(numbers) for _, numbers in trace)])
        self._numbers = np.array([number for _, numbers in trace for number in numbers], np.int64)

    def predict(self, layer: int, hidden: Tensor) -> Sequence[Key]:
        own = np.flatnonzero(self._layers[self._turn[0] :] == layer)
        if len(own):  # else it has no experts; turns that nobody watched may come first
            self._turn += own[0] + 1
        coming = self._trace[self._turn[0] : self._turn[0] + self._lookahead]
        return [(later, number) for later, numbers in coming for number in numbers]

    def native_form(self) -> dict[int, int]:
        return {
            fields.PREDICTOR: fields.BY_TRACE,
            fields.TURN: self._turn.ctypes.data,
            fields.TRACE_LAYERS: self._layers.ctypes.data,
            fields.TRACE_FIRSTS: self._firsts.ctypes.data,
            fields.TRACE_NUMBERS: self._numbers.ctypes.data,
            fields.NUM_TURNS: len(self._trace),
            fields.LOOKAHEAD: self._lookahead,
        }


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
