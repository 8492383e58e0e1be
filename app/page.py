"""The whole page as gradio blocks."""

from __future__ import annotations

import threading
from typing import Any

import gradio as gr

from app.chat_page import ChatPage
from app.chats import ChatStore
from app.compare_page import ComparePage
from app.engine_host import EngineHost
from app.preferences import PreferenceFile
from engine import paths


def build_blocks(host: EngineHost, preferences: PreferenceFile, private: bool) -> Any:
    """All pages.

    Args:
        private: one person's own machine: chats are kept on disk, and models can be chosen. Otherwise
            (a Space) every visitor has chats of their own, in memory, until they leave.
    """
    stores = OneStore(ChatStore(paths.data_dir() / "chats.sqlite")) if private else VisitorStores()
    blocks = gr.Blocks(title="Slipstream", fill_height=True, fill_width=True, analytics_enabled=False)
    with blocks, gr.Tabs(elem_id="pages", overflow_behavior="wrap"):
        with gr.Tab("Chat", id="chat"):
            ChatPage(host, stores, preferences, private)
        with gr.Tab("Compare", id="compare-tab"):
            ComparePage(host, preferences, private)
    return blocks


class OneStore:
    """One person, one store."""

    def __init__(self, store: ChatStore) -> None:
        self._store = store

    def __call__(self, owner: str) -> ChatStore:
        return self._store


class VisitorStores:
    """A store in memory for each browser session, the oldest forgotten first."""

    def __init__(self, limit: int = 200) -> None:
        self._limit = limit
        self._stores: dict[str, ChatStore] = {}
        self._lock = threading.Lock()

    def __call__(self, owner: str) -> ChatStore:
        with self._lock:
            store = self._stores.pop(owner, None) or ChatStore(None)
            self._stores[owner] = store  # the latest last
            while len(self._stores) > self._limit:
                del self._stores[next(iter(self._stores))]  # not closed: an answer may be streaming into it
        return store
