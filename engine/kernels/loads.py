"""Threads that read experts from a file, as native code: they never need the interpreter lock, which a thread that
computes gives up only now and then.

A control block holds two rings of requests, what is waited for and what is only expected, and counts what is done. Any
number of threads :func:`serve` it; one asks. A thread without work sleeps in a read from a pipe, and so does whoever
waits for a load; a byte wakes them up.

A load is one read: the system reads from a disk the faster the more it is asked for at once. So that what is only expected
never holds up what is waited for, there is a thread that does the latter alone. An imitated link, for measurements, has no
threads.
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
    ARRIVES,
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
    ON_LINK,
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

_ATTEMPTS = 3  # at a read that a signal may have interrupted
_MONOTONIC = 6 if sys.platform == "darwin" else 1


def external(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
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
        return external(builder, "slipstream_pread", I64, file, *args[1:])

    return types.int64(types.int64, types.int64, types.int64, types.int64), codegen


def _of_pipe(name: str) -> Any:
    def declare(typingctx: Any, descriptor: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            place = builder.ptrtoint(cgutils.alloca_once(builder, I64), I64)
            file = builder.trunc(args[0], ir.IntType(32))
            return external(builder, name, I64, file, place, I64(1))

        return types.int64(types.int64), codegen

    return intrinsic(declare)


sleep_at = _of_pipe("slipstream_read")  # until a byte comes
wake = _of_pipe("slipstream_write")  # one thread


@intrinsic
def nanoseconds(typingctx: Any) -> Any:
    """A clock that only goes forward."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        clock, place = ir.IntType(32)(_MONOTONIC), cgutils.alloca_once(builder, ir.ArrayType(I64, 2))
        external(builder, "slipstream_clock", ir.IntType(32), clock, builder.ptrtoint(place, I64))
        seconds, rest = (builder.extract_value(builder.load(place), i) for i in (0, 1))
        return builder.add(builder.mul(seconds, I64(1_000_000_000)), rest)

    return types.int64(), codegen


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
def _read(control: int, entry: int) -> None:
    """All bytes of a load."""
    size, done, attempts = get_i64(control + 8 * NUM_BYTES), 0, 0
    while done < size and attempts < _ATTEMPTS:
        target, offset = get_i64(entry + 8 * TARGET) + done, get_i64(entry + 8 * OFFSET) + done
        read = read_at(get_i64(control + 8 * DESCRIPTOR), target, size - done, offset)
        done += max(0, read)
        attempts = 0 if read > 0 else attempts + 1
    # Behind the bytes themselves, for who looks.
    swap_if(entry + 8 * STATE, STARTED, DONE if done == size else FAILED)
    atomic_add(control + 8 * COMPLETED, 1)
    _wake_one(control, WAITERS, TELL_AT)


@compiled
def _serve_demanded(control: int) -> None:
    while True:
        entry = _take(control, DEMANDED)
        if entry == 0:
            return
        _read(control, entry)


@compiled
def _next_on_link(control: int, urgency: int) -> int:
    """The address of the next entry that waits in a ring; 0: there is none."""
    ring = control + 8 * (RING + urgency * RING_FIELDS)
    while get_i64(ring + 8 * HEAD) != get_i64(ring + 8 * TAIL):
        place = ring + 8 * (TAIL + 1 + get_i64(ring + 8 * HEAD) % RING_SIZE)
        entry = get_i64(control + 8 * ENTRIES) + 8 * ENTRY_FIELDS * get_i64(place)
        if get_i64(entry + 8 * STATE) == QUEUED:
            return entry
        put_i64(ring + 8 * HEAD, get_i64(ring + 8 * HEAD) + 1)
    return 0


@compiled
def carry(control: int) -> None:
    """What an imitated link has brought by now.

    It carries one load at a time, that which is waited for first, by itself, as a device does: bytes are copied by who asks,
    when they would have come. No thread takes a core for it.
    """
    bandwidth, now = get_i64(control + 8 * BANDWIDTH), nanoseconds()
    while True:
        if get_i64(control + 8 * ON_LINK) == 0:
            free = get_i64(control + 8 * FREE_AT)
            entry, other = _next_on_link(control, DEMANDED), _next_on_link(control, EXPECTED)
            # Whether what is only expected began before the other was asked for.
            if entry == 0 or (
                other != 0 and max(free, get_i64(other + 8 * ASKED)) < get_i64(entry + 8 * ASKED)
            ):
                entry = other
            if entry == 0:
                return
            put_i64(entry + 8 * STATE, STARTED)
            seconds = get_i64(control + 8 * NUM_BYTES) * 1_000_000_000 // bandwidth
            begin = max(free, get_i64(entry + 8 * ASKED)) + get_i64(control + 8 * LATENCY)
            put_i64(control + 8 * ON_LINK, entry)
            put_i64(control + 8 * ARRIVES, begin + seconds)
        if get_i64(control + 8 * ARRIVES) > now:
            return
        _read(control, get_i64(control + 8 * ON_LINK))
        put_i64(control + 8 * FREE_AT, get_i64(control + 8 * ARRIVES))
        put_i64(control + 8 * ON_LINK, 0)


@compiled
def submit(control: int, entry: int, urgency: int) -> None:
    """Ask for an entry that is ``NEW``, or once more for one that is not."""
    ring = control + 8 * (RING + urgency * RING_FIELDS)
    tail = atomic_get(ring + 8 * TAIL)
    place = get_i64(control + 8 * ENTRIES) + 8 * ENTRY_FIELDS * entry
    put_i64(place + 8 * ASKED, nanoseconds())
    swap_if(place + 8 * STATE, NEW, QUEUED)  # behind what else it says: the rings may still hold its number
    put_i64(ring + 8 * (TAIL + 1 + tail % RING_SIZE), entry)
    atomic_add(ring + 8 * TAIL, 1)
    _wake_one(control, SLEEPERS, WAKE_AT)


@compiled
def cancel(control: int, entry: int) -> bool:
    """Take an entry back; whether it had not begun."""
    place = get_i64(control + 8 * ENTRIES) + 8 * ENTRY_FIELDS * entry
    return swap_if(place + 8 * STATE, QUEUED, CANCELLED) == 1


@compiled
def wait_for_more(control: int, seen: int) -> None:
    """Until more than ``seen`` loads have ended."""
    while get_i64(control + 8 * BANDWIDTH) > 0:
        carry(control)
        if atomic_get(control + 8 * COMPLETED) > seen:
            return
        pause()
    if atomic_get(control + 8 * COMPLETED) > seen:
        return
    atomic_add(control + 8 * WAITERS, 1)
    if atomic_get(control + 8 * COMPLETED) > seen:
        _stay_awake(control, WAITERS, WAIT_AT)
    else:
        sleep_at(get_i64(control + 8 * WAIT_AT))


def native_code() -> dict[str, tuple[str, bytes]]:
    """The entry point, compiled for this CPU: its symbol and its object file.

    ``serve(control, lowest)``: does what is asked for, if it is at least as urgent as ``lowest``, until the control block is
    closed.
    """

    def serve(control: int, lowest: int) -> None:
        while atomic_get(control + 8 * CLOSED) == 0:
            _serve_demanded(control)
            expected = _take(control, EXPECTED) if lowest == EXPECTED else 0
            if expected != 0:
                _read(control, expected)
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

    return compile_entry_points(serve)
