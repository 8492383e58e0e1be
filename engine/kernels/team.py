"""The threads that run kernels: the caller as rank 0 and persistent workers.

Between two commands a worker spins for a millisecond, so that consecutive decoding steps find it awake, and then sleeps on
an event: an idle app uses no CPU. While other programs want the cores (:mod:`engine.kernels.crowding`), some workers sleep
through commands as well. Results do not depend on how many take part.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from time import perf_counter

import numpy as np

from engine.kernels import control as fields
from engine.kernels.crowding import WINDOW, Crowding
from engine.kernels.native import Kinds, Program, load_program

PATIENCE = (
    40_000  # spins before a worker sleeps, about 1 ms: as long as choosing tokens and showing them may take
)
_teams: weakref.WeakSet[Team] = weakref.WeakSet()


class Team:
    """``num_threads`` threads around one control block.

    Building one compiles its program where that is not on the disk yet.

    Args:
        patience: spins of about 25 ns, after which a worker without a command sleeps.
        shares_cores: whether threads are left out while others want their cores.

    Attributes:
        control: the control block.
        crowding: says how many of the threads run the next command; None: all do.
    """

    def __init__(
        self,
        num_threads: int,
        kinds: Kinds,
        patience: int = PATIENCE,
        shares_cores: bool = True,
    ) -> None:
        self.num_threads, self._patience = num_threads, patience
        self.control = _aligned(fields.RANKS + fields.RANK_FIELDS * num_threads)
        self.address = self.control.ctypes.data
        self._fields = self.control.data  # of single fields it takes values sooner
        self.control[fields.THREADS] = num_threads
        self._program = load_program(kinds)
        self.crowding = Crowding(num_threads) if shares_cores else None
        self._held_up = [
            fields.RANKS + rank * fields.RANK_FIELDS + fields.HELD_UP for rank in range(num_threads)
        ]
        self._worked = 0.0  # seconds that the crowding has not been told of
        self._took = self._lost = 0  # ticks that it has
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._pid = os.getpid()
        _teams.add(self)

    def run(self, command: int, values: dict[int, int], meanwhile: Callable[[], None] | None = None) -> None:
        """Fill the control block and run ``command`` on all threads; returns when it is done.

        Args:
            meanwhile: what the caller has to do first, while the workers have begun.
        """
        with self._lock:
            self._start_workers()
            control, crowding = self._fields, self.crowding
            wanted = self.num_threads if crowding is None else crowding.threads
            if control[fields.THREADS] != wanted:
                control[fields.THREADS] = self._take_part(control[fields.THREADS], wanted)
            for field, value in values.items():
                control[field] = value
            control[fields.COMMAND] = command
            started = perf_counter()
            self._publish()
            try:
                if meanwhile is not None:
                    meanwhile()
            finally:
                self._program.work(self.address, 0, 0)
            if crowding is not None:
                self._worked += perf_counter() - started
                if self._worked >= WINDOW:
                    self._tell(crowding)

    def copy_slot(self, layers: int, source: int, target: int) -> None:
        """Have the caches of the first ``layers`` layers hold in slot ``target`` what they hold in ``source``."""
        with self._lock:
            self._program.copy_slot(self.address, layers, source, target)

    def close(self) -> None:
        """Stop the workers."""
        with self._lock:
            if self._workers and self._pid == os.getpid():
                self.control[fields.COMMAND] = fields.STOP
                self.control[fields.THREADS] = self.num_threads
                self._publish()
                for worker in self._workers:
                    worker.thread.join()
            self._workers = []

    def _tell(self, crowding: Crowding) -> None:
        """What the latest commands took, and lost."""
        took, lost = self._fields[fields.TOOK], max([self._fields[field] for field in self._held_up])
        crowding.observe(self._worked, min(1.0, (lost - self._lost) / max(1, took - self._took)))
        self._took, self._lost, self._worked = took, lost, 0.0

    def _publish(self) -> None:
        self._program.publish(self.address)
        for worker in self._workers[: self._fields[fields.THREADS] - 1]:
            if worker.parked:
                worker.wake.set()

    def _take_part(self, now: int, wanted: int) -> int:
        """How many threads can, of the wanted number: one that was left out must have noticed."""
        for rank in range(now, wanted):
            if not self._workers[rank - 1].parked:
                return rank
            self._catch_up(rank)
        return wanted

    def _catch_up(self, rank: int) -> None:
        """Have an idle thread begin in the phase that the caller is in."""
        phase, own = self._fields[fields.RANKS + fields.PHASE], fields.RANKS + rank * fields.RANK_FIELDS
        self._fields[own + fields.PHASE] = self._fields[own + fields.ARRIVED] = phase
        self._fields[own + fields.TICKETS] = phase << fields.PHASE_SHIFT

    def _start_workers(self) -> None:
        if self._pid != os.getpid():  # a forked child has the memory but not the threads
            self._workers, self._pid = [], os.getpid()
            self.control[fields.SEQUENCE] = 0
            self.control[fields.THREADS] = self.num_threads
            for own in (
                fields.PHASE,
                fields.MINE,
                fields.OWED,
                fields.GUEST,
                fields.TICKETS,
                fields.HELPED,
                fields.ARRIVED,
            ):
                self.control[fields.RANKS + own :: fields.RANK_FIELDS] = 0
        if len(self._workers) < self.num_threads - 1:
            self.control[fields.RANKS + fields.SEEN :: fields.RANK_FIELDS] = self.control[fields.SEQUENCE]
            for rank in range(1, self.num_threads):
                self._catch_up(rank)
            self._workers = [
                _Worker(self.control, self._program, rank, self._patience)
                for rank in range(1, self.num_threads)
            ]


def _aligned(count: int) -> np.ndarray:
    """So many int64 zeros, from the beginning of a cache line on."""
    room = np.zeros(count + 8, np.int64)
    first = -room.ctypes.data % 64 // 8
    return room[first : first + count]


class _Worker:
    def __init__(self, control: np.ndarray, program: Program, rank: int, patience: int) -> None:
        self.wake = threading.Event()
        self.parked = False
        # The thread keeps the control block alive, but not the team.
        arguments = (self, control, program, rank, patience)
        self.thread = threading.Thread(target=_serve, args=arguments, name=f"kernel-{rank}", daemon=True)
        self.thread.start()


def _serve(worker: _Worker, control: np.ndarray, program: Program, rank: int, patience: int) -> None:
    own_seen = fields.RANKS + rank * fields.RANK_FIELDS + fields.SEEN
    while True:
        program.work(control.ctypes.data, rank, patience)
        seen = int(control[own_seen])
        if seen < 0:
            return
        # Under the interpreter lock either we see the new command here, or its publisher sees us parked.
        worker.parked = True
        sequence = int(control[fields.SEQUENCE])
        if sequence == seen or rank >= sequence % fields.MOST_THREADS:
            worker.wake.wait()
        worker.wake.clear()
        worker.parked = False


@atexit.register
def _stop_all() -> None:
    for team in list(_teams):
        with contextlib.suppress(Exception):
            team.close()
