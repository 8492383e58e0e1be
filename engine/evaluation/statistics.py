"""Statistics of a benchmark: pure functions over samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Sample:
    """One prompt answered by one lane. Times are seconds by the lane's own clock."""

    token_ids: tuple[int, ...]
    ttft: float
    decode_seconds: float
    num_decode_tokens: int
    num_rounds: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding rate without the prefill; None if nothing was decoded."""
        return self.num_decode_tokens / self.decode_seconds if self.decode_seconds > 0 else None


@dataclass(frozen=True)
class Summary:
    """A lane over all its prompts; ``spread`` and ``ratio_spread`` are quartiles (25 %, 75 %)."""

    num_prompts: int
    tokens_per_second: float | None
    spread: tuple[float, float] | None
    ratio: float | None
    ratio_spread: tuple[float, float] | None
    ttft: float | None
    acceptance_rate: float | None
    mean_acceptance_length: float | None
    identical_share: float | None


def quantile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the two nearest order statistics."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def quartiles(values: Sequence[float]) -> tuple[float, float] | None:
    """25 % and 75 % quantiles; None without values."""
    return (quantile(values, 0.25), quantile(values, 0.75)) if values else None


def paired_ratios(mine: Mapping[str, Sample], baseline: Mapping[str, Sample]) -> list[float]:
    """Rate over the baseline's on the same prompt: what the machine did at that time cancels out."""
    ratios = []
    for prompt_id, sample in mine.items():
        other = baseline.get(prompt_id)
        if other is not None and sample.tokens_per_second and other.tokens_per_second:
            ratios.append(sample.tokens_per_second / other.tokens_per_second)
    return ratios


def identical_share(mine: Mapping[str, Sample], reference: Mapping[str, Sample]) -> float | None:
    """Share of outputs that equal the reference token for token; None without common prompts."""
    common = [prompt_id for prompt_id in mine if prompt_id in reference]
    if not common:
        return None
    return sum(mine[i].token_ids == reference[i].token_ids for i in common) / len(common)


def summarise(
    mine: Mapping[str, Sample],
    baseline: Mapping[str, Sample] | None,
    reference: Mapping[str, Sample] | None,
) -> Summary:
    """Medians over prompts; the ratio is the median of the paired ratios."""
    samples = list(mine.values())
    rates = [rate for sample in samples if (rate := sample.tokens_per_second)]
    ratios = paired_ratios(mine, baseline) if baseline is not None else []
    drafted = sum(sample.num_draft_tokens for sample in samples)
    accepted = sum(sample.num_accepted_tokens for sample in samples)
    rounds = sum(sample.num_rounds for sample in samples)
    return Summary(
        num_prompts=len(samples),
        tokens_per_second=median(rates) if rates else None,
        spread=quartiles(rates),
        ratio=median(ratios) if ratios else None,
        ratio_spread=quartiles(ratios),
        ttft=median(sample.ttft for sample in samples) if samples else None,
        acceptance_rate=accepted / drafted if drafted else None,
        mean_acceptance_length=1 + accepted / rounds if drafted else None,
        identical_share=identical_share(mine, reference) if reference is not None else None,
    )


def balanced_order(names: Sequence[str], turn: int) -> list[str]:
    """Lanes of one turn: ABC, CBA, BCA, ACB ...: each before each other equally often."""
    start = turn // 2 % len(names) if names else 0
    order = [*names[start:], *names[:start]]
    return order[::-1] if turn % 2 else order
