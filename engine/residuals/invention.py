"""Prompts that a chat model makes up itself.

Behind what its chat template puts before a user's words, such a model writes what a user would (Magpie, arXiv
2406.08464). A few thousand prompts of a file are soon learnt by heart; these cost their writing alone.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import takewhile

from engine.requests import Message
from engine.residuals.corpus import Sequences
from engine.tokenizer import Tokenizer

TEMPERATURE = (
    0.9  # our choice: at 1 a small model loses the thread, well below it asks the same again and again
)
MAX_TOKENS = 96  # longer ones are left out
_LEAST_TOKENS = 4


@dataclass(frozen=True)
class Frame:
    """The ids that a chat's template puts before and behind a user's only message."""

    before: tuple[int, ...]
    behind: tuple[int, ...]


def chat_frame(tokenizer: Tokenizer) -> Frame:
    """What the chats of two different messages have in common at both ends."""
    one, other = (tuple(tokenizer.encode_chat([Message("user", text)])) for text in "AB")
    before, behind = _common(one, other), _common(one[::-1], other[::-1])
    return Frame(one[:before], one[len(one) - behind :])


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def as_prompts(
    written: Sequences, frame: Frame, eos_ids: Collection[int], special: Collection[int]
) -> list[tuple[int, ...]]:
    """Chats of the user's turns that were written to an end.

    Args:
        special: ids that no user writes.
    """
    found = list[tuple[int, ...]]()
    rows = zip(
        written.tokens.tolist(), written.prompt_lengths.tolist(), written.lengths.tolist(), strict=True
    )
    for ids, begin, end in rows:
        *turn, last = ids[begin:end]
        if last in eos_ids and len(turn) >= _LEAST_TOKENS and not any(index in special for index in turn):
            found.append((*frame.before, *turn, *frame.behind))
    return found
