"""Which expert leaves: each policy's own order, and that the cache follows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engine.experts import model
from engine.experts.cache import make_cache
from engine.experts.eviction import EVICTION_POLICIES, EvictionPolicy
from engine.experts.eviction.belady import Belady
from engine.experts.eviction.foreseen import LeastForeseen
from engine.experts.eviction.least_stale import LeastStale
from engine.experts.eviction.lfu import LeastFrequentlyUsed
from engine.experts.eviction.lru import LeastRecentlyUsed
from engine.experts.model import prepare_store
from engine.experts.reader import Link
from engine.experts.store import ExpertStore, Shape
from tests import tiny

SHAPE = 3, 4


def test_lru() -> None:
    policy = LeastRecentlyUsed(SHAPE)
    for layer, number in ((0, 1), (2, 3), (0, 2), (0, 1)):
        policy.used(layer, (number,))
    order = [(2, 3), (0, 2), (0, 1)]
    assert sorted(order, key=lambda key: policy.worth[key]) == order
    assert policy.worth[1, 0] < policy.worth[2, 3]  # never used


def test_lfu_forgets() -> None:
    policy = LeastFrequentlyUsed(SHAPE)
    for _ in range(30):
        policy.used(0, (0, 1))
    assert policy.shares[0, 0] == pytest.approx(0.9576, abs=1e-3)
    for _ in range(8):
        policy.used(0, (2,))
    assert policy.worth[0, 2] > policy.worth[0, 0] > policy.worth[0, 3]


@pytest.mark.parametrize("make", [LeastFrequentlyUsed, LeastForeseen])
def test_of_those_used_as_often_the_layer_that_just_was_leaves(
    make: Callable[[Shape], EvictionPolicy],
) -> None:
    """Layers take their turns in a circle: with the others gone, each expert would be missed when its turn comes."""
    policy = make(SHAPE)
    for turn in range(300):
        policy.used(turn % 3, (0, 1))
        policy.used(turn % 3, (0, 1))
    for layer in range(3):
        policy.used(layer, (0, 1))
        behind, ahead = (layer + 1) % 3, (layer + 2) % 3
        assert policy.worth[layer, 0] < policy.worth[ahead, 0] < policy.worth[behind, 0]
        assert policy.worth[layer, 0] > policy.worth[behind, 2]  # what is hardly used leaves first


def test_least_stale() -> None:
    policy = LeastStale(SHAPE)
    for layer in (0, 1, 2, 0):
        policy.used(layer, (0,))
    policy.used(1, (1,))
    # (1, 0) is one turn of its layer old; of the others, layer 0's turn is the farthest.
    assert policy.worth[1, 0] < policy.worth[0, 0] < policy.worth[2, 0]


def test_least_foreseen() -> None:
    policy = LeastForeseen(SHAPE)
    policy.used(0, (0,))
    assert policy.worth[0].argmax() == 0
    policy.foresee(0, np.array([0.1, 0.9, 0.0, 0.0]))
    assert policy.worth[0].argmax() == 1
    policy.used(0, (0,))
    assert policy.worth[0].argmax() == 1
    assert policy.worth[0, 0] > policy.worth[0, 2]


def test_belady() -> None:
    trace = [(0, (0, 1)), (1, (2,)), (0, (1, 3)), (1, (3,)), (0, (0,))]
    policy = Belady(trace, SHAPE)

    def order() -> list[tuple[int, int]]:
        keys = [(0, 0), (0, 1), (0, 3), (1, 2), (1, 3)]
        return sorted(keys, key=lambda key: (-policy.worth[key], key))

    assert order() == [(0, 0), (0, 1), (1, 2), (0, 3), (1, 3)]
    policy.used(*trace[0])
    assert order() == [(1, 2), (0, 1), (0, 3), (1, 3), (0, 0)]
    for turn in trace[1:]:
        policy.used(*turn)
    policy.used(1, (0,))  # behind the trace's end
    assert np.all(np.isneginf(policy.worth))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ExpertStore]:
    monkeypatch.setattr(model, "paths", SimpleNamespace(cache_dir=lambda: tmp_path))
    folder = tiny.save_model(tmp_path / "mixtral", "mixtral", num_hidden_layers=3)
    store = prepare_store(folder, "fp32")
    yield store
    store.close()


@pytest.mark.parametrize("policy", EVICTION_POLICIES)
def test_the_least_worthy_leaves(store: ExpertStore, policy: str) -> None:
    cache = make_cache(store, 6, EVICTION_POLICIES[policy])
    generator = np.random.default_rng(0)
    layers, experts = store.index.shape
    try:
        for turn in range(60):
            layer, numbers = turn % layers, sorted(generator.choice(experts, 2, replace=False).tolist())
            before = set(cache.residents())
            for _ in cache.fetch(layer, numbers):
                pass
            left = before - set(cache.residents())
            stayed = before & set(cache.residents()) - {(layer, number) for number in numbers}
            worth = cache.eviction.worth
            if left and stayed:
                assert max(worth[key] for key in left) <= min(worth[key] for key in stayed)
    finally:
        cache.stop()


def test_a_wrong_expectation_is_given_up(store: ExpertStore) -> None:
    """What was expected of a layer and not wanted is not loaded once the layer's turn has come."""
    cache = make_cache(store, 20, EVICTION_POLICIES["lru"], Link(2e6))  # some 10 ms a load
    try:
        cache.prefetch([(1, number) for number in range(6)])
        for _ in cache.fetch(1, [6, 7]):
            pass
        for _ in cache.fetch(2, [0]):
            pass
        loaded = cache.stats.bytes_loaded // store.layout.nbytes
        assert loaded <= 5  # three that were wanted, one or two that had begun
        assert cache.stats.prefetch_issued == loaded - 3
        assert not cache.holds((1, 5))
    finally:
        cache.stop()
