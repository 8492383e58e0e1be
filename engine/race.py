"""Two or more answers to one prompt, computed in turns on one machine, each with a clock of its own.

A lane is anything that behaves like a :class:`engine.generation.Generation`: another decoding method, the
same model in another weight format, another engine. Lanes take turns round by round, never two at once, and
who begins a pair of turns alternates, so that what a turn costs its successor (caches, sleeping threads)
falls on all of them alike. A lane's times are its own metrics, which count nothing but its own turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from engine.errors import SlipstreamError
from engine.metrics import GenerationMetrics
from engine.requests import FinishReason, GenerationRequest, GenerationResult, Piece, Round

if TYPE_CHECKING:
    from engine.session import Session


class Running(Protocol):
    """What a race needs of a generation."""

    @property
    def metrics(self) -> GenerationMetrics: ...

    @property
    def result(self) -> GenerationResult: ...

    def __next__(self) -> Round: ...

    def cancel(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Lane:
    """One contestant.

    Attributes:
        name: for people.
        start: prepares the generation; nothing is computed before its first ``next``.
        top2_gap: the model's top-2 logit gap behind the first so many tokens of the answer; None where
            an engine does not tell.
    """

    name: str
    start: Callable[[], Running]
    top2_gap: Callable[[Sequence[int]], float] | None = None


def session_lane(name: str, session: Session, request: GenerationRequest) -> Lane:
    """A lane of our own engine. ``request`` must hold ``prompt_ids``; the whole prompt is read."""
    prompt = list(request.prompt_ids or ())
    return Lane(
        name,
        lambda: session.stream_generate(request, reuse_prefix=False),
        lambda answer: session.top2_gap([*prompt, *answer]),
    )


class LaneRun:
    """A lane as it runs; read it between two updates of the race.

    Attributes:
        pieces: the tokens so far, with text and provenance.
        metrics: live; None before the first turn.
        finish_reason: set at the end.
        error: the sentence to show if it broke.
    """

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.pieces: list[Piece] = []
        self.metrics: GenerationMetrics | None = None
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self._running: Running | None = None
        self._cancelled = False

    @property
    def name(self) -> str:
        return self.lane.name

    @property
    def token_ids(self) -> list[int]:
        return [piece.token_id for piece in self.pieces]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def over(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def step(self) -> None:
        """Compute one round, the whole prompt included in the first."""
        try:
            if self._running is None:
                self._running = self.lane.start()
                self.metrics = self._running.metrics
                if self._cancelled:  # meanwhile, when there was nothing to cancel yet
                    self._running.cancel()
            self.pieces.extend(next(self._running).pieces)
        except StopIteration:
            assert self._running is not None
            self.finish_reason = self._running.result.finish_reason
        except SlipstreamError as error:
            self.error = str(error)

    def cancel(self) -> None:
        self._cancelled = True
        if self._running is not None:
            self._running.cancel()

    def close(self) -> None:
        if self._running is not None:
            self._running.close()
        if not self.over:
            self.finish_reason = FinishReason.CANCELLED


class Race:
    """Runs lanes in turns. Iterate over :meth:`updates`; ``cancel`` may be called from any thread."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self.runs = tuple(LaneRun(lane) for lane in lanes)
        self._cancelled = False

    def updates(self, every: float) -> Iterator[tuple[LaneRun, ...]]:
        """Run to the end, yielding the lanes about every so many seconds, and once more at the end.

        Closing the iterator ends all lanes.
        """
        try:
            opener = 0
            while not self._over():
                first = opener = 1 - opener  # the first turn after a pause finds everything asleep
                until = monotonic() + every
                while True:
                    self._pair(first)
                    first = 1 - first
                    if self._over() or monotonic() >= until:
                        break
                yield self.runs
        finally:
            self.close()

    def cancel(self) -> None:
        """Ask all lanes to end; obeyed within one round or one chunk of a prompt."""
        self._cancelled = True
        for run in self.runs:
            run.cancel()

    def close(self) -> None:
        """End all lanes; those that had not finished count as cancelled."""
        self._cancelled = True
        for run in self.runs:
            run.close()

    def _pair(self, first: int) -> None:
        """A turn for every lane."""
        for run in self.runs if first == 0 else reversed(self.runs):
            if self._cancelled:
                return
            if not run.over:
                run.step()

    def _over(self) -> bool:
        return self._cancelled or all(run.over for run in self.runs)
