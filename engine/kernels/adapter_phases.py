"""Trained low-rank adapters, as every thread of the team runs them for itself: cheaper than another barrier."""

from __future__ import annotations

import numpy as np
from numba import njit

from engine.kernels.control import BLOCK, LINEAR_FIELDS, OUTPUTS, OWN_LOW, OWN_RAISED
from engine.kernels.intrinsics import get_i64
from engine.kernels.matmul import multiply_block
from engine.kernels.rows import add_parts

ADAPTER_TAG = np.int8(0)  # adapters and maps are int8, whatever the model's own format


@njit(nogil=True, error_model="numpy")
def lower(own: int, adapter: int, x: int) -> None:
    """An adapter's first half on one row, into this thread's own scratch."""
    low = get_i64(own + 8 * OWN_LOW)
    rank = get_i64(adapter + 8 * OUTPUTS)
    for output in range(0, rank, BLOCK):
        multiply_block(ADAPTER_TAG, adapter, output, 0, x, x, low + 4 * output, rank, 1)


@njit(nogil=True, error_model="numpy")
def add_raised(own: int, adapter: int, first: int, count: int, out: int) -> None:
    """Add outputs ``first .. first + count`` of an adapter's second half to ``out``; ``count`` in 16s."""
    up = adapter + 8 * LINEAR_FIELDS
    low, raised = get_i64(own + 8 * OWN_LOW), get_i64(own + 8 * OWN_RAISED)
    for output in range(0, count, BLOCK):
        multiply_block(ADAPTER_TAG, up, first + output, 0, low, low, raised, BLOCK, 1)
        add_parts(out + 4 * output, raised, 0, 1, min(BLOCK, count - output))


@njit(nogil=True, error_model="numpy")
def lower_rows(own: int, adapter: int, x: int, rows: int) -> None:
    """An adapter's first half on some rows, into this thread's own scratch."""
    low, rank = get_i64(own + 8 * OWN_LOW), get_i64(adapter + 8 * OUTPUTS)
    for output in range(0, rank, BLOCK):
        multiply_block(ADAPTER_TAG, adapter, output, 0, x, x, low + 4 * output, rank, rows)


@njit(nogil=True, error_model="numpy")
def add_raised_rows(own: int, adapter: int, rows: int, out: int) -> None:
    """Add an adapter's second half to ``out``, of the rows that :func:`lower_rows` was given."""
    up = adapter + 8 * LINEAR_FIELDS
    low, raised, size = get_i64(own + 8 * OWN_LOW), get_i64(own + 8 * OWN_RAISED), get_i64(up + 8 * OUTPUTS)
    for output in range(0, size, BLOCK):
        multiply_block(ADAPTER_TAG, up, output, 0, low, low, raised, BLOCK, rows)
        count = min(BLOCK, size - output)
        for row in range(rows):
            add_parts(out + 4 * (row * size + output), raised + 4 * row * BLOCK, 0, 1, count)
