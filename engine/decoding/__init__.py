"""Decoding methods by name. Adding one: write its file, and add a line to ``method_factories``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.decoding.base import MethodFactory
from engine.models.stepper import Stepper

if TYPE_CHECKING:
    from engine.decoding.lookup import Lookup
    from engine.decoding.m2r2 import M2R2


def method_factories(
    stepper: Stepper, lookup: Lookup | None = None, m2r2: M2R2 | None = None, stream: M2R2 | None = None
) -> dict[str, MethodFactory]:
    """Every method that can run on this model; the first is the default.

    Args:
        m2r2, stream: with drafts from the context as well, and without.
    """
    from engine.decoding.plain import PlainDecoding

    methods: dict[str, MethodFactory] = {"plain": lambda: PlainDecoding(stepper)}
    for name, shared in (("lookup", lookup), ("m2r2", m2r2), ("stream", stream)):
        if shared is not None:
            methods[name] = shared.new_method
    return methods
