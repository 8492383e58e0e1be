"""What people are shown about a model's experts: plain numbers, no tensors."""

from __future__ import annotations

from dataclasses import dataclass

from engine.metrics import ExpertStats


@dataclass(frozen=True)
class ExpertReport:
    """A moment's state of the experts.

    Attributes:
        layers: the numbers of the layers that have experts.
        resident: for each of them, which experts are in memory now.
        uses: for each of them, how often each expert was chosen.
        num_slots: experts that fit into memory at the same time.
        expert_bytes: of one expert.
        stats: counters since the model was loaded.
        prefetching: whether experts are loaded ahead of time; it switches itself off where that does not pay.
        policy: the eviction policy's name.
        predictor: the predictor's name, or None.
        has_maps: whether maps that were fitted for this model name experts ahead of time.
        plan: in one sentence, what lives where.
        planned_slots: the plan's; more than ``num_slots`` where memory has run short since.
    """

    layers: tuple[int, ...]
    resident: tuple[tuple[bool, ...], ...]
    uses: tuple[tuple[int, ...], ...]
    num_slots: int
    expert_bytes: int
    stats: ExpertStats
    prefetching: bool
    policy: str
    predictor: str | None
    plan: str
    planned_slots: int | None = None
    has_maps: bool = False
