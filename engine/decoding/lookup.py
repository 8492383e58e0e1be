"""Decoding with drafts out of the context alone: for every model, without training.

A round: find the latest tokens earlier in the text; verify them and what followed there in one pass; accept the
longest prefix that the model itself would have chosen, and one token of the model's own.
"""

from __future__ import annotations

from time import perf_counter

from engine.decoding.acceptance import verify_chain
from engine.decoding.base import Step, TokenSequence
from engine.decoding.context import MAX_DRAFTS, ContextDrafter
from engine.decoding.context_index import index_of
from engine.decoding.controller import SpeculationState
from engine.decoding.costs import RoundCosts
from engine.models.stepper import Stepper


class LookupDecoding:
    """Prompt lookup decoding: matches in the context draft."""

    name = "lookup"
    lossless = True

    def __init__(self, stepper: Stepper, drafter: ContextDrafter, costs: RoundCosts) -> None:
        self._stepper, self._drafter, self._costs = stepper, drafter, costs

    def start(self, sequence: TokenSequence) -> None:
        self._sequence, self._index = sequence, index_of(sequence.ids)
        self._is_first = True

    def step(self, max_tokens: int) -> Step:
        started = perf_counter()
        limit = min(max_tokens, self._stepper.max_rows) - 1
        match = self._index.find(limit)
        drafts = self._drafter.choose(match, limit, self._costs)
        accepted, step, _ = verify_chain(self._stepper, self._sequence, drafts, started)
        self._drafter.observe(match, len(drafts), accepted)
        if not self._is_first:  # behind a prompt caches and threads are cold
            self._costs.next_round()
            if drafts:
                self._costs.note_verification(len(drafts), step.verify_seconds)
            else:
                self._costs.note_plain(step.verify_seconds)
        self._is_first = False
        return step


class Lookup:
    """What all generations of one loaded model share."""

    def __init__(self, stepper: Stepper, drafter: ContextDrafter | None = None) -> None:
        self._stepper = stepper
        self.drafter, self._costs = drafter or ContextDrafter(), RoundCosts(MAX_DRAFTS)

    def new_method(self) -> LookupDecoding:
        """A method for one generation."""
        return LookupDecoding(self._stepper, self.drafter, self._costs)

    def state(self) -> SpeculationState:
        """Where things stand; drafts take no time of their own."""
        return SpeculationState(plain_seconds=self._costs.measured_plain)
