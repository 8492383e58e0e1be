"""How fast this machine reads a disk past the system's file cache, as experts are read that are not in memory: measured
once, and kept."""

from __future__ import annotations

import json
import logging
import mmap
import os
import sys
import time
from pathlib import Path

from engine import paths
from engine.atomic import replacing

_BLOCK = 4 << 20  # bytes of a read: about an expert
_LEAST = 4  # blocks, of which the first is left out: a disk may have to wake up
_log = logging.getLogger(__name__)


def known_disk_speed(file: Path) -> float | None:
    """Bytes per second of the disk that ``file`` lies on, as measured before; None: not yet, or it cannot be."""
    try:
        return float(_kept()[_disk(file)]) or None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def measure_disk_speed(file: Path, seconds: float = 0.3) -> float | None:
    """Read parts of ``file``, which takes about ``seconds``, and keep the result; None where nothing can be told: the file
    is small, or the system reads through its cache alone."""
    try:
        speed = _measure(file, seconds)
    except OSError as error:
        _log.info("the speed of the disk cannot be measured: %s", error)
        return None
    if speed is not None:
        try:
            with replacing(_file()) as kept:
                kept.write(json.dumps({**_kept(), _disk(file): speed}).encode())
        except OSError:
            _log.warning("the disk's speed could not be kept", exc_info=True)
    return speed


def _measure(file: Path, seconds: float) -> float | None:
    blocks = file.stat().st_size // _BLOCK
    if blocks < _LEAST or not (hasattr(os, "O_DIRECT") or sys.platform == "darwin"):
        return None
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    target = mmap.mmap(-1, _BLOCK)  # starts on a page, as the system asks for
    try:
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
        done, began = 0, 0.0
        for block in range(blocks):
            os.preadv(descriptor, [target], block * _BLOCK)
            if block == 0:
                began = time.perf_counter()
                continue
            done += 1
            if done >= _LEAST - 1 and time.perf_counter() - began > seconds:
                break
        return done * _BLOCK / (time.perf_counter() - began)
    finally:
        os.close(descriptor)
        target.close()


def _kept() -> dict[str, float]:
    try:
        kept = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _disk(file: Path) -> str:
    return str(file.stat().st_dev)


def _file() -> Path:
    return paths.cache_dir() / "disk-speed.json"
