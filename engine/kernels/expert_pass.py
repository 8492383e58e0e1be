"""A layer with experts within a pass through all layers, in one command.

Rank 0 finds out which experts the rows want and puts together the commands' records, as a caller does between the commands of
:mod:`engine.kernels.expert_phases`; the other threads wait for it at a barrier.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.kernels.adapter_phases import add_raised_rows, lower
from engine.kernels.barrier import wait
from engine.kernels.compiling import NONE, compiled
from engine.kernels.control import (
    BEGUN,
    CHOSEN,
    EXPERT_ACT,
    EXPERT_ACTS,
    EXPERT_COUNT,
    EXPERT_FIELDS,
    EXPERT_IN,
    EXPERT_OUT,
    EXPERT_OUTS,
    EXPERTS,
    FIRST,
    GATHERED,
    HIDDEN_SIZE,
    LAYER_FIELDS,
    LAYERS,
    LEFT,
    LINEAR_FIELDS,
    MLP_NORM,
    NUM_EXPERTS,
    NUM_WANTED,
    OUTPUTS,
    OWN_H,
    OWN_ROWS,
    OWN_SIDE,
    OWN_X,
    ROUTER_LOGITS,
    ROUTER_SHARED,
    SOURCES,
    SPARSE_FIELDS,
    SPARSE_INNER,
    SPARSE_LAYERS,
    SPARSE_SHARED,
    SPARSE_TABLE,
    STREAM,
    STREAM_ATTENTION,
    STREAM_ENDS,
    STREAM_FEED_FORWARD,
    STREAM_FIELDS,
    STREAM_RESTARTS,
    THERE,
    TOP_K,
    TURNS,
    WANTED,
    WANTED_ACT,
    WANTED_COUNT,
    WANTED_FIELDS,
    WANTED_IN,
    WANTED_NUMBER,
    WANTED_OUT,
    WEIGHTS,
)  # fmt: skip
from engine.kernels.expert_phases import choose_experts, experts_down_phase, experts_gate_up_phase
from engine.kernels.intrinsics import I64, get_f32, get_i64, put_f32, put_i64
from engine.kernels.lying import linears_there
from engine.kernels.phases import attend_layer, feed_forward, matmul_phase, norm_rows
from engine.kernels.rows import add_scaled, copy_row
from engine.kernels.slot_loads import get, put
from engine.kernels.turn_fields import (
    ASKED,
    CODE,
    DONE,
    FINISH,
    GIVE_UP,
    GROUP,
    IN_USE,
    IN_USE_THERE,
    LAYER,
    LINEARS,
    LOOK_AHEAD,
    NUM_ASKED,
    SLOT_OF,
    START,
    STATES,
    TROUBLE,
)
from engine.kernels.turn_fields import (
    NUM_EXPERTS as EXPERTS_OF_A_LAYER,
)

_NONE = 1 << 62  # more than any expert's number


@intrinsic
def _call(typingctx: Any, code: Any, turns: Any, command: Any, first: Any, second: Any, third: Any) -> Any:
    """An entry point of five integers at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # Numba's calling convention: where to put the result and an exception, of which there are none, come first.
        nowhere = [cgutils.alloca_once(builder, I64) for _ in range(2)]
        kind = ir.FunctionType(ir.IntType(32), [place.type for place in nowhere] + [I64] * 5)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [*nowhere, *args[1:]])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen


@compiled
def _turn(turns: int, command: int, first: int, second: int, third: int) -> None:
    """Have :func:`engine.kernels.turns.native_code`'s ``turn`` do something."""
    _call(get_i64(turns + 8 * CODE), turns, command, first, second, third)


@compiled
def run_any_layer(
    tag: Any, kv: Any, draft: Any, kv_size: int, control: int, own: int, rank: int, index: int
) -> bool:
    """Layer ``index`` on every thread's own copy of the residual rows; False: an expert of it cannot be loaded.

    Where there is a ``STREAM``, its rows lie behind the slow ones.
    """
    sparse = get_i64(control + 8 * SPARSE_LAYERS) + index * (8 * SPARSE_FIELDS)
    layer = get_i64(control + 8 * LAYERS) + index * (8 * LAYER_FIELDS)
    turns, h = get_i64(control + 8 * TURNS), get_i64(own + 8 * OWN_H)
    size, stream = 4 * get_i64(control + 8 * HIDDEN_SIZE), _begin_stream(control, own, index)
    side = get_i64(own + 8 * OWN_SIDE)
    slow = get_i64(own + 8 * OWN_ROWS) - side
    attention = get_i64(stream + 8 * STREAM_ATTENTION) if side != 0 else NONE
    attend_layer(tag, kv, kv_size, control, own, layer, NONE, NONE, attention, side)
    if get_i64(sparse + 8 * OUTPUTS) == 0:
        if rank == 0 and turns != 0:  # its states may tell the experts of the next layer
            _look_ahead(turns, index, h, slow, side, size)
        _end_stream(own, stream, slow)
        feed_forward(tag, control, own, layer, NONE, NONE, False)
        _add_beside(own, stream, slow, size)
        return True
    seen = side
    side = _end_stream(own, stream, slow)
    norm_rows(control, own, get_i64(layer + 8 * MLP_NORM))
    x, logits = get_i64(own + 8 * OWN_X), get_i64(control + 8 * ROUTER_LOGITS)
    matmul_phase(kv, control, own, sparse, x, slow, logits)
    if rank == 0:
        for row in range(slow):
            choose_experts(control, own, sparse, logits, row)
        _follow_slow_rows(control, sparse, slow, side)
        _want(control, sparse, x, slow + side)
        if turns != 0:
            _begin_turn(control, turns, sparse, index, x, slow + side)
        else:
            _take_all(control, sparse, x, slow + side)
    wait(control, own)
    if rank == 0 and turns != 0:  # the others have begun
        _look_ahead(turns, index, h, slow, seen, size)
    _add_beside(own, stream, slow, size)
    left = get_i64(control + 8 * LEFT)
    while left >= 0:
        experts_gate_up_phase(tag, control, own)
        experts_down_phase(tag, control, own)
        if rank == 0 and turns != 0:
            _turn(turns, FINISH, 0, 0, 0)
        if left == 0:
            _add_up(control, own, sparse, slow + side)
            return True
        if rank == 0:
            put_i64(control + 8 * NUM_EXPERTS, 0)
            _take_group(control, turns, True)
        wait(control, own)
        left = get_i64(control + 8 * LEFT)
    return False


@compiled
def _look_ahead(turns: int, index: int, h: int, slow: int, side: int, size: int) -> None:
    """Have the predictor see the states before the feed-forward part: the accelerated ones, if there are any."""
    if side != 0:
        _turn(turns, LOOK_AHEAD, index, h + slow * size, side)
    else:
        _turn(turns, LOOK_AHEAD, index, h, slow)


@compiled
def _begin_stream(control: int, own: int, index: int) -> int:
    """The address of what the accelerated stream does in a layer, 0 if there is none. Where it begins anew, its rows are the
    slow ones.

    While some of a pass's rows wait, which have gone through these layers already, the others have none: what is wanted here
    is in memory, as those have just used it."""
    begun = get_i64(control + 8 * FIRST) if get_i64(control + 8 * BEGUN) != 0 else 0
    if index == 0 or index == begun:
        put_i64(own + 8 * OWN_SIDE, 0)
    if get_i64(control + 8 * STREAM) == 0 or index < begun:
        return 0
    stream = get_i64(control + 8 * STREAM) + index * (8 * STREAM_FIELDS)
    if get_i64(stream + 8 * STREAM_RESTARTS) != 0:
        h, rows = get_i64(own + 8 * OWN_H), get_i64(own + 8 * OWN_ROWS) - get_i64(own + 8 * OWN_SIDE)
        count = rows * get_i64(control + 8 * HIDDEN_SIZE)
        copy_row(h + 4 * count, h, count)
        put_i64(own + 8 * OWN_SIDE, rows)
        put_i64(own + 8 * OWN_ROWS, 2 * rows)
    return stream


@compiled
def _end_stream(own: int, stream: int, slow: int) -> int:
    """Behind a layer's attention part the accelerated rows may have said what they were for; how many are left."""
    if stream != 0 and get_i64(stream + 8 * STREAM_ENDS) != 0:
        put_i64(own + 8 * OWN_SIDE, 0)
        put_i64(own + 8 * OWN_ROWS, slow)
    return get_i64(own + 8 * OWN_SIDE)


@compiled
def _add_beside(own: int, stream: int, slow: int, size: int) -> None:
    """What the adapter beside the feed-forward part makes of the accelerated rows, which are normed."""
    side = get_i64(own + 8 * OWN_SIDE)
    if side != 0:
        adapter = get_i64(stream + 8 * STREAM_FEED_FORWARD)
        lower(own, adapter, get_i64(own + 8 * OWN_X) + slow * size, side)
        add_raised_rows(own, adapter, side, get_i64(own + 8 * OWN_H) + slow * size)


@compiled
def _follow_slow_rows(control: int, sparse: int, slow: int, side: int) -> None:
    """Accelerated rows go through their slow rows' experts."""
    count, places = get_i64(control + 8 * TOP_K), _places(control, sparse)
    chosen, weights = get_i64(control + 8 * CHOSEN), get_i64(control + 8 * WEIGHTS)
    for i in range(side * count):
        put_i64(chosen + 8 * (slow * count + i), get_i64(chosen + 8 * i))
    for i in range(side * places):
        put_f32(weights + 4 * (slow * places + i), get_f32(weights + 4 * i))


@compiled
def _places(control: int, sparse: int) -> int:
    """How many experts, the shared one among them, a row goes through."""
    shared = 0 if get_i64(sparse + 8 * ROUTER_SHARED) == 0 else 1
    return get_i64(control + 8 * TOP_K) + shared


@compiled
def _want(control: int, sparse: int, x: int, rows: int) -> None:
    """Which experts the rows' choices are, by number, and which rows each takes; for each row and place, where its output
    will lie."""
    count, size, inner = (
        get_i64(control + 8 * TOP_K),
        4 * get_i64(control + 8 * HIDDEN_SIZE),
        4 * get_i64(sparse + 8 * SPARSE_INNER),
    )
    chosen, sources, places = (
        get_i64(control + 8 * CHOSEN),
        get_i64(control + 8 * SOURCES),
        _places(control, sparse),
    )
    wanted, out, act, spare = (
        get_i64(control + 8 * WANTED),
        get_i64(control + 8 * EXPERT_OUTS),
        get_i64(control + 8 * EXPERT_ACTS),
        get_i64(control + 8 * GATHERED),
    )
    last, found = -1, 0
    while True:
        number = _NONE
        for choice in range(rows * count):
            if last < get_i64(chosen + 8 * choice) < number:
                number = get_i64(chosen + 8 * choice)
        if number == _NONE:
            break
        first, end, taken = -1, -1, 0
        for row in range(rows):
            for place in range(count):
                if get_i64(chosen + 8 * (row * count + place)) == number:
                    put_i64(sources + 8 * (row * places + place), out + taken * size)
                    first, end, taken = row if taken == 0 else first, row, taken + 1
        alone = end - first + 1 == taken  # neighbours need no copies
        if not alone:
            taken = 0
            for choice in range(rows * count):
                if get_i64(chosen + 8 * choice) == number:
                    copy_row(spare + taken * size, x + choice // count * size, size // 4)
                    taken += 1
        put_i64(wanted + 8 * WANTED_NUMBER, number)
        put_i64(wanted + 8 * WANTED_IN, x + first * size if alone else spare)
        put_i64(wanted + 8 * WANTED_COUNT, taken)
        put_i64(wanted + 8 * WANTED_ACT, act)
        put_i64(wanted + 8 * WANTED_OUT, out)
        wanted, out, act = wanted + 8 * WANTED_FIELDS, out + taken * size, act + taken * inner
        spare += 0 if alone else taken * size
        last, found = number, found + 1
    put_i64(control + 8 * NUM_WANTED, found)
    if places > count:
        put_i64(wanted + 8 * WANTED_ACT, act)  # the shared one's
        put_i64(wanted + 8 * WANTED_OUT, out)
        for row in range(rows):
            put_i64(sources + 8 * (row * places + count), out + row * size)


@compiled
def _take_shared(control: int, sparse: int, x: int, rows: int) -> None:
    """The shared expert is the first to compute, if there is one."""
    put_i64(control + 8 * NUM_EXPERTS, 0)
    if get_i64(sparse + 8 * ROUTER_SHARED) != 0:
        shared = get_i64(control + 8 * WANTED) + get_i64(control + 8 * NUM_WANTED) * (8 * WANTED_FIELDS)
        put_i64(shared + 8 * WANTED_IN, x)
        put_i64(shared + 8 * WANTED_COUNT, rows)
        _record(control, shared, sparse + 8 * SPARSE_SHARED)


@compiled
def _take_all(control: int, sparse: int, x: int, rows: int) -> None:
    """Compute all that is wanted."""
    _take_shared(control, sparse, x, rows)
    table, wanted = get_i64(sparse + 8 * SPARSE_TABLE), get_i64(control + 8 * WANTED)
    for _ in range(get_i64(control + 8 * NUM_WANTED)):
        number = get_i64(wanted + 8 * WANTED_NUMBER)
        _record(control, wanted, table + number * (8 * 2 * LINEAR_FIELDS))
        wanted += 8 * WANTED_FIELDS
    put_i64(control + 8 * LEFT, 0)


@compiled
def _begin_turn(control: int, turns: int, sparse: int, index: int, x: int, rows: int) -> None:
    """Ask for what is wanted, and compute what is in memory."""
    many = get_i64(control + 8 * NUM_WANTED)
    for i in range(many):
        wanted = get_i64(control + 8 * WANTED) + i * (8 * WANTED_FIELDS)
        put(turns, ASKED, i, get_i64(wanted + 8 * WANTED_NUMBER))
    put_i64(turns + 8 * NUM_ASKED, many)
    _turn(turns, START, index, 0, 0)
    _take_shared(control, sparse, x, rows)
    _take_group(control, turns, get_i64(control + 8 * NUM_EXPERTS) == 0)


@compiled
def _linears_of(turns: int, i: int, room: int) -> int:
    """The address of the descriptors of what is asked for and in use."""
    key = get_i64(turns + 8 * LAYER) * get_i64(turns + 8 * EXPERTS_OF_A_LAYER) + get(turns, ASKED, i)
    if get(turns, STATES, i) == IN_USE:
        return get_i64(turns + 8 * LINEARS) + get(turns, SLOT_OF, key) * (8 * 2 * LINEAR_FIELDS)
    linears_there(turns, key, room)
    return room


@compiled
def _take_group(control: int, turns: int, waits: bool) -> None:
    """Compute what has come; wait for something to come, if that ``waits``."""
    _turn(turns, GROUP, 1 if waits else 0, 0, 0)
    if get_i64(turns + 8 * TROUBLE) != 0:
        _turn(turns, GIVE_UP, 0, 0, 0)
        put_i64(control + 8 * LEFT, -1)
        return
    left = 0
    for i in range(get_i64(turns + 8 * NUM_ASKED)):
        wanted, state = get_i64(control + 8 * WANTED) + i * (8 * WANTED_FIELDS), get(turns, STATES, i)
        if state in (IN_USE, IN_USE_THERE):
            _record(control, wanted, _linears_of(turns, i, get_i64(control + 8 * THERE)))
        elif state != DONE:
            left += 1
    put_i64(control + 8 * LEFT, left)


@compiled
def _record(control: int, wanted: int, linears: int) -> None:
    """One more expert for the next command."""
    number = get_i64(control + 8 * NUM_EXPERTS)
    record = get_i64(control + 8 * EXPERTS) + number * (8 * EXPERT_FIELDS)
    for field in range(2 * LINEAR_FIELDS):
        put_i64(record + 8 * field, get_i64(linears + 8 * field))
    put_i64(record + 8 * EXPERT_IN, get_i64(wanted + 8 * WANTED_IN))
    put_i64(record + 8 * EXPERT_COUNT, get_i64(wanted + 8 * WANTED_COUNT))
    put_i64(record + 8 * EXPERT_ACT, get_i64(wanted + 8 * WANTED_ACT))
    put_i64(record + 8 * EXPERT_OUT, get_i64(wanted + 8 * WANTED_OUT))
    put_i64(control + 8 * NUM_EXPERTS, number + 1)


@compiled
def _add_up(control: int, own: int, sparse: int, rows: int) -> None:
    """What came out for each row, place by place, weighted, to this thread's own copy of the residual rows."""
    size, places = get_i64(control + 8 * HIDDEN_SIZE), _places(control, sparse)
    h, weights, sources = (
        get_i64(own + 8 * OWN_H),
        get_i64(control + 8 * WEIGHTS),
        get_i64(control + 8 * SOURCES),
    )
    for row in range(rows):
        for place in range(row * places, (row + 1) * places):
            weight = get_f32(weights + 4 * place)
            if weight != 0.0:
                add_scaled(h + 4 * row * size, get_i64(sources + 8 * place), weight, size)
