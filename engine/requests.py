"""The dataclasses at the engine's seams: what goes into a generation and what comes out.

Data flows one way: ``GenerationRequest`` -> ``Session.stream_generate`` -> one ``Round`` per
decoding step -> ``GenerationResult``. UI, command line, API and benchmarks all sit on these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from engine.errors import InvalidRequestError
from engine.metrics import GenerationMetrics


class Provenance(str, Enum):
    """Where a token came from. Speculative methods mark accepted drafts; plain decoding has none."""

    VERIFIED = "verified"  # the model's own token: plain decoding, or the correction after a rejection
    DRAFTED = "drafted"  # drafted and accepted
    BONUS = "bonus"  # the model's own token after a fully accepted draft


class FinishReason(str, Enum):
    """Why a generation ended."""

    STOP = "stop"  # end-of-sequence token or stop string
    LENGTH = "length"  # max_new_tokens reached
    CONTEXT = "context"  # the model's context is full
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Message:
    """One chat turn; ``role`` is ``system``, ``user`` or ``assistant``."""

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ("system", "user", "assistant"):
            raise InvalidRequestError(f"Unknown message role {self.role!r}; use system, user or assistant.")


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. ``temperature=0`` is greedy; filters at their defaults are off.

    Raises:
        InvalidRequestError: a value is outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0, 100.0)
        _check("top_k", self.top_k, 0, 1 << 31)
        _check("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check("min_p", self.min_p, 0.0, 1.0)
        _check("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        if self.top_k != int(self.top_k):
            raise InvalidRequestError(f"top_k must be a whole number, not {self.top_k}.")
        if self.seed is not None and (isinstance(self.seed, bool) or self.seed != int(self.seed)):
            raise InvalidRequestError(f"seed must be a whole number, not {self.seed}.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def _check(name: str, value: float, low: float, high: float, open_low: bool = False) -> None:
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not numeric or value > high or value < low or (open_low and value == low):
        above = "above" if open_low else "from"
        raise InvalidRequestError(f"{name} must be a number {above} {low:g} to {high:g}, not {value!r}.")


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate. Give exactly one of ``messages`` (chat) or ``prompt_ids`` (token ids).

    Raises:
        InvalidRequestError: no or two prompts, or a limit that is not positive.
    """

    messages: Sequence[Message] | None = None
    prompt_ids: Sequence[int] | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: Sequence[str] = ()
    max_new_tokens: int = 512
    method: str = "plain"
    ignore_eos: bool = False  # for measurements: a given number of tokens, whatever they are

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.prompt_ids is None):
            raise InvalidRequestError("Give either messages or prompt_ids.")
        if not (self.messages if self.messages is not None else self.prompt_ids):
            raise InvalidRequestError("The prompt is empty; type something first.")
        if isinstance(self.max_new_tokens, bool) or self.max_new_tokens < 1:
            raise InvalidRequestError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}.")
        if any(not s for s in self.stop):
            raise InvalidRequestError("A stop string must not be empty.")


@dataclass(frozen=True)
class Piece:
    """One new token and the text it completes (empty while a UTF-8 character or a possible stop
    string is still open; the text then arrives with a later piece)."""

    token_id: int
    provenance: Provenance
    text: str


@dataclass(frozen=True)
class Round:
    """One decoding step: plain decoding yields one token a round, speculation one to d + 1."""

    pieces: tuple[Piece, ...]
    num_draft_tokens: int
    num_accepted_tokens: int
    draft_seconds: float  # engine time only, never the consumer's
    verify_seconds: float  # a plain step is all verification
    seconds: float

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True)
class GenerationResult:
    """The whole outcome; ``text`` equals the joined text of all rounds."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    metrics: GenerationMetrics
    notices: tuple[str, ...] = ()  # sentences for the user, such as "The oldest 4 messages were left out ..."
