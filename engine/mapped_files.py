"""Mapped files whose disk fails, or that somebody cuts, while a model computes with them.

The system ends a process that touches a mapped page which can no longer be read (SIGBUS). Here such a page becomes one of
zeros instead, and the file is noted as broken: whoever computes asks :func:`check_mapped_files` before anything that came
of it is shown. On Linux; elsewhere, and for mappings of other libraries, all stays as it was.
"""

from __future__ import annotations

import gc
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
from engine.kernels import guard_fields as fields

_log = logging.getLogger(__name__)
_SA_SIGINFO, _SA_ONSTACK = 4, 0x08000000
_FLAGS_AT = 34  # of struct sigaction, in int32

_table = np.zeros(fields.TABLE_FIELDS, np.int64)
_lost = _table[fields.LOST : fields.ANY]
_words = _table.data  # a number of which is read sooner so
_files: dict[int, Path] = {}  # by their place in the table
_lock = threading.RLock()  # a mapping may be given up while another is noted, by the same thread


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


def guard_mapping(mapped: mmap.mmap, file: Path) -> None:
    """Have a page of ``mapped``, which is ``file``'s, be zeros when it cannot be read any more, as long as it is mapped."""
    if not _is_installed():
        return
    begin = np.frombuffer(mapped, np.uint8).ctypes.data
    with _lock:
        place = next((number for number in range(fields.MOST) if number not in _files), None)
        if place is None:  # so many are guarded
            return
        _files[place] = file
        _table[fields.BEGIN + place], _table[fields.END + place] = begin, begin + len(mapped)
    weakref.finalize(mapped, _forget, place).atexit = False


def check_mapped_files() -> None:
    """Make sure that all that was read from guarded files was there.

    Raises:
        ModelFileError: it was not, and what was computed since may be wrong.
    """
    if _words[fields.ANY]:
        gc.collect()  # a model that was given up is nobody's business
        with _lock:
            broken = [file for place, file in _files.items() if _lost[place]]
        if broken:
            raise ModelFileError(
                f"{broken[0].name} can no longer be read from its disk; check the disk, then load the model again."
            )


def _forget(place: int) -> None:
    with _lock:
        _table[[fields.BEGIN + place, fields.END + place]] = _lost[place] = 0
        _table[fields.ANY] = _lost.any()
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

    from engine.kernels.native import load_page_guard

    action = np.zeros(fields.ACTION_FIELDS, np.int64)
    action[0] = load_page_guard(_table.ctypes.data)
    action.view(np.int32)[_FLAGS_AT] = _SA_SIGINFO | _SA_ONSTACK
    sigaction = ctypes.CDLL(None, use_errno=True).sigaction
    sigaction.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    earlier = _table[fields.EARLIER :]
    if sigaction(fields.SIGBUS, action.ctypes.data, earlier.ctypes.data) != 0:
        raise OSError(ctypes.get_errno(), "sigaction")
