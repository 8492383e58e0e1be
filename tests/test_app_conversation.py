"""One answer from click to stored chat: streaming, stopping, waiting, failing; nothing is ever lost."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine import FakeSession, ready_host, wait_until

from app import conversation
from app.chats import ChatStore, ChatStoreError, StoredMessage
from app.conversation import UNEXPECTED, AnswerSettings, AnswerUpdate, stream_answer
from app.engine_host import EngineHost, ModelChoice
from engine.errors import InvalidRequestError, OutOfMemoryError
from engine.requests import FinishReason, Message, Piece, Provenance, SamplingParams

QUESTION = StoredMessage("user", "Hi?")
SETTINGS = AnswerSettings("Be brief.", SamplingParams(0.5, seed=3), 64, "plain")


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every round is shown, and waiting is short."""
    monkeypatch.setattr(conversation, "UPDATE_SECONDS", 0.0)
    monkeypatch.setattr(conversation, "_WAIT_SECONDS", 0.01)


@pytest.fixture
def store() -> ChatStore:
    return ChatStore(None)


@pytest.fixture
def chat(store: ChatStore) -> int:
    return store.create("Hi?")


def ask(
    host: EngineHost, store: ChatStore, chat: int, owner: str = "page", **changes: Any
) -> Iterator[AnswerUpdate]:
    history = changes.pop("history", [QUESTION])
    return stream_answer(host, store, chat, history, changes.pop("settings", SETTINGS), owner)


def texts(updates: list[AnswerUpdate]) -> list[str]:
    return [update.messages[-1].content for update in updates]


def test_the_answer_grows_and_is_stored(store: ChatStore, chat: int):
    session = FakeSession()
    updates = list(ask(ready_host(session), store, chat))
    assert texts(updates) == ["Hello", "Hello world", "Hello world!", "Hello world!"]
    assert all(update.messages[0] == QUESTION and not update.failed for update in updates)
    stored = store.messages(chat)
    assert stored == list(updates[-1].messages)
    assert stored[-1].details["finish_reason"] == "stop" and stored[-1].details["tokens"] == 3
    assert "stopped" not in stored[-1].details
    assert session.generations[0].closed
    assert updates[-1].metrics.num_new_tokens == 3 and updates[-1].rate == pytest.approx(100)


def test_the_engine_gets_the_history_the_system_prompt_and_the_settings(store: ChatStore, chat: int):
    session = FakeSession()
    history = [QUESTION, StoredMessage("assistant", "Yes.", {"tokens": 1}), StoredMessage("user", "Go on")]
    list(ask(ready_host(session), store, chat, history=history))
    (request,) = session.requests
    assert request.messages == (
        Message("system", "Be brief."), Message("user", "Hi?"), Message("assistant", "Yes."),
        Message("user", "Go on"),
    )  # fmt: skip
    assert (request.sampling, request.max_new_tokens, request.method) == (SETTINGS.sampling, 64, "plain")
    list(ask(ready_host(session), store, chat, settings=AnswerSettings(" \n", SamplingParams(), 64, "")))
    assert session.requests[-1].messages == (Message("user", "Hi?"),)


def test_the_question_is_stored_before_the_first_token(store: ChatStore, chat: int):
    session = FakeSession()
    answer = ask(ready_host(session), store, chat)
    next(answer)
    assert store.messages(chat) == [QUESTION]
    answer.close()


def test_the_first_token_is_shown_at_once(store: ChatStore, chat: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("app.conversation.UPDATE_SECONDS", 3600)
    updates = list(ask(ready_host(FakeSession(words=["one ", "two ", "three"])), store, chat))
    assert [text for text in texts(updates) if text] == ["one ", "one two three"]


def test_stop_keeps_what_was_written(store: ChatStore, chat: int):
    host = ready_host(FakeSession(words=["one "] * 1000))
    answer = ask(host, store, chat)
    updates = [next(answer) for _ in range(5)]
    host.stop("page")
    updates += list(answer)
    assert len(updates) < 10  # obeyed within a round
    last = store.messages(chat)[-1]
    assert last.content.startswith(updates[4].messages[-1].content) and last.details["stopped"]
    assert updates[-1].messages[-1] == last
    assert texts(list(ask(host, store, chat)))[-1]  # and the engine is free


def test_stop_before_the_first_token_leaves_the_question(store: ChatStore, chat: int):
    session = FakeSession()
    session.gate.clear()
    host = ready_host(session)
    updates: list[AnswerUpdate] = []
    thread = threading.Thread(target=lambda: updates.extend(ask(host, store, chat)))
    thread.start()
    wait_until(lambda: session.generations)
    host.stop("page")
    session.gate.set()
    thread.join(10)
    assert store.messages(chat) == [QUESTION] and updates[-1].messages == (QUESTION,)


def test_closing_the_page_stores_and_frees_the_engine(store: ChatStore, chat: int):
    session = FakeSession(words=["one "] * 1000)
    host = ready_host(session)
    answer = ask(host, store, chat)
    shown = [next(answer) for _ in range(3)][-1].messages[-1].content
    answer.close()
    assert session.generations[0].closed
    last = store.messages(chat)[-1]
    assert last.content == shown and last.details["stopped"]
    with host.turns.turn() as ahead:
        assert ahead(0) == 0
    with host.answering("page"):  # not taken for one that is still being answered
        pass


def test_an_error_of_the_engine_is_one_sentence_and_loses_nothing(store: ChatStore, chat: int):
    session = FakeSession(words=["Hello", " you", OutOfMemoryError("There is not enough memory to go on.")])
    updates = list(ask(ready_host(session), store, chat))
    assert updates[-1].failed and updates[-1].notice == "There is not enough memory to go on."
    assert texts(updates)[-1] == "Hello you" == store.messages(chat)[-1].content
    assert store.messages(chat)[-1].details["stopped"]


def test_an_unexpected_error_is_one_sentence_too(
    store: ChatStore, chat: int, caplog: pytest.LogCaptureFixture
):
    session = FakeSession(words=["Hello", ZeroDivisionError("secret detail")])
    updates = list(ask(ready_host(session), store, chat))
    assert updates[-1].failed and updates[-1].notice == UNEXPECTED and "secret" in caplog.text
    assert store.messages(chat)[-1].content == "Hello"


def test_a_request_that_the_engine_refuses(store: ChatStore, chat: int, monkeypatch: pytest.MonkeyPatch):
    session = FakeSession()

    def refuse(request: Any) -> Any:
        raise InvalidRequestError("The prompt is longer than the context.")

    monkeypatch.setattr(session, "stream_generate", refuse)
    (update,) = ask(ready_host(session), store, chat)
    assert update.failed and update.notice == "The prompt is longer than the context."
    assert update.messages == (QUESTION,) and store.messages(chat) == [QUESTION]


def test_a_full_disk_is_told(store: ChatStore, chat: int, monkeypatch: pytest.MonkeyPatch):
    def full(chat: int, messages: Any) -> None:
        raise ChatStoreError("The chat could not be saved.")

    monkeypatch.setattr(store, "replace", full)
    update = list(ask(ready_host(FakeSession()), store, chat))[-1]
    assert (
        update.failed and update.notice == "The chat could not be saved." and update.messages == (QUESTION,)
    )


def test_a_question_waits_for_the_model(store: ChatStore, chat: int):
    go = threading.Event()
    host = EngineHost(lambda *_: go.wait(10) and FakeSession(), ModelChoice("a"))
    host.start()
    answer = ask(host, store, chat)
    first = next(answer)
    assert "begins when the model is there" in first.notice and not first.failed
    assert store.messages(chat) == [QUESTION]
    go.set()
    updates = list(answer)
    assert texts(updates)[-1] == "Hello world!" and updates[-1].notice == ""


def test_waiting_for_the_model_can_be_stopped(store: ChatStore, chat: int):
    go = threading.Event()
    host = EngineHost(lambda *_: go.wait(10) and FakeSession(), ModelChoice("a"))
    host.start()
    answer = ask(host, store, chat)
    next(answer)
    host.stop("page")
    assert [update.messages for update in answer] == [(QUESTION,)]
    go.set()


def test_a_model_that_does_not_load_is_told(store: ChatStore, chat: int):
    def fail(*_: Any) -> Any:
        raise InvalidRequestError("There is no model 'x'.")

    host = EngineHost(fail, ModelChoice("x"))
    host.start()
    update = list(ask(host, store, chat))[-1]
    assert update.failed and update.notice == "There is no model 'x'." and store.messages(chat) == [QUESTION]


def test_two_pages_take_turns_and_the_second_is_told_its_place(store: ChatStore, chat: int):
    session = FakeSession(words=["one "] * 20)
    host = ready_host(session)
    first = ask(host, store, chat, "first")
    next(first)
    second = ask(host, store, store.create("other"), "second")
    third = ask(host, store, store.create("third"), "third")
    assert next(second).notice == "Waiting: one question is ahead of yours."
    assert next(third).notice == "Waiting: 2 questions are ahead of yours."
    host.stop("second")
    assert [update.messages for update in second][-1] == (QUESTION,)
    assert next(third).notice == "Waiting: one question is ahead of yours."
    assert len(session.generations) == 1  # nothing is computed, or allocated, for those who wait
    list(first)
    assert texts(list(third))[-1] == "one " * 20


def test_a_second_answer_in_the_same_page_is_refused(store: ChatStore, chat: int):
    host = ready_host(FakeSession(words=["one "] * 20))
    first = ask(host, store, chat)
    next(first)
    (refusal,) = ask(host, store, chat, history=[StoredMessage("user", "other")])
    assert refusal.failed and "being written" in refusal.notice
    list(first)
    assert [turn.content for turn in store.messages(chat)] == ["Hi?", "one " * 20]  # the first is untouched


@pytest.mark.parametrize(
    ("reason", "word"), [(FinishReason.CONTEXT, "context is full"), (FinishReason.LENGTH, "token limit")]
)
def test_an_answer_that_was_cut_off_says_why(store: ChatStore, chat: int, reason: FinishReason, word: str):
    session = FakeSession(finish_reason=reason, notices=["The oldest 2 messages were left out."])
    update = list(ask(ready_host(session), store, chat))[-1]
    assert update.notice.startswith("The oldest 2 messages were left out. ") and word in update.notice
    assert not update.failed


def test_a_model_unloaded_mid_answer_says_so(store: ChatStore, chat: int):
    session = FakeSession(words=["one "] * 1000)
    answer = ask(ready_host(session), store, chat)
    next(answer)
    session.generations[0].close()  # as Session.close does
    update = list(answer)[-1]
    assert "another model" in update.notice
    assert store.messages(chat)[-1].content and store.messages(chat)[-1].details["stopped"]


def test_drafted_characters_are_remembered(store: ChatStore, chat: int):
    own, drafted, bonus = Provenance.VERIFIED, Provenance.DRAFTED, Provenance.BONUS
    rounds = [
        (Piece(1, own, "The"),),
        (Piece(2, drafted, " sky"), Piece(3, drafted, ""), Piece(4, drafted, " is"), Piece(5, bonus, " bl")),
        (Piece(6, drafted, "ue"), Piece(7, own, ".")),
        (Piece(8, drafted, ""), Piece(9, bonus, "")),
    ]
    list(ask(ready_host(FakeSession(words=rounds)), store, chat))
    last = store.messages(chat)[-1]
    assert [last.content[begin:end] for begin, end in last.details["drafted"]] == [" sky is", "ue"]


def test_a_real_tiny_model_answers(store: ChatStore, chat: int, tmp_path: Any):
    from engine.loading import load_session
    from tests import tiny

    session = load_session("tiny", tiny.save_model(tmp_path / "tiny"), "fp32", "cpu", threads=1)
    host = ready_host(session)
    updates = list(
        ask(host, store, chat, settings=AnswerSettings("", SamplingParams(1.0, seed=1), 24, "plain"))
    )
    assert not updates[-1].failed, updates[-1].notice
    details = store.messages(chat)[-1].details
    assert 0 < details["tokens"] <= 24 and details["tokens_per_second"] > 0
    shown = texts(updates)
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(shown))
    host.close()
    assert list(ask(host, store, chat))[-1].failed
