"""The accelerated stream as a predictor: it runs beside the slow rows and names experts of layers to come.

Slow and accelerated rows go through the attention's matrices, and through the experts of the slow row, in one batch.
What the slow rows compute is the same with and without it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.experts.prediction.next_gate import NextGate
from engine.experts.store import Key
from engine.models.attention import Sight, attend
from engine.models.decoder import Decoder, Place, rms_norm
from engine.models.feed_forward import MixtureOfExperts
from engine.residuals.expert_stream import ExpertStream

MOST_ROWS = 16  # more want nearly all experts anyway, and so does a prompt


class StreamedDecoder(Decoder):
    """A decoder beside whose rows the accelerated stream runs, through layer ranges of few rows.

    Attributes:
        stream: the trained adapters.
        state: the accelerated rows before the layer that comes next, ``[B, T, D]``; None where there are none.
    """

    def __init__(self, decoder: Decoder, stream: ExpertStream) -> None:
        super().__init__(decoder.config, decoder.weights, decoder.dtype, decoder.device)
        self.stream = stream.to(decoder.device, decoder.dtype).requires_grad_(False)
        self.state: Tensor | None = None

    def _layer(self, index: int, hidden: Tensor, place: Place) -> Tensor:
        stream, num_rows = self.stream, hidden.shape[1]
        if stream.restarts(index):
            self.state = hidden if place.start is None and num_rows <= MOST_ROWS else None
        if self.state is None or self.state.shape != hidden.shape or index < stream.first:
            self.state = None  # a range that began between two restarts
            return super()._layer(index, hidden, place)
        layer, adapters, config = self.layers[index], stream.adapters(index), self.config
        both = torch.cat((hidden, self.state), dim=1)
        x = rms_norm(both, layer.attn_norm, config.norm_eps)
        cache, sight = place.cache, place.sight
        own = None if sight.slots is None else sight.slots.repeat(1, 2)
        twice = Sight(sight.positions.repeat(1, 2), sight.num_slots, own)
        q, k, v = self.project_qkv(index, x, *self.rope.rows(twice.positions, self.dtype))
        cache.write(index, sight.own, k[:, :num_rows], v[:, :num_rows])
        out = layer.o(attend(q, *cache.read(index, sight.num_slots), twice, config.sliding_window(index)))
        out[:, num_rows:] += adapters.attention(x[:, num_rows:])
        both = both + out
        self.state = both[:, num_rows:]
        if self.watch is not None:
            self.watch(index, both[:, :num_rows])
        ends = index + 1 == config.num_layers or stream.restarts(index + 1)
        x = rms_norm(both, layer.mlp_norm, config.norm_eps)
        if ends or not isinstance(layer.ffn, MixtureOfExperts):
            out = layer.ffn(x[:, :num_rows] if ends else x)
        else:
            weights, chosen = layer.ffn.route(x[0, :num_rows])
            out = layer.ffn.mix(x[0], weights.repeat(2, 1), chosen.repeat(2, 1))[None]
        if ends:
            self.state = None
        else:
            out[:, num_rows:] += adapters.ffn(x[:, num_rows:])
            self.state = both[:, num_rows:] + out[:, num_rows:]
        return both[:, :num_rows] + out[:, :num_rows]


class Accelerated:
    """Names experts by a :class:`StreamedDecoder`'s stream; in a prompt's chunks, by the next gate.

    Args:
        num_experts: how many to name for each row; None: as many as the router will choose.
    """

    informs = False

    def __init__(self, decoder: StreamedDecoder, num_experts: int | None = None) -> None:
        self.name = f"accelerated {decoder.stream.config.interval}"
        self._decoder = decoder
        self._next_gate = NextGate(decoder, 1, num_experts)
        targets = {layer: decoder.stream.target(layer) for layer in range(decoder.config.num_layers)}
        self._all = self._next_gate.read_at({at: to for at, to in targets.items() if to is not None})

    def predict(self, layer: int, hidden: Tensor) -> Sequence[Key]:
        decoder, stream = self._decoder, self._decoder.stream
        if decoder.state is None:
            return self._next_gate.predict(layer, hidden)
        target = stream.target(layer)
        if target is None:
            return []
        return [(target, number) for number in self._next_gate.numbers(target, decoder.state[0])]

    def native_form(self) -> dict[int, int] | None:
        return None if self._all is None else self._all.native_form()
