"""Where the codes of int8 CPU matrices lie in the tiles of our own kernels.

A tile is 16 outputs, and four neighbouring inputs are a line of 64 bytes, for the integer instructions add up four
neighbouring products: byte ``4 j + i`` is input ``i`` of output ``j``, plus 128, for those instructions take unsigned
bytes on one side. The last outputs, fewer than a tile, stay rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

_OUTPUTS = 16  # of a tile
_TOGETHER = 4  # inputs of a line
_OUTPUTS_AT_ONCE = 2048  # so that the copy stays small
_SIGN = -128  # exclusive or with it adds 128, or subtracts it


def tile(weight: Tensor) -> None:
    """Put ``weight int8 [N, K]`` into tiles, in place."""
    for rows in weight[: _whole(weight)].split(_OUTPUTS_AT_ONCE):
        lines = rows.view(-1, _OUTPUTS, weight.shape[1] // _TOGETHER, _TOGETHER).transpose(1, 2)
        rows.copy_((lines ^ _SIGN).reshape(rows.shape))


def rows_of(weight: Tensor, outputs: Tensor) -> Tensor:
    """The rows ``int8 [len(outputs), K]`` of some outputs of a tiled matrix."""
    whole, inputs = _whole(weight), weight.shape[1]
    rows = torch.empty(len(outputs), inputs, dtype=torch.int8)
    tiled = outputs < whole
    fours = weight[:whole].view(-1).view(torch.int32).view(-1, inputs // _TOGETHER, _OUTPUTS)
    own = outputs[tiled]
    rows[tiled] = fours[own // _OUTPUTS, :, own % _OUTPUTS].view(torch.int8) ^ _SIGN
    rows[~tiled] = weight[outputs[~tiled]]
    return rows


def untile(weight: Tensor) -> Tensor:
    """The rows ``int8 [N, K]`` of a tiled matrix."""
    return rows_of(weight, torch.arange(weight.shape[0]))


def _whole(weight: Tensor) -> int:
    return weight.shape[0] // _OUTPUTS * _OUTPUTS
