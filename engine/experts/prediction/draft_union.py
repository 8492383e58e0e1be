"""Draft union: what a drafted token's states name is loaded while the next token is drafted.

Verification runs several tokens through all deeper layers at once and wants the union of their experts. The draft
already knows much of them: the union map of :mod:`engine.residuals.expert_stream` reads the slow state behind the
draft layers and the exit state of the stream that drafts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.decoding.ranking import Rank, likeliest
from engine.experts.cache import ExpertCache
from engine.experts.prediction.next_gate import likely_experts
from engine.experts.store import Key
from engine.models.kv_cache import KVCache
from engine.models.stepper import Stepper
from engine.residuals.drafter import Draft, Drafter, StepwiseDrafter
from engine.residuals.expert_stream import ExpertStream
from engine.threads import use_threads


def named_experts(stream: ExpertStream, draft: Draft, count: int) -> list[Key]:
    """``count`` experts of each layer behind the draft layers, the nearest layers first."""
    assert draft.slow_state is not None  # layers with experts have no copies
    slow, final = draft.slow_state[0], draft.exit_state
    logits = stream.union_logits(slow.to(stream.union.dtype), final.to(stream.union.dtype))
    return [
        (layer, number)
        for place, layer in enumerate(stream.sparse)
        if layer >= stream.config.draft_depth
        for number in likely_experts(logits[place][None], count)
    ]


class UnionDrafter(StepwiseDrafter):
    """A drafter that has the experts of what it drafts loaded; the drafts are the inner drafter's own.

    Args:
        num_layers: only the experts of so many layers behind the draft are asked for: what comes later is named more
            exactly when its time comes, and would take slots away.
    """

    def __init__(self, inner: Drafter, stream: ExpertStream, cache: ExpertCache, num_layers: int = 4) -> None:
        self.depth = inner.depth
        self._inner, self._stream, self._cache = inner, stream, cache
        experts = stream.model.experts
        assert experts is not None
        self._count, self._last = experts.num_experts_per_tok, stream.config.draft_depth + num_layers

    @property
    def stepper(self) -> Stepper:
        return self._inner.stepper

    def draft(
        self,
        token: int,
        state: Tensor,
        cache: KVCache,
        position: int,
        rank: Rank = likeliest,
        least: float = 1.0,
    ) -> Draft:
        draft = self._inner.draft(token, state, cache, position, rank, least)
        # Torch's other threads would stay awake for a while, on the cores of those that verify.
        with torch.inference_mode(), use_threads(1):
            keys = named_experts(self._stream, draft, self._count)
        self._cache.prefetch(key for key in keys if key[0] < self._last)
        return draft
