"""Threads that keep step: every task is done once, by whomever, and nobody is a phase ahead."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from numba import njit

from engine.kernels import control as fields
from engine.kernels.barrier import take, wait
from engine.kernels.intrinsics import atomic_add, atomic_get, pause
from engine.kernels.native import register_symbols

_PHASES, _MOST = 400, 40


@njit(nogil=True)
def _work(control: int, own: int, rank: int, phases: int, slow: int, done: int, most: int) -> None:
    """Count each task of each phase in ``done [phases, most + 2]``; behind the tasks, who began the phase, and whoever did
    before the phase before was complete. One thread is ``slow`` pauses slow at each of its tasks."""
    for phase in range(phases):
        tasks = 1 + phase * 7 % most
        row = done + 8 * phase * (most + 2)
        atomic_add(row + 8 * most, 1)
        if phase > 0:
            before = row - 8 * (most + 2)
            for task in range(1 + (phase - 1) * 7 % most):
                if atomic_get(before + 8 * task) != 1:
                    atomic_add(row + 8 * (most + 1), 1)
        task = take(control, own, tasks)
        while task >= 0:
            if rank == 1:
                for _ in range(slow):
                    pause()
            atomic_add(row + 8 * task, 1)
            task = take(control, own, tasks)
        wait(control, own)


def _run(num_threads: int, phases: int, slow: int) -> tuple[np.ndarray, np.ndarray]:
    control = np.zeros(fields.RANKS + fields.RANK_FIELDS * num_threads, np.int64)
    control[fields.RANKS + fields.CREW :: fields.RANK_FIELDS] = num_threads
    done = np.zeros((phases or 1, _MOST + 2), np.int64)
    address = control.ctypes.data

    def run(rank: int) -> None:
        own = address + 8 * (fields.RANKS + rank * fields.RANK_FIELDS)
        _work(address, own, rank, phases, slow, done.ctypes.data, _MOST)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done, control


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("slow", [0, 100])
def test_every_task_is_done_once_and_nobody_is_a_phase_ahead(num_threads: int, slow: int) -> None:
    register_symbols()
    _run(1, 0, 0)  # compiled
    done, control = _run(num_threads, _PHASES, slow)
    for phase in range(_PHASES):
        tasks = 1 + phase * 7 % _MOST
        assert (done[phase, :tasks] == 1).all() and not done[phase, tasks:_MOST].any()
    assert (done[:, _MOST] == num_threads).all()
    assert not done[:, _MOST + 1].any()
    ends = control[fields.RANKS + fields.ARRIVED :: fields.RANK_FIELDS]
    assert (ends == _PHASES).all()
    owed = control[fields.RANKS + fields.OWED :: fields.RANK_FIELDS]
    helped = control[fields.RANKS + fields.HELPED :: fields.RANK_FIELDS]
    assert (owed == helped).all()
    if num_threads > 1 and slow:
        assert helped[1] > 0  # the slow one was helped
