"""The decoder's torch loop on an NVIDIA GPU, captured as CUDA graphs.

A graph works on fixed addresses, so the caches of conversations borrow their memory here, and a graph belongs to the
memory that it was captured on.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from engine.models.cuda_graph import Compute, Graph
from engine.models.decoder import Decoder, Place
from engine.models.feed_forward import MixtureOfExperts
from engine.models.kv_cache import KVCache
from engine.models.stepper import forward_in_parts

_LEAST_SLOTS = 256  # attention looks at this many slots of the cache, or twice as many, and so on
_KEPT = 2  # memories of past conversations that are kept for the next ones


@dataclass
class Memory:
    """Keys and values of one conversation at a time, and the graphs that work on them."""

    cache: KVCache
    graphs: dict[tuple[object, ...], Graph] = field(default_factory=dict)


_Loan: TypeAlias = tuple[Memory, weakref.finalize]


class GraphStepper:
    """A stepper (:class:`engine.models.stepper.Stepper`) for a model on a GPU. A dense one runs through any number of
    layers in one graph; with experts, which come one by one, through a layer up to its router's choice."""

    name = "cuda graphs"
    max_rows = 16
    takes_alternatives = False  # not tried on a GPU yet

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._pool = torch.cuda.graph_pool_handle()
        self._borrowed: weakref.WeakKeyDictionary[KVCache, _Loan] = weakref.WeakKeyDictionary()
        self._idle: list[Memory] = []
        self._heads: dict[int, Graph] = {}
        decoder.rope.ensure(decoder.config.context_length)  # graphs hold its address

    def embed(self, ids: Sequence[int]) -> Tensor:
        return self.decoder.embed(torch.tensor([list(ids)]))[0]

    def run_layers(self, hidden: Tensor, cache: KVCache, start: int, first: int, last: int) -> Tensor:
        cache.ensure(start + hidden.shape[0])
        slots = self.num_slots(cache, start + hidden.shape[0])
        if self.decoder.config.experts is None:
            return self._range(hidden, cache, start, first, last, slots)
        for index in range(first, last):
            hidden = self._layer(hidden, cache, start, index, slots)
        return hidden

    def _range(self, hidden: Tensor, cache: KVCache, start: int, first: int, last: int, slots: int) -> Tensor:
        decoder = self.decoder

        def compute(own: KVCache, hidden: Tensor, start: Tensor) -> tuple[Tensor]:
            positions = _positions(start, hidden)
            return (decoder.run_layers(hidden[None], positions, own, first, last, num_slots=slots)[0],)

        key = ("layers", hidden.shape[0], first, last, slots)
        return self.run(cache, key, compute, hidden, start)[0].clone()

    def _layer(self, hidden: Tensor, cache: KVCache, start: int, index: int, slots: int) -> Tensor:
        decoder, ffn = self.decoder, self.decoder.layers[index].ffn

        def compute(own: KVCache, hidden: Tensor, start: Tensor) -> tuple[Tensor, ...]:
            positions = _positions(start, hidden)
            place = Place(positions, *decoder.rope.rows(positions), own, slots)
            hidden = decoder.attend(index, hidden[None], place)
            x = decoder.normed(index, hidden)[0]
            return hidden[0], x, *(ffn.route(x) if isinstance(ffn, MixtureOfExperts) else ())

        key = ("attend", hidden.shape[0], index, slots)
        hidden, x, *route = self.run(cache, key, compute, hidden, start)
        if decoder.watch is not None:
            decoder.watch(index, hidden[None])
        return hidden + (ffn.mix(x, *route) if isinstance(ffn, MixtureOfExperts) else ffn(x))

    def logits(self, hidden: Tensor) -> Tensor:
        rows = hidden.shape[0]
        if rows not in self._heads:
            self._heads[rows] = Graph(lambda hidden: (self.decoder.logits(hidden),), [hidden], self._pool)
        return self._heads[rows](hidden)[0].clone()

    def run_rows(
        self,
        hidden: Tensor,
        cache: KVCache,
        positions: Sequence[int],
        slots: Sequence[int],
        first: int,
        last: int,
    ) -> Tensor:
        """Rows that follow one another: there are no alternatives here."""
        return self.run_layers(hidden, cache, positions[0], first, last)

    def forward(
        self,
        ids: Sequence[int],
        cache: KVCache,
        begun: Sequence[Tensor] = (),
        depth: int = 0,
        instead_of: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor]:
        return forward_in_parts(self, ids, cache, begun, depth, instead_of)

    def copy_slot(self, cache: KVCache, source: int, target: int) -> None:
        cache.copy_slot(source, target)

    def prefill(self, ids: Sequence[int], cache: KVCache) -> None:
        cache.ensure(cache.length + len(ids))
        self._memory(cache)
        self.decoder.prefill(ids, cache)

    def num_slots(self, cache: KVCache, length: int) -> int:
        """How many slots attention looks at, so that few graphs are needed and little is looked at in vain."""
        slots = _LEAST_SLOTS
        while slots < length:
            slots *= 2
        return min(slots, self._memory(cache).cache.capacity)

    def run(
        self, cache: KVCache, key: tuple[object, ...], compute: Compute, *inputs: Tensor | int
    ) -> tuple[Tensor, ...]:
        """Run the graph ``key`` of a cache's memory; the results last until it runs again.

        Args:
            compute: what to capture if the graph is new; takes the memory, then the inputs.
        """
        memory = self._memory(cache)
        if key not in memory.graphs:
            device = self.decoder.device
            examples = [
                each if isinstance(each, Tensor) else torch.full((), each, device=device) for each in inputs
            ]
            memory.graphs[key] = Graph(partial(compute, memory.cache), examples, self._pool)
        return memory.graphs[key](*inputs)

    def _memory(self, cache: KVCache) -> Memory:
        """What ``cache`` has borrowed. One that is new here, or has grown, moves in."""
        borrowed = self._borrowed.get(cache)
        if borrowed is not None and borrowed[0].cache.keys is cache.keys:
            return borrowed[0]
        if borrowed is not None:
            borrowed[1]()
        memory = self._lend(cache)
        cache.move(memory.cache.keys, memory.cache.values)
        self._borrowed[cache] = memory, weakref.finalize(cache, _give_back, self._idle, memory)
        return memory

    def _lend(self, cache: KVCache) -> Memory:
        """Memory that is large enough, and not much larger."""
        needed = _LEAST_SLOTS
        while needed < cache.capacity:
            needed *= 2
        for memory in self._idle:
            if cache.capacity <= memory.cache.capacity <= needed:
                self._idle.remove(memory)
                return memory
        return Memory(self.decoder.new_cache(needed))


def _positions(start: Tensor, hidden: Tensor) -> Tensor:
    """``[1, T]`` of rows ``[T, D]`` from ``start`` on."""
    return (start + torch.arange(hidden.shape[0], device=start.device))[None]


def _give_back(idle: list[Memory], memory: Memory) -> None:
    """A conversation has ended, or needs more; its graphs stay with the memory."""
    idle.append(memory)
    del idle[:-_KEPT]
