"""The expert panel and the memory setting in a real browser, on a tiny model whose experts do not all fit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import save_model

from engine.experts.planner import plan_memory
from engine.models.families import config_from_hf
from engine.quantization import get_format
from tests.browser import DESKTOP, PHONE, app_process, chromium, open_page, screenshot

pytestmark = pytest.mark.browser

SECONDS = 120_000  # milliseconds, as playwright counts: generous, since other tests share the machine
NUM_SLOTS, NUM_EXPERTS = 120, 256


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny-moe"
    return save_model(folder, "qwen3_moe", num_hidden_layers=8, num_experts=32, max_position_embeddings=16384)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    (folder / "data").mkdir()
    # The likeliest token each time: a random model repeats itself then, and its answer does not end by chance, nor
    # by its length while the test looks.
    greedy = {"temperature": 0.0, "repetition_penalty": 1.0, "max_new_tokens": 8192}
    (folder / "data" / "settings.json").write_text(json.dumps(greedy))
    return folder


@pytest.fixture(scope="module")
def url(browser: Any, home: Path, model: Path) -> Iterator[str]:
    config = config_from_hf(json.loads((model / "config.json").read_text()))
    whole = plan_memory(config, get_format("int4"), 10**15)
    memory = whole.total - (NUM_EXPERTS - NUM_SLOTS) * whole.expert
    with app_process(home, "--model", str(model), "--memory", f"{memory / 1e6:.6f}MB") as address:
        yield address


def ask(page: Any, text: str) -> None:
    """Send it, and wait until the answer has begun."""
    page.locator("#composer textarea").fill(text)
    page.get_by_role("button", name="Send", exact=True).click()
    page.wait_for_function(
        "/[1-9]\\d*\\s*tokens(?!\\/s)/.test(document.querySelector('#speed').innerText)", timeout=SECONDS
    )


def figures(page: Any) -> dict[str, str]:
    """The panel's figures by name."""
    cells = page.locator(".experts .cell")
    return {
        cells.nth(place).locator("small").inner_text(): cells.nth(place).locator("b").inner_text()
        for place in range(cells.count())
    }


@pytest.mark.parametrize(
    ("viewport", "dark"), [(DESKTOP, False), (DESKTOP, True), (PHONE, False)], ids=["light", "dark", "phone"]
)
def test_the_panel_shows_live_figures(browser: Any, url: str, viewport: dict[str, int], dark: bool):
    with open_page(browser, url, viewport, dark) as page:
        opener = page.get_by_role("button", name="Experts in memory and on disk")
        opener.wait_for(timeout=SECONDS)
        assert page.locator(".experts").count() == 0  # closed, and nothing drawn
        opener.click()
        page.locator(".experts img").wait_for()
        words = page.locator(".experts").inner_text()
        assert f"{NUM_SLOTS} of {NUM_EXPERTS} experts stay in memory" in words and "8 layers" in words
        ask(page, "Tell me a story.")
        page.locator(".expert-figures", has_text="This answer").wait_for(timeout=SECONDS)
        places, maps = set(), set()
        parts = ("#experts", ".experts img", ".expert-figures", "#composer", "#speed")
        for _ in range(12):
            places.add(str([page.locator(part).bounding_box() for part in parts]))
            maps.add(page.locator(".experts img").get_attribute("src"))
            page.wait_for_timeout(120)
        name = "phone" if viewport is PHONE else "dark" if dark else "light"
        screenshot(page, f"experts-{name}")
        assert len(places) == 1  # nothing moves
        # While the map lives. The figures need not: a random model that repeats itself finds all it wants in memory.
        assert len(maps) > 1
        seen = figures(page)
        assert re.fullmatch(r"\d+ %", seen["hit rate"]) and re.fullmatch(
            r"[\d.]+ MB", seen["loaded per token"]
        )
        held, total = map(int, seen["in memory"].split("/"))
        assert 0 < held <= NUM_SLOTS and total == NUM_EXPERTS
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate("document.querySelectorAll('#experts *').length") < 60
        page.get_by_test_id("stop-button").click()
        page.get_by_role("button", name="Send", exact=True).wait_for(timeout=SECONDS)
        assert page.errors == []


def test_the_settings_say_what_fits_and_a_bad_amount_loses_nothing(browser: Any, url: str, home: Path):
    with open_page(browser, url) as page:
        page.get_by_role("button", name="Experts in memory and on disk").wait_for(timeout=SECONDS)
        page.locator("#settings > .toggle-button").click()
        told = page.locator("#fit")
        page.locator("#fit", has_text="experts stay in memory").wait_for(timeout=SECONDS)
        assert f"{NUM_SLOTS} of {NUM_EXPERTS}" in told.inner_text()
        page.locator("#fit", has_text="tokens/s").wait_for(
            timeout=SECONDS
        )  # once the memory's speed is measured
        amount = page.get_by_label("Memory for this model")
        assert amount.input_value().endswith("MB")  # as given on the command line
        amount.scroll_into_view_if_needed()
        screenshot(page, "settings-memory")
        amount.fill("plenty")
        page.locator("#load-model").click()
        page.locator("#fit", has_text="'plenty' is no amount of memory; give one such as 6GB").wait_for()
        page.wait_for_timeout(600)
        assert amount.input_value() == "plenty" and page.locator("#loading").is_hidden()
        amount.fill("2GB")
        amount.press("Tab")
        page.locator("#fit", has_text=f"All {NUM_EXPERTS} experts stay in memory").wait_for(timeout=SECONDS)
        page.locator("#load-model").click()
        page.locator("#experts").wait_for(
            state="hidden", timeout=SECONDS
        )  # all are in memory: nothing to show
        page.locator("#loading").wait_for(state="hidden", timeout=SECONDS)
        ask(page, "Hello")
        page.get_by_test_id("stop-button").click()
        page.get_by_role("button", name="Send", exact=True).wait_for(timeout=SECONDS)
        assert json.loads((home / "data" / "settings.json").read_text())["memory"] == "2GB"
        assert page.errors == []
