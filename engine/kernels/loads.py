"""Threads that read experts from a file, as native code: they never need the interpreter lock, which a thread that
computes gives up only now and then.

A control block holds two rings of requests, what is waited for and what is only expected, and counts what is done. Any
number of threads :func:`serve` it; one asks. A thread without work sleeps in a read from a pipe, and so does whoever
waits for a load; a byte wakes them up.

A load is one read: the system reads from a disk the faster the more it is asked for at once. So that what is only expected
never holds up what is waited for, there is a thread that does the latter alone; or, where an imitated link allows only one
thread, what is expected goes in pieces, and between two of them the thread first does everything that is waited for.
"""

from __future__ import annotations

import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.kernels.compiling import compile_entry_points, compiled
from engine.kernels.intrinsics import (
    I64,
    atomic_add,
    atomic_get,
    get_i64,
    pause,
    pointer,
    put_i64,
)
from engine.kernels.load_fields import (
    ASKED,
    BANDWIDTH,
    CANCELLED,
    CLOSED,
    COMPLETED,
    DEMANDED,
    DESCRIPTOR,
    DONE,
    ENTRIES,
    ENTRY_FIELDS,
    EXPECTED,
    FAILED,
    FREE_AT,
    HEAD,
    LATENCY,
    NEW,
    NUM_BYTES,
    OFFSET,
    QUEUED,
    RING,
    RING_FIELDS,
    RING_SIZE,
    SLEEP_AT,
    SLEEPERS,
    STARTED,
    STATE,
    TAIL,
    TARGET,
    TELL_AT,
    WAIT_AT,
    WAITERS,
    WAKE_AT,
)

PIECE = 1 << 18  # bytes
_ATTEMPTS = 3  # at a read that a signal may have interrupted
_OVERSLEPT = 30_000  # nanoseconds that a sleep may take too long
_MONOTONIC = 6 if sys.platform == "darwin" else 1


def _external(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


@intrinsic
def swap_if(typingctx: Any, address: Any, expected: Any, value: Any) -> Any:
    """Put ``value`` at ``address`` if ``expected`` is there, atomically: 1 if so, else 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = pointer(builder, args[0], I64)
        found = builder.cmpxchg(place, args[1], args[2], "seq_cst", "seq_cst")
        return builder.zext(builder.extract_value(found, 1), I64)

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def read_at(typingctx: Any, descriptor: Any, target: Any, count: Any, offset: Any) -> Any:
    """``pread``: how many bytes came, at most 0 if that failed."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        file = builder.trunc(args[0], ir.IntType(32))
        return _external(builder, "slipstream_pread", I64, file, *args[1:])

    return types.int64(types.int64, types.int64, types.int64, types.int64), codegen


def _of_pipe(name: str) -> Any:
    def declare(typingctx: Any, descriptor: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            place = builder.ptrtoint(cgutils.alloca_once(builder, I64), I64)
            file = builder.trunc(args[0], ir.IntType(32))
            return _external(builder, name, I64, file, place, I64(1))

        return types.int64(types.int64), codegen

    return intrinsic(declare)


sleep_at = _of_pipe("slipstream_read")  # until a byte comes
wake = _of_pipe("slipstream_write")  # one thread


@intrinsic
def nanoseconds(typingctx: Any) -> Any:
    """A clock that only goes forward."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        clock, place = ir.IntType(32)(_MONOTONIC), cgutils.alloca_once(builder, ir.ArrayType(I64, 2))
        _external(builder, "slipstream_clock", ir.IntType(32), clock, builder.ptrtoint(place, I64))
        seconds, rest = (builder.extract_value(builder.load(place), i) for i in (0, 1))
        return builder.add(builder.mul(seconds, I64(1_000_000_000)), rest)

    return types.int64(), codegen


@intrinsic
def sleep_for(typingctx: Any, count: Any) -> Any:
    """``count`` nanoseconds, or some more."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        second = I64(1_000_000_000)
        place = cgutils.alloca_once(builder, ir.ArrayType(I64, 2))
        both = cgutils.pack_array(builder, [builder.sdiv(args[0], second), builder.srem(args[0], second)])
        builder.store(both, place)
        _external(builder, "slipstream_sleep", ir.IntType(32), builder.ptrtoint(place, I64), I64(0))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@compiled
def _wake_one(control: int, sleepers: int, pipe: int) -> None:
    """One of those who sleep, if there are any."""
    while True:
        count = atomic_get(control + 8 * sleepers)
        if count <= 0:
            return
        if swap_if(control + 8 * sleepers, count, count - 1) == 1:
            wake(get_i64(control + 8 * pipe))
            return


@compiled
def _stay_awake(control: int, sleepers: int, pipe: int) -> None:
    """Take back that this thread is going to sleep; the byte of who has seen it already is taken out."""
    while True:
        count = atomic_get(control + 8 * sleepers)
        if count <= 0:
            sleep_at(get_i64(control + 8 * pipe))
            return
        if swap_if(control + 8 * sleepers, count, count - 1) == 1:
            return


@compiled
def _has(control: int, urgency: int) -> bool:
    """Whether requests wait in a ring."""
    ring = control + 8 * (RING + urgency * RING_FIELDS)
    return atomic_get(ring + 8 * HEAD) != atomic_get(ring + 8 * TAIL)


@compiled
def _take(control: int, lowest: int) -> int:
    """Begin the most urgent request that is at least as urgent as ``lowest``: its address, 0 if there is none."""
    for urgency in range(lowest + 1):
        ring = control + 8 * (RING + urgency * RING_FIELDS)
        while True:
            head = atomic_get(ring + 8 * HEAD)
            if head == atomic_get(ring + 8 * TAIL):
                break
            entry = get_i64(control + 8 * ENTRIES) + 8 * ENTRY_FIELDS * get_i64(
                ring + 8 * (TAIL + 1 + head % RING_SIZE)
            )
            if swap_if(ring + 8 * HEAD, head, head + 1) == 1 and swap_if(entry, QUEUED, STARTED) == 1:
                return entry  # else it was cancelled, or is here a second time because it was hurried
    return 0


@compiled
def _carry_piece(control: int, entry: int, done: int, urgent: int) -> int:
    """Read all that is left, or one piece if others may want the link; bytes, or 0 if that failed."""
    count, bandwidth = get_i64(control + 8 * NUM_BYTES) - done, get_i64(control + 8 * BANDWIDTH)
    if bandwidth > 0 and urgent == 0:
        count = min(PIECE, count)
    target, offset = get_i64(entry + 8 * TARGET) + done, get_i64(entry + 8 * OFFSET) + done
    read = 0
    for _ in range(_ATTEMPTS):
        read = read_at(get_i64(control + 8 * DESCRIPTOR), target, count, offset)
        if read > 0:
            break
    if read > 0 and bandwidth > 0:  # then one thread serves alone
        # A load begins when the link is free, whenever this thread came to see it: links need no threads.
        asked, free = get_i64(entry + 8 * ASKED), get_i64(control + 8 * FREE_AT)
        until = max(asked, free) + read * 1_000_000_000 // bandwidth
        if done == 0:
            until += get_i64(control + 8 * LATENCY)
        put_i64(control + 8 * FREE_AT, until)
        left = until - nanoseconds()
        # A load that is waited for ends on time, and until then nobody wants the core. Sleeping a little too long
        # shifts no later load.
        if left > _OVERSLEPT or (left > 0 and urgent == 0):
            sleep_for(left - _OVERSLEPT * urgent)
        while urgent == 1 and nanoseconds() < until:
            pause()
    return max(0, read)


@compiled
def _end(control: int, entry: int, done: int) -> None:
    whole = done == get_i64(control + 8 * NUM_BYTES)
    # Behind the bytes themselves, for who looks.
    swap_if(entry + 8 * STATE, STARTED, DONE if whole else FAILED)
    atomic_add(control + 8 * COMPLETED, 1)
    _wake_one(control, WAITERS, TELL_AT)


@compiled
def _serve_demanded(control: int) -> None:
    size = get_i64(control + 8 * NUM_BYTES)
    while True:
        entry = _take(control, DEMANDED)
        if entry == 0:
            return
        done, read = 0, 1
        while done < size and read > 0:
            read = _carry_piece(control, entry, done, 1)
            done += read
        _end(control, entry, done)


@compiled
def _serve_expected(control: int) -> int:
    """One request; 0 if there is none."""
    size = get_i64(control + 8 * NUM_BYTES)
    entry = _take(control, EXPECTED)
    if entry == 0:
        return 0
    done, read = 0, 1
    while done < size and read > 0:
        if done > 0:
            _serve_demanded(control)
        read = _carry_piece(control, entry, done, 0)
        done += read
    _end(control, entry, done)
    return 1


def native_code() -> dict[str, tuple[str, bytes]]:
    """The entry points, compiled for this CPU: of each its symbol and its object file.

    ``serve(control, lowest)``: does what is asked for, if it is at least as urgent as ``lowest``, until the control block is
    closed. ``submit(control, entry, urgency)``:
    asks for an entry that is ``NEW``, or once more for one that is not. ``cancel(control, entry)``: takes it back if it has not begun; its state tells.
    ``wait(control, seen)``: returns when more than ``seen`` loads have ended.
    """

    def serve(control: int, lowest: int) -> None:
        while atomic_get(control + 8 * CLOSED) == 0:
            _serve_demanded(control)
            if lowest == EXPECTED and _serve_expected(control) == 1:
                continue
            if lowest != EXPECTED and _has(control, EXPECTED):  # who woke this thread may have meant another
                _wake_one(control, SLEEPERS, WAKE_AT)
            atomic_add(control + 8 * SLEEPERS, 1)
            idle = atomic_get(control + 8 * CLOSED) == 0
            for urgency in range(lowest + 1):
                idle = idle and not _has(control, urgency)
            if idle:
                sleep_at(get_i64(control + 8 * SLEEP_AT))
            else:
                _stay_awake(control, SLEEPERS, SLEEP_AT)

    def submit(control: int, entry: int, urgency: int) -> None:
        ring = control + 8 * (RING + urgency * RING_FIELDS)
        tail = atomic_get(ring + 8 * TAIL)
        place = get_i64(control + 8 * ENTRIES) + 8 * ENTRY_FIELDS * entry
        put_i64(place + 8 * ASKED, nanoseconds())
        swap_if(
            place + 8 * STATE, NEW, QUEUED
        )  # behind what else it says: the rings may still hold its number
        put_i64(ring + 8 * (TAIL + 1 + tail % RING_SIZE), entry)
        atomic_add(ring + 8 * TAIL, 1)
        _wake_one(control, SLEEPERS, WAKE_AT)

    def cancel(control: int, entry: int) -> None:
        swap_if(get_i64(control + 8 * ENTRIES) + 8 * ENTRY_FIELDS * entry, QUEUED, CANCELLED)

    def wait(control: int, seen: int) -> None:
        if atomic_get(control + 8 * COMPLETED) > seen:
            return
        atomic_add(control + 8 * WAITERS, 1)
        if atomic_get(control + 8 * COMPLETED) > seen:
            _stay_awake(control, WAITERS, WAIT_AT)
        else:
            sleep_at(get_i64(control + 8 * WAIT_AT))

    return compile_entry_points(serve, submit, cancel, wait)
