"""The chat page in a real browser, on the real model: what a person sees and does."""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.browser import DESKTOP, PHONE, app_process, chromium, open_page, screenshot

pytestmark = [pytest.mark.browser, pytest.mark.real_model]

LONG = "Tell me a long story about a river, in many chapters."
SHORT = "What is the capital of France? Answer in one sentence."
SECONDS = 60_000  # milliseconds, as playwright counts: generous, since other tests share the machine


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def url(browser: Any, home: Path, default_model_path: Path) -> Iterator[str]:
    with app_process(home) as address:
        yield address


class Chat:
    """What a person does on the page, in words."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.box = page.locator("#composer textarea")
        self.answers = page.locator('#conversation [data-testid="bot"]')
        self.questions = page.locator('#conversation [data-testid="user"]')
        self.send_button = page.get_by_role("button", name="Send", exact=True)
        self.stop_button = page.get_by_test_id("stop-button")  # another one stops loading

    def ask(self, text: str) -> None:
        """Send it, and wait until the page has taken it."""
        before = self.questions.count()
        self.box.fill(text)
        self.send_button.click()
        self.questions.nth(before).wait_for(timeout=SECONDS)

    def wait_for_text(self, longer_than: int = 0) -> str:
        """Wait for an answer that has begun; returns it."""
        until = time.monotonic() + SECONDS / 1000
        while time.monotonic() < until:
            text = self.answer()
            if len(text) > longer_than:
                return text
            self.page.wait_for_timeout(40)
        raise AssertionError(
            f"no text came after {self.answer()!r}; {self.page.locator('#notice').inner_text()}"
        )

    def answer(self) -> str:
        """The latest answer as it stands."""
        return self.answers.last.inner_text().strip() if self.answers.count() else ""

    def stop(self) -> str:
        """Stop the answer, or have it end: a quick one may be done before the button is reached."""
        from playwright.sync_api import TimeoutError as StillNotThere

        with suppress(StillNotThere):
            self.stop_button.click(timeout=2000)
        return self.wait_for_end()

    def wait_for_end(self) -> str:
        self.send_button.wait_for(timeout=SECONDS)
        return self.answer()

    def limit_tokens(self, count: int) -> None:
        """In the side panel, so that an answer ends soon."""
        self.toggle("settings")
        self.page.locator("#max-tokens input[type=number]").fill(str(count))
        self.page.locator("#max-tokens input[type=number]").press("Tab")
        self.toggle("settings")

    def toggle(self, panel: str) -> None:
        self.page.locator(f"#{panel} > .toggle-button").click()
        self.page.wait_for_timeout(450)  # it slides


@contextmanager
def opened(browser: Any, url: str, viewport: dict[str, int] = DESKTOP, dark: bool = False) -> Iterator[Chat]:
    """A visitor's page, which must neither report an error nor ask anything of another machine."""
    with open_page(browser, url, viewport, dark) as page:
        outside: list[str] = []
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith((url, "data:", "blob:")) else outside.append(request.url)
            ),
        )
        chat = Chat(page)
        chat.send_button.wait_for(timeout=SECONDS)
        yield chat
        assert outside == []
        assert page.errors == []


def wait_until(page: Any, condition: Callable[[], bool], seconds: float) -> bool:
    """Whether it came true in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        page.wait_for_timeout(40)
    return False


def test_a_question_is_answered_token_by_token(browser: Any, url: str):
    with opened(browser, url) as chat:
        screenshot(chat.page, "chat-empty-light")
        chat.limit_tokens(1024)
        chat.ask(LONG)
        first = chat.wait_for_text()
        assert chat.stop_button.is_visible()
        second = chat.wait_for_text(longer_than=len(first))
        screenshot(chat.page, "chat-streaming-light")  # takes a while: the answer may end meanwhile
        assert second.startswith(first[:20])
        last = chat.wait_for_end()
        assert len(last) >= len(second) > len(first) and chat.questions.last.inner_text().strip() == LONG
        assert chat.box.input_value() == ""
        speed = chat.page.locator("#speed").inner_text()
        assert re.search(r"\d+\.\d\s+tokens/s", speed) and re.search(r"\d+ ms|\d+\.\d s", speed)
        counted = re.search(r"\b(\d+)\s+tokens\b(?!/s)", speed)  # by the engine
        assert counted and 40 < int(counted[1]) <= 1024
        machine = chat.page.locator("#machine").inner_text()
        assert "SmolLM2-135M-Instruct" in machine and "int4" in machine and "MB" in machine
        screenshot(chat.page, "chat-finished-light")


def test_stop_ends_the_answer_and_keeps_it(browser: Any, url: str):
    with opened(browser, url) as chat:
        chat.limit_tokens(2048)
        chat.ask(LONG)
        begun = chat.wait_for_text(longer_than=30)
        chat.stop_button.click()
        kept = chat.wait_for_end()
        assert kept.startswith(begun[:20])
        chat.page.wait_for_timeout(700)
        assert chat.answer() == kept  # nothing more comes
        chat.limit_tokens(16)
        chat.ask(SHORT)  # and the engine is free
        chat.wait_for_end()
        assert chat.answers.count() == 2 and chat.answer()


def test_regenerate_edit_and_take_back(browser: Any, url: str):
    with opened(browser, url) as chat:
        chat.limit_tokens(80)
        chat.ask("Write about the colour blue.")
        chat.wait_for_end()
        chat.page.get_by_role("button", name="Retry").last.click()
        chat.stop_button.wait_for(timeout=SECONDS)
        assert chat.wait_for_end() and chat.answers.count() == 1
        chat.page.get_by_role("button", name="Edit").last.click()
        editor = chat.page.locator("#conversation textarea")
        editor.fill("Write about the sea.")
        chat.page.get_by_role("button", name="Submit").click()
        chat.stop_button.wait_for(timeout=SECONDS)
        assert chat.wait_for_end()
        assert chat.questions.all_inner_texts() == ["Write about the sea."] and chat.answers.count() == 1
        chat.page.get_by_role("button", name="Undo").last.click()
        chat.page.wait_for_function(
            "document.querySelector('#composer textarea').value === 'Write about the sea.'"
        )
        assert chat.questions.count() == 0


def test_chats_are_kept_opened_renamed_and_deleted(browser: Any, url: str, home: Path):
    with opened(browser, url) as chat:
        chat.limit_tokens(16)
        chat.ask("Count from one to five, please.")
        answer = chat.wait_for_end()
        chat.page.reload()
        chat.send_button.wait_for(timeout=SECONDS)
        assert chat.answers.count() == 0
        chat.toggle("chats")
        entry = chat.page.locator("#chat-list label").filter(has_text="Count from one")
        entry.click()
        chat.wait_for_text()
        assert chat.answer() == answer
        screenshot(chat.page, "chat-list-light")
        chat.page.get_by_text("Rename or delete").click()
        chat.page.locator("#chat-title textarea, #chat-title input").fill("Numbers")
        chat.page.locator("#chat-title textarea, #chat-title input").press("Enter")
        chat.page.locator("#chat-list label").filter(has_text="Numbers").wait_for()
        chat.page.get_by_role("button", name="New chat").click()
        chat.page.wait_for_function("!document.querySelector('#conversation [data-testid=bot]')")
        chat.page.locator("#chat-list label").filter(has_text="Numbers").click()
        chat.wait_for_text()
        chat.page.locator("#delete-chat").wait_for()
        chat.page.locator("#delete-chat").click()
        chat.page.wait_for_function("!document.querySelector('#conversation [data-testid=bot]')")
        assert chat.page.locator("#chat-list label").filter(has_text="Numbers").count() == 0
    with sqlite3.connect(home / "data" / "chats.sqlite") as db:
        assert db.execute("SELECT count(*) FROM chats WHERE title = 'Numbers'").fetchone() == (0,)


def test_settings_take_effect_and_are_remembered(browser: Any, url: str):
    with opened(browser, url) as chat:
        chat.limit_tokens(32)
        chat.toggle("settings")
        chat.page.locator("#temperature input[type=number]").fill("0")
        chat.page.locator("#temperature input[type=number]").press("Tab")
        screenshot(chat.page, "settings-light")
        chat.toggle("settings")
        answers = []
        for _ in range(2):
            chat.ask(SHORT)
            answers.append(chat.wait_for_end())
            chat.toggle("chats")
            chat.page.get_by_role("button", name="New chat").click()
            chat.page.wait_for_function("!document.querySelector('#conversation [data-testid=bot]')")
            chat.toggle("chats")
        assert answers[0] == answers[1] and answers[0]  # temperature 0
        chat.page.reload()
        chat.send_button.wait_for(timeout=SECONDS)
        chat.toggle("settings")
        assert chat.page.locator("#temperature input[type=number]").input_value() == "0"
        assert chat.page.locator("#max-tokens input[type=number]").input_value() == "32"
        chat.page.get_by_role("button", name="Back to the defaults").click()
        chat.page.wait_for_function(
            "document.querySelector('#temperature input[type=number]').value === '0.7'"
        )


def test_other_weights_are_loaded_from_the_page(browser: Any, tmp_path: Path, default_model_path: Path):
    with app_process(tmp_path) as url, opened(browser, url) as chat:
        machine = chat.page.locator("#machine")
        machine.get_by_text("int4").wait_for(timeout=SECONDS)
        chat.limit_tokens(16)
        chat.toggle("settings")
        chat.page.get_by_label("Weights").click()
        chat.page.get_by_role("option", name="8 bit").click()
        chat.page.get_by_role("button", name="Load", exact=True).click()
        machine.get_by_text("int8").wait_for(timeout=SECONDS)
        chat.toggle("settings")
        chat.ask(SHORT)
        assert chat.wait_for_end()
    assert '"weight_format": "int8"' in (tmp_path / "data" / "settings.json").read_text()


def test_the_keyboard_reaches_everything(browser: Any, url: str):
    with opened(browser, url) as chat:
        keyboard = chat.page.keyboard
        chat.limit_tokens(2048)
        chat.page.reload()
        chat.send_button.wait_for(timeout=SECONDS)
        reached: set[str] = set()
        for _ in range(60):
            keyboard.press("Tab")
            reached.add(chat.page.evaluate(
                "(e => e.closest('#chats > .toggle-button') ? 'chats' : e.closest('#settings > .toggle-button') ? 'settings'"
                " : e.closest('.example') ? 'example' : e.matches('#composer textarea') ? 'composer'"
                " : e.closest('#composer button') ? 'send' : e.role === 'tab' || e.getAttribute('role') === 'tab' ? 'tab' : '')"
                "(document.activeElement)"
            ))  # fmt: skip
        assert reached >= {"chats", "settings", "example", "composer", "send"}
        chat.box.focus()
        keyboard.type("Tell me a long story:")
        keyboard.press("Shift+Enter")
        keyboard.type(LONG)
        assert chat.box.input_value() == f"Tell me a long story:\n{LONG}"
        keyboard.press("Enter")
        chat.wait_for_text()
        chat.stop_button.focus()
        keyboard.press("Enter")
        chat.wait_for_end()


def test_nothing_moves_while_an_answer_streams(browser: Any, url: str):
    with opened(browser, url) as chat:
        chat.limit_tokens(2048)
        chat.ask(LONG)
        chat.wait_for_text()
        boxes = set()
        for _ in range(12):
            boxes.add(chat.page.evaluate(
                "['#composer', '#speed', '#machine'].map(s => { const b = document.querySelector(s)"
                ".getBoundingClientRect(); return [b.x, b.y, b.width, b.height].map(Math.round).join(' '); }).join(' | ')"
            ))  # fmt: skip
            chat.page.wait_for_timeout(120)
        assert len(boxes) == 1, boxes
        size = chat.page.evaluate(
            "[document.documentElement.scrollHeight - innerHeight, document.documentElement.scrollWidth - innerWidth]"
        )
        assert size == [0, 0]  # the conversation scrolls, the page does not
        chat.stop()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_fits_a_phone(browser: Any, url: str, dark: bool):
    name = "dark" if dark else "light"
    with opened(browser, url, PHONE, dark) as chat:
        screenshot(chat.page, f"phone-empty-{name}")
        chat.limit_tokens(120)
        chat.ask("Show a Python function with a long line, and a table with four columns.")
        chat.wait_for_end()
        screenshot(chat.page, f"phone-finished-{name}")
        assert chat.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        assert chat.page.evaluate("document.documentElement.scrollHeight") == PHONE["height"]
        box = chat.send_button.bounding_box()
        assert box["x"] + box["width"] <= PHONE["width"] and box["y"] + box["height"] <= PHONE["height"]
        chat.toggle("settings")
        screenshot(chat.page, f"phone-settings-{name}")
        chat.toggle("settings")
        chat.toggle("chats")
        screenshot(chat.page, f"phone-chats-{name}")


def test_dark_follows_the_system(browser: Any, url: str):
    with opened(browser, url, dark=True) as chat:
        screenshot(chat.page, "chat-empty-dark")
        chat.limit_tokens(80)
        chat.ask("Write a Python function that checks whether a word is a palindrome.")
        chat.wait_for_end()
        screenshot(chat.page, "chat-finished-dark")
        chat.toggle("settings")
        screenshot(chat.page, "settings-dark")
        background = chat.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert max(map(int, re.findall(r"\d+", background)[:3])) < 40


HOSTILE = (
    "<img src='https://evil.example/a.png' onerror='window.hacked=1'><script>window.hacked=1</script>\n"
    "![x](https://evil.example/b.png) [click](javascript:window.hacked=1) <iframe src='https://evil.example'></iframe>"
    "<svg onload='window.hacked=1'></svg><style>#composer{display:none}</style>"
)


def test_hostile_text_is_text(browser: Any, url: str, home: Path):
    """From the user, and from the model: a chat on disk stands for what a model might write."""
    with opened(browser, url) as chat:
        chat.limit_tokens(16)
        chat.ask("Hostile test chat")
        chat.wait_for_end()
    with sqlite3.connect(home / "data" / "chats.sqlite") as db:
        (number,) = db.execute("SELECT id FROM chats WHERE title = 'Hostile test chat'").fetchone()
        db.execute("UPDATE messages SET content = ? WHERE chat = ?", (HOSTILE, number))
        db.execute(
            "UPDATE chats SET title = ? WHERE id = ?", ("<img src=x onerror='window.hacked=1'>T", number)
        )
    with open_page(browser, url) as page:
        outside: list[str] = []
        page.on(
            "response",
            lambda answer: None if answer.url.startswith((url, "data:")) else outside.append(answer.url),
        )
        chat = Chat(page)
        chat.send_button.wait_for(timeout=SECONDS)
        chat.toggle("chats")
        page.locator("#chat-list label").filter(has_text="onerror").click()
        chat.wait_for_text()
        page.wait_for_timeout(500)
        screenshot(page, "hostile")
        assert page.evaluate("window.hacked") is None and outside == []
        assert chat.box.is_visible()
        dangerous = page.evaluate(
            "[...document.querySelectorAll('#conversation *, #chat-list *')].filter(e => /^(script|iframe|style|object)$/i"
            ".test(e.tagName) && !e.closest('svg') || e.getAttributeNames().some(n => n.startsWith('on'))"
            " || /^javascript:/i.test(e.getAttribute('href') || '')).map(e => e.outerHTML)"
        )
        assert dangerous == []


def test_the_second_browser_is_told_its_place(browser: Any, url: str):
    with opened(browser, url) as first, opened(browser, url) as second:
        first.limit_tokens(2048)
        notice = second.page.locator("#notice")
        told = notice.get_by_text("one question is ahead of yours")
        for _ in range(5):  # a sampled story may end before the other question is asked
            first.ask(LONG)
            first.wait_for_text()
            second.ask(SHORT)
            if wait_until(first.page, told.is_visible, seconds=5):
                break
            first.wait_for_end()
            second.wait_for_end()
        else:
            raise AssertionError("nobody was told their place")
        screenshot(second.page, "chat-queued")
        first.stop()
        second.wait_for_text()
        assert "ahead of yours" not in notice.inner_text()
        second.wait_for_end()


def test_closing_the_page_mid_answer_frees_the_engine(browser: Any, url: str, home: Path):
    question = "Write a very long essay about trains."
    with open_page(browser, url) as page:
        chat = Chat(page)
        chat.send_button.wait_for(timeout=SECONDS)
        chat.limit_tokens(2048)
        chat.ask(question)
        chat.wait_for_text()
    with opened(browser, url) as other:
        other.limit_tokens(16)
        other.ask(SHORT)
        assert other.wait_for_end()
    with sqlite3.connect(home / "data" / "chats.sqlite") as db:
        rows = db.execute(
            "SELECT role, content, details FROM messages JOIN chats ON chats.id = chat WHERE title LIKE 'Write a very long essay%'"
            " ORDER BY place"
        ).fetchall()
    assert [row[0] for row in rows] == ["user", "assistant"]
    assert rows[1][1] and '"stopped": true' in rows[1][2]  # what was written is kept


def test_the_examples_ask_at_once(browser: Any, url: str):
    with opened(browser, url) as chat:
        chat.limit_tokens(64)  # stopping it would have to be quicker than the answer
        chat.page.get_by_role("button", name="Select example 2").click()
        chat.wait_for_text()
        assert "palindrome" in chat.questions.last.inner_text()
        chat.wait_for_end()
