"""What a thread does with the command in the control block, how workers wait for the next one, and all of it
as native code."""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.kernels.attention_chunks import key_offset
from engine.kernels.attention_tiles import copy_key
from engine.kernels.barrier import SPINS
from engine.kernels.compiling import compile_entry_points, compiled
from engine.kernels.control import (
    CAPACITY,
    COMMAND,
    CREW,
    HEAD_DIM,
    KEYS,
    KV_HEADS,
    LAYER_FIELDS,
    LAYERS,
    MOST_THREADS,
    RANK_FIELDS,
    RANKS,
    ROUND,
    ROWS,
    RUN_ATTENTION,
    RUN_DRAFT,
    RUN_DRAFTS,
    RUN_EXPERTS,
    RUN_FORWARD,
    RUN_LAYERS,
    RUN_MATMUL,
    RUN_ROUND,
    SEEN,
    SEQUENCE,
    STOP,
    THREADS,
    TOOK,
    VALUES,
)
from engine.kernels.draft_chain import run_drafts
from engine.kernels.draft_phases import run_draft
from engine.kernels.expert_pass import run_any_layer
from engine.kernels.expert_phases import run_attention, run_experts
from engine.kernels.forward_phases import forward_through, run_kept_layer, run_layers, run_matmul
from engine.kernels.intrinsics import atomic_get, atomic_put, get_i64, give_way, pause, put_i64, ticks
from engine.kernels.native import Kinds
from engine.kernels.phases import use_rows
from engine.kernels.round_fields import DRAFT_TICKS, TICKS
from engine.kernels.whole_round import accept_rows


def _commands(run_forward: Any) -> Any:
    """What runs the command in the control block as thread ``rank``. The tags choose the types of weights, cache, draft head
    and the weights that draft."""

    @compiled
    def run_round(
        tag: Any, kv: Any, head: Any, draft: Any, kv_size: int, control: int, own: int, rank: int
    ) -> None:
        """Drafts, the pass that verifies them, and, by rank 0, what is accepted."""
        began = ticks()
        run_drafts(draft, kv, head, kv_size, control, own, rank)
        use_rows(control, own, 0, get_i64(control + 8 * ROWS))
        drafted = ticks()
        run_forward(tag, kv, draft, kv_size, control, own, rank)
        if rank == 0:
            accept_rows(control)
            task = get_i64(control + 8 * ROUND)
            put_i64(task + 8 * DRAFT_TICKS, drafted - began)
            put_i64(task + 8 * TICKS, ticks() - began)

    @compiled
    def execute(
        tag: Any, kv: Any, head: Any, draft: Any, kv_size: int, control: int, own: int, rank: int
    ) -> None:
        if get_i64(control + 8 * COMMAND) == RUN_LAYERS:
            run_layers(tag, kv, kv_size, control, own, rank)
        elif get_i64(control + 8 * COMMAND) == RUN_MATMUL:
            run_matmul(tag, control, own)
        elif get_i64(control + 8 * COMMAND) == RUN_FORWARD:
            run_forward(tag, kv, draft, kv_size, control, own, rank)
        elif get_i64(control + 8 * COMMAND) == RUN_DRAFT:
            run_draft(draft, kv, head, kv_size, control, own, rank)
        elif get_i64(control + 8 * COMMAND) == RUN_DRAFTS:
            run_drafts(draft, kv, head, kv_size, control, own, rank)
        elif get_i64(control + 8 * COMMAND) == RUN_ROUND:
            run_round(tag, kv, head, draft, kv_size, control, own, rank)

    return execute


_execute_dense = _commands(forward_through(run_kept_layer))
_execute_sparse = _commands(forward_through(run_any_layer))


@compiled
def _execute_with_experts(
    tag: Any, kv: Any, head: Any, draft: Any, kv_size: int, control: int, own: int, rank: int
) -> None:
    """With the commands for layers with experts."""
    if get_i64(control + 8 * COMMAND) == RUN_ATTENTION:
        run_attention(tag, kv, kv_size, control, own, rank)
    elif get_i64(control + 8 * COMMAND) == RUN_EXPERTS:
        run_experts(tag, control, own, rank)
    else:
        _execute_sparse(tag, kv, head, draft, kv_size, control, own, rank)


def native_code(kinds: Kinds) -> dict[str, tuple[str, bytes]]:
    """The entry points for ``kinds``, compiled for this CPU: of each its symbol and its object file.

    ``work(control, rank, patience)``: rank 0 runs the command and returns. A worker runs each new command,
    and returns when none came for ``patience`` spins of about 25 ns, or one for fewer threads; its field ``SEEN`` is then
    the last one's number, or -1 if that was to stop. ``publish(control)`` tells the workers that there is a command, for
    ``THREADS`` threads.
    ``copy_slot(control, layers, source, target)`` has the caches of so many layers hold the same in two slots.
    """
    names = (kinds.weights, kinds.cache, kinds.draft_head, kinds.draft_layers)
    tag, kv, head, draft = (np.dtype(name).type(0) for name in names)
    kv_size = kv.nbytes
    run = _execute_with_experts if kinds.models == "experts" else _execute_dense

    def work(control: int, rank: int, patience: int) -> None:
        own = control + 8 * (RANKS + rank * RANK_FIELDS)
        spins = 0
        while rank == 0 or spins < patience:
            if rank != 0:
                sequence = atomic_get(control + 8 * SEQUENCE)
                if sequence == get_i64(own + 8 * SEEN):
                    pause()
                    spins += 1
                    if spins % SPINS == 0:  # whoever reads experts from the disk needs a core now and then
                        give_way()
                    continue
                put_i64(own + 8 * SEEN, sequence)
                if rank >= sequence % MOST_THREADS:
                    break
                put_i64(own + 8 * CREW, sequence % MOST_THREADS)
                if get_i64(control + 8 * COMMAND) == STOP:
                    put_i64(own + 8 * SEEN, -1)
                    break
            else:
                put_i64(own + 8 * CREW, get_i64(control + 8 * THREADS))
            began = ticks()
            use_rows(control, own, 0, get_i64(control + 8 * ROWS))
            run(tag, kv, head, draft, kv_size, control, own, rank)
            if rank == 0:
                put_i64(control + 8 * TOOK, get_i64(control + 8 * TOOK) + ticks() - began)
                break
            spins = 0

    def publish(control: int) -> None:
        number = get_i64(control + 8 * SEQUENCE) // MOST_THREADS + 1
        atomic_put(control + 8 * SEQUENCE, number * MOST_THREADS + get_i64(control + 8 * THREADS))

    def copy_slot(control: int, layers: int, source: int, target: int) -> None:
        size = get_i64(control + 8 * HEAD_DIM)
        heads, capacity = get_i64(control + 8 * KV_HEADS), get_i64(control + 8 * CAPACITY)
        for index in range(layers):
            layer = get_i64(control + 8 * LAYERS) + index * (8 * LAYER_FIELDS)
            for head in range(heads):
                keys = get_i64(layer + 8 * KEYS) + head * capacity * size * kv_size
                old, new = key_offset(source, size, kv_size), key_offset(target, size, kv_size)
                copy_key(kv, keys + new, keys + old, size)
                values = get_i64(layer + 8 * VALUES) + head * capacity * size * kv_size
                for word in range(0, size * kv_size, 8):
                    put_i64(
                        values + target * size * kv_size + word,
                        get_i64(values + source * size * kv_size + word),
                    )

    return compile_entry_points(work, publish, copy_slot)
