"""Lossless acceptance of a drafted chain: the model's own choice at each position decides.

Drafts are deterministic here (a distribution with all its mass on one token). For those, the rejection
rule of Leviathan et al. (2023, arXiv 2211.17192) says: accept draft ``x`` with probability ``p(x)``, else
draw from ``p`` without ``x``, renormalised. Drawing the model's own token from ``p`` and accepting where
it equals the draft is that same rule, and it has two merits: it works for every sampling setting (the
sampler sees each row with the history that plain decoding would show it), and it spends exactly one random
number per produced token. So a seed gives the very text that plain decoding gives, sampled or greedy,
wherever the rows' logits are bit-identical.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

from torch import Tensor

from engine.decoding.base import Step, TokenSequence
from engine.decoding.sampling import Sampler
from engine.models.stepper import Stepper
from engine.requests import Provenance


def accept_chain(logits: Tensor, drafts: Sequence[int], ids: list[int], sampler: Sampler) -> int:
    """Append the model's tokens to ``ids`` until one differs from its draft.

    Args:
        logits: ``[d + 1, V]``; row ``i`` follows the first ``i`` drafts.
        drafts: ``d`` drafted tokens.
        ids: the sequence before the drafts.

    Returns:
        How many drafts were accepted; ``ids`` grew by one more, the model's own token.

    Raises:
        SlipstreamError: the logits are not finite.
    """
    for position, draft in enumerate(drafts):
        token = sampler.choose(logits[position], ids)
        ids.append(token)
        if token != draft:
            return position
    ids.append(sampler.choose(logits[len(drafts)], ids))
    return len(drafts)


def verify_chain(
    stepper: Stepper, sequence: TokenSequence, drafts: Sequence[int], started: float
) -> tuple[int, Step, Tensor]:
    """Verify drafts that nothing has been computed of: the last token and they go through all layers in one pass.

    Args:
        started: when the round began, as ``perf_counter`` tells.

    Returns:
        How many were accepted, the step, and the last accepted token's state ``[D]``.
    """
    cache, ids = sequence.cache, sequence.ids
    start = cache.length
    hidden, logits = stepper.forward([ids[-1], *drafts], cache)
    accepted = accept_chain(logits, drafts, ids, sequence.sampler)
    cache.length = start + accepted + 1
    step = round_step(ids[start + 1 :], len(drafts), accepted, 0.0, perf_counter() - started)
    return accepted, step, hidden[accepted]


def round_step(
    tokens: Sequence[int], num_drafts: int, num_accepted: int, draft_seconds: float, verify_seconds: float
) -> Step:
    """The step of a round: ``num_accepted`` drafts and one token of the model's own."""
    own = Provenance.BONUS if num_drafts and num_accepted == num_drafts else Provenance.VERIFIED
    provenance = (Provenance.DRAFTED,) * num_accepted + (own,)
    return Step(tuple(tokens), provenance, num_drafts, num_accepted, draft_seconds, verify_seconds)
