"""The accelerated stream of a mixture-of-experts model: it runs ahead of the slow one and names experts.

M2R2 (arXiv 2502.02040) loads experts ahead of time by the accelerated residual stream; its public abstract says no
more, so what follows is our choice. The stream restarts every ``interval`` layers from the slow state. ``n`` layers
behind a restart it has travelled ``n`` layers' weights and should be where the slow stream will be after ``2 n``
(a rate of 2): there the router of layer ``l + n + 1`` reads it, while the slow stream is at layer ``l``. It attends
to the slow stream's keys and values, goes through the experts that the slow row has chosen, and has two low-rank
adapters a layer. With the adapters at zero it *is* the slow stream, and predicts as the later router does on the
present state.

For speculation there is also a *union map*: when a token has been drafted, its slow state behind the draft layers and
the exit state of the stream that drafted, which stands in for its final state, name experts of all layers that will
verify it. A linear map, fitted in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.models.config import ModelConfig
from engine.models.decoder import Decoder, rms_norm
from engine.models.feed_forward import MixtureOfExperts, Route
from engine.residuals.accelerator import LowRank, unit_rms
from engine.residuals.corpus import causal_attention
from engine.residuals.router_maps import RouterMaps, router_logits

_SPREAD = 2.0  # of router logits, at least, when their distributions are compared


@dataclass(frozen=True)
class ExpertStreamConfig:
    """Attributes:
    interval: layers between two restarts; odd, so that every layer is named once.
    rank: of the adapters.
    draft_depth: layers that a draft runs through, behind which the union map reads.
    """

    interval: int = 3
    rank: int = 32
    draft_depth: int = 3

    def since_restart(self, layer: int, first: int) -> int:
        """How many layers of weights the stream has behind it at ``layer``; ``first`` is where it begins."""
        return (layer - first) % self.interval


class StreamLayer(nn.Module):
    """Adapters of one layer, beside its attention and beside its feed-forward part."""

    def __init__(self, config: ModelConfig, rank: int) -> None:
        super().__init__()
        self.attention = LowRank(config.hidden_size, config.hidden_size, rank)
        self.ffn = LowRank(config.hidden_size, config.hidden_size, rank)


class ExpertStream(nn.Module):
    """All trained parameters of the stream, float32.

    Attributes:
        first: the first layer that it runs through, the one before the first with experts.
        sparse: the layers with experts.
        union: the union map, ``[sparse layers * E, 2 D]``.
        maps: what needs no stream, see :mod:`engine.residuals.router_maps`.
    """

    union: Tensor

    def __init__(self, config: ExpertStreamConfig, model: ModelConfig) -> None:
        super().__init__()
        self.config, self.model = config, model
        assert model.experts is not None
        self.sparse = [layer for layer in range(model.num_layers) if model.is_sparse(layer)]
        self.first = max(0, self.sparse[0] - 1)
        self.maps = RouterMaps(model)
        size = len(self.sparse) * model.experts.num_experts
        self.register_buffer("union", torch.zeros(size, 2 * model.hidden_size))
        self.layers = nn.ModuleList(
            StreamLayer(model, config.rank) for _ in range(self.first, model.num_layers)
        )

    def adapters(self, layer: int) -> StreamLayer:
        return cast(StreamLayer, self.layers[layer - self.first])

    def restarts(self, layer: int) -> bool:
        """Whether the stream begins anew at ``layer``, from the slow state before it."""
        return layer >= self.first and self.config.since_restart(layer, self.first) == 0

    def target(self, layer: int) -> int | None:
        """The layer whose experts the stream names at ``layer``; None if there is none such."""
        if layer < self.first:
            return None
        target = layer + self.config.since_restart(layer, self.first) + 1
        return target if target < self.model.num_layers and self.model.is_sparse(target) else None

    def union_logits(self, slow: Tensor, final: Tensor) -> Tensor:
        """For each layer with experts how much it will want each: ``[..., sparse layers, E]``.

        Args:
            slow: states behind the draft layers, ``[..., D]``.
            final: final or exit states of unit RMS, ``[..., D]``.
        """
        both = torch.cat((unit_rms(slow, self.model.norm_eps), final), dim=-1)
        return F.linear(both, self.union).unflatten(-1, (len(self.sparse), -1))


@dataclass(frozen=True)
class SlowPass:
    """The slow stream over whole sequences: what the accelerated one starts from, reads and should predict.

    Attributes:
        before: states before each layer, ``[B, T, D]``.
        middle: states between each layer's attention and its feed-forward part, ``[B, T, D]``.
        keys, values: per layer, rotated.
        routes: per layer, of all positions; None in dense layers.
        logits: per layer the router's, float32 ``[B, T, E]``; None in dense layers.
        shares: per layer the router's distribution, sharpened, ``[B, T, E]``; None in dense layers.
        sharpness: per layer, what logits are multiplied by before the softmax; 1 in dense layers.
        final: final states of unit RMS, ``[B, T, D]``.
    """

    before: list[Tensor]
    middle: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    routes: list[Route | None]
    logits: list[Tensor | None]
    shares: list[Tensor | None]
    sharpness: list[float]
    cos: Tensor
    sin: Tensor
    final: Tensor


@torch.no_grad()
def run_slow(decoder: Decoder, tokens: Tensor) -> SlowPass:
    """The model over ``tokens [B, T]``."""
    config = decoder.config
    decoder.rope.ensure(tokens.shape[1])
    cos, sin = decoder.rope.rows(torch.arange(tokens.shape[1], device=tokens.device)[None], decoder.dtype)
    hidden = decoder.embed(tokens)
    found = SlowPass([], [], [], [], [], [], [], [], cos, sin, hidden)
    for index, layer in enumerate(decoder.layers):
        found.before.append(hidden)
        q, k, v = decoder.project_qkv(index, rms_norm(hidden, layer.attn_norm, config.norm_eps), cos, sin)
        hidden = hidden + layer.o(causal_attention(q, k, v))
        found.middle.append(hidden)
        x = rms_norm(hidden, layer.mlp_norm, config.norm_eps)
        found.keys.append(k)
        found.values.append(v)
        if isinstance(layer.ffn, MixtureOfExperts):
            rows = x.flatten(0, -2)
            route = layer.ffn.route(rows)
            found.routes.append(route)
            logits = F.linear(x, layer.ffn.router.to(x.dtype)).float()
            # Which experts win counts, not how much they weigh: a router that hardly tells them apart in its
            # weights would teach nothing.
            sharpness = max(1.0, _SPREAD / float(logits.std(dim=-1).mean()))
            found.logits.append(logits)
            found.shares.append((sharpness * logits).softmax(dim=-1))
            found.sharpness.append(sharpness)
            hidden = hidden + layer.ffn.mix(rows, *route).view(x.shape)
        else:
            found.routes.append(None)
            found.logits.append(None)
            found.shares.append(None)
            found.sharpness.append(1.0)
            hidden = hidden + layer.ffn(x)
    return replace(found, final=unit_rms(hidden, config.norm_eps))


def run_stream(stream: ExpertStream, decoder: Decoder, slow: SlowPass) -> dict[tuple[int, int], Tensor]:
    """The stream at every position: router logits ``[B, T, E]`` by the layer where they are read and the layer
    that they are for."""
    config = decoder.config
    logits: dict[tuple[int, int], Tensor] = {}
    state = slow.before[stream.first]
    for index in range(stream.first, config.num_layers):
        if stream.restarts(index):
            state = slow.before[index]
        layer, adapters = decoder.layers[index], stream.adapters(index)
        x = rms_norm(state, layer.attn_norm, config.norm_eps)
        q, _, _ = decoder.project_qkv(index, x, slow.cos, slow.sin)
        attended = causal_attention(q, slow.keys[index], slow.values[index])
        state = state + layer.o(attended) + adapters.attention(x)
        target = stream.target(index)
        if target is not None:
            logits[index, target] = router_logits(decoder, target, state)
        if index + 1 < config.num_layers and not stream.restarts(index + 1):
            x = rms_norm(state, layer.mlp_norm, config.norm_eps)
            route = slow.routes[index]
            if route is not None:
                assert isinstance(layer.ffn, MixtureOfExperts)
                out = layer.ffn.mix(x.flatten(0, -2), *route).view(x.shape)
            else:
                out = layer.ffn(x)
            state = state + out + adapters.ffn(x)
    return logits


class UnionFit:
    """The union map in closed form: ridge regression to the logarithms of the routers' shares, each less its mean."""

    def __init__(self, stream: ExpertStream) -> None:
        self._stream = stream
        outputs, inputs = stream.union.shape
        self._gram = torch.zeros(inputs, inputs, dtype=torch.float64)
        self._cross = torch.zeros(inputs, outputs, dtype=torch.float64)

    def add(self, slow: SlowPass, inside: Tensor) -> None:
        """Count the positions ``inside``, bool ``[B, T]``."""
        stream = self._stream
        before = unit_rms(slow.before[stream.config.draft_depth][inside], stream.model.norm_eps)
        x = torch.cat((before, slow.final[inside]), dim=-1).double()
        shares = [slow.shares[layer] for layer in stream.sparse]
        logs = [share[inside].clamp(min=1e-6).log() for share in shares if share is not None]
        y = torch.cat([log - log.mean(dim=-1, keepdim=True) for log in logs], dim=-1).double()
        self._gram += x.T @ x
        self._cross += x.T @ y

    def solve(self, ridge: float = 1e-3) -> None:
        """Put the solution into the stream."""
        damping = ridge * self._gram.diagonal().mean() * torch.eye(len(self._gram)).to(self._gram)
        self._stream.union.copy_(torch.linalg.solve(self._gram + damping, self._cross).T.float())
