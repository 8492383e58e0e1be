"""Keeps a model's slots within the memory: fewer slots are slower, no memory is the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

import torch

from engine.experts.cache import ExpertCache
from engine.experts.planner import CUDA_OWN, MemoryPlan
from engine.hardware import MemoryUse, gpu_memory, machine_memory, process_memory, return_free_memory

_PERIOD = 0.2  # seconds between two looks
_LEAST_FREE = 0.04  # of the machine's memory; below it the system begins to swap or to kill
_STEP = 0.25  # of the slots that leave at once
_log = logging.getLogger(__name__)


class MemoryGuard:
    """Looks now and then whether the process has outgrown its budget, or the machine has little left.

    Args:
        device: whose memory it is.
        memory, own: the machine's and this process's use, for tests.
    """

    def __init__(
        self,
        cache: ExpertCache,
        plan: MemoryPlan,
        device: str = "cpu",
        memory: Callable[[], MemoryUse] | None = None,
        own: Callable[[], int] | None = None,
    ) -> None:
        self._cache, self._plan = cache, plan
        if device == "cpu":
            self._memory, self._own = memory or machine_memory, own or process_memory
        else:
            self._memory = memory or partial(gpu_memory, device)
            self._own = own or (lambda: CUDA_OWN + torch.cuda.memory_allocated(device))
        self._next = 0.0

    def look(self) -> None:
        """Take slots away if memory is short; cheap when it was called a moment ago."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _PERIOD
        size = self._cache.store.layout.nbytes
        over = self._own() - self._plan.budget
        # Part of it may be what a prompt has left behind.
        if over > 0 and self._cache.num_slots > self._plan.least_slots:
            return_free_memory()
            over = self._own() - self._plan.budget
        # Slots that could not make up for it all together would be given for nothing.
        if 0 < over <= (self._cache.num_slots - self._plan.least_slots) * size:
            self._shrink(-(-over // size))
        memory = self._memory()
        if memory.total - memory.used < _LEAST_FREE * memory.total:
            self._shrink(int(self._cache.num_slots * _STEP))

    def _shrink(self, count: int) -> None:
        wanted = max(self._plan.least_slots, self._cache.num_slots - max(1, count))
        if wanted < self._cache.num_slots:
            _log.warning("memory is short: %d expert slots instead of %d", wanted, self._cache.num_slots)
            self._cache.resize(wanted)
            return_free_memory()
