"""Where the codes of torch's packed int4 CPU matrices lie, and the order in which our own kernels like them.

A matrix ``[N, K]`` is cut into blocks of 64 or 32 outputs (with and without AVX-512). In a block each input has
``block / 2`` bytes: output ``j`` in the low half of byte ``j``, output ``block / 2 + j`` in the high half. The
last outputs, fewer than a block, lie as neighbouring pairs.

Interleaved, the lines of two neighbouring inputs are merged byte by byte, 16 bytes of each at a time: the
integer instructions multiply neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP_SIZE = 32
_LANES = 16
_BLOCKS_AT_ONCE = 256


def int4_block() -> int | None:
    """Outputs per block in this machine's CPU int4 layout, found by packing a known matrix; None if unknown."""
    if not hasattr(torch, "_weight_int4pack_mm_for_cpu"):
        return None
    inputs = GROUP_SIZE
    for block in (64, 32):
        outputs = 2 * block + block // 2
        codes = torch.arange(outputs * inputs).mul(7).remainder(31).remainder(16).view(outputs, inputs)
        try:
            packed = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        except RuntimeError:
            return None
        if packed.dtype == torch.uint8 and torch.equal(unpack(packed, inputs, block), codes.to(torch.uint8)):
            return block
    return None


def unpack(packed: Tensor, in_features: int, block: int) -> Tensor:
    """The codes ``uint8 [N, K]`` of a packed matrix, not interleaved."""
    full, tail = _split(packed, in_features, block)
    parts = []
    for some in full.view(-1, in_features, block // 2).split(_BLOCKS_AT_ONCE):
        lines = some.transpose(1, 2)  # [blocks, bytes, K]
        parts.append(torch.cat((lines & 15, lines >> 4), dim=1).flatten(0, 1))
    lines = tail.view(in_features, -1).T
    parts.append(torch.stack((lines & 15, lines >> 4), dim=1).flatten(0, 1))
    return torch.cat(parts)


def interleave(packed: Tensor, in_features: int, block: int) -> None:
    """Interleave a packed matrix, in place."""
    full, _ = _split(packed, in_features, block)
    for some in full.view(-1, 2, block // 2 // _LANES, _LANES).split(_BLOCKS_AT_ONCE * in_features):
        some.view(-1).copy_(some.permute(0, 2, 3, 1).flatten())


def deinterleave(packed: Tensor, in_features: int, block: int) -> Tensor:
    """A copy of an interleaved matrix in torch's order."""
    packed = packed.clone()
    full, _ = _split(packed, in_features, block)
    for some in full.view(-1, block // 2 // _LANES, _LANES, 2).split(_BLOCKS_AT_ONCE * in_features):
        some.view(-1).copy_(some.permute(0, 3, 1, 2).flatten())
    return packed


def _split(packed: Tensor, in_features: int, block: int) -> tuple[Tensor, Tensor]:
    """The bytes of whole blocks, and those of the last outputs."""
    flat = packed.view(-1)
    size = in_features * block // 2
    return flat[: flat.numel() // size * size], flat[flat.numel() // size * size :]
