"""The compare page and the tint of drafted words in a real browser, on the real model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.chats import ChatStore, StoredMessage
from tests.browser import DESKTOP, PHONE, app_process, chromium, open_page, screenshot

pytestmark = [pytest.mark.browser, pytest.mark.real_model]

SECONDS = 90_000  # milliseconds, as playwright counts: generous, since other tests share the machine
MARKDOWN = """# A heading here

Some **bold words** and *slanted* ones, a [link text](https://example.org/path) and `inline code` 🌊 after.

1. First item
2. Second item

| fruit | colour |
|---|---|
| plum | blue |

```python
def plum():
    return "blue"
```

Ends at last."""
# Drafted by the source: syntax, list numbers and link targets are in it, but nobody sees them.
DRAFTED = (
    "heading",
    "bold words** and",
    "text](https://example.org/path) and",
    "🌊 after",
    "2. Second",
    "blue",
    "return",
    "last",
)
SEEN = ["heading", "bold", "words", "and", "text", "and", "after", "Second", "blue", "return", "last"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def url(browser: Any, tmp_path_factory: pytest.TempPathFactory, default_model_path: Path) -> Iterator[str]:
    home = tmp_path_factory.mktemp("home")
    store = ChatStore(home / "data" / "chats.sqlite")
    chat = store.create("Prepared")
    ranges = [[MARKDOWN.index(text), MARKDOWN.index(text) + len(text)] for text in DRAFTED]
    store.replace(
        chat, [StoredMessage("user", "q"), StoredMessage("assistant", MARKDOWN, {"drafted": ranges})]
    )
    store.close()
    with app_process(home) as address:
        yield address


class Compare:
    """What a person does on the compare page, in words."""

    def __init__(self, page: Any) -> None:
        self.page = page
        page.get_by_role("tab", name="Compare").click()
        self.prompt = page.locator("#race-prompt textarea")
        self.prompt.wait_for()
        # The methods of the model appear when it is there.
        page.wait_for_function(
            "document.querySelector('#machine')?.textContent.includes('SmolLM2')", timeout=SECONDS
        )
        page.wait_for_timeout(1000)
        self.start_button = page.locator("#race-prompt button", has_text="Compare")
        self.stop_button = page.locator("#race-prompt button", has_text="Stop")

    def limit(self, tokens: int) -> None:
        """Set the token limit of both lanes."""
        self.page.get_by_text("Sampling, the same for both").click()
        box = self.page.locator("#race-max-tokens input[type=number]")
        box.fill(str(tokens))
        box.press("Tab")
        self.page.get_by_text("Sampling, the same for both").click()

    def start(self, prompt: str) -> None:
        self.prompt.fill(prompt)
        self.start_button.click()

    def wait_for_both(self, characters: int = 60) -> None:
        """Wait until both lanes have written that much."""
        self.page.wait_for_function(
            "n => [0, 1].every(i => document.querySelector(`#lane-${i} .lane-text`).innerText.length > n)",
            arg=characters, timeout=SECONDS,
        )  # fmt: skip

    def text(self, lane: int) -> str:
        return str(self.page.inner_text(f"#lane-{lane} .lane-text"))

    def figure(self, lane: int, name: str) -> str:
        cell = self.page.locator(f"#lane-{lane} .cell", has=self.page.get_by_text(name, exact=True))
        return str(cell.locator("b").inner_text())

    def verdict(self) -> str:
        """Wait for the end; returns the verdict."""
        self.page.wait_for_function(
            "document.querySelector('.verdict')?.textContent.length > 5", timeout=SECONDS
        )
        return str(self.page.inner_text(".verdict"))


def test_both_lanes_stream_and_the_verdict_follows(browser: Any, url: str):
    with open_page(browser, url) as page:
        compare = Compare(page)
        compare.limit(192)
        compare.start("Write a Python function that merges two sorted lists.")
        compare.wait_for_both()
        assert page.inner_text(".verdict").strip() == ""  # both were seen to stream before the end
        height = page.locator("#lane-0").bounding_box()["height"]
        screenshot(page, "compare-running")
        verdict = compare.verdict()
        assert "outputs identical" in verdict, verdict
        assert re.search(r"\(.* against .*\)", verdict), verdict
        assert compare.text(0) == compare.text(1) and len(compare.text(0)) > 60
        for lane in (0, 1):
            assert float(compare.figure(lane, "tokens/s")) > 0
            assert re.fullmatch(r"\d+ ms|\d+\.\d s", compare.figure(lane, "first token"))
        assert page.locator("#lane-0 .lane-text .drafted").count() > 0
        assert page.locator("#lane-1 .lane-text .drafted").count() == 0
        assert re.fullmatch(r"\d+/\d+", compare.figure(0, "drafts"))
        assert 1 <= float(compare.figure(0, "length")) <= 8
        assert page.locator("#lane-0").bounding_box()["height"] == height  # nothing moved
        compare.start_button.wait_for(timeout=SECONDS)  # ready for the next one
        assert page.errors == []


def test_stop_stops_both(browser: Any, url: str):
    with open_page(browser, url) as page:
        compare = Compare(page)
        compare.limit(2048)
        compare.start("Tell me a long story about a river, in many chapters.")
        compare.wait_for_both(20)
        compare.stop_button.click()
        assert compare.verdict().startswith("Stopped. So far:")
        texts = compare.text(0), compare.text(1)
        assert page.get_by_text(", stopped").count() == 2
        page.wait_for_timeout(1500)
        assert (compare.text(0), compare.text(1)) == texts
        # and the engine is free for a chat
        page.get_by_role("tab", name="Chat").click()
        page.locator("#composer textarea").fill("Say hello.")
        page.locator("#composer textarea").press("Enter")
        page.wait_for_function(
            "document.querySelector('#conversation .bot.message')?.innerText.length > 2", timeout=SECONDS
        )


def test_a_lane_in_another_format(browser: Any, url: str):
    with open_page(browser, url) as page:
        compare = Compare(page)
        compare.limit(16)
        weights = page.locator("#weights-1 input")
        weights.click()
        page.get_by_role("option", name="bf16").click()
        page.get_by_text("loaded a second time, in bf16").wait_for(timeout=SECONDS)
        page.locator("#lane-1 h3", has_text="Plain, bf16").wait_for(timeout=SECONDS)
        compare.start("Count from one to ten in words.")
        verdict = compare.verdict()
        assert "outputs identical" in verdict or "diverged at token" in verdict
        assert page.inner_text("#lane-0 h3") == "Accelerated (M2R2), int4"


@pytest.mark.parametrize(
    ("name", "viewport", "dark"),
    [("light", DESKTOP, False), ("dark", DESKTOP, True), ("narrow", PHONE, False)],
)
def test_looks(browser: Any, url: str, name: str, viewport: dict[str, int], dark: bool):
    with open_page(browser, url, viewport, dark) as page:
        compare = Compare(page)
        compare.limit(160)
        compare.start("Explain in three sentences why the sky is blue.")
        compare.verdict()
        compare.start_button.wait_for(timeout=SECONDS)
        screenshot(page, f"compare-{name}")
        first, second = (page.locator(f"#lane-{lane}").bounding_box() for lane in (0, 1))
        stacked = second["y"] >= first["y"] + first["height"]
        assert stacked == (name == "narrow")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        colours = page.evaluate(
            """() => {
                const mark = document.createElement('span');  // drafts may be off at the moment
                mark.className = 'drafted';
                document.querySelector('#lane-0 .lane-text > div').append(mark);
                return [mark, ...document.querySelectorAll('.lane h3')].map((e) => getComputedStyle(e).color);
            }"""
        )
        assert colours[0] == colours[1] != colours[2]  # one accent, for acceleration alone


def test_drafted_words_are_tinted_through_markdown(browser: Any, url: str):
    with open_page(browser, url) as page:
        page.locator("#chats > .toggle-button").click()
        page.get_by_text("Prepared").click()
        page.locator("#conversation .bot.message h1").wait_for()
        before = page.inner_html("#conversation .bot.message")
        assert page.evaluate("slipstreamTinted()") == []
        page.locator("#chats > .toggle-button").click()
        page.locator("#settings > .toggle-button").click()
        page.locator("#tint input").check()
        page.wait_for_function("slipstreamTinted().length > 0")
        assert page.evaluate("slipstreamTinted()") == SEEN
        assert page.inner_html("#conversation .bot.message") == before  # the page itself is untouched
        page.locator("#settings > .toggle-button").click()
        page.wait_for_timeout(500)
        screenshot(page, "chat-tinted")
        page.reload()  # remembered
        page.locator("#composer textarea").wait_for()
        page.locator("#settings > .toggle-button").click()
        page.wait_for_function("document.querySelector('#tint input').checked")
        page.locator("#tint input").uncheck()
        page.wait_for_function("slipstreamTinted().length === 0")


def test_a_streaming_answer_is_tinted_and_the_strip_is_live(
    browser: Any, default_model_path: Path, tmp_path: Path
):
    """In an app of its own: an engine that has just begun drafts for certain, and greedy drafts are kept."""
    saved = {"temperature": 0.0, "repetition_penalty": 1.0, "tint_drafted": True}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "settings.json").write_text(json.dumps(saved))
    with app_process(tmp_path) as url, open_page(browser, url) as page:
        page.wait_for_function(
            "document.querySelector('#machine')?.textContent.includes('SmolLM2')", timeout=SECONDS
        )
        page.locator("#settings > .toggle-button").click()
        page.locator("#method input[value=m2r2]").wait_for(state="attached", timeout=SECONDS)
        assert page.locator("#method input[value=m2r2]").is_checked()  # the default
        assert page.locator("#tint input").is_checked()
        page.locator("#settings > .toggle-button").click()
        page.locator("#composer textarea").fill("Write a Python function that merges two sorted lists.")
        page.locator("#composer textarea").press("Enter")
        page.wait_for_function("slipstreamTinted().length > 0", timeout=SECONDS)
        names = page.locator("#speed small").all_inner_texts()
        assert names == ["tokens/s", "first token", "tokens", "speedup", "accepted", "length", "drafts"]
        page.get_by_role("button", name="Send", exact=True).wait_for(timeout=SECONDS)
        answer = page.inner_text("#conversation .bot.message")
        assert all(word in answer for word in page.evaluate("slipstreamTinted()"))
        screenshot(page, "chat-accelerated")
        # The switch takes effect on the next message.
        page.locator("#settings > .toggle-button").click()
        page.locator("#method label", has_text="Plain").click()
        page.locator("#settings > .toggle-button").click()
        page.locator("#composer textarea").fill("Say hello.")
        page.locator("#composer textarea").press("Enter")
        page.wait_for_function("document.querySelectorAll('#speed small').length === 3", timeout=SECONDS)
