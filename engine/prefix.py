"""Key/value caches of recent chats, so that the next turn reads only what is new.

**Same text with and without reuse.** The prefill and the decoding step are different kernels, whose
results may differ in the last bit, and a last bit can turn a near-tie between two tokens. So only
positions that a prefill computed are reused, as a fresh chat would compute them: the prompt up to its last
token. The answer behind it came from decoding steps; it is read again as prompt, in the background while
the person reads it (:func:`settle`), so the next turn seldom waits for that.

On CPU this is exact: prefilled keys and values do not depend on how the tokens were cut into chunks,
bit for bit, at int4, int8 and bf16 (at fp32 the matrix products may differ in the last bit). On a GPU it
is not promised.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

_MAX_KEPT = 2  # two lanes of a comparison, or two browser windows
_MAX_BYTES = 512 << 20  # older caches go when all together are larger; the newest stays
_WORTH_IT = 16  # a shorter common prefix does not pay for throwing away another chat's cache
_SETTLE_CHUNK = 32  # tokens that a new request may have to wait for


@dataclass
class KeptCache:
    """An idle cache: ``ids`` are the tokens of its ``cache.length`` prefilled positions."""

    ids: list[int]
    cache: Any
    taken: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)  # held while the cache is read or grown


class PrefixCaches:
    """A few idle caches, most recently used last. Thread-safe."""

    def __init__(self) -> None:
        self._kept: list[KeptCache] = []
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
        best.taken = True  # first, or settling would win the lock again and again
        with best.lock:  # waits for a chunk that is being settled
            best.cache.length = _common_prefix(best.ids, ids[:-1])
        return best.cache

    def keep(self, prompt_ids: Sequence[int], cache: Any) -> KeptCache:
        """Hand a cache back. What lies behind the prefilled part of the prompt is cut off."""
        cache.length = min(cache.length, len(prompt_ids) - 1)
        kept = KeptCache(list(prompt_ids[: cache.length]), cache)
        with self._lock:
            self._kept.append(kept)
            while len(self._kept) > _MAX_KEPT or (
                len(self._kept) > 1 and sum(each.cache.nbytes for each in self._kept) > _MAX_BYTES
            ):
                self._kept.pop(0).taken = True
        return kept

    def clear(self) -> None:
        """Release all memory."""
        with self._lock:
            for kept in self._kept:
                kept.taken = True
            self._kept.clear()


def settle(
    kept: KeptCache,
    ids: Sequence[int],
    try_prefill: Callable[[list[int], Any], bool],
    pause: Callable[[], Any],
) -> None:
    """Prefill ``ids`` behind what ``kept`` holds, until done or somebody takes the cache.

    Args:
        try_prefill: appends a chunk to the cache, or returns False if the engine is busy.
        pause: called before the next try while the engine is busy.
    """
    done = 0
    while done < len(ids):
        with kept.lock:
            if kept.taken or not threading.main_thread().is_alive():  # or the program is ending
                return
            chunk = list(ids[done : done + _SETTLE_CHUNK])
            ready = try_prefill(chunk, kept.cache)
            if ready:
                kept.ids += chunk
                done += len(chunk)
        if not ready:
            pause()


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    count = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        count += 1
    return count
