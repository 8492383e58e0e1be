"""Ridge gate: maps fitted in closed form name the next layer's experts, and what this layer's next token will want.

As cheap as the next gate, which reads the same state with the later router itself, and right more often: see
:mod:`engine.residuals.router_maps`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from engine.experts.eviction.base import EvictionPolicy
from engine.experts.eviction.foreseen import LeastForeseen
from engine.experts.prediction.foretelling import MOST_ROWS, Foretelling, Foretellings, Maps, fits
from engine.experts.store import Key
from engine.residuals.router_maps import RouterMaps

_LEAST_CHANCE = (
    0.6  # of an expert that is named (our choice: of 0.3 to 0.8 the best in a simulation of the link)
)
_log = logging.getLogger(__name__)
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
        self._num_chosen = min(num_chosen, maps.ahead.shape[1] - 1)
        self._eviction = eviction if isinstance(eviction, LeastForeseen) else None
        self.informs = self._eviction is not None
        read = {layer - back for layer in maps.sparse for back in (0, 1) if layer - back >= 0}
        self._readers = {layer: _Reader(maps, layer, self._num_chosen) for layer in read}
        rows = {layer: reader.rows for layer, reader in self._readers.items() if reader.rows is not None}
        self._all = Foretellings(rows) if len(rows) == len(self._readers) else None

    def predict(self, layer: int, hidden: Tensor) -> Sequence[Key]:
        if (reader := self._readers.get(layer)) is None:
            return []  # a dense layer away from those with experts
        if len(hidden) <= MOST_ROWS and (rows := reader.rows) is not None:
            numbers = rows.read(hidden)
            if reader.again and self._eviction is not None:
                self._eviction.foresee(layer, rows.chances)
            return [(layer + 1, number) for number in numbers]
        logits = reader.logits(hidden)  # [T, maps, E]
        best = np.sort(logits, axis=-1)
        # Between the last that is chosen and the first that is not.
        edge = (best[..., -self._num_chosen] + best[..., -self._num_chosen - 1]) / 2
        distances = (logits - edge[..., None]) * reader.scales[:, None]
        if reader.again and self._eviction is not None:
            self._eviction.foresee(layer, _logistic(distances[-1, -1]))
        if not reader.ahead:
            return []
        missed = np.prod(_logistic(-distances[:, 0]), axis=0)  # that none of the rows wants it
        likely = (missed < 1 - _LEAST_CHANCE).nonzero()[0]
        numbers = likely[missed[likely].argsort()].tolist()
        return [(layer + 1, number) for number in numbers]

    def native_form(self) -> dict[int, int] | None:
        return None if self._all is None else self._all.native_form()


class _Reader:
    """What is read at one layer: the map ahead, if the next layer has experts, and then the map again, if it has some.

    Attributes:
        scales: from a distance in logits to the logistic function's, by map.
        rows: the same for a few rows in RAM, as native code; None: there is none for it.
    """

    def __init__(self, maps: RouterMaps, layer: int, num_chosen: int) -> None:
        self.ahead, self.again = layer + 1 in maps.sparse, layer in maps.sparse
        found = list[Tensor]()
        errors = list[Tensor]()
        if self.ahead:
            place = maps.sparse.index(layer + 1)
            found, errors = [maps.ahead[place]], [maps.ahead_error[place]]
        if self.again:
            place = maps.sparse.index(layer)
            found, errors = [*found, maps.again[place]], [*errors, maps.again_error[place]]
        self._maps, self._matrix = maps, torch.stack(found).float()  # [maps, E, D + 1]
        self.scales = np.array([_TO_LOGISTIC / float(error) for error in errors], np.float32)
        weights, offsets = self._matrix[..., :-1].contiguous(), self._matrix[..., -1].contiguous()
        self.rows: Foretelling | None = None
        if fits(weights) and find_spec("numba"):
            own = Maps(weights, offsets, self.scales, self.ahead, self.again, _LEAST_CHANCE)
            try:
                self.rows = Foretelling(own, maps.eps, num_chosen, layer + 1)
            except Exception as error:  # an LLVM problem must not keep anyone from chatting
                _log.info("the ridge gate is read by torch: %s", error)

    def logits(self, hidden: Tensor) -> np.ndarray:
        """Of rows ``[T, D]``: float32 ``[T, maps, E]``."""
        found: np.ndarray = torch.einsum("td,med->tme", self._maps.inputs(hidden), self._matrix).cpu().numpy()
        return found


def _logistic(x: np.ndarray) -> np.ndarray:
    chance: np.ndarray = np.exp(-np.logaddexp(0, -x))
    return chance
