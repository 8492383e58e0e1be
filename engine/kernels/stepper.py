"""The fused CPU stepper: a decoder's packed weights run by the compiled phases."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.kernels import matmul, phases
from engine.kernels.team import Team
from engine.models.decoder import Decoder, LayerWeights
from engine.models.kv_cache import KVCache
from engine.quantization.base import Linear
from engine.quantization.dense import DenseLinear
from engine.quantization.int4 import Int4Linear
from engine.quantization.int8 import Int8Linear

MAX_ROWS = 16
_MIN_TASKS = 24  # split a matmul's inputs until there are about this many tasks
_MIN_PART = 256  # but not below this many inputs


class FusedStepper:
    """A :class:`engine.models.stepper.Stepper` for one sequence on CPU.

    Hidden states are float32 whatever the weights. Rows are bit-identical however many share a call,
    wherever the layer range is cut, and on any number of threads.
    """

    name = "fused"
    max_rows = MAX_ROWS

    def __init__(self, decoder: Decoder, num_threads: int, int4_block: int = 64) -> None:
        self.decoder = decoder
        self.num_threads = num_threads
        self._int4_block = int4_block
        self._kept: list[Tensor] = []  # tensors that the tables point into
        self._linears: dict[int, tuple[Linear, np.ndarray]] = {}
        self._tag = self._kind(decoder.layers[0].qkv)
        wide = decoder.dtype == torch.float32
        kv, self._kv_size = (np.float32(0), 4) if wide else (np.uint16(0), 2)
        self._team = Team(num_threads, self._tag, kv, self._kv_size)
        self._layers = np.zeros((len(decoder.layers), phases.LAYER_FIELDS), np.int64)
        for index, layer in enumerate(decoder.layers):
            self._describe_layer(index, layer)
        self._final_norm = self._vector(decoder.weights.final_norm)
        self._cache_seen: tuple[weakref.ref[KVCache] | None, int] = (None, -1)
        self._rope_seen = -1
        self._score_slots = 0
        self._allocate()

    def compile(self) -> None:
        """Compile what a step needs, or load it from the disk cache."""
        self._team.compile()

    def embed(self, ids: Sequence[int]) -> Tensor:
        """``[T] -> [T, D]`` float32."""
        return self.decoder.embed(torch.tensor([list(ids)]))[0].float()

    def run_layers(self, hidden: Tensor, cache: KVCache, start: int, first: int, last: int) -> Tensor:
        """Rows ``[T, D]`` at positions ``start ..`` through layers ``first .. last - 1``."""
        rows = hidden.shape[0]
        return self.run_rows(hidden, cache, range(start, start + rows), [True] * rows, first, last)

    def run_rows(
        self,
        hidden: Tensor,
        cache: KVCache,
        positions: Sequence[int],
        writes: Sequence[bool],
        first: int,
        last: int,
    ) -> Tensor:
        """As :meth:`run_layers`, with a position for each row and whether it writes its key and value.

        A row sees all slots up to its own position, those written by this call included.
        """
        rows = self._check_rows(hidden)
        needed = max(positions) + 1
        cache.ensure(needed)
        self._refresh(cache, needed)
        hidden = hidden.detach().to(torch.float32).contiguous()
        if first >= last:  # a command without a barrier would let the caller run ahead of the workers
            return hidden.clone()
        out = torch.empty_like(hidden)
        self._positions[:rows] = positions
        self._writes[:rows] = writes
        self._team.run(
            phases.RUN_LAYERS,
            {
                phases.ROWS: rows,
                phases.FIRST: first,
                phases.LAST: last,
                phases.HIDDEN: hidden.data_ptr(),
                phases.OUT: out.data_ptr(),
            },
        )
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: ``[T, D] -> [T, V]`` float32."""
        return self._multiply(self.decoder.weights.lm_head, hidden, self._final_norm)

    def matmul(self, linear: Linear, x: Tensor) -> Tensor:
        """``x [T, K] -> [T, N]`` float32, for any linear of this decoder's weight format, such as a cut head."""
        return self._multiply(linear, x, 0)

    def close(self) -> None:
        """Stop the worker threads; a later call starts them again."""
        self._team.close()

    def _multiply(self, linear: Linear, x: Tensor, norm: int) -> Tensor:
        rows = self._check_rows(x)
        x = x.detach().to(torch.float32).contiguous()
        if x.shape[1] > self._max_inputs:
            raise ValueError(f"this stepper takes at most {self._max_inputs} inputs, not {x.shape[1]}")
        out = torch.empty(rows, linear.out_features)
        self._team.run(
            phases.RUN_MATMUL,
            {
                phases.ROWS: rows,
                phases.HIDDEN: x.data_ptr(),
                phases.OUT: out.data_ptr(),
                phases.NORM: norm,
                phases.LINEAR: self._descriptor(linear).ctypes.data,
            },
        )
        return out

    def _check_rows(self, x: Tensor) -> int:
        rows = x.shape[0]
        if not 1 <= rows <= MAX_ROWS:
            raise ValueError(f"1 to {MAX_ROWS} rows, not {rows}")
        return rows

    def _kind(self, linear: Linear) -> Any:
        """The tag that chooses the compiled code for ``linear``."""
        if isinstance(linear, Int4Linear):
            return np.uint8(0) if self._int4_block == 64 else np.int32(0)
        if isinstance(linear, Int8Linear):
            return np.int8(0)
        assert isinstance(linear, DenseLinear)
        return np.float32(0) if linear.weight.dtype == torch.float32 else np.uint16(0)

    def _vector(self, tensor: Tensor | None) -> int:
        """Address of a float32 copy (or the tensor itself), kept alive; 0 for None."""
        if tensor is None:
            return 0
        tensor = tensor.detach().to(torch.float32).contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _descriptor(self, linear: Linear, parts: int = 1) -> np.ndarray:
        known = self._linears.get(id(linear))
        if known is not None:
            return known[1]
        if self._kind(linear).dtype != self._tag.dtype:
            raise ValueError("a fused stepper runs linears of one weight format")
        if isinstance(linear, Int4Linear):
            weight, scales = linear.packed, linear.scales_and_zeros.data_ptr()
        elif isinstance(linear, Int8Linear):
            weight, scales = linear.weight, self._vector(linear.scales)
        else:
            assert isinstance(linear, DenseLinear)
            weight, scales = linear.weight, 0
        bias = self._vector(linear.bias)
        fields = [weight.data_ptr(), scales, bias, linear.out_features, linear.in_features, parts]
        described = np.array(fields, np.int64)
        self._linears[id(linear)] = (linear, described)  # the reference keeps the id and the memory
        return described

    def _parts(self, linear: Linear) -> int:
        width = self._int4_block if isinstance(linear, Int4Linear) else matmul.ROW_MAJOR_BLOCK
        blocks = -(-linear.out_features // width)
        return max(1, min(-(-_MIN_TASKS // blocks), linear.in_features // _MIN_PART))

    def _describe_layer(self, index: int, layer: LayerWeights) -> None:
        record = self._layers[index]
        record[phases.ATTN_NORM] = self._vector(layer.attn_norm)
        record[phases.MLP_NORM] = self._vector(layer.mlp_norm)
        record[phases.Q_NORM] = self._vector(layer.q_norm)
        record[phases.K_NORM] = self._vector(layer.k_norm)
        record[phases.WINDOW] = self.decoder.config.sliding_window(index) or 0
        places = (
            (phases.QKV, layer.qkv, self._parts(layer.qkv)),
            (phases.O_PROJ, layer.o, self._parts(layer.o)),
            (phases.GATE_UP_PROJ, layer.gate_up, 1),  # SiLU needs whole sums
            (phases.DOWN_PROJ, layer.down, self._parts(layer.down)),
        )
        for place, linear, parts in places:
            record[place : place + matmul.LINEAR_FIELDS] = self._descriptor(linear, parts)

    def _allocate(self) -> None:
        """Buffers for MAX_ROWS rows, and the control block's constant fields."""
        config, layers = self.decoder.config, self.decoder.layers
        linears = [m for layer in layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        self._max_inputs = max(m.in_features for m in linears)
        splits = max(self._parts(m) for m in linears)
        wide = max(layer.qkv.out_features for layer in layers)
        mixed, inner = config.num_heads * config.head_dim, layers[0].down.in_features
        self._positions, self._writes = np.zeros(MAX_ROWS, np.int64), np.zeros(MAX_ROWS, np.int64)
        self._buffers: list[np.ndarray] = []
        fields = {
            phases.POSITIONS: self._positions.ctypes.data,
            phases.WRITES: self._writes.ctypes.data,
            phases.LAYERS: self._layers.ctypes.data,
            phases.HIDDEN_SIZE: config.hidden_size,
            phases.HEADS: config.num_heads,
            phases.KV_HEADS: config.num_kv_heads,
            phases.HEAD_DIM: config.head_dim,
            phases.EPS: int(np.float32(config.norm_eps).view(np.int32)),
            phases.QKV_BUFFER: self._buffer(splits * wide),
            phases.MIXED: self._buffer(mixed),
            phases.PARTS_BUFFER: self._buffer(splits * config.hidden_size),
            phases.ACT: self._buffer(inner),
            phases.GATE_UP: self._buffer(2 * inner),
        }
        for rank in range(self.num_threads):
            own = phases.RANKS + rank * phases.RANK_FIELDS
            fields[own + phases.OWN_H] = self._buffer(config.hidden_size)
            fields[own + phases.OWN_X] = self._buffer(self._max_inputs)
            fields[own + phases.OWN_SUMS] = self._buffer(-(-self._max_inputs // 32))
            fields[own + phases.OWN_KV] = self._buffer(config.head_dim)
        for field, value in fields.items():
            self._team.control[field] = value

    def _buffer(self, floats_per_row: int) -> int:
        buffer = np.zeros(MAX_ROWS * floats_per_row + 32, np.float32)
        self._buffers.append(buffer)
        return -(-buffer.ctypes.data // 64) * 64

    def _refresh(self, cache: KVCache, num_positions: int) -> None:
        """Follow reallocations of the cache and of the rotary tables."""
        control = self._team.control
        rope = self.decoder.rope
        rope.ensure(num_positions)
        if rope.generation != self._rope_seen:
            self._rope = (rope.cos.contiguous(), rope.sin.contiguous())
            control[phases.COS], control[phases.SIN] = (table.data_ptr() for table in self._rope)
            self._rope_seen = rope.generation
        # By identity, not by address: a new cache may start where a freed one did.
        last, generation = self._cache_seen
        if last is None or last() is not cache or generation != cache.generation:
            self._layers[:, phases.KEYS] = [keys.data_ptr() for keys in cache.keys]
            self._layers[:, phases.VALUES] = [values.data_ptr() for values in cache.values]
            control[phases.CAPACITY] = cache.capacity
            self._cache_seen = (weakref.ref(cache), cache.generation)
        if cache.capacity > self._score_slots:
            self._scores = np.zeros((self.num_threads, cache.capacity + 64), np.float32)
            for rank in range(self.num_threads):
                own = phases.RANKS + rank * phases.RANK_FIELDS
                control[own + phases.OWN_SCORES] = self._scores[rank].ctypes.data
            self._score_slots = cache.capacity
