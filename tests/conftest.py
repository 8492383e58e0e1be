"""Fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before any test imports a library that reads them.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that is neither ``real_model`` nor ``browser`` as ``fast``."""
    for item in items:
        if not any(item.get_closest_marker(name) for name in ("real_model", "browser")):
            item.add_marker(pytest.mark.fast)


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The default model's GGUF file, fetched the first time (100 MB) and kept."""
    from engine import hub

    return hub.resolve(hub.DEFAULT_MODEL).path


@pytest.fixture
def slipstream_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home for settings, models and logs, so that a test leaves nothing behind."""
    home = tmp_path / "slipstream-home"
    monkeypatch.setenv("SLIPSTREAM_HOME", str(home))
    return home


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch's threads cost tiny models far more than they save."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
