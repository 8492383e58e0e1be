"""What is noted of logits while they are still in the caches of the thread that computed them: of each block the largest one
and, for a temperature, what the block weighs, the largest one's weight 1. Who looks for likely tokens can then leave out
nearly all of the vocabulary, half of which lies in another core's cache.

A row's notes are its blocks' maxima and then their weights, float32 each, filled up to a multiple of 16 by blocks of nothing
(:class:`engine.decoding.logit_notes.LogitNotes`). A block with a value that is no number has an infinite maximum.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from engine.kernels.compiling import compiled
from engine.kernels.control import BLOCK
from engine.kernels.intrinsics import (
    F32,
    I16,
    LANES,
    VF32,
    get_f32,
    larger,
    load,
    offset,
    put_f32,
    reduce_max,
)
from engine.kernels.rows import exp_one, exp_total


@intrinsic
def _largest_of_block(typingctx: Any, x: Any) -> Any:
    """Of a whole block."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        parts = [load(builder, offset(builder, args[0], 4 * at), VF32) for at in range(0, BLOCK, LANES)]
        best, strange = parts[0], builder.fcmp_unordered("uno", parts[0], parts[0])
        for part in parts[1:]:
            best = larger(builder, best, part)
            strange = builder.or_(strange, builder.fcmp_unordered("uno", part, part))
        is_strange = builder.icmp_unsigned("!=", builder.bitcast(strange, I16), I16(0))
        return builder.select(is_strange, F32(math.inf), reduce_max(builder, best))

    return types.float32(types.int64), codegen


@compiled
def note_block(x: int, count: int, sharpness: float, maximum: int, weight: int) -> None:
    """Note a block of ``count`` logits at ``x``; weigh it unless ``sharpness``, the temperature's inverse, is 0."""
    if count == BLOCK:
        best = _largest_of_block(x)
    else:
        best = np.float32(-math.inf)
        for place in range(count):
            value = get_f32(x + 4 * place)
            best = value if value > best else best
            if value != value:
                best = np.float32(math.inf)
                break
    put_f32(maximum, best)
    if sharpness == 0:
        return
    if count == BLOCK:
        put_f32(weight, exp_total(x, best, sharpness, BLOCK))
    else:
        total = np.float32(0.0)
        for place in range(count):
            total += exp_one((get_f32(x + 4 * place) - best) * sharpness)
        put_f32(weight, total)


@compiled
def note_row(x: int, size: int, sharpness: float, notes: int) -> None:
    """Note all blocks of a row of ``size`` logits."""
    blocks = (size + BLOCK - 1) // BLOCK
    weights = notes + 4 * padded(blocks)
    for block in range(blocks):
        first = block * BLOCK
        note_block(x + 4 * first, min(BLOCK, size - first), sharpness, notes + 4 * block, weights + 4 * block)


@compiled
def padded(blocks: int) -> int:
    """How many blocks a row's notes have room for."""
    return (blocks + LANES - 1) // LANES * LANES
