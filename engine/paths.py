"""Where Slipstream keeps its files. ``SLIPSTREAM_HOME`` moves all of them into one folder."""

from __future__ import annotations

import os
from pathlib import Path

APP_NAME = "slipstream"
HOME_VARIABLE = "SLIPSTREAM_HOME"


def data_dir() -> Path:
    """Settings, chats, tuned adapters: what a person would miss."""
    return _folder("data")


def cache_dir() -> Path:
    """Models and whatever else can be fetched or computed again."""
    return _folder("cache")


def models_dir() -> Path:
    """Downloaded models (the Hugging Face cache is read as well, see :mod:`engine.hub`)."""
    return cache_dir() / "models"


def log_dir() -> Path:
    """Log files."""
    return _folder("log")


def _folder(kind: str) -> Path:
    home = os.environ.get(HOME_VARIABLE)
    if home:
        return Path(home).expanduser().resolve() / kind
    import platformdirs

    folder = {
        "data": platformdirs.user_data_path,
        "cache": platformdirs.user_cache_path,
        "log": platformdirs.user_log_path,
    }[kind]
    return folder(APP_NAME, appauthor=False)
