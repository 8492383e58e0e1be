"""Chats longer than the context: who leaves, who stays, and what the user is told."""

from __future__ import annotations

import pytest

from engine.context import check_length, fit_messages
from engine.errors import InvalidRequestError
from engine.requests import Message

SYSTEM = Message("system", "s" * 10)


def encode(messages) -> list[int]:
    """One id per character and two per message."""
    return [ord(char) for message in messages for char in f"[{message.content}]"]


def text(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def chat(turns: int, size: int = 8) -> list[Message]:
    messages = [SYSTEM]
    for turn in range(turns):
        messages.append(Message("user", f"u{turn}".ljust(size, ".")))
        messages.append(Message("assistant", f"a{turn}".ljust(size, ".")))
    return [*messages, Message("user", "last")]


def test_a_chat_that_fits_is_left_alone():
    fitted = fit_messages(chat(3), encode, 200, 50)
    assert fitted.ids == encode(chat(3)) and fitted.notices == ()


def test_oldest_turns_leave_first_and_the_user_is_told():
    # 12 + 10 n + 10 n + 6; room 100 - 20
    fitted = fit_messages(chat(4), encode, 100, 20)
    kept = text(fitted.ids)
    assert kept.startswith("[ssssssssss][u1") and kept.endswith("[a3......][last]")
    assert len(fitted.ids) <= 80
    assert fitted.notices == (
        "The oldest 2 messages were left out, because the chat is longer than the model's context "
        "of 100 tokens.",
    )


@pytest.mark.parametrize("context_length", range(30, 120, 3))
def test_as_few_as_needed_leave(context_length: int):
    """Against trying every number of turns in order."""
    turns, room = 5, context_length - context_length // 4
    fitted = fit_messages(chat(turns), encode, context_length, 1000)
    options = [encode([SYSTEM, *chat(turns)[1 + 2 * left_out :]]) for left_out in range(turns + 1)]
    fitting = [ids for ids in options if len(ids) <= room]
    assert fitted.ids == (fitting[0] if fitting else options[-1])


def test_system_prompt_and_last_turn_use_even_the_room_for_the_answer():
    fitted = fit_messages(chat(2), encode, 19, 1000)
    assert text(fitted.ids) == "[ssssssssss][last]"


def test_one_message_is_named_as_one():
    messages = [Message("user", "x" * 50), Message("user", "last")]
    assert fit_messages(messages, encode, 60, 20).notices[0].startswith("The oldest message was left out")


def test_a_last_message_longer_than_the_context_is_refused():
    for messages in ([Message("user", "x" * 100)], [*chat(2)[:-1], Message("user", "x" * 100)]):
        with pytest.raises(InvalidRequestError, match=r"has \d+ tokens, but .* holds 90; shorten it\."):
            fit_messages(messages, encode, 90, 20)


def test_room_for_one_token_is_enough():
    check_length(9, 10)
    with pytest.raises(InvalidRequestError):
        check_length(10, 10)


def test_an_unanswered_regeneration_keeps_its_question():
    """A chat may end with the assistant's beginning; the question before it stays."""
    messages = [*chat(3), Message("assistant", "so far")]
    kept = text(fit_messages(messages, encode, 50, 10).ids)
    assert kept.endswith("[last][so far]") and kept.startswith("[ssssssssss]")
