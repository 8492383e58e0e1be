"""The accelerated residual stream: small trained adapters on the base model's own layers.

M2R2 (arXiv 2502.02040) runs an accelerated stream ``p`` beside the slow stream ``h``: the same layer
weights, low-rank accelerator adapters, and the slow stream's KV cache. The paper's public abstract
does not fix more than that; every detail below is our choice:

* ``p`` starts from the token's embedding plus a learned map of a *condition*: the final state of the
  previous token where it is verified, else the stream's own exit state of the previous draft.
* In a layer with experts it goes through those that the router has chosen for the slow row of the same token, with
  the same weights, so that it asks for no others; one adapter stands beside all of them.
* It travels layers ``0 .. depth - 1``, which the slow rows of the same tokens run in the same batch,
  so that their keys are complete.
* The exit joins ``p`` and the condition in one matrix, then the model's final norm; the LM head, cut
  to a draft vocabulary, gives the draft distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.models.config import ModelConfig
from engine.models.decoder import Decoder, rms_norm
from engine.models.feed_forward import MixtureOfExperts, Route


@dataclass(frozen=True)
class AcceleratorConfig:
    """What an accelerator looks like.

    Attributes:
        depth: layers that draft and slow rows share, ``0 .. depth - 1``; verification goes on from the slow rows there,
            if they are the model's own.
        rank: rank of every adapter; 0 for none (the exit alone is trained).
        conditioned: start and exit see the previous token's final (or exit) state.
        draft_vocab_size: how many of the most frequent tokens it is trained to draft.
    """

    depth: int = 4
    rank: int = 64
    conditioned: bool = True
    draft_vocab_size: int = 8192


class LowRank(nn.Module):
    """``x [..., K] -> [..., N]`` through a bottleneck of ``rank``; starts as zero."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, in_features) * in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))

    def add_to(self, out: Tensor, x: Tensor) -> None:
        """Add it to ``out [T, N]`` for ``x [T, K]`` of the adapter's own dtype, in place: one launch less on a GPU."""
        out.addmm_(F.linear(x, self.down), self.up.T)


class LayerAdapters(nn.Module):
    """The adapters of one layer on the path, in parallel with the base matrices: of a dense layer with each of
    them, of a layer with experts with the attention's and with all experts together."""

    def __init__(self, config: ModelConfig, index: int, rank: int) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.num_heads * config.head_dim
        self.q = LowRank(hidden, heads, rank)
        self.o = LowRank(heads, hidden, rank)
        if config.is_sparse(index):
            self.experts = LowRank(hidden, hidden, rank)
        else:
            self.gate_up = LowRank(hidden, 2 * config.intermediate_size, rank)
            self.down = LowRank(config.intermediate_size, hidden, rank)


class Accelerator(nn.Module):
    """All trained parameters of one accelerated stream, kept in float32.

    Attributes:
        draft_vocab: ``int64 [Vd]``, token ids that can be drafted, the most frequent first.
    """

    draft_vocab: Tensor

    def __init__(self, config: AcceleratorConfig, model: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = model
        hidden = model.hidden_size
        self.layers = nn.ModuleList(LayerAdapters(model, index, config.rank) for index in range(config.depth))
        self.start = nn.Parameter(torch.zeros(hidden, hidden)) if config.conditioned else None
        # [D, 2 D]: the stream's own state, then the condition
        width = 2 * hidden if config.conditioned else hidden
        self.exit = nn.Parameter(torch.eye(hidden, width))
        self.register_buffer("draft_vocab", torch.arange(min(config.draft_vocab_size, model.vocab_size)))

    def begin(self, embedded: Tensor, condition: Tensor | None) -> Tensor:
        """State before the first layer, ``[..., D]``."""
        if self.start is None or condition is None:
            return embedded
        return embedded + F.linear(condition, self.start.to(embedded.dtype))

    def finish(self, decoder: Decoder, state: Tensor, condition: Tensor | None) -> Tensor:
        """Exit state ``[..., D]`` of unit RMS: what stands in for the model's own final state."""
        if self.config.conditioned and condition is not None:
            state = torch.cat((state, condition), dim=-1)
        mapped = F.linear(state, self.exit.to(state.dtype))
        return unit_rms(mapped, self.model.norm_eps)

    def queries(self, decoder: Decoder, index: int, state: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotated queries ``[B, T, Hq, hd]`` of layer ``index``; the stream has no keys and values of its own."""
        config, layer = self.model, decoder.layers[index]
        x = rms_norm(state, layer.attn_norm, config.norm_eps)
        mixed, width = layer.qkv(x), config.num_heads * config.head_dim
        mixed = torch.cat((mixed[..., :width] + self.adapters(index).q(x), mixed[..., width:]), dim=-1)
        return decoder.split_qkv(index, mixed, cos, sin)[0]

    def mix(
        self, decoder: Decoder, index: int, state: Tensor, attended: Tensor, route: Route | None
    ) -> Tensor:
        """The rest of layer ``index`` after attention: output projection and feed-forward part, with adapters.

        Args:
            route: what the router of a layer with experts has chosen for the slow rows.
        """
        layer, adapters = decoder.layers[index], self.adapters(index)
        state = state + layer.o(attended) + adapters.o(attended)
        x = rms_norm(state, layer.mlp_norm, self.model.norm_eps)
        if route is not None:
            assert isinstance(layer.ffn, MixtureOfExperts)
            return state + layer.ffn.mix(x.flatten(0, -2), *route).view(x.shape) + adapters.experts(x)
        gate, up = (layer.dense.gate_up(x) + adapters.gate_up(x)).chunk(2, dim=-1)
        inner = F.silu(gate) * up
        return state + layer.dense.down(inner) + adapters.down(inner)

    def adapters(self, index: int) -> LayerAdapters:
        return cast(LayerAdapters, self.layers[index])

    def draft_head(self, decoder: Decoder) -> Tensor:
        """LM head rows of the draft vocabulary, the final norm's gain folded in: ``[Vd, D]``."""
        rows = decoder.weights.lm_head.dequantize()[self.draft_vocab.to(decoder.device)]
        return (rows * decoder.weights.final_norm).to(decoder.dtype)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """RMSNorm without a gain: the form in which final and exit states condition the stream."""
    return rms_norm(x, torch.ones((), device=x.device).expand(x.shape[-1]), eps)
