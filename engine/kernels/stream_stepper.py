"""The fused CPU stepper for a model beside whose rows the accelerated stream runs and names experts.

What the stream is: :mod:`engine.residuals.expert_stream`. The slow rows have the same bits with and without it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.experts.prediction.accelerated import MOST_ROWS, StreamedDecoder
from engine.kernels import control
from engine.kernels.adapters import describe_adapter
from engine.kernels.expert_stepper import FusedExpertStepper, Side


class FusedStreamStepper(FusedExpertStepper):
    """A :class:`FusedExpertStepper` for a :class:`StreamedDecoder`."""

    def __init__(self, decoder: StreamedDecoder, num_threads: int) -> None:
        super().__init__(decoder, num_threads)
        self._streamed, stream = decoder, decoder.stream
        self._stream = np.zeros((decoder.config.num_layers, control.STREAM_FIELDS), np.int64)
        self._adapters = {
            index: [describe_adapter(self.table, low_rank) for low_rank in (layer.attention, layer.ffn)]
            for index, layer in (
                (i, stream.adapters(i)) for i in range(stream.first, decoder.config.num_layers)
            )
        }
        self.reserve_adapters(stream.config.rank)
        last = decoder.config.num_layers - 1
        for index, adapters in self._adapters.items():
            self._stream[index] = (
                stream.restarts(index),
                index == last or stream.restarts(index + 1),
                *(pair.ctypes.data for pair in adapters),
            )
        self.team.control[control.STREAM] = self._stream.ctypes.data

    def _begin_pass(self, rows: int) -> bool:
        self._streamed.state = None
        return 2 * rows <= self._most_rows and super()._begin_pass(rows)

    def _row_places(
        self, start: int, count: int, instead_of: Sequence[int]
    ) -> tuple[Sequence[int], Sequence[int]]:
        """The accelerated rows write no keys and values."""
        positions, slots = super()._row_places(start, count, instead_of)
        return [*positions, *positions], [*slots, *[-1] * count]

    def _run_apart(
        self, index: int, hidden: Tensor, positions: Sequence[int], slots: Sequence[int]
    ) -> Tensor:
        decoder, stream, rows = self._streamed, self._streamed.stream, hidden.shape[0]
        if stream.restarts(index):
            decoder.state = hidden[None] if rows <= MOST_ROWS else None
        if decoder.state is None or decoder.state.shape[1] != rows:
            decoder.state = None  # a range that began between two restarts
            return super()._run_apart(index, hidden, positions, slots)
        attention, feed_forward = (pair.ctypes.data for pair in self._adapters[index])
        side = Side(rows, {control.SIDE_ATTENTION: attention, control.SIDE_FEED_FORWARD: feed_forward})
        both = torch.cat((hidden, decoder.state[0]))
        attended = self.attend(index, both, [*positions, *positions], [*slots, *[-1] * rows], side)
        decoder.state = attended.hidden[None, rows:]
        if decoder.watch is not None:
            decoder.watch(index, attended.hidden[None, :rows])
        if index + 1 == decoder.config.num_layers or stream.restarts(index + 1):
            decoder.state = None
            return self.feed_forward(index, attended.slow())
        out = self.feed_forward(index, attended)
        decoder.state = out[None, rows:]
        return out[:rows]
