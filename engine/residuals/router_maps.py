"""What a layer's state tells of routers that have not been asked yet: linear maps, fitted in closed form.

The accelerated stream transforms a state into one that a later layer would have (M2R2, arXiv 2502.02040), so that the
later router can read it. A router is linear; so where nothing but its choice is wanted, the best linear transformation
before it is a ridge regression to its logits, costs no pass through any layer, and is fitted without descent. That is
all our choice. Two maps a layer:

* ``ahead``, read at the layer before: what the router is going to say for this token.
* ``again``, read at the layer itself: what its router is going to say for the *next* token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.models.config import ModelConfig
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


class RouterFit:
    """Ridge regression to the routers' logits, each row's less their mean, which decides nothing."""

    def __init__(self, maps: RouterMaps) -> None:
        self._maps = maps
        num_layers, num_experts, size = maps.ahead.shape
        self._sources = sorted(
            {layer - back for layer in maps.sparse for back in (0, 1) if layer - back >= 0}
        )
        self._count = torch.zeros(2)  # rows, and rows that have a next one
        self._gram = torch.zeros(len(self._sources), size, size)
        self._cross = torch.zeros(2, num_layers, num_experts, size)
        self._squares = torch.zeros(2, num_layers)

    @torch.no_grad()
    def add(self, states: list[Tensor], logits: list[Tensor | None], lengths: Tensor) -> None:
        """Count some sequences.

        Args:
            states: of each layer between its attention and its feed-forward part, ``[B, T, D]``.
            logits: of each layer's router, ``[B, T, E]``; None in dense layers.
            lengths: of the sequences, int ``[B]``.
        """
        maps, place = self._maps, torch.arange(states[0].shape[1])
        inside, followed = place < lengths[:, None], place < lengths[:, None] - 1
        self._count += torch.stack((inside.sum(), followed.sum()))
        rows = {layer: maps.inputs(states[layer]) for layer in self._sources}
        for gram, x in zip(self._gram, rows.values(), strict=True):
            gram += x[inside].T @ x[inside]
        for number, layer in enumerate(maps.sparse):
            own = logits[layer]
            assert own is not None
            own = own.float() - own.float().mean(dim=-1, keepdim=True)
            pairs = [(rows[layer][followed], own.roll(-1, dims=1)[followed])]
            pairs.insert(0, (rows[layer - 1][inside], own[inside]) if layer else pairs[0])
            for kind, (x, y) in enumerate(pairs):
                self._cross[kind, number] += y.T @ x
                self._squares[kind, number] += y.square().sum()

    @torch.no_grad()
    def solve(self) -> None:
        """Put the solution into the maps."""
        maps, rows = self._maps, float(self._count[0])
        grams = dict(zip(self._sources, self._gram.double(), strict=True))
        for kind, (solution, error) in enumerate(
            ((maps.ahead, maps.ahead_error), (maps.again, maps.again_error))
        ):
            share = (
                float(self._count[kind]) / rows
            )  # of the rows that the products with logits were counted over
            for number, layer in enumerate(maps.sparse):
                gram = grams[layer - 1 if kind == 0 and layer else layer]
                damped = gram + _RIDGE * rows * torch.eye(len(gram), dtype=gram.dtype)
                cross = self._cross[kind, number].double() / share
                found = torch.linalg.solve(damped, cross.T).T
                left = float(self._squares[kind, number]) / share - float(
                    (2 * found * cross - found * (found @ gram)).sum()
                )
                solution[number] = found.float()
                error[number] = (max(left, 1e-9 * rows) / (rows * cross.shape[0])) ** 0.5

    def state(self) -> dict[str, Tensor]:
        """Everything counted so far."""
        return {"count": self._count, "gram": self._gram, "cross": self._cross, "squares": self._squares}

    def restore(self, saved: dict[str, Tensor], done: int) -> None:
        """Go on from what :meth:`state` gave."""
        for name, tensor in self.state().items():
            tensor.copy_(saved[name])
