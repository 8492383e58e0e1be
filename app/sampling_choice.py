"""Which sampling settings hold: what a person chose, else what the model's authors recommend, else ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from app.preferences import HOUSE_SAMPLING, Preferences
from engine.requests import SamplingParams

# What the page's sliders can show.
RANGES = {
    "temperature": (0.0, 2.0), "top_p": (0.05, 1.0), "top_k": (0, 200), "min_p": (0.0, 1.0),
    "repetition_penalty": (1.0, 2.0),
}  # fmt: skip


def in_force(preferences: Preferences, recommended: SamplingParams | None) -> dict[str, float]:
    """By name, in the order of ``RANGES``; within them.

    Args:
        recommended: by the authors of the loaded model.
    """
    defaults: Mapping[str, float] = asdict(recommended) if recommended else HOUSE_SAMPLING
    found = {}
    for name, (low, high) in RANGES.items():
        chosen = getattr(preferences, name)
        found[name] = min(max(defaults[name] if chosen is None else chosen, low), high)
    return found


def explained(values: Mapping[str, float], recommended: SamplingParams | None) -> str:
    """Whose settings these ``values`` are, in one sentence; nothing where the authors recommend none."""
    if recommended is None:
        return ""
    advice = in_force(Preferences(), recommended)
    if values == advice:
        return "Sampling is set as the model's authors recommend."
    off = asdict(SamplingParams())
    named = [
        f"{name.replace('_', ' ')} {value:g}"
        for name, value in advice.items()
        if name == "temperature" or value != off[name]
    ]
    return f"The model's authors recommend {', '.join(named)}."
