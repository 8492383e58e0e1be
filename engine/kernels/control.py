"""The control block that all threads of a team share, and how they keep step.

All threads run the same code on the same block, an int64 array whose fields are named here. Tasks of a
phase are handed out by a shared counter, so a thread that the machine holds up takes fewer; each task writes
its own outputs, so who ran it leaves no trace in the result.
"""

from __future__ import annotations

from numba import njit

from engine.kernels.intrinsics import atomic_add, atomic_get, get_i64, give_way, pause, put_i64
from engine.kernels.matmul import LINEAR_FIELDS

# In int64 fields; the three counters have cache lines of their own.
SEQUENCE, ARRIVED, TICKETS = 0, 16, 32
(
    COMMAND, THREADS, ROWS, FIRST, LAST, HIDDEN, OUT, POSITIONS, WRITES, LAYERS, COS, SIN, CAPACITY,
    HIDDEN_SIZE, HEADS, KV_HEADS, HEAD_DIM, EPS, QKV_BUFFER, MIXED, PARTS_BUFFER, ACT, GATE_UP, NORM, LINEAR,
) = range(48, 73)  # fmt: skip
# For draft steps. The maps and the head are addresses of descriptors; START_MAP is 0 where there is none.
ADAPTERS, CONDITION, START_MAP, EXIT_MAP, DRAFT_HEAD, DRAFT_BUFFER, DRAFT_LOGITS = range(73, 80)
RANKS = 96  # per thread RANK_FIELDS
RANK_FIELDS = 16
EPOCH, BASE, OWN_H, OWN_X, OWN_ROUNDED, OWN_EXTRAS, OWN_SCORES, OWN_KV, OWN_LOW, OWN_RAISED = range(10)
RUN_LAYERS, RUN_MATMUL, RUN_DRAFT, STOP = range(1, 5)

# A layer's record: norms, window (0: none), cache, then four linears.
ATTN_NORM, MLP_NORM, Q_NORM, K_NORM, WINDOW, KEYS, VALUES, QKV = range(8)
O_PROJ, GATE_UP_PROJ, DOWN_PROJ = QKV + LINEAR_FIELDS, QKV + 2 * LINEAR_FIELDS, QKV + 3 * LINEAR_FIELDS
LAYER_FIELDS = QKV + 4 * LINEAR_FIELDS

# A layer's adapters: two linears each, down to the rank and up again.
Q_ADAPTER, O_ADAPTER, GATE_UP_ADAPTER, DOWN_ADAPTER = (pair * 2 * LINEAR_FIELDS for pair in range(4))
ADAPTER_FIELDS = 8 * LINEAR_FIELDS

_SPINS = 500  # pauses (about 20 us) before a waiting thread lets others have its core


@njit(nogil=True, error_model="numpy")
def wait(control: int, own: int) -> None:
    """Barrier: returns when all threads have arrived."""
    target = get_i64(own + 8 * EPOCH) + get_i64(control + 8 * THREADS)
    put_i64(own + 8 * EPOCH, target)
    atomic_add(control + 8 * ARRIVED, 1)
    spins = 0
    while atomic_get(control + 8 * ARRIVED) < target:
        pause()
        spins += 1
        if spins > _SPINS:
            give_way()


@njit(nogil=True, error_model="numpy")
def take(control: int, own: int) -> int:
    """The next task of this phase."""
    return atomic_add(control + 8 * TICKETS, 1) - get_i64(own + 8 * BASE)


@njit(nogil=True, error_model="numpy")
def finish(control: int, own: int, tasks: int) -> None:
    """End a phase of ``tasks`` tasks. Each thread has drawn one ticket too many."""
    put_i64(own + 8 * BASE, get_i64(own + 8 * BASE) + tasks + get_i64(control + 8 * THREADS))
    wait(control, own)
