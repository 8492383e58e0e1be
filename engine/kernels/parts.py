"""Matmuls whose inputs are split into parts, for even work: how many parts their readers find, and adding them up."""

from __future__ import annotations

from engine.kernels.compiling import compiled
from engine.kernels.control import BLOCK, OUTPUTS, PARTS, THREADS
from engine.kernels.intrinsics import get_i64
from engine.kernels.rows import add_parts, copy_row

_ENOUGH = 4  # blocks for each thread


@compiled
def are_joined(control: int, linear: int) -> bool:
    """Whether there are blocks enough for all threads even so: then one thread does all parts of a block and adds them up.
    Its readers find one, of which half as much lies in another core's cache."""
    blocks = (get_i64(linear + 8 * OUTPUTS) + BLOCK - 1) // BLOCK
    return get_i64(linear + 8 * PARTS) > 1 and blocks >= _ENOUGH * get_i64(control + 8 * THREADS)


@compiled
def parts_left(control: int, linear: int) -> int:
    """How many parts of its outputs the readers of a linear find."""
    return 1 if are_joined(control, linear) else get_i64(linear + 8 * PARTS)


@compiled
def join_parts(out: int, source: int, step: int, parts: int, count: int) -> None:
    """Parts of ``count`` outputs, ``step`` bytes apart, added up in their order, whoever does it."""
    copy_row(out, source, count)
    for part in range(1, parts):
        add_parts(out, source + part * step, 0, 1, count)
