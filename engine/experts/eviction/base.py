"""The interface of eviction policies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from engine.experts.store import Key


class EvictionPolicy(Protocol):
    """Told what the routers choose, asked in what order experts may leave."""

    name: str

    def used(self, layer: int, numbers: Sequence[int]) -> None:
        """The router of ``layer`` has chosen these experts; a layer's turn has come."""

    def worth(self, key: Key) -> Any:
        """How much the expert is worth keeping, as something that can be compared: the least leaves first."""
