"""Which expert leaves when a slot is needed. Each policy is a file; none of them can change what is computed."""

from __future__ import annotations

from collections.abc import Callable

from engine.experts.eviction.base import EvictionPolicy
from engine.experts.eviction.foreseen import LeastForeseen
from engine.experts.eviction.least_stale import LeastStale
from engine.experts.eviction.lfu import LeastFrequentlyUsed
from engine.experts.eviction.lru import LeastRecentlyUsed
from engine.experts.store import Shape

# Belady's needs a trace of the future, so it is built by who has one.
EVICTION_POLICIES: dict[str, Callable[[Shape], EvictionPolicy]] = {
    "lru": LeastRecentlyUsed,
    "lfu": LeastFrequentlyUsed,
    "least-stale": LeastStale,
    "foreseen": LeastForeseen,
}

__all__ = ["EVICTION_POLICIES", "EvictionPolicy"]
