"""How far a long job is: what the engine reports while it downloads and loads."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

REPORT_SECONDS = 0.25


@dataclass(frozen=True)
class Progress:
    """How far a long job is. ``done`` and ``total`` are bytes while downloading, else steps or shares."""

    stage: str
    done: float
    total: float | None
    seconds_left: float | None
    stalled: bool
    message: str


class ProgressMeter:
    """Counts the bytes of one or more downloads and reports at most four times a second."""

    def __init__(self, label: str, total: int | None, on_progress: Callable[[Progress], None] | None) -> None:
        self.label, self.total, self.done = label, total, 0
        self._on_progress = on_progress
        self._recent: deque[tuple[float, int]] = deque(maxlen=40)  # ten seconds of reports
        self._last_report = 0.0

    def add(self, count: int, fresh: bool = True) -> None:
        """Count bytes; ``fresh=False`` for those that an earlier try brought."""
        self.done += count
        if not fresh:
            self._recent.clear()  # they say nothing about the speed
        self.report()

    def take_back(self, count: int) -> None:
        """Uncount bytes that have to be fetched again."""
        self.done -= count
        self._recent.clear()

    def report(self, stalled: bool = False, note: str = "") -> None:
        """Tell the listener, unless it was told a moment ago."""
        now = time.monotonic()
        finished = self.total is not None and self.done >= self.total
        if self._on_progress is None or (now - self._last_report < REPORT_SECONDS and not finished):
            return
        self._last_report = now
        if stalled:
            self._recent.clear()
        else:
            self._recent.append((now, self.done))
        left = self._seconds_left()
        self._on_progress(
            Progress("download", self.done, self.total, left, stalled, self._message(left, note))
        )

    def _seconds_left(self) -> float | None:
        if self.total is None or len(self._recent) < 2:
            return None
        (then, before), (now, after) = self._recent[0], self._recent[-1]
        if now - then < 0.5 or after <= before:
            return None
        return (self.total - self.done) * (now - then) / (after - before)

    def _message(self, left: float | None, note: str) -> str:
        size = f"{self.done / 1e6:.0f}" + (f" of {self.total / 1e6:.0f}" if self.total else "") + " MB"
        tail = f", {note}" if note else f", {format_seconds(left)} left" if left is not None else ""
        return f"Downloading {self.label}: {size}{tail}."


def format_seconds(seconds: float) -> str:
    """``8 s``, ``3 min``, ``2 h``: as exact as an estimate deserves."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{round(seconds / 3600)} h"
