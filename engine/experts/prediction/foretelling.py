"""Maps from a layer's states to the experts of the next one, and to its own at the next token, read by native code
(:mod:`engine.kernels.foretell`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.kernels import foretell_fields as fields
from engine.kernels import turn_fields
from engine.kernels.native import load_foretell

# Torch multiplies many rows faster, but its threads stay awake for a while behind that, on the cores of the kernels' own.
MOST_ROWS = 256


@dataclass(frozen=True)
class Maps:
    """What is read at one layer: float32 on CPU.

    Attributes:
        matrix: ``[maps, E, D]``.
        offsets: ``[maps, E]``, added.
        scales: from a distance in logits to the logistic function's, ``[maps]``.
        ahead: whether the first map names experts of the next layer.
        again: whether the last one says what this layer's next token will want.
        least: the chance from which on experts are named; 0: as many are as a router chooses.
    """

    matrix: Tensor
    offsets: Tensor
    scales: np.ndarray
    ahead: bool
    again: bool
    least: float


class Foretelling:
    """Reads the maps of one layer.

    Args:
        eps: what is added to the mean square of a state before it is divided by its root.
        num_chosen: how many experts a router chooses.
        target: the layer whose experts are named.

    Attributes:
        address: of the task that the native code knows it by.
        chances: of the latest row read, that its layer's experts are chosen again, ``[E]``.

    Raises:
        Exception: as LLVM has it.
    """

    def __init__(self, maps: Maps, eps: float, num_chosen: int, target: int) -> None:
        num_maps, num_experts, size = maps.matrix.shape
        step = -(-num_experts // fields.SIZE_STEP) * fields.SIZE_STEP
        self._foretell = load_foretell()
        chances, named = np.zeros(step, np.float32), np.zeros(1 + num_experts, np.int64)
        scratch = np.zeros((num_maps + 3) * step, np.float32)
        self.chances, self._named = chances[:num_experts], named.data
        task = np.zeros(fields.NUM_FIELDS, np.int64)
        for field, value in {
            fields.SIZE: size,
            fields.EPS: _bits(eps),
            fields.NUM_MAPS: num_maps,
            fields.NUM_EXPERTS: num_experts,
            fields.NUM_CHOSEN: num_chosen,
            fields.MATRIX: maps.matrix.data_ptr(),
            fields.OFFSETS: maps.offsets.data_ptr(),
            fields.SCALES: maps.scales.ctypes.data,
            fields.AHEAD: maps.ahead,
            fields.LEAST: _bits(maps.least),
            fields.NAMED: named.ctypes.data,
            fields.CHANCES: chances.ctypes.data if maps.again else 0,
            fields.SCRATCH: scratch.ctypes.data,
            fields.TARGET: target,
        }.items():
            task[field] = value
        self.address = task.ctypes.data
        self._kept = maps, task, chances, named, scratch

    def read(self, hidden: Tensor) -> list[int]:
        """Numbers of the next layer's experts, the likeliest first; ``hidden [T, D]``."""
        hidden = hidden.to(torch.float32).contiguous()
        self._foretell(self.address, hidden.data_ptr(), len(hidden))
        return self._named[1 : 1 + self._named[0]].tolist()


class Foretellings:
    """Those of all layers, as passes of native code find them."""

    def __init__(self, by_layer: Mapping[int, Foretelling]) -> None:
        self._tasks = np.zeros(1 + max(by_layer, default=0), np.int64)
        for layer, foretelling in by_layer.items():
            self._tasks[layer] = foretelling.address

    def native_form(self) -> dict[int, int]:
        """See :class:`engine.experts.native_cache.Foreseeing`."""
        return {
            turn_fields.PREDICTOR: turn_fields.BY_TASKS,
            turn_fields.TASKS: self._tasks.ctypes.data,
            turn_fields.NUM_TASKS: len(self._tasks),
        }


def fits(matrix: Tensor) -> bool:
    """Whether the native code takes such a matrix ``[..., D]``."""
    return matrix.device.type == "cpu" and matrix.shape[-1] % fields.SIZE_STEP == 0


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))
