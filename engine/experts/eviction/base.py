"""The interface of eviction policies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class EvictionPolicy(Protocol):
    """Told what the routers choose. Made for the shape ``[layers, experts]``."""

    name: str

    @property
    def worth(self) -> np.ndarray:
        """How much each expert is worth keeping, in memory or not, float64 ``[layers, experts]``: the least leaves
        first."""

    def used(self, layer: int, numbers: Sequence[int]) -> None:
        """The router of ``layer`` has chosen these experts; a layer's turn has come."""
