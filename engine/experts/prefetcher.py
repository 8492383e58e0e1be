"""Between the decoder and the cache: what a predictor names is loaded, as long as that pays.

Loads ahead of time can do harm: a wrong one evicts what is needed and holds up the next. Two things keep that small
(both our choice). Predictors name experts by rank, the likeliest first, and of each rank it is counted how often a
named expert that was not in memory was wanted: ranks that are wrong too often are not loaded. And the time of passes
through the layers with and without loads ahead is measured all along, and the slower way is only tried now and then.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter

import numpy as np
from torch import Tensor

from engine.experts.cache import ExpertCache
from engine.experts.native_cache import Foreseeing, NativeCache
from engine.experts.prediction.base import Predictor
from engine.experts.store import Key
from engine.kernels.turn_fields import RANK_FADE, WORTH_LOADING

_TRIAL = 12  # passes in which the way that seems slower is tried
_PERIOD = 400  # passes between two trials
_MARGIN = 1.02  # loading ahead is left on unless it is slower by more than noise


class Prefetcher:
    """Watches a decoder's residual stream (:attr:`engine.models.decoder.Decoder.watch`).

    Args:
        always: never switch off by itself, for measurements.
        clock: seconds, for tests.

    Attributes:
        enabled: whether loads ahead of time are on.
        precisions: of each rank, the share of loads that would have been right, ``[E]``.
    """

    def __init__(
        self,
        cache: ExpertCache,
        predictor: Predictor,
        always: bool = False,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._cache, self.predictor, self._always, self._clock = cache, predictor, always, clock
        self.enabled = True
        self._native = cache if isinstance(cache, NativeCache) and isinstance(predictor, Foreseeing) else None
        self.precisions = (
            np.ones(cache.store.index.num_experts) if self._native is None else self._native.precisions
        )
        # By layer, the rank and number of what was named and not in memory.
        self._named: dict[int, list[tuple[int, int]]] = {}
        self._trial = 0  # passes that are left of one
        self._since_trial = 0
        # Seconds of the latest passes with and without loads ahead.
        self._seconds = {way: deque[float](maxlen=_TRIAL) for way in (True, False)}
        self._last_layer, self._num_rows = sys.maxsize, 0  # whatever layer comes first begins a pass
        self._began = self._latest = 0.0

    def __call__(self, layer: int, hidden: Tensor) -> None:
        """The state ``[B, T, D]`` of one layer; called layer after layer."""
        rows = hidden.flatten(0, -2)
        now = self._clock()
        if layer <= self._last_layer:
            self._end_pass()
            self._named.clear()
            self._began = now
        self._latest = now
        self._last_layer, self._num_rows = layer, len(rows)
        if self.active or self.predictor.informs:
            named = self.predictor.predict(layer, rows)
        if self.active:
            keys = self._worthwhile(named)
            if layer in self._cache.store.index.layers:
                self._cache.expect(keys, layer)  # what this layer itself asks for comes first
            else:
                self._cache.prefetch(keys)

    def begin_pass(self, rows: int) -> bool:
        """A pass of ``rows`` rows begins; whether native code watches it."""
        native, predictor = self._native, self.predictor
        if native is None or not isinstance(predictor, Foreseeing) or not native.follow(predictor):
            return False
        self._end_pass()
        self._num_rows, self._last_layer = 0, sys.maxsize
        native.load_ahead(self.active)
        self._began = self._clock()
        return True

    def end_pass(self, rows: int) -> None:
        """That pass is over."""
        self._latest, self._num_rows = self._clock(), rows

    def _worthwhile(self, keys: Sequence[Key]) -> list[Key]:
        """Those of the named experts that are in memory, to be kept, or whose rank is right often enough."""
        self._learn()
        ranks: dict[int, int] = {}
        kept = []
        for key in keys:
            rank = ranks[key[0]] = ranks.get(key[0], -1) + 1
            if self._cache.holds(key):
                kept.append(key)
                continue
            self._named.setdefault(key[0], []).append((rank, key[1]))
            if self.precisions[rank] >= WORTH_LOADING:
                kept.append(key)
        return kept

    def _learn(self) -> None:
        """Compare what was named with what was chosen, for layers whose turn is over."""
        for layer in [layer for layer in self._named if layer < self._last_layer]:
            chosen = self._cache.chosen.get(layer, ())
            for rank, number in self._named.pop(layer):
                right = float(number in chosen)
                self.precisions[rank] += RANK_FADE * (right - self.precisions[rank])

    @property
    def active(self) -> bool:
        """Whether this pass loads ahead of time: the chosen way, or in a trial the other."""
        return self._always or self.enabled != (self._trial > 0)

    def _end_pass(self) -> None:
        # From the first layer to the last: what lies between two passes, such as a person who reads, does not count.
        seconds = self._latest - self._began
        if self._always or self._num_rows != 1:  # a prompt's chunks tell nothing about decoding
            return
        self._seconds[self.active].append(seconds)
        if self._trial > 0:
            self._trial -= 1
            if self._trial == 0:
                ahead, without = (median(self._seconds[way]) for way in (True, False))
                self.enabled = ahead <= _MARGIN * without
        else:
            self._since_trial += 1
            if self._since_trial >= (_PERIOD if self._seconds[False] else 2 * _TRIAL):
                self._trial, self._since_trial = _TRIAL, 0
