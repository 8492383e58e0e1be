"""Preallocated key/value cache with rollback by position.

Nothing is ever erased: a method that rejects drafted tokens assigns a smaller ``length`` and later writes
overwrite the rest. Capacity doubles on demand, so a short chat does not pay for an 8k context.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.errors import OutOfMemoryError
from engine.hardware import return_free_memory
from engine.models.config import ModelConfig

KEY_BLOCK = 64  # slots
_LARGE = 1 << 20  # bytes of a layer's values; less is not worth giving back


class KVCache:
    """Keys and values of every layer. What is read a step at a time by the CPU, that is of one sequence, has its keys in
    blocks of ``KEY_BLOCK`` slots, in each of which a dimension's numbers lie slot beside slot: as the kernels add them up.

    Attributes:
        keys: per layer ``[B, Hkv, S, hd]``, or in blocks, ``[B, Hkv, S / KEY_BLOCK, hd, KEY_BLOCK]``; rotary embedding
            already applied. :meth:`read` and :meth:`write` know which.
        values: per layer ``[B, Hkv, S, hd]``.
        length: positions ``[0, length)`` hold verified content; assign a smaller value to roll back.
        capacity: ``S``.
        generation: grows by one at each reallocation, so that holders of raw pointers notice.
    """

    def __init__(
        self,
        config: ModelConfig,
        capacity: int,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.capacity = 0
        self.length = 0
        self.generation = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._batch, self._dtype, self._device = batch, dtype, device
        self._in_blocks = batch == 1 and torch.device(device).type == "cpu"
        self._allocate(_round_up(max(1, min(capacity, config.context_length))))

    def ensure(self, num_positions: int) -> None:
        """Make room for ``num_positions`` positions, keeping what is there.

        Raises:
            OutOfMemoryError: the machine cannot hold a cache of that size.
        """
        if num_positions > self.capacity:
            self._allocate(_round_up(max(num_positions, min(2 * self.capacity, self.config.context_length))))

    def read(self, index: int, num_slots: int) -> tuple[Tensor, Tensor]:
        """Keys and values of layer ``index`` in the first slots, each ``[B, Hkv, num_slots, hd]``; keys in blocks are
        copied."""
        keys, values = self.keys[index], self.values[index][:, :, :num_slots]
        if self._in_blocks:
            blocks = keys[:, :, : -(-num_slots // KEY_BLOCK)]
            return blocks.transpose(-1, -2).flatten(2, 3)[:, :, :num_slots], values
        return keys[:, :, :num_slots], values

    def write(self, index: int, slots: Tensor, k: Tensor, v: Tensor, first: int = 0) -> None:
        """Write k, v ``[B, T, Hkv, hd]`` into layer ``index``, in ``slots`` ``[B, T]`` of sequences from ``first`` on."""
        keys, values = self.keys[index], self.values[index]
        if self._batch == 1 and not self._in_blocks:
            for part, rows in ((keys, k), (values, v)):
                part.index_copy_(2, slots[0], rows.transpose(1, 2).to(part.dtype))
            return
        batch = torch.arange(first, first + slots.shape[0], device=slots.device)[:, None]
        if self._in_blocks:
            keys[batch, :, slots // KEY_BLOCK, :, slots % KEY_BLOCK] = k.to(keys.dtype)
        else:
            keys[batch, :, slots] = k.to(keys.dtype)
        values[batch, :, slots] = v.to(values.dtype)

    def copy_slot(self, source: int | Tensor, target: int | Tensor) -> None:
        """What slot ``source`` holds, into slot ``target``; or the only ones of ``[1]`` each."""
        for keys, values in zip(self.keys, self.values, strict=True):
            if self._in_blocks:
                old = keys[:, :, source // KEY_BLOCK, :, source % KEY_BLOCK]
                keys[:, :, target // KEY_BLOCK, :, target % KEY_BLOCK] = old
            else:
                keys[:, :, target] = keys[:, :, source]
            values[:, :, target] = values[:, :, source]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def _allocate(self, capacity: int) -> None:
        config = self.config
        heads, size = (self._batch, config.num_kv_heads), config.head_dim
        shape = (*heads, capacity, size)
        blocks = (*heads, capacity // KEY_BLOCK, size, KEY_BLOCK) if self._in_blocks else shape
        # Lists of its own: those that it was moved to are somebody else's as well.
        nothing = [torch.empty(0)] * config.num_layers
        self.keys, self.values = list(self.keys or nothing), list(self.values or nothing)
        before = [[part.shape for part in parts] for parts in (self.keys, self.values)]
        try:
            # Layer by layer: the old ones of all layers beside the new would take half as much again.
            for place in range(config.num_layers):
                if self.values[place].nbytes >= _LARGE:
                    return_free_memory()  # of the layers before, and what a prompt has left behind
                self.keys[place] = self._resized(self.keys[place], blocks)
                self.values[place] = self._resized(self.values[place], shape)
        except (RuntimeError, MemoryError) as error:
            if self.capacity:
                self._give_back(*before)
            raise OutOfMemoryError(
                f"There is not enough memory for a context of {capacity} tokens; "
                "start a new chat or close other programs."
            ) from error
        self.capacity = capacity
        self.generation += 1

    def _resized(self, old: Tensor, form: Sequence[int]) -> Tensor:
        """A tensor of that form, with what both have room for."""
        # Zeros, not empty: masked slots are multiplied by zero, and 0 * NaN would not be zero.
        new = torch.zeros(form, dtype=self._dtype, device=self._device)
        if old.numel():
            common = min(old.shape[2], form[2])
            new[:, :, :common] = old[:, :, :common]
        return new

    def _give_back(self, *before: Sequence[Sequence[int]]) -> None:
        """Some layers have grown, and the others cannot: make all keys and values of the forms that they had."""
        for parts, forms in zip((self.keys, self.values), before, strict=True):
            for place, form in enumerate(forms):
                if parts[place].shape != form:
                    parts[place] = self._resized(parts[place], form)
                    self.generation += 1

    def move(self, keys: list[Tensor], values: list[Tensor]) -> None:
        """Go on in other tensors, at least as large; what is there is copied."""
        for new, old in zip((*keys, *values), (*self.keys, *self.values), strict=False):
            new[:, :, : old.shape[2]] = old
        self.keys, self.values = keys, values
        self.capacity = values[0].shape[2]
        self.generation += 1


def _round_up(n: int) -> int:
    """Attention works on whole blocks of keys (batch invariance), so capacity is a multiple too."""
    return -(-n // KEY_BLOCK) * KEY_BLOCK
