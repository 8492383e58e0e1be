"""The fused CPU stepper: a decoder's packed weights run by the compiled phases."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.decoding.logit_notes import LogitNotes, keep_notes, sharpness_of
from engine.kernels import control
from engine.kernels.draft_layers import fits_int4
from engine.kernels.linears import LinearTable
from engine.kernels.native import Kinds
from engine.kernels.team import PATIENCE, Team
from engine.models.decoder import Decoder, LayerWeights
from engine.models.feed_forward import FeedForward
from engine.models.kv_cache import KVCache
from engine.models.stepper import row_places
from engine.quantization.base import Linear
from engine.quantization.int4_layout import GROUP_SIZE, torch_block
from engine.threads import use_threads

MAX_ROWS = 64  # a prefill takes as many at once
_MIN_TASKS = 24  # split a matmul's inputs until there are about this many tasks
_MIN_PART = 256  # but not below this many inputs


class FusedStepper:
    """A :class:`engine.models.stepper.Stepper` for one sequence on CPU.

    Hidden states are float32 whatever the weights. Rows are bit-identical however many share a call,
    wherever the layer range is cut, and on any number of threads.
    """

    name = "fused"
    max_rows = MAX_ROWS
    patience = PATIENCE
    shares_cores = True
    runs_rounds = True  # a round of self-speculation can be one command

    def __init__(self, decoder: Decoder, num_threads: int) -> None:
        self.decoder = decoder
        self.num_threads = num_threads
        self.table = LinearTable()
        self._kind = self.table.kind(decoder.layers[0].qkv)
        self._wide = decoder.dtype == torch.float32
        assert isinstance(decoder.weights.embedding, Tensor)
        table = decoder.weights.embedding.detach().to(decoder.dtype)
        self._embedding = table.numpy() if self._wide else table.view(torch.uint16).numpy()
        # What a draft step reads most of is its head and, of formats wider than int4, the layers: both are int4 for it
        # wherever they can be.
        self.draft_head_is_int4 = torch_block() is not None and decoder.config.hidden_size % GROUP_SIZE == 0
        head = "uint32" if self.draft_head_is_int4 else "int32"
        self.drafts_on_copies = (
            self.draft_head_is_int4 and self._kind != "uint8" and fits_int4(decoder.config)
        )
        layers = "uint32" if self.drafts_on_copies or self._kind == "uint8" else self._kind
        models = "dense" if decoder.config.experts is None else "experts"
        kinds = Kinds(self._kind, "float32" if self._wide else "uint16", head, layers, models)
        self.team = Team(num_threads, kinds, self.patience, self.shares_cores)
        self._layers = np.zeros((len(decoder.layers), control.LAYER_FIELDS), np.int64)
        self._records = [self._layers]  # all that follow the cache
        for index, layer in enumerate(decoder.layers):
            self._describe_layer(index, layer)
        self.final_norm = self.table.vector(decoder.weights.final_norm)
        self._vocabulary = torch.empty(0, decoder.weights.lm_head.out_features)  # logits
        # What passes give: memory for it, and of one row, of two, and so on. To ask torch for either takes ten microseconds.
        self._states = torch.empty(0, decoder.config.hidden_size)
        self._given: list[tuple[Tensor, Tensor]] = []
        self.states_address = self._logits_address = 0
        self._notes, self._sharpness = LogitNotes(0, 0), 0
        self._head = self.table.describe(decoder.weights.lm_head).ctypes.data
        self._cache_seen: tuple[weakref.ref[KVCache] | None, int] = (None, -1)
        self._rope_seen = -1
        self._record_slots = self._adapter_rank = 0
        self._allocate()

    def embed(self, ids: Sequence[int]) -> Tensor:
        """``[T] -> [T, D]`` float32."""
        rows = self._embedding[list(ids)]
        # numpy: behind a step that swept the caches, torch's own lookup takes ten times as long
        return torch.from_numpy(rows if self._wide else (rows.astype(np.uint32) << 16).view(np.float32))

    def run_layers(self, hidden: Tensor, cache: KVCache, start: int, first: int, last: int) -> Tensor:
        """Rows ``[T, D]`` at positions ``start ..`` through layers ``first .. last - 1``."""
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
        """As :meth:`run_layers`, with a position for each row and a slot for its key and value; -1: it writes none.

        A row sees all slots before its position, those written by this call included, and its own; one without, that at
        its position.
        """
        rows = self._check_rows(hidden)
        self.follow(cache, max(*positions, *slots) + 1)
        hidden = hidden.detach().to(torch.float32).contiguous()
        if first >= last:  # a command without a barrier would let the caller run ahead of the workers
            return hidden.clone()
        out = torch.empty_like(hidden)
        self.use_positions(positions, slots)
        self.team.run(
            control.RUN_LAYERS,
            {
                control.ROWS: rows,
                control.FIRST: first,
                control.LAST: last,
                control.HIDDEN: hidden.data_ptr(),
                control.OUT: out.data_ptr(),
            },
        )
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: ``[T, D] -> [T, V]`` float32."""
        return self._multiply(self.decoder.weights.lm_head, hidden, self.final_norm)

    def forward(
        self,
        ids: Sequence[int],
        cache: KVCache,
        begun: Sequence[Tensor] = (),
        depth: int = 0,
        instead_of: Sequence[int] = (),
        weigh_at: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """As :class:`engine.models.stepper.Stepper` says, in one command: behind a step that swept the caches, each of
        Python's and torch's own little ones takes tens of microseconds."""
        rows = self._check_count(len(begun) + len(ids))
        self.follow(cache, cache.length + rows)
        self.use_tokens(ids)
        for place, row in enumerate(begun):
            self._begun[place] = row.data_ptr()
        self.use_positions(*self._row_places(cache.length, rows, instead_of))
        self.team.run(
            control.RUN_FORWARD,
            {
                **self.pass_fields(rows, weigh_at),
                control.ROWS: rows,
                control.BEGUN: len(begun),
                control.FIRST: depth,
                control.LAST: len(self._layers),
                control.OUT: self.states_address,
            },
        )
        return self.given(rows)

    def pass_fields(self, rows: int, weigh_at: float) -> dict[int, int]:
        """What a pass of up to so many rows needs beside their number, the layers and where their states go, which is
        ``states_address``."""
        if rows > len(self._given):
            self._states, self._vocabulary = (
                torch.empty(rows, each.shape[1]) for each in (self._states, self._vocabulary)
            )
            self._given = [(self._states[:count], self._vocabulary[:count]) for count in range(1, rows + 1)]
            self._notes, self._sharpness = LogitNotes(rows, self._vocabulary.shape[1]), 0
            for _, each in self._given:
                keep_notes(each, self._notes)
            self.states_address, self._logits_address = self._states.data_ptr(), self._vocabulary.data_ptr()
        if weigh_at != self._notes.temperature:
            self._notes.temperature = weigh_at
            self._sharpness = int(np.float32(sharpness_of(weigh_at)).view(np.int32))
        return {
            control.HIDDEN: self._begun_address,
            control.NORM: self.final_norm,
            control.LINEAR: self._head,
            control.LOGITS: self._logits_address,
            control.NOTES: self._notes.first,
            control.SHARPNESS: self._sharpness,
        }

    @property
    def note_step(self) -> int:
        """Bytes from what is noted of one row's logits to the next one's."""
        return self._notes.step

    def given(self, rows: int) -> tuple[Tensor, Tensor]:
        """States and logits of the latest pass."""
        return self._given[rows - 1]

    def _row_places(
        self, start: int, count: int, instead_of: Sequence[int]
    ) -> tuple[Sequence[int], Sequence[int]]:
        """Positions and slots of the rows of a pass."""
        return row_places(start, count, instead_of)

    def prefill(self, ids: Sequence[int], cache: KVCache) -> None:
        cache.ensure(cache.length + len(ids))
        for begin in range(0, len(ids), MAX_ROWS):
            rows = self.embed(ids[begin : begin + MAX_ROWS])
            self.run_layers(rows, cache, cache.length, 0, self.decoder.config.num_layers)
            cache.length += len(rows)

    def copy_slot(self, cache: KVCache, source: int, target: int) -> None:
        self.follow(cache, cache.length)
        self.team.copy_slot(len(self._layers), source, target)

    def use_positions(self, positions: Sequence[int], slots: Sequence[int]) -> None:
        """Where the rows of the next command lie, and where their keys and values go (-1: nowhere)."""
        for row, (position, slot) in enumerate(zip(positions, slots, strict=True)):
            self._positions[row], self._slots[row] = position, slot

    def use_tokens(self, ids: Sequence[int]) -> None:
        """The tokens of the next command."""
        for row, token in enumerate(ids):
            self._ids[row] = token

    def matmul(self, linear: Linear, x: Tensor) -> Tensor:
        """``x [T, K] -> [T, N]`` float32, for any linear of this decoder's weight format, such as a cut head."""
        return self._multiply(linear, x, 0)

    def close(self) -> None:
        """Stop the worker threads; a later call starts them again."""
        self.team.close()

    def _multiply(self, linear: Linear, x: Tensor, norm: int) -> Tensor:
        rows = self._check_rows(x)
        x = x.detach().to(torch.float32).contiguous()
        if self.table.kind(linear) != self._kind:
            raise ValueError("a fused stepper runs linears of one weight format")
        if x.shape[1] > self._max_inputs:
            raise ValueError(f"this stepper takes at most {self._max_inputs} inputs, not {x.shape[1]}")
        out = torch.empty(rows, linear.out_features)
        self.team.run(
            control.RUN_MATMUL,
            {
                control.ROWS: rows,
                control.HIDDEN: x.data_ptr(),
                control.OUT: out.data_ptr(),
                control.NORM: norm,
                control.LINEAR: self.table.describe(linear).ctypes.data,
            },
        )
        return out

    def _check_rows(self, x: Tensor) -> int:
        return self._check_count(x.shape[0])

    def _check_count(self, rows: int) -> int:
        if not 1 <= rows <= MAX_ROWS:
            raise ValueError(f"1 to {MAX_ROWS} rows, not {rows}")
        return rows

    def _parts(self, linear: Linear) -> int:
        blocks = -(-linear.out_features // control.BLOCK)
        return max(1, min(-(-_MIN_TASKS // blocks), linear.in_features // _MIN_PART))

    def _down_parts(self, linear: Linear) -> int:
        return self._parts(linear)

    def _describe_layer(self, index: int, layer: LayerWeights) -> None:
        record = self._layers[index]
        record[control.ATTN_NORM] = self.table.vector(layer.attn_norm)
        record[control.MLP_NORM] = self.table.vector(layer.mlp_norm)
        record[control.Q_NORM] = self.table.vector(layer.q_norm)
        record[control.K_NORM] = self.table.vector(layer.k_norm)
        record[control.WINDOW] = self.decoder.config.sliding_window(index) or 0
        places = [
            (control.QKV, layer.qkv, self._parts(layer.qkv)),
            (control.O_PROJ, layer.o, self._parts(layer.o)),
        ]
        if isinstance(layer.ffn, FeedForward):
            places.append((control.GATE_UP_PROJ, layer.ffn.gate_up, 1))  # SiLU needs whole sums
            places.append((control.DOWN_PROJ, layer.ffn.down, self._down_parts(layer.ffn.down)))
        for place, linear, parts in places:
            record[place : place + control.LINEAR_FIELDS] = self.table.describe(linear, parts)

    def _allocate(self) -> None:
        """Buffers for MAX_ROWS rows, and the control block's constant fields."""
        config, layers = self.decoder.config, self.decoder.layers
        linears = [m for layer in layers for m in layer.matrices()]
        self._max_inputs = max(inputs for _, inputs in config.all_matrix_shapes())
        splits = max(self._parts(m) for m in linears)
        wide = max(layer.qkv.out_features for layer in layers)
        mixed, inner = config.num_heads * config.head_dim, config.intermediate_size
        # Written through memoryviews, a number at a time: for a few numbers numpy takes longer.
        places = np.zeros((4, MAX_ROWS), np.int64)
        self._positions, self._slots, self._ids, self._begun = (row.data for row in places)
        positions, slots, tokens, self._begun_address = (row.ctypes.data for row in places)
        self._buffers: list[np.ndarray] = []
        fields = {
            control.POSITIONS: positions,
            control.SLOTS: slots,
            control.IDS: tokens,
            control.EMBEDDING: self._embedding.ctypes.data,
            control.LAYERS: self.layers,
            control.HIDDEN_SIZE: config.hidden_size,
            control.HEADS: config.num_heads,
            control.KV_HEADS: config.num_kv_heads,
            control.HEAD_DIM: config.head_dim,
            control.EPS: int(np.float32(config.norm_eps).view(np.int32)),
            control.QKV_BUFFER: self.buffer(splits * wide),
            control.PARTS_BUFFER: self.buffer(splits * config.hidden_size),
            control.MIXED: self.buffer(mixed),
            control.ACT: self.buffer(inner),
            control.GATE_UP: self.buffer(2 * inner),
            control.WHOLE_NORM: int(config.qk_norm_whole),
        }
        fields[control.ACT_ROUNDED], fields[control.ACT_EXTRAS] = self._rounded(inner)
        fields[control.MIXED_ROUNDED], fields[control.MIXED_EXTRAS] = self._rounded(mixed)
        for rank in range(self.num_threads):
            own = control.RANKS + rank * control.RANK_FIELDS
            fields[own + control.OWN_H] = self.buffer(config.hidden_size)
            fields[own + control.OWN_X] = self.buffer(self._max_inputs)
            fields[own + control.OWN_ROUNDED], fields[own + control.OWN_EXTRAS] = self._rounded(
                self._max_inputs
            )
            fields[own + control.OWN_KV] = self.buffer(config.head_dim)
            fields[own + control.OWN_FACTORS] = self.buffer(2)
            fields[own + control.OWN_QUERIES] = self.buffer(mixed)
            fields[own + control.OWN_SCORES] = self.buffer(control.ATTENTION_CHUNK)
        for field, value in fields.items():
            self.team.control[field] = value

    def buffer(self, floats_per_row: int) -> int:
        """Address of a zeroed, aligned buffer of that many floats for each of MAX_ROWS rows, kept alive."""
        buffer = np.zeros(MAX_ROWS * floats_per_row + 32, np.float32)
        self._buffers.append(buffer)
        return -(-buffer.ctypes.data // 64) * 64

    def _rounded(self, inputs: int) -> tuple[int, int]:
        """Buffers for rounded inputs (:mod:`engine.kernels.rounding`) and what is kept beside them."""
        return self.buffer(-(-inputs // 2)), self.buffer(-(-inputs // GROUP_SIZE) * 4)

    def reserve_adapters(self, rank: int) -> None:
        """Have scratch for adapters of up to ``rank``."""
        if rank > self._adapter_rank:
            self._adapter_rank = rank
            for thread in range(self.num_threads):
                own = control.RANKS + thread * control.RANK_FIELDS
                self.team.control[own + control.OWN_LOW] = self.buffer(rank + 16)
                self.team.control[own + control.OWN_RAISED] = self.buffer(64)
                rounded, extras = self._rounded(rank + 16)
                self.team.control[own + control.OWN_LOW_ROUNDED] = rounded
                self.team.control[own + control.OWN_LOW_EXTRAS] = extras

    @property
    def layers(self) -> int:
        """Address of the layers' records."""
        return self._layers.ctypes.data

    def copy_layers(self) -> np.ndarray:
        """The layers' records once more, to be changed; they follow the cache as the stepper's own do."""
        self._records.append(self._layers.copy())
        return self._records[-1]

    def follow(self, cache: KVCache, num_positions: int) -> None:
        """Make ``cache`` the one in use, with room for ``num_positions``, wherever it and the rotary tables
        lie now."""
        rope = self.decoder.rope
        if num_positions > min(cache.capacity, rope.num_positions):
            with use_threads(1):  # the one thing in a pass that is torch's work
                cache.ensure(num_positions)
                rope.ensure(num_positions)
        block = self.team.control
        if rope.generation != self._rope_seen:
            self._rope = (rope.cos.contiguous(), rope.sin.contiguous())
            block[control.COS], block[control.SIN] = (table.data_ptr() for table in self._rope)
            self._rope_seen = rope.generation
        # By identity, not by address: a new cache may start where a freed one did.
        last, generation = self._cache_seen
        if last is None or last() is not cache or generation != cache.generation:
            for records in self._records:
                records[:, control.KEYS] = [keys.data_ptr() for keys in cache.keys]
                records[:, control.VALUES] = [values.data_ptr() for values in cache.values]
            block[control.CAPACITY] = cache.capacity
            self._cache_seen = (weakref.ref(cache), cache.generation)
        if cache.capacity > self._record_slots:
            chunks = cache.capacity // control.ATTENTION_CHUNK + 2
            queries = control.ATTENTION_ROWS * self.decoder.config.num_heads
            size = chunks * queries * (self.decoder.config.head_dim + 16)
            self._attended = np.empty(2 * size + 16, np.float32)
            first = -(-self._attended.ctypes.data // 64) * 64
            block[control.RECORDS : control.RECORDS + 2] = first, first + 4 * size
            self._record_slots = cache.capacity
