"""Computations captured as CUDA graphs: one launch instead of many, each of which would take the CPU longer than the
GPU needs to run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from engine.models.feed_forward import FeedForward

Compute: TypeAlias = Callable[..., tuple[Tensor, ...]]


class Graph:
    """A computation on tensors of fixed shapes, captured once.

    Args:
        compute: has no effect that doing it twice would change, and waits for no result.
        inputs: an example of what it takes.
        pool: memory that graphs share which never run at the same time.
    """

    def __init__(self, compute: Compute, inputs: Sequence[Tensor], pool: Any) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            compute(*self._inputs)  # libraries set themselves up at the first use, which no graph may hold
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # (Not by torch.cuda.graph(), which empties torch's store of free memory besides: 0.1 s.)
        with torch.cuda.stream(side):
            # Other threads copy experts meanwhile, which has nothing to do with this.
            self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                self._outputs = compute(*self._inputs)
            finally:
                self._graph.capture_end()
        torch.cuda.current_stream().wait_stream(side)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run it. The results last until it or another one of the same pool runs."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._outputs


class RamCopy:
    """What a GPU has computed, in RAM that it writes to at full speed."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def __call__(self, tensor: Tensor) -> Tensor:
        """A copy, once it is there; it lasts until the next one."""
        if not tensor.is_cuda:
            return tensor
        if self._buffer.numel() < tensor.numel() or self._buffer.dtype != tensor.dtype:
            self._buffer = torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=True)
        copy = self._buffer[: tensor.numel()].view(tensor.shape)
        copy.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return copy


@dataclass(frozen=True)
class GraphedFeedForward(FeedForward):
    """A block that one row passes through in one launch, captured the first time."""

    pool: Any = None  # memory that it shares with other graphs
    _graphs: list[Graph] = field(default_factory=list, compare=False)

    def __call__(self, x: Tensor) -> Tensor:
        """As its base class; of one row, the result lasts until the next."""
        if x.numel() != x.shape[-1]:
            return FeedForward.__call__(self, x)
        if not self._graphs:
            self._graphs.append(Graph(lambda x: (FeedForward.__call__(self, x),), [x], self.pool))
        return self._graphs[0](x)[0]
