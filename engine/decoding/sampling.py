"""How the next token is chosen from the logits.

Order (transformers' own): repetition penalty, temperature, top-k, top-p, min-p; the kept tokens are
renormalised at the end. The result is a whole distribution, so speculative acceptance can compare the
target's with the draft's.

Random numbers: one float64 uniform from a CPU generator per sampled token, none for greedy. Plain
decoding therefore repeats exactly for a seed. A method that draws more numbers per token (rejection
sampling) repeats for a seed too, but not with plain decoding's text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.errors import SlipstreamError
from engine.requests import SamplingParams

_FIRST_TOP_P_CANDIDATES = 512  # nearly always enough; otherwise eight times more until it is


class Sampler:
    """The sampling settings of one generation with their random numbers.

    Attributes:
        seed: the seed in use, drawn from the system's entropy if the request names none.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.greedy = params.greedy
        self._generator = torch.Generator()
        if params.seed is None:
            self.seed = self._generator.seed()
        else:
            self.seed = params.seed % (1 << 63)
            self._generator.manual_seed(self.seed)

    def choose(self, logits: Tensor, history: Sequence[int]) -> int:
        """The next token for ``logits [V]`` after the tokens ``history`` (prompt and answer).

        Raises:
            SlipstreamError: the logits are not finite.
        """
        if self.greedy:
            return self.best(logits, history)
        return self.sample(self.probabilities(logits, history))

    def best(self, logits: Tensor, history: Sequence[int]) -> int:
        """The most likely token; the lowest id wins ties."""
        penalised = self._penalise(logits, history)
        token = int(penalised.argmax())  # torch returns the first maximum
        if not torch.isfinite(penalised[token]):
            raise _broken()
        return token

    def probabilities(self, logits: Tensor, history: Sequence[int]) -> Tensor:
        """The distribution that the next token is drawn from: ``[V]``, same device, sums to 1.

        Greedy settings give all mass to the best token. float32 (float64 for float64 logits).
        """
        if self.greedy:
            out = torch.zeros_like(logits)
            out[self.best(logits, history)] = 1
            return out
        scores = self._penalise(logits, history)
        # Subtracting the maximum first keeps tiny temperatures finite.
        scores = (scores - scores.max()) / self.params.temperature
        size = scores.shape[0]
        if 0 < self.params.top_k < size:
            kept, ids = scores.topk(self.params.top_k)  # descending
        elif self.params.top_p < 1:
            kept, ids = _top_p_candidates(scores, self.params.top_p)
        else:
            return self._finish(self._min_p(scores.softmax(dim=0)))
        weights = kept.softmax(dim=0) if 0 < self.params.top_k < size else (kept - scores.logsumexp(0)).exp()
        if self.params.top_p < 1:
            # Keep the shortest head whose mass reaches top_p: a token stays if the mass before it is below.
            before = weights.cumsum(0, dtype=torch.float64) - weights
            weights = weights * (before < self.params.top_p)
        return self._finish(torch.zeros_like(scores).scatter_(0, ids, self._min_p(weights)))

    def sample(self, probabilities: Tensor) -> int:
        """Draw from ``probabilities [V]`` (any positive total) by inverting the cumulative sum."""
        cumulative = probabilities.cumsum(0, dtype=torch.float64)
        target = cumulative[-1].cpu() * self.uniform()
        # right=True: the first token whose cumulative mass exceeds the target, so never one of mass 0
        token = int(torch.searchsorted(cumulative, target.to(cumulative.device), right=True))
        if token >= probabilities.shape[0]:
            raise _broken()
        return token

    def uniform(self) -> float:
        """The next random number in [0, 1)."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))

    def _penalise(self, logits: Tensor, history: Sequence[int]) -> Tensor:
        penalty = self.params.repetition_penalty
        if penalty == 1.0 or not history:
            return logits
        seen = torch.tensor(sorted(set(history)), device=logits.device)
        values = logits[seen]
        return logits.index_put((seen,), torch.where(values < 0, values * penalty, values / penalty))

    def _min_p(self, weights: Tensor) -> Tensor:
        if self.params.min_p > 0:
            return weights * (weights >= self.params.min_p * weights.max())
        return weights

    def _finish(self, weights: Tensor) -> Tensor:
        total = weights.sum(dtype=torch.float64)
        if not torch.isfinite(total):
            raise _broken()
        return weights / total.to(weights.dtype)


def _top_p_candidates(scores: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The highest scores, descending, with a mass of at least ``top_p``: a partial sort is far quicker."""
    size, count = scores.shape[0], _FIRST_TOP_P_CANDIDATES
    normaliser = scores.logsumexp(0)
    while count < size:
        kept, ids = scores.topk(count)
        if float((kept - normaliser).exp().sum(dtype=torch.float64)) >= top_p:
            return kept, ids
        count *= 8
    return scores.sort(descending=True, stable=True)


def _broken() -> SlipstreamError:
    return SlipstreamError("The model produced values that are not numbers; try another weight format.")
