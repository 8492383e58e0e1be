"""bnb_int8: weights and activations in int8, multiplied as integers by bitsandbytes (LLM.int8, arXiv 2208.07339).

The rows of the activations are rounded to int8 as well, each with its own scale and without the paper's
16-bit outliers, so this is rougher than ``int8``. It is meant for GPUs, whose tensor cores multiply int8.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.quantization.base import GroupQuantized, Linear, check_shape
from engine.quantization.nf4 import bitsandbytes_problem

_LARGEST = 127
_INPUTS = 16  # that an integer kernel takes at once


class BnbInt8Linear(Linear):
    """``weight int8 [N, K]`` and ``scales float32 [N]``: ``w = weight * scale``."""

    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.scales = scales
        self.bias = bias
        self.out_features, self.in_features = weight.shape

    def __call__(self, x: Tensor) -> Tensor:
        from bitsandbytes.functional import int8_linear_matmul

        codes, row_scales = quantize_rows(x.reshape(-1, self.in_features))
        sums = int8_linear_matmul(codes, self.weight)  # int32 [T, N]: exact, whatever rows share the batch
        out = sums.float() * row_scales[:, None] * self.scales
        if self.bias is not None:
            out = out + self.bias
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scales.nbytes

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "scales": self.scales}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> BnbInt8Linear:
        return BnbInt8Linear(tensors["weight"], tensors["scales"])

    def dequantize(self) -> Tensor:
        return self.weight.float() * self.scales[:, None]


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``[T, K]`` -> int8 codes ``[T, K]`` and float32 scales ``[T]``, symmetric, round to nearest.

    bitsandbytes has a function for it that takes float16 only, which overflows on activations of some models.
    """
    wide = rows.float()
    scales = (wide.abs().amax(dim=1) / _LARGEST).clamp(min=1e-12)
    return (wide / scales[:, None]).round().to(torch.int8), scales


class BnbInt8Format:
    """One byte per weight and a float32 scale per output row."""

    name = "bnb_int8"
    activation_dtype = torch.bfloat16

    def unavailable(self, device: torch.device) -> str | None:
        return bitsandbytes_problem(device)

    def misfit(self, out_features: int, in_features: int) -> str | None:
        if in_features % _INPUTS:
            return (
                f"a matrix has {in_features} inputs, and bnb_int8 needs a multiple of {_INPUTS}; choose bf16."
            )
        return None

    def pack(self, weight: Tensor | GroupQuantized, bias: Tensor | None, device: torch.device) -> Linear:
        check_shape(self, weight)
        if isinstance(weight, GroupQuantized):
            weight = weight.dequantize()
        codes, scales = quantize_rows(weight.to(device))
        return BnbInt8Linear(codes.contiguous(), scales, None if bias is None else bias.to(device))

    def bytes_per_weight(self) -> float:
        return 1.0
