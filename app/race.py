"""A comparison from the page's choices to its verdict: models, turns, streaming, stopping. No Gradio here."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import sleep
from typing import Any

from app import methods
from app.conversation import UNEXPECTED
from app.engine_host import Answering, EngineHost
from app.spare_sessions import memory_sentence
from app.verdict import first_difference, verdict
from engine.errors import InvalidRequestError, SlipstreamError
from engine.race import LaneRun, Race, session_lane
from engine.requests import GenerationRequest, Message, SamplingParams

_log = logging.getLogger(__name__)

UPDATE_SECONDS = 0.25
_WAIT_SECONDS = 0.25
AS_LOADED = ""  # the weight format of the loaded model


@dataclass(frozen=True)
class LaneChoice:
    """What one lane runs."""

    method: str
    weight_format: str = AS_LOADED


@dataclass(frozen=True)
class RaceSettings:
    """What the compare page says; sampling is shared by both lanes."""

    prompt: str
    lanes: tuple[LaneChoice, LaneChoice]
    sampling: SamplingParams
    max_new_tokens: int
    system_prompt: str = ""


@dataclass(frozen=True)
class RaceUpdate:
    """What the page shows now.

    Attributes:
        runs: the lanes; none before the race begins.
        notice: a sentence to show, or none.
        verdict: set once, at the end.
    """

    runs: tuple[LaneRun, ...] = ()
    notice: str = ""
    verdict: str = ""
    failed: bool = False


def stream_race(host: EngineHost, settings: RaceSettings, owner: str) -> Iterator[RaceUpdate]:
    """Run both lanes to the end, when the engine's turn has come. Closing the iterator ends them."""
    try:
        with host.answering(owner) as answering:
            while host.state.stage == "loading" and not answering.stopped:
                yield RaceUpdate(notice="The comparison begins when the model is there.")
                sleep(_WAIT_SECONDS)
            with host.turns.turn() as ahead:
                while (place := ahead(_WAIT_SECONDS)) and not answering.stopped:
                    people = "one question is" if place == 1 else f"{place} questions are"
                    yield RaceUpdate(notice=f"Waiting: {people} ahead of yours.")
                if not answering.stopped:
                    yield from _race(host, answering, settings)
    except SlipstreamError as error:
        yield RaceUpdate(notice=str(error), failed=True)
    except Exception:
        _log.exception("a comparison failed")
        yield RaceUpdate(notice=UNEXPECTED, failed=True)


def _race(host: EngineHost, answering: Answering, settings: RaceSettings) -> Iterator[RaceUpdate]:
    loaded = host.session
    formats = [_other_format(loaded, choice) for choice in settings.lanes]
    host.spares.keep_only([name for name in formats if name is not None])
    sessions = []
    for name in formats:
        if name is not None and host.spares.get(name) is None:
            yield RaceUpdate(notice=memory_sentence(loaded.info.num_parameters, name))
        sessions.append(loaded if name is None else host.spares.load(name))
    if answering.stopped:
        return
    accelerated = [methods.is_accelerated(choice.method) for choice in settings.lanes]
    names = lane_names(settings.lanes, loaded.info.weight_format)
    lanes = [
        session_lane(name, session, _request(session, choice, settings))
        for name, choice, session in zip(names, settings.lanes, sessions, strict=True)
    ]
    race = Race(lanes)
    answering.attach(race)
    for runs in race.updates(UPDATE_SECONDS):
        yield RaceUpdate(runs)
    drafting = next((s for s, drafts in zip(sessions, accelerated, strict=True) if drafts), None)
    state = drafting.speculation() if drafting is not None else None
    gap = None if answering.stopped else _gap(race.runs, accelerated)
    yield RaceUpdate(
        race.runs, verdict=verdict(race.runs, accelerated, state, gap, same_model=sessions[0] is sessions[1])
    )


def lane_names(lanes: Sequence[LaneChoice], loaded: str = "as loaded") -> list[str]:
    """Names that say what the lanes differ in.

    Args:
        loaded: the weight format of the loaded model.
    """
    names = [methods.label(lane.method) for lane in lanes]
    formats = [lane.weight_format or loaded for lane in lanes]
    if len(set(formats)) > 1:
        names = [f"{name}, {weights}" for name, weights in zip(names, formats, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{name} ({place})" for place, name in enumerate(names, 1)]
    return names


def _other_format(session: Any, choice: LaneChoice) -> str | None:
    """The format that has to be loaded beside the present one, if any."""
    same = choice.weight_format in (AS_LOADED, session.info.weight_format)
    return None if same else choice.weight_format


def _request(session: Any, choice: LaneChoice, settings: RaceSettings) -> GenerationRequest:
    if not settings.prompt.strip():
        raise InvalidRequestError("The prompt is empty; type something first.")
    system = [Message("system", settings.system_prompt)] if settings.system_prompt.strip() else []
    return GenerationRequest(
        prompt_ids=session.encode_chat([*system, Message("user", settings.prompt.strip())]),
        sampling=settings.sampling,
        max_new_tokens=settings.max_new_tokens,
        method=choice.method,
    )


def _gap(runs: Sequence[LaneRun], accelerated: Sequence[bool]) -> float | None:
    """How close a call it was where the lanes part, by the plain lane's model."""
    place = first_difference(runs)
    if place is None or any(run.error for run in runs):
        return None
    run = runs[accelerated.index(False)] if False in accelerated else runs[0]
    return run.lane.top2_gap(run.token_ids[:place]) if run.lane.top2_gap is not None else None
