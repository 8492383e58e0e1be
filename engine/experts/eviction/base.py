"""The interface of eviction policies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np

# Fields of the block of :mod:`engine.kernels.turn_fields`, and numbers for them or arrays for them to point at.
NativeForm: TypeAlias = dict[int, "int | np.ndarray"]


class EvictionPolicy(Protocol):
    """Told what the routers choose. Made for the shape ``[layers, experts]``.

    Native code (:mod:`engine.kernels.worths`) does the same with the same arrays.
    """

    name: str

    @property
    def worth(self) -> np.ndarray:
        """How much each expert is worth keeping, in memory or not, float64 ``[layers, experts]``: the least leaves
        first."""

    def used(self, layer: int, numbers: Sequence[int]) -> None:
        """The router of ``layer`` has chosen these experts; a layer's turn has come."""

    def native_form(self) -> NativeForm:
        """What the native code of this policy works on."""
