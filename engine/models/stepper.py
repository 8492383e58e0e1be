"""What decoding methods run on: a few rows of one sequence through a range of layers.

Rows are batch-invariant: a row's result never depends on how many rows share the call, so a verified
draft equals plain decoding. On CUDA and for rows beyond the tested kernels that is measured, not promised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.models.decoder import Decoder
from engine.models.kv_cache import KVCache


class Stepper(Protocol):
    """Rows ``T <= max_rows`` at positions ``start .. start + T - 1`` of one sequence."""

    name: str
    max_rows: int
    decoder: Decoder

    def embed(self, ids: Sequence[int]) -> Tensor:
        """``[T] -> [T, D]``."""

    def run_layers(self, hidden: Tensor, cache: KVCache, start: int, first: int, last: int) -> Tensor:
        """``[T, D] -> [T, D]`` through layers ``first .. last - 1``, K/V written at the rows' positions."""

    def logits(self, hidden: Tensor) -> Tensor:
        """``[T, D] -> [T, V]`` float32."""

    def forward(
        self,
        ids: Sequence[int],
        cache: KVCache,
        begun: Sequence[Tensor] = (),
        depth: int = 0,
        instead_of: Sequence[int] = (),
        weigh_at: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Rows behind the cache's tokens through the whole model: first those that have ``begun``, ``[1, D]`` each, and
        are ``depth`` layers deep already, then those of the tokens ``ids``. The cache's length stays as it is.

        Args:
            instead_of: the last rows are alternatives to the rows with these numbers: each sees what that one sees, and
                itself instead of that one. A row's keys and values go behind the cache's as many slots as its number
                says; an alternative's are moved by :meth:`copy_slot`.
            weigh_at: a temperature at which to weigh blocks of logits in passing, if it can
                (:mod:`engine.decoding.logit_notes`); 0: none.

        Returns:
            Their final states ``[T, D]`` and logits ``[T, V]``, which last until the next call.
        """

    def copy_slot(self, cache: KVCache, source: int, target: int) -> None:
        """What the cache holds in slot ``source``, into slot ``target``."""

    def prefill(self, ids: Sequence[int], cache: KVCache) -> None:
        """Append ``ids`` to the cache."""


class RowStepper(Stepper, Protocol):
    """One whose rows may have any positions."""

    def run_rows(
        self,
        hidden: Tensor,
        cache: KVCache,
        positions: Sequence[int],
        slots: Sequence[int],
        first: int,
        last: int,
    ) -> Tensor:
        """As :meth:`run_layers`, with a position for each row and a slot for its key and value."""


def row_places(start: int, count: int, instead_of: Sequence[int]) -> tuple[list[int], list[int]]:
    """The positions and the slots of ``count`` rows, as :meth:`Stepper.forward` takes them."""
    slots = list(range(start, start + count))
    if not instead_of:
        return slots, slots
    return slots[: count - len(instead_of)] + [start + row for row in instead_of], slots


def forward_in_parts(
    stepper: RowStepper,
    ids: Sequence[int],
    cache: KVCache,
    begun: Sequence[Tensor],
    depth: int,
    instead_of: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """:meth:`Stepper.forward` made of the stepper's other methods."""
    num_begun, num_layers = len(begun), stepper.decoder.config.num_layers
    positions, slots = row_places(cache.length, num_begun + len(ids), instead_of)
    rows = list(begun)
    if ids:
        fresh, last = stepper.embed(ids), depth if begun else num_layers
        rows.append(stepper.run_rows(fresh, cache, positions[num_begun:], slots[num_begun:], 0, last))
    hidden = torch.cat(rows)
    if begun:
        hidden = stepper.run_rows(hidden, cache, positions, slots, depth, num_layers)
    return hidden, stepper.logits(hidden)


class TorchStepper:
    """The reference stepper, on the decoder's own torch loop."""

    name = "torch"
    max_rows = 16

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def embed(self, ids: Sequence[int]) -> Tensor:
        return self.decoder.embed(torch.tensor([list(ids)]))[0]

    def run_layers(self, hidden: Tensor, cache: KVCache, start: int, first: int, last: int) -> Tensor:
        places = range(start, start + hidden.shape[0])
        return self.run_rows(hidden, cache, places, places, first, last)

    def run_rows(
        self,
        hidden: Tensor,
        cache: KVCache,
        positions: Sequence[int],
        slots: Sequence[int],
        first: int,
        last: int,
    ) -> Tensor:
        cache.ensure(max(slots) + 1)
        here, own = (torch.tensor([list(places)], device=hidden.device) for places in (positions, slots))
        apart = None if list(positions) == list(slots) else own
        return self.decoder.run_layers(hidden[None], here, cache, first, last, slots=apart)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        return self.decoder.logits(hidden)

    def forward(
        self,
        ids: Sequence[int],
        cache: KVCache,
        begun: Sequence[Tensor] = (),
        depth: int = 0,
        instead_of: Sequence[int] = (),
        weigh_at: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        return forward_in_parts(self, ids, cache, begun, depth, instead_of)

    def copy_slot(self, cache: KVCache, source: int, target: int) -> None:
        cache.copy_slot(source, target)

    def prefill(self, ids: Sequence[int], cache: KVCache) -> None:
        self.decoder.prefill(ids, cache)


def make_stepper(decoder: Decoder) -> Stepper:
    """The fastest stepper for this decoder on this machine."""
    from engine.kernels import fused_stepper
    from engine.models.graph_stepper import GraphStepper

    if decoder.device.type == "cuda" and type(decoder) is Decoder:  # a variant's loop is its own
        return GraphStepper(decoder)
    return fused_stepper(decoder) or TorchStepper(decoder)
