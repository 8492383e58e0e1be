"""Weight formats by name. nf4 and bnb_int8 import bitsandbytes only when used."""

from __future__ import annotations

import torch

from engine.errors import UnsupportedModelError
from engine.quantization.base import GroupQuantized, Linear, WeightFormat
from engine.quantization.bnb_int8 import BnbInt8Format
from engine.quantization.dense import DenseFormat
from engine.quantization.int4 import Int4Format
from engine.quantization.int8 import Int8Format
from engine.quantization.nf4 import Nf4Format

WEIGHT_FORMATS: dict[str, WeightFormat] = {
    "fp64": DenseFormat("fp64", torch.float64),
    "fp32": DenseFormat("fp32", torch.float32),
    "bf16": DenseFormat("bf16", torch.bfloat16),
    "int8": Int8Format(),
    "int4": Int4Format(),
    "nf4": Nf4Format(),
    "bnb_int8": BnbInt8Format(),
}


def get_format(name: str) -> WeightFormat:
    """The format called ``name``.

    Raises:
        UnsupportedModelError: there is none of that name.
    """
    if name not in WEIGHT_FORMATS:
        known = ", ".join(WEIGHT_FORMATS)
        raise UnsupportedModelError(f"There is no weight format {name!r}; choose one of {known}.")
    return WEIGHT_FORMATS[name]


__all__ = ["WEIGHT_FORMATS", "GroupQuantized", "Linear", "WeightFormat", "get_format"]
