"""What happens when a chat outgrows the model's context.

The oldest turns leave first; system messages at the front and everything from the last user message on
stay. Turns leave until the prompt fits with room for the answer: the tokens asked for, but no more than a
quarter of the context. If even the shortest form leaves less room it is used all the same, as long as it
fits at all. The user is told in a notice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.errors import InvalidRequestError
from engine.requests import Message


@dataclass(frozen=True)
class FittedPrompt:
    """Prompt ids that fit, and sentences for the user about what was left out."""

    ids: list[int]
    notices: tuple[str, ...] = ()


def fit_messages(
    messages: Sequence[Message],
    encode: Callable[[Sequence[Message]], list[int]],
    context_length: int,
    max_new_tokens: int,
) -> FittedPrompt:
    """Encode ``messages``, leaving out the oldest turns if they do not fit.

    Raises:
        InvalidRequestError: the last message alone is longer than the context.
    """
    room = context_length - min(max_new_tokens, context_length // 4)
    ids = encode(messages)
    if len(ids) <= room:
        return FittedPrompt(ids)
    cuts = _cuts(messages)  # ascending numbers of left-out messages, 0 first
    low, high = 1, len(cuts) - 1
    best = encode(_without(messages, cuts[-1])) if high else ids
    check_length(len(best), context_length)
    if not high:
        return FittedPrompt(ids)
    left_out = cuts[-1]
    while low < high:  # the smallest cut that fits
        middle = (low + high) // 2
        shorter = encode(_without(messages, cuts[middle]))
        if len(shorter) <= room:
            high, best, left_out = middle, shorter, cuts[middle]
        else:
            low = middle + 1
    what = "oldest message was" if left_out == 1 else f"oldest {left_out} messages were"
    return FittedPrompt(
        best,
        (
            f"The {what} left out, because the chat is longer than the model's context "
            f"of {context_length} tokens.",
        ),
    )


def check_length(num_tokens: int, context_length: int) -> None:
    """Refuse a prompt that leaves no room for one new token.

    Raises:
        InvalidRequestError: it is too long.
    """
    if num_tokens >= context_length:
        raise InvalidRequestError(
            f"The prompt has {num_tokens} tokens, but the model's context holds {context_length}; shorten it."
        )


def _first_turn(messages: Sequence[Message]) -> int:
    first = 0
    while first < len(messages) and messages[first].role == "system":
        first += 1
    return first


def _cuts(messages: Sequence[Message]) -> list[int]:
    """How many messages may be left out so that the rest begins with a user's turn."""
    users = [i for i, message in enumerate(messages) if message.role == "user"]
    first = _first_turn(messages)
    return [0, *(at - first for at in users if at > first)]


def _without(messages: Sequence[Message], count: int) -> list[Message]:
    first = _first_turn(messages)
    return [*messages[:first], *messages[first + count :]]
