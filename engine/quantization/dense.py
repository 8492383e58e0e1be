"""Unquantized weights: float32 and bfloat16."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.quantization.base import GroupQuantized, Linear

_ALIGNMENT = 64  # bytes, of torch's own memory


class DenseLinear(Linear):
    """``weight [N, K]`` in float32 or bfloat16, row-major."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self.out_features, self.in_features = weight.shape

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> DenseLinear:
        return DenseLinear(tensors["weight"])

    def dequantize(self) -> Tensor:
        return self.weight.float()


class DenseFormat:
    """fp32 or bf16 (fp64 exists for the losslessness tests)."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self.activation_dtype = dtype

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def misfit(self, out_features: int, in_features: int) -> str | None:
        return None

    def pack(self, weight: Tensor | GroupQuantized, bias: Tensor | None, device: torch.device) -> Linear:
        if isinstance(weight, GroupQuantized):
            weight = weight.dequantize()
        dtype = self.activation_dtype
        packed = weight.to(device=device, dtype=dtype).contiguous()
        if packed.data_ptr() % _ALIGNMENT:  # mapped from a file: how a row is summed may depend on it
            packed = packed.clone()
        return DenseLinear(packed, None if bias is None else bias.to(device=device, dtype=dtype))

    def bytes_per_weight(self) -> float:
        return torch.finfo(self.activation_dtype).bits / 8
