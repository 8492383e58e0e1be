"""Next gate: a later layer's own router, applied to the state of this layer. The free control.

It costs one small product and no training: the residual stream changes slowly, so the router of layer ``l + n``
makes of the state at layer ``l`` about what it will make of its own.

The norm before a router divides by a length, which changes no order: its gains are multiplied into the router.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from engine.experts.store import Key
from engine.models.decoder import Decoder
from engine.models.feed_forward import MixtureOfExperts


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
        self._arrays: dict[int, np.ndarray] = {}  # the same memory, on CPU
        for index, layer in enumerate(decoder.layers):
            if isinstance(layer.ffn, MixtureOfExperts):
                self._num_experts = self._num_experts or layer.ffn.config.num_experts_per_tok
                gate = self._gates[index] = layer.ffn.router.float() * layer.mlp_norm.float()
                if gate.device.type == "cpu":
                    self._arrays[index] = gate.numpy()

    def predict(self, layer: int, hidden: Tensor) -> Sequence[Key]:
        target = layer + self._lookahead
        return [(target, number) for number in self.numbers(target, hidden)]

    def numbers(self, target: int, hidden: Tensor) -> list[int]:
        """What the router of layer ``target`` would choose for ``hidden [T, D]``; empty if it has none."""
        if target not in self._gates:
            return []
        if target in self._arrays and hidden.shape[0] == 1:
            # Between two commands of the kernels: torch's or a BLAS's threads would wait for theirs.
            logits = np.einsum("ed,td->e", self._arrays[target], hidden.float().numpy())
            best: list[int] = (-logits).argsort(kind="stable")[: self._num_experts].tolist()
            return best
        return likely_experts(hidden.float() @ self._gates[target].T, self._num_experts or 1)


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
