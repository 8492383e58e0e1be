"""Rows through layers, through one matmul, or through the whole model, as every thread of the team runs them."""

from __future__ import annotations

from typing import Any

from engine.kernels.barrier import take, wait
from engine.kernels.block_notes import note_block, padded
from engine.kernels.compiling import NONE, compiled
from engine.kernels.control import (
    BEGUN,
    BLOCK,
    EMBEDDING,
    FIRST,
    HIDDEN,
    HIDDEN_SIZE,
    IDS,
    INPUTS,
    KEPT_LAYERS,
    LAST,
    LAYER_FIELDS,
    LAYERS,
    LINEAR,
    LOGITS,
    NORM,
    NOTES,
    OUT,
    OUTPUTS,
    OWN_EXTRAS,
    OWN_H,
    OWN_ROUNDED,
    OWN_X,
    ROWS,
    SHARPNESS,
)  # fmt: skip
from engine.kernels.intrinsics import get_f32, get_i64, put_i64
from engine.kernels.matmul import multiply_block, prepare_rows
from engine.kernels.phases import matmul_phase, norm_rows, run_layer, use_rows
from engine.kernels.rows import copy_row, copy_wide

_HEAD_BLOCKS = 4  # of a task


@compiled
def run_layers(tag: Any, kv: Any, kv_size: int, control: int, own: int, rank: int) -> None:
    """Layers ``FIRST .. LAST - 1`` from ``HIDDEN`` to ``OUT``."""
    count = get_i64(control + 8 * ROWS) * get_i64(control + 8 * HIDDEN_SIZE)
    h = get_i64(own + 8 * OWN_H)
    copy_row(h, get_i64(control + 8 * HIDDEN), count)
    last = get_i64(control + 8 * LAST)
    for index in range(get_i64(control + 8 * FIRST), last):
        layer = get_i64(control + 8 * LAYERS) + index * (8 * LAYER_FIELDS)
        # Past the last barrier the caller may already be writing the next command, so only rank 0 goes on.
        run_layer(tag, kv, kv_size, control, own, layer, NONE, rank != 0 and index == last - 1)
    if rank == 0:
        copy_row(get_i64(control + 8 * OUT), h, count)


@compiled
def run_matmul(tag: Any, control: int, own: int) -> None:
    """``OUT = LINEAR(norm(HIDDEN))``; the norm is left out where its address is 0."""
    x, norm = get_i64(control + 8 * HIDDEN), get_i64(control + 8 * NORM)
    rows = get_i64(control + 8 * ROWS)
    if norm != 0:
        copy_row(get_i64(own + 8 * OWN_H), x, rows * get_i64(control + 8 * HIDDEN_SIZE))
        norm_rows(control, own, norm)
        x = get_i64(own + 8 * OWN_X)
    matmul_phase(tag, control, own, get_i64(control + 8 * LINEAR), x, rows, get_i64(control + 8 * OUT))


@compiled
def run_kept_layer(
    tag: Any, kv: Any, draft: Any, kv_size: int, control: int, own: int, rank: int, index: int
) -> bool:
    """A dense layer within a pass. The first ``KEPT_LAYERS`` are read as draft steps read them, to stay in the cache for
    them."""
    layer = get_i64(control + 8 * LAYERS) + index * (8 * LAYER_FIELDS)
    if index < get_i64(control + 8 * KEPT_LAYERS):
        run_layer(draft, kv, kv_size, control, own, layer, NONE, False)
    else:
        run_layer(tag, kv, kv_size, control, own, layer, NONE, False)
    return True


@compiled
def _vocabulary_phase(tag: Any, control: int, own: int, head: int, x: int, rows: int) -> None:
    """The ``head``'s outputs for ``rows`` rows ``x`` to ``LOGITS``, each block noted as soon as it is there."""
    size, logits, notes = (
        get_i64(head + 8 * OUTPUTS),
        get_i64(control + 8 * LOGITS),
        get_i64(control + 8 * NOTES),
    )
    rounded, extras = get_i64(own + 8 * OWN_ROUNDED), get_i64(own + 8 * OWN_EXTRAS)
    sharpness, blocks = get_f32(control + 8 * SHARPNESS), (size + BLOCK - 1) // BLOCK
    weights, step = notes + 4 * padded(blocks), 8 * padded(blocks)
    x = prepare_rows(tag, x, rows, get_i64(head + 8 * INPUTS), rounded, extras)
    tasks = (blocks + _HEAD_BLOCKS - 1) // _HEAD_BLOCKS
    task = take(control, own, tasks)
    while task >= 0:
        first, last = task * _HEAD_BLOCKS, min((task + 1) * _HEAD_BLOCKS, blocks)
        for block in range(first, last):
            output = block * BLOCK
            multiply_block(tag, head, output, 0, x, extras, logits + 4 * output, size, rows)
        for row in range(rows):
            for block in range(first, last):
                output, at = block * BLOCK, row * step + 4 * block
                place = logits + 4 * (row * size + output)
                note_block(place, min(BLOCK, size - output), sharpness, notes + at, weights + at)
        task = take(control, own, tasks)
    wait(control, own)


def forward_through(run_one: Any) -> Any:
    """A pass through layers that ``run_one``, as :func:`run_kept_layer`, runs; False from it ends the pass, on all
    threads."""

    @compiled
    def run_some(
        tag: Any, kv: Any, draft: Any, kv_size: int, control: int, own: int, rank: int, first: int, last: int
    ) -> bool:
        for index in range(first, last):
            if not run_one(tag, kv, draft, kv_size, control, own, rank, index):
                return False
        return True

    @compiled
    def run_forward(tag: Any, kv: Any, draft: Any, kv_size: int, control: int, own: int, rank: int) -> None:
        """``ROWS`` rows through all layers up to ``LAST``, to ``OUT``, and through final norm and head, to ``LOGITS``.

        The first ``BEGUN`` rows are ``FIRST`` layers deep already and lie where the addresses at ``HIDDEN`` say; the
        others are tokens ``IDS``, of the table ``EMBEDDING`` in the cache's type.
        """
        size, rows = get_i64(control + 8 * HIDDEN_SIZE), get_i64(control + 8 * ROWS)
        begun, h = get_i64(control + 8 * BEGUN), get_i64(own + 8 * OWN_H)
        first, last = get_i64(control + 8 * FIRST), get_i64(control + 8 * LAST)
        fresh, table = h + 4 * begun * size, get_i64(control + 8 * EMBEDDING)
        for row in range(rows - begun):
            token = get_i64(get_i64(control + 8 * IDS) + 8 * row)
            copy_wide(kv, fresh + 4 * row * size, table + kv_size * token * size, size)
        if begun != 0:
            if begun < rows:
                put_i64(own + 8 * OWN_H, fresh)
                use_rows(control, own, begun, rows - begun)
                goes_on = run_some(tag, kv, draft, kv_size, control, own, rank, 0, first)
                put_i64(own + 8 * OWN_H, h)
                use_rows(control, own, 0, rows)
                if not goes_on:
                    return
            for row in range(begun):
                copy_row(h + 4 * row * size, get_i64(get_i64(control + 8 * HIDDEN) + 8 * row), size)
        else:
            first = 0
        if not run_some(tag, kv, draft, kv_size, control, own, rank, first, last):
            return
        if rank == 0:
            copy_row(get_i64(control + 8 * OUT), h, rows * size)
        norm_rows(control, own, get_i64(control + 8 * NORM))
        _vocabulary_phase(tag, control, own, get_i64(control + 8 * LINEAR), get_i64(own + 8 * OWN_X), rows)

    return run_forward
