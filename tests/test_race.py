"""Comparisons: turns, clocks, stopping, verdicts, and models in a second format."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_engine import ready_host, wait_until

import engine.generation
from app.engine_host import EngineHost, ModelChoice
from app.race import LaneChoice, RaceSettings, RaceUpdate, lane_names, stream_race
from app.spare_sessions import SpareSessions, memory_sentence
from app.verdict import first_difference, verdict
from engine.decoding.base import Step, TokenSequence
from engine.decoding.controller import SpeculationState
from engine.decoding.sampling import Sampler
from engine.errors import InvalidRequestError, SlipstreamError
from engine.generation import Generation
from engine.loading import load_session
from engine.metrics import GenerationMetrics
from engine.race import Lane, LaneRun, Race
from engine.requests import (
    FinishReason,
    GenerationRequest,
    GenerationResult,
    Piece,
    Provenance,
    Round,
    SamplingParams,
)  # fmt: skip
from engine.session import Session
from engine.text_stream import TextStream
from tests import tiny


class FakeRun:
    """A generation that writes its turns into a log."""

    def __init__(
        self, name: str, log: list[str], rounds: int, on_turn: Callable[[], None] | None = None
    ) -> None:
        self.metrics = GenerationMetrics()
        self._name, self._log, self._left, self._on_turn = name, log, rounds, on_turn
        self.cancelled = self.closed = False

    def __next__(self) -> Round:
        if self.cancelled or not self._left:
            raise StopIteration
        self._left -= 1
        self._log.append(self._name)
        if self._on_turn:
            self._on_turn()
        self.metrics.num_decode_tokens += 1
        self.metrics.decode_seconds += 0.01
        return Round((Piece(7, Provenance.VERIFIED, "x"),), 0, 0, 0.0, 0.01, 0.01)

    @property
    def result(self) -> GenerationResult:
        reason = FinishReason.CANCELLED if self.cancelled else FinishReason.STOP
        return GenerationResult("", (), reason, self.metrics)

    def cancel(self) -> None:
        self.cancelled = True

    def close(self) -> None:
        self.closed = True
        self.cancelled = True


def fake_race(rounds: Sequence[int], on_turn: Callable[[], None] | None = None) -> tuple[Race, list[str]]:
    log: list[str] = []
    lanes = [
        Lane(name, lambda name=name, count=count: FakeRun(name, log, count, on_turn))
        for name, count in zip("AB", rounds, strict=True)
    ]
    return Race(lanes), log


# Turns


def test_lanes_alternate_and_take_turns_in_going_first():
    race, log = fake_race((6, 6))
    list(race.updates(every=1000))
    pairs = [log[at : at + 2] for at in range(0, 12, 2)]
    assert all(sorted(pair) == ["A", "B"] for pair in pairs)
    assert [pair[0] for pair in pairs] in (list("ABABAB"), list("BABABA"))
    assert [run.finish_reason for run in race.runs] == [FinishReason.STOP] * 2


def test_the_first_turn_after_a_pause_alternates_too():
    race, log = fake_race((8, 8))
    for _ in race.updates(every=0):  # a pause after every pair
        log.append("|")
    openers = [turns[0] for turns in "".join(log).split("|") if turns]
    assert openers.count("A") == openers.count("B") == 4


def test_the_longer_lane_goes_on_alone():
    race, log = fake_race((2, 5))
    list(race.updates(every=1000))
    assert log.count("A") == 2 and log.count("B") == 5 and log[-3:] == ["B"] * 3


def test_stop_ends_both_lanes_at_once():
    race, log = fake_race((1000, 1000))
    updates = race.updates(every=0)
    next(updates), next(updates)
    race.cancel()
    turns = len(log)
    list(updates)
    assert len(log) == turns == 4
    assert [run.finish_reason for run in race.runs] == [FinishReason.CANCELLED] * 2


def test_stop_from_another_thread_within_a_turn():
    ready, go = threading.Event(), threading.Event()

    def wait() -> None:
        ready.set()
        assert go.wait(10)

    race, log = fake_race((1000, 1000), wait)
    thread = threading.Thread(target=lambda: list(race.updates(every=1000)))
    thread.start()
    assert ready.wait(10)
    race.cancel()
    go.set()
    thread.join(10)
    assert not thread.is_alive() and len(log) == 1
    assert all(run.finish_reason is FinishReason.CANCELLED for run in race.runs)


def test_leaving_the_page_closes_both():
    runs: list[FakeRun] = []

    def start() -> FakeRun:
        runs.append(FakeRun("A", [], 1000))
        return runs[-1]

    updates = Race([Lane("A", start), Lane("B", start)]).updates(every=0)
    next(updates)
    updates.close()  # type: ignore[attr-defined]
    assert [run.closed for run in runs] == [True, True]


def test_a_lane_that_breaks_does_not_stop_the_other():
    def broken() -> FakeRun:
        raise InvalidRequestError("It does not fit.")

    race = Race([Lane("A", broken), Lane("B", lambda: FakeRun("B", [], 3))])
    list(race.updates(every=1000))
    assert race.runs[0].error == "It does not fit."
    assert len(race.runs[1].pieces) == 3 and race.runs[1].finish_reason is FinishReason.STOP
    assert verdict(race.runs, (False, False), None, None) == "A broke off: It does not fit."


# Clocks


class SlowBackend:
    """A model whose steps take a given time on a clock that only computing moves."""

    kernel, context_length, prefill_chunk = "fake", 4096, 64

    def __init__(self, clock: SimpleNamespace, step_seconds: float) -> None:
        self._clock, self._seconds = clock, step_seconds

    def method(self, name: str) -> SlowBackend:
        return self

    def prefill(self, ids: Sequence[int], cache: Any) -> None:
        cache.length += len(ids)
        self._clock.now += self._seconds

    def start(self, sequence: TokenSequence) -> None:
        self._sequence = sequence

    def step(self, max_tokens: int) -> Step:
        self._clock.now += self._seconds
        self._sequence.cache.length += 1
        self._sequence.ids.append(1)
        return Step((1,), (Provenance.VERIFIED,))


def timed_lane(clock: SimpleNamespace, step_seconds: float) -> Lane:
    return lane_of(SlowBackend(clock, step_seconds), 50)


def lane_of(backend: Any, tokens: int) -> Lane:
    """A real generation on a made-up model."""

    def start() -> Generation:
        request = GenerationRequest(prompt_ids=(1, 2, 3), max_new_tokens=tokens)
        cache = SimpleNamespace(length=0, nbytes=0)
        sequence = TokenSequence([1, 2, 3], cache, Sampler(SamplingParams()), 3)
        return Generation(backend, request, sequence, TextStream(lambda token: b"x"), frozenset())

    return Lane("lane", start)


def rate(lanes: Sequence[Lane]) -> float:
    """Tokens/s of the first lane."""
    race = Race(lanes)
    for _ in race.updates(every=0):
        pass
    assert race.runs[0].metrics is not None
    return race.runs[0].metrics.tokens_per_second or 0.0


@pytest.mark.parametrize("slowness", [1, 10, 100])
def test_a_slowed_lane_does_not_slow_the_other(monkeypatch: pytest.MonkeyPatch, slowness: int):
    """On a clock that only steps move, whatever one lane's figures contain of the other's turns shows."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(engine.generation, "perf_counter", lambda: clock.now)
    alone = rate([timed_lane(clock, 0.01)])
    beside = rate([timed_lane(clock, 0.01), timed_lane(clock, 0.01 * slowness)])
    assert alone == pytest.approx(100)
    assert beside == pytest.approx(alone, rel=0.05)


class BusyBackend(SlowBackend):
    """A model whose steps take so long on the real clock: computing, or asleep."""

    def __init__(self, step_seconds: float, asleep: bool) -> None:
        super().__init__(SimpleNamespace(now=0.0), step_seconds)
        self._asleep = asleep

    def step(self, max_tokens: int) -> Step:
        until = perf_counter() + self._seconds
        while perf_counter() < until:
            if self._asleep:
                time.sleep(self._seconds / 4)
        return super().step(max_tokens)


def test_a_sleeping_lane_does_not_slow_the_other_on_the_real_clock():
    """The rounds that no other program disturbed (the quicker quarter) take what they take alone."""

    def undisturbed(slow_beside: bool) -> float:
        rounds: list[float] = []

        def lane(seconds: float, asleep: bool, log: list[float]) -> Lane:
            started = lane_of(BusyBackend(seconds, asleep), 30).start

            def start() -> Any:
                run: Any = started()
                advance = run._advance
                run._advance = lambda: log.append((made := advance()).seconds) or made
                return run

            return Lane("lane", start)

        lanes = [lane(0.004, False, rounds)] + [lane(0.020, True, [])] * slow_beside
        list(Race(lanes).updates(every=0.25))
        return quantiles(rounds, n=4)[0]

    assert undisturbed(True) == pytest.approx(undisturbed(False), rel=0.05)


def test_a_lane_waits_for_its_first_token_on_its_own_clock(monkeypatch: pytest.MonkeyPatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(engine.generation, "perf_counter", lambda: clock.now)
    race = Race([timed_lane(clock, 5.0), timed_lane(clock, 0.01)])
    list(race.updates(every=0))
    assert [run.metrics.ttft for run in race.runs if run.metrics] == [
        pytest.approx(10), pytest.approx(0.02),
    ]  # fmt: skip


# Verdicts


def over(
    name: str,
    tokens: Sequence[int],
    seconds: float,
    reason: FinishReason = FinishReason.STOP,
    drafts: int = 9,
) -> LaneRun:
    """A lane that is over."""
    run = LaneRun(Lane(name, lambda: pytest.fail("it has run already")))
    run.pieces = [Piece(token, Provenance.VERIFIED, "x") for token in tokens]
    run.metrics = GenerationMetrics(decode_seconds=seconds, num_decode_tokens=max(len(tokens) - 1, 0))
    run.metrics.speculation.num_draft_tokens = drafts
    run.finish_reason = reason
    return run


SAME = list(range(50))
STATE = SpeculationState(plain_seconds=0.010, draft_seconds=0.004, acceptance=0.31)
ROLES = (True, False)


def test_verdict_sooner_and_identical():
    runs = (over("M2R2", SAME, 2.0), over("Plain", SAME, 2.8))
    assert verdict(runs, ROLES, STATE, None) == (
        "M2R2 finished 1.4 times sooner (2.00 s against 2.80 s of decoding); outputs identical."
    )


def test_verdict_diverged_names_place_and_gap():
    other = [*SAME[:40], 999, *SAME[41:]]
    runs = (over("M2R2", other, 2.0), over("Plain", SAME, 2.0))
    assert first_difference(runs) == 40
    assert verdict(runs, ROLES, STATE, 0.0031).endswith("; diverged at token 41, top-2 gap 0.003.")
    assert verdict(runs, ROLES, STATE, 0.00002).endswith("top-2 gap 2.0e-05.")
    assert verdict(runs, ROLES, STATE, None).endswith("; diverged at token 41.")


def test_verdict_slower_says_why():
    runs = (over("M2R2", SAME, 3.0, drafts=20), over("Plain", SAME, 2.0))
    assert runs[0].metrics is not None
    runs[0].metrics.speculation.num_accepted_tokens = 5
    runs[0].metrics.speculation.num_rounds = 45
    told = "M2R2 was slower here (3.00 s against 2.00 s of decoding), because 25% of its drafts were right and a round gave 1.11 tokens"
    assert verdict(runs, ROLES, STATE, None) == (
        f"{told}, while a draft costs 4.0 ms beside a plain step's 10.0 ms; outputs identical."
    )
    assert verdict(runs, ROLES, None, None) == f"{told}; outputs identical."


@pytest.mark.parametrize("seconds", [1.8, 2.3])
def test_verdict_without_drafts_makes_nothing_of_noise(seconds: float):
    runs = (over("M2R2", SAME, seconds, drafts=0), over("Plain", SAME, 2.0))
    assert verdict(runs, ROLES, STATE, None) == (
        f"Acceleration is off for now, so both decoded plainly ({seconds:.2f} s against 2.00 s of decoding); "
        "outputs identical."
    )
    assert "plainly" not in verdict(runs, ROLES, STATE, None, same_model=False)


def test_verdict_of_two_plain_lanes_gives_no_reason():
    runs = (over("Plain, bf16", SAME, 3.0), over("Plain, int4", SAME, 2.0))
    assert verdict(runs, (False, False), None, None).startswith("Plain, int4 finished 1.5 times sooner")


def test_verdict_even():
    runs = (over("M2R2", SAME, 2.0), over("Plain", SAME, 2.01))
    assert verdict(runs, ROLES, STATE, None).startswith("Both ran equally fast (2.00 s against 2.01 s")


def test_verdict_of_different_lengths_compares_rates():
    runs = (over("M2R2", SAME, 1.0), over("Plain", SAME[:25], 0.96))
    assert first_difference(runs) == 25
    assert verdict(runs, ROLES, STATE, None) == (
        "M2R2 ran 2.0 times as fast (49.0 against 25.0 tokens/s); diverged at token 26."
    )


def test_verdict_stopped_claims_no_more_than_was_seen():
    stopped = FinishReason.CANCELLED
    runs = (over("M2R2", SAME, 1.0, stopped), over("Plain", SAME[:25], 0.96, stopped))
    assert first_difference(runs) is None
    text = verdict(runs, ROLES, STATE, None)
    assert text.startswith("Stopped. So far: M2R2 ran 2.0 times as fast")
    assert text.endswith("outputs identical over 25 tokens.")


def test_verdict_of_nothing():
    runs = (over("M2R2", [], 0.0, FinishReason.CANCELLED), over("Plain", [], 0.0, FinishReason.CANCELLED))
    assert "too short to compare" in verdict(runs, ROLES, None, None)


# The engine's part, on a tiny model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def session(folder: Path) -> Iterator[Session]:
    session = load_session("tiny", folder, "fp32", "cpu", threads=1)
    yield session
    session.close()


def test_top2_gap_is_the_models_own(session: Session):
    model = tiny.build_model()
    for ids in ([5], [9, 200, 31], list(range(3, 150))):  # one token, a few, more than a chunk
        with torch.inference_mode():
            best, second = model(torch.tensor([ids])).logits[0, -1].topk(2).values.tolist()
        assert session.top2_gap(ids) == pytest.approx(best - second, abs=1e-3)
    with pytest.raises(InvalidRequestError):
        session.top2_gap([])


def settings(*lanes: LaneChoice, prompt: str = "hello there", tokens: int = 24) -> RaceSettings:
    first, second = lanes or (LaneChoice("plain"), LaneChoice("plain"))
    return RaceSettings(prompt, (first, second), SamplingParams(seed=0), tokens)


def host_of(folder: Path) -> tuple[EngineHost, list[str]]:
    """A host that really loads, and the formats that it was asked for."""
    asked: list[str] = []

    def load(choice: ModelChoice, on_progress: Any, cancel: threading.Event) -> Session:
        asked.append(choice.weight_format)
        return load_session("tiny", folder, choice.weight_format, "cpu", threads=1)

    host = EngineHost(load, ModelChoice(str(folder), "fp32"))
    host.start()
    wait_until(lambda: host.state.stage != "loading", 60)
    return host, asked


def test_a_race_of_equal_lanes_is_identical(session: Session):
    updates = list(stream_race(ready_host(session), settings(), "me"))
    assert updates[-1].verdict.endswith("outputs identical.") and not updates[-1].failed
    assert [len(run.pieces) for run in updates[-1].runs] == [24, 24]
    assert all(run.metrics and run.metrics.num_cached_tokens == 0 for run in updates[-1].runs)


def test_sampled_lanes_share_the_seed(session: Session):
    sampled = RaceSettings(
        "hello", (LaneChoice("plain"), LaneChoice("plain")), SamplingParams(temperature=1.0, seed=3), 24
    )
    assert list(stream_race(ready_host(session), sampled, "me"))[-1].verdict.endswith("outputs identical.")


def test_another_format_is_loaded_once_and_kept_until_changed(folder: Path):
    host, asked = host_of(folder)
    lanes = (LaneChoice("plain"), LaneChoice("plain", "bf16"))
    updates = list(stream_race(host, settings(*lanes), "me"))
    assert "second time, in bf16" in updates[0].notice
    assert [run.name for run in updates[-1].runs] == ["Plain, fp32", "Plain, bf16"]
    assert updates[-1].verdict and asked == ["fp32", "bf16"]
    again = list(stream_race(host, settings(*lanes), "me"))
    assert asked == ["fp32", "bf16"] and not any(update.notice for update in again)
    # naming the loaded format loads nothing; the other one is let go
    kept = host.spares.get("bf16")
    list(stream_race(host, settings(LaneChoice("plain", "fp32"), LaneChoice("plain")), "me"))
    assert asked == ["fp32", "bf16"] and host.spares.get("bf16") is None
    with pytest.raises(InvalidRequestError):  # closed
        kept.stream_generate(GenerationRequest(prompt_ids=[1]))
    host.close()


def test_a_diverging_lane_is_reported_with_the_plain_models_gap(folder: Path, session: Session):
    """int4 against fp32 on random weights: they part soon."""
    host, _ = host_of(folder)
    update = list(stream_race(host, settings(LaneChoice("plain", "int4"), LaneChoice("plain")), "me"))[-1]
    place = first_difference(update.runs)
    assert place is not None
    first = update.runs[0]
    assert f"diverged at token {place + 1}, top-2 gap" in update.verdict
    assert first.lane.top2_gap is not None and first.lane.top2_gap(first.token_ids[:place]) >= 0
    host.close()


def test_a_race_waits_for_its_turn_and_stop_ends_the_waiting(session: Session):
    host = ready_host(session)
    with host.turns.turn() as ahead:
        assert ahead(0) == 0
        updates = stream_race(host, settings(), "me")
        assert next(updates).notice == "Waiting: one question is ahead of yours."
        host.stop("me")
        assert [update.runs for update in updates] == []


def test_stopping_a_race_keeps_what_it_has(session: Session, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("app.race.UPDATE_SECONDS", 0.0)
    host = ready_host(session)
    seen: list[RaceUpdate] = []
    race = stream_race(host, settings(tokens=200), "me")
    for update in race:
        seen.append(update)
        host.stop("me")
    assert seen[-1].verdict.startswith("Stopped. So far:")
    assert all(run.finish_reason is FinishReason.CANCELLED for run in seen[-1].runs)
    assert [len(run.pieces) for run in seen[-1].runs] == [1, 1]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (settings(prompt="  "), "prompt is empty"),
        (settings(prompt="word " * 500), "context"),
        (settings(LaneChoice("plain"), LaneChoice("psychic")), "no decoding method"),
    ],
)
def test_bad_input_is_a_sentence(session: Session, wrong: RaceSettings, sentence: str):
    last = list(stream_race(ready_host(session), wrong, "me"))[-1]
    assert sentence in last.notice + last.verdict


def test_spare_sessions_load_once_and_close():
    loaded: list[str] = []

    def load(name: str) -> Any:
        loaded.append(name)
        return SimpleNamespace(name=name, close=lambda: loaded.append(f"closed {name}"))

    spares = SpareSessions(load)
    assert spares.load("int8") is spares.load("int8") is spares.get("int8")
    spares.load("bf16")
    spares.keep_only(["bf16"])
    assert loaded == ["int8", "bf16", "closed int8"] and spares.get("int8") is None


def test_a_spare_that_cannot_be_loaded_is_a_sentence(session: Session):
    host = ready_host(session)

    def fail(name: str) -> Any:
        raise SlipstreamError("It does not fit.")

    host.spares = SpareSessions(fail)
    last = list(stream_race(host, settings(LaneChoice("plain", "int8"), LaneChoice("plain")), "me"))[-1]
    assert last.failed and last.notice == "It does not fit."


def test_lanes_are_named_by_what_they_differ_in():
    plain, fast = LaneChoice("plain"), LaneChoice("m2r2")
    assert lane_names((fast, plain), "int4") == ["Accelerated (M2R2)", "Plain"]
    assert lane_names((plain, LaneChoice("plain", "bf16")), "int4") == ["Plain, int4", "Plain, bf16"]
    assert lane_names((plain, plain), "int4") == ["Plain (1)", "Plain (2)"]


def test_memory_is_told_in_round_numbers():
    assert memory_sentence(135_000_000, "bf16").endswith("in bf16: about 270 MB more memory.")
    assert "1.9 GB" in memory_sentence(3_000_000_000, "int4")
