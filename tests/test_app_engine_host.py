"""Loading in the background, turns on the engine, and stopping."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from fake_engine import FakeSession, ready_host, wait_until

from app.engine_host import EngineHost, ModelChoice, TurnQueue
from engine.errors import InvalidRequestError, ModelFileError, SlipstreamError
from engine.progress import Progress


class StepLoader:
    """A loader that reports and returns when the test says so."""

    def __init__(self) -> None:
        self.go: dict[str, threading.Event] = {}
        self.sessions: dict[str, FakeSession] = {}
        self.loading: list[str] = []

    def __call__(
        self, choice: ModelChoice, on_progress: Callable[[Progress], None], cancel: threading.Event
    ) -> Any:
        go = self.go.setdefault(choice.source, threading.Event())
        self.loading.append(choice.source)
        while not go.wait(0.01):
            on_progress(Progress("download", 25, 100, 8.0, False, f"Downloading {choice.source}."))
        return self.sessions.setdefault(choice.source, FakeSession(name=choice.source))

    def release(self, source: str) -> None:
        self.go.setdefault(source, threading.Event()).set()


@pytest.fixture
def loader() -> StepLoader:
    return StepLoader()


def failing(error: Exception) -> EngineHost:
    def load(choice: ModelChoice, on_progress: Any, cancel: Any) -> Any:
        raise error

    host = EngineHost(load, ModelChoice("a"))
    host.start()
    wait_until(lambda: host.state.stage != "loading")
    return host


def test_progress_is_told_until_the_session_is_there(loader: StepLoader):
    host = EngineHost(loader, ModelChoice("a"))
    assert host.state.stage == "loading" and host.loaded is None
    with pytest.raises(SlipstreamError, match="Starting"):
        _ = host.session
    host.start()
    wait_until(lambda: host.state.share == 0.25)
    assert host.state.message == "Downloading a."
    loader.release("a")
    wait_until(lambda: host.state.stage == "ready")
    assert host.session is host.loaded is loader.sessions["a"] and host.state.message == "a is ready."


def test_a_sentence_of_the_engine_reaches_the_page():
    host = failing(ModelFileError("The file is truncated; download it again."))
    assert (host.state.stage, host.state.message) == ("failed", "The file is truncated; download it again.")
    with pytest.raises(SlipstreamError, match="truncated"):
        _ = host.session


@pytest.mark.parametrize(("error", "word"), [(MemoryError(), "memory"), (KeyError("x"), "log")])
def test_other_failures_become_a_sentence(error: Exception, word: str):
    state = failing(error).state
    assert state.stage == "failed" and word in state.message and state.message.endswith(".")


def test_a_failed_load_can_be_tried_again():
    sessions = iter([ModelFileError("No."), FakeSession()])

    def load(choice: ModelChoice, on_progress: Any, cancel: Any) -> Any:
        outcome = next(sessions)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    host = EngineHost(load, ModelChoice("a"))
    host.start()
    wait_until(lambda: host.state.stage == "failed")
    host.start()
    wait_until(lambda: host.state.stage == "ready")


def test_loading_can_be_stopped_and_gone_on_with(loader: StepLoader):
    host = EngineHost(loader, ModelChoice("a"))
    host.start()
    wait_until(lambda: host.state.share is not None)
    host.cancel_loading()
    wait_until(lambda: host.state.stage == "cancelled")
    assert "Try again" in host.state.message
    loader.release("a")
    host.start()
    wait_until(lambda: host.state.stage == "ready")


def test_another_model_takes_the_place_of_the_one_that_is_loading(loader: StepLoader):
    host = EngineHost(loader, ModelChoice("a"))
    host.start()
    wait_until(lambda: host.state.share is not None)
    seen = set()
    host.start(ModelChoice("b"))
    for _ in range(50):
        seen.add(host.state.stage)
        threading.Event().wait(0.004)
    assert seen == {"loading"}  # the end of the first load must not look like the end of this one
    loader.release("b")
    wait_until(lambda: host.state.stage == "ready")
    assert host.session.info.name == "b" and loader.loading == ["a", "b"] and host.choice.source == "b"


def test_a_load_that_ends_too_late_is_thrown_away():
    """It did not look at the flag in time."""
    go = threading.Event()
    sessions = {"a": FakeSession(name="a"), "b": FakeSession(name="b")}

    def load(choice: ModelChoice, on_progress: Any, cancel: Any) -> Any:
        if choice.source == "a":
            go.wait(10)
        return sessions[choice.source]

    host = EngineHost(load, ModelChoice("a"))
    host.start()
    host.start(ModelChoice("b"))
    go.set()
    wait_until(lambda: host.state.stage == "ready")
    assert host.session is sessions["b"] and sessions["a"].closed and not sessions["b"].closed


def test_the_first_model_is_unloaded_before_the_second_is_loaded(loader: StepLoader):
    host = EngineHost(loader, ModelChoice("a"))
    loader.release("a")
    host.start()
    wait_until(lambda: host.state.stage == "ready")
    host.start(ModelChoice("b"))
    wait_until(lambda: "b" in loader.loading)
    assert loader.sessions["a"].closed and host.loaded is None
    loader.release("b")
    wait_until(lambda: host.state.stage == "ready")


def test_the_end_of_the_app_unloads_and_forgets_what_is_loading(loader: StepLoader):
    session = FakeSession()
    host = ready_host(session)
    host.close()
    assert session.closed and host.loaded is None
    late, go = FakeSession(), threading.Event()
    host = EngineHost(lambda *_: go.wait(10) and late, ModelChoice("a"))
    host.start()
    host.close()
    go.set()
    wait_until(lambda: late.closed)
    assert host.loaded is None


# Turns


def test_first_come_first_served_and_everybody_knows_their_place():
    queue = TurnQueue()
    with queue.turn() as first, queue.turn() as second, queue.turn() as third:
        assert [ahead(0) for ahead in (first, second, third)] == [0, 1, 2]
    with queue.turn() as again:
        assert again(0) == 0


def test_leaving_the_line_moves_the_others_up_at_once():
    queue = TurnQueue()
    told: list[int] = []
    standing = threading.Event()

    def wait() -> None:
        with queue.turn() as ahead:
            standing.set()
            told.append(ahead(10))

    with queue.turn():
        thread = threading.Thread(target=wait)
        thread.start()
        standing.wait(5)
    thread.join(5)
    assert told == [0]


def test_an_error_in_ones_turn_gives_it_back():
    queue = TurnQueue()
    with pytest.raises(ValueError, match="x"), queue.turn():
        raise ValueError("x")
    with queue.turn() as ahead:
        assert ahead(0) == 0


# Answering


def test_one_answer_at_a_time_for_each_page():
    host = ready_host(FakeSession())
    with host.answering("page"):
        with host.answering("another page"):
            pass
        with pytest.raises(InvalidRequestError, match="stop it first"), host.answering("page"):
            pass
    with host.answering("page") as answering:
        assert not answering.stopped


def test_stop_reaches_the_generation_whenever_it_comes():
    session = FakeSession()
    host = ready_host(session)
    host.stop("page")  # nothing to stop is no error
    with host.answering("page") as answering, host.answering("other") as other:
        generation = session.stream_generate(None)  # type: ignore[arg-type]
        answering.attach(generation)
        host.stop("page")
        assert answering.stopped and generation.cancelled.is_set() and not other.stopped
    with host.answering("page") as answering:
        host.stop("page")  # before there is a generation
        generation = session.stream_generate(None)  # type: ignore[arg-type]
        answering.attach(generation)
        assert generation.cancelled.is_set()
    assert generation.closed  # the engine is given back
