"""The expert panel: the heat map, the figures of an answer, and who is shown them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeSession, ready_host
from PIL import Image
from test_app_page import HOSTILE, Elements

from app import expert_watch
from app.chats import ChatStore, StoredMessage
from app.conversation import AnswerSettings, stream_answer
from app.expert_panel import ExpertPanel
from app.expert_view import expert_panel
from app.expert_watch import ExpertView, ExpertWatch
from app.heat_map import heat_map
from engine.experts.report import ExpertReport
from engine.metrics import ExpertStats, GenerationMetrics
from engine.requests import SamplingParams


def report(
    resident: Sequence[Sequence[bool]] = ((True, False, True, False), (False, False, True, False)),
    uses: Sequence[Sequence[int]] = ((9, 0, 1, 4), (0, 0, 2, 0)),
    stats: ExpertStats | None = None,
    **changes: Any,
) -> ExpertReport:
    fields: dict[str, Any] = {
        "layers": tuple(range(len(resident))), "resident": tuple(map(tuple, resident)),
        "uses": tuple(map(tuple, uses)), "num_slots": 3, "expert_bytes": 1_000_000, "stats": stats or ExpertStats(),
        "prefetching": True, "policy": "lru", "predictor": "next-gate", "plan": "3 of 8 experts stay in memory.",
    }  # fmt: skip
    return ExpertReport(**{**fields, **changes})


def pixels(address: str) -> np.ndarray:
    """The opacity of a heat map's pixels, as a browser would decode it."""
    head, _, code = address.partition(",")
    assert head == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(code))).convert("RGBA")
    found = np.asarray(image)
    assert not found[..., :3].any()  # black alone: strength and shape tell everything
    return found[..., 3]


# The heat map


def test_an_expert_in_memory_is_a_square_and_another_a_dot():
    address, width, height = heat_map(report())
    drawn = pixels(address)
    assert drawn.shape == (height, width) == (24, 48)
    cells = drawn.reshape(2, 12, 4, 12).transpose(0, 2, 1, 3)
    filled = (cells > 0).sum(axis=(2, 3))
    square, dot = filled[0, 0], filled[0, 1]
    assert dot < square / 4  # told apart without colour
    assert (filled == np.where(report().resident, square, dot)).all()


def test_the_more_often_chosen_the_stronger():
    drawn = pixels(heat_map(report())[0])
    strength = drawn.reshape(2, 12, 4, 12).max(axis=(1, 3))
    assert strength[0, 0] == 255 > strength[0, 3] > strength[1, 2] > strength[0, 2] > strength[0, 1] > 0
    assert strength[0, 1] == strength[1, 0]  # never chosen, but there


@pytest.mark.parametrize(
    ("layers", "experts"), [(1, 1), (1, 7), (32, 8), (16, 64), (24, 60), (48, 128), (58, 256)]
)
def test_the_map_is_small_and_lies(layers: int, experts: int):
    state = np.random.default_rng(0).random((layers, experts))
    address, width, height = heat_map(report((state > 0.5).tolist(), (100 * state).astype(int).tolist()))
    assert pixels(address).shape == (height, width)
    assert width >= height and width <= 800 and height <= 200
    assert len(address) < 24_000


# The figures


def stats(**changes: Any) -> ExpertStats:
    counted = {
        "expert_hits": 80, "expert_late": 12, "expert_misses": 8, "prefetch_issued": 40, "prefetch_used": 30,
        "bytes_loaded": 50_000_000, "stall_seconds": 0.5,
    }  # fmt: skip
    return ExpertStats(**{**counted, **changes})


def test_the_figures_are_those_of_the_engines_counters():
    text = Elements(expert_panel(ExpertView(report(), stats(), 20, 2.0))).text
    for part in (
        "80 % hit rate", "25 % stalled", "2.5 MB loaded per token", "3/8 in memory", "75 % prefetch precision",
        "79 % prefetch recall", "This answer", "3 of 8 experts stay in memory.", "loaded ahead of time",
    ):  # fmt: skip
        assert part in text, part


def test_what_is_computed_in_place_is_told():
    panel = expert_panel(ExpertView(report(), stats(expert_in_place=100), 20, 2.0))
    assert "40 % hit rate" in Elements(panel).text and "50 % were computed straight from" in panel


def test_the_panel_keeps_its_elements_whatever_is_known():
    """Nothing moves while an answer streams."""
    views = (
        ExpertView(report(), ExpertStats()),
        ExpertView(report(), ExpertStats(), 0, 0.0),
        ExpertView(report(prefetching=False), stats(), 20, 2.0),
        ExpertView(report(), stats(bytes_loaded=10**12, stall_seconds=9.0), 1, 1.0),
    )

    def elements(view: ExpertView) -> list[Any]:
        return [
            (tag, {name: value for name, value in attributes.items() if name not in ("src", "title")})
            for tag, attributes in Elements(expert_panel(view)).tags
        ]

    assert len({str(elements(view)) for view in views}) == 1
    assert len(elements(views[0])) < 40


def test_what_is_not_known_is_a_dash_and_no_share_is_above_all():
    text = Elements(expert_panel(ExpertView(report(), ExpertStats()))).text
    assert text.count("–") == 5 and "Since the model was loaded" in text
    assert (
        "100 % stalled" in Elements(expert_panel(ExpertView(report(), stats(stall_seconds=9.0), 1, 1.0))).text
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "are loaded ahead of time"),
        ({"prefetching": False}, "switched itself off"),
        ({"prefetching": False, "predictor": None}, "Nothing is loaded ahead of time"),
    ],
)
def test_it_is_told_whether_experts_are_loaded_ahead(changes: dict[str, Any], told: str):
    assert told in Elements(expert_panel(ExpertView(report(**changes), stats()))).text


def test_slots_that_had_to_go_are_told():
    told = Elements(expert_panel(ExpertView(report(planned_slots=5), stats()))).text
    assert "room for 3 experts now" in told
    assert "run short" not in Elements(expert_panel(ExpertView(report(planned_slots=3), stats()))).text


def test_the_plan_cannot_become_markup():
    html = expert_panel(ExpertView(report(plan=HOSTILE), stats()))
    elements = Elements(html)
    assert "script" not in {tag for tag, _ in elements.tags} and "alert(1)" in elements.text
    assert sum(tag == "img" for tag, _ in elements.tags) == 1  # the map
    assert expert_panel(None) == ""


# An answer's share of the counters


def counted(bytes_loaded: int) -> ExpertReport:
    return report(stats=ExpertStats(bytes_loaded=bytes_loaded))


def test_the_prompts_loads_are_not_the_answers(monkeypatch: pytest.MonkeyPatch):
    session = FakeSession(experts=[counted(500), counted(800), counted(900)])
    now = 0.0
    monkeypatch.setattr(expert_watch, "monotonic", lambda: now)
    watch, metrics = ExpertWatch(session), GenerationMetrics()
    assert watch.look(metrics) is None  # the first token ends the prompt
    metrics.num_decode_tokens, metrics.decode_seconds = 3, 0.5
    now = 0.1
    assert watch.look(metrics) is None  # too early: at most four a second
    now = 0.3
    view = watch.look(metrics)
    assert view is not None and view.stats.bytes_loaded == 300 and view.bytes_per_token == 100
    assert watch.look(metrics) is None
    last = watch.look(metrics, last=True)
    assert last is not None and last.stats.bytes_loaded == 400


def test_a_model_with_all_experts_in_memory_is_asked_once():
    session = FakeSession()
    asked = []
    session.experts = lambda: asked.append(1)  # type: ignore[method-assign,assignment]
    watch = ExpertWatch(session)
    assert all(watch.look(GenerationMetrics(), last) is None for last in (False, False, True))
    assert len(asked) == 1


def test_a_model_that_is_unloaded_meanwhile_ends_the_views():
    session = FakeSession(experts=[counted(1)])
    watch = ExpertWatch(session)
    watch.look(GenerationMetrics())
    session.experts = lambda: None  # type: ignore[method-assign]
    assert watch.look(GenerationMetrics(), last=True) is None


def test_an_answer_tells_its_experts_at_the_end():
    host = ready_host(FakeSession(experts=[counted(5), counted(9)]))
    store = ChatStore(None)
    settings = AnswerSettings("", SamplingParams(), 10, "plain")
    updates = list(
        stream_answer(host, store, store.create("Hi"), [StoredMessage("user", "Hi")], settings, "me")
    )
    view = updates[-1].experts
    assert view is not None and view.stats.bytes_loaded == 4 and view.num_tokens == 3


# Who is shown it


@pytest.fixture
def panel() -> ExpertPanel:
    import gradio as gr

    host = ready_host(FakeSession(experts=[report(stats=stats())]))
    with gr.Blocks():
        return ExpertPanel(host)


def request(owner: str) -> Any:
    return SimpleNamespace(session_hash=owner)


def test_nothing_is_drawn_for_those_who_have_it_closed(panel: ExpertPanel):
    view = ExpertView(report(), stats(), 20, 2.0)
    assert not isinstance(panel.draw("me", view), str)
    assert "This answer" in panel._on_open(request("me"))  # the answer's figures were kept for that
    assert "This answer" in panel.draw("me", view)
    assert not isinstance(panel.draw("you", view), str) and not isinstance(panel.draw("me", None), str)
    panel._on_close(request("me"))
    assert not isinstance(panel.draw("me", view), str)


def test_the_figures_of_another_models_answer_are_not_shown(panel: ExpertPanel):
    panel.draw("me", ExpertView(report(), stats(), 20, 2.0))
    other = FakeSession(experts=[report(stats=stats())], name="other")
    panel._host._session = other
    assert "Since the model was loaded" in panel._on_open(request("me"))
    panel.forget("me")
    assert panel._last == {} and panel._open == set()


def test_it_is_there_only_for_models_whose_experts_are_not_all_in_memory(panel: ExpertPanel):
    frame, _ = panel.shown("me")
    assert frame.visible is True
    panel._host._session = FakeSession()
    frame, _ = panel.shown("me")
    assert frame.visible is False and panel._on_open(request("me")) == ""
