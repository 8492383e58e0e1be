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
        if packed.dtype == torch.uint8 and torch.equal(
            unpack(packed, inputs, block, torch.arange(outputs)), codes.to(torch.uint8)
        ):
            return block
    return None


def unpack(
    packed: Tensor, in_features: int, block: int, outputs: Tensor, interleaved: bool = False
) -> Tensor:
    """The codes ``uint8 [len(outputs), K]`` of some outputs of a packed matrix, read piece by piece."""
    full, tail = _split(packed, in_features, block)
    blocks = full.view(-1, in_features * block // 2)
    codes = torch.empty(len(outputs), in_features, dtype=torch.uint8)
    for begin in range(0, len(blocks), _BLOCKS_AT_ONCE):
        some = blocks[begin : begin + _BLOCKS_AT_ONCE]
        here = (outputs >= begin * block) & (outputs < (begin + len(some)) * block)
        if here.any():
            some = _separate(some, block) if interleaved else some
            lines = some.view(-1, in_features, block // 2).transpose(1, 2)  # [blocks, bytes, K]
            unpacked = torch.cat((lines & 15, lines >> 4), dim=1).flatten(0, 1)
            codes[here] = unpacked[outputs[here] - begin * block]
    here = outputs >= len(blocks) * block
    if here.any():
        lines = tail.view(in_features, -1).T
        unpacked = torch.stack((lines & 15, lines >> 4), dim=1).flatten(0, 1)
        codes[here] = unpacked[outputs[here] - len(blocks) * block]
    return codes


def interleave(packed: Tensor, in_features: int, block: int) -> None:
    """Interleave a packed matrix, in place."""
    full, _ = _split(packed, in_features, block)
    for some in full.view(-1, 2, block // 2 // _LANES, _LANES).split(_BLOCKS_AT_ONCE * in_features):
        some.view(-1).copy_(some.permute(0, 2, 3, 1).flatten())


def deinterleave(packed: Tensor, in_features: int, block: int) -> Tensor:
    """A copy of an interleaved matrix in torch's order."""
    full, tail = _split(packed, in_features, block)
    return torch.cat((_separate(full, block), tail)).view(packed.shape)


def _separate(full: Tensor, block: int) -> Tensor:
    """Whole interleaved blocks in torch's order, flat."""
    return full.view(-1, block // 2 // _LANES, _LANES, 2).permute(0, 3, 1, 2).flatten()


def _split(packed: Tensor, in_features: int, block: int) -> tuple[Tensor, Tensor]:
    """The bytes of whole blocks, and those of the last outputs."""
    flat = packed.view(-1)
    size = in_features * block // 2
    return flat[: flat.numel() // size * size], flat[flat.numel() // size * size :]
