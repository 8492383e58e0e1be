"""Trained low-rank adapters and maps as the kernels read them: int8, whatever the model's own format.

What they make may be wrong, and every byte that is not read is time.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.linears import LinearTable
from engine.quantization.base import Linear
from engine.quantization.int8 import Int8Format
from engine.residuals.accelerator import LowRank

_CPU = torch.device("cpu")


def int8_map(weight: Tensor) -> Linear:
    """``weight [N, K]`` in int8."""
    return Int8Format().pack(weight.detach(), None, _CPU)


def describe_adapter(table: LinearTable, adapter: LowRank) -> np.ndarray:
    """The descriptors of both matrices, one behind the other."""
    return np.concatenate([table.describe(half) for half in _halves(adapter)])


def _halves(adapter: LowRank) -> tuple[Linear, Linear]:
    """Both matrices of an adapter, the rank padded with zeros to what the kernels count in."""
    padding = -adapter.down.shape[0] % 16
    return int8_map(F.pad(adapter.down, (0, 0, 0, padding))), int8_map(F.pad(adapter.up, (0, padding)))
