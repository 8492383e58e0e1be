"""int8 weights with one scale per output row, through torch's kernel or, in tiles, our own.

Torch's kernel multiplies them as floats; our own round the activations to 8 bits too, and multiply integers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.quantization.base import GroupQuantized, Linear, Tileable, check_shape
from engine.quantization.int8_layout import rows_of, tile, untile

_INPUTS = 16  # that torch's CPU kernel reads at once; on another multiple it reads past the end of the matrix


class Int8Linear(Tileable):
    """``weight int8 [N, K]`` and ``scales bf16 [N]``: ``w = weight * scale``. If ``tiled``, the weight lies in the order
    of our own kernels (:mod:`engine.quantization.int8_layout`). Activations are bf16."""

    def __init__(
        self, weight: Tensor, scales: Tensor, bias: Tensor | None = None, tiled: bool = False
    ) -> None:
        self.weight = weight
        self.scales = scales
        self.bias = bias
        self.tiled = tiled
        self.out_features, self.in_features = weight.shape

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        out = torch._weight_int8pack_mm(rows, untile(self.weight) if self.tiled else self.weight, self.scales)
        if self.bias is not None:
            out = out + self.bias
        return out.view(*x.shape[:-1], self.out_features)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scales.nbytes

    def tile(self) -> None:
        if not self.tiled:
            tile(self.weight)
            self.tiled = True

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "scales": self.scales}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Int8Linear:
        return Int8Linear(tensors["weight"], tensors["scales"], None, self.tiled)

    def dequantize(self) -> Tensor:
        weight = untile(self.weight) if self.tiled else self.weight
        return weight.float() * self.scales.float()[:, None]

    def rows(self, outputs: Tensor, bias: Tensor | None = None) -> Int8Linear:
        """A matrix of the rows that ``outputs`` names, with their own codes and scales, and a ``bias``."""
        weight = rows_of(self.weight, outputs) if self.tiled else self.weight[outputs].contiguous()
        return Int8Linear(weight, self.scales[outputs].contiguous(), bias)


class Int8Format:
    """Symmetric, round to nearest, per output row."""

    name = "int8"
    activation_dtype = torch.bfloat16

    def unavailable(self, device: torch.device) -> str | None:
        if device.type not in ("cpu", "cuda"):
            return f"torch has no int8 kernel for {device.type}."
        return None

    def misfit(self, out_features: int, in_features: int) -> str | None:
        if in_features % _INPUTS:
            return f"a matrix has {in_features} inputs, and int8 needs a multiple of {_INPUTS}; choose bf16."
        return None

    def pack(self, weight: Tensor | GroupQuantized, bias: Tensor | None, device: torch.device) -> Linear:
        check_shape(self, weight)
        if isinstance(weight, GroupQuantized):
            weight = weight.dequantize()
        weight = weight.float()
        # The scale is rounded to bf16 first, so that the codes are fitted to the scale that is used.
        scales = (weight.abs().amax(dim=1) / 127).clamp(min=1e-8).to(torch.bfloat16)
        codes = (weight / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        bias = None if bias is None else bias.to(device=device, dtype=torch.bfloat16)
        return Int8Linear(codes.to(device).contiguous(), scales.to(device), bias)

    def bytes_per_weight(self) -> float:
        return 1.0
