"""How fast this machine reads its memory, which bounds decoding without a GPU: measured once, and kept."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from engine import hardware, paths
from engine.atomic import replacing

_log = logging.getLogger(__name__)


def known_bandwidth() -> float | None:
    """Bytes per second as measured before on this machine; None: not yet."""
    try:
        kept = json.loads(_file().read_text(encoding="utf-8"))
        if {name: kept[name] for name in ("cpu", "threads")} == _machine():
            return float(kept["bytes_per_second"]) or None
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none was kept, or it cannot be read: it is measured again
    return None


def measure_bandwidth(seconds: float = 1.0) -> float:
    """Measure, which takes about ``seconds`` and all cores, and keep the result."""
    bandwidth = hardware.copy_bandwidth(seconds=seconds)
    try:
        with replacing(_file()) as file:
            file.write(json.dumps({**_machine(), "bytes_per_second": bandwidth}).encode())
    except OSError:
        _log.warning("the memory's speed could not be kept", exc_info=True)
    return bandwidth


def _machine() -> dict[str, str | int]:
    """What the speed belongs to: a home folder may move to another machine."""
    return {"cpu": hardware.cpu_name(), "threads": hardware.usable_threads()}


def _file() -> Path:
    return paths.cache_dir() / "memory-speed.json"
