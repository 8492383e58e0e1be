"""A layer's feed-forward part: one SwiGLU block, or a router and many of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.config import ExpertConfig
from engine.quantization.base import Linear


@dataclass(frozen=True)
class FeedForward:
    """SwiGLU (Shazeer, arXiv 2002.05202). ``gate_up`` is fused along the outputs."""

    gate_up: Linear  # [2 F, D]
    down: Linear  # [D, F]

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D]``."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

    def matrices(self) -> tuple[Linear, ...]:
        """All packed matrices."""
        return self.gate_up, self.down

    def small_tensors(self) -> tuple[Tensor | None, ...]:
        """What is not packed: nothing."""
        return ()

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that one token reads."""
        return self.gate_up.nbytes + self.down.nbytes


@dataclass(frozen=True)
class MixtureOfExperts:
    """Each token goes through the ``num_experts_per_tok`` experts that its router likes best, and through the
    shared expert, where there is one."""

    config: ExpertConfig
    router: Tensor  # [E, D], in the activations' dtype
    experts: tuple[FeedForward, ...]
    shared: FeedForward | None = None
    shared_gate: Tensor | None = None  # [1, D]

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D]``. A row's experts are added in the order of their numbers, so that it does not
        matter which other rows share the call."""
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.route(rows)
        out = torch.zeros_like(rows)
        for index in chosen.unique().tolist():  # ascending
            row, place = torch.where(chosen == index)
            out[row] += self.experts[index](rows[row]) * weights[row, place, None]
        if self.shared is not None:
            shared = self.shared(rows)
            if self.shared_gate is not None:
                shared = F.sigmoid(_each_row(rows, self.shared_gate)) * shared
            out = out + shared
        return out.view(x.shape)

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``[T, D]`` -> the weights (in the dtype of ``rows``) and numbers of the experts, each ``[T, k]``."""
        logits = _each_row(rows, self.router)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        weights, chosen = wide.softmax(dim=-1).topk(self.config.num_experts_per_tok, dim=-1)
        if self.config.normalize_weights:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(rows.dtype), chosen

    def matrices(self) -> Iterator[Linear]:
        """All packed matrices."""
        for expert in self.experts:
            yield from expert.matrices()
        if self.shared is not None:
            yield from self.shared.matrices()

    def small_tensors(self) -> tuple[Tensor | None, ...]:
        """What is not packed."""
        return self.router, self.shared_gate

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that one token reads."""
        routed = sum(expert.step_bytes for expert in self.experts) * self.config.num_experts_per_tok
        always = self.router.nbytes + (self.shared.step_bytes if self.shared is not None else 0)
        return routed // len(self.experts) + always


def _each_row(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows [T, D]`` times ``weight [N, D]``, one row at a time: how torch sums depends on how many there are,
    and which experts a row goes to must not."""
    return torch.stack([weight.mv(row) for row in rows])
