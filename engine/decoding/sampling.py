"""How the next token is chosen from the logits.

Order (transformers' own): repetition penalty, temperature, top-k, top-p, min-p; the kept tokens are
renormalised at the end.

Random numbers: each token of the vocabulary has an exponentially distributed time, and the one whose time, divided by
its weight, is the shortest is taken (the Gumbel-max trick: so it is drawn with the probability that its weight says).
The times are a function of seed, position and token. So a seed repeats; and who drafts a token for a position looks at
the same times: where the draft distribution resembles the model's, the same token comes first in both, though each is
random. The model's choice does not depend on the draft (drafter-invariant, as Daliri, Musco and Suresh call it, 2024,
arXiv 2408.07978): every method gives the same text for a seed.

Logits in RAM are looked at by native code (:mod:`engine.kernels.choices`): behind a step that swept the caches, each little
operation of torch's takes tens of microseconds, of numpy's several, and a token of a small model takes two milliseconds.
What that leaves undecided, and all else, is numpy's work. Who chooses depends on the logits alone, never on the draft.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.decoding.native_choice import native_choice
from engine.decoding.ranking import MOST_OTHERS, Candidates, Floats, Rank, Ranked, Tokens, likeliest
from engine.decoding.seen import SeenTokens
from engine.errors import SlipstreamError
from engine.kernels.choice_fields import ALONE, FEWER, LIKELY, MIX, MOST_ALONE, MOST_LIKELY, NEGLIGIBLE, STEP
from engine.kernels.round_fields import MOST_ROWS
from engine.requests import SamplingParams

_LEAST = (1e-3, 1e-5)  # of the best token's weight: above it lies nearly always as much as top-p asks for
_HIGHEST = 80.0  # logits that a penalty below 1 may raise a draft's by: its power of e is still a float32
_HANDFUL = 16  # likely tokens for which Python's own numbers are quicker
_WORD = (1 << 64) - 1


class Sampler:
    """The sampling settings of one generation with their random numbers.

    Attributes:
        seed: the seed in use, drawn from the system's entropy if the request names none.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.greedy, self._penalizes = params.greedy, params.repetition_penalty != 1.0
        self.seed = secrets.randbits(63) if params.seed is None else params.seed % (1 << 63)
        self._key = _spread(self.seed * STEP)
        # Weights of the whole vocabulary: new memory of that size comes from the system each time, page by page.
        self._weights: Floats = np.empty(0)
        self._scored: Floats = np.empty(0)
        self._seen = SeenTokens()
        self._native = native_choice(params, self._key * STEP & _WORD)
        self._draft_tokens, self._reach = np.empty(0, np.int64), 0

    def choose(self, logits: Tensor, history: Sequence[int], row: int | None = None) -> int:
        """The next token for ``logits [V]``, or a ``row`` of ``[T, V]``, after the tokens ``history`` (prompt and answer): a
        list that is handed in again may only have grown.

        Raises:
            SlipstreamError: the logits are not finite.
        """
        native = self._native
        if native is not None and native.takes(logits):
            seen = self._seen_in(history, native.size) if self._penalizes else None
            if (token := native.choose(row or 0, len(history), seen)) is not None:
                return token
        scores = self._scores(logits if row is None else logits[row], history)
        if self.greedy:
            return _best(scores)
        position = len(history)
        if not self._filters:
            return self._first(scores, position)
        tokens, weights = self._kept(scores)
        if len(tokens) == 1:
            return int(tokens[0])
        with np.errstate(divide="ignore"):
            times = self._times(tokens, position) / weights
        return int(tokens[times.argmin()])

    def ranking(self, history: Sequence[int], drafted: Sequence[int]) -> Rank:
        """How to put drafts in order that follow ``history`` and ``drafted``, as they are whenever it is asked: as the
        tokens would be chosen if the draft distribution were the model's. The chances are guesses."""

        def rank(found: Candidates, least: float) -> Ranked:
            if self._native is not None:
                seen = self._seen_in(history, self._reach_of(found.tokens)) if self._penalizes else None
                if ranked := self._native.rank(found, least, len(history), seen, drafted):
                    return ranked
            if self._penalizes:
                found = self._less_seen(found, history, drafted)
            if self.greedy:
                return likeliest(found, least)
            return self._arrivals(found, len(history) + len(drafted), least)

        return rank

    def draft_task(
        self, history: Sequence[int], tokens: Tokens, weights: Floats, vocabulary: int = 0
    ) -> int | None:
        """The address of a task of :mod:`engine.kernels.choices` that puts drafts in order that follow ``history``, as a rank of
        :meth:`ranking` does; None where native code cannot.

        Args:
            tokens: that may be drafted, ``[N]``.
            weights: where theirs will be, float32 ``[N]``.
            vocabulary: the model's size of it, if the same task is to choose a few tokens from the model's own logits.
        """
        if self._native is None:
            return None
        seen = self._seen_in(history, max(self._reach_of(tokens), vocabulary)) if self._penalizes else None
        if seen is not None:
            seen.make_room(MOST_ROWS)
        return self._native.draft_task(tokens, weights, len(history), seen)

    def _reach_of(self, tokens: Tokens) -> int:
        """One more than the largest of a drafter's tokens: it has the same ones each time."""
        if tokens is not self._draft_tokens:
            self._draft_tokens, self._reach = tokens, int(tokens.max()) + 1
        return self._reach

    def _seen_in(self, history: Sequence[int], size: int) -> SeenTokens:
        """What the repetition penalty asks for."""
        self._seen.follow(history, size)
        return self._seen

    def _less_seen(self, found: Candidates, history: Sequence[int], drafted: Sequence[int]) -> Candidates:
        """After the repetition penalty."""
        self._seen.follow(history, int(found.tokens.max()) + 1)
        mask, new = self._seen.mask, [token for token in drafted if not self._seen.mask[token]]
        mask[new] = True
        seen = mask[found.tokens].nonzero()[0]
        mask[new] = False
        weights = found.weights
        before = weights[seen]
        with np.errstate(divide="ignore"):
            logits = self._penalize(np.log(before) + found.best)
        after = np.exp(np.minimum(logits - found.best, _HIGHEST))
        weights[seen] = after
        best = float(weights.max())
        weights /= best
        total = (found.total + float(after.sum()) - float(before.sum())) / best
        return Candidates(found.tokens, weights, total, found.best + math.log(best))

    def _arrivals(self, found: Candidates, position: int, least: float) -> Ranked:
        """The tokens in the order in which they arrive."""
        tokens, weights, temperature = found.tokens, found.weights, self.params.temperature
        places = (weights >= LIKELY**temperature).nonzero()[0]
        if len(places) > MOST_LIKELY:  # at high temperatures most are likely
            places = places[np.argpartition(-weights[places], MOST_LIKELY)[:MOST_LIKELY]]
        likely = tokens[places]
        times = self._times(likely, position).tolist()
        arrivals = zip(weights[places].tolist(), times, likely.tolist(), strict=True)
        speeds = [(weight ** (1 / temperature) / time, token) for weight, time, token in arrivals]
        speeds.sort(reverse=True)
        all_of_them = sum(speed for speed, _ in speeds)
        ranked = [(token, speed / all_of_them) for speed, token in speeds[: 1 + MOST_OTHERS]]
        return tuple(each for number, each in enumerate(ranked) if number == 0 or each[1] >= least)

    def times(self, tokens: Tokens, position: int) -> Floats:
        """When the tokens arrive at a position, exponentially distributed with mean 1: ``[N] -> [N]`` float64."""
        bits = tokens.astype(np.uint64)
        bits *= np.uint64(STEP)
        bits += np.uint64(self._stream(position))
        for shift, factor in MIX:  # as _spread
            bits ^= bits >> np.uint64(shift)
            bits *= np.uint64(factor)
        bits ^= bits >> np.uint64(31)
        return -np.log(((bits >> np.uint64(12)) + 0.5) * 2.0**-52)

    @property
    def weighs_at(self) -> float:
        """The temperature at which whoever computes logits should weigh them in passing; 0: it need not."""
        return 0.0 if self._native is None else self._native.weighs_at

    @property
    def _filters(self) -> bool:
        params = self.params
        return params.top_k > 0 or params.top_p < 1 or params.min_p > 0

    def _first(self, scores: Floats, position: int) -> int:
        """The first of all tokens. The unlikely ones, nearly all, are taken together, and looked at one by one only
        where one of them can be the first."""
        size, (head, weights, others) = len(scores), self._likely(scores)
        if len(head) == 1:
            first, time = 0, self._time(int(head[0]), position)
        else:
            times = self.times(head, position) / weights
            first = int(times.argmin())
            time = float(times[first])
        together = self._time(size, position)
        if together < time * others:
            weights = self._all_weights(scores)
            weights[head] = 0
            if (mass := _total(weights)) > 0 and together < time * mass:
                return self.sample(weights, math.exp(-self._time(size + 1, position)))
        return int(head[first])

    def _likely(
        self, scores: Floats, bounds: Sequence[float] = (ALONE, FEWER)
    ) -> tuple[Tokens, Floats, float]:
        """The tokens that are not nearly impossible, their weights (the best one's 1), and what all others weigh at
        most: each the first of the ``bounds`` that leaves few tokens, or the last."""
        temperature, best = self.params.temperature, _finite(float(scores.max()))
        for least in bounds:
            head = (scores >= best + temperature * math.log(least)).nonzero()[0]
            if len(head) <= MOST_ALONE:
                break
        weights = np.exp((scores[head].astype(np.float64) - best) / temperature)
        return head, weights, least * (len(scores) - len(head))

    def _times(self, tokens: Tokens, position: int) -> Floats:
        """As :meth:`times`, quicker for a handful of tokens."""
        if len(tokens) > _HANDFUL:
            return self.times(tokens, position)
        return np.array([self._time(token, position) for token in tokens.tolist()])

    def _time(self, token: int, position: int) -> float:
        """As :meth:`times`, of one token: Python's own numbers are quicker then."""
        bits = _spread(self._stream(position) + token * STEP)
        return -math.log(((bits >> 12) + 0.5) * 2.0**-52)

    def _stream(self, position: int) -> int:
        """Where the random numbers of a position begin."""
        return _spread((self._key + position) * STEP)

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
            dense[tokens] = weights / _total(weights)
        return torch.from_numpy(dense).to(logits.device)

    @staticmethod
    def sample(weights: Floats, share: float) -> int:
        """A place in ``weights`` (any positive total): the first whose mass and all before it exceed that share of the
        total, from 0 to 1."""
        sums = weights.cumsum(dtype=np.float64)
        # side="right": the first that exceeds the target, so never one of mass 0
        place = int(np.searchsorted(sums, _finite(float(sums[-1])) * share, side="right"))
        return place if place < len(sums) else int(np.flatnonzero(weights)[-1])

    def _scores(self, logits: Tensor, history: Sequence[int]) -> Floats:
        """The logits after the repetition penalty; until the next call."""
        scores: Floats = logits.numpy() if logits.device.type == "cpu" else logits.cpu().numpy()
        if not self._penalizes or not history:
            return scores
        self._seen.follow(history, len(scores))
        if self._scored.shape != scores.shape or self._scored.dtype != scores.dtype:
            self._scored = np.empty_like(scores)
        np.copyto(self._scored, scores)
        seen = self._seen.tokens
        self._scored[seen] = self._penalize(scores[seen])
        return self._scored

    def _penalize(self, logits: Floats) -> Floats:
        """The repetition penalty on logits of tokens that were seen."""
        penalty = self.params.repetition_penalty
        return np.where(logits < 0, logits * penalty, logits / penalty)

    def _all_weights(self, scores: Floats) -> Floats:
        """Of all tokens, the best one's 1; until the next call."""
        if self._weights.shape != scores.shape or self._weights.dtype != scores.dtype:
            self._weights = np.empty_like(scores)
        # less the best, so that tiny temperatures stay finite
        weights = np.subtract(scores, scores.max(), out=self._weights)
        with np.errstate(over="ignore", invalid="ignore"):
            weights /= self.params.temperature
        return np.exp(weights, out=weights)

    def _kept(self, scores: Floats) -> tuple[Tokens, Floats]:
        """The tokens that may be drawn and their weights, of any total."""
        params, size = self.params, len(scores)
        if params.top_p < 1 and not 0 < params.top_k < size and (found := self._nucleus(scores)):
            return self._above_min_p(*found)
        weights = self._all_weights(scores)
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
        if tokens is None:
            _total(weights)
            tokens = np.arange(size)
        return self._above_min_p(tokens, weights[tokens])

    def _nucleus(self, scores: Floats) -> tuple[Tokens, Floats] | None:
        """What top-p keeps, without a look at each token of the vocabulary; None where that cannot be told so."""
        tokens, weights, others = self._likely(scores, (NEGLIGIBLE,))
        least = self.params.top_p * float(weights.sum())
        most = least + self.params.top_p * others
        head = _head(weights, most)
        head = head[np.argsort(-weights[head], kind="stable")]
        tokens, weights = tokens[head], weights[head]
        sums = weights.cumsum()
        count = int(np.searchsorted(sums, least)) + 1  # whose mass before them is below
        if count > len(sums) or sums[count - 1] < most:
            return None
        return tokens[:count], weights[:count]

    def _above_min_p(self, tokens: Tokens, weights: Floats) -> tuple[Tokens, Floats]:
        if self.params.min_p > 0:
            weights = weights * (weights >= self.params.min_p * weights.max())
        return tokens, weights


def _head(weights: Floats, mass: float) -> Tokens:
    """All tokens that weigh at least so much, where they weigh ``mass`` together: sorting few is far quicker."""
    for least in _LEAST:
        tokens = np.flatnonzero(weights >= least)
        if weights[tokens].sum(dtype=np.float64) >= mass:
            return tokens
    return np.arange(len(weights))


def _spread(bits: int) -> int:
    """64 bits of which about half differ where ``bits`` differ in one."""
    bits &= _WORD
    for shift, factor in MIX:
        bits = ((bits ^ bits >> shift) * factor) & _WORD
    return bits ^ bits >> 31


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
