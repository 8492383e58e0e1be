"""In which numbers the base model computes while something is trained on it. What is trained stays in float32."""

from __future__ import annotations

import torch


def training_format(device: str) -> str:
    """The weight format: bf16 where the device multiplies matrices of it several times as fast as of float32. GPUs do, and
    processors with AMX; others save little or nothing by it."""
    return "bf16" if device != "cpu" or _multiplies_bf16_tiles() else "fp32"


def _multiplies_bf16_tiles() -> bool:
    tells = getattr(torch.cpu, "_is_amx_tile_supported", None)  # private: it may go, or be missing
    return bool(tells()) if tells is not None else False
