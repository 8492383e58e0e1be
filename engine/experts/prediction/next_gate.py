"""Next gate: a later layer's own router, applied to the state of this layer. The free control.

It costs one small product and no training: the residual stream changes slowly, so the router of layer ``l + n``
makes of the state at layer ``l`` about what it will make of its own.

The norm before a router divides by a length, which changes no order: its gains are multiplied into the router.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from engine.experts.prediction.foretelling import MOST_ROWS, Foretelling, Foretellings, Maps, fits
from engine.experts.store import Key
from engine.models.decoder import Decoder
from engine.models.feed_forward import MixtureOfExperts

_log = logging.getLogger(__name__)


class NextGate:
    """Predicts layer ``l + lookahead`` at layer ``l``.

    Args:
        lookahead: layers, at least 1.
        num_experts: how many to name for each row; None: as many as the router will choose.
    """

    informs = False

    def __init__(self, decoder: Decoder, lookahead: int = 1, num_experts: int | None = None) -> None:
        self.name = f"next-gate {lookahead}"
        self._lookahead = lookahead
        self._num_experts = num_experts
        self._gates: dict[int, Tensor] = {}  # [E, D] float32
        for index, layer in enumerate(decoder.layers):
            if isinstance(layer.ffn, MixtureOfExperts):
                self._num_experts = self._num_experts or layer.ffn.config.num_experts_per_tok
                self._gates[index] = layer.ffn.router.float() * layer.mlp_norm.float()
        self._rows = self._native_rows() if find_spec("numba") else {}
        self._all = self.read_at({index - lookahead: index for index in self._gates})

    def _native_rows(self) -> dict[int, Foretelling]:
        """Readers of a few rows, by the layer whose router it is; none where there are none."""
        scales, found = np.ones(1, np.float32), dict[int, Foretelling]()
        for index, gate in self._gates.items():
            count = min(self._num_experts or 1, len(gate))
            if fits(gate):
                own = Maps(gate[None].contiguous(), torch.zeros(1, len(gate)), scales, True, False, 0.0)
                try:
                    found[index] = Foretelling(own, 1e-6, count, index)
                except Exception as error:  # an LLVM problem must not keep anyone from chatting
                    _log.info("the next gate is read by torch: %s", error)
                    return {}
        return found

    def predict(self, layer: int, hidden: Tensor) -> Sequence[Key]:
        target = layer + self._lookahead
        return [(target, number) for number in self.numbers(target, hidden)]

    def numbers(self, target: int, hidden: Tensor) -> list[int]:
        """What the router of layer ``target`` would choose for ``hidden [T, D]``; empty if it has none."""
        if target not in self._gates:
            return []
        if target in self._rows and len(hidden) <= MOST_ROWS:
            # Between two commands of the kernels: torch's or a BLAS's threads would wait for theirs.
            return self._rows[target].read(hidden)
        return likely_experts(hidden.float() @ self._gates[target].T, self._num_experts or 1)

    def read_at(self, targets: Mapping[int, int]) -> Foretellings | None:
        """What native code reads at each layer, for the router of another one; None: it does not."""
        if not self._rows or not set(targets.values()) <= self._rows.keys():
            return None
        return Foretellings({layer: self._rows[target] for layer, target in targets.items() if layer >= 0})

    def native_form(self) -> dict[int, int] | None:
        return None if self._all is None else self._all.native_form()


def likely_experts(logits: Tensor, count: int) -> list[int]:
    """The ``count`` best of each row of router logits ``[T, E]``; of several rows those first that more ask for."""
    best = logits.topk(min(count, logits.shape[-1]), dim=-1).indices
    if len(best) == 1:
        numbers: list[int] = best[0].tolist()
        return numbers
    votes = best.flatten().bincount(minlength=logits.shape[-1])
    wanted = votes.argsort(descending=True, stable=True)[: int((votes > 0).sum())]
    ordered: list[int] = wanted.tolist()
    return ordered
