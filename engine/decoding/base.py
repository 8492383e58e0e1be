"""The interfaces between a generation, a decoding method and a loaded model. Token ids only.

The invariant that all methods share: between steps a sequence's cache holds every token but the last,
``cache.length == len(ids) - 1``. A step feeds the last token, and so the last prompt token is always
computed by the method's own kernel and all before it by the prefill.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from engine.decoding.sampling import Sampler
from engine.requests import Provenance


@dataclass(frozen=True)
class Step:
    """What one decoding step produced, at least one token. Times are engine seconds."""

    token_ids: tuple[int, ...]
    provenance: tuple[Provenance, ...]
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0


class Cache(Protocol):
    """What generations need of a KV cache: to know and cut its length, and its bytes."""

    length: int

    @property
    def nbytes(self) -> int: ...


@dataclass
class TokenSequence:
    """One prompt with its growing answer.

    Attributes:
        ids: prompt and answer; a method appends what it yields.
        cache: keys and values of ``ids[:cache.length]`` (:class:`engine.models.kv_cache.KVCache` for our
            own decoder).
        sampler: how tokens are chosen.
        num_prompt_tokens: where the answer begins.
    """

    ids: list[int]
    cache: Any
    sampler: Sampler
    num_prompt_tokens: int


class DecodingMethod(Protocol):
    """One way to decode. An instance serves one generation at a time."""

    name: str
    lossless: bool  # the output is exactly (greedy) or in distribution (sampling) the model's own

    def start(self, sequence: TokenSequence) -> None:
        """Take over a prefilled sequence: ``cache.length == len(ids) - 1``."""

    def step(self, max_tokens: int) -> Step:
        """Append one to ``max_tokens`` tokens to ``sequence.ids`` and return them.

        Ends with ``cache.length == len(ids) - 1``. No row may lie beyond the room that ``max_tokens``
        leaves: at most ``max_tokens`` rows, drafts included. End-of-sequence tokens and stop strings
        are the caller's business: it drops what follows them.
        """


@runtime_checkable
class TakesTurns(Protocol):
    """A method whose last pass left something in memory that any sequence's next pass writes."""

    def step_aside(self) -> None:
        """Another sequence's step is next: keep it."""


class Backend(Protocol):
    """A loaded model at the token level. Our own decoder is one, transformers' models another."""

    kernel: str  # "fused", "torch" or "transformers"
    context_length: int
    prefill_chunk: int  # prompt tokens between two looks at the stop flag

    def methods(self) -> tuple[str, ...]:
        """Names of the decoding methods; the first is the default."""

    def method(self, name: str) -> DecodingMethod:
        """A fresh instance of the method."""

    def new_cache(self, capacity: int) -> Any:
        """An empty cache with room for ``capacity`` tokens; it grows by itself."""

    def prefill(self, ids: Sequence[int], cache: Any) -> None:
        """Append ``ids`` (at most ``prefill_chunk``) to ``cache``; their logits are not needed."""

    def close(self) -> None:
        """Release memory."""


MethodFactory = Callable[[], DecodingMethod]
