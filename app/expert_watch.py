"""What one answer cost in experts, read off the engine's counters a few times a second. No Gradio here."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.experts.report import ExpertReport
    from engine.metrics import ExpertStats

_SECONDS = 0.25  # between two looks


@dataclass(frozen=True)
class ExpertView:
    """What the panel shows.

    Attributes:
        report: which experts are in memory and how often each was chosen.
        stats: the counters, of the answer or since the model was loaded.
        num_tokens, seconds: of the answer, as far as ``stats`` counts it; None where ``stats`` is of no answer.
    """

    report: ExpertReport
    stats: ExpertStats
    num_tokens: int | None = None
    seconds: float | None = None

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes loaded for a token of the answer."""
        return self.stats.bytes_loaded / self.num_tokens if self.num_tokens else None

    @property
    def stall_share(self) -> float | None:
        """Share of the decoding time that was spent waiting for loads."""
        return min(1.0, self.stats.stall_seconds / self.seconds) if self.seconds else None


class ExpertWatch:
    """Follows one answer of ``session``.

    Counts begin behind the first token, as the engine's decoding time does: what the prompt loads is not the
    answer's.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self._before: ExpertStats | None = None
        self._started = False
        self._next = 0.0

    def look(self, metrics: Any, last: bool = False) -> ExpertView | None:
        """Call it after every round; a view a few times a second and for the ``last`` round, otherwise None."""
        if self._started and (self._before is None or (monotonic() < self._next and not last)):
            return None
        report = self._session.experts()
        self._next = monotonic() + _SECONDS
        if not self._started:
            self._started = True
            self._before = None if report is None else report.stats
            return None
        if report is None or self._before is None:  # the model was unloaded meanwhile
            return None
        return ExpertView(
            report, report.stats.since(self._before), metrics.num_decode_tokens, metrics.decode_seconds
        )
