"""The expert cache in native code: every load ends once, what goes wrong is told, and it decides as the one in Python does."""

from __future__ import annotations

import gc
import os
import random
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.errors import ExpertStoreError
from engine.experts import model
from engine.experts.cache import ExpertCache, LayerExperts, make_cache
from engine.experts.eviction import EVICTION_POLICIES
from engine.experts.eviction.belady import Belady
from engine.experts.model import prepare_store
from engine.experts.native_cache import NativeCache
from engine.experts.prediction.accelerated import Accelerated, StreamedDecoder
from engine.experts.prediction.next_gate import NextGate
from engine.experts.prediction.replay import Oracle
from engine.experts.prefetcher import Prefetcher
from engine.experts.python_cache import PythonCache
from engine.experts.reader import Link
from engine.experts.slots import HostSlots
from engine.experts.store import ExpertStore, Key
from engine.kernels import load_fields
from engine.kernels.expert_stepper import FusedExpertStepper
from engine.models.loader import load_decoder
from engine.models.stepper import make_stepper
from tests import tiny
from tests.test_expert_tiers import random_stream

LRU = EVICTION_POLICIES["lru"]
SLOW = Link(4e6)  # some 5 ms a load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model") / "mixtral", "mixtral", num_hidden_layers=3)


@pytest.fixture
def store(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ExpertStore]:
    monkeypatch.setattr(model, "paths", SimpleNamespace(cache_dir=lambda: tmp_path))
    store = prepare_store(folder, "fp32")
    yield store
    store.close()


@pytest.fixture
def caches(store: ExpertStore) -> Iterator[Callable[..., NativeCache]]:
    made: list[NativeCache] = []

    def make(num_slots: int, policy: object = LRU, link: Link | None = None) -> NativeCache:
        slots = HostSlots(store.layout)
        made.append(NativeCache(store, num_slots, policy, link, 3, slots, None))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for cache in made:
        cache.stop()
        cache.stop()  # stopping twice is harmless


def wanted(store: ExpertStore, key: Key) -> bytes:
    blob = bytearray(store.layout.nbytes)
    store.read(key, memoryview(blob), 0, len(blob))
    return bytes(blob)


def bytes_of(cache: ExpertCache, layer: int, numbers: list[int]) -> dict[int, bytes]:
    """What a layer's turn gives for each expert, as a blob."""
    found = {}
    for group in cache.fetch(layer, numbers):
        for number, expert in group:
            blob = torch.zeros(cache.store.layout.nbytes, dtype=torch.uint8)
            cache.store.layout.write(expert, blob)
            found[number] = blob.numpy().tobytes()
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_every_expert_comes_once_with_the_right_bytes(
    store: ExpertStore, caches: Callable[..., NativeCache]
) -> None:
    for slots in (1, 3, len(store.keys)):
        cache = caches(slots)
        for layer in (0, 1, 2, 1):
            found = bytes_of(cache, layer, list(range(8)))
            assert found == {number: wanted(store, (layer, number)) for number in range(8)}
        assert cache.stats.expert_misses == (24 if slots == 24 else 32)


def test_a_load_wakes_somebody_who_may_do_it(store: ExpertStore, caches: Callable[..., NativeCache]) -> None:
    """Of the threads one does nothing that is only expected."""
    cache = caches(8)
    for turn in range(200):
        if turn % 3 == 0:
            time.sleep(0.0005)  # all of them have gone to sleep
        layer = turn % 3
        if turn % 2:
            cache.prefetch([(layer, 0), (layer, 1)])
        assert len(bytes_of(cache, layer, [0, 1, 2])) == 3


def test_more_loads_than_the_rings_have_room_for(caches: Callable[..., NativeCache]) -> None:
    cache, total = caches(2), 0
    while total < 2 * max(load_fields.RING_SIZE, load_fields.NUM_ENTRIES):
        layer = total % 3
        cache.prefetch([(layer, total % 7)])
        for _ in cache.fetch(layer, [total % 7, 7]):
            pass
        total += 2
    stats = cache.stats
    assert stats.expert_hits + stats.expert_late + stats.expert_misses == total


def test_more_loads_than_there_are_entries(
    store: ExpertStore, caches: Callable[..., NativeCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.kernels.load_fields.NUM_ENTRIES", 3)
    cache = caches(24, link=SLOW)
    cache.prefetch(store.keys)
    assert cache.stats.prefetch_issued == 3
    assert len(bytes_of(cache, 2, list(range(8)))) == 8


def test_what_is_waited_for_goes_first(store: ExpertStore, caches: Callable[..., NativeCache]) -> None:
    cache = caches(24, link=SLOW)
    cache.prefetch([(0, number) for number in range(8)])
    assert len(bytes_of(cache, 1, [3])) == 1
    assert len(bytes_of(cache, 0, [7])) == 1  # it was expected, and is hurried
    assert len(cache.residents()) <= 5
    assert cache.stats.expert_late == 1 == cache.stats.prefetch_used


def test_a_read_that_fails_is_told(store: ExpertStore, caches: Callable[..., NativeCache]) -> None:
    cache = caches(24)
    os.truncate(store.file, store.layout.nbytes + 100)
    cache.prefetch([(0, 2)])  # nobody hears of it
    assert bytes_of(cache, 0, [0])
    for _ in range(2):
        with pytest.raises(ExpertStoreError, match="cannot be read"):
            bytes_of(cache, 0, [0, 1])
    assert bytes_of(cache, 0, [0])
    assert cache.residents() == [(0, 0)]


def test_a_disk_that_fails_is_told(
    store: ExpertStore, caches: Callable[..., NativeCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = os.open(os.devnull, os.O_WRONLY)  # nothing can be read from it
    monkeypatch.setattr(store, "descriptor", broken)
    with pytest.raises(ExpertStoreError, match="cannot be read"):
        bytes_of(caches(2), 0, [0])


def test_damage_is_told(store: ExpertStore, caches: Callable[..., NativeCache]) -> None:
    with open(store.file, "r+b") as file:
        place = store.layout.nbytes + 5
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ExpertStoreError, match=r"Expert 1 of layer 0 .* is damaged"):
        bytes_of(caches(24), 0, [0, 1, 2])


def test_stopping_drops_what_has_not_come(store: ExpertStore, caches: Callable[..., NativeCache]) -> None:
    cache = caches(24, link=Link(4e5))  # some 50 ms a load
    cache.prefetch(store.keys)
    began = time.monotonic()
    cache.stop()
    assert time.monotonic() - began < 0.5


def test_a_turn_that_is_left_early_keeps_nothing(caches: Callable[..., NativeCache]) -> None:
    cache = caches(2)
    turn = cache.fetch(0, [0, 1])
    next(turn)
    turn.close()
    for layer in (1, 2):
        assert len(bytes_of(cache, layer, [4, 5])) == 2  # both slots can be had


def test_slots_come_and_go(store: ExpertStore, caches: Callable[..., NativeCache]) -> None:
    cache = caches(3)
    for count in (10, 2, 1, 24, 5):
        cache.resize(count)
        assert cache.num_slots == count and cache.resident_bytes == count * store.layout.nbytes
        for layer in range(3):
            found = bytes_of(cache, layer, [1, 4, 6, 7])
            assert found == {number: wanted(store, (layer, number)) for number in (1, 4, 6, 7)}
        assert len(cache.residents()) == min(count, 12)


def test_its_memory_goes_with_the_last_reference(store: ExpertStore) -> None:
    cache = NativeCache(store, 3, LRU, None, 3, HostSlots(store.layout), None)
    assert bytes_of(cache, 0, [0, 1])
    cache.stop()
    gone = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert gone() is None
    finally:
        gc.enable()


def test_the_right_one_is_made(store: ExpertStore, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(store, 2, LRU)
    cache.stop()
    assert isinstance(cache, NativeCache)

    def no_pread() -> None:
        raise OSError("there is no pread")

    monkeypatch.setattr("engine.experts.native_cache.load_turns", no_pread)
    cache = make_cache(store, 2, LRU)
    cache.stop()
    assert isinstance(cache, PythonCache)


@pytest.mark.parametrize("policy", [*EVICTION_POLICIES, "belady"])
def test_it_decides_as_python_does(
    store: ExpertStore, caches: Callable[..., NativeCache], policy: str
) -> None:
    """What is in the slots is the same after every turn."""
    chance = random.Random(1)
    trace = [
        (turn % 3, tuple(sorted({int(8 * chance.random() ** 2) for _ in range(3)}))) for turn in range(150)
    ]
    make = (lambda shape: Belady(trace, shape)) if policy == "belady" else EVICTION_POLICIES[policy]
    native = caches(7, make)
    python = PythonCache(store, 7, make)
    try:
        for layer, numbers in trace:
            for cache in (native, python):
                for _ in cache.fetch(layer, numbers):
                    pass
            assert native.residents() == sorted(python.residents())
            assert native.uses == python.uses
        ours, theirs = native.stats, python.stats
        assert ours.expert_hits == theirs.expert_hits and ours.expert_misses == theirs.expert_misses
        assert ours.bytes_loaded == theirs.bytes_loaded
    finally:
        python.stop()


@pytest.mark.parametrize("predictor", ["none", "next gate", "two layers ahead", "accelerated", "oracle"])
def test_a_pass_in_one_command_has_the_same_turns(
    folder: Path, store: ExpertStore, caches: Callable[..., NativeCache], predictor: str
) -> None:
    """As one whose layers run one by one, with the same predictions, where loads take no time."""
    resident = load_decoder(folder, "fp32")
    trace: list[tuple[int, tuple[int, ...]]] = []
    seen = {}
    for way in ("recorded", "in parts", "in one"):
        cache = caches(9, EVICTION_POLICIES["lfu"], Link(1e15))
        if way == "recorded":
            cache.recording = trace
        decoder = resident.with_experts(lambda layer, cache=cache: LayerExperts(cache, layer))
        if way != "recorded" and predictor == "accelerated":
            decoder = streamed = StreamedDecoder(decoder, random_stream(decoder))
            decoder.watch = Prefetcher(cache, Accelerated(streamed), always=True)
        elif way != "recorded" and predictor != "none":
            named = Oracle(trace) if predictor == "oracle" else NextGate(decoder, 1 + (predictor[0] == "t"))
            decoder.watch = Prefetcher(cache, named, always=True)
        stepper = make_stepper(decoder)
        assert isinstance(stepper, FusedExpertStepper)
        stepper._in_one = way == "in one"
        kv = decoder.new_cache(64)
        logits = []
        for token in range(40, 60):
            logits.append(stepper.forward([token, token + 1], kv)[1].clone())
            kv.length += 1
        seen[way] = torch.stack(logits), cache.uses, cache.stats
    for one, other in (("recorded", "in parts"), ("in parts", "in one")):
        assert torch.equal(seen[one][0], seen[other][0]) and seen[one][1] == seen[other][1]
    ours, theirs = (replace(seen[way][2], stall_seconds=0.0) for way in ("in one", "in parts"))
    assert ours == theirs and ours.expert_hits > 0
    assert (ours.prefetch_used > 0) == (predictor != "none")


def test_loads_ahead_within_passes_stop_where_they_do_not_pay(
    folder: Path, store: ExpertStore, caches: Callable[..., NativeCache]
) -> None:
    cache = caches(9)
    decoder = load_decoder(folder, "fp32").with_experts(lambda layer: LayerExperts(cache, layer))
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 2.0 if prefetcher.active else 1.0
        return now

    prefetcher = decoder.watch = Prefetcher(cache, NextGate(decoder), clock=clock)
    stepper = make_stepper(decoder)
    kv, quiet = decoder.new_cache(64), 0
    for _ in range(100):
        before = cache.stats.prefetch_issued
        stepper.forward([40], kv)
        quiet += cache.stats.prefetch_issued == before
        assert prefetcher.active or cache.stats.prefetch_issued == before
    assert not prefetcher.enabled and cache.stats.prefetch_issued > 0 and quiet >= 50
