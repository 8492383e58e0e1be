"""Ridge gate: maps fitted in closed form name the next layer's experts, and what this layer's next token will want.

As cheap as the next gate, which reads the same state with the later router itself, and right more often: see
:mod:`engine.residuals.router_maps`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from engine.experts.eviction.base import EvictionPolicy
from engine.experts.eviction.foreseen import LeastForeseen
from engine.experts.store import Key
from engine.kernels import foretell_fields as fields
from engine.kernels.native import load_foretell
from engine.residuals.router_maps import RouterMaps

_LEAST_CHANCE = (
    0.6  # of an expert that is named (our choice: of 0.3 to 0.8 the best in a simulation of the link)
)
_LEAST_DISTANCE = math.log(_LEAST_CHANCE / (1 - _LEAST_CHANCE))
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

    def predict(self, layer: int, hidden: Tensor) -> Sequence[Key]:
        if (reader := self._readers.get(layer)) is None:
            return []  # a dense layer away from those with experts
        if len(hidden) == 1 and (row := reader.row) is not None:
            named = row.read(hidden)
            if reader.again and self._eviction is not None:
                self._eviction.foresee(layer, row.chances)
            return [(layer + 1, number) for number in named]
        logits = reader.logits(hidden)  # [T, maps, E]
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
        row: the same for one row in RAM, as native code; None: there is none for it.
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
        self.scales = np.array([[_TO_LOGISTIC / float(error)] for error in errors], np.float32)
        fits = self._matrix.device.type == "cpu" and self._matrix.shape[2] % fields.SIZE_STEP == 1
        self.row: _Row | None = None
        if fits and find_spec("numba"):
            try:
                self.row = _Row(self, self._matrix, maps.eps, num_chosen)
            except Exception as error:  # an LLVM problem must not keep anyone from chatting
                _log.info("the ridge gate is read by torch: %s", error)

    def logits(self, hidden: Tensor) -> np.ndarray:
        """Of rows ``[T, D]``: float32 ``[T, maps, E]``."""
        found: np.ndarray = torch.einsum("td,med->tme", self._maps.inputs(hidden), self._matrix).cpu().numpy()
        return found


class _Row:
    """A reader's maps for one row.

    Attributes:
        chances: of the latest row, that its layer's experts are chosen again, ``[E]``.
    """

    def __init__(self, reader: _Reader, matrix: Tensor, eps: float, num_chosen: int) -> None:
        num_maps, num_experts, size = matrix.shape[0], matrix.shape[1], matrix.shape[2] - 1
        self._foretell = load_foretell()
        self._weights, self._offsets = matrix[..., :-1].contiguous(), matrix[..., -1].contiguous()
        self._scales, self._scratch = reader.scales, np.empty(2 * num_maps * num_experts, np.float32)
        chances = np.zeros(num_experts + fields.SIZE_STEP, np.float32)
        self.chances, named = chances[:num_experts], np.zeros(1 + num_experts, np.int64)
        self._named, self._task = named.data, np.zeros(fields.NUM_FIELDS, np.int64)
        for field, value in {
            fields.SIZE: size,
            fields.EPS: _bits(eps),
            fields.NUM_MAPS: num_maps,
            fields.NUM_EXPERTS: num_experts,
            fields.NUM_CHOSEN: num_chosen,
            fields.MATRIX: self._weights.data_ptr(),
            fields.OFFSETS: self._offsets.data_ptr(),
            fields.SCALES: self._scales.ctypes.data,
            fields.AHEAD: reader.ahead,
            fields.LEAST: _bits(_LEAST_DISTANCE),
            fields.NAMED: named.ctypes.data,
            fields.CHANCES: chances.ctypes.data if reader.again else 0,
            fields.SCRATCH: self._scratch.ctypes.data,
        }.items():
            self._task[field] = value
        self._address = self._task.ctypes.data

    def read(self, hidden: Tensor) -> list[int]:
        """Numbers of the next layer's experts, the likeliest first; ``hidden [1, D]``."""
        hidden = hidden.float().contiguous()
        self._foretell(self._address, hidden.data_ptr())
        return self._named[1 : 1 + self._named[0]].tolist()


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


def _logistic(x: np.ndarray) -> np.ndarray:
    chance: np.ndarray = (1 + np.tanh(x / 2)) / 2  # the same, without overflows
    return chance
