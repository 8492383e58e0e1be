"""Choosing tokens and putting drafts in order by native code, for one generation's settings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from engine.decoding.logit_notes import LogitNotes, notes_of, sharpness_of
from engine.decoding.native_code import native_or_none
from engine.decoding.native_memory import address, numbers
from engine.decoding.ranking import Candidates, Floats, Ranked, Tokens
from engine.decoding.seen import SeenTokens
from engine.kernels import choice_fields as fields
from engine.requests import SamplingParams

if TYPE_CHECKING:
    from engine.kernels.native import Choices

_MOST_DRAFTED = 64
_LOGIT_BYTES = 4


class NativeChoice:
    """A task of :mod:`engine.kernels.choices`.

    Attributes:
        size: of the logits that it took last.
        weighs_at: the temperature at which a pass should weigh blocks of logits for it; 0: that is not asked for.
    """

    def __init__(self, params: SamplingParams, key: int, code: Choices) -> None:
        self._code = code
        self._task = np.zeros(fields.NUM_FIELDS, np.int64)
        self._words, self._floats = numbers(self._task.view(np.uint64)), numbers(self._task.view(np.float64))
        self._address = address(self._task)
        scratch, drafted = np.empty(2 * fields.MOST_ALONE, np.int64), np.zeros(_MOST_DRAFTED, np.int64)
        self._alive, self._drafted = (scratch, drafted), numbers(drafted)
        self._words[fields.SCRATCH], self._words[fields.DRAFTED] = address(scratch), address(drafted)
        self._words[fields.TOP_K], self._words[fields.KEY] = int(params.top_k), key
        self._lowers = params.repetition_penalty >= 1  # else an unlikely token may become a likely one
        self.weighs_at = params.temperature if params.top_p < 1 and params.top_k == 0 else 0.0
        floats = self._floats
        floats[fields.TEMPERATURE], floats[fields.PENALTY] = params.temperature, params.repetition_penalty
        floats[fields.TOP_P], floats[fields.MIN_P] = params.top_p, params.min_p
        floats[fields.SHARPNESS] = sharpness_of(params.temperature)
        self._logits: Tensor | None = None
        self._tokens: Tokens | None = None
        self._weights: Floats | None = None
        self._reads = False
        self._first = self.size = 0
        self._notes = self._own_notes = LogitNotes(1, 0)

    def takes(self, logits: Tensor) -> bool:
        """Whether logits ``[V]`` or ``[T, V]`` are of the kind that the code reads; :meth:`choose` then does."""
        if logits is not self._logits:  # to ask torch takes longer than to choose
            self._logits = logits
            self._reads = (
                logits.dtype == torch.float32 and logits.device.type == "cpu" and logits.is_contiguous()
            )
            if logits.shape[-1] != self.size:
                self._own_notes = LogitNotes(1, logits.shape[-1])
            self._first, self.size = logits.data_ptr(), logits.shape[-1]
            self._notes = notes_of(logits) or self._own_notes
        return self._reads and self._lowers

    def choose(self, row: int, position: int, seen: SeenTokens | None) -> int | None:
        """The next token for that row of the logits; None: it cannot be told so.

        Args:
            position: of that token.
            seen: the text so far, for the repetition penalty; None: there is no penalty.
        """
        words, size = self._words, self.size
        words[fields.SIZE], words[fields.POSITION] = size, position
        words[fields.LOGITS] = self._first + row * size * _LOGIT_BYTES
        notes = self._notes
        if notes is not self._own_notes and self.weighs_at in (0, notes.temperature):
            words[fields.NOTES], words[fields.ARE_NOTED] = notes.first + row * notes.step, 1
        else:
            words[fields.NOTES], words[fields.ARE_NOTED] = self._own_notes.first, 0
        words[fields.NUM_SEEN] = 0
        if seen is not None:
            self._take_seen(seen)
        self._code.choose(self._address)
        token = words[fields.TOKEN]
        return token if token < fields.NO_TOKEN else None

    def rank(
        self, found: Candidates, least: float, position: int, seen: SeenTokens | None, drafted: Sequence[int]
    ) -> Ranked:
        """As :class:`engine.decoding.ranking.Rank`, without changing the weights; nothing: it cannot be told so.

        Args:
            position: of the first draft.
            seen: as for :meth:`choose`; its mask has room for all tokens of ``found``.
            drafted: drafts between the text and this one.
        """
        words, floats = self._words, self._floats
        self._take(found.tokens, found.weights, position, seen)
        floats[fields.TOTAL], floats[fields.BEST], floats[fields.LEAST] = found.total, found.best, least
        words[fields.NUM_DRAFTED] = len(drafted)
        for place, token in enumerate(drafted):
            self._drafted[place] = token
        self._code.rank(self._address)
        return tuple(
            (words[fields.RANKED + place], floats[fields.CHANCES + place])
            for place in range(words[fields.NUM_RANKED])
        )

    def draft_task(
        self, tokens: Tokens, weights: Floats, position: int, seen: SeenTokens | None
    ) -> int | None:
        """The address of a task with which native code does as :meth:`rank`, from draft to draft, and then as :meth:`choose`; None:
        it could not tell."""
        if not self._lowers:
            return None
        self._words[fields.NUM_SEEN] = 0
        self._take(tokens, weights, position, seen)
        return self._address

    def _take(self, tokens: Tokens, weights: Floats, position: int, seen: SeenTokens | None) -> None:
        words = self._words
        if tokens is not self._tokens or weights is not self._weights:  # a drafter's always lie where they do
            self._tokens, self._weights = tokens, weights
            words[fields.TOKENS], words[fields.WEIGHTS] = address(tokens), address(weights)
        words[fields.SIZE], words[fields.POSITION] = len(tokens), position
        if seen is not None:
            self._take_seen(seen)

    def _take_seen(self, seen: SeenTokens) -> None:
        words = self._words
        words[fields.SEEN], words[fields.NUM_SEEN] = seen.tokens_address, seen.count
        words[fields.MASK] = seen.mask_address


def native_choice(params: SamplingParams, key: int) -> NativeChoice | None:
    """None where there is no native code.

    Args:
        key: of the seed's random numbers.
    """
    code = _code()
    return None if code is None else NativeChoice(params, key, code)


@cache
def _code() -> Choices | None:
    def load() -> Choices:
        from engine.kernels.native import load_choices

        return load_choices()

    return native_or_none(load, "tokens are chosen by numpy")
