"""The one place where the app holds the engine: loading it, taking turns on it, stopping it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from app.spare_sessions import SpareSessions
from engine.errors import InvalidRequestError, SlipstreamError

if TYPE_CHECKING:
    from engine.progress import Progress

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelChoice:
    """Which model to load, and how.

    Attributes:
        memory: what a mixture-of-experts model may take, as a person writes it: ``6GB``; empty: what is free.
    """

    source: str
    weight_format: str = "auto"
    memory: str = ""

    def memory_bytes(self) -> int | None:
        """``memory`` as a number; None: what is free.

        Raises:
            InvalidRequestError: it is no amount of memory.
        """
        from engine.experts.planner import parse_memory

        return parse_memory(self.memory) if self.memory.strip() else None


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


Listener = Callable[["Progress"], None]
Loader = Callable[[ModelChoice, Listener, threading.Event], Any]


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


class Answering:
    """One answer that a browser session asked for, from its click to its last token."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._generation: Any = None

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    def attach(self, generation: Any) -> None:
        """The engine has begun to compute it."""
        self._generation = generation
        if self.stopped:  # stop() may have come before there was anything to cancel
            generation.cancel()

    def stop(self) -> None:
        """Ask it to end; it keeps what it has. Also ends the waiting in line."""
        self._stopped.set()
        if self._generation is not None:
            self._generation.cancel()

    def close(self) -> None:
        """Give the engine back."""
        self._stopped.set()
        if self._generation is not None:
            self._generation.close()


class EngineHost:
    """Loads a session in the background and keeps it; knows who is being answered.

    Args:
        load: builds the session from the choice; gets a progress listener and an event that asks it to
            stop. Runs in a thread of its own.
    """

    def __init__(self, load: Loader, choice: ModelChoice) -> None:
        self._load = load
        self.choice = choice
        self._session: Any = None
        self._state = LoadState("loading", "Starting the engine.")
        self._answering: dict[str, Answering] = {}  # by browser session
        self._lock = threading.Lock()
        self._cancel = threading.Event()
        self._thread: threading.Thread | None = None
        self.turns = TurnQueue()
        self.spares = SpareSessions(self._load_spare)

    def start(self, choice: ModelChoice | None = None) -> None:
        """Begin to load: at first, again after a failure, or another model in place of the present one."""
        with self._lock:
            self._cancel.set()  # a load under way gives up at its next report
            before, self._thread = self._thread, None
            self._cancel = threading.Event()
            self.choice = choice or self.choice
            self._state = LoadState("loading", f"Loading {self.choice.source}.")
            self._thread = threading.Thread(
                target=self._run, args=(self.choice, self._cancel, before), name="load-model", daemon=True
            )
            self._thread.start()

    def cancel_loading(self) -> None:
        """Stop loading at the next report of progress; what was downloaded is kept."""
        self._cancel.set()

    @property
    def state(self) -> LoadState:
        return self._state

    @property
    def loaded(self) -> Any:
        """The session, or None while there is none."""
        return self._session

    @property
    def session(self) -> Any:
        """The loaded session.

        Raises:
            SlipstreamError: there is none (yet), with the reason.
        """
        session = self._session
        if session is None:
            raise SlipstreamError(self._state.message)
        return session

    @contextmanager
    def answering(self, owner: str) -> Iterator[Answering]:
        """Be answering ``owner`` (a browser session) while the block runs, so that :meth:`stop` works.

        Raises:
            InvalidRequestError: an answer for this page is being written already.
        """
        with self._lock:
            if owner in self._answering:
                raise InvalidRequestError("An answer is being written; stop it first, or wait for its end.")
            answering = self._answering[owner] = Answering()
        try:
            yield answering
        finally:
            answering.close()
            with self._lock:
                del self._answering[owner]

    def stop(self, owner: str) -> None:
        """Ask for the end of a browser session's answer, if there is one."""
        with self._lock:
            answering = self._answering.get(owner)
        if answering is not None:
            answering.stop()

    def close(self) -> None:
        """Unload the model."""
        with self._lock:
            self._cancel.set()
            self._cancel = threading.Event()  # a load under way is not ours any more
        self._unload()

    def _load_spare(self, weight_format: str) -> Any:
        choice = replace(self.choice, weight_format=weight_format)
        return self._load(choice, lambda progress: None, threading.Event())

    def _unload(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()
        self.spares.keep_only(())

    def _run(self, choice: ModelChoice, cancel: threading.Event, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        self._unload()  # before the next one is loaded: both might not fit
        try:
            session = self._load(choice, lambda progress: self._report(progress, cancel), cancel)
        except SlipstreamError as error:
            self._fail(cancel, str(error))
        except MemoryError:
            self._fail(cancel, "There is not enough memory for this model; choose a smaller one.")
        except Exception:
            self._fail(cancel, "The model could not be loaded; details are in the log.")
        else:
            with self._lock:
                if cancel is self._cancel:
                    self._session = session
                    self._state = LoadState("ready", f"{session.info.name} is ready.", 1.0)
                    return
            session.close()  # another load was begun meanwhile, or the app ends

    def _fail(self, cancel: threading.Event, sentence: str) -> None:
        _log.exception("the model could not be loaded")
        with self._lock:
            if cancel is not self._cancel:
                return  # another load was begun meanwhile, and the page is told about that one
            if cancel.is_set():
                self._state = LoadState("cancelled", "Loading was stopped; Try again goes on where it ended.")
            else:
                self._state = LoadState("failed", sentence)

    def _report(self, progress: Progress, cancel: threading.Event) -> None:
        share = progress.done / progress.total if progress.total else None
        with self._lock:
            if cancel.is_set():
                raise SlipstreamError("Loading was stopped.")
            self._state = LoadState("loading", progress.message, share)
