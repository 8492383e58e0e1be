"""nf4: 4-bit codes of a normal distribution's quantiles in blocks of 64 weights, through bitsandbytes.

On CUDA its own kernels multiply. On CPU a matrix is unpacked to bf16 for each use, so int4 is much faster
there; nf4 is for comparison with what other programs call "4 bit".
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.quantization.base import GroupQuantized, Linear, check_shape

BLOCK_SIZE = 64


class Nf4Linear(Linear):
    """``packed`` codes, two a byte, and bitsandbytes' ``state``: one float32 scale per 64 weights."""

    def __init__(self, packed: Tensor, state: Any, bias: Tensor | None = None) -> None:
        self.packed = packed
        self.state = state
        self.bias = bias
        self.out_features, self.in_features = state.shape

    def __call__(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            return F.linear(x, self._unpack(), self.bias)
        from bitsandbytes import matmul_4bit

        product: Tensor = matmul_4bit(x, self.packed.t(), quant_state=self.state, bias=self.bias)
        return product

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.state.absmax.nbytes

    def tensors(self) -> dict[str, Tensor]:
        return {"packed": self.packed, "scales": self.state.absmax}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Nf4Linear:
        state = copy(self.state)
        state.absmax = tensors["scales"]
        return Nf4Linear(tensors["packed"], state)

    def dequantize(self) -> Tensor:
        return self._unpack().float()

    def _unpack(self) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight: Tensor = dequantize_4bit(self.packed, self.state)  # [N, K] bf16
        return weight


class Nf4Format:
    """Four bits and a float32 scale per 64 weights: four and a half bits per weight."""

    name = "nf4"
    activation_dtype = torch.bfloat16

    def unavailable(self, device: torch.device) -> str | None:
        return bitsandbytes_problem(device)

    def misfit(self, out_features: int, in_features: int) -> str | None:
        if in_features % BLOCK_SIZE:
            return (
                f"a matrix has {in_features} inputs, and nf4 needs a multiple of {BLOCK_SIZE}; choose int8."
            )
        return None

    def pack(self, weight: Tensor | GroupQuantized, bias: Tensor | None, device: torch.device) -> Linear:
        from bitsandbytes.functional import quantize_4bit

        check_shape(self, weight)
        if isinstance(weight, GroupQuantized):
            weight = weight.dequantize()
        # The dtype of what is quantized is the one that it is unpacked to.
        rounded = weight.to(device=device, dtype=torch.bfloat16).contiguous()
        packed, state = quantize_4bit(rounded, blocksize=BLOCK_SIZE, quant_type="nf4")
        return Nf4Linear(
            packed, state, None if bias is None else bias.to(device=device, dtype=torch.bfloat16)
        )

    def bytes_per_weight(self) -> float:
        return 0.5 + 4 / BLOCK_SIZE


def bitsandbytes_problem(device: torch.device) -> str | None:
    """Why bitsandbytes cannot be used on ``device``, as a sentence; None if it can."""
    if find_spec("bitsandbytes") is None:
        return "the package bitsandbytes is not installed."
    if device.type not in ("cpu", "cuda"):
        return f"bitsandbytes is not used on {device.type}."
    return None
