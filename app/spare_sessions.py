"""The loaded model in other weight formats, for comparisons: loaded on demand, kept until changed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

# Bytes of a weight: int4 has a scale and an offset of 16 bits for 32 weights, nf4 a scale of 32 bits for 64.
_WEIGHT_BYTES = {"int4": 0.625, "int8": 1.02, "bf16": 2.0, "fp32": 4.0, "nf4": 0.5625, "bnb_int8": 1.02}


class SpareSessions:
    """Sessions by weight format.

    Args:
        load: loads the present model in a format.
    """

    def __init__(self, load: Callable[[str], Any]) -> None:
        self._load = load
        self._sessions: dict[str, Any] = {}
        self._lock = threading.Lock()

    def get(self, weight_format: str) -> Any | None:
        """The session in that format, if it is loaded."""
        return self._sessions.get(weight_format)

    def load(self, weight_format: str) -> Any:
        """The session in that format, loaded if need be (seconds).

        Raises:
            SlipstreamError: it cannot be loaded.
        """
        with self._lock:
            if weight_format not in self._sessions:
                self._sessions[weight_format] = self._load(weight_format)
            return self._sessions[weight_format]

    def keep_only(self, weight_formats: Sequence[str]) -> None:
        """Unload all others."""
        with self._lock:
            for name in set(self._sessions) - set(weight_formats):
                self._sessions.pop(name).close()


def memory_sentence(num_parameters: int, weight_format: str) -> str:
    """What another format of a model of that size costs."""
    size = num_parameters * _WEIGHT_BYTES.get(weight_format, 4.0) / 1e6
    told = f"{size / 1000:.1f} GB" if size >= 1000 else f"{size:.0f} MB"
    return f"The model is loaded a second time, in {weight_format}: about {told} more memory."
