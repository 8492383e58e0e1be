"""What decoding methods are called in the page, and which one is taken unless somebody chose."""

from __future__ import annotations

from collections.abc import Sequence

_LABELS = {
    "m2r2": "Accelerated (M2R2)", "plain": "Plain", "lookup": "Context matches", "stream": "M2R2, stream alone",
}  # fmt: skip
_FASTEST_FIRST = ("m2r2", "lookup")  # as measured: README, "How fast"


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
    return next((name for name in _FASTEST_FIRST if name in methods), methods[0])


def switch(methods: Sequence[str], chosen: str) -> list[tuple[str, str]]:
    """``(label, name)`` of those that a chat offers: accelerated, if the model can be, plain, and what was chosen."""
    return [choice for choice in choices(methods) if choice[1] in (pick(methods), "plain", chosen)]


def is_accelerated(method: str) -> bool:
    """Whether the method drafts, and so is shown in the accent colour."""
    return method != "plain"
