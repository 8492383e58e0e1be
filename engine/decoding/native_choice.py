"""Choosing tokens and putting drafts in order by native code, for one generation's settings."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from engine.decoding.ranking import Candidates, Ranked
from engine.decoding.seen import SeenTokens
from engine.kernels import choice_fields as fields
from engine.requests import SamplingParams

if TYPE_CHECKING:
    from engine.kernels.native import Choices

_log = logging.getLogger(__name__)
_MOST_DRAFTED = 64


class NativeChoice:
    """A task of :mod:`engine.kernels.choices`."""

    def __init__(self, params: SamplingParams, code: Choices) -> None:
        self._code = code
        self._task = np.zeros(fields.NUM_FIELDS, np.int64)
        self._words, self._floats = _fields(self._task.view(np.uint64)), _fields(self._task.view(np.float64))
        self._address = _address(self._task)
        scratch, drafted = np.empty(2 * fields.MOST_ALONE, np.int64), np.zeros(_MOST_DRAFTED, np.int64)
        self._kept = np.empty(0, np.float32)
        self._alive, self._drafted = (scratch, drafted), drafted.data
        self._words[fields.SCRATCH], self._words[fields.DRAFTED] = _address(scratch), _address(drafted)
        self._words[fields.TOP_K] = int(params.top_k)
        floats = self._floats
        floats[fields.TEMPERATURE], floats[fields.PENALTY] = params.temperature, params.repetition_penalty
        floats[fields.TOP_P], floats[fields.MIN_P] = params.top_p, params.min_p

    def takes(self, logits: Tensor) -> bool:
        """Whether logits are of the kind that the code reads."""
        return logits.dtype == torch.float32 and logits.device.type == "cpu" and logits.is_contiguous()

    def choose(self, logits: Tensor, stream: int, seen: SeenTokens | None) -> int | None:
        """The next token for ``logits [V]``; None: it cannot be told so.

        Args:
            stream: where the position's random numbers begin.
            seen: the text so far, for the repetition penalty; None: there is no penalty.
        """
        words = self._words
        words[fields.SIZE], words[fields.LOGITS], words[fields.STREAM] = (
            len(logits),
            logits.data_ptr(),
            stream,
        )
        words[fields.NUM_SEEN] = 0
        if seen is not None:
            tokens = seen.tokens
            if len(tokens) > len(self._kept):
                self._kept = np.empty(2 * len(tokens), np.float32)
            words[fields.SEEN], words[fields.NUM_SEEN] = _address(tokens), len(tokens)
            words[fields.KEPT] = _address(self._kept)
        self._code.choose(self._address)
        token = words[fields.TOKEN]
        return token if token < fields.NO_TOKEN else None

    def rank(
        self, found: Candidates, least: float, stream: int, seen: SeenTokens | None, drafted: Sequence[int]
    ) -> Ranked:
        """As :class:`engine.decoding.ranking.Rank`, without changing the weights; nothing: it cannot be told so.

        Args:
            seen: as for :meth:`choose`; its mask has room for all tokens of ``found``.
            drafted: drafts between the text and this one.
        """
        words, floats = self._words, self._floats
        words[fields.SIZE], words[fields.STREAM] = len(found.tokens), stream
        words[fields.TOKENS], words[fields.WEIGHTS] = _address(found.tokens), _address(found.weights)
        floats[fields.TOTAL], floats[fields.BEST], floats[fields.LEAST] = found.total, found.best, least
        if seen is not None:
            words[fields.MASK], words[fields.NUM_DRAFTED] = _address(seen.mask), len(drafted)
            for place, token in enumerate(drafted):
                self._drafted[place] = token
        self._code.rank(self._address)
        return tuple(
            (words[fields.RANKED + place], floats[fields.CHANCES + place])
            for place in range(words[fields.NUM_RANKED])
        )


def native_choice(params: SamplingParams) -> NativeChoice | None:
    """None where there is no native code."""
    code = _code()
    return None if code is None else NativeChoice(params, code)


@cache
def _code() -> Choices | None:
    if not find_spec("numba"):
        return None
    try:
        from engine.kernels.native import load_choices

        return load_choices()
    except Exception:  # an LLVM or cache problem must not keep anyone from chatting
        _log.exception("tokens are chosen by numpy")
        return None


def _fields(array: np.ndarray[Any, np.dtype[Any]]) -> Any:
    """To write and read a number at a time: for a few of them numpy takes longer."""
    return array.data


def _address(array: np.ndarray[Any, np.dtype[Any]]) -> int:
    """Sooner than by ``ctypes``."""
    address: int = array.__array_interface__["data"][0]
    return address
