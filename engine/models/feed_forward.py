"""A layer's feed-forward part: one SwiGLU block, or a router and many of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

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

    @property
    def num_parameters(self) -> int:
        """Weights and biases."""
        return sum(
            m.out_features * (m.in_features + 1 if m.bias is not None else m.in_features)
            for m in self.matrices()
        )


Group: TypeAlias = list[tuple[int, FeedForward]]  # experts and their numbers
Route: TypeAlias = tuple[Tensor, Tensor]  # of each row: its experts' weights and numbers, [T, k]


class ExpertSource(Protocol):
    """Where a layer's experts come from."""

    def fetch(self, numbers: Sequence[int]) -> Iterator[Group]:
        """The experts ``numbers`` in groups, those first that are in memory: the first group may be empty. A group
        may be used until the next one is asked for."""

    def resident(self) -> Sequence[FeedForward]:
        """Those that are in memory for good."""

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights."""

    @property
    def num_parameters(self) -> int:
        """Weights of all of them."""


class ResidentExperts:
    """All experts, in memory."""

    def __init__(self, experts: Sequence[FeedForward]) -> None:
        self._experts = tuple(experts)

    def fetch(self, numbers: Sequence[int]) -> Iterator[Group]:
        yield [(number, self._experts[number]) for number in numbers]

    def resident(self) -> Sequence[FeedForward]:
        return self._experts

    @property
    def expert_bytes(self) -> int:
        return self._experts[0].step_bytes

    @property
    def num_parameters(self) -> int:
        return sum(expert.num_parameters for expert in self._experts)


@dataclass(frozen=True)
class MixtureOfExperts:
    """Each token goes through the ``num_experts_per_tok`` experts that its router likes best, and through the
    shared expert, where there is one."""

    config: ExpertConfig
    router: Tensor  # [E, D], in the activations' dtype
    experts: ExpertSource
    shared: FeedForward | None = None
    shared_gate: Tensor | None = None  # [1, D]

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D]``."""
        rows = x.reshape(-1, x.shape[-1])
        return self.mix(rows, *self.route(rows)).view(x.shape)

    def mix(self, rows: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """``rows [T, D]`` through the experts ``chosen [T, k]``, weighted, and the shared expert: ``[T, D]``.

        A row's experts are added in the order of ``chosen``, so that neither the other rows of the call matter nor the
        order in which the experts arrive.
        """
        parts = rows.new_empty(*chosen.shape, rows.shape[-1])  # [T, k, D]
        if len(rows) == 1 or bool((chosen == chosen[0]).all()):  # decoding: each expert has one place
            numbers = chosen[0].tolist()
            for group in self.experts.fetch(numbers):
                for number, expert in group:
                    parts[:, numbers.index(number)] = expert(rows)
        else:
            for group in self.experts.fetch(chosen.unique().tolist()):
                for number, expert in group:
                    row, place = torch.where(chosen == number)
                    parts[row, place] = expert(rows[row])
        if rows.is_cuda:  # one launch, in whatever order it sums
            out = torch.bmm(weights[:, None], parts)[:, 0]
            return out if self.shared is None else out + self._shared(rows)
        out = torch.zeros_like(rows)
        for rank in range(chosen.shape[1]):
            out += parts[:, rank] * weights[:, rank, None]
        return out if self.shared is None else out + self._shared(rows)

    def _shared(self, rows: Tensor) -> Tensor:
        """What the shared expert makes of ``rows``, gated where it has a gate."""
        assert self.shared is not None
        shared = self.shared(rows)
        if self.shared_gate is not None:
            shared = F.sigmoid(_each_row(rows, self.shared_gate)) * shared
        return shared

    def route(self, rows: Tensor) -> Route:
        """``[T, D]`` -> the weights (in the dtype of ``rows``) and numbers of the experts, each ``[T, k]``."""
        weights, chosen = self.choose(_each_row(rows, self.router))
        return weights.to(rows.dtype), chosen

    def choose(self, logits: Tensor) -> Route:
        """The router's logits ``[T, E]`` -> as :meth:`route`, in float32 (of float64: float64); by number, ascending."""
        wide = logits if logits.dtype == torch.float64 else logits.float()
        weights, chosen = wide.softmax(dim=-1).topk(self.config.num_experts_per_tok, dim=-1)
        if self.config.normalize_weights:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        chosen, order = chosen.sort(dim=-1)
        return weights.gather(-1, order), chosen

    def matrices(self) -> Iterator[Linear]:
        """All packed matrices that are in memory for good."""
        for expert in self.experts.resident():
            yield from expert.matrices()
        if self.shared is not None:
            yield from self.shared.matrices()

    def small_tensors(self) -> tuple[Tensor | None, ...]:
        """What is not packed."""
        return self.router, self.shared_gate

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that one token reads."""
        routed = self.experts.expert_bytes * self.config.num_experts_per_tok
        return routed + self.router.nbytes + (self.shared.step_bytes if self.shared is not None else 0)

    @property
    def num_parameters(self) -> int:
        """Of all experts, router and gate included."""
        shared = self.shared.num_parameters if self.shared is not None else 0
        small = sum(tensor.numel() for tensor in self.small_tensors() if tensor is not None)
        return self.experts.num_parameters + shared + small


def _each_row(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows [T, D]`` times ``weight [N, D]``, one row at a time: how torch sums depends on how many there are,
    and which experts a row goes to must not."""
    return torch.stack([weight.mv(row) for row in rows])
