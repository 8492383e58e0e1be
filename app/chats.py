"""Chats on disk: SQLite, so that nothing is lost when the app or the machine stops."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import SlipstreamError

_log = logging.getLogger(__name__)

# Step i brings a store from version i to i + 1; never edit one that was released.
_MIGRATIONS = (
    """
    CREATE TABLE chats (id INTEGER PRIMARY KEY AUTOINCREMENT, title TEXT NOT NULL, updated REAL NOT NULL);
    CREATE TABLE messages (
        chat INTEGER NOT NULL REFERENCES chats(id) ON DELETE CASCADE,
        place INTEGER NOT NULL,
        role TEXT NOT NULL,
        content TEXT NOT NULL,
        details TEXT NOT NULL,
        PRIMARY KEY (chat, place)
    );
    """,
)
_TITLE_LENGTH = 48


class ChatStoreError(SlipstreamError):
    """The chats cannot be written at the moment."""


@dataclass(frozen=True)
class StoredMessage:
    """One turn. ``details`` holds what the page shows beside an answer (figures, provenance)."""

    role: str
    content: str
    details: dict[str, Any] = field(default_factory=dict)


class ChatStore:
    """All chats of this user. Safe to call from any thread."""

    def __init__(self, path: Path | None) -> None:
        """Open or make the store at ``path``; None keeps it in memory alone.

        A file that is no store is put aside (``chats.broken-1.sqlite``) and a new one is begun.
        """
        self._lock = threading.Lock()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._open(path)
        except sqlite3.OperationalError:  # locked, no room, no permission: nothing is wrong with the file
            raise
        except sqlite3.DatabaseError:
            assert path is not None  # memory is never broken
            self._db.close()
            aside = _put_aside(path)
            _log.exception("the chats could not be read; the file is kept as %s", aside)
            self._open(path)

    def _open(self, path: Path | None) -> None:
        self._db = sqlite3.connect(path or ":memory:", check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA foreign_keys=ON")
        self._migrate()

    def list_chats(self) -> list[tuple[int, str]]:
        """``(id, title)`` of all chats, the latest first."""
        with self._lock:
            return self._db.execute("SELECT id, title FROM chats ORDER BY updated DESC, id DESC").fetchall()

    def create(self, first_message: str) -> int:
        """A new chat, titled by its first words."""
        with self._transaction() as db:
            row = db.execute(
                "INSERT INTO chats (title, updated) VALUES (?, ?)", (_title(first_message), time.time())
            )
            return int(row.lastrowid or 0)

    def messages(self, chat: int) -> list[StoredMessage]:
        """The turns of a chat, in order; none if it does not exist."""
        with self._lock:
            rows = self._db.execute(
                "SELECT role, content, details FROM messages WHERE chat = ? ORDER BY place", (chat,)
            ).fetchall()
        return [StoredMessage(role, content, json.loads(details)) for role, content, details in rows]

    def replace(self, chat: int, messages: Sequence[StoredMessage]) -> None:
        """Make ``messages`` the turns of the chat, all or nothing. A chat deleted meanwhile stays deleted."""
        with self._transaction() as db:
            if not db.execute("UPDATE chats SET updated = ? WHERE id = ?", (time.time(), chat)).rowcount:
                return
            db.execute("DELETE FROM messages WHERE chat = ?", (chat,))
            db.executemany(
                "INSERT INTO messages VALUES (?, ?, ?, ?, ?)",
                [(chat, i, m.role, m.content, json.dumps(m.details)) for i, m in enumerate(messages)],
            )

    def rename(self, chat: int, title: str) -> None:
        """Give the chat another title; an empty one is ignored."""
        if title.strip():
            with self._transaction() as db:
                db.execute("UPDATE chats SET title = ? WHERE id = ?", (_title(title), chat))

    def delete(self, chat: int) -> None:
        """Remove the chat and its turns."""
        with self._transaction() as db:
            db.execute("DELETE FROM chats WHERE id = ?", (chat,))

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing.

        Raises:
            ChatStoreError: the disk is full, or somebody else holds the file.
        """
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    raise ChatStoreError(
                        f"The chat could not be saved ({error}); see that there is room on the disk."
                    ) from error
                raise

    def _migrate(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        for number in range(version, len(_MIGRATIONS)):
            self._db.executescript(
                f"BEGIN; {_MIGRATIONS[number]} PRAGMA user_version = {number + 1}; COMMIT;"
            )


def _put_aside(path: Path) -> Path:
    """Rename a broken store, with what SQLite keeps beside it; returns the new name."""
    number = 1
    while (aside := path.with_name(f"{path.stem}.broken-{number}{path.suffix}")).exists():
        number += 1
    os.replace(path, aside)
    for ending in ("-wal", "-shm"):
        path.with_name(path.name + ending).unlink(missing_ok=True)
    return aside


def _title(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _TITLE_LENGTH else words[: _TITLE_LENGTH - 1].rstrip() + "…"
