"""Decoding methods by name. Adding one: write its file, and add a line to ``method_factories``."""

from __future__ import annotations

from engine.decoding.base import MethodFactory
from engine.models.stepper import Stepper


def method_factories(stepper: Stepper) -> dict[str, MethodFactory]:
    """Every method that can run on this model; the first is the default."""
    from engine.decoding.plain import PlainDecoding

    return {"plain": lambda: PlainDecoding(stepper)}
