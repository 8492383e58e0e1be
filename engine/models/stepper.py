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
        self, ids: Sequence[int], cache: KVCache, begun: Sequence[Tensor] = (), depth: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Rows behind the cache's tokens through the whole model: first those that have ``begun``, ``[1, D]`` each, and
        are ``depth`` layers deep already, then those of the tokens ``ids``. The cache's length stays as it is.

        Returns:
            Their final states ``[T, D]`` and logits ``[T, V]``. The logits last until the next call.
        """

    def prefill(self, ids: Sequence[int], cache: KVCache) -> None:
        """Append ``ids`` to the cache."""


def forward_in_parts(
    stepper: Stepper, ids: Sequence[int], cache: KVCache, begun: Sequence[Tensor], depth: int
) -> tuple[Tensor, Tensor]:
    """:meth:`Stepper.forward` made of the stepper's other methods."""
    start, num_layers = cache.length, stepper.decoder.config.num_layers
    rows = list(begun)
    if ids:
        here = start + len(rows)
        rows.append(stepper.run_layers(stepper.embed(ids), cache, here, 0, depth if begun else num_layers))
    hidden = torch.cat(rows)
    if begun:
        hidden = stepper.run_layers(hidden, cache, start, depth, num_layers)
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
        cache.ensure(start + hidden.shape[0])
        positions = torch.arange(start, start + hidden.shape[0], device=hidden.device)[None]
        return self.decoder.run_layers(hidden[None], positions, cache, first, last)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        return self.decoder.logits(hidden)

    def forward(
        self, ids: Sequence[int], cache: KVCache, begun: Sequence[Tensor] = (), depth: int = 0
    ) -> tuple[Tensor, Tensor]:
        return forward_in_parts(self, ids, cache, begun, depth)

    def prefill(self, ids: Sequence[int], cache: KVCache) -> None:
        self.decoder.prefill(ids, cache)


def make_stepper(decoder: Decoder) -> Stepper:
    """The fastest stepper for this decoder on this machine."""
    from engine.kernels import fused_stepper
    from engine.models.graph_stepper import GraphStepper

    if decoder.device.type == "cuda" and type(decoder) is Decoder:  # a variant's loop is its own
        return GraphStepper(decoder)
    return fused_stepper(decoder) or TorchStepper(decoder)
