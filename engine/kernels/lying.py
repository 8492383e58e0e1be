"""Computing a missing expert where it lies (:mod:`engine.experts.in_place`), in native code."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.kernels.compiling import compiled
from engine.kernels.control import LINEAR_FIELDS
from engine.kernels.intrinsics import I64, get_i64, put_i64
from engine.kernels.loads import external
from engine.kernels.slot_loads import ask, get, is_cached, put
from engine.kernels.turn_fields import (
    BLOB_BYTES,
    BLOB_LINEARS,
    FILE,
    IN_WINDOW,
    LIES,
    MAPPED,
    MAY_LIE,
    OFFSETS,
    WINDOW,
    WINDOW_COUNT,
    WINDOW_HEAD,
    WINDOW_SIZE,
)  # fmt: skip

_DROP = 4  # MADV_DONTNEED, on Linux, which alone computes in place


@intrinsic
def _has_byte(typingctx: Any, file: Any, place: Any) -> Any:
    """Whether a file has a byte there."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target = builder.ptrtoint(cgutils.alloca_once(builder, I64), I64)
        descriptor = builder.trunc(args[0], ir.IntType(32))
        found = external(builder, "slipstream_pread", I64, descriptor, target, I64(1), args[1])
        return builder.icmp_signed("==", found, I64(1))

    return types.boolean(types.int64, types.int64), codegen


@intrinsic
def _drop(typingctx: Any, address: Any, size: Any) -> Any:
    """These mapped bytes are not needed in memory."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        external(builder, "slipstream_madvise", ir.IntType(32), *args, ir.IntType(32)(_DROP))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@compiled
def lies(block: int, key: int) -> bool:
    """Whether an expert can be computed where it lies."""
    if not is_cached(block, key):
        return False
    # A mapped file that has become shorter ends the process when it is touched.
    if not _has_byte(
        get_i64(block + 8 * FILE), get(block, OFFSETS, key) + get_i64(block + 8 * BLOB_BYTES) - 1
    ):
        return False
    return get(block, LIES, key) != 0 or ask(block, MAY_LIE, key)


@compiled
def linears_there(block: int, key: int, target: int) -> None:
    """The descriptors of an expert where it lies."""
    base = get_i64(block + 8 * MAPPED) + get(block, OFFSETS, key)
    for field in range(2 * LINEAR_FIELDS):
        is_address = get(block, BLOB_LINEARS, 2 * LINEAR_FIELDS + field)
        put_i64(target + 8 * field, get(block, BLOB_LINEARS, field) + base * is_address)


@compiled
def leave_there(block: int, key: int) -> None:
    """Nobody computes with it any more: it may cease to be this process's memory."""
    if get(block, IN_WINDOW, key) != 0:
        return
    head, many, size = (
        get_i64(block + 8 * WINDOW_HEAD),
        get_i64(block + 8 * WINDOW_COUNT),
        get_i64(block + 8 * WINDOW_SIZE),
    )
    if many == size:
        first = get(block, WINDOW, head)
        put(block, IN_WINDOW, first, 0)
        _drop(get_i64(block + 8 * MAPPED) + get(block, OFFSETS, first), get_i64(block + 8 * BLOB_BYTES))
        put_i64(block + 8 * WINDOW_HEAD, (head + 1) % size)
        many -= 1
    put(block, WINDOW, (get_i64(block + 8 * WINDOW_HEAD) + many) % size, key)
    put(block, IN_WINDOW, key, 1)
    put_i64(block + 8 * WINDOW_COUNT, many + 1)
