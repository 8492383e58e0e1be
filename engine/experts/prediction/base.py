"""The interface of predictors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from engine.experts.store import Key


class Predictor(Protocol):
    """Looks at the residual stream of each layer, and names experts that later layers will want."""

    name: str
    informs: (
        bool  # whether others hear from it as well, so that it is asked even while nothing is loaded ahead
    )

    def predict(self, layer: int, hidden: Tensor) -> Sequence[Key]:
        """The experts to load now, the most urgent first.

        Args:
            hidden: the residual states of all rows before the layer's feed-forward part, ``[T, D]``.
        """
