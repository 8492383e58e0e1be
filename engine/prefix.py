"""Key/value caches of recent chats, so that the next turn reads only what is new.

**Same text with and without reuse.** The prefill and the decoding step are different kernels, whose
results may differ in the last bit, and a last bit can turn a near-tie between two tokens. So only
positions that a prefill computed are reused: the prompt up to its last token. The answer that followed
was computed by decoding steps; the next turn reads it as prompt again, as a fresh chat would.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_MAX_KEPT = 2  # two lanes of a comparison, or two browser windows
_MAX_BYTES = 512 << 20  # older caches go when all together are larger; the newest stays
_WORTH_IT = 16  # a shorter common prefix does not pay for throwing away another chat's cache


@dataclass
class _Kept:
    ids: list[int]  # what the cache holds, position by position
    cache: Any


class PrefixCaches:
    """A few idle caches, most recently used last. Thread-safe."""

    def __init__(self) -> None:
        self._kept: list[_Kept] = []
        self._lock = threading.Lock()

    def take(self, ids: Sequence[int]) -> Any | None:
        """The cache with the longest common prefix, cut to it; None if none is worth it.

        At least the last of ``ids`` is left to compute. The caller owns the cache until :meth:`keep`.
        """
        with self._lock:
            best, length = None, min(_WORTH_IT, max(1, len(ids) // 2)) - 1
            for kept in self._kept:
                common = _common_prefix(kept.ids, ids[:-1])
                if common > length:
                    best, length = kept, common
            if best is None:
                return None
            self._kept.remove(best)
        best.cache.length = length
        return best.cache

    def keep(self, prompt_ids: Sequence[int], cache: Any) -> None:
        """Hand a cache back. What lies behind the prefilled part of the prompt is cut off."""
        cache.length = min(cache.length, len(prompt_ids) - 1)
        with self._lock:
            self._kept.append(_Kept(list(prompt_ids[: cache.length]), cache))
            while len(self._kept) > _MAX_KEPT or (
                len(self._kept) > 1 and sum(kept.cache.nbytes for kept in self._kept) > _MAX_BYTES
            ):
                del self._kept[0]

    def clear(self) -> None:
        """Release all memory."""
        with self._lock:
            self._kept.clear()


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    count = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        count += 1
    return count
