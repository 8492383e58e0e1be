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

from torch import Tensor

from engine.decoding.sampling import Sampler


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
