"""Training for the loaded model, in a process of its own: it can be stopped at any time, and goes on from there."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from engine.session import Trainable

_log = logging.getLogger(__name__)
_COMMAND = (sys.executable, "-m", "engine.cli", "tune", "--background")
_ROOT = Path(__file__).resolve().parents[1]

Stage: TypeAlias = Literal["idle", "running", "stopping", "stopped", "done", "failed"]


@dataclass(frozen=True)
class TrainingState:
    """How far it is.

    Attributes:
        source: the model it is for.
        message: a sentence for people.
        share: of the stage that it is in, 0 to 1 where known.
    """

    stage: Stage = "idle"
    source: str = ""
    message: str = ""
    share: float | None = None

    @property
    def is_under_way(self) -> bool:
        return self.stage in ("running", "stopping")


class Training:
    """At most one at a time. It ends with the app, and goes on when it is asked for again.

    Args:
        command: what is started; the model and what to train are appended (tests have another).
    """

    def __init__(self, command: Sequence[str] = _COMMAND) -> None:
        self._command = tuple(command)
        self._state = TrainingState()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    @property
    def state(self) -> TrainingState:
        return self._state

    def start(self, source: str, what: Trainable, memory: str = "") -> None:
        """Begin, or go on with what was stopped; nothing, while one is under way.

        Args:
            memory: what a mixture-of-experts model may take; empty: what is free.
        """
        command = [*self._command, "--model", source]
        if what == "experts":
            command += ["--experts", "--maps", *(["--memory", memory] if memory else [])]
        with self._lock:
            if self._state.is_under_way:
                return
            self._state = TrainingState("running", source, "Starting.")
            try:
                self._process = subprocess.Popen(
                    command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                    text=True, encoding="utf-8", creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
                )  # fmt: skip
            except OSError:
                _log.exception("training could not be started")
                self._state = TrainingState(
                    "failed", source, "Training could not be started; details are in the log."
                )
                return
        for target in (_keep_log, self._follow):
            threading.Thread(target=target, args=(self._process,), name="training", daemon=True).start()

    def stop(self) -> None:
        """Ask it to end; what is done is kept."""
        with self._lock:
            process, state = self._process, self._state
            if process is None or process.stdin is None or state.stage != "running":
                return
            self._state = TrainingState(
                "stopping", state.source, "Stopping; what is done is kept.", state.share
            )
            process.stdin.close()

    def _follow(self, process: subprocess.Popen[str]) -> None:
        """Until it ends."""
        source, end = self._state.source, None
        assert process.stdout is not None
        for line in process.stdout:
            try:
                report = json.loads(line)
            except ValueError:  # something else that was printed
                continue
            if "message" in report:
                self._report(str(report["message"]), report.get("share"))
            elif "result" in report:
                end = TrainingState("done", source, str(report["result"]), 1.0)
            elif "error" in report:
                end = TrainingState("failed", source, str(report["error"]))
        status = process.wait()
        with self._lock:
            if end is None and self._state.stage == "stopping":
                end = TrainingState("stopped", source, "Training was stopped; it goes on where it ended.")
            if end is None:
                _log.error("training ended with status %s", status)
                sentence = "Training ended before its time; details are in the log. What is done is kept."
                end = TrainingState("failed", source, sentence)
            self._state, self._process = end, None

    def _report(self, message: str, share: float | None) -> None:
        with self._lock:
            if self._state.stage == "running":
                self._state = TrainingState("running", self._state.source, message, share)


def _keep_log(process: subprocess.Popen[str]) -> None:
    """What it says on standard error."""
    assert process.stderr is not None
    for line in process.stderr:
        _log.info("training: %s", line.rstrip())
