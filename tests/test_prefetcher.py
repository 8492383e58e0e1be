"""Loads ahead of time stop where they do not pay, by rank and altogether, and come back where they do again."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from engine.experts.cache import ExpertCache
from engine.experts.prefetcher import Prefetcher
from engine.experts.store import Key

LAYERS = range(4)


class Cache:
    """A cache that holds nothing, and whose routers always choose experts 0 and 1."""

    def __init__(self) -> None:
        self.store = SimpleNamespace(index=SimpleNamespace(layers=tuple(LAYERS), num_experts=8))
        self.chosen = dict.fromkeys(LAYERS, (0, 1))
        self.asked: list[Key] = []

    def holds(self, key: Key) -> bool:
        return False

    def expect(self, keys: Sequence[Key], behind: int) -> None:
        self.asked += keys


class Named:
    """Names these experts of the next layer."""

    name = "named"
    informs = False

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def predict(self, layer: int, hidden: Tensor) -> list[Key]:
        return [(layer + 1, number) for number in self.numbers]


class Clock:
    """A pass takes ``with_loads`` or ``without`` seconds, and between two passes lie ten."""

    def __init__(self, with_loads: float, without: float) -> None:
        self.times, self.now = {True: with_loads, False: without}, 0.0

    def __call__(self) -> float:
        return self.now


def run(prefetcher: Prefetcher, clock: Clock, passes: int, rows: int = 1) -> int:
    """Passes through all layers; in how many of them loads ahead were on."""
    on = 0
    for _ in range(passes):
        clock.now += 10
        for layer in LAYERS:
            prefetcher(layer, torch.zeros(1, rows, 2))
            if layer == 0:
                active = prefetcher.active
            clock.now += clock.times[active] / len(LAYERS)
        on += active
    return on


def make(predictor: Any, clock: Clock, **options: Any) -> tuple[Prefetcher, Cache]:
    cache = Cache()
    return Prefetcher(cast(ExpertCache, cache), predictor, clock=clock, **options), cache


def test_they_are_switched_off_where_they_are_slower_and_tried_now_and_then() -> None:
    clock = Clock(with_loads=2.0, without=1.0)
    prefetcher, _ = make(Named(0), clock)
    run(prefetcher, clock, 100)
    assert not prefetcher.enabled
    assert 0 < run(prefetcher, clock, 1000) < 100
    clock.times = {True: 1.0, False: 2.0}
    run(prefetcher, clock, 4000)
    assert prefetcher.enabled


def test_they_stay_where_they_are_faster_or_as_fast() -> None:
    for seconds in (0.5, 1.0):
        clock = Clock(with_loads=seconds, without=1.0)
        prefetcher, _ = make(Named(0), clock)
        assert run(prefetcher, clock, 1000) > 900
        assert prefetcher.enabled


def test_in_a_measurement_they_are_never_switched_off() -> None:
    clock = Clock(with_loads=2.0, without=1.0)
    prefetcher, _ = make(Named(0), clock, always=True)
    assert run(prefetcher, clock, 300) == 300


def test_a_pause_between_two_answers_is_no_slow_pass() -> None:
    clock = Clock(with_loads=1.0, without=1.2)
    prefetcher, _ = make(Named(0), clock)
    for _ in range(60):
        run(prefetcher, clock, 20)
        clock.now += 1000
    assert prefetcher.enabled


def test_prompts_decide_nothing() -> None:
    clock = Clock(with_loads=2.0, without=1.0)
    prefetcher, _ = make(Named(0), clock)
    assert run(prefetcher, clock, 200, rows=32) == 200


def test_ranks_that_are_wrong_are_not_loaded() -> None:
    clock = Clock(with_loads=1.0, without=1.0)
    prefetcher, cache = make(Named(1, 5, 0), clock, always=True)
    run(prefetcher, clock, 100)
    assert prefetcher.precisions[0] == 1.0 == prefetcher.precisions[2] and prefetcher.precisions[1] < 0.5
    cache.asked.clear()
    run(prefetcher, clock, 1)
    assert {number for _, number in cache.asked} == {0, 1}
    prefetcher.predictor = Named(1, 0, 5)  # what was right in the third place is now in the second
    run(prefetcher, clock, 200)
    cache.asked.clear()
    run(prefetcher, clock, 1)
    assert {number for _, number in cache.asked} == {0, 1}
