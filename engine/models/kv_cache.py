"""Preallocated key/value cache with rollback by position.

Nothing is ever erased: a method that rejects drafted tokens assigns a smaller ``length`` and later writes
overwrite the rest. Capacity doubles on demand, so a short chat does not pay for an 8k context.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.errors import OutOfMemoryError
from engine.models.config import ModelConfig


class KVCache:
    """Keys and values of every layer.

    Attributes:
        keys: per layer ``[B, Hkv, S, hd]``, rotary embedding already applied.
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
        self._allocate(_round_up(max(1, min(capacity, config.context_length))))

    def ensure(self, num_positions: int) -> None:
        """Make room for ``num_positions`` positions, keeping what is there.

        Raises:
            OutOfMemoryError: the machine cannot hold a cache of that size.
        """
        if num_positions > self.capacity:
            self._allocate(_round_up(max(num_positions, min(2 * self.capacity, self.config.context_length))))

    def copy_slot(self, source: int, target: int) -> None:
        """What slot ``source`` holds, into slot ``target``."""
        for part in (*self.keys, *self.values):
            part[:, :, target] = part[:, :, source]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def _allocate(self, capacity: int) -> None:
        config = self.config
        shape = (self._batch, config.num_kv_heads, capacity, config.head_dim)
        try:
            # Zeros, not empty: masked slots are multiplied by zero, and 0 * NaN would not be zero.
            fresh = [
                torch.zeros(shape, dtype=self._dtype, device=self._device)
                for _ in range(2 * config.num_layers)
            ]
        except (RuntimeError, MemoryError) as error:
            raise OutOfMemoryError(
                f"There is not enough memory for a context of {capacity} tokens; "
                "start a new chat or close other programs."
            ) from error
        self.move(fresh[: config.num_layers], fresh[config.num_layers :])

    def move(self, keys: list[Tensor], values: list[Tensor]) -> None:
        """Go on in other tensors, at least as large; what is there is copied."""
        for new, old in zip((*keys, *values), (*self.keys, *self.values), strict=False):
            new[:, :, : self.capacity] = old
        self.keys, self.values = keys, values
        self.capacity = keys[0].shape[2]
        self.generation += 1


def _round_up(n: int, multiple: int = 64) -> int:
    """Attention works on whole blocks of 16 or 64 keys (batch invariance), so capacity is a multiple too."""
    return -(-n // multiple) * multiple
