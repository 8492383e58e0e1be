"""Splitting the feed-forward neurons of a dense model into experts.

A SwiGLU block is a sum over its neurons, so any grouping of them is a mixture of experts that computes the same as
long as every group takes part. Some neurons are put into a shared expert, the others into groups of equal size that
are active together; a router then leaves most groups out. After the idea of MoEfication (clustering neurons, then
routing); the procedure below is our choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_ROUNDS = 12  # of the clustering
_START = 0.25  # spread of a fresh router's logits: the chosen experts then weigh about the same


@dataclass(frozen=True)
class SplitConfig:
    """How a model is split.

    Attributes:
        num_experts, num_experts_per_tok: routed experts, and how many of them a token goes through.
        shared_size: neurons of the shared expert; the others are divided evenly.
        dense_layers: so many first layers stay as they are.
        rank: of the low-rank corrections to the feed-forward matrices.
    """

    num_experts: int = 16
    num_experts_per_tok: int = 4
    shared_size: int = 512
    dense_layers: int = 3
    rank: int = 8


def order_neurons(activity: Tensor, shared_size: int, num_experts: int, seed: int = 0) -> Tensor:
    """The neurons of a layer in the order shared, expert 0, expert 1, ...: ``int64 [F]``.

    Args:
        activity: how much each neuron adds to the layer's output, ``[T, F]``: the absolute inner activation times
            the length of its row of the down matrix.
    """
    ranked = activity.mean(dim=0).argsort(descending=True)
    shared, routed = ranked[:shared_size], ranked[shared_size:]
    groups = _balanced_clusters(activity[:, routed], num_experts, seed)
    return torch.cat((shared.sort().values, *(routed[group.sort().values] for group in groups)))


def _balanced_clusters(activity: Tensor, num_clusters: int, seed: int) -> list[Tensor]:
    """The columns of ``activity [T, n]`` in clusters of equal size by the direction of their activity over the
    tokens: k-means whose assignment fills clusters, the clearest cases first."""
    columns = F.normalize(activity - activity.mean(dim=0), dim=0).T  # [n, T]
    size = len(columns) // num_clusters
    generator = torch.Generator().manual_seed(seed)
    centres = columns[torch.randperm(len(columns), generator=generator)[:num_clusters]]
    assigned = torch.zeros(len(columns), dtype=torch.long)
    for _ in range(_ROUNDS):
        likeness = columns @ F.normalize(centres, dim=-1).T  # [n, E]
        best = likeness.topk(2, dim=-1).values if num_clusters > 1 else likeness.expand(-1, 2)
        room = [size] * num_clusters
        for neuron in (best[:, 0] - best[:, 1]).argsort(descending=True).tolist():
            for cluster in likeness[neuron].argsort(descending=True).tolist():
                if room[cluster]:
                    room[cluster] -= 1
                    assigned[neuron] = cluster
                    break
        centres = torch.stack([columns[assigned == c].mean(dim=0) for c in range(num_clusters)])
    return [(assigned == cluster).nonzero()[:, 0] for cluster in range(num_clusters)]


def expert_activity(activity: Tensor, order: Tensor, shared_size: int, num_experts: int) -> Tensor:
    """Each routed expert's activity, ``[T, F] -> [T, E]``: the root of its neurons' summed squares."""
    routed = activity[:, order[shared_size:]].unflatten(-1, (num_experts, -1))
    return routed.square().sum(dim=-1).sqrt()


def fit_router(inputs: Tensor, scores: Tensor, ridge: float = 1e-2) -> Tensor:
    """A router in closed form: ridge regression from the block's input to the experts' scores, ``[E, D]``.

    Args:
        inputs: ``[T, D]``. scores: ``[T, E]``, such as :func:`expert_activity`'s.
    """
    x, y = inputs.double(), scores.double()
    y = (y - y.mean(dim=1, keepdim=True)) / y.std()
    gram = x.T @ x
    damping = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    router = torch.linalg.solve(gram + damping, x.T @ y).T
    return (_START * router).float()


def neuron_experts(order: Tensor, shared_size: int, num_experts: int) -> Tensor:
    """Which expert each neuron belongs to, ``int64 [F]``: 0 for the shared one, ``e + 1`` for expert ``e``."""
    routed = (len(order) - shared_size) // num_experts
    numbers = torch.cat(
        (torch.zeros(shared_size), torch.arange(1, num_experts + 1).repeat_interleave(routed))
    )
    experts = torch.empty(len(order), dtype=torch.long)
    experts[order] = numbers.long()
    return experts
