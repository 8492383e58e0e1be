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

    def prefill(self, ids: Sequence[int], cache: KVCache) -> None:
        """Append ``ids`` to the cache."""


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

    def prefill(self, ids: Sequence[int], cache: KVCache) -> None:
        self.decoder.prefill(ids, cache)


def make_stepper(decoder: Decoder) -> Stepper:
    """The fastest stepper for this decoder on this machine."""
    from engine.kernels import fused_stepper
    from engine.models.graph_stepper import GraphStepper

    if decoder.device.type == "cuda" and type(decoder) is Decoder:  # a variant's loop is its own
        return GraphStepper(decoder)
    return fused_stepper(decoder) or TorchStepper(decoder)
