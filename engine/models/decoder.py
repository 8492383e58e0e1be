"""The decoder layer loop in torch: any device, any weight format.

It is the reference that faster kernels are tested against, and the prefill path. Layer ranges can be
run separately on several rows, which is what self-speculation needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.attention import PREFILL_BLOCK, Sight, attend, attend_prefill
from engine.models.config import ModelConfig
from engine.models.feed_forward import ExpertSource, FeedForward, MixtureOfExperts
from engine.models.kv_cache import KVCache
from engine.models.rope import RopeTable, rotate
from engine.quantization.base import Linear

PREFILL_CHUNK = 256  # prompt tokens between two looks at the stop flag


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. ``qkv`` is fused along the outputs."""

    attn_norm: Tensor  # [D]
    qkv: Linear  # [(Hq + 2 Hkv) hd, D]
    o: Linear  # [D, Hq hd]
    mlp_norm: Tensor  # [D]
    ffn: FeedForward | MixtureOfExperts
    q_norm: Tensor | None = None  # [hd], or [Hq hd] over all heads
    k_norm: Tensor | None = None  # [hd], or [Hkv hd]

    @property
    def dense(self) -> FeedForward:
        """The feed-forward block of a layer without experts."""
        assert isinstance(self.ffn, FeedForward)
        return self.ffn

    def matrices(self) -> tuple[Linear, ...]:
        """All packed matrices."""
        return self.qkv, self.o, *self.ffn.matrices()

    def small_tensors(self) -> tuple[Tensor, ...]:
        """Norms, routers and gates."""
        found = (self.attn_norm, self.mlp_norm, self.q_norm, self.k_norm, *self.ffn.small_tensors())
        return tuple(tensor for tensor in found if tensor is not None)


@dataclass(frozen=True)
class DecoderWeights:
    """All weights of a decoder. ``embedding`` is ``[V, D]``, or the tied head itself."""

    embedding: Tensor | Linear
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor  # [D]
    lm_head: Linear  # [V, D]


@dataclass(frozen=True)
class Place:
    """Where the rows of a call are, and what they see.

    Attributes:
        cos, sin: of the rotary embedding there.
        start: see :meth:`Decoder.run_layers`.
    """

    sight: Sight
    cos: Tensor
    sin: Tensor
    cache: KVCache
    start: int | None = None


@runtime_checkable
class PassWatch(Protocol):
    """What :attr:`Decoder.watch` may be besides: something whose work native code can do within a pass."""

    def begin_pass(self, rows: int) -> bool:
        """All layers are going to run as one piece of native code; False: this has to see each of them."""

    def end_pass(self, rows: int) -> None:
        """They have."""


class Decoder:
    """A decoder-only transformer of the llama lineage.

    Attributes:
        watch: called with a layer's number and the residual state ``[B, T, D]`` before its feed-forward part:
            what predicts experts looks on there. None: nobody does.
    """

    def __init__(
        self, config: ModelConfig, weights: DecoderWeights, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config = config
        self.weights = weights
        self.layers = weights.layers
        self.dtype = dtype
        self.device = device
        self.rope = RopeTable(config, device)
        self.watch: Callable[[int, Tensor], None] | None = None

    def with_experts(self, source: Callable[[int], ExpertSource]) -> Decoder:
        """A decoder on the same weights whose layers take their experts from ``source``."""
        layers = tuple(
            replace(layer, ffn=replace(layer.ffn, experts=source(index)))
            if isinstance(layer.ffn, MixtureOfExperts)
            else layer
            for index, layer in enumerate(self.layers)
        )
        return Decoder(self.config, replace(self.weights, layers=layers), self.dtype, self.device)

    def new_cache(self, capacity: int = 512, batch: int = 1) -> KVCache:
        """An empty KV cache in this decoder's dtype, on its device."""
        return KVCache(self.config, capacity, batch, self.dtype, self.device)

    def embed(self, ids: Tensor) -> Tensor:
        """``ids [B, T] -> [B, T, D]``."""
        table = self.weights.embedding
        assert isinstance(table, Tensor)
        return F.embedding(ids.to(table.device), table).to(device=self.device, dtype=self.dtype)

    def run_layers(
        self,
        hidden: Tensor,
        positions: Tensor,
        cache: KVCache,
        first: int,
        last: int,
        start: int | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        """Layers ``first .. last - 1`` on ``hidden [B, T, D]`` at ``positions [B, T]``.

        Keys and values are written into the cache at ``positions``, or in ``slots`` ``[B, T]`` (ensure room first); each
        row sees the slots before its position, and its own. ``cache.length`` is left alone: the caller decides what counts.
        A prefill of one sequence from position ``start`` on says so, and gets attention that does not
        depend on how the prompt is cut into chunks. (To find out how far the rows reach waits for a GPU;
        :meth:`run_layers_at` is told.)
        """
        farthest = int((positions if slots is None else slots).max())
        num_slots = min(cache.capacity, -(-(farthest + 1) // 16) * 16)
        self.rope.ensure(num_slots)
        return self.run_layers_at(
            self.place(Sight(positions, num_slots, slots), cache, start), hidden, first, last
        )

    def run_layers_at(self, place: Place, hidden: Tensor, first: int, last: int) -> Tensor:
        """As :meth:`run_layers`, of rows whose place is known."""
        for index in range(first, last):
            hidden = self._layer(index, hidden, place)
        return hidden

    def place(self, sight: Sight, cache: KVCache, start: int | None = None) -> Place:
        """For rows of this decoder; the rotary tables have to reach so far."""
        return Place(sight, *self.rope.rows(sight.positions, self.dtype), cache, start)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head: ``[..., D] -> [..., V]`` float32 (float64 for a float64 model)."""
        logits = self.weights.lm_head(self.final_state(hidden))
        return logits if logits.dtype == torch.float64 else logits.float()

    def final_state(self, hidden: Tensor) -> Tensor:
        """The normalised state that feeds the LM head, ``[..., D]``."""
        return rms_norm(hidden, self.weights.final_norm, self.config.norm_eps)

    def prefill(
        self,
        ids: Sequence[int],
        cache: KVCache,
        should_stop: Callable[[int], bool] | None = None,
        chunk: int = PREFILL_CHUNK,
    ) -> Tensor | None:
        """Append ``ids`` to the cache in chunks and return the last row's state ``[1, D]`` (None if stopped).

        ``should_stop`` is called after each chunk with the number of tokens done.
        """
        cache.ensure(cache.length + len(ids))
        hidden = None
        for begin in range(0, len(ids), chunk):
            part = torch.tensor([list(ids[begin : begin + chunk])], device=self.device)
            positions = torch.arange(cache.length, cache.length + part.shape[1], device=self.device)[None]
            start = cache.length if self.device.type == "cpu" else None
            hidden = self.run_layers(self.embed(part), positions, cache, 0, self.config.num_layers, start)
            cache.length += part.shape[1]
            if should_stop is not None and should_stop(begin + part.shape[1]):
                return None
        assert hidden is not None
        return hidden[0, -1:]

    def _layer(self, index: int, hidden: Tensor, place: Place) -> Tensor:
        hidden = self.attend(index, hidden, place)
        if self.watch is not None:
            self.watch(index, hidden)
        return hidden + self.layers[index].ffn(self.normed(index, hidden))

    def attend(self, index: int, hidden: Tensor, place: Place) -> Tensor:
        """Layer ``index`` up to its feed-forward part, ``[B, T, D] -> [B, T, D]``."""
        layer, config, cache, sight = self.layers[index], self.config, place.cache, place.sight
        x = rms_norm(hidden, layer.attn_norm, config.norm_eps)
        q, k, v = self.project_qkv(index, x, place.cos, place.sin)
        cache.write(index, sight.own, k, v)
        window = config.sliding_window(index)
        if place.start is None:
            mixed = attend(q, *cache.read(index, sight.num_slots), sight, window)
        else:
            reach = -(-sight.num_slots // PREFILL_BLOCK) * PREFILL_BLOCK
            mixed = attend_prefill(q, *cache.read(index, reach), place.start, window)
        return hidden + layer.o(mixed)

    def normed(self, index: int, hidden: Tensor) -> Tensor:
        """What the feed-forward part of layer ``index`` is given, from the state before it."""
        return rms_norm(hidden, self.layers[index].mlp_norm, self.config.norm_eps)

    def project_qkv(self, index: int, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed ``x [B, T, D]`` -> rotated q ``[B, T, Hq, hd]``, rotated k and plain v ``[B, T, Hkv, hd]``."""
        return self.split_qkv(index, self.layers[index].qkv(x), cos, sin)

    def split_qkv(self, index: int, mixed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`project_qkv`, from what the layer's projection gives, ``[B, T, (Hq + 2 Hkv) hd]``."""
        layer, config = self.layers[index], self.config
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        if layer.q_norm is None and config.qkv_clip is None:  # all that turns at once
            turning, v = mixed.unflatten(-1, (-1, config.head_dim)).split((sum(heads[:2]), heads[2]), dim=-2)
            q, k = rotate(turning, cos, sin).split(heads[:2], dim=-2)
            return q, k, v
        parts = mixed.split([n * config.head_dim for n in heads], dim=-1)
        if config.qk_norm_whole and layer.q_norm is not None and layer.k_norm is not None:
            q, k, v = parts
            q, k = rms_norm(q, layer.q_norm, config.norm_eps), rms_norm(k, layer.k_norm, config.norm_eps)
            parts = (q, k, v)
        if config.qkv_clip is not None:
            parts = tuple(part.clamp(-config.qkv_clip, config.qkv_clip) for part in parts)
        q, k, v = (part.unflatten(-1, (-1, config.head_dim)) for part in parts)
        if not config.qk_norm_whole and layer.q_norm is not None and layer.k_norm is not None:
            q, k = rms_norm(q, layer.q_norm, config.norm_eps), rms_norm(k, layer.k_norm, config.norm_eps)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one decoding step reads (the embedding table is only looked up)."""
        layers = sum(layer.qkv.nbytes + layer.o.nbytes + layer.ffn.step_bytes for layer in self.layers)
        return layers + self.weights.lm_head.nbytes


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, computed in float32 (float64 stays float64)."""
    if x.is_cuda:  # one fused kernel there; on CPU torch runs the same dozen operations as below
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight.to(x.dtype) * wide.to(x.dtype)
