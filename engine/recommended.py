"""How a model's authors sample from it: ``generation_config.json`` beside safetensors, ``general.sampling.*`` in a GGUF."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from engine.errors import InvalidRequestError, ModelFileError
from engine.models.gguf_header import read_header
from engine.requests import SamplingParams

# What a setting is called in a GGUF (as llama.cpp's converter writes them).
_IN_GGUF = {
    "temperature": "general.sampling.temp", "top_k": "general.sampling.top_k", "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p", "repetition_penalty": "general.sampling.penalty_repeat",
}  # fmt: skip
_DIGITS = 6  # of what a GGUF holds in 32 bits: 0.95 is not meant as 0.949999988
_log = logging.getLogger(__name__)


def recommended_sampling(path: Path) -> SamplingParams | None:
    """What the authors of the model at ``path`` recommend; what they do not name is off, and the temperature 1. None: they
    recommend nothing, or what makes no sense."""
    from engine.models.split_checkpoint import base_of, is_recipe

    try:
        if is_recipe(path):
            path = base_of(path)
        named = _from_folder(path) if path.is_dir() else _from_gguf(path)
        settings = {"temperature": 1.0, **named}
        return SamplingParams(**{**settings, "top_k": int(settings.get("top_k", 0))}) if named else None
    except (OSError, ValueError, TypeError, OverflowError, InvalidRequestError, ModelFileError) as error:
        _log.warning("what the authors of %s recommend cannot be used: %s", path.name, error)
        return None


def _from_folder(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    raw = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if not isinstance(raw, dict) or raw.get("do_sample") is False:
        return {}
    return {name: raw[name] for name in _IN_GGUF if raw.get(name) is not None}


def _from_gguf(file: Path) -> dict[str, Any]:
    metadata = read_header(file).metadata
    found = {name: metadata.get(key) for name, key in _IN_GGUF.items()}
    return {name: round(value, _DIGITS) for name, value in found.items() if value is not None}
