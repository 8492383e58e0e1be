"""The side panel's settings, remembered between starts in one small JSON file."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from engine.atomic import replacing

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preferences:
    """What a person set. Defaults suit a small instruct model."""

    system_prompt: str = "You are a helpful assistant."
    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.05
    seed: int | None = None
    max_new_tokens: int = 1024
    method: str = ""  # acceleration where the model has it
    tint_drafted: bool = False
    model: str = ""  # the default model
    weight_format: str = "auto"
    memory: str = ""  # such as 6GB; what is free


class PreferenceFile:
    """Loads and saves :class:`Preferences`.

    Args:
        path: None keeps them in memory alone (a Space, where visitors share one server).
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.value = self._read()

    def save(self, **changes: Any) -> None:
        """Remember the changed settings; a full disk is logged, never in the way of a chat."""
        if self._path is None:
            return
        self.value = replace(self.value, **changes)
        try:
            with replacing(self._path) as file:
                file.write(json.dumps(asdict(self.value), indent=1).encode())
        except OSError:
            _log.exception("the settings could not be saved")

    def _read(self) -> Preferences:
        """The saved settings; unknown or ill-typed ones are left out, a broken file is as none."""
        defaults = Preferences()
        if self._path is None:
            return defaults
        try:
            saved = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return defaults
        except (OSError, ValueError):
            _log.exception("the settings could not be read; the defaults are used")
            return defaults
        if not isinstance(saved, dict):
            return defaults
        known = {field.name: getattr(defaults, field.name) for field in fields(Preferences)}
        return Preferences(**{name: saved[name] for name in known if _fits(saved.get(name), known[name])})


def _fits(value: Any, default: Any) -> bool:
    if isinstance(value, bool) or isinstance(default, bool):  # a bool is an int as well
        return isinstance(value, bool) and isinstance(default, bool)
    if default is None or isinstance(default, int):
        return isinstance(value, int)
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))
