"""One answer, from the user's click to the stored chat: waiting, streaming, stopping. No Gradio here."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from time import monotonic, sleep
from typing import Any

from app import methods
from app.chats import ChatStore, StoredMessage
from app.engine_host import Answering, EngineHost
from app.expert_watch import ExpertView, ExpertWatch
from engine.errors import SlipstreamError
from engine.requests import FinishReason, GenerationRequest, Message, Provenance, SamplingParams

_log = logging.getLogger(__name__)

UPDATE_SECONDS = 0.09  # faster than this nobody reads, and every update costs the browser a layout
_WAIT_SECONDS = 0.25
UNEXPECTED = "Something went wrong; your message is kept and details are in the log (python launch.py doctor names it)."


@dataclass(frozen=True)
class AnswerSettings:
    """What the side panel says."""

    system_prompt: str
    sampling: SamplingParams
    max_new_tokens: int
    method: str


@dataclass(frozen=True)
class AnswerUpdate:
    """What the page shows now.

    Attributes:
        messages: the whole chat, the answer so far last.
        metrics: the engine's live counters; None where there is nothing new to say.
        rate: tokens/s of the last interval.
        accelerated: whether the answer's method drafts.
        speculation: the engine's ``SpeculationState``, if anything drafts.
        experts: what the answer cost in experts, where there is something new to say.
        notice: a sentence to show, or none.
    """

    messages: tuple[StoredMessage, ...]
    metrics: Any | None = None
    rate: float | None = None
    accelerated: bool = False
    speculation: Any | None = None
    experts: ExpertView | None = None
    notice: str = ""
    failed: bool = False


def stream_answer(
    host: EngineHost,
    store: ChatStore,
    chat: int,
    history: Sequence[StoredMessage],
    settings: AnswerSettings,
    owner: str,
) -> Iterator[AnswerUpdate]:
    """Answer the last turn of ``history``, storing the chat before and after.

    Closing the iterator (the page was closed) ends the generation; what was written is stored.
    """
    answer = StoredMessage("assistant", "")
    turns = (*history, answer)
    finished = False
    try:
        with host.answering(owner) as answering:
            store.replace(chat, history)
            try:
                yield from _wait_for_model(host, answering, turns)
                with host.turns.turn() as ahead:
                    while (place := ahead(_WAIT_SECONDS)) and not answering.stopped:
                        people = "one question is" if place == 1 else f"{place} questions are"
                        yield AnswerUpdate(turns, notice=f"Waiting: {people} ahead of yours.")
                    if not answering.stopped:
                        for update in _stream(host, answering, history, settings):
                            turns = update.messages
                            yield update
                finished = not answering.stopped
            finally:
                last = turns[-1]
                if not finished and last.content:
                    turns = (*turns[:-1], replace(last, details={**last.details, "stopped": True}))
                turns = _without_empty(turns)
                store.replace(chat, turns)
        if not finished:
            yield AnswerUpdate(turns)
    except SlipstreamError as error:
        yield AnswerUpdate(_without_empty(turns), notice=str(error), failed=True)
    except Exception:
        _log.exception("an answer failed")
        yield AnswerUpdate(_without_empty(turns), notice=UNEXPECTED, failed=True)


def _wait_for_model(
    host: EngineHost, answering: Answering, turns: tuple[StoredMessage, ...]
) -> Iterator[AnswerUpdate]:
    while host.state.stage == "loading" and not answering.stopped:
        yield AnswerUpdate(turns, notice="Your question is kept; the answer begins when the model is there.")
        sleep(_WAIT_SECONDS)


def _stream(
    host: EngineHost, answering: Answering, history: Sequence[StoredMessage], settings: AnswerSettings
) -> Iterator[AnswerUpdate]:
    system = [Message("system", settings.system_prompt)] if settings.system_prompt.strip() else []
    session = host.session
    method = methods.pick(session.methods(), settings.method)
    request = GenerationRequest(
        messages=(*system, *(Message(turn.role, turn.content) for turn in history)),
        sampling=settings.sampling,
        max_new_tokens=settings.max_new_tokens,
        method=method,
    )
    drafts = methods.is_accelerated(method)
    generation = session.stream_generate(request)
    answering.attach(generation)
    text, spans, experts = "", _Spans(), None
    metrics, watch = generation.metrics, ExpertWatch(session)
    shown, seen_tokens, seen_seconds = -math.inf, 0, 0.0  # the first token is shown at once
    for step in generation:
        text += step.text
        spans.add(step.pieces)
        experts = watch.look(metrics) or experts
        if monotonic() - shown < UPDATE_SECONDS:
            continue
        shown = monotonic()
        seconds = metrics.decode_seconds - seen_seconds
        rate = (metrics.num_decode_tokens - seen_tokens) / seconds if seconds > 0 else None
        seen_tokens, seen_seconds = metrics.num_decode_tokens, metrics.decode_seconds
        answer = StoredMessage("assistant", text, {"drafted": list(spans.drafted)})
        yield AnswerUpdate(
            (*history, answer), metrics, rate, drafts, session.speculation() if drafts else None, experts
        )
        experts = None
    result = generation.result
    notices = [*result.notices]
    if result.finish_reason is FinishReason.CONTEXT:
        notices.append("The model's context is full; start a new chat to go on.")
    if result.finish_reason is FinishReason.CANCELLED and not answering.stopped:
        notices.append("The answer ends here, because another model was chosen meanwhile.")
    if result.finish_reason is FinishReason.LENGTH:
        notices.append("The answer reached the token limit of the side panel.")
    details = {
        "tokens": metrics.num_new_tokens,
        "tokens_per_second": metrics.tokens_per_second,
        "finish_reason": result.finish_reason.value,
        "drafted": spans.drafted,
    }
    if result.finish_reason is FinishReason.CANCELLED:
        details["stopped"] = True
    yield AnswerUpdate(
        (*history, StoredMessage("assistant", result.text, details)), metrics, metrics.tokens_per_second,
        drafts, session.speculation() if drafts else None, watch.look(metrics, last=True), " ".join(notices),
    )  # fmt: skip


class _Spans:
    """Character ranges of the answer that were drafted and accepted."""

    def __init__(self) -> None:
        self.drafted: list[tuple[int, int]] = []
        self._length = 0

    def add(self, pieces: Sequence[Any]) -> None:
        for piece in pieces:
            end = self._length + len(piece.text)
            if piece.provenance is Provenance.DRAFTED and piece.text:
                if self.drafted and self.drafted[-1][1] == self._length:
                    self.drafted[-1] = (self.drafted[-1][0], end)
                else:
                    self.drafted.append((self._length, end))
            self._length = end


def _without_empty(turns: Sequence[StoredMessage]) -> tuple[StoredMessage, ...]:
    """The turns, less an answer that has not begun."""
    if turns and turns[-1].role == "assistant" and not turns[-1].content:
        return tuple(turns[:-1])
    return tuple(turns)
