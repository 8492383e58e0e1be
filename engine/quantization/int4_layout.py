"""Where the codes of packed int4 CPU matrices lie: in torch's order, and in the tiles of our own kernels.

**Torch** cuts a matrix ``[N, K]`` into blocks of 64 or 32 outputs (with and without AVX-512). In a block each input has
``block / 2`` bytes: output ``j`` in the low half of byte ``j``, output ``block / 2 + j`` in the high half. The last
outputs, fewer than a block, lie as neighbouring pairs.

**Tiled**, a block is :data:`BLOCK` outputs whatever the machine, and four neighbouring inputs are a line of 64 bytes, for
the integer instructions add up four neighbouring products: byte ``4 j + i`` has input ``i`` of output ``j`` in its low
half and of output ``j + 16`` in its high half. A block's scales and zeros lie together too, ``[K / 32, 32, 2]``, so that
each is one stream. Of the last outputs, fewer than a block, the codes lie as torch has them.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

GROUP_SIZE = 32
BLOCK = 32  # outputs of a tiled block
_HALF = BLOCK // 2
_TOGETHER = 4  # inputs of a line
_OUTPUTS_AT_ONCE = 2048  # a multiple of all blocks


@cache
def torch_block() -> int | None:
    """Outputs per block in torch's layout on this machine, found by packing a known matrix; None if unknown."""
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
    """The codes ``uint8 [N, K]`` of a matrix in torch's order."""
    full, tail = _split(packed, in_features, block)
    lines = full.view(-1, in_features, block // 2).transpose(1, 2)  # [blocks, bytes, K]
    return torch.cat((_halves(lines), _pairs(tail, in_features)))


def tile(packed: Tensor, scales_and_zeros: Tensor, in_features: int, block: int) -> None:
    """Put a matrix in torch's order, ``block`` outputs at once, and its ``scales_and_zeros [K / 32, N, 2]`` into tiles,
    in place."""
    for part in _pieces(packed, in_features):
        part.copy_(_to_tiles(unpack(part, in_features, block)))
    whole = scales_and_zeros.shape[1] // BLOCK * BLOCK
    full = scales_and_zeros[:, :whole].unflatten(1, (-1, BLOCK)).transpose(0, 1)
    moved = torch.cat((full.flatten(), scales_and_zeros[:, whole:].flatten()))
    scales_and_zeros.view(-1).copy_(moved)


def untile(packed: Tensor, in_features: int) -> Tensor:
    """The codes ``uint8 [N, K]`` of a tiled matrix."""
    full, tail = _split(packed, in_features, BLOCK)
    lines = full.view(-1, in_features // _TOGETHER, _HALF, _TOGETHER).transpose(1, 2).flatten(2)
    return torch.cat((_halves(lines), _pairs(tail, in_features)))


def some_codes(packed: Tensor, in_features: int, outputs: Tensor, block: int | None) -> Tensor:
    """The codes ``uint8 [len(outputs), K]`` of some outputs, read piece by piece: of a matrix in torch's order, ``block``
    outputs at once, or (None) of a tiled one."""
    codes = torch.empty(len(outputs), in_features, dtype=torch.uint8)
    for number, part in enumerate(_pieces(packed, in_features)):
        begin = number * _OUTPUTS_AT_ONCE
        here = (outputs >= begin) & (outputs < begin + _OUTPUTS_AT_ONCE)
        if here.any():
            unpacked = untile(part, in_features) if block is None else unpack(part, in_features, block)
            codes[here] = unpacked[outputs[here] - begin]
    return codes


def tiled_scales(scales_and_zeros: Tensor) -> Tensor:
    """A copy of a tiled matrix's scales and zeros as torch has them, ``[K / 32, N, 2]``."""
    groups, outputs, _ = scales_and_zeros.shape
    whole = outputs // BLOCK * BLOCK
    flat = scales_and_zeros.view(-1)
    full, tail = flat[: 2 * whole * groups], flat[2 * whole * groups :]
    full = full.view(-1, groups, BLOCK, 2).transpose(0, 1).flatten(1, 2)
    return torch.cat((full, tail.view(groups, outputs - whole, 2)), dim=1)


def _pieces(packed: Tensor, in_features: int) -> tuple[Tensor, ...]:
    """The bytes of a matrix, a number of outputs at once: in either order they lie in the same place."""
    return packed.view(-1).split(_OUTPUTS_AT_ONCE * in_features // 2)


def _to_tiles(codes: Tensor) -> Tensor:
    outputs, inputs = codes.shape
    whole = outputs // BLOCK * BLOCK
    lines = codes[:whole].view(-1, 2, _HALF, inputs // _TOGETHER, _TOGETHER)
    full = (lines[:, 0] | lines[:, 1] << 4).transpose(1, 2)  # [blocks, lines, outputs, inputs]
    tail = (codes[whole::2] | codes[whole + 1 :: 2] << 4).T
    return torch.cat((full.flatten(), tail.flatten()))


def _halves(lines: Tensor) -> Tensor:
    """The low codes of bytes ``[blocks, outputs, K]``, and behind them the high ones, block by block."""
    return torch.cat((lines & 15, lines >> 4), dim=1).flatten(0, 1)


def _pairs(tail: Tensor, in_features: int) -> Tensor:
    lines = tail.view(in_features, -1).T
    return torch.stack((lines & 15, lines >> 4), dim=1).flatten(0, 1)


def _split(packed: Tensor, in_features: int, block: int) -> tuple[Tensor, Tensor]:
    """The bytes of whole blocks, and those of the last outputs."""
    flat = packed.view(-1)
    size = in_features * block // 2
    return flat[: flat.numel() // size * size], flat[flat.numel() // size * size :]
