"""The strips' HTML, who may talk to the server, and whose chats a visitor sees."""

from __future__ import annotations

import threading
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_engine import FakeSession, ready_host
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from app import __version__, telemetry
from app.chats import StoredMessage
from app.model_panel import build_model_choice
from app.page import VisitorStores
from app.preferences import PreferenceFile
from app.server import LocalOnly, allowed, build_app
from app.settings_panel import read_settings
from app.startup import HEALTH
from engine.errors import InvalidRequestError
from engine.metrics import GenerationMetrics

MEMORY = telemetry.Memory(process=650_400_000, machine_used=2_300_000_000, machine_total=25_300_000_000)
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


class Elements(HTMLParser):
    """The tags of some HTML, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def is_harmless(self) -> bool:
        tags = {tag for tag, _ in self.tags}
        return not tags & {"script", "img", "a", "iframe"} and not any(
            name.startswith("on") for _, attributes in self.tags for name in attributes
        )


# Telemetry


def metrics() -> GenerationMetrics:
    made = GenerationMetrics(num_new_tokens=101, decode_seconds=2.0, num_decode_tokens=100, ttft=0.1234)
    made.speculation.observe(4, 3)
    return made


def test_the_strip_shows_the_engines_counters():
    text = Elements(telemetry.speed_strip(metrics())).text
    assert "50.0 tokens/s" in text and "123 ms first token" in text and "101 tokens" in text


def test_the_strip_keeps_its_cells_before_during_and_after():
    """Nothing moves: the same cells, whatever is known."""
    empty = telemetry.speed_strip(None)
    fresh = telemetry.speed_strip(GenerationMetrics())
    full = telemetry.speed_strip(metrics())
    cells = [
        [attributes for tag, attributes in Elements(html).tags if tag != "svg"]
        for html in (empty, fresh, full)
    ]
    assert cells[0] == cells[1] == cells[2]
    assert Elements(empty).text.count(telemetry.EMPTY) == 3


@pytest.mark.parametrize(
    ("seconds", "told"), [(None, telemetry.EMPTY), (0.0, "0 ms"), (0.9994, "999 ms"), (1.26, "1.3 s")]
)
def test_times_are_told_as_people_do(seconds: float | None, told: str):
    assert f"{told} first token" in Elements(telemetry.speed_strip(GenerationMetrics(ttft=seconds))).text


@pytest.mark.parametrize("rates", [[], [5.0], [0.0, 0.0], [1.0] * 500, [0.0, 3.5, 1e9]])
def test_the_plot_stays_in_its_box(rates: list[float]):
    plots = [a for tag, a in Elements(telemetry.speed_strip(None, rates=rates)).tags if tag == "polyline"]
    assert len(plots) == (len(rates) > 1)
    for plot in plots:
        points = [tuple(map(float, point.split(","))) for point in (plot["points"] or "").split()]
        assert 2 <= len(points) <= 40 and all(0 <= x <= 96 and 0 <= y <= 24 for x, y in points)


def test_the_machine_strip_names_model_and_memory():
    text = Elements(telemetry.machine_strip(FakeSession(name="owner/Model-1").info, MEMORY)).text
    assert "Model-1" in text and "owner" not in text
    for part in ("int4 · fused · cpu", "84 MB weights", "650 MB app", "2.3 / 25.3 GB machine"):
        assert part in text
    assert "GPU" not in text


def test_without_a_model_the_machine_is_still_told():
    text = Elements(
        telemetry.machine_strip(None, telemetry.Memory(1, 2, 3, 4_000_000_000, 8_000_000_000))
    ).text
    assert "4.0 / 8.0 GB GPU" in text and "weights" not in text


def test_memory_is_read():
    memory = telemetry.read_memory()
    assert 0 < memory.process < memory.machine_total and 0 < memory.machine_used <= memory.machine_total


def test_nothing_from_outside_becomes_markup():
    """Model names come from repositories and files, sentences from error messages."""
    info = SimpleNamespace(
        name=HOSTILE,
        weight_format=HOSTILE,
        kernel=HOSTILE,
        device=HOSTILE,
        weight_bytes=1,
        methods=(),
        notes=(),
    )
    for html in (
        telemetry.machine_strip(info, MEMORY), telemetry.notice(HOSTILE, "error"),
        telemetry.loading_strip(HOSTILE, 0.5), telemetry.loading_strip(HOSTILE, None),
    ):  # fmt: skip
        elements = Elements(html)
        assert elements.is_harmless() and "alert(1)" in elements.text


def test_loading_shows_how_far_it_is():
    bars = [
        a.get("style") for tag, a in Elements(telemetry.loading_strip("Loading.", 0.256)).tags if tag == "i"
    ]
    assert bars == ["width:26%"]
    assert "unknown" in telemetry.loading_strip("Loading.", None)
    assert telemetry.notice("") == ""


# Settings


def test_settings_are_checked_on_the_server_too():
    good = ("Hi", 0.7, 0.9, 40, 0.0, 1.1, None, 128, "plain")
    settings = read_settings(*good)
    assert (settings.sampling.top_k, settings.max_new_tokens, settings.method) == (40, 128, "plain")
    bad = [
        (1, -1),
        (1, "hot"),
        (1, None),
        (2, 0),
        (3, 2.5),
        (3, None),
        (3, "many"),
        (4, 3),
        (5, 0),
        (6, 1.5),
        (6, float("nan")),
        (7, 1.5),
        (7, None),
    ]
    for place, value in bad:
        values = list(good)
        values[place] = value
        with pytest.raises(InvalidRequestError):
            read_settings(*values)


def test_a_file_in_the_models_folder_can_be_chosen(slipstream_home: Path):
    """The choice is what ``hub.resolve`` understands, not the name that is shown."""
    import gradio as gr

    from engine import hub, paths

    paths.models_dir().mkdir(parents=True)
    file = paths.models_dir() / "my-model.gguf"
    file.write_bytes(b"GGUF")
    host = ready_host(FakeSession())
    with gr.Blocks() as blocks:
        build_model_choice(host, PreferenceFile(None))
    (dropdown,) = [b for b in blocks.blocks.values() if getattr(b, "elem_id", "") == "model"]
    choices = dict(dropdown.choices)  # type: ignore[attr-defined]
    assert hub.resolve(choices["my-model"]).path == file
    assert choices[hub.DEFAULT_MODEL] == hub.DEFAULT_MODEL and choices["fake"] == "fake"


# The server


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "LocalHost", "[::1]:7860", "127.0.0.1"])
def test_this_machines_names_are_answered(host: str):
    assert allowed(host, None) and allowed(host, f"http://{host}")


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("evil.example", None),  # a name that was made to point at 127.0.0.1
        ("evil.example:7860", "http://evil.example:7860"),
        ("127.0.0.1.evil.example", None),
        ("localhost.evil.example:7860", None),
        ("192.168.0.7:7860", None),
        ("", None),
        ("127.0.0.1:7860", "http://evil.example"),  # another page's request
        ("127.0.0.1:7860", "http://127.0.0.1:8888"),  # another program on this machine
        ("127.0.0.1:7860", "http://localhost:7860"),
        ("127.0.0.1:7860", "null"),  # a sandboxed frame or a file
        ("127.0.0.1:7860", ""),
    ],
)
def test_everybody_else_is_refused(host: str, origin: str | None):
    assert not allowed(host, origin)


@pytest.fixture(scope="module")
def small() -> TestClient:
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("in"), methods=["GET", "POST"])])
    app.add_middleware(LocalOnly)
    return TestClient(app, base_url="http://127.0.0.1:7860")


def test_a_refused_request_never_reaches_the_page(small: TestClient):
    assert small.get("/").text == "in"
    for headers in ({"host": "evil.example"}, {"origin": "https://evil.example"}, {"origin": "null"}):
        for answer in (small.get("/", headers=headers), small.post("/", headers=headers)):
            assert answer.status_code == 403 and answer.text != "in" and answer.text.endswith(".")


def test_the_page_may_load_nothing_but_itself(small: TestClient):
    policy = small.get("/").headers["content-security-policy"]
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert "http" not in policy and "*" not in policy
    assert directives["connect-src"] == "'self'" and directives["default-src"].startswith("'self'")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    """The whole page around a session without a model."""
    from app.page import build_blocks

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIPSTREAM_HOME", str(tmp_path_factory.mktemp("home")))
        blocks = build_blocks(ready_host(FakeSession()), PreferenceFile(None), private=True)
    return TestClient(build_app(blocks, local_only=True), base_url="http://127.0.0.1:7860")


def test_the_health_check_says_who_answers(built: TestClient):
    assert built.get(HEALTH).json() == {"app": "slipstream", "version": __version__}


def test_the_page_names_no_other_machine_and_no_analytics(built: TestClient):
    page = built.get("/")
    assert page.status_code == 200 and "content-security-policy" in page.headers
    config = built.get("/config").json()
    assert config["analytics_enabled"] is False
    assert "fonts.googleapis" not in page.text
    assert built.get("/config", headers={"host": "evil.example"}).status_code == 403


def test_an_idle_page_does_not_poll_a_thousand_times_a_second():
    """gradio's own names: this fails if another version calls them otherwise."""
    import gradio as gr

    with gr.Blocks() as blocks:
        gr.HTML("")
    names = {"sleep_when_free", "progress_update_sleep_when_free"}
    assert names <= set(vars(blocks._queue))
    build_app(blocks, local_only=True)
    assert all(vars(blocks._queue)[name] >= 0.03 for name in names)


def test_no_function_of_the_page_is_offered_as_an_api(built: TestClient):
    info = built.get("/gradio_api/info").json()
    assert info["named_endpoints"] == {} and info["unnamed_endpoints"] == {}


# Visitors of a Space


def test_visitors_do_not_see_each_others_chats():
    stores = VisitorStores()
    mine, yours = stores("me"), stores("you")
    chat = mine.create("secret")
    mine.replace(chat, [StoredMessage("user", "secret")])
    assert yours.list_chats() == [] and yours.messages(chat) == []
    assert stores("me").messages(chat) == [StoredMessage("user", "secret")]


def test_the_visitor_who_was_away_longest_is_forgotten_first():
    stores = VisitorStores(limit=2)
    first = stores("first")
    chat = first.create("one")
    stores("second").create("two")
    assert stores("first").list_chats()
    stores("third")
    assert stores("first").list_chats() and not stores("second").list_chats()
    stores("fourth"), stores("fifth")
    first.replace(chat, [StoredMessage("user", "late")])  # an answer may still be streaming into it
    assert not stores("first").list_chats()


def test_a_visitor_has_one_store_whatever_asks_at_once():
    stores = VisitorStores()
    found: list[int] = []
    begin = threading.Barrier(8)

    def ask() -> None:
        begin.wait(5)
        found.extend(id(stores("me")) for _ in range(200))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(found) == 1600 and len(set(found)) == 1
