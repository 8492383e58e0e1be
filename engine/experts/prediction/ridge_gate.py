"""Ridge gate: maps fitted in closed form name the next layer's experts, and what this layer's next token will want.

As cheap as the next gate, which reads the same state with the later router itself, and right more often: see
:mod:`engine.residuals.router_maps`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.experts.eviction.base import EvictionPolicy
from engine.experts.eviction.foreseen import LeastForeseen
from engine.experts.store import Key
from engine.residuals.router_maps import RouterMaps

_LEAST_CHANCE = (
    0.6  # of an expert that is named (our choice: of 0.3 to 0.8 the best in a simulation of the link)
)
_LEAST_DISTANCE = math.log(_LEAST_CHANCE / (1 - _LEAST_CHANCE))
_TO_LOGISTIC = 1.7  # the logistic function of 1.7 x is about the normal distribution's


class RidgeGate:
    """Predicts layer ``l + 1`` at layer ``l``.

    Args:
        maps: on the device of the states.
        num_chosen: how many experts a router chooses.
        eviction: is told what the next token will want, if it listens.
    """

    name = "ridge-gate"

    def __init__(self, maps: RouterMaps, num_chosen: int, eviction: EvictionPolicy | None = None) -> None:
        # Where all are chosen there is no first that is not.
        self._maps, self._num_chosen = maps, min(num_chosen, maps.ahead.shape[1] - 1)
        self._eviction = eviction if isinstance(eviction, LeastForeseen) else None
        self.informs = self._eviction is not None
        read = {layer - back for layer in maps.sparse for back in (0, 1) if layer - back >= 0}
        self._readers = {layer: _Reader(maps, layer) for layer in read}

    def predict(self, layer: int, hidden: Tensor) -> Sequence[Key]:
        if (reader := self._readers.get(layer)) is None:
            return []  # a dense layer away from those with experts
        logits = reader.logits(self._maps, hidden)  # [T, maps, E]
        best = np.sort(logits, axis=-1)
        # Between the last that is chosen and the first that is not.
        edge = (best[..., -self._num_chosen] + best[..., -self._num_chosen - 1]) / 2
        distances = (logits - edge[..., None]) * reader.scales
        if reader.again and self._eviction is not None:
            self._eviction.foresee(layer, _logistic(distances[-1, -1]))
        if not reader.ahead:
            return []
        ahead = distances[:, 0]
        if len(ahead) == 1:
            nearest, least = ahead[0], _LEAST_DISTANCE
        else:  # that any of the rows wants it
            nearest, least = 1 - np.prod(1 - _logistic(ahead), axis=0), _LEAST_CHANCE
        likely = (nearest > least).nonzero()[0]
        numbers: list[int] = likely[(-nearest[likely]).argsort()].tolist()
        return [(layer + 1, number) for number in numbers]


class _Reader:
    """What is read at one layer: the map ahead, if the next layer has experts, and then the map again, if it has some.

    Attributes:
        scales: from a distance in logits to the logistic function's, by map.
    """

    def __init__(self, maps: RouterMaps, layer: int) -> None:
        self.ahead, self.again = layer + 1 in maps.sparse, layer in maps.sparse
        found = list[Tensor]()
        errors = list[Tensor]()
        if self.ahead:
            place = maps.sparse.index(layer + 1)
            found, errors = [maps.ahead[place]], [maps.ahead_error[place]]
        if self.again:
            place = maps.sparse.index(layer)
            found, errors = [*found, maps.again[place]], [*errors, maps.again_error[place]]
        self._num_maps, self._matrix = len(found), torch.cat(found).float()
        # Apart, for one row: the bias needs no copy of the state with a one behind it.
        self._weights = self._matrix[:, :-1].cpu().contiguous().numpy()
        self._bias = self._matrix[:, -1].cpu().numpy()
        self.scales = np.array([[_TO_LOGISTIC / float(error)] for error in errors], np.float32)

    def logits(self, maps: RouterMaps, hidden: Tensor) -> np.ndarray:
        """Of rows ``[T, D]``: float32 ``[T, maps, E]``."""
        if hidden.device.type == "cpu" and len(hidden) == 1:
            # Between two commands of the kernels: torch's or a BLAS's threads would wait for theirs.
            state = hidden[0].float().numpy()
            size = np.einsum("d,d->", state, state) / len(state)
            found = np.einsum("ed,d->e", self._weights, state) / math.sqrt(size + maps.eps) + self._bias
        else:
            found = (maps.inputs(hidden) @ self._matrix.T).cpu().numpy()
        logits: np.ndarray = found.reshape(len(hidden), self._num_maps, -1)
        return logits


def _logistic(x: np.ndarray) -> np.ndarray:
    chance: np.ndarray = (1 + np.tanh(x / 2)) / 2  # the same, without overflows
    return chance
