"""What a layer's state tells of routers that have not been asked yet: linear maps, fitted in closed form.

The accelerated stream transforms a state into one that a later layer would have (M2R2, arXiv 2502.02040), so that the
later router can read it. A router is linear; so where nothing but its choice is wanted, the best linear transformation
before it is a ridge regression to its logits, costs no pass through any layer, and is fitted without descent. That is
all our choice. Two maps a layer:

* ``ahead``, read at the layer before: what the router is going to say for this token.
* ``again``, read at the layer itself: what its router is going to say for the *next* token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.models.config import ModelConfig
from engine.models.decoder import Decoder, rms_norm
from engine.models.feed_forward import MixtureOfExperts
from engine.residuals.accelerator import unit_rms

_RIDGE = 2e-3  # damping, in units of the states' mean square


class RouterMaps(nn.Module):
    """The maps of all layers with experts, float32; zero, and of no use, before they are fitted.

    Attributes:
        sparse: the layers with experts; maps are in their order.
        ahead, again: ``[layers with experts, E, D + 1]``, with a bias.
        ahead_error, again_error: of each map, the standard deviation of what it leaves unexplained, ``[layers]``.
    """

    ahead: Tensor
    again: Tensor
    ahead_error: Tensor
    again_error: Tensor

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        assert model.experts is not None
        self.eps = model.norm_eps
        self.sparse = [layer for layer in range(model.num_layers) if model.is_sparse(layer)]
        shape = len(self.sparse), model.experts.num_experts, model.hidden_size + 1
        for name in ("ahead", "again"):
            self.register_buffer(name, torch.zeros(shape))
            self.register_buffer(f"{name}_error", torch.zeros(shape[0]))

    @property
    def fitted(self) -> bool:
        """Whether the maps say anything."""
        return bool((self.again_error > 0).all())

    def inputs(self, state: Tensor) -> Tensor:
        """What the maps take of states between a layer's attention and its feed-forward part: ``[..., D]`` ->
        float32 ``[..., D + 1]``."""
        x = unit_rms(state.float(), self.eps)
        return torch.cat((x, x.new_ones(*x.shape[:-1], 1)), dim=-1)


def router_logits(decoder: Decoder, layer: int, state: Tensor) -> Tensor:
    """What the router of ``layer`` makes of a state between attention and feed-forward part: ``[..., D] -> [..., E]``."""
    weights = decoder.layers[layer]
    assert isinstance(weights.ffn, MixtureOfExperts)
    normed = rms_norm(state, weights.mlp_norm, decoder.config.norm_eps)
    return F.linear(normed, weights.ffn.router.to(normed.dtype))


class RouterFit:
    """Ridge regression to the routers' logits, each row's less their mean, which decides nothing.

    Args:
        layers: whose maps are fitted; None: all. Each takes ``D ** 2`` floats of memory.

    Attributes:
        sources: the layers whose states are needed.
    """

    def __init__(self, maps: RouterMaps, layers: Sequence[int] | None = None) -> None:
        self._maps, self._layers = maps, maps.sparse if layers is None else list(layers)
        _, num_experts, size = maps.ahead.shape
        self.sources = sorted(
            {layer - back for layer in self._layers for back in (0, 1) if layer - back >= 0}
        )
        self._count = torch.zeros(2)  # rows, and rows that have a next one
        self._gram = torch.zeros(len(self.sources), size, size)
        self._cross = torch.zeros(2, len(self._layers), num_experts, size)
        self._squares = torch.zeros(2, len(self._layers))

    @torch.no_grad()
    def add(self, states: Mapping[int, Tensor], logits: Mapping[int, Tensor], lengths: Tensor) -> None:
        """Count some sequences.

        Args:
            states: of the source layers between their attention and their feed-forward part, ``[B, T, D]``.
            logits: of the fitted layers' routers, ``[B, T, E]``.
            lengths: of the sequences, int ``[B]``.
        """
        maps, place = self._maps, torch.arange(states[self.sources[0]].shape[1])
        inside, followed = place < lengths[:, None], place < lengths[:, None] - 1
        self._count += torch.stack((inside.sum(), followed.sum()))
        rows = {layer: maps.inputs(states[layer]) for layer in self.sources}
        for gram, x in zip(self._gram, rows.values(), strict=True):
            gram += x[inside].T @ x[inside]
        for number, layer in enumerate(self._layers):
            own = logits[layer].float()
            own = own - own.mean(dim=-1, keepdim=True)
            pairs = [(rows[layer][followed], own.roll(-1, dims=1)[followed])]
            pairs.insert(0, (rows[layer - 1][inside], own[inside]) if layer else pairs[0])
            for kind, (x, y) in enumerate(pairs):
                self._cross[kind, number] += y.T @ x
                self._squares[kind, number] += y.square().sum()

    @torch.no_grad()
    def solve(self) -> None:
        """Put the solution into the maps."""
        maps, rows = self._maps, float(self._count[0])
        for kind, (solution, error) in enumerate(
            ((maps.ahead, maps.ahead_error), (maps.again, maps.again_error))
        ):
            share = (
                float(self._count[kind]) / rows
            )  # of the rows that the products with logits were counted over
            for number, layer in enumerate(self._layers):
                source = layer - 1 if kind == 0 and layer else layer
                gram = self._gram[self.sources.index(source)].double()
                damped = gram + _RIDGE * rows * torch.eye(len(gram), dtype=gram.dtype)
                cross = self._cross[kind, number].double() / share
                found = torch.linalg.solve(damped, cross.T).T
                left = float(self._squares[kind, number]) / share - float(
                    (2 * found * cross - found * (found @ gram)).sum()
                )
                place = maps.sparse.index(layer)
                solution[place] = found.float()
                error[place] = (max(left, 1e-9 * rows) / (rows * cross.shape[0])) ** 0.5

    def state(self) -> dict[str, Tensor]:
        """Everything counted so far."""
        return {"count": self._count, "gram": self._gram, "cross": self._cross, "squares": self._squares}

    def restore(self, saved: dict[str, Tensor], done: int) -> None:
        """Go on from what :meth:`state` gave."""
        for name, tensor in self.state().items():
            tensor.copy_(saved[name])
