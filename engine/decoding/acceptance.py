"""Lossless acceptance of drafts, a chain with or without alternatives to its tokens: the model's own choice at each
position decides.

The model's token is chosen as plain decoding chooses it, from the row's logits, the history that plain decoding would
show the sampler, and the position's random numbers; a draft is accepted where it equals that token. So the output does
not depend on the drafts at all, whatever they are made of, those random numbers included
(:mod:`engine.decoding.sampling`), and however many there are for a position: a seed gives the very text that plain
decoding gives, sampled or greedy, with every sampling setting, wherever the rows' logits are bit-identical. For a draft
that knows nothing of the random numbers it is the rejection rule of Leviathan et al. (2023, arXiv 2211.17192): accepted
with the model's own probability of it, else a token from what remains.

Several drafts for one position make a tree, as in SpecInfer (Miao et al. 2023, arXiv 2305.09781); ours has no branches
longer than one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from torch import Tensor

from engine.decoding.base import Step, TokenSequence
from engine.decoding.sampling import Sampler
from engine.models.stepper import Stepper
from engine.requests import Provenance


@dataclass(frozen=True)
class Alternative:
    """Another token for the place of the chain's draft number ``place``, counted from 0."""

    token: int
    place: int


@dataclass(frozen=True)
class Accepted:
    """What was accepted.

    Attributes:
        num_in_chain: drafts of the chain.
        alternative: and one instead of the chain's next.
        row: of the verification that the last token was chosen in.
        is_bonus: the last token stands behind an accepted draft that nothing was drafted behind.
    """

    num_in_chain: int
    alternative: bool
    row: int
    is_bonus: bool

    @property
    def num_drafts(self) -> int:
        """All that were accepted."""
        return self.num_in_chain + self.alternative


def accept(
    logits: Tensor,
    drafts: Sequence[int],
    ids: list[int],
    sampler: Sampler,
    alternatives: Sequence[Alternative] = (),
) -> Accepted:
    """Append the model's tokens to ``ids`` up to one that is not drafted, or follows the last draft.

    Args:
        logits: ``[d + 1 + a, V]``; row ``i`` follows the first ``i`` drafts, row ``d + 1 + j`` alternative ``j``.
        drafts: ``d`` drafted tokens.
        ids: the sequence before the drafts.
        alternatives: ``a`` others.

    Raises:
        SlipstreamError: the logits are not finite.
    """
    for place, draft in enumerate(drafts):
        token = sampler.choose(logits, ids, place)
        ids.append(token)
        if token != draft:
            for number, other in enumerate(alternatives):
                if other.place == place and other.token == token:
                    row = len(drafts) + 1 + number
                    ids.append(sampler.choose(logits, ids, row))
                    return Accepted(place, True, row, True)
            return Accepted(place, False, place, False)
    count = len(drafts)
    ids.append(sampler.choose(logits, ids, count))
    return Accepted(count, False, count, count > 0)


def verify_chain(
    stepper: Stepper, sequence: TokenSequence, drafts: Sequence[int], started: float
) -> tuple[int, Step, Tensor]:
    """Verify drafts that nothing has been computed of: the last token and they go through all layers in one pass.

    Args:
        started: when the round began, as ``perf_counter`` tells.

    Returns:
        How many were accepted, the step, and all rows' states ``[T, D]``.
    """
    cache, ids = sequence.cache, sequence.ids
    start = cache.length
    hidden, logits = stepper.forward([ids[-1], *drafts], cache, weigh_at=sequence.sampler.weighs_at)
    accepted = accept(logits, drafts, ids, sequence.sampler)
    cache.length = start + accepted.num_drafts + 1
    step = round_step(ids[start + 1 :], len(drafts), accepted, 0.0, perf_counter() - started)
    return accepted.num_drafts, step, hidden


def round_step(
    tokens: Sequence[int], num_drafts: int, accepted: Accepted, draft_seconds: float, verify_seconds: float
) -> Step:
    """The step of a round: the accepted drafts and one token of the model's own."""
    own = Provenance.BONUS if accepted.is_bonus else Provenance.VERIFIED
    provenance = (Provenance.DRAFTED,) * accepted.num_drafts + (own,)
    return Step(tuple(tokens), provenance, num_drafts, accepted.num_drafts, draft_seconds, verify_seconds)
