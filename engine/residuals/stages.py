"""Long work in steps: progress with the time left, stopping between steps, a checkpoint at least every
40 seconds, and going on from it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from engine.progress import REPORT_SECONDS, Progress, format_seconds
from engine.residuals.tuning_store import Store, TuningStoppedError
from engine.residuals.workers import Workers

CHECKPOINT_SECONDS = 40.0


@dataclass(frozen=True)
class Stage:
    """What people are shown of a stage: ``Training (4 of 6): 120 of 1000 steps, 12 min left.``"""

    name: str
    label: str
    number: int
    unit: str


INVENT = Stage("invent", "Inventing prompts", 1, "prompts")
GENERATE = Stage("generate", "Writing text", 1, "tokens")
CACHE = Stage("cache", "Keeping final states", 2, "parts")
INITIALISE = Stage("initialise", "Fitting the exit", 3, "batches")
TRAIN = Stage("train", "Training", 4, "steps")
EVALUATE = Stage("evaluate", "Measuring", 5, "batches")
WRITE = Stage("write", "Writing the adapter", 6, "files")
NUM_STAGES = 6


class Meter:
    """Progress of one stage; the pace is that of this run, without what an earlier one had done."""

    def __init__(
        self, stage: Stage, done: float, total: float, on_progress: Callable[[Progress], None] | None
    ) -> None:
        self._stage, self._first, self._total, self._on_progress = stage, done, total, on_progress
        self._started, self._last_report = time.monotonic(), 0.0
        self.report(done)

    def report(self, done: float, note: str = "") -> None:
        """Tell the listener, unless it was told a moment ago."""
        now = time.monotonic()
        if self._on_progress is None or (now - self._last_report < REPORT_SECONDS and done < self._total):
            return
        self._last_report = now
        left = None
        if self._first < done < self._total:
            left = max(0.0, (self._total - done) * (now - self._started) / (done - self._first))
        stage = self._stage
        parts = [f"{min(done, self._total):.0f} of {self._total:.0f} {stage.unit}", *([note] if note else [])]
        parts += [f"{format_seconds(left)} left"] if left is not None else []
        message = f"{stage.label} ({stage.number} of {NUM_STAGES}): {', '.join(parts)}."
        self._on_progress(Progress(stage.name, done, self._total, left, False, message))


@dataclass(frozen=True)
class Runner:
    """Who is told, and who may stop it.

    Attributes:
        cancel: checked between steps. workers: the processes that take each step together.
    """

    on_progress: Callable[[Progress], None] | None = None
    cancel: threading.Event | None = None
    workers: Workers = field(default_factory=Workers)

    def meter(self, stage: Stage, done: float, total: float) -> Meter:
        listens = self.on_progress if self.workers.is_first else None
        return Meter(stage, done, total, listens)

    def stopped(self) -> bool:
        """Whether this process was asked to stop."""
        return self.cancel is not None and self.cancel.is_set()

    def run(
        self,
        stage: Stage,
        store: Store,
        name: str,
        total: int,
        step: Callable[[int], str],
        state: Callable[[], dict[str, Tensor]],
        restore: Callable[[dict[str, Tensor], int], None],
    ) -> None:
        """Do steps ``0 .. total - 1``, or those that an earlier run has not done.

        Args:
            name: of the checkpoint in ``store``.
            step: does one step; returns a note for the progress message.
            state, restore: everything that later steps depend on, out and in.

        Raises:
            TuningStoppedError: after a checkpoint.
            TuningError: the checkpoint cannot be written.
        """
        saved, done = store.load(name), 0
        if saved is not None:
            done = saved[1]
            restore(*saved)
        meter, last_save = self.meter(stage, done, total), time.monotonic()
        while done < total:
            if self.workers.any(self.stopped()):
                if self.workers.is_first:
                    store.save(name, state(), done)
                raise TuningStoppedError
            note = step(done)
            done += 1
            if done == total or time.monotonic() - last_save > CHECKPOINT_SECONDS:
                if self.workers.is_first:
                    store.save(name, state(), done)
                last_save = time.monotonic()
            meter.report(done, note)
        self.workers.wait()
