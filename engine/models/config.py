"""One model description for all dense families, read from an HF ``config.json`` or GGUF metadata."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base, rotated share of the head, and the scaling variant, if any.

    ``scaling`` holds the HF ``rope_parameters``/``rope_scaling`` entries (``rope_type`` in
    {default, linear, dynamic, llama3, yarn, longrope}); ``factors`` are per-frequency divisors
    that a GGUF stores ready-made (``rope_freqs.weight``).
    """

    theta: float = 10000.0
    scaling: dict[str, Any] = field(default_factory=dict)
    factors: tuple[float, ...] | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and switches of a dense decoder. Sizes are counts of elements."""

    model_type: str  # llama, mistral, qwen2, qwen3
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    norm_eps: float
    rope: RopeConfig
    tie_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()  # per layer; empty: full attention everywhere

    def sliding_window(self, layer: int) -> int | None:
        return self.sliding_windows[layer] if self.sliding_windows else None

    def matrix_shapes(self) -> tuple[tuple[int, int], ...]:
        """``(outputs, inputs)`` of a layer's matrices qkv, o, gate and up, down, and of the head."""
        heads = self.num_heads * self.head_dim
        return (
            (heads + 2 * self.num_kv_heads * self.head_dim, self.hidden_size),
            (self.hidden_size, heads),
            (2 * self.intermediate_size, self.hidden_size),
            (self.hidden_size, self.intermediate_size),
            (self.vocab_size, self.hidden_size),
        )

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads
