"""Trained low-rank adapters, as every thread of the team runs them for itself: cheaper than another barrier."""

from __future__ import annotations

import numpy as np

from engine.kernels.compiling import compiled
from engine.kernels.control import (
    BLOCK,
    INPUTS,
    LINEAR_FIELDS,
    OUTPUTS,
    OWN_EXTRAS,
    OWN_LOW,
    OWN_LOW_EXTRAS,
    OWN_LOW_ROUNDED,
    OWN_RAISED,
    OWN_ROUNDED,
)  # fmt: skip
from engine.kernels.intrinsics import get_i64
from engine.kernels.matmul import multiply_block, prepare_rows
from engine.kernels.rows import add_parts

ADAPTER_TAG = np.int32(0)  # adapters and maps are int8, whatever the model's own format, and come again soon


@compiled
def lower(own: int, adapter: int, x: int, rows: int) -> None:
    """An adapter's first half on some rows, into this thread's own scratch, ready for the second half. Takes the
    scratch of rounded inputs."""
    low, rank = get_i64(own + 8 * OWN_LOW), get_i64(adapter + 8 * OUTPUTS)
    rounded, extras = get_i64(own + 8 * OWN_ROUNDED), get_i64(own + 8 * OWN_EXTRAS)
    x = prepare_rows(ADAPTER_TAG, x, rows, get_i64(adapter + 8 * INPUTS), rounded, extras)
    for output in range(0, rank, BLOCK):
        multiply_block(ADAPTER_TAG, adapter, output, 0, x, extras, low + 4 * output, rank, rows)
    rounded, extras = get_i64(own + 8 * OWN_LOW_ROUNDED), get_i64(own + 8 * OWN_LOW_EXTRAS)
    prepare_rows(ADAPTER_TAG, low, rows, rank, rounded, extras)


@compiled
def add_raised(own: int, adapter: int, first: int, count: int, out: int) -> None:
    """Add outputs ``first .. first + count`` of an adapter's second half to ``out``, of one row; both in 16s."""
    raised = get_i64(own + 8 * OWN_RAISED)
    for output in range(0, count, BLOCK):
        _raise(own, adapter, first + output, 1)
        add_parts(out + 4 * output, raised, 0, 1, min(BLOCK, count - output))


@compiled
def add_raised_rows(own: int, adapter: int, rows: int, out: int) -> None:
    """Add an adapter's second half to ``out``, of the rows that :func:`lower` was given."""
    raised, size = get_i64(own + 8 * OWN_RAISED), get_i64(adapter + 8 * (LINEAR_FIELDS + OUTPUTS))
    for output in range(0, size, BLOCK):
        _raise(own, adapter, output, rows)
        count = min(BLOCK, size - output)
        for row in range(rows):
            add_parts(out + 4 * (row * size + output), raised + 4 * row * BLOCK, 0, 1, count)


@compiled
def _raise(own: int, adapter: int, output: int, rows: int) -> None:
    """A block of an adapter's second half, into this thread's own scratch."""
    up, raised = adapter + 8 * LINEAR_FIELDS, get_i64(own + 8 * OWN_RAISED)
    rounded, extras = get_i64(own + 8 * OWN_LOW_ROUNDED), get_i64(own + 8 * OWN_LOW_EXTRAS)
    multiply_block(ADAPTER_TAG, up, output, 0, rounded, extras, raised, BLOCK, rows)
