"""Training from the side panel in a real browser: it starts, says how far it is, stops, and goes on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from tiny import save_model

from tests.browser import DESKTOP, PHONE, app_process, chromium, open_page, screenshot

pytestmark = pytest.mark.browser

SECONDS = 120_000  # milliseconds, as playwright counts: generous, since other tests share the machine


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    model = save_model(folder, num_hidden_layers=5, max_position_embeddings=2048)
    with app_process(tmp_path_factory.mktemp("home"), "--model", str(model)) as address:
        yield address


def open_panel(page: Any) -> Any:
    """The panel's text; it is there once the model is loaded."""
    page.locator("#settings > .toggle-button").click()
    opener = page.get_by_role("button", name="Make this model faster")
    opener.wait_for(timeout=SECONDS)
    opener.click()
    state = page.locator("#training-state")
    state.wait_for()
    return state


@pytest.mark.parametrize(
    ("viewport", "dark"), [(DESKTOP, False), (DESKTOP, True), (PHONE, False)], ids=["light", "dark", "phone"]
)
def test_it_runs_while_one_looks_elsewhere_and_stops(
    browser: Any, url: str, viewport: dict[str, int], dark: bool
):
    kind = ("dark" if dark else "light") if viewport is DESKTOP else "phone"
    with open_page(browser, url, viewport, dark) as page:
        state, button = open_panel(page), page.locator("#train")
        assert re.search(r"draft for itself|goes on where it ended", state.inner_text())
        screenshot(page, f"training-before-{kind}")
        button.click()
        page.wait_for_function(
            "/of 6\\)/.test(document.querySelector('#training-state').innerText)", timeout=SECONDS
        )
        assert button.inner_text() == "Stop training"
        screenshot(page, f"training-{kind}")
        assert page.errors == []
    with open_page(browser, url, viewport, dark) as page:  # another page is told as well
        state, button = open_panel(page), page.locator("#train")
        assert "of 6)" in state.inner_text() and button.inner_text() == "Stop training"
        assert (
            page.locator("#train").bounding_box()["x"] + page.locator("#train").bounding_box()["width"]
            <= (viewport["width"])
        )
        button.click()
        page.wait_for_function(
            "/goes on where it ended/.test(document.querySelector('#training-state').innerText)",
            timeout=SECONDS,
        )
        assert button.inner_text() == "Train"
        screenshot(page, f"training-stopped-{kind}")
        assert page.errors == []
