"""The side panel's settings, remembered between starts in one small JSON file."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from engine.atomic import replacing

_log = logging.getLogger(__name__)
# How we sample from models whose authors recommend nothing.
HOUSE_SAMPLING: dict[str, float] = {
    "temperature": 0.7, "top_p": 0.95, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.05
}  # fmt: skip
_EDITION = 2  # of the file; in the first, settings that nobody had chosen were written as well


@dataclass(frozen=True)
class Preferences:
    """What a person set."""

    system_prompt: str = "You are a helpful assistant."
    # None: as the model's authors recommend, or else as HOUSE_SAMPLING says.
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
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
                file.write(json.dumps({"edition": _EDITION, **asdict(self.value)}, indent=1).encode())
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
        known |= HOUSE_SAMPLING  # of whose type they have to be
        found = {name: saved[name] for name in known if _fits(saved.get(name), known[name])}
        if saved.get("edition") != _EDITION:
            found = {name: value for name, value in found.items() if value != HOUSE_SAMPLING.get(name)}
        return Preferences(**found)


def _fits(value: Any, default: Any) -> bool:
    if isinstance(value, bool) or isinstance(default, bool):  # a bool is an int as well
        return isinstance(value, bool) and isinstance(default, bool)
    if default is None or isinstance(default, int):
        return isinstance(value, int)
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))
