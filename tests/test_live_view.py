"""What the page shows of acceleration: figures, why it is off, which words were drafted, and the switch."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_engine import FakeSession, ready_host

from app import methods, provenance, telemetry
from app.chat_page import ChatPage
from app.chats import ChatStore, StoredMessage
from app.conversation import AnswerSettings, stream_answer
from app.lane_view import lane_card
from app.page import OneStore, build_blocks
from app.preferences import PreferenceFile
from engine.decoding.controller import DepthController, RoundRecord, SpeculationState
from engine.metrics import GenerationMetrics
from engine.requests import FinishReason, Piece, Provenance, SamplingParams

DRAFTED, OWN = Provenance.DRAFTED, Provenance.VERIFIED
BOTH = ("plain", "m2r2")
VISITOR: Any = SimpleNamespace(session_hash="a visitor")


def metrics(drafts: int = 40, accepted: int = 24) -> GenerationMetrics:
    """60 tokens at 30 tokens/s, in 35 rounds."""
    made = GenerationMetrics(num_new_tokens=61, num_decode_tokens=60, decode_seconds=2.0, ttft=0.12)
    stats = made.speculation
    stats.num_rounds, stats.num_drafts = 35, 30
    stats.num_draft_tokens, stats.num_accepted_tokens = drafts, accepted
    return made


def cells(strip: str) -> dict[str, str]:
    """A strip's figures by name."""
    found = re.findall(r"<b[^>]*>([^<]*)</b><small>([^<]*)</small>", strip)
    return {name: value for value, name in found}


# The strip


def test_an_accelerated_answer_shows_what_drafts_did():
    strip = telemetry.speed_strip(metrics(), SpeculationState(plain_seconds=0.05), [20.0, 30.0], True)
    assert cells(strip) == {
        "tokens/s": "30.0", "first token": "120 ms", "tokens": "61", "speedup": "1.50×", "accepted": "60 %",
        "length": "1.69", "drafts": "24/40",
    }  # fmt: skip
    assert 'class="spark accelerated"' in strip and "20.0 tokens/s" in strip


def test_a_plain_answer_has_no_accent_and_no_drafts():
    strip = telemetry.speed_strip(metrics(0, 0), None, [20.0, 30.0])
    assert cells(strip).keys() == {"tokens/s", "first token", "tokens"} and "accelerated" not in strip


def test_the_speedup_is_never_guessed():
    """Before a plain step was measured there is a dash."""
    for state in (None, SpeculationState()):
        assert cells(telemetry.speed_strip(metrics(), state, (), True))["speedup"] == telemetry.EMPTY


def test_the_speedup_is_never_more_than_a_round_gives():
    """A plain step that was measured while the page was drawn would make it any number."""
    strip = telemetry.speed_strip(metrics(), SpeculationState(plain_seconds=0.5), (), True)
    assert cells(strip)["speedup"] == "1.69×" == cells(strip)["length"] + "×"


def test_without_drafts_there_is_no_speedup():
    """A long answer's plain steps take longer than those of the short one that the plain rate is of."""
    strip = telemetry.speed_strip(metrics(0, 0), SpeculationState(plain_seconds=0.02), (), True)
    assert cells(strip)["speedup"] == telemetry.EMPTY


def test_the_cells_are_there_before_the_first_draft():
    """So that none of them moves when it comes."""
    before = cells(telemetry.speed_strip(GenerationMetrics(), None, (), True))
    assert before.keys() == cells(telemetry.speed_strip(metrics(), None, (), True)).keys()
    assert before["accepted"] == before["drafts"] == telemetry.EMPTY


def test_off_is_said_in_the_strip():
    state = SpeculationState(plain_seconds=0.05, is_off=True, reason='Because "x" < y.')
    strip = telemetry.speed_strip(metrics(), state, (), True)
    assert cells(strip)["speedup"] == "off" and "Because &quot;x&quot; &lt; y." in strip


# What the engine tells


def test_the_plain_rate_is_measured_by_plain_steps():
    controller = DepthController()
    assert controller.state() == SpeculationState()
    controller.observe_plain(0.020)
    assert controller.state().plain_tokens_per_second == pytest.approx(50)
    assert controller.state().draft_seconds is None and controller.state().acceptance is None
    controller.observe(RoundRecord(1, 1, 2, 0.004, 0.022, ((0.9, True),)))
    state = controller.state()
    assert state.draft_seconds == pytest.approx(0.004) and state.plain_seconds == pytest.approx(0.020)
    assert state.acceptance is not None and not state.is_off and state.reason is None


def test_a_loss_switches_off_with_a_reason():
    controller = DepthController()
    for _ in range(200):
        if controller.is_off:
            break
        if controller.plan(4):
            controller.observe(RoundRecord(2, 2, 1, 0.020, 0.030, ((0.5, False),)))
        else:
            controller.observe_plain(0.010)
    state = controller.state()
    assert state.is_off and state.reason is not None and state.reason.endswith(".")


# Why it is off: once


def page_of(tmp_path: Path, session: Any) -> ChatPage:
    pages: list[ChatPage] = []
    import gradio as gr

    with gr.Blocks():
        store = OneStore(ChatStore(None))
        pages.append(ChatPage(ready_host(session), store, PreferenceFile(tmp_path / "settings.json"), True))
    return pages[0]


def test_why_it_is_off_is_told_once_to_each_page(tmp_path: Path):
    page = page_of(tmp_path, FakeSession(methods=BOTH))
    off = SpeculationState(is_off=True, reason="Acceleration is off for now.")
    assert page._why_off("me", None) == page._why_off("me", SpeculationState()) == ""
    assert page._why_off("me", off) == "Acceleration is off for now."
    assert page._why_off("me", off) == ""
    assert page._why_off("somebody else", off) != ""
    assert page._why_off("me", replace(off, reason="Off again.")) == "Off again."
    page._on_unload(SimpleNamespace(session_hash="me"))  # type: ignore[arg-type]
    assert page._why_off("me", off) != ""


# The switch


def test_acceleration_is_the_default_where_there_is_any():
    assert methods.pick(BOTH) == "m2r2" and methods.pick(("plain",)) == "plain"
    assert methods.pick(BOTH, "plain") == "plain" and methods.pick(("plain",), "m2r2") == "plain"
    assert methods.choices(BOTH) == [("Accelerated (M2R2)", "m2r2"), ("Plain", "plain")]
    assert methods.pick(("plain", "lookup")) == "lookup"


def test_a_chat_offers_two_methods_and_the_chosen_one() -> None:
    every = ("plain", "lookup", "m2r2", "stream")
    assert [name for _, name in methods.switch(every, "m2r2")] == ["m2r2", "plain"]
    assert [name for _, name in methods.switch(every, "stream")] == ["m2r2", "plain", "stream"]
    assert [name for _, name in methods.switch(("plain", "lookup"), "plain")] == ["lookup", "plain"]


@pytest.mark.parametrize(
    ("chosen", "runs"), [("", "m2r2"), ("plain", "plain"), ("m2r2", "m2r2"), ("gone", "m2r2")]
)
def test_the_next_message_uses_the_chosen_method(chosen: str, runs: str):
    session = FakeSession(methods=BOTH)
    store = ChatStore(None)
    chat = store.create("q")
    settings = AnswerSettings("", SamplingParams(), 16, chosen)
    list(stream_answer(ready_host(session), store, chat, [StoredMessage("user", "q")], settings, "me"))
    assert [request.method for request in session.requests] == [runs]


def test_the_switch_shows_and_remembers_the_choice(tmp_path: Path):
    page = page_of(tmp_path, FakeSession(methods=BOTH))
    radio = page._loading_state(VISITOR)[4]
    assert radio.value == "m2r2" and radio.visible
    page._preferences.save(method="plain", tint_drafted=True)
    assert page._loading_state(VISITOR)[4].value == "plain"
    again = PreferenceFile(tmp_path / "settings.json").value
    assert again.method == "plain" and again.tint_drafted is True
    assert not page_of(tmp_path, FakeSession())._loading_state(VISITOR)[4].visible


@pytest.mark.parametrize("wrong", [1, "yes", None])
def test_a_broken_switch_in_the_settings_is_left_out(tmp_path: Path, wrong: Any):
    (tmp_path / "settings.json").write_text(json.dumps({"tint_drafted": wrong, "method": 3}))
    value = PreferenceFile(tmp_path / "settings.json").value
    assert value.tint_drafted is False and value.method == ""


# Which words were drafted


def answers(markup: str) -> Any:
    """What the page's script reads."""
    found = re.search(r'data-answers="([^"]*)"', markup)
    return json.loads(html.unescape(found[1])) if found else None


def test_the_page_gets_sources_and_ranges_of_answers():
    messages = [
        StoredMessage("user", "q"),
        StoredMessage("assistant", "plain words"),
        StoredMessage("user", "q"),
        StoredMessage("assistant", 'a "<b>" & 🌊', {"drafted": [[2, 7]]}),
    ]
    assert answers(provenance.as_html(messages)) == [None, {"text": 'a "<b>" & 🌊', "drafted": [[2, 7]]}]
    assert provenance.as_html(messages[:2]) == ""


def test_drafted_ranges_are_those_of_the_text():
    rounds = [
        (Piece(1, OWN, "One "),),
        (
            Piece(2, DRAFTED, "two "),
            Piece(3, DRAFTED, ""),
            Piece(4, DRAFTED, "three"),
            Piece(5, OWN, ", four "),
        ),
        (Piece(6, DRAFTED, "five"), Piece(7, OWN, ".")),
    ]
    store = ChatStore(None)
    chat = store.create("q")
    settings = AnswerSettings("", SamplingParams(), 16, "m2r2")
    host = ready_host(FakeSession(rounds, methods=BOTH))
    updates = list(stream_answer(host, store, chat, [StoredMessage("user", "q")], settings, "me"))
    answer = store.messages(chat)[-1]
    assert [answer.content[a:b] for a, b in answer.details["drafted"]] == ["two three", "five"]
    assert updates[-1].accelerated


# A lane


def run(pieces: list[Piece], reason: FinishReason | None = None) -> Any:
    return SimpleNamespace(pieces=pieces, metrics=metrics(), finish_reason=reason, error=None)


def test_a_lane_marks_drafted_words_and_nothing_else():
    pieces = [
        Piece(1, OWN, "<b>One"), Piece(2, DRAFTED, " two"), Piece(3, DRAFTED, " <three>"), Piece(4, OWN, " four"),
        Piece(5, DRAFTED, "\n"),
    ]  # fmt: skip
    card = lane_card("M2R2", run(pieces, FinishReason.LENGTH), True)
    text = card.split('<div class="lane-text" tabindex="0"><div>')[1]
    assert text.startswith('&lt;b&gt;One <span class="drafted">two &lt;three&gt;</span> four\n</div>')
    assert "5 tokens, reached the token limit" in card


def test_both_lanes_have_the_same_figures():
    """A plain lane keeps the room of the draft figures, so that both texts begin at one height."""
    fast, plain = (lane_card("x", run([]), accelerated) for accelerated in (True, False))
    assert cells(fast).keys() == cells(plain).keys()
    assert {"tokens/s", "first token", "accepted", "length"} <= cells(fast).keys()


def test_the_page_can_be_built_for_a_person_and_for_visitors(slipstream_home: Path):
    for private in (True, False):
        build_blocks(ready_host(FakeSession(methods=BOTH)), PreferenceFile(None), private)
