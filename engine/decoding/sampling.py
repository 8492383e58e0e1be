"""How the next token is chosen from the logits.

Order (transformers' own): repetition penalty, temperature, top-k, top-p, min-p; the kept tokens are
renormalised at the end. The result is a whole distribution, so speculative acceptance can compare the
target's with the draft's.

Random numbers: one float64 uniform of a generator of its own per sampled token, none for greedy. Plain
decoding therefore repeats exactly for a seed. A method that draws more numbers per token (rejection
sampling) repeats for a seed too, but not with plain decoding's text.

All of it is numpy's work: behind a step that swept the caches, each little operation of torch's takes tens of
microseconds, and a token of a small model takes two milliseconds.
"""

from __future__ import annotations

import math
import random
import secrets
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from engine.errors import SlipstreamError
from engine.requests import SamplingParams

Floats: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Places: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
_LEAST = (1e-3, 1e-5)  # of the best token's weight: above it lies nearly always as much as top-p asks for
_BLOCK = 256  # weights that are added up first when one is drawn


class Sampler:
    """The sampling settings of one generation with their random numbers.

    Attributes:
        seed: the seed in use, drawn from the system's entropy if the request names none.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.greedy = params.greedy
        self.seed = secrets.randbits(63) if params.seed is None else params.seed % (1 << 63)
        self._random = random.Random(self.seed)
        # Weights of the whole vocabulary: new memory of that size comes from the system each time, page by page.
        self._weights: Floats = np.empty(0)

    def choose(self, logits: Tensor, history: Sequence[int]) -> int:
        """The next token for ``logits [V]`` after the tokens ``history`` (prompt and answer).

        Raises:
            SlipstreamError: the logits are not finite.
        """
        scores = self._scores(logits, history)
        if self.greedy:
            return _best(scores)
        tokens, weights = self._kept(scores)
        place = self.sample(weights)
        return place if tokens is None else int(tokens[place])

    def probabilities(self, logits: Tensor, history: Sequence[int]) -> Tensor:
        """The distribution that the next token is drawn from: ``[V]``, same device and dtype, sums to 1.

        Greedy settings give all mass to the best token.
        """
        scores = self._scores(logits, history)
        dense = np.zeros_like(scores)
        if self.greedy:
            dense[_best(scores)] = 1
        else:
            tokens, weights = self._kept(scores)
            dense[slice(None) if tokens is None else tokens] = weights / _total(weights)
        return torch.from_numpy(dense).to(logits.device)

    def sample(self, weights: Floats) -> int:
        """Draw a place in ``weights`` (any positive total): the first whose mass and all before it exceed a random
        share of the total."""
        # Sums of blocks first: adding up one by one what a vocabulary holds takes longer than all the rest.
        blocks = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK)).cumsum(dtype=np.float64)
        target = _finite(float(blocks[-1])) * self.uniform()
        # side="right": the first that exceeds the target, so never one of mass 0
        block = min(int(np.searchsorted(blocks, target, side="right")), len(blocks) - 1)
        before = blocks[block - 1] if block else 0.0
        inner = before + weights[block * _BLOCK : (block + 1) * _BLOCK].cumsum(dtype=np.float64)
        place = int(np.searchsorted(inner, target, side="right"))
        if place == len(inner):  # the sums, rounded otherwise, end just below the block's own
            place = int(np.flatnonzero(inner > (inner[-2:-1] if len(inner) > 1 else before))[-1])
        return block * _BLOCK + place

    def uniform(self) -> float:
        """The next random number in [0, 1)."""
        return self._random.random()

    def _scores(self, logits: Tensor, history: Sequence[int]) -> Floats:
        """The logits after the repetition penalty."""
        scores: Floats = logits.numpy() if logits.device.type == "cpu" else logits.cpu().numpy()
        penalty = self.params.repetition_penalty
        if penalty == 1.0 or not history:
            return scores
        scores = scores.copy()
        seen = np.array(list(set(history)))
        values = scores[seen]
        scores[seen] = np.where(values < 0, values * penalty, values / penalty)
        return scores

    def _kept(self, scores: Floats) -> tuple[Places | None, Floats]:
        """The tokens that may be drawn (None: all, in order) and their weights, of any total."""
        params, size = self.params, len(scores)
        if self._weights.shape != scores.shape or self._weights.dtype != scores.dtype:
            self._weights = np.empty_like(scores)
        weights = np.subtract(
            scores, scores.max(), out=self._weights
        )  # so that tiny temperatures stay finite
        with np.errstate(over="ignore", invalid="ignore"):
            weights /= params.temperature
        np.exp(weights, out=weights)
        tokens = None
        if 0 < params.top_k < size:
            tokens = np.argpartition(scores, size - params.top_k)[size - params.top_k :]
        if params.top_p < 1:
            mass = params.top_p * _total(weights if tokens is None else weights[tokens])
            if tokens is None:
                tokens = _head(weights, mass)
            tokens = tokens[np.argsort(-weights[tokens], kind="stable")]
            # Keep the shortest head whose mass reaches top_p: a token stays if the mass before it is below.
            before = weights[tokens].cumsum(dtype=np.float64) - weights[tokens]
            tokens = tokens[before < mass]
        if tokens is not None:
            weights = weights[tokens]
        if params.min_p > 0:
            weights = weights * (weights >= params.min_p * weights.max())
        return tokens, weights


def _head(weights: Floats, mass: float) -> Places:
    """All tokens that weigh at least so much, where they weigh ``mass`` together: sorting few is far quicker."""
    for least in _LEAST:
        tokens = np.flatnonzero(weights >= least)
        if weights[tokens].sum(dtype=np.float64) >= mass:
            return tokens
    return np.arange(len(weights))


def _best(scores: Floats) -> int:
    """The most likely token; the lowest id wins ties."""
    token = int(scores.argmax())  # the first maximum; of values that are no numbers the first
    _finite(float(scores[token]))
    return token


def _total(weights: Floats) -> float:
    return _finite(float(weights.sum()))


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise SlipstreamError("The model produced values that are not numbers; try another weight format.")
    return value
