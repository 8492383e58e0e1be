"""int4 weights in groups of 32 inputs: torch's packed formats (CPU, and tinygemm on CUDA).

The format is asymmetric, ``w = (q - 8) * scale + zero`` with ``scale`` and ``zero`` in bf16 per group
and output, so GGUF's Q4_0, Q4_1 and Q4_K map onto it code by code: ``w = d * q + m`` becomes
``scale = d, zero = m + 8 d``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from engine.quantization.base import GroupQuantized, Linear, Tileable, check_shape
from engine.quantization.int4_layout import (
    GROUP_SIZE,
    some_codes,
    tile,
    tiled_scales,
    torch_block,
    untile,
)

# Large matrices are packed piece by piece, so that the peak stays near the packed size. The packed layout
# has blocks of up to 64 rows, so pieces of 1024 rows join to the same bytes.
_ROWS_AT_ONCE = 1024
_INPUTS_AT_ONCE = 64
_OUTPUTS = 16  # torch packs as many at once


class Int4Linear(Tileable):
    """``packed`` codes in torch's own order for the device and ``scales_and_zeros bf16 [K / 32, N, 2]``; if ``tiled``,
    both in that of our own kernels (:mod:`engine.quantization.int4_layout`)."""

    group_size = GROUP_SIZE

    def __init__(
        self,
        packed: Tensor,
        scales_and_zeros: Tensor,
        in_features: int,
        out_features: int,
        bias: Tensor | None = None,
        tiled: bool = False,
    ) -> None:
        self.packed = packed
        self.scales_and_zeros = scales_and_zeros
        self.in_features = in_features
        self.out_features = out_features
        self.bias = bias
        self.tiled = tiled

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if rows.device.type == "cpu":
            out = torch._weight_int4pack_mm_for_cpu(rows, *self._in_torchs_order())
        else:
            out = torch._weight_int4pack_mm(rows, self.packed, GROUP_SIZE, self.scales_and_zeros)
        if self.bias is not None:
            out = out + self.bias
        return out.view(*x.shape[:-1], self.out_features)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales_and_zeros.nbytes

    def tile(self) -> None:
        if not self.tiled:
            block = torch_block()
            assert block is not None
            tile(self.packed, self.scales_and_zeros, self.in_features, block)
            self.tiled = True

    def tensors(self) -> dict[str, Tensor]:
        return {"packed": self.packed, "scales": self.scales_and_zeros}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Int4Linear:
        return Int4Linear(
            tensors["packed"], tensors["scales"], self.in_features, self.out_features, None, self.tiled
        )

    def dequantize(self) -> Tensor:
        return self.rows(torch.arange(self.out_features, device=self.packed.device)).dequantize()

    def rows(self, outputs: Tensor) -> GroupQuantized:
        """The rows that ``outputs`` names, with their own codes, scales and zeros."""
        block = None if self.tiled or self.packed.device.type != "cpu" else torch_block()
        scales = tiled_scales(self.scales_and_zeros) if self.tiled else self.scales_and_zeros
        scale, zero = scales[:, outputs].float().permute(2, 1, 0)  # each [rows, K / 32]
        if self.tiled or block is not None:
            codes = some_codes(self.packed, self.in_features, outputs, block)
        else:
            codes = self._multiplied_out(outputs, scale, zero)
        return GroupQuantized(codes, scale, zero - 8 * scale)

    def _multiplied_out(self, outputs: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The codes of ``outputs``: multiplying the identity by the matrix reads it in whatever order it is
        packed. At once it would take several times the memory."""
        identity = torch.eye(self.in_features, dtype=torch.bfloat16, device=self.packed.device)
        codes = torch.empty(len(outputs), self.in_features, dtype=torch.uint8, device=self.packed.device)
        bias, self.bias = self.bias, None
        try:
            for begin in range(0, self.in_features, _INPUTS_AT_ONCE):
                strip = slice(begin, min(begin + _INPUTS_AT_ONCE, self.in_features))
                groups = self(identity[strip])[:, outputs].T.float().unflatten(1, (-1, GROUP_SIZE))
                own = slice(strip.start // GROUP_SIZE, strip.stop // GROUP_SIZE)
                exact = (groups - zero[:, own, None]) / scale[:, own, None] + 8
                codes[:, strip] = exact.round().clamp(0, 15).to(torch.uint8).flatten(1)
        finally:
            self.bias = bias
        return codes

    def _in_torchs_order(self) -> tuple[Tensor, int, Tensor]:
        """What torch's CPU kernel takes."""
        if not self.tiled:
            return self.packed, GROUP_SIZE, self.scales_and_zeros
        return _pack(untile(self.packed, self.in_features)), GROUP_SIZE, tiled_scales(self.scales_and_zeros)


def _pack(codes: Tensor) -> Tensor:
    """Codes ``uint8 [N, K]`` in torch's order for the CPU, piece by piece."""
    parts = codes.split(_ROWS_AT_ONCE)
    return torch.cat([torch._convert_weight_to_int4pack_for_cpu(part.int(), 1) for part in parts])


def quantize_groups(weight: Tensor | Iterable[Tensor]) -> GroupQuantized:
    """Round ``weight [N, K]``, whole or in pieces of its rows, to 4 bits per group of 32 inputs, minimum and
    maximum kept.

    The scale and the middle are rounded to bf16 first, and the codes fitted to the rounded values.
    """
    pieces = [weight] if isinstance(weight, Tensor) else weight
    parts = [_quantize_rows(rows) for piece in pieces for rows in piece.split(_ROWS_AT_ONCE)]
    return GroupQuantized(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat([part.minimum for part in parts]),
    )


def _quantize_rows(weight: Tensor) -> GroupQuantized:
    rows, columns = weight.shape
    groups = weight.float().view(rows, columns // GROUP_SIZE, GROUP_SIZE)
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    scale = ((high - low) / 15).clamp(min=1e-8).bfloat16().float()
    zero = (low + 8 * scale).bfloat16().float()
    codes = ((groups - zero[..., None]) / scale[..., None] + 8).round().clamp(0, 15)
    return GroupQuantized(codes.to(torch.uint8).view(rows, columns), scale, zero - 8 * scale)


class Int4Format:
    """Four bits and a bf16 scale and zero per 32 weights: five bits per weight."""

    name = "int4"
    activation_dtype = torch.bfloat16

    def unavailable(self, device: torch.device) -> str | None:
        if device.type == "cpu":
            return (
                None
                if hasattr(torch, "_weight_int4pack_mm_for_cpu")
                else "this torch has no int4 CPU kernel."
            )
        if device.type == "cuda":
            if torch.cuda.get_device_capability(device) < (8, 0):
                return "torch's int4 kernel needs an NVIDIA GPU of compute capability 8.0 or newer."
            return None
        return f"torch has no int4 kernel for {device.type}."

    def misfit(self, out_features: int, in_features: int) -> str | None:
        if in_features % GROUP_SIZE:
            return (
                f"a matrix has {in_features} inputs, and int4 needs a multiple of {GROUP_SIZE}; choose int8."
            )
        if out_features % _OUTPUTS:
            return (
                f"a matrix has {out_features} outputs, and int4 needs a multiple of {_OUTPUTS}; choose int8."
            )
        return None

    def pack(self, weight: Tensor | GroupQuantized, bias: Tensor | None, device: torch.device) -> Linear:
        check_shape(self, weight)
        if not isinstance(weight, GroupQuantized):
            weight = quantize_groups(weight)
        zero = weight.minimum + 8 * weight.scale
        # [N, K/32] twice -> [K/32, N, 2]
        pairs = torch.stack((weight.scale, zero), dim=-1).transpose(0, 1).contiguous().bfloat16()
        out_features, in_features = weight.codes.shape
        if device.type == "cpu":
            packed = _pack(weight.codes)
        else:
            codes = weight.codes.to(device)
            # tinygemm takes two codes a byte, the even column in the high half
            twos = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
            packed = torch._convert_weight_to_int4pack(twos, _inner_k_tiles(in_features))
            pairs = pairs.to(device)
        bias = None if bias is None else bias.to(device=device, dtype=torch.bfloat16)
        return Int4Linear(packed, pairs, in_features, out_features, bias)

    def bytes_per_weight(self) -> float:
        return 0.5 + 4 / GROUP_SIZE


def packed_like(
    out_features: int, in_features: int, device: torch.device
) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the packed codes of a matrix on ``device``."""
    if device.type == "cpu":
        return (out_features, in_features // 2), torch.uint8
    tiles = _inner_k_tiles(in_features)
    return (out_features // 8, in_features // (16 * tiles), 32, tiles // 2), torch.int32


def _inner_k_tiles(in_features: int) -> int:
    """tinygemm's blocking parameter on CUDA: tiles of 16 inputs, joined as far as they divide the inputs."""
    return next(tiles for tiles in (8, 4, 2) if in_features % (16 * tiles) == 0)
