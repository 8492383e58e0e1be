"""Mapped files whose disk fails, or that somebody cuts, while a model computes with them.

The system ends a process that touches a mapped page which can no longer be read (SIGBUS). Here such a page becomes one of
zeros instead, and the file is noted as broken: whoever computes asks :func:`check_mapped_files` before anything that came
of it is shown. On Linux; elsewhere, and for mappings of other libraries, all stays as it was.
"""

from __future__ import annotations

import logging
import mmap
import platform
import sys
import threading
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import ModelFileError

_log = logging.getLogger(__name__)
_MOST = 64  # mappings at a time; more are not guarded
_HITS = 2 * _MOST  # in the table: beginnings, ends, how many pages of each were lost, and
_ANY = 3 * _MOST  # whether any was
_SIGBUS, _SA_SIGINFO, _SA_ONSTACK = 7, 4, 0x08000000
_ADDRESS_AT = 16  # of the faulting address in siginfo_t
_ACTION_BYTES, _FLAGS_AT = 152, 136  # of struct sigaction
_READ_WRITE, _PRIVATE_ANONYMOUS_FIXED = 3, 0x32

_table = np.zeros(3 * _MOST + 1, np.int64)
_words = _table.data  # a number of which is read sooner so
_old_action = np.zeros(_ACTION_BYTES, np.uint8)
_files: dict[int, Path] = {}  # by their place in the table
_lock = threading.Lock()
_kept: list[Any] = []  # what the handler's code lives in


def map_file(file: Path, writable: bool = False) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of ``file``, mapped and guarded; what is written to them stays in this process.

    Raises:
        OSError, ValueError: it cannot be opened, or is empty.
    """
    with file.open("rb") as handle:
        access = mmap.ACCESS_COPY if writable else mmap.ACCESS_READ
        mapped = mmap.mmap(handle.fileno(), 0, access=access)
    guard_mapping(mapped, file)
    return np.frombuffer(mapped, np.uint8)


def guard_mapping(mapped: mmap.mmap, file: Path) -> bool:
    """Have a page of ``mapped``, which is ``file``'s, be zeros when it cannot be read any more, as long as it is mapped.

    Returns:
        Whether that is so.
    """
    if len(mapped) == 0 or not _is_installed():
        return False
    begin = np.frombuffer(mapped, np.uint8).ctypes.data
    with _lock:
        place = next((number for number in range(_MOST) if number not in _files), None)
        if place is None:
            return False
        _files[place] = file
        _table[place], _table[_MOST + place] = begin, begin + len(mapped)
    weakref.finalize(mapped, _forget, place).atexit = False
    return True


def check_mapped_files() -> None:
    """Raises:
    ModelFileError: a page of a guarded file could not be read, and what was computed since may be wrong.
    """
    if _words[_ANY]:
        with _lock:
            broken = [file for place, file in _files.items() if _table[_HITS + place]]
        if broken:
            raise ModelFileError(
                f"{broken[0].name} can no longer be read from its disk; check the disk, then load the model again."
            )


def _forget(place: int) -> None:
    with _lock:
        _table[[place, _MOST + place, _HITS + place]] = 0
        _table[_ANY] = _table[_HITS:_ANY].any()
        del _files[place]


@cache
def _is_installed() -> bool:
    """Whether the handler is; it is tried once."""
    if sys.platform != "linux" or platform.machine().lower() not in ("x86_64", "aarch64"):
        return False
    try:
        _install()
    except Exception:  # no LLVM, or another libc: as without
        _log.exception("failing disks are not guarded against")
        return False
    return True


def _install() -> None:
    import ctypes

    action = np.zeros(_ACTION_BYTES, np.uint8)
    action[:8].view(np.int64)[0] = _handler()
    action[_FLAGS_AT : _FLAGS_AT + 4].view(np.int32)[0] = _SA_SIGINFO | _SA_ONSTACK
    sigaction = ctypes.CDLL(None, use_errno=True).sigaction
    sigaction.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    if sigaction(_SIGBUS, action.ctypes.data, _old_action.ctypes.data) != 0:
        raise OSError(ctypes.get_errno(), "sigaction")


def _handler() -> int:
    """The address of the signal's handler, machine code that calls nothing of Python: for a guarded page it maps zeros in its
    place and counts it, else it puts the earlier handler back, whom the same fault then reaches."""
    import llvmlite.binding as llvm
    from llvmlite import ir

    i32, i64, nothing = ir.IntType(32), ir.IntType(64), ir.VoidType()
    module = ir.Module()
    map_page = ir.Function(module, ir.FunctionType(i64, [i64, i64, i32, i32, i32, i64]), "mmap")
    act = ir.Function(module, ir.FunctionType(i32, [i32, i64, i64]), "sigaction")
    handler = ir.Function(module, ir.FunctionType(nothing, [i32, i64, i64]), "slipstream_on_bus")
    entry, look, hit, following, other, done = (
        handler.append_basic_block(name) for name in ("entry", "look", "hit", "following", "other", "done")
    )

    def field(builder: Any, place: Any) -> Any:
        at = builder.add(i64(_table.ctypes.data), builder.mul(place, i64(8)))
        return builder.inttoptr(at, i64.as_pointer())

    builder = ir.IRBuilder(entry)
    at = builder.add(handler.args[1], i64(_ADDRESS_AT))
    address = builder.load(builder.inttoptr(at, i64.as_pointer()))
    builder.branch(look)

    builder = ir.IRBuilder(look)
    place = builder.phi(i64)
    place.add_incoming(i64(0), entry)
    begin, end = (builder.load(field(builder, builder.add(place, i64(first)))) for first in (0, _MOST))
    inside = builder.and_(
        builder.icmp_unsigned(">=", address, begin), builder.icmp_unsigned("<", address, end)
    )
    builder.cbranch(inside, hit, following)

    builder = ir.IRBuilder(following)
    after = builder.add(place, i64(1))
    place.add_incoming(after, following)
    builder.cbranch(builder.icmp_unsigned("<", after, i64(_MOST)), look, other)

    builder = ir.IRBuilder(hit)
    page = builder.and_(address, i64(-mmap.PAGESIZE))
    how = (i64(mmap.PAGESIZE), i32(_READ_WRITE), i32(_PRIVATE_ANONYMOUS_FIXED), i32(-1), i64(0))
    mapped = builder.call(map_page, [page, *how])
    count = field(builder, builder.add(place, i64(_HITS)))
    builder.atomic_rmw("add", count, i64(1), "seq_cst")
    builder.store(i64(1), field(builder, i64(_ANY)))
    builder.cbranch(builder.icmp_unsigned("==", mapped, page), done, other)

    builder = ir.IRBuilder(other)
    builder.call(act, [i32(_SIGBUS), i64(_old_action.ctypes.data), i64(0)])
    builder.branch(done)
    ir.IRBuilder(done).ret_void()

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), machine)
    engine.finalize_object()
    _kept.append(engine)
    found: int = engine.get_function_address("slipstream_on_bus")
    return found
