"""Chats and settings on disk: what survives a restart, a crash, and a broken file."""

from __future__ import annotations

import json
import logging
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from app.chats import ChatStore, ChatStoreError, StoredMessage
from app.preferences import PreferenceFile, Preferences

TURNS = [
    StoredMessage("user", "What is 2 + 2?"),
    StoredMessage("assistant", "4 ☃", {"tokens": 2, "drafted": [[0, 1]]}),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "chats.sqlite"


def test_a_chat_survives_reopening(path: Path):
    store = ChatStore(path)
    chat = store.create("  What is\n2 + 2?  ")
    store.replace(chat, TURNS)
    store.close()
    again = ChatStore(path)
    assert again.list_chats() == [(chat, "What is 2 + 2?")]
    assert again.messages(chat) == TURNS


def test_the_latest_chat_comes_first(path: Path):
    store = ChatStore(path)
    first, second = store.create("one"), store.create("two")
    assert [number for number, _ in store.list_chats()] == [second, first]
    store.replace(first, TURNS)
    assert [number for number, _ in store.list_chats()] == [first, second]


def test_titles_are_short_and_can_be_changed(path: Path):
    store = ChatStore(path)
    chat = store.create("word " * 40)
    ((_, title),) = store.list_chats()
    assert len(title) <= 48 and title.endswith("…")
    store.rename(chat, "   ")
    assert store.list_chats() == [(chat, title)]
    store.rename(chat, " Sums ")
    assert store.list_chats() == [(chat, "Sums")]


def test_a_deleted_chat_is_gone_and_stays_gone(path: Path):
    """An answer may still be streaming into it."""
    store = ChatStore(path)
    chat, other = store.create("one"), store.create("two")
    store.replace(chat, TURNS)
    store.replace(other, TURNS)
    store.delete(chat)
    store.replace(chat, TURNS)
    assert store.messages(chat) == [] and store.messages(other) == TURNS
    assert [number for number, _ in store.list_chats()] == [other]
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*) FROM messages").fetchone() == (len(TURNS),)


def test_a_number_is_not_given_again_while_its_chat_is_open(path: Path):
    store = ChatStore(path)
    chat = store.create("one")
    store.delete(chat)
    other = store.create("two")
    store.replace(chat, TURNS)  # the answer of the deleted chat, arriving late
    assert store.messages(other) == []


def test_replacing_is_all_or_nothing(path: Path):
    store = ChatStore(path)
    chat = store.create("one")
    store.replace(chat, TURNS)
    with pytest.raises(TypeError):
        store.replace(
            chat, [StoredMessage("user", "new"), StoredMessage("assistant", "x", {"bad": object()})]
        )
    assert store.messages(chat) == TURNS
    store.replace(chat, TURNS[:1])  # and the store still works
    assert store.messages(chat) == TURNS[:1]


def test_a_killed_process_loses_nothing_that_was_stored(path: Path):
    script = (
        "import os, sys; from pathlib import Path; from app.chats import ChatStore, StoredMessage\n"
        "store = ChatStore(Path(sys.argv[1])); chat = store.create('hello')\n"
        "store.replace(chat, [StoredMessage('user', 'hello')])\n"
        "store._db.execute('BEGIN'); store._db.execute('DELETE FROM messages')\n"
        "os._exit(9)\n"
    )
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", script, str(path)], cwd=root, check=False)
    store = ChatStore(path)
    ((chat, _),) = store.list_chats()
    assert store.messages(chat) == [StoredMessage("user", "hello")]


@pytest.mark.parametrize(
    "content", [b"this is not a database " * 50, b"SQLite format 3\x00" + b"\xff" * 4000]
)
def test_a_broken_file_is_put_aside(path: Path, content: bytes, caplog: pytest.LogCaptureFixture):
    path.parent.mkdir()
    for number in (1, 2):
        path.write_bytes(content)
        with caplog.at_level(logging.ERROR):
            store = ChatStore(path)
        aside = path.with_name(f"chats.broken-{number}.sqlite")
        assert aside.read_bytes() == content and aside.name in caplog.text
        chat = store.create("new")
        assert store.list_chats() == [(chat, "new")]
        store.close()


def test_a_full_disk_is_one_sentence(path: Path):
    store = ChatStore(path)
    chat = store.create("one")
    store.replace(chat, TURNS)
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(ChatStoreError, match="room on the disk"):
        store.replace(chat, [StoredMessage("user", "x" * 100_000)])
    assert store.messages(chat) == TURNS


def test_many_threads_write_at_once(path: Path):
    store = ChatStore(path)

    def write(number: int) -> None:
        for _ in range(10):
            chat = store.create(f"chat {number}")
            store.replace(chat, TURNS)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    chats = store.list_chats()
    assert len(chats) == 40 and all(store.messages(chat) == TURNS for chat, _ in chats)


def test_in_memory_no_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    store = ChatStore(None)
    store.replace(store.create("one"), TURNS)
    assert len(store.list_chats()) == 1 and list(tmp_path.iterdir()) == []


# Settings


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    return tmp_path / "data" / "settings.json"


def test_settings_round_trip(settings: Path):
    file = PreferenceFile(settings)
    assert file.value == Preferences()
    file.save(temperature=0.2, seed=7, system_prompt="Ahoi ☃")
    file.save(model="a/b")
    again = PreferenceFile(settings)
    assert (
        again.value == file.value == Preferences(temperature=0.2, seed=7, system_prompt="Ahoi ☃", model="a/b")
    )
    again.save(seed=None)
    assert PreferenceFile(settings).value.seed is None
    assert [entry.name for entry in settings.parent.iterdir()] == ["settings.json"]


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "null", '"text"', "\x00\xff"])
def test_a_broken_settings_file_is_as_none(settings: Path, content: str):
    settings.parent.mkdir()
    settings.write_text(content, encoding="latin-1")
    file = PreferenceFile(settings)
    assert file.value == Preferences()
    file.save(top_k=3)
    assert PreferenceFile(settings).value.top_k == 3


def test_unknown_and_ill_typed_settings_are_left_out(settings: Path):
    settings.parent.mkdir()
    saved = {
        "temperature": 1, "top_p": "high", "top_k": 2.5, "min_p": True, "seed": "x", "system_prompt": None,
        "max_new_tokens": 64, "of_a_later_version": 1,
    }  # fmt: skip
    settings.write_text(json.dumps(saved))
    assert PreferenceFile(settings).value == Preferences(temperature=1, max_new_tokens=64)


def test_settings_that_cannot_be_saved_are_in_nobodys_way(settings: Path):
    settings.parent.write_text("a file where the folder should be")
    file = PreferenceFile(settings)
    file.save(temperature=0.1)
    assert file.value.temperature == 0.1


def test_in_a_space_no_visitor_changes_the_settings_of_another():
    file = PreferenceFile(None)
    file.save(temperature=0.1, system_prompt="mine")
    assert file.value == Preferences()
