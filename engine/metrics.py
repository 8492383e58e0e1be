"""Counters and timings, named as vLLM names them. All times are engine time, in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field, fields


@dataclass
class SpeculationStats:
    """Draft counters of one generation (or of many, merged)."""

    num_drafts: int = 0  # rounds that drafted
    num_rounds: int = 0  # all rounds, undrafted ones too
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)

    def observe(self, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """Count one round of ``num_draft_tokens`` drafts, ``num_accepted_tokens`` of them accepted, one for each position
        from the first on."""
        self.num_rounds += 1
        self.num_drafts += num_draft_tokens > 0
        self.num_draft_tokens += num_draft_tokens
        self.num_accepted_tokens += num_accepted_tokens
        missing = num_draft_tokens - len(self.num_accepted_tokens_per_pos)
        self.num_accepted_tokens_per_pos.extend([0] * missing)
        for position in range(num_accepted_tokens):
            self.num_accepted_tokens_per_pos[position] += 1

    def merge(self, other: SpeculationStats) -> None:
        """Add another generation's counters."""
        self.num_drafts += other.num_drafts
        self.num_rounds += other.num_rounds
        self.num_draft_tokens += other.num_draft_tokens
        self.num_accepted_tokens += other.num_accepted_tokens
        mine, theirs = self.num_accepted_tokens_per_pos, other.num_accepted_tokens_per_pos
        mine.extend([0] * (len(theirs) - len(mine)))
        for position, count in enumerate(theirs):
            mine[position] += count

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / drafted; None before the first draft."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else None

    @property
    def mean_acceptance_length(self) -> float | None:
        """Tokens per round, the model's own included: 1 + accepted / rounds."""
        return 1 + self.num_accepted_tokens / self.num_rounds if self.num_rounds else None


@dataclass
class ExpertStats:
    """Counters of a mixture-of-experts model whose experts are not all in fast memory."""

    expert_hits: int = 0  # in memory when their layer asked for them
    expert_late: int = 0  # on their way when their layer asked for them
    expert_misses: int = 0  # not even asked for by then
    expert_in_place: int = 0  # computed where they lay, outside the slots
    prefetch_issued: int = 0
    prefetch_used: int = 0  # of those issued; late ones count
    bytes_loaded: int = 0
    stall_seconds: float = 0.0  # that the computation waited for loads

    def since(self, earlier: ExpertStats) -> ExpertStats:
        """What has been counted since ``earlier``, a copy of the same counters."""
        return ExpertStats(**{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)})

    def plus(self, other: ExpertStats) -> ExpertStats:
        """Both added up."""
        return ExpertStats(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    @property
    def hit_rate(self) -> float | None:
        """Share of the experts asked for that were in memory."""
        return self.expert_hits / self.num_asked if self.num_asked else None

    @property
    def in_place_share(self) -> float | None:
        """Share of the experts asked for that were computed where they lay."""
        return self.expert_in_place / self.num_asked if self.num_asked else None

    @property
    def num_asked(self) -> int:
        """Experts asked for, once for each layer's turn."""
        return self.expert_hits + self.expert_late + self.expert_misses + self.expert_in_place

    @property
    def prefetch_precision(self) -> float | None:
        """Share of the loads ahead of time that were used."""
        return self.prefetch_used / self.prefetch_issued if self.prefetch_issued else None

    @property
    def prefetch_recall(self) -> float | None:
        """Share of the loads that were needed which had been asked for ahead of time."""
        needed = self.prefetch_used + self.expert_misses
        return self.prefetch_used / needed if needed else None


@dataclass
class GenerationMetrics:
    """What one generation cost. Rates count decoding only; the prompt is reported apart."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens found in the kept KV cache, not computed again
    num_new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0  # engine time of all rounds
    num_decode_tokens: int = 0  # tokens produced in decode_seconds (the first one comes from the prefill)
    ttft: float | None = None  # from the request to the first token
    speculation: SpeculationStats = field(default_factory=SpeculationStats)

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding rate in engine time; None before the second token."""
        return self.num_decode_tokens / self.decode_seconds if self.decode_seconds > 0 else None

    @property
    def itl(self) -> float | None:
        """Mean inter-token latency in seconds."""
        return self.decode_seconds / self.num_decode_tokens if self.num_decode_tokens else None
