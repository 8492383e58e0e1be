"""Plain decoding: one token a step. The yardstick, and what every other method must equal."""

from __future__ import annotations

from time import perf_counter

from engine.decoding.base import Step, TokenSequence
from engine.models.stepper import Stepper
from engine.requests import Provenance


class PlainDecoding:
    """Feed the last token, choose the next."""

    name = "plain"
    lossless = True

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper

    def start(self, sequence: TokenSequence) -> None:
        self._sequence = sequence

    def step(self, max_tokens: int) -> Step:
        started = perf_counter()
        sequence, stepper = self._sequence, self._stepper
        cache, ids = sequence.cache, sequence.ids
        _, logits = stepper.forward(ids[-1:], cache, weigh_at=sequence.sampler.weighs_at)
        cache.length += 1
        token = sequence.sampler.choose(logits, ids, 0)
        ids.append(token)
        return Step((token,), (Provenance.VERIFIED,), verify_seconds=perf_counter() - started)
