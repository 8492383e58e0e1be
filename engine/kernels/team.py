"""The threads that run kernels: the caller as rank 0 and persistent workers.

Between two commands a worker spins for a fraction of a millisecond, so that consecutive decoding steps
find it awake, and then sleeps on an event: an idle app uses no CPU.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import sys
import threading
import weakref
from typing import Any

import numpy as np

from engine.kernels import control as fields
from engine.kernels import program

_PATIENCE = 8000  # spins before a worker sleeps, about 0.3 ms
_teams: weakref.WeakSet[Team] = weakref.WeakSet()


def register_symbols() -> None:
    """Give compiled code the operating system's yield; call before anything is compiled or loaded."""
    import llvmlite.binding

    if sys.platform == "win32":
        function = ctypes.windll.kernel32.SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    address = ctypes.cast(function, ctypes.c_void_p).value
    llvmlite.binding.add_symbol("slipstream_give_way", address)


class Team:
    """``num_threads`` threads around one control block.

    Args:
        tag, kv, head: numpy scalars whose types choose the compiled code for weights, cache and draft head.
        kv_size: bytes of a cache element.
    """

    def __init__(self, num_threads: int, tag: Any, kv: Any, head: Any, kv_size: int) -> None:
        self.num_threads = num_threads
        self.control = np.zeros(fields.RANKS + fields.RANK_FIELDS * num_threads, np.int64)
        self.address = self.control.ctypes.data
        self.control[fields.THREADS] = num_threads
        self._kinds = (tag, kv, head, kv_size)
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._pid = os.getpid()
        _teams.add(self)

    def compile(self) -> None:
        """Compile the code for this team's types, or load it from the disk cache."""
        import numba

        kinds = (*(numba.typeof(kind) for kind in self._kinds[:3]), numba.int64)
        program.execute.compile((*kinds, numba.int64, numba.int64))
        program.serve.compile((*kinds, *[numba.int64] * 4))
        program.publish.compile((numba.int64,))

    def run(self, command: int, values: dict[int, int]) -> None:
        """Fill the control block and run ``command`` on all threads; returns when it is done."""
        with self._lock:
            self._start_workers()
            control = self.control
            for field, value in values.items():
                control[field] = value
            control[fields.COMMAND] = command
            self._publish()
            program.execute(*self._kinds, self.address, 0)

    def close(self) -> None:
        """Stop the workers."""
        with self._lock:
            if self._workers and self._pid == os.getpid():
                self.control[fields.COMMAND] = fields.STOP
                self._publish()
                for worker in self._workers:
                    worker.thread.join()
            self._workers = []

    def _publish(self) -> None:
        program.publish(self.address)
        for worker in self._workers:
            if worker.parked:
                worker.wake.set()

    def _start_workers(self) -> None:
        if self._pid != os.getpid():  # a forked child has the memory but not the threads
            self._workers, self._pid = [], os.getpid()
            self.control[[fields.SEQUENCE, fields.ARRIVED, fields.TICKETS]] = 0
            self.control[fields.RANKS :: fields.RANK_FIELDS] = 0
            self.control[fields.RANKS + fields.BASE :: fields.RANK_FIELDS] = 0
        if len(self._workers) < self.num_threads - 1:
            seen = int(self.control[fields.SEQUENCE])
            self._workers = [
                _Worker(self.control, self._kinds, rank, seen) for rank in range(1, self.num_threads)
            ]


class _Worker:
    def __init__(self, control: np.ndarray, kinds: tuple[Any, Any, Any, int], rank: int, seen: int) -> None:
        self.wake = threading.Event()
        self.parked = False
        # The thread keeps the control block alive, but not the team.
        arguments = (self, control, kinds, rank, seen)
        self.thread = threading.Thread(target=_serve, args=arguments, name=f"kernel-{rank}", daemon=True)
        self.thread.start()


def _serve(
    worker: _Worker, control: np.ndarray, kinds: tuple[Any, Any, Any, int], rank: int, seen: int
) -> None:
    while True:
        seen = program.serve(*kinds, control.ctypes.data, rank, seen, _PATIENCE)
        if seen < 0:
            return
        # Under the interpreter lock either we see the new command here, or its publisher sees us parked.
        worker.parked = True
        if int(control[fields.SEQUENCE]) == seen:
            worker.wake.wait()
        worker.wake.clear()
        worker.parked = False


@atexit.register
def _stop_all() -> None:
    for team in list(_teams):
        with contextlib.suppress(Exception):
            team.close()
