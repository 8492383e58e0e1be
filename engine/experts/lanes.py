"""The lanes of the expert benchmark: one way each of having experts in memory, on one decoder's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch

from engine.decoding.base import DecodingMethod, TokenSequence
from engine.decoding.context import ContextDrafter
from engine.decoding.controller import DepthController
from engine.decoding.m2r2 import M2R2
from engine.decoding.plain import PlainDecoding
from engine.decoding.sampling import Sampler
from engine.experts.cache import ExpertCache, LayerExperts, make_cache
from engine.experts.eviction import EVICTION_POLICIES
from engine.experts.eviction.belady import Belady, Trace
from engine.experts.in_place import InPlace
from engine.experts.prediction.accelerated import Accelerated, StreamedDecoder
from engine.experts.prediction.base import Predictor
from engine.experts.prediction.draft_union import UnionDrafter
from engine.experts.prediction.next_gate import NextGate
from engine.experts.prediction.replay import Oracle
from engine.experts.prediction.ridge_gate import RidgeGate
from engine.experts.prefetcher import Prefetcher
from engine.experts.reader import Link
from engine.experts.store import ExpertStore
from engine.metrics import ExpertStats, SpeculationStats
from engine.models.decoder import Decoder
from engine.models.stepper import make_stepper
from engine.requests import SamplingParams
from engine.residuals.accelerator import Accelerator
from engine.residuals.drafter import Drafter, make_drafter
from engine.residuals.expert_stream import ExpertStream

_ORACLE_LOOKAHEAD = 2  # layers; one would leave the link idle while it has nothing to fetch
_NUM_DRAFTS = 2


@dataclass(frozen=True)
class Lane:
    """One way of having experts.

    Attributes:
        slots: share of all experts that are in memory; 0: what one layer needs for a token; None: no cache, all
            experts are resident or computed where they lie.
        policy: an eviction policy's name, or ``belady``.
        predictor: ``next-gate``, ``ridge-gate``, ``accelerated`` or ``oracle``; None: nothing is loaded ahead.
        drafts: whether tokens are drafted: as many as pay, or, with ``accelerated``, always two whose experts are loaded ahead.
        in_place: experts are computed from the system's file cache, whatever the link.
    """

    name: str
    slots: float | None = None
    policy: str = "lru"
    predictor: str | None = None
    drafts: bool = False
    in_place: bool = False


RESIDENT = Lane("resident")


def lanes(share: float) -> tuple[Lane, ...]:
    """All lanes at one cache size, the baseline first."""
    return (
        Lane("on-demand", 0.0),
        Lane("lru", share),
        Lane("lfu", share, "lfu"),
        Lane("least-stale", share, "least-stale"),
        Lane("next-gate, lru", share, "lru", "next-gate"),
        Lane("next-gate, lfu", share, "lfu", "next-gate"),
        Lane("accelerated, lfu", share, "lfu", "accelerated"),
        Lane("ridge-gate, lfu", share, "lfu", "ridge-gate"),
        Lane("ridge-gate, foreseen", share, "foreseen", "ridge-gate"),
        Lane("ridge-gate, foreseen, drafts", share, "foreseen", "ridge-gate", drafts=True),
        Lane("draft union, lfu", share, "lfu", "accelerated", drafts=True),
        Lane("oracle bound", share, "belady", "oracle"),
        Lane("in place", 0.0, "lfu", in_place=True),
        RESIDENT,
    )


@dataclass(frozen=True)
class LaneSample:
    """One prompt answered by one lane. Seconds are of decoding alone, prefill not counted."""

    token_ids: tuple[int, ...]
    seconds: float
    num_tokens: int
    experts: ExpertStats
    speculation: SpeculationStats

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class RunningLane:
    """A lane over all prompts of a run: its slots stay filled from one prompt to the next, as a user's would.

    Args:
        resident: the decoder whose weights all lanes share.
        link: the slow tier; None: as fast as the store is.
    """

    def __init__(
        self,
        lane: Lane,
        resident: Decoder,
        store: ExpertStore,
        link: Link | None,
        stream: ExpertStream | None,
        accelerator: Accelerator | None,
    ) -> None:
        self.lane = lane
        self.cache: ExpertCache | None = None
        self._decoder, self._drafts = resident, None
        experts = resident.config.experts
        assert experts is not None
        if lane.slots is not None:
            num_slots = max(experts.num_experts_per_tok, round(lane.slots * len(store.keys)))
            eviction = partial(Belady, ()) if lane.policy == "belady" else EVICTION_POLICIES[lane.policy]
            lying = InPlace(store) if lane.in_place else None
            cache = self.cache = make_cache(
                store, num_slots, eviction, None if lane.in_place else link, in_place=lying
            )
            self._decoder = resident.with_experts(lambda layer: LayerExperts(cache, layer))
        predictor: Predictor | None = None
        if lane.predictor == "accelerated":
            assert stream is not None
            self._decoder = streamed = StreamedDecoder(self._decoder, stream)
            predictor = Accelerated(streamed)
        elif lane.predictor == "next-gate":
            predictor = NextGate(self._decoder)
        elif lane.predictor == "ridge-gate":
            assert stream is not None and self.cache is not None
            predictor = RidgeGate(stream.maps, experts.num_experts_per_tok, self.cache.eviction)
        if predictor is not None and self.cache is not None:
            self._decoder.watch = Prefetcher(self.cache, predictor, always=True)
        self._stepper = make_stepper(self._decoder)
        if lane.drafts:
            assert accelerator is not None
            self._drafts = self._drafting(make_drafter(self._stepper, accelerator), stream)

    @torch.inference_mode()
    def answer(self, ids: Sequence[int], num_tokens: int, trace: Trace) -> LaneSample:
        """Greedy continuation of ``ids``; ``trace`` is what the routers will choose, prefill included."""
        decoder, cache = self._decoder, self.cache
        if cache is not None:
            if self.lane.policy == "belady":
                cache.eviction = Belady(trace, cache.store.index.shape)
            if self.lane.predictor == "oracle":
                decoder.watch = Prefetcher(cache, Oracle(trace, _ORACLE_LOOKAHEAD), always=True)
        kv = decoder.new_cache(len(ids) + num_tokens + 8)
        self._stepper.prefill(ids[:-1], kv)
        sequence = TokenSequence(list(ids), kv, Sampler(SamplingParams()), len(ids))
        method: DecodingMethod = (
            PlainDecoding(self._stepper) if self._drafts is None else self._drafts.new_method()
        )
        method.start(sequence)
        before = ExpertStats() if cache is None else cache.stats.since(ExpertStats())
        speculation = SpeculationStats()
        began = perf_counter()
        while (left := len(ids) + num_tokens - len(sequence.ids)) > 0:
            step = method.step(left)
            speculation.observe(step.num_draft_tokens, step.num_accepted_tokens)
        seconds = perf_counter() - began
        stats = ExpertStats() if cache is None else cache.stats.since(before)
        return LaneSample(tuple(sequence.ids[len(ids) :]), seconds, num_tokens, stats, speculation)

    def _drafting(self, drafter: Drafter, stream: ExpertStream | None) -> M2R2:
        if self.lane.predictor != "accelerated":
            return M2R2(lambda: drafter, context=ContextDrafter())
        assert stream is not None and self.cache is not None
        union = UnionDrafter(drafter, stream, self.cache)
        return M2R2(lambda: union, DepthController(fixed=_NUM_DRAFTS))

    def close(self) -> None:
        """Stop the lane's threads."""
        if self.cache is not None:
            self.cache.stop()


@torch.inference_mode()
def record_trace(
    resident: Decoder, store: ExpertStore, ids: Sequence[int], num_tokens: int
) -> tuple[list[tuple[int, tuple[int, ...]]], tuple[int, ...]]:
    """What the routers choose for a prompt and its greedy continuation, turn by turn, and the continuation."""
    cache = make_cache(store, len(store.keys), EVICTION_POLICIES["lru"])
    try:
        cache.recording = []
        decoder = resident.with_experts(lambda layer: LayerExperts(cache, layer))
        stepper = make_stepper(decoder)
        kv = decoder.new_cache(len(ids) + num_tokens)
        stepper.prefill(ids[:-1], kv)
        sequence = TokenSequence(list(ids), kv, Sampler(SamplingParams()), len(ids))
        method = PlainDecoding(stepper)
        method.start(sequence)
        for _ in range(num_tokens):
            method.step(1)
        return cache.recording, tuple(sequence.ids[len(ids) :])
    finally:
        cache.stop()
