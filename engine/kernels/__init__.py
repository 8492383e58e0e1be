"""Fused CPU kernels for single-sequence decoding, compiled with numba on first use and cached on disk."""

from __future__ import annotations

import logging
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from engine.models.decoder import Decoder
from engine.models.stepper import Stepper
from engine.quantization.base import Linear
from engine.quantization.dense import DenseLinear
from engine.quantization.int4 import Int4Linear
from engine.quantization.int4_layout import GROUP_SIZE, int4_block
from engine.quantization.int8 import Int8Linear

if TYPE_CHECKING:
    from engine.kernels.stepper import FusedStepper

_log = logging.getLogger(__name__)


def fused_stepper(decoder: Decoder) -> Stepper | None:
    """A stepper on fused kernels, or None where they do not run."""
    if reason := fused_unavailable(decoder):
        _log.info("fused kernels are off: %s", reason)
        return None
    try:
        return make_fused_stepper(decoder)
    except Exception:  # an LLVM or cache problem must not keep anyone from chatting: torch runs everything
        _log.exception("fused kernels are off")
        return None


def fused_unavailable(decoder: Decoder) -> str | None:
    """Why the fused kernels cannot run this decoder, as a sentence; None if they can."""
    if decoder.device.type != "cpu":
        return "they are for the CPU."
    if decoder.dtype not in (torch.float32, torch.bfloat16):
        return f"they have no {decoder.dtype} activations."
    config = decoder.config
    if config.head_dim % 16 or config.hidden_size % 16:
        return "head and hidden size must be multiples of 16."
    if config.experts is not None:
        return "they run dense models."
    linears = [m for layer in decoder.layers for m in layer.matrices()]
    linears.append(decoder.weights.lm_head)
    if len({_format(m) for m in linears}) > 1 or _format(linears[0]) is None:
        return "they run int4, int8, bf16 and fp32 weights, one format at a time."
    unit = GROUP_SIZE if isinstance(linears[0], Int4Linear) else 16
    if any(m.in_features % unit for m in linears) or (decoder.layers[0].dense.down.in_features % 16):
        return f"matrix inputs must be multiples of {unit}."
    if isinstance(linears[0], Int4Linear):
        block = int4_block()
        if block is None:
            return "this torch packs int4 weights in an order that they do not know."
        if decoder.layers[0].dense.down.in_features % block:
            return f"the feed-forward size must be a multiple of {block} for int4."
    return None if find_spec("numba") else "numba is not installed."


def make_fused_stepper(decoder: Decoder, num_threads: int | None = None) -> FusedStepper:
    """Build the stepper; compiles (or loads from the cache) the code for the decoder's weight format.

    Args:
        num_threads: None: as many as torch uses.
    """
    began = time.perf_counter()
    from engine.kernels.stepper import FusedStepper

    stepper = FusedStepper(decoder, num_threads or torch.get_num_threads(), int4_block())
    _log.info("fused kernels ready after %.1f s", time.perf_counter() - began)
    return stepper


def _format(linear: Linear) -> str | None:
    if isinstance(linear, Int4Linear):
        return "int4"
    if isinstance(linear, Int8Linear):
        return "int8"
    if isinstance(linear, DenseLinear) and linear.weight.dtype in (torch.float32, torch.bfloat16):
        return str(linear.weight.dtype)
    return None
