"""The line under a race: who was sooner, by how much, and whether both said the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.requests import FinishReason

if TYPE_CHECKING:
    from engine.decoding.controller import SpeculationState
    from engine.race import LaneRun

_EVEN = 0.02  # a difference below this share is noise of the machine


def verdict(
    runs: Sequence[LaneRun],
    accelerated: Sequence[bool],
    state: SpeculationState | None,
    gap: float | None,
    same_model: bool = True,
) -> str:
    """One or two sentences on two lanes that are over.

    Args:
        accelerated: whether each lane drafts.
        state: what the drafting lane's depth controller knows, to explain a loss.
        gap: the model's top-2 logit gap where the lanes part, if they do and it is known.
        same_model: whether both lanes run the same weights, so that without drafts they do the same work.
    """
    broken = [f"{run.name} broke off: {run.error}" for run in runs if run.error]
    if broken:
        return " ".join(broken)
    stopped = any(run.finish_reason is FinishReason.CANCELLED for run in runs)
    idle = same_model and any(map(_drafted_nothing, runs, accelerated)) and not all(accelerated)
    speed = _idle(runs) if idle else _speed(runs, accelerated, state)
    sentence = f"{speed}; {_agreement(runs, gap, stopped)}."
    return f"Stopped. So far: {sentence}" if stopped else sentence


def first_difference(runs: Sequence[LaneRun]) -> int | None:
    """Index of the first token in which two lanes differ, where both got that far; None if in none.

    An answer that ended while the other goes on differs at its end, unless somebody stopped it."""
    one, other = (run.token_ids for run in runs)
    for place, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return place
    stopped = any(run.finish_reason is FinishReason.CANCELLED for run in runs)
    return None if stopped or len(one) == len(other) else min(len(one), len(other))


def _drafted_nothing(run: LaneRun, accelerated: bool) -> bool:
    return accelerated and run.metrics is not None and not run.metrics.speculation.num_draft_tokens


def _idle(runs: Sequence[LaneRun]) -> str:
    """Whatever the clocks say then is noise."""
    return f"Acceleration is off for now, so both decoded plainly ({_figures(runs, 0, 1)})"


def _speed(runs: Sequence[LaneRun], accelerated: Sequence[bool], state: SpeculationState | None) -> str:
    rates = [run.metrics.tokens_per_second if run.metrics else None for run in runs]
    if None in rates:
        return "too short to compare speeds"
    one, other = (rate or 0.0 for rate in rates)
    ratio = one / other if other else 1.0
    quick, slow = (0, 1) if ratio >= 1 else (1, 0)
    ratio = max(ratio, 1 / ratio)
    told = _figures(runs, quick, slow)
    if ratio < 1 + _EVEN:
        return f"Both ran equally fast ({told})"
    if accelerated[slow] and not accelerated[quick]:
        told = _figures(runs, slow, quick)
        return f"{runs[slow].name} was slower here ({told}), because {_why_slower(runs[slow], state)}"
    verb = "finished" if _same_length(runs) else "ran"
    how = f"{ratio:.1f} times {'sooner' if _same_length(runs) else 'as fast'}"
    if ratio < 1.1:
        how = f"{ratio:.2f} times {'sooner' if _same_length(runs) else 'as fast'}"
    return f"{runs[quick].name} {verb} {how} ({told})"


def _figures(runs: Sequence[LaneRun], subject: int, other: int) -> str:
    """Total decoding times, or rates where the answers differ in length; the sentence's subject first."""
    metrics = [runs[place].metrics for place in (subject, other)]
    if _same_length(runs):
        first, second = (f"{m.decode_seconds:.2f}" for m in metrics if m)
        return f"{first} s against {second} s of decoding"
    first, second = (f"{m.tokens_per_second or 0:.1f}" for m in metrics if m)
    return f"{first} against {second} tokens/s"


def _same_length(runs: Sequence[LaneRun]) -> bool:
    return len({len(run.pieces) for run in runs}) == 1


def _why_slower(run: LaneRun, state: SpeculationState | None) -> str:
    stats = run.metrics.speculation if run.metrics else None
    if stats is None or stats.acceptance_rate is None or stats.mean_acceptance_length is None:
        return "it drafted nothing"
    costs = ""
    if state is not None and state.draft_seconds and state.plain_seconds:
        costs = (
            f", while a draft costs {1e3 * state.draft_seconds:.1f} ms "
            f"beside a plain step's {1e3 * state.plain_seconds:.1f} ms"
        )
    return (
        f"{stats.acceptance_rate:.0%} of its drafts were right and a round gave "
        f"{stats.mean_acceptance_length:.2f} tokens{costs}"
    )


def _agreement(runs: Sequence[LaneRun], gap: float | None, stopped: bool) -> str:
    place = first_difference(runs)
    if place is not None:
        told = f", top-2 gap {_significant(gap)}" if gap is not None else ""
        return f"diverged at token {place + 1}{told}"
    if stopped:
        return f"outputs identical over {min(len(run.pieces) for run in runs)} tokens"
    return "outputs identical"


def _significant(gap: float) -> str:
    return f"{gap:.3f}" if gap >= 0.001 or gap == 0 else f"{gap:.1e}"
