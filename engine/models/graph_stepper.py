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
import torch.nn.functional as F
from torch import Tensor

from engine.models.attention import Sight
from engine.models.cuda_graph import Compute, Graph, RamCopy
from engine.models.decoder import Decoder
from engine.models.feed_forward import MixtureOfExperts
from engine.models.kv_cache import KVCache
from engine.models.stepper import forward_in_parts, row_places

# Rows are filled up to such a number: few graphs are needed then, and on a GPU further rows cost little. (Sixteen would
# be multiplied by other kernels, which sum in another order: fewer texts equalled plain decoding's.)
_ROWS = (1, 4, 8)
_LEAST_SLOTS = 512  # attention looks at this many slots of the cache, or twice as many, and so on
_KEPT = 2  # memories of past conversations that are kept for the next ones


@dataclass
class Memory:
    """Keys and values of one conversation at a time, and the graphs that work on them."""

    cache: KVCache
    graphs: dict[tuple[object, ...], Graph] = field(default_factory=dict)


_Loan: TypeAlias = tuple[Memory, weakref.finalize]


class GraphStepper:
    """A stepper (:class:`engine.models.stepper.Stepper`) for a model on a GPU. A dense one runs through any number of
    layers in one graph; with experts, which come one by one, through a layer up to its router's choice.

    Logits are given in RAM, where tokens are chosen."""

    name = "cuda graphs"
    max_rows = _ROWS[-1]

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._pool = torch.cuda.graph_pool_handle()
        self._borrowed: weakref.WeakKeyDictionary[KVCache, _Loan] = weakref.WeakKeyDictionary()
        self._idle: list[Memory] = []
        self._heads: dict[int, Graph] = {}
        self._in_ram = RamCopy()
        decoder.rope.ensure(decoder.config.context_length)  # graphs hold its address

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
        if self.decoder.config.experts is None:
            return self._through(cache, [positions, slots], first, last, hidden=hidden)[0]
        num_slots, places = self.num_slots(cache, max(slots) + 1), torch.tensor([positions, slots])
        for index in range(first, last):
            hidden = self._layer(hidden, cache, places, index, num_slots)
        return hidden

    def forward(
        self,
        ids: Sequence[int],
        cache: KVCache,
        begun: Sequence[Tensor] = (),
        depth: int = 0,
        instead_of: Sequence[int] = (),
        weigh_at: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        if self.decoder.config.experts is not None:
            return forward_in_parts(self, ids, cache, begun, depth, instead_of)
        num_begun, num_layers = len(begun), self.decoder.config.num_layers
        positions, slots = row_places(cache.length, num_begun + len(ids), instead_of)
        rows, first = None, 0
        if begun:
            new = (
                self._through(cache, [positions[num_begun:], slots[num_begun:]], 0, depth, ids) if ids else ()
            )
            rows, first = torch.cat((*begun, *new)), depth
        hidden, logits = self._through(cache, [positions, slots], first, num_layers, ids, rows, True)
        return hidden, self._in_ram(logits)

    def _through(
        self,
        cache: KVCache,
        places: Sequence[Sequence[int]],
        first: int,
        last: int,
        ids: Sequence[int] = (),
        hidden: Tensor | None = None,
        with_logits: bool = False,
    ) -> tuple[Tensor, ...]:
        """Rows of tokens, or such as are ``hidden`` states already, through the layers of a dense model in one launch, and
        through the head. The logits last until the next call."""
        decoder, count, reach = self.decoder, len(places[0]), max(places[1]) + 1
        spare = next((rows for rows in _ROWS if rows >= count), count) - count
        if reach + spare > decoder.config.context_length:
            spare = 0
        behind = range(reach, reach + spare)  # whatever lies there is written anew before anyone sees it
        places = [[*part, *behind] for part in places]
        num_slots = self.num_slots(cache, reach + spare)

        def compute(own: KVCache, places: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
            rows = states[0] if states else decoder.embed(places[2:])[0]
            sight = Sight(places[:1], num_slots, places[1:2])
            rows = decoder.run_layers_at(decoder.place(sight, own), rows[None], first, last)[0]
            return (rows, decoder.logits(rows)) if with_logits else (rows,)

        if hidden is None:
            inputs = [torch.tensor([*places, [*ids, *[0] * spare]])]
        else:
            inputs = [torch.tensor(places), F.pad(hidden, (0, 0, 0, spare))]
        key = ("rows", count + spare, first, last, num_slots, hidden is None, with_logits)
        rows, *logits = self.run(cache, key, compute, *inputs)
        return rows[:count].clone(), *(part[:count] for part in logits)

    def prepare(self, cache: KVCache, depth: int) -> None:
        """Capture what rounds of a drafter with so many layers need, for a cache of this length: so that no time that is
        measured holds a capture. With experts, layers are captured one by one, as they come."""
        num_layers, start = self.decoder.config.num_layers, cache.length
        if self.decoder.config.experts is not None:
            return
        for rows in _ROWS:
            if start + rows > self.decoder.config.context_length:
                return
            places, ids = [range(start, start + rows)] * 2, [0] * rows
            self._through(cache, places, 0, num_layers, ids, with_logits=True)
            (hidden,) = self._through(cache, places, 0, depth, ids)
            self._through(cache, places, depth, num_layers, hidden=hidden, with_logits=True)

    def _layer(self, hidden: Tensor, cache: KVCache, places: Tensor, index: int, slots: int) -> Tensor:
        decoder, ffn = self.decoder, self.decoder.layers[index].ffn

        def compute(own: KVCache, hidden: Tensor, places: Tensor) -> tuple[Tensor, ...]:
            place = decoder.place(Sight(places[:1], slots, places[1:]), own)
            hidden = decoder.attend(index, hidden[None], place)
            x = decoder.normed(index, hidden)[0]
            return hidden[0], x, *(ffn.route(x) if isinstance(ffn, MixtureOfExperts) else ())

        key = ("attend", hidden.shape[0], index, slots)
        hidden, x, *route = self.run(cache, key, compute, hidden, places)
        if decoder.watch is not None:
            decoder.watch(index, hidden[None])
        return hidden + (ffn.mix(x, *route) if isinstance(ffn, MixtureOfExperts) else ffn(x))

    def logits(self, hidden: Tensor) -> Tensor:
        rows = hidden.shape[0]
        if rows not in self._heads:
            self._heads[rows] = Graph(lambda hidden: (self.decoder.logits(hidden),), [hidden], self._pool)
        return self._in_ram(self._heads[rows](hidden)[0])

    def copy_slot(self, cache: KVCache, source: int, target: int) -> None:
        def compute(own: KVCache, places: Tensor) -> tuple[()]:
            own.copy_slot(places[:1], places[1:])
            return ()

        self.run(cache, ("copy",), compute, torch.tensor([source, target]))

    def prefill(self, ids: Sequence[int], cache: KVCache) -> None:
        cache.ensure(cache.length + len(ids))
        self._memory(cache)
        self.decoder.prefill(ids, cache)

    def num_slots(self, cache: KVCache, length: int) -> int:
        """How many slots attention looks at in a cache that is to hold ``length``: so that few graphs are needed and
        little is looked at in vain."""
        cache.ensure(length)
        slots = _LEAST_SLOTS
        while slots < length:
            slots *= 2
        return min(slots, self._memory(cache).cache.capacity)

    def has(self, cache: KVCache, key: tuple[object, ...]) -> bool:
        """Whether this graph is captured."""
        return key in self._memory(cache).graphs

    def run(
        self, cache: KVCache, key: tuple[object, ...], compute: Compute, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """Run the graph ``key`` of a cache's memory; the results last until it or another one runs.

        Args:
            compute: what to capture if the graph is new; takes the memory, then the inputs, on the GPU.
            inputs: there or in RAM.
        """
        memory = self._memory(cache)
        if key not in memory.graphs:
            examples = [each.to(self.decoder.device) for each in inputs]
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


def _give_back(idle: list[Memory], memory: Memory) -> None:
    """A conversation has ended, or needs more; its graphs stay with the memory."""
    idle.append(memory)
    del idle[:-_KEPT]
