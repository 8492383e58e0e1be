"""The one place where the app holds the engine: loading it, taking turns on it, stopping it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import SlipstreamError

if TYPE_CHECKING:
    from engine.progress import Progress

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadState:
    """What the page says while there is no model.

    Attributes:
        stage: ``loading``, ``ready``, ``failed`` or ``cancelled``.
        share: 0 to 1 where known.
    """

    stage: str
    message: str
    share: float | None = None


class TurnQueue:
    """First come, first served; everybody can be told their place."""

    def __init__(self) -> None:
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def turn(self) -> Iterator[Callable[[float], int]]:
        """Stand in line while the block runs. Call the yielded function to wait up to some seconds for
        the turn: it returns how many are ahead, 0 when it is yours."""
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)

        def ahead(seconds: float) -> int:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting[0] is ticket, timeout=seconds)
                return self._waiting.index(ticket)

        try:
            yield ahead
        finally:
            with self._changed:
                self._waiting.remove(ticket)
                self._changed.notify_all()


class EngineHost:
    """Loads a session in the background and keeps it.

    Args:
        load: builds the session; gets a progress listener. Runs in its own thread.
    """

    def __init__(self, load: Callable[[Callable[[Progress], None]], Any]) -> None:
        self._load = load
        self._state = LoadState("loading", "Starting the engine.")
        self._session: Any = None
        self._running: dict[str, Any] = {}  # browser session -> Generation
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self.turns = TurnQueue()

    def start(self) -> None:
        """Begin to load (again, after a failure)."""
        self._cancelled.clear()
        self._state = LoadState("loading", "Starting the engine.")
        threading.Thread(target=self._run, name="load-model", daemon=True).start()

    def cancel_loading(self) -> None:
        """Stop loading at the next report of progress; what was downloaded is kept."""
        self._cancelled.set()

    @property
    def state(self) -> LoadState:
        return self._state

    @property
    def session(self) -> Any:
        """The loaded session.

        Raises:
            SlipstreamError: there is none (yet), with the reason.
        """
        if self._session is None:
            raise SlipstreamError(self._state.message)
        return self._session

    def begin(self, owner: str, generation: Any) -> None:
        """Note the running generation of a browser session, so that :meth:`stop` finds it."""
        with self._lock:
            self._running[owner] = generation

    def end(self, owner: str) -> None:
        """Close a browser session's generation."""
        with self._lock:
            generation = self._running.pop(owner, None)
        if generation is not None:
            generation.close()

    def stop(self, owner: str) -> None:
        """Ask a browser session's generation to stop; it keeps what it has."""
        with self._lock:
            generation = self._running.get(owner)
        if generation is not None:
            generation.cancel()

    def _run(self) -> None:
        try:
            self._session = self._load(self._report)
            self._state = LoadState("ready", f"{self._session.info.name} is ready.", 1.0)
        except SlipstreamError as error:
            stage = "cancelled" if self._cancelled.is_set() else "failed"
            self._state = LoadState(stage, str(error))
            _log.exception("the model could not be loaded")
        except Exception:
            self._state = LoadState("failed", "The model could not be loaded; details are in the log.")
            _log.exception("the model could not be loaded")

    def _report(self, progress: Progress) -> None:
        if self._cancelled.is_set():
            raise SlipstreamError("Loading was stopped; choose Try again to go on where it ended.")
        share = progress.done / progress.total if progress.total else None
        self._state = LoadState("loading", progress.message, share)
