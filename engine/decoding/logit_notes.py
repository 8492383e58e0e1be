"""What a kernel noted of logits in passing (:mod:`engine.kernels.block_notes`), kept with the tensor that holds them."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from engine.decoding.native_memory import address
from engine.kernels.control import BLOCK

_LANES = 16  # blocks are filled up to a multiple of so many
_HIGHEST = 3e38  # that a float32 holds
_ATTRIBUTE = "slipstream_notes"


class LogitNotes:
    """Room for the notes of ``rows`` rows of ``size`` logits.

    Attributes:
        first: the address of the first row's.
        step: bytes from one row's to the next one's.
        temperature: that the blocks were weighed at; 0: not weighed.
    """

    def __init__(self, rows: int, size: int) -> None:
        blocks = -(-size // (BLOCK * _LANES)) * _LANES
        self._memory = np.zeros((rows, 2, blocks), np.float32)
        self._memory[:, 0] = -math.inf
        self.first, self.step = address(self._memory), self._memory.strides[0]
        self.temperature = 0.0


def sharpness_of(temperature: float) -> float:
    """What logits are multiplied by before they are weighed at a temperature; 0 at the temperature 0."""
    return min(1 / temperature, _HIGHEST) if temperature else 0.0


def keep_notes(logits: Tensor, notes: LogitNotes) -> None:
    """Whoever gets ``logits [T, V]`` from now on finds ``notes`` of its rows with them. They are those of what it holds by the
    time it is looked at: who writes it notes it as well."""
    setattr(logits, _ATTRIBUTE, notes)


def notes_of(logits: Tensor) -> LogitNotes | None:
    """What was noted of ``logits``, if anything was."""
    return getattr(logits, _ATTRIBUTE, None)
