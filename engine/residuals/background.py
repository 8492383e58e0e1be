"""Tuning on behalf of another program: a line of JSON for each report, at low priority, until standard input ends.

So whoever asked stops it by closing that pipe, and it does not outlive them, however they end.
"""

from __future__ import annotations

import json
import sys
import threading
from contextlib import suppress
from typing import Any

from engine.progress import Progress

_NICENESS = 10  # other programs, the chat among them, come first


class JsonLines:
    """Reports on standard output: ``{"message", "share"}`` on the way, ``{"result"}`` or ``{"error"}`` at the end, each a
    sentence. A reader that has gone away is no error."""

    def show(self, progress: Progress) -> None:
        """How far it is; ``share`` is that of the stage, 0 to 1, or None."""
        share = min(1.0, progress.done / progress.total) if progress.total else None
        self._write(message=progress.message, share=share)

    def finish(self, sentence: str) -> None:
        """It is done."""
        self._write(result=sentence)

    def fail(self, sentence: str) -> None:
        """It cannot go on."""
        self._write(error=sentence)

    def _write(self, **fields: Any) -> None:
        with suppress(OSError):  # nobody reads any more: the end of the input stops us
            sys.stdout.write(json.dumps(fields) + "\n")
            sys.stdout.flush()


def step_back() -> None:
    """Have this process run when others do not want to."""
    import psutil

    process = psutil.Process()
    if sys.platform == "win32":
        process.nice(psutil.BELOW_NORMAL_PRIORITY_CLASS)
    else:  # whoever began lower still may not rise
        process.nice(max(_NICENESS, process.nice()))


def stop_with_input(cancel: threading.Event) -> None:
    """Set ``cancel`` once standard input has ended."""

    def wait() -> None:
        sys.stdin.buffer.read()
        cancel.set()

    threading.Thread(target=wait, name="input", daemon=True).start()
