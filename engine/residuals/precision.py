"""In which numbers the base model computes while something is trained on it. What is trained stays in float32."""

from __future__ import annotations

from engine.hardware import isa_flags


def training_format(device: str) -> str:
    """The weight format: bf16 where the device multiplies matrices of it several times as fast as of float32. GPUs do, and
    processors with AMX; others save little or nothing by it."""
    return "bf16" if device != "cpu" or "amx_bf16" in isa_flags() else "fp32"
