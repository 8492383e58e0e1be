"""Threads that read experts: each load ends once, what is waited for first, and what goes wrong is told."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.errors import ExpertStoreError
from engine.experts import model
from engine.experts.model import prepare_store
from engine.experts.reader import DEMANDED, EXPECTED, Ended, Link, Load, Reader
from engine.experts.slots import HostSlot, HostSlots
from engine.experts.store import ExpertStore
from tests import tiny

SLOW = Link(4e6)  # some 5 ms a load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model") / "mixtral", "mixtral")


@pytest.fixture
def store(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ExpertStore]:
    monkeypatch.setattr(model, "paths", SimpleNamespace(cache_dir=lambda: tmp_path))
    store = prepare_store(folder, "fp32")
    yield store
    store.close()


class Running:
    """A reader, and what has ended of its loads."""

    def __init__(self, store: ExpertStore, link: Link | None = None) -> None:
        self.reader, self.store = Reader(store, 2, link), store
        self.slots = [
            slot for slot in HostSlots(store.layout).make(len(store.keys)) if isinstance(slot, HostSlot)
        ]
        self.ended: list[Ended] = []

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *exception: object) -> None:
        self.reader.close()
        self.reader.close()  # closing twice is harmless

    def submit(self, number: int, urgency: int) -> Load:
        load = Load(self.store.keys[number], self.slots[number], urgency)
        self.reader.submit(load)
        return load

    def wait_for(self, count: int) -> list[Load]:
        """Until ``count`` loads have ended in all; they, in their order."""
        deadline = time.monotonic() + 30
        while len(self.ended) < count:
            assert time.monotonic() < deadline
            self.ended += self.reader.ended() or ()
            if len(self.ended) < count:
                self.reader.wait()
        return [load for load, _ in self.ended]

    def wanted(self, number: int) -> bytes:
        blob = bytearray(self.store.layout.nbytes)
        self.store.read(self.store.keys[number], memoryview(blob), 0, len(blob))
        return bytes(blob)


@pytest.mark.parametrize("urgency", [DEMANDED, EXPECTED])
def test_every_load_ends_once_with_the_right_bytes(store: ExpertStore, urgency: int) -> None:
    with Running(store) as running:
        count = len(store.keys)
        loads = [running.submit(number, urgency) for number in range(count)]
        assert sorted(load.key for load in running.wait_for(count)) == sorted(load.key for load in loads)
        assert all(error is None for _, error in running.ended)
        for number in range(count):
            assert bytes(running.slots[number].buffer(store.keys[number])[0]) == running.wanted(number)
        time.sleep(0.01)
        assert not running.reader.ended()


def test_what_is_waited_for_goes_first(store: ExpertStore) -> None:
    with Running(store, SLOW) as running:
        expected = [running.submit(number, EXPECTED) for number in range(6)]
        demanded = running.submit(6, DEMANDED)
        running.reader.hurry(expected[5])
        order = running.wait_for(7)
        # Two threads may have begun two loads before; in Python both wait for the link at once.
        assert order.index(demanded) <= 2 and order.index(expected[5]) <= 3
        assert order[4:] == expected[2:5]


def test_what_has_not_begun_can_be_taken_back(store: ExpertStore) -> None:
    with Running(store, SLOW) as running:
        loads = [running.submit(number, EXPECTED) for number in range(8)]
        time.sleep(0.002)  # a thread has begun with the first
        taken = [load for load in loads if running.reader.cancel(load)]
        assert len(taken) >= 5
        again = running.submit(7, DEMANDED)
        ended = running.wait_for(9 - len(taken))
        assert again in ended and not set(map(id, taken)) & set(map(id, ended))
        assert not running.reader.cancel(again)


def test_a_read_that_fails_is_told(store: ExpertStore) -> None:
    with Running(store) as running:
        os.truncate(store.file, store.layout.nbytes + 100)
        running.submit(0, DEMANDED)
        running.submit(1, DEMANDED)
        running.submit(2, EXPECTED)
        running.wait_for(3)
        errors = {load.key: error for load, error in running.ended}
        assert errors[store.keys[0]] is None
        for number in (1, 2):
            with pytest.raises(ExpertStoreError, match="cannot be read"):
                raise errors[store.keys[number]] or AssertionError


def test_a_disk_that_fails_is_told(store: ExpertStore, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = os.open(os.devnull, os.O_WRONLY)  # nothing can be read from it
    monkeypatch.setattr(store, "descriptor", broken)
    with Running(store) as running:
        running.submit(0, DEMANDED)
        running.wait_for(1)
        assert isinstance(running.ended[0][1], ExpertStoreError)


def test_damage_is_told(store: ExpertStore) -> None:
    with open(store.file, "r+b") as file:
        place = store.layout.nbytes + 5
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    with Running(store) as running:
        running.submit(1, DEMANDED)
        running.wait_for(1)
        assert isinstance(running.ended[0][1], ExpertStoreError)


def test_closing_drops_what_has_not_ended(store: ExpertStore) -> None:
    with Running(store, Link(4e5)) as running:  # some 50 ms a load
        for number in range(len(store.keys)):
            running.submit(number, EXPECTED)
    assert len(running.reader.ended()) <= 2  # those that had begun
