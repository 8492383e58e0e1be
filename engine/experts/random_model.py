"""Full-size mixture-of-experts models with random weights, for tests of memory, disk and bandwidth at true scale.

They write nonsense. Their shapes are those of published models; their routing is skewed, as trained models' is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.experts.blob import BlobLayout
from engine.experts.conversion import write_store
from engine.experts.model import layout_facts
from engine.experts.store import ExpertStore
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder, DecoderWeights, LayerWeights
from engine.models.families import config_from_hf
from engine.models.feed_forward import ExpertSource, FeedForward, MixtureOfExperts
from engine.progress import Progress
from engine.quantization import get_format
from engine.quantization.base import Linear
from engine.quantization.int4 import Int4Linear, packed_like
from engine.quantization.int4_layout import GROUP_SIZE

# From the config.json files of allenai/OLMoE-1B-7B-0924 and Qwen/Qwen3-30B-A3B.
SHAPES: dict[str, dict[str, Any]] = {
    "olmoe-1b-7b": {
        "model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
        "vocab_size": 50304, "norm_topk_prob": False, "max_position_embeddings": 4096, "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936, "norm_topk_prob": True,
        "max_position_embeddings": 40960, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
}  # fmt: skip
_VERSION = 1
_SKEW = 0.1  # spread of the logarithms of the routers' row lengths: longer rows win more often (our choice)
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class RandomModel:
    """A shape with a seed, int4."""

    config: ModelConfig
    seed: int = 0
    device: torch.device = _CPU

    @classmethod
    def of(cls, shape: str, seed: int = 0, device: str = "cpu", **changes: Any) -> RandomModel:
        """One of :data:`SHAPES`; ``changes`` override fields of its config.json."""
        return cls(config_from_hf({**SHAPES[shape], **changes}), seed, torch.device(device))

    @property
    def layout(self) -> BlobLayout:
        """Of its experts."""
        return BlobLayout.of(self.config, get_format("int4"), self.device)

    def store(
        self,
        file: Path,
        on_progress: Callable[[Progress], None] | None = None,
        cancel: threading.Event | None = None,
        direct: bool = False,
    ) -> ExpertStore:
        """The store of its experts, written at the first call.

        Raises:
            ExpertStoreError: the disk is full, or ``cancel`` was set.
        """
        config, layout = self.config, self.layout
        assert config.experts is not None
        about = {"random": _VERSION, "seed": self.seed, **layout_facts(layout, self.device)}
        layers = [layer for layer in range(config.num_layers) if config.is_sparse(layer)]
        write_store(
            file, self._expert, layers, config.experts.num_experts, layout, about, on_progress, cancel
        )
        return ExpertStore(file, layout, about, direct)

    def decoder(self, experts: Callable[[int], ExpertSource]) -> Decoder:
        """The model, its experts from ``experts``."""
        config, device = self.config, self.device
        generator = torch.Generator().manual_seed(self.seed)
        qkv, o, _, _, head = config.matrix_shapes()
        table = torch.empty(config.vocab_size, config.hidden_size, dtype=torch.bfloat16)
        for rows in table.split(8192):  # a float32 copy of the whole would count in the peak
            rows.copy_(torch.randn(rows.shape, generator=generator))

        def layer(index: int) -> LayerWeights:
            ones = torch.ones(config.hidden_size, device=device)
            norm_sizes = (
                qkv[0] - 2 * config.num_kv_heads * config.head_dim,
                config.num_kv_heads * config.head_dim,
            )
            sizes = norm_sizes if config.qk_norm_whole else (config.head_dim, config.head_dim)
            q_norm, k_norm = (
                (torch.ones(size, device=device) for size in sizes) if config.qk_norm else (None, None)
            )
            return LayerWeights(
                ones, self._matrix(qkv, generator), self._matrix(o, generator), ones,
                self._mixture(experts(index), generator), q_norm, k_norm,
            )  # fmt: skip

        layers = tuple(layer(index) for index in range(config.num_layers))
        final = torch.ones(config.hidden_size, device=device)
        weights = DecoderWeights(table.to(device), layers, final, self._matrix(head, generator))
        return Decoder(replace(config), weights, torch.bfloat16, device)

    def _mixture(self, source: ExpertSource, generator: torch.Generator) -> MixtureOfExperts:
        experts, hidden = self.config.experts, self.config.hidden_size
        assert experts is not None
        router = torch.randn(experts.num_experts, hidden, generator=generator) / hidden**0.5
        router *= (_SKEW * torch.randn(experts.num_experts, 1, generator=generator)).exp()
        return MixtureOfExperts(experts, router.bfloat16().to(self.device), source)

    def _expert(self, layer: int, number: int) -> FeedForward:
        assert self.config.experts is not None
        size, hidden = self.config.experts.intermediate_size, self.config.hidden_size
        generator = torch.Generator().manual_seed(
            hash((self.seed, layer, number))
        )  # of integers: always the same
        return FeedForward(
            self._matrix((2 * size, hidden), generator, _CPU), self._matrix((hidden, size), generator, _CPU)
        )

    def _matrix(
        self, shape: tuple[int, int], generator: torch.Generator, place: torch.device | None = None
    ) -> Linear:
        """Random codes, as many as a trained matrix would have; packing real weights would take hours."""
        rows, columns = shape
        packed = torch.randint(0, 1 << 62, (rows * columns // 16,), generator=generator)
        spread = 1 / (4.6 * columns**0.5)  # uniform codes have a deviation of 4.6
        scales = torch.full((columns // GROUP_SIZE, rows, 2), spread, dtype=torch.bfloat16)
        scales[..., 1] = spread / 2  # codes have the mean 7.5
        like, dtype = packed_like(rows, columns, self.device)
        place = place or self.device
        return Int4Linear(packed.view(dtype).view(like).to(place), scales.to(place), columns, rows)
