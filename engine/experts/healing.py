"""Training what splitting leaves to be learnt: routers, and low-rank corrections that make up for absent experts.

Self-distillation: the split model learns to write as the dense one does, on the dense one's own text. In training a
layer computes all neurons and multiplies each by the weight of its expert for the token, 0 if it is not chosen: the
same function as a mixture of experts, and in large batches as fast as the dense block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.experts.splitting import (
    SplitConfig,
    expert_activity,
    fit_router,
    neuron_experts,
    order_neurons,
)
from engine.models.decoder import Decoder, rms_norm
from engine.residuals.accelerator import LowRank, unit_rms
from engine.residuals.corpus import causal_attention
from engine.residuals.training import Batch, run_teacher

_ROUTER_LOSS = 0.1  # weight of the term that pulls routers towards the experts that are most active
_NEAR = 0.3  # how sharply that term prefers the most active ones


class SplitLayer(nn.Module):
    """The trained part of one layer: router and corrections, float32.

    Attributes:
        order: the neurons as shared, expert 0, expert 1, ..., int64 ``[F]``.
        owner: the expert of each neuron, 0 for the shared one, int64 ``[F]``.
    """

    order: Tensor
    owner: Tensor

    def __init__(self, hidden: int, inner: int, config: SplitConfig) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Parameter(torch.zeros(config.num_experts, hidden))
        self.gate = LowRank(hidden, inner, config.rank)
        self.up = LowRank(hidden, inner, config.rank)
        self.down = LowRank(inner, hidden, config.rank)
        self.register_buffer("order", torch.arange(inner))
        self.register_buffer("owner", neuron_experts(self.order, config.shared_size, config.num_experts))

    def initialise(self, inputs: Tensor, activity: Tensor) -> None:
        """Group the neurons and fit the router, from the block's inputs ``[T, D]`` and its neurons' activity
        ``[T, F]``."""
        config = self.config
        self.order = order_neurons(activity, config.shared_size, config.num_experts)
        self.owner = neuron_experts(self.order, config.shared_size, config.num_experts)
        scores = expert_activity(activity, self.order, config.shared_size, config.num_experts)
        self.router.data = fit_router(inputs, scores)

    def forward(self, decoder: Decoder, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x [..., D]`` -> the block's output and this layer's router loss."""
        block, config = decoder.layers[index].dense, self.config
        gate, up = block.gate_up(x).chunk(2, dim=-1)
        inner = F.silu(gate + self.gate(x)) * (up + self.up(x))
        shares = F.linear(x, self.router).softmax(dim=-1)
        weights, chosen = shares.topk(config.num_experts_per_tok, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True) * config.num_experts_per_tok
        by_expert = torch.zeros_like(shares).scatter(-1, chosen, weights)
        by_expert = torch.cat((torch.ones_like(by_expert[..., :1]), by_expert), dim=-1)  # the shared one
        weighted = inner * by_expert[..., self.owner]
        with torch.no_grad():
            lengths = _row_lengths(decoder, index).to(inner)
            activity = expert_activity(
                (inner.abs() * lengths).flatten(0, -2), self.order, config.shared_size, config.num_experts
            )
            wanted = (activity / activity.mean(dim=-1, keepdim=True) / _NEAR).softmax(dim=-1)
        loss = -(wanted * shares.flatten(0, -2).clamp(min=1e-9).log()).sum(dim=-1).mean()
        return block.down(weighted) + self.down(weighted), loss


class SplitModel(nn.Module):
    """The trained parts of all split layers of a dense decoder."""

    def __init__(self, decoder: Decoder, config: SplitConfig) -> None:
        super().__init__()
        self.config, self.decoder = config, decoder
        shapes = decoder.config
        self.first = config.dense_layers
        self.layers = nn.ModuleList(
            SplitLayer(shapes.hidden_size, shapes.intermediate_size, config)
            for _ in range(config.dense_layers, shapes.num_layers)
        )

    def layer(self, index: int) -> SplitLayer:
        return cast(SplitLayer, self.layers[index - self.first])

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """``tokens [B, T]`` -> final states of unit RMS ``[B, T, D]``, and the mean router loss."""
        decoder, config = self.decoder, self.decoder.config
        decoder.rope.ensure(tokens.shape[1])
        cos, sin = decoder.rope.rows(torch.arange(tokens.shape[1])[None], decoder.dtype)
        hidden = decoder.embed(tokens)
        losses = []
        for index, layer in enumerate(decoder.layers):
            q, k, v = decoder.project_qkv(index, rms_norm(hidden, layer.attn_norm, config.norm_eps), cos, sin)
            hidden = hidden + layer.o(causal_attention(q, k, v))
            x = rms_norm(hidden, layer.mlp_norm, config.norm_eps)
            if index < self.first:
                hidden = hidden + layer.ffn(x)
            else:
                out, loss = self.layer(index)(decoder, index, x)
                hidden = hidden + out
                losses.append(loss)
        return unit_rms(hidden, config.norm_eps), torch.stack(losses).mean()

    def recipe(self) -> dict[str, Tensor]:
        """What :class:`engine.models.split_checkpoint.SplitCheckpoint` reads."""
        tensors = {}
        for index in range(self.first, self.decoder.config.num_layers):
            layer = self.layer(index)
            tensors[f"{index}.order"] = layer.order.short()
            tensors[f"{index}.router"] = layer.router.detach().bfloat16()
            for name in ("gate", "up", "down"):
                adapter = cast(LowRank, getattr(layer, name))
                tensors[f"{index}.{name}.a"] = adapter.down.detach().bfloat16()
                tensors[f"{index}.{name}.b"] = adapter.up.detach().bfloat16()
        return {name: tensor.contiguous() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Distillation:
    """The loss of a split model on batches of the dense model's text.

    Attributes:
        vocab: the tokens that are compared, the most frequent ones, int64 ``[V']``.
        head: the head's rows of them, the final norm's gain folded in, ``[V', D]``.
    """

    model: SplitModel
    vocab: Tensor
    head: Tensor

    @classmethod
    def over(cls, model: SplitModel, vocab: Tensor) -> Distillation:
        """Over the distribution of the tokens ``vocab``."""
        weights = model.decoder.weights
        return cls(model, vocab, weights.lm_head.dequantize()[vocab] * weights.final_norm)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss, and the share of positions whose most likely token is the dense model's."""
        tokens = batch.sequences.tokens.long()
        finals = batch.finals
        if finals is None:  # not kept: the disk budget did not hold them
            finals = run_teacher(self.model.decoder, tokens, 0).final
        inside = torch.arange(tokens.shape[1]) < batch.sequences.lengths[:, None] - 1
        states, router_loss = self.model(tokens)
        wanted = F.linear(finals[inside].float(), self.head).softmax(dim=-1)
        log_q = F.linear(states[inside], self.head).log_softmax(dim=-1)
        soft = -(wanted * log_q).sum(dim=-1).mean()
        agreement = (log_q.argmax(dim=-1) == wanted.argmax(dim=-1)).float().mean()
        return soft + _ROUTER_LOSS * router_loss, agreement.detach()


@torch.no_grad()
def initialise(model: SplitModel, batches: list[Batch], max_tokens: int) -> None:
    """Group neurons and fit routers layer by layer, on the dense model's own activations."""
    decoder, config = model.decoder, model.decoder.config
    collected: dict[int, list[Tensor]] = {index: [] for index in range(model.first, config.num_layers)}
    for batch in batches:
        tokens = batch.sequences.tokens.long()
        inside = torch.arange(tokens.shape[1]) < batch.sequences.lengths[:, None]
        decoder.rope.ensure(tokens.shape[1])
        cos, sin = decoder.rope.rows(torch.arange(tokens.shape[1])[None], decoder.dtype)
        hidden = decoder.embed(tokens)
        for index, layer in enumerate(decoder.layers):
            q, k, v = decoder.project_qkv(index, rms_norm(hidden, layer.attn_norm, config.norm_eps), cos, sin)
            hidden = hidden + layer.o(causal_attention(q, k, v))
            x = rms_norm(hidden, layer.mlp_norm, config.norm_eps)
            if index >= model.first:
                collected[index].append(x[inside])
            hidden = hidden + layer.ffn(x)
    for index, parts in collected.items():
        inputs = torch.cat(parts)[:max_tokens]
        gate, up = decoder.layers[index].dense.gate_up(inputs).chunk(2, dim=-1)
        activity = (F.silu(gate) * up).abs() * _row_lengths(decoder, index)
        model.layer(index).initialise(inputs, activity)


def _row_lengths(decoder: Decoder, index: int) -> Tensor:
    """The length of each neuron's column of the down matrix, ``[F]``."""
    return decoder.layers[index].dense.down.dequantize().norm(dim=0)
