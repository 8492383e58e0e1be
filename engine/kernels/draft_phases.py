"""One draft step of the accelerated stream, as every thread of the team runs it.

Row 0 is the slow stream's own row of the token (or, on copies of the layers in another format, near it), row 1 the
accelerated stream's: start map | layers | exit map | draft head. Where some of the layers have experts, the step is run in parts. What each of them is: :mod:`engine.residuals.accelerator`.
"""

from __future__ import annotations

from typing import Any

from engine.kernels.adapter_phases import ADAPTER_TAG
from engine.kernels.barrier import wait
from engine.kernels.compiling import ONE, compiled
from engine.kernels.control import (
    ADAPTER_FIELDS,
    ADAPTERS,
    CONDITION,
    DRAFT_BUFFER,
    DRAFT_HEAD,
    DRAFT_LAYERS,
    DRAFT_LOGITS,
    DRAFT_TOTAL,
    EMBEDDING,
    EPS,
    EXIT_MAP,
    FIRST,
    HIDDEN,
    HIDDEN_SIZE,
    IDS,
    LAST,
    LAYER_FIELDS,
    NO_GAIN,
    NORM,
    OUT,
    OUTPUTS,
    OWN_H,
    OWN_X,
    START_MAP,
)  # fmt: skip
from engine.kernels.intrinsics import get_f32, get_i64, put_f32, top
from engine.kernels.phases import matmul_phase, run_layer
from engine.kernels.rows import add_parts, copy_row, copy_wide, exp_row, norm_row


@compiled
def run_draft(tag: Any, kv: Any, head: Any, kv_size: int, control: int, own: int, rank: int) -> None:
    """Layers ``FIRST .. LAST - 1`` from ``HIDDEN [2, D]`` to ``OUT [2, D]``. A step that begins with layer 0 takes the
    token ``IDS`` instead, and the state of the position before, ``CONDITION [D]``, unnormed or not.

    Where there is an ``EXIT_MAP``, the exit state goes to ``DRAFT_BUFFER``, the draft logits to ``DRAFT_LOGITS`` (as
    powers of e, the best 1), their total and the best logit to ``DRAFT_TOTAL``. ``NORM`` is the final norm's gain.
    """
    size, eps = get_i64(control + 8 * HIDDEN_SIZE), get_f32(control + 8 * EPS)
    h, x, hidden = get_i64(own + 8 * OWN_H), get_i64(own + 8 * OWN_X), get_i64(control + 8 * HIDDEN)
    state, buffer = h + 4 * size, get_i64(control + 8 * DRAFT_BUFFER)
    condition = x + 8 * size  # behind what the layers norm
    norm_row(condition, get_i64(control + 8 * CONDITION), get_i64(control + 8 * NO_GAIN), eps, size)
    first = get_i64(control + 8 * FIRST)
    if first == 0:
        token = get_i64(get_i64(control + 8 * IDS))
        copy_wide(kv, h, get_i64(control + 8 * EMBEDDING) + kv_size * token * size, size)
        copy_row(state, h, size)
        if get_i64(control + 8 * START_MAP) != 0:
            matmul_phase(ADAPTER_TAG, control, own, get_i64(control + 8 * START_MAP), condition, ONE, buffer)
            add_parts(state, buffer, 0, 1, size)
    else:
        copy_row(h, hidden, 2 * size)
    for index in range(first, get_i64(control + 8 * LAST)):
        layer = get_i64(control + 8 * DRAFT_LAYERS) + index * (8 * LAYER_FIELDS)
        adapters = get_i64(control + 8 * ADAPTERS) + index * (8 * ADAPTER_FIELDS)
        run_layer(tag, kv, kv_size, control, own, layer, adapters, False)
    if rank == 0:
        copy_row(get_i64(control + 8 * OUT), h, 2 * size)
    if get_i64(control + 8 * EXIT_MAP) == 0:
        wait(control, own)  # nobody may return while another still reads what the caller will write next
        return
    copy_row(x, state, size)
    copy_row(x + 4 * size, condition, size)
    matmul_phase(ADAPTER_TAG, control, own, get_i64(control + 8 * EXIT_MAP), x, ONE, buffer)
    norm_row(x, buffer, get_i64(control + 8 * NORM), eps, size)
    logits = get_i64(control + 8 * DRAFT_LOGITS)
    matmul_phase(head, control, own, get_i64(control + 8 * DRAFT_HEAD), x, ONE, logits)
    if rank == 0:
        norm_row(buffer, buffer, get_i64(control + 8 * NO_GAIN), eps, size)
        count = get_i64(get_i64(control + 8 * DRAFT_HEAD) + 8 * OUTPUTS)
        total, best = get_i64(control + 8 * DRAFT_TOTAL), top(logits, count)
        put_f32(total, exp_row(logits, best, count))
        put_f32(total + 4, best)
