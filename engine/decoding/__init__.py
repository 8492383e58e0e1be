"""Decoding methods by name. Adding one: write its file, and add a line to ``method_factories``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.decoding.base import MethodFactory
from engine.models.stepper import Stepper

if TYPE_CHECKING:
    from engine.decoding.m2r2 import M2R2


def method_factories(stepper: Stepper, m2r2: M2R2 | None = None) -> dict[str, MethodFactory]:
    """Every method that can run on this model; the first is the default."""
    from engine.decoding.plain import PlainDecoding

    methods: dict[str, MethodFactory] = {"plain": lambda: PlainDecoding(stepper)}
    if m2r2 is not None:
        methods["m2r2"] = m2r2.new_method
    return methods
