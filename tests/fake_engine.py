"""A session without a model, for tests of the app: it answers with given words, one round each."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

from app.engine_host import EngineHost, ModelChoice
from engine.experts.report import ExpertReport
from engine.metrics import GenerationMetrics
from engine.requests import (
    FinishReason,
    GenerationRequest,
    GenerationResult,
    Piece,
    Provenance,
    Round,
    SamplingParams,
)
from engine.session import Trainable


class FakeGeneration:
    """Yields one round per word. A word that is an exception is raised; ``gate`` holds every round up."""

    def __init__(self, session: FakeSession, request: GenerationRequest) -> None:
        self.request, self.metrics = request, GenerationMetrics()
        self._session, self._words, self._text = session, iter(session.words), ""
        self.cancelled, self.closed = threading.Event(), False
        self._reason = session.finish_reason

    def __iter__(self) -> FakeGeneration:
        return self

    def __next__(self) -> Round:
        self._session.gate.wait(10)
        if self.cancelled.is_set():
            self._reason = FinishReason.CANCELLED
            raise StopIteration
        word = next(self._words)
        if isinstance(word, Exception):
            raise word
        pieces = word if isinstance(word, tuple) else (Piece(1, Provenance.VERIFIED, word),)
        self._text += "".join(piece.text for piece in pieces)
        metrics = self.metrics
        metrics.ttft = metrics.ttft or 0.01
        metrics.num_new_tokens += len(pieces)
        metrics.num_decode_tokens += len(pieces)
        metrics.decode_seconds += 0.01
        return Round(pieces, 0, 0, 0.0, 0.01, 0.01)

    @property
    def result(self) -> GenerationResult:
        return GenerationResult(self._text, (), self._reason, self.metrics, self._session.notices)

    def cancel(self) -> None:
        self.cancelled.set()

    def close(self) -> None:
        self.closed = True
        self.cancelled.set()


class FakeSession:
    """Attributes: ``requests`` and ``generations`` so far; ``gate``: clear it to hold all rounds up."""

    def __init__(
        self,
        words: Iterable[Any] = ("Hello", " world", "!"),
        finish_reason: FinishReason = FinishReason.STOP,
        notices: Sequence[str] = (),
        name: str = "fake",
        methods: Sequence[str] = ("plain",),
        experts: Sequence[ExpertReport] = (),
        trainable: Trainable | None = None,
        recommended: SamplingParams | None = None,
    ) -> None:
        self.words, self.finish_reason, self.notices = tuple(words), finish_reason, tuple(notices)
        self.info = SimpleNamespace(
            name=name, weight_format="int4", kernel="fused", device="cpu", weight_bytes=84_000_000,
            methods=tuple(methods), notes=(), recommended=recommended,
        )  # fmt: skip
        self.generations: list[FakeGeneration] = []
        self.gate = threading.Event()
        self.gate.set()
        self.closed = False
        self._experts, self._trainable = list(experts), trainable

    @property
    def requests(self) -> list[GenerationRequest]:
        return [generation.request for generation in self.generations]

    def methods(self) -> tuple[str, ...]:
        return self.info.methods

    def speculation(self) -> None:
        return None

    def trainable(self) -> Trainable | None:
        return self._trainable

    def experts(self) -> ExpertReport | None:
        """The reports that were given, one a call; the last one stays."""
        return self._experts.pop(0) if len(self._experts) > 1 else next(iter(self._experts), None)

    def stream_generate(self, request: GenerationRequest) -> FakeGeneration:
        self.generations.append(FakeGeneration(self, request))
        return self.generations[-1]

    def close(self) -> None:
        self.closed = True


def ready_host(session: Any) -> EngineHost:
    """A host that has loaded ``session``."""
    host = EngineHost(lambda choice, on_progress, cancel: session, ModelChoice("fake"))
    host.start()
    wait_until(lambda: host.state.stage == "ready")
    return host


def wait_until(condition: Any, seconds: float = 10.0) -> None:
    """Wait for something that another thread does; fails when it does not."""
    pause = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it did not happen in time")
