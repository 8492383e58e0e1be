"""Teams that do without a thread while others want its core: when, and that nobody can tell from the results."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable

import pytest
import torch

from engine.kernels import make_fused_stepper
from engine.kernels.crowding import Crowding
from tests.test_kernels import PLAIN, make_decoder


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def work(crowding: Crowding, clock: Clock, seconds: float, lost: float, command: float = 0.002) -> list[int]:
    """Commands for so long; how many threads each was for."""
    threads = []
    for _ in range(round(seconds / command)):
        threads.append(crowding.threads)
        clock.now += command
        crowding.observe(command, lost)
    return threads


def test_nobody_is_left_out_while_little_is_lost():
    clock = Clock()
    for num_threads in (1, 2, 8):
        crowding = Crowding(num_threads, clock)
        assert set(work(crowding, clock, 1.0, 0.5 / num_threads)) == {num_threads}


def test_a_hiccup_is_not_a_crowd():
    clock, crowding = Clock(), Crowding(2, Clock())
    work(crowding, clock, 0.006, 0.0)
    crowding.observe(0.003, 0.9)
    assert crowding.threads == 2


def test_a_thread_without_a_core_is_left_out_and_tried_again_less_and_less_often():
    clock = Clock()
    crowding = Crowding(2, clock)
    used = []
    for _ in range(2000):
        used.append(crowding.threads)
        clock.now += 0.002
        crowding.observe(0.002, 0.6 if crowding.threads == 2 else 0.0)
    assert used[0] == 2 and used[10] == 1
    runs = [(threads, len(list(group))) for threads, group in itertools.groupby(used)]
    pauses = [count * 0.002 for threads, count in runs if threads == 1]
    assert pauses[0] < 0.05 and pauses[-2] > 0.9 and pauses[:-1] == sorted(pauses[:-1])
    assert used.count(2) / len(used) < 0.05


def test_it_comes_back_when_the_core_is_free():
    clock = Clock()
    crowding = Crowding(3, clock)
    work(crowding, clock, 0.1, 0.9)
    assert crowding.threads == 1
    work(crowding, clock, 1.5, 0.0)
    assert crowding.threads == 3
    assert set(work(crowding, clock, 1.0, 0.0)) == {3}


def test_one_thread_stays_whatever_it_waits_for():
    clock, crowding = Clock(), Crowding(1, Clock())
    assert set(work(crowding, clock, 0.5, 1.0)) == {1}


class Whim:
    """Has another number of threads for every command."""

    def __init__(self, threads: Iterable[int]) -> None:
        self._threads = iter(threads)

    @property
    def threads(self) -> int:
        return next(self._threads)

    def observe(self, seconds: float, lost: float) -> None:
        pass


@pytest.mark.parametrize("pause", [0.0, 0.004])
def test_results_do_not_depend_on_how_many_take_part(pause: float):
    """Also where the next command comes before a thread that is left out has noticed."""
    decoder = make_decoder("int4", **PLAIN)
    results = []
    for whim in (None, Whim(itertools.cycle((3, 1, 2, 1, 1, 3, 2)))):
        stepper = make_fused_stepper(decoder, num_threads=3)
        if whim is not None:
            stepper.team.crowding = whim
        cache = decoder.new_cache(256)
        logits = []
        for step in range(60):
            logits.append(stepper.forward([step % 90 + 1, step % 7 + 1], cache)[1].clone())
            cache.length += 2
            if whim is not None:
                time.sleep(pause)
        results.append(torch.stack(logits))
        workers = list(stepper.team._workers)
        stepper.close()
        results[-1] = torch.cat((results[-1], stepper.forward([9, 4], cache)[1][None]))  # it begins anew
        stepper.close()
        assert not any(worker.thread.is_alive() for worker in workers)
    assert torch.equal(*results)


def test_who_is_left_out_sleeps():
    decoder = make_decoder("int4", **PLAIN)
    stepper = make_fused_stepper(decoder, num_threads=2)
    stepper.team.crowding = Whim(itertools.chain([2], itertools.repeat(1)))
    cache = decoder.new_cache(64)
    stepper.forward([1], cache)
    (worker,) = stepper.team._workers
    until = time.monotonic() + 5
    while not worker.parked and time.monotonic() < until:
        stepper.forward([1], cache)
    assert worker.parked
    for _ in range(20):
        stepper.forward([1], cache)
        assert worker.parked
    stepper.close()


def test_it_can_be_closed_whoever_is_left_out():
    """Also while others are on their way out of the last command."""
    stepper = make_fused_stepper(make_decoder("int4", **PLAIN), num_threads=3)
    stepper.team.crowding = Whim(itertools.cycle((3, 2, 3, 2, 1, 2)))
    cache = stepper.decoder.new_cache(64)
    for turn in range(300):
        for _ in range(1 + turn % 5):
            stepper.forward([1], cache)
        workers = list(stepper.team._workers)
        stepper.close()
        assert not any(worker.thread.is_alive() for worker in workers)
