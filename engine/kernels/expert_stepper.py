"""The fused CPU stepper for mixture-of-experts models, whose experts may still be on their way into memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from engine.experts.cache import LayerExperts
from engine.experts.native_cache import NativeCache
from engine.kernels import control
from engine.kernels.expert_work import MAX_RECORDS, Attended, Descriptors, ExpertWork, Room
from engine.kernels.stepper import MAX_ROWS, FusedStepper
from engine.models.decoder import PREFILL_CHUNK, Decoder, LayerWeights, PassWatch
from engine.models.feed_forward import FeedForward, MixtureOfExperts
from engine.models.kv_cache import KVCache
from engine.models.stepper import forward_in_parts
from engine.quantization.base import Linear
from engine.quantization.dense import DenseLinear
from engine.threads import use_threads

_MOST_ROWS = 16  # of a pass in one command; more want most of the experts anyway


@dataclass(frozen=True)
class Side:
    """An accelerated stream's rows behind the slow ones, and addresses of its adapters by field of the command."""

    rows: int
    adapters: Mapping[int, int]


_NO_SIDE = Side(0, {})
_NO_ADAPTERS = dict.fromkeys(
    (control.SIDE_QUERY, control.SIDE_OUTPUT, control.SIDE_ATTENTION, control.SIDE_FEED_FORWARD), 0
)


class FusedExpertStepper(FusedStepper):
    """A :class:`FusedStepper` for layers with experts.

    A pass of few rows is one command, within which experts are brought into memory, if native code does that. Otherwise these
    layers run one by one: their attention part in one command, and the experts in as many as it takes until all of them are
    in memory.
    """

    patience = 100_000  # about 2.5 ms: to wake a worker up behind every load that is waited for takes as long as the load
    runs_rounds = False
    shares_cores = False  # its threads often wait for the caller, or take turns with those that load experts

    def __init__(self, decoder: Decoder, num_threads: int) -> None:
        layers = range(decoder.config.num_layers)
        # Those with experts and, for what watches, those right before them.
        self._apart = {
            i for i in layers if any(decoder.config.is_sparse(j) for j in (i, i + 1) if j in layers)
        }
        self._sparse = np.zeros((len(layers), control.SPARSE_FIELDS), np.int64)
        self._tables: list[np.ndarray] = []  # kept alive for the compiled code
        # What all rows go through: the shared expert, or a dense layer.
        self._shared: dict[int, Descriptors] = {}
        self._in_one = True  # whether layers need not be run one by one
        self._cache: NativeCache | None = None
        self._experts: weakref.WeakKeyDictionary[FeedForward, Descriptors] = weakref.WeakKeyDictionary()
        super().__init__(decoder, num_threads)

    def run_rows(
        self,
        hidden: Tensor,
        cache: KVCache,
        positions: Sequence[int],
        slots: Sequence[int],
        first: int,
        last: int,
    ) -> Tensor:
        index = first
        while index < last:
            if index in self._apart:
                self.follow(cache, max(*positions, *slots) + 1)
                hidden = self._run_apart(index, hidden, positions, slots)
                index += 1
            else:
                end = next((i for i in range(index, last) if i in self._apart), last)
                hidden = super().run_rows(hidden, cache, positions, slots, index, end)
                index = end
        return hidden.clone() if first >= last else hidden

    def forward(
        self,
        ids: Sequence[int],
        cache: KVCache,
        begun: Sequence[Tensor] = (),
        depth: int = 0,
        instead_of: Sequence[int] = (),
        weigh_at: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        rows = len(begun) + len(ids)
        if rows > self._most_rows or not self._begin_pass(rows):
            with use_threads(1):
                return forward_in_parts(self, ids, cache, begun, depth, instead_of)
        self.team.control[control.CHOSEN], self.team.control[control.WEIGHTS] = self._choices
        found = super().forward(ids, cache, begun, depth, instead_of, weigh_at)
        if self._cache is not None:
            self._cache.raise_trouble()
        if isinstance(self.decoder.watch, PassWatch):
            self.decoder.watch.end_pass(rows)
        return found

    def _begin_pass(self, rows: int) -> bool:
        """Whether a pass of ``rows`` rows can be one command."""
        watch = self.decoder.watch
        if watch is None:
            return self._in_one and (self._cache is None or self._cache.follow(None))
        return self._in_one and isinstance(watch, PassWatch) and watch.begin_pass(rows)

    def prefill(self, ids: Sequence[int], cache: KVCache) -> None:
        """Whole chunks go through a layer before the next: each of its experts is loaded once for them."""
        cache.ensure(cache.length + len(ids))
        for begin in range(0, len(ids), PREFILL_CHUNK):
            rows = self.embed(ids[begin : begin + PREFILL_CHUNK])
            for index in range(self.decoder.config.num_layers):
                rows = self._prefill_layer(index, rows, cache)
            cache.length += rows.shape[0]

    def _prefill_layer(self, index: int, rows: Tensor, cache: KVCache) -> Tensor:
        start, count = cache.length, rows.shape[0]
        if index in self._apart:
            self.follow(cache, start + count)
            places = range(start, start + count)
            return self._run_apart(index, rows, places, places)
        pieces = [
            self.run_layers(piece, cache, start + number * MAX_ROWS, index, index + 1).numpy()
            for number, piece in enumerate(rows.split(MAX_ROWS))
        ]
        return torch.from_numpy(np.concatenate(pieces))

    def _run_apart(
        self, index: int, hidden: Tensor, positions: Sequence[int], slots: Sequence[int]
    ) -> Tensor:
        """Layer ``index`` in commands: ``[T, D] -> [T, D]``, any number of rows."""
        attended, watch = self.attend(index, hidden, positions, slots), self.decoder.watch
        # Who watches does so while the workers have begun with the first experts.
        meanwhile = None if watch is None else partial(watch, index, attended.hidden[None])
        return self.feed_forward(index, attended, meanwhile)

    def attend(
        self,
        index: int,
        hidden: Tensor,
        positions: Sequence[int],
        slots: Sequence[int],
        side: Side = _NO_SIDE,
    ) -> Attended:
        """The attention part of layer ``index`` and what its router chooses; of ``hidden [T, D]`` the last rows may be
        an accelerated stream's."""
        hidden = hidden.detach().to(torch.float32).contiguous()
        rows, size = hidden.shape
        ffn, router = self.decoder.layers[index].ffn, self._sparse[index]
        routed = ffn.config.num_experts_per_tok if isinstance(ffn, MixtureOfExperts) else 0
        chosen = np.empty((rows - side.rows, routed), np.int64)
        places = routed + (index in self._shared)
        weights = np.ones((rows, places), np.float32)
        out = torch.empty_like(hidden), torch.empty_like(hidden)
        added = torch.empty(side.rows, size) if side.rows else None
        fields = {
            control.FIRST: index,
            control.ROUTER: router.ctypes.data if router[control.OUTPUTS] else 0,
            control.SIDE_ROWS: side.rows,
            control.SIDE_OUT: 0 if added is None else added.data_ptr(),
            **_NO_ADAPTERS,
            **side.adapters,
        }
        for begin in range(0, rows, MAX_ROWS):
            count = min(MAX_ROWS, rows - begin)
            self.use_positions(positions[begin : begin + count], slots[begin : begin + count])
            fields[control.ROWS] = count
            fields[control.HIDDEN] = hidden.data_ptr() + 4 * begin * size
            fields[control.OUT] = out[0].data_ptr() + 4 * begin * size
            fields[control.NORMED] = out[1].data_ptr() + 4 * begin * size
            fields[control.CHOSEN] = chosen.ctypes.data + 8 * begin * routed
            fields[control.WEIGHTS] = weights.ctypes.data + 4 * begin * places
            self.team.run(control.RUN_ATTENTION, fields)
        if side.rows:  # they go through their slow row's experts
            weights[-side.rows :] = weights[: side.rows]
        return Attended(*out, chosen, weights, added)

    def feed_forward(
        self, index: int, attended: Attended, meanwhile: Callable[[], None] | None = None
    ) -> Tensor:
        """The experts of layer ``index``, added: ``[T, D]``.

        Args:
            meanwhile: called once, as soon as the layer's own experts have been asked for.
        """
        ffn, chosen = self.decoder.layers[index].ffn, attended.chosen
        work = ExpertWork(self.team, Room(self.records, self.act, self.act_size), attended, meanwhile)
        if (shared := self._shared.get(index)) is not None:
            work.add(shared, chosen.shape[1])
        if not isinstance(ffn, MixtureOfExperts):
            work.run(add_up=True)
            return work.result
        alike = len(chosen) == 1 or bool((chosen == chosen[0]).all())
        if not alike and attended.added is not None:
            chosen = np.concatenate((chosen, chosen))
        numbers = chosen[0].tolist() if alike else np.unique(chosen).tolist()
        left = len(numbers)
        for group in ffn.experts.fetch(numbers):
            for number, expert in group:
                if alike:
                    work.add(self._described(expert), numbers.index(number))
                else:
                    work.add_some(self._described(expert), *np.nonzero(chosen == number))
            left -= len(group)
            work.run(add_up=left == 0)  # before the next group is asked for: this one may leave then
        return work.result

    def _described(self, expert: FeedForward) -> Descriptors:
        """Both descriptors; forgotten with the expert, so that a slot's memory can be given back."""
        known = self._experts.get(expert)
        if known is None:
            linears = (expert.gate_up, expert.down)
            known = _joined(self.table.describe_passing(linear) for linear in linears)
            self._experts[expert] = known
        return known

    def _describe_layer(self, index: int, layer: LayerWeights) -> None:
        super()._describe_layer(index, layer)
        ffn = layer.ffn
        if isinstance(ffn, FeedForward):
            self._describe_shared(index, ffn)
            return
        matrix = ffn.router if ffn.shared_gate is None else torch.cat((ffn.router, ffn.shared_gate))
        shares = 0 if ffn.shared is None else 1 if ffn.shared_gate is None else 2
        record = self._sparse[index]
        record[: control.LINEAR_FIELDS] = self.table.describe(DenseLinear(matrix.contiguous()))
        record[control.ROUTER_NUM_EXPERTS], record[control.ROUTER_SHARED] = ffn.config.num_experts, shares
        record[control.SPARSE_INNER] = ffn.config.intermediate_size
        if ffn.shared is not None:
            self._describe_shared(index, ffn.shared)
            record[control.SPARSE_SHARED :] = self._shared[index]
        if experts := ffn.experts.resident():
            self._tables.append(np.array([self._described(expert) for expert in experts], np.int64))
            record[control.SPARSE_TABLE] = self._tables[-1].ctypes.data
        elif isinstance(ffn.experts, LayerExperts) and isinstance(ffn.experts.cache, NativeCache):
            self._cache = ffn.experts.cache
        else:
            self._in_one = False

    def _describe_shared(self, index: int, block: FeedForward) -> None:
        self._shared[index] = _joined(self.table.describe(linear) for linear in block.matrices())

    def _down_parts(self, linear: Linear) -> int:
        return 1  # as in commands for experts: a layer's bits do not depend on how it is run

    def _allocate(self) -> None:
        super()._allocate()
        experts = self.decoder.config.experts
        assert experts is not None
        inner = max(experts.active_size, *self.decoder.config.feed_forward_sizes)
        self.act_size, self.act = MAX_ROWS * inner, self.buffer(inner)
        records = np.zeros(MAX_RECORDS * control.EXPERT_FIELDS, np.int64)
        self.records = records.data.cast("B")
        block = self.team.control
        block[control.EXPERTS] = records.ctypes.data
        block[control.TOP_K] = experts.num_experts_per_tok
        block[control.NORMALIZE] = experts.normalize_weights
        block[control.ROUTER_LOGITS] = self.buffer(experts.num_experts + 1)
        places = experts.num_experts_per_tok + 1
        self._most_rows = min(_MOST_ROWS, MAX_RECORDS // places)
        choices, wanted = (
            np.zeros((3, self._most_rows * places), np.int64),
            np.zeros((MAX_RECORDS, control.WANTED_FIELDS), np.int64),
        )
        self._tables += choices, wanted
        self._choices = choices[0].ctypes.data, choices[1].ctypes.data
        block[control.SPARSE_LAYERS], block[control.WANTED] = self._sparse.ctypes.data, wanted.ctypes.data
        block[control.SOURCES], block[control.EXPERT_ACTS] = choices[2].ctypes.data, self.act
        self._there = np.zeros(2 * control.LINEAR_FIELDS, np.int64)
        block[control.THERE] = self._there.ctypes.data
        block[control.TURNS] = 0 if self._cache is None else self._cache.address
        outs = -(-self._most_rows * places // MAX_ROWS) * self.decoder.config.hidden_size
        block[control.EXPERT_OUTS], block[control.GATHERED] = self.buffer(outs), self.buffer(outs)
        self._logits = np.zeros((self.num_threads, 2 * experts.num_experts + 32), np.float32)
        for rank in range(self.num_threads):
            own = control.RANKS + rank * control.RANK_FIELDS
            block[own + control.OWN_PAIR] = self.buffer(2 * control.BLOCK)
            block[own + control.OWN_LOGITS] = self._logits[rank].ctypes.data


def _joined(described: Iterable[np.ndarray]) -> Descriptors:
    return tuple(int(field) for each in described for field in each)
