"""Fused CPU kernels for single-sequence decoding, compiled with numba on first use and cached on disk."""

from __future__ import annotations

import logging
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.stepper import Stepper
from engine.quantization.base import Linear
from engine.quantization.dense import DenseLinear
from engine.quantization.int4 import Int4Linear
from engine.quantization.int4_layout import GROUP_SIZE, torch_block
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
    linears = [m for layer in decoder.layers for m in layer.matrices()]
    linears.append(decoder.weights.lm_head)
    if len({_format(m) for m in linears}) > 1 or _format(linears[0]) is None:
        return "they run int4, int8, bf16 and fp32 weights, one format at a time."
    return _misfit(decoder.config, isinstance(linears[0], Int4Linear))


def takes_tiles(config: ModelConfig, expert: Linear) -> bool:
    """Whether these kernels will run a model's experts, packed as a matrix of one of them is, and want them tiled in a
    store; torch wants its own order."""
    return _misfit(config, isinstance(expert, Int4Linear)) is None


def _misfit(config: ModelConfig, int4: bool) -> str | None:
    """Why the kernels cannot run models of these shapes; None if they can."""
    if config.head_dim % 16 or config.hidden_size % 16:
        return "head and hidden size must be multiples of 16."
    if config.qkv_clip is not None:
        return "they do not clip queries and keys."
    unit = GROUP_SIZE if int4 else 16
    if any(inputs % unit for _, inputs in config.all_matrix_shapes()):
        return f"matrix inputs must be multiples of {unit}."
    if int4 and torch_block() is None:
        return "this torch packs int4 weights in an order that they do not know."
    return None if find_spec("numba") else "numba is not installed."


def make_fused_stepper(decoder: Decoder, num_threads: int | None = None) -> FusedStepper:
    """Build the stepper; compiles (or loads from the cache) the code for the decoder's weight format.

    Args:
        num_threads: None: as many as torch uses.
    """
    began = time.perf_counter()
    from engine.experts.prediction.accelerated import StreamedDecoder
    from engine.kernels.expert_stepper import FusedExpertStepper
    from engine.kernels.stepper import FusedStepper
    from engine.kernels.stream_stepper import FusedStreamStepper

    num_threads = num_threads or torch.get_num_threads()
    if isinstance(decoder, StreamedDecoder):
        stepper: FusedStepper = FusedStreamStepper(decoder, num_threads)
    elif decoder.config.experts is not None:
        stepper = FusedExpertStepper(decoder, num_threads)
    else:
        stepper = FusedStepper(decoder, num_threads)
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
