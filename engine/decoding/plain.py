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
        self._num_layers = stepper.decoder.config.num_layers

    def start(self, sequence: TokenSequence) -> None:
        self._sequence = sequence

    def step(self, max_tokens: int) -> Step:
        started = perf_counter()
        sequence, stepper = self._sequence, self._stepper
        cache, ids = sequence.cache, sequence.ids
        hidden = stepper.embed(ids[-1:])  # [1, D]
        hidden = stepper.run_layers(hidden, cache, cache.length, 0, self._num_layers)
        cache.length += 1
        token = sequence.sampler.choose(stepper.logits(hidden)[0], ids)
        ids.append(token)
        return Step((token,), (Provenance.VERIFIED,), verify_seconds=perf_counter() - started)
