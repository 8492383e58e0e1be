"""Batch-invariant attention in plain torch.

Rows must not depend on which other rows share the batch (a verified draft must equal plain decoding
bit for bit), and ``scaled_dot_product_attention`` does not promise that on CPU. Written as one
independent problem per (row, KV head) with keys padded to a multiple of 16, ``bmm`` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

PREFILL_ROWS = 32  # from this many rows on, whole-matrix attention: prefill, where speed comes first
PREFILL_BLOCK = 64  # rows of one attention problem in a prefill, at positions 64 n .. 64 n + 63


class Sight:
    """What rows see of a cache, which is the same in all layers with the same window.

    Attributes:
        positions: ``[B, T]``; a row sees the slots before its position, and its own.
        num_slots: how many of the cache's slots are looked at; slot ``s`` holds position ``s``.
        slots: ``[B, T]``, where each row's own key and value are; None: at its position.
    """

    def __init__(self, positions: Tensor, num_slots: int, slots: Tensor | None = None) -> None:
        self.positions, self.num_slots, self.slots = positions, num_slots, slots
        self._visible: dict[int | None, Tensor] = {}
        self._bias: dict[int | None, Tensor] = {}

    @property
    def own(self) -> Tensor:
        """Where the rows' keys and values go, ``[B, T]``."""
        return self.positions if self.slots is None else self.slots

    def visible(self, window: int | None) -> Tensor:
        """Which positions each row sees, bool ``[B, T, S]``.

        Args:
            window: how many of them, itself included; None: all.
        """
        if window not in self._visible:
            here = self.positions[..., None]
            seen = torch.arange(self.num_slots, device=here.device)
            found = seen <= here
            self._visible[window] = found if window is None else found & (seen > here - window)
        return self._visible[window]

    def order(self) -> Tensor:
        """In which slot each row finds each position, ``[B, T, S]``."""
        assert self.slots is not None
        every = torch.arange(self.num_slots, device=self.slots.device)
        shape = (*self.slots.shape, self.num_slots)
        return every.expand(shape).scatter(2, self.positions[..., None], self.slots[..., None])

    def bias(self, window: int | None, group: int, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of the slots, ``[B, 1, T * group, S]``, for ``group`` heads of each row."""
        if window not in self._bias:
            visible = self.visible(window)
            if self.slots is not None:  # its own slot instead of the one that has its position's number
                every = torch.arange(self.num_slots, device=visible.device)
                visible = visible & (every != self.positions[..., None]) | (every == self.slots[..., None])
            bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            bias.masked_fill_(~visible, float("-inf"))
            self._bias[window] = bias[:, :, None].expand(-1, -1, group, -1).flatten(1, 2)[:, None]
        return self._bias[window]


def attend(q: Tensor, k: Tensor, v: Tensor, sight: Sight, window: int | None) -> Tensor:
    """Causal grouped-query attention by position.

    Args:
        q: ``[B, T, Hq, hd]``.
        k, v: ``[B, Hkv, S, hd]``.
        window: sliding window in positions, the row itself included; None for full attention.

    Returns:
        ``[B, T, Hq * hd]``.
    """
    batch, rows, q_heads, head_dim = q.shape
    kv_heads, slots = k.shape[1], k.shape[2]
    group = q_heads // kv_heads
    scale = head_dim**-0.5
    if rows < PREFILL_ROWS and q.device.type != "cpu":
        # The query heads of one KV head, of all rows, are the rows of one problem: no key is copied.
        grouped = q.unflatten(2, (kv_heads, group)).transpose(1, 2).flatten(2, 3)
        bias = sight.bias(window, group, q.dtype).expand(-1, kv_heads, -1, -1)
        out = torch.nn.functional.scaled_dot_product_attention(grouped, k, v, attn_mask=bias, scale=scale)
        return out.unflatten(2, (rows, group)).transpose(1, 2).reshape(batch, rows, -1)
    visible = sight.visible(window)
    if sight.slots is not None:
        keys, values = (
            torch.stack([one[:, rows] for one, rows in zip(part, sight.order(), strict=True)]).transpose(1, 2)
            for part in (k, v)
        )  # [B, T, Hkv, S, hd]
        return _attend_each(q, keys, values, visible)
    if rows >= PREFILL_ROWS:
        out = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, attn_mask=visible[:, None], scale=scale, enable_gqa=group > 1
        )
        return out.transpose(1, 2).reshape(batch, rows, q_heads * head_dim)
    every = (batch, rows, kv_heads, slots, head_dim)
    return _attend_each(q, k[:, None].expand(every), v[:, None].expand(every), visible)


def _attend_each(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """One problem per (batch, row, kv head), ``[group, hd]`` times ``[hd, S]``; ``k`` and ``v`` are
    ``[B, T, Hkv, S, hd]``."""
    batch, rows, q_heads, head_dim = q.shape
    kv_heads, slots = k.shape[2], k.shape[3]
    problems, group, scale = batch * rows * kv_heads, q_heads // kv_heads, head_dim**-0.5
    queries = q.reshape(problems, group, head_dim)
    keys, values = (part.reshape(problems, slots, head_dim) for part in (k, v))
    scores = torch.bmm(queries, keys.transpose(1, 2)).to(_softmax_dtype(q.dtype)) * scale
    hidden = ~visible[:, :, None, None].expand(batch, rows, kv_heads, 1, slots).reshape(problems, 1, slots)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1).to(q.dtype)
    return torch.bmm(weights, values).view(batch, rows, q_heads * head_dim)


def attend_prefill(q: Tensor, k: Tensor, v: Tensor, first: int, window: int | None) -> Tensor:
    """As :func:`attend` for one sequence, rows at positions ``first ..``, in aligned blocks.

    Each block of 64 positions is one problem of a fixed shape, padded where the rows at hand cover only
    a part of it, so a row's result does not depend on how the prompt was cut into chunks. The cache must
    have room for whole blocks.

    Args:
        q: ``[1, T, Hq, hd]``.
        k, v: ``[1, Hkv, S, hd]``.

    Returns:
        ``[1, T, Hq * hd]``.
    """
    rows, size = q.shape[1], PREFILL_BLOCK
    out = torch.empty_like(q)
    for begin in range(first - first % size, first + rows, size):
        low, high = max(begin, first), min(begin + size, first + rows)
        block = q[:, low - first : high - first]
        if high - low < size:
            padded = q.new_zeros(1, size, *q.shape[2:])
            padded[:, low - begin : high - begin] = block
            block = padded
        end = min(begin + size, k.shape[2])
        positions = torch.arange(begin, begin + size)[:, None]
        visible = torch.arange(end) <= positions
        if window is not None:
            visible &= torch.arange(end) > positions - window
        mixed = torch.nn.functional.scaled_dot_product_attention(
            block.transpose(1, 2), k[:, :, :end], v[:, :, :end], attn_mask=visible,
            scale=q.shape[3] ** -0.5, enable_gqa=q.shape[2] != k.shape[1],
        )  # fmt: skip
        out[:, low - first : high - first] = mixed.transpose(1, 2)[:, low - begin : high - begin]
    return out.flatten(2)


def _softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
