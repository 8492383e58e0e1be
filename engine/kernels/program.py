"""What a thread does with the command in the control block, and how workers wait for the next one."""

from __future__ import annotations

from typing import Any

from numba import njit

from engine.kernels.control import (
    COMMAND,
    RANK_FIELDS,
    RANKS,
    RUN_DRAFT,
    RUN_LAYERS,
    RUN_MATMUL,
    SEQUENCE,
    STOP,
)
from engine.kernels.draft_phases import run_draft
from engine.kernels.intrinsics import atomic_add, atomic_get, get_i64, pause
from engine.kernels.phases import run_layers, run_matmul


@njit(nogil=True, cache=True, error_model="numpy")
def execute(tag: Any, kv: Any, head: Any, kv_size: int, control: int, rank: int) -> None:
    """Run the command in the control block as thread ``rank``. The tags choose the types of weights, cache
    and draft head."""
    own = control + 8 * (RANKS + rank * RANK_FIELDS)
    if get_i64(control + 8 * COMMAND) == RUN_LAYERS:
        run_layers(tag, kv, kv_size, control, own, rank)
    elif get_i64(control + 8 * COMMAND) == RUN_MATMUL:
        run_matmul(tag, control, own)
    elif get_i64(control + 8 * COMMAND) == RUN_DRAFT:
        run_draft(tag, kv, head, kv_size, control, own, rank)


@njit(nogil=True, cache=True, error_model="numpy")
def serve(
    tag: Any, kv: Any, head: Any, kv_size: int, control: int, rank: int, seen: int, patience: int
) -> int:
    """A worker's loop: run each new command; return the last one's number when none came for a while.

    ``patience`` is in spins of about 40 ns.
    """
    spins = 0
    while spins < patience:
        if atomic_get(control + 8 * SEQUENCE) == seen:
            pause()
            spins += 1
            continue
        seen += 1
        if get_i64(control + 8 * COMMAND) == STOP:
            return -1
        execute(tag, kv, head, kv_size, control, rank)
        spins = 0
    return seen


@njit(nogil=True, cache=True, error_model="numpy")
def publish(control: int) -> None:
    """Tell the workers that a command is in the control block."""
    atomic_add(control + 8 * SEQUENCE, 1)
