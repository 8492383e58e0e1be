"""What decoding methods are called in the page, and which one is taken unless somebody chose."""

from __future__ import annotations

from collections.abc import Sequence

_LABELS = {"m2r2": "Accelerated (M2R2)", "plain": "Plain"}


def label(method: str) -> str:
    """The method's name for people."""
    return _LABELS.get(method, method)


def choices(methods: Sequence[str]) -> list[tuple[str, str]]:
    """``(label, name)`` of a model's methods, the default first."""
    default = pick(methods)
    return [(label(name), name) for name in (default, *(name for name in methods if name != default))]


def pick(methods: Sequence[str], wanted: str | None = None) -> str:
    """``wanted`` if the model has it, else acceleration if the model has it, else the engine's default."""
    if wanted in methods:
        return str(wanted)
    return "m2r2" if "m2r2" in methods else methods[0]


def is_accelerated(method: str) -> bool:
    """Whether the method drafts, and so is shown in the accent colour."""
    return method != "plain"
