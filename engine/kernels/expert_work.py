"""What the experts of one layer have to compute for any number of rows, in commands: between two of them the caller may wait
for more experts to come into memory."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from engine.kernels import control
from engine.kernels.stepper import MAX_ROWS
from engine.kernels.team import Team
from engine.models.decoder import PREFILL_CHUNK

MAX_RECORDS = 128  # of a command
_RECORD = struct.Struct(f"={control.EXPERT_FIELDS}q")

Descriptors: TypeAlias = tuple[int, ...]  # of gate and up, and of down


@dataclass(frozen=True)
class Attended:
    """Rows between the attention part of a layer and its feed-forward part.

    Attributes:
        hidden: residual rows, ``[T, D]``.
        normed: what the experts take, ``[T, D]``.
        chosen: numbers of the experts of each slow row, ascending, ``[T', k]``.
        weights: of each row's experts and, if there is one, of the shared expert: ``[T, k or k + 1]``.
        added: what adapters give to the last rows, ``[T - T', D]``.
    """

    hidden: Tensor
    normed: Tensor
    chosen: np.ndarray
    weights: np.ndarray
    added: Tensor | None = None

    def slow(self) -> Attended:
        """The slow rows alone."""
        rows = self.chosen.shape[0]
        return Attended(self.hidden[:rows], self.normed[:rows], self.chosen, self.weights[:rows])


@dataclass(frozen=True)
class Room:
    """What commands for experts are put together in.

    Attributes:
        records: of experts, as bytes.
        act: address of room for ``act_size`` floats between their linears.
    """

    records: memoryview
    act: int
    act_size: int


class ExpertWork:
    """The experts of one layer for all rows, in as many commands as it takes.

    Attributes:
        result: ``[T, D]``, filled by the command that adds up.
    """

    def __init__(
        self, team: Team, room: Room, attended: Attended, meanwhile: Callable[[], None] | None
    ) -> None:
        weights, added = attended.weights, attended.added
        # numpy: torch's threads would stay awake for a while behind each copy, on the cores of the kernels' own.
        self._team, self._room = team, room
        self._normed, self._attended = attended.normed.numpy(), attended
        self._meanwhile = meanwhile
        self.result = torch.empty_like(attended.normed)
        rows, size = self._normed.shape
        self._places = np.empty(
            (weights.shape[1], rows, size), np.float32
        )  # what came out for each row and place
        self._fields = {
            control.ROWS: rows,
            control.HIDDEN: attended.hidden.data_ptr(),
            control.OUT: self.result.data_ptr(),
            control.PLACES: self._places.ctypes.data,
            control.WEIGHTS: weights.ctypes.data,
            control.NUM_PLACES: weights.shape[1],
            control.SIDE_ROWS: 0 if added is None else added.shape[0],
            control.SIDE_OUT: 0 if added is None else added.data_ptr(),
        }
        self._count = self._act = 0
        self._scattered: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, described: Descriptors, place: int) -> None:
        """An expert for all rows, its results in ``place``."""
        out = self._places[place].ctypes.data
        self._record(described, self._normed.ctypes.data, out, self._normed.shape[0])

    def add_some(self, described: Descriptors, rows: np.ndarray, places: np.ndarray) -> None:
        """An expert for some rows, the results of each in its own place."""
        if sum(len(given) for _, given, _, _ in self._scattered) + len(rows) > PREFILL_CHUNK:
            self._scatter()  # a prompt's copies for all experts at once would take much memory
        x = self._normed[rows]
        out = np.empty_like(x)
        self._scattered.append((out, rows, places, x))
        self._record(described, x.ctypes.data, out.ctypes.data, rows.shape[0])

    def run(self, add_up: bool) -> None:
        """Compute what was added; then, if that is all, add up."""
        self._scatter()
        if self._count or add_up:
            self._flush(add_up)
        elif self._meanwhile is not None:  # there was nothing to begin with
            self._meanwhile()
            self._meanwhile = None

    def _scatter(self) -> None:
        if self._scattered:
            self._flush(False)
            for out, rows, places, _ in self._scattered:
                self._places[places, rows] = out
            self._scattered.clear()

    def _record(self, described: Descriptors, x: int, out: int, rows: int) -> None:
        room, row_bytes = self._room, 4 * self._normed.shape[1]
        inner = described[control.EXPERT_DOWN + control.INPUTS]
        for begin in range(0, rows, MAX_ROWS):
            count = min(MAX_ROWS, rows - begin)
            if self._count == MAX_RECORDS or self._act + count * inner > room.act_size:
                self._flush(False)
            act, shift = room.act + 4 * self._act, begin * row_bytes
            place = self._count * _RECORD.size
            _RECORD.pack_into(room.records, place, *described, x + shift, count, act, out + shift)
            self._count += 1
            self._act += count * inner

    def _flush(self, add_up: bool) -> None:
        values = {**self._fields, control.ADD_UP: int(add_up), control.NUM_EXPERTS: self._count}
        meanwhile, self._meanwhile = self._meanwhile, None
        self._team.run(control.RUN_EXPERTS, values, meanwhile)
        self._count = self._act = 0
