"""One model description for all families, read from an HF ``config.json`` or GGUF metadata."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engine.errors import ModelFileError


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
class ExpertConfig:
    """The experts of a mixture-of-experts model, alike in all its sparse layers."""

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    normalize_weights: bool  # the chosen experts' probabilities are scaled to sum to 1
    shared_intermediate_size: int = 0  # of an expert that every token goes through; 0: none
    dense_layers: frozenset[int] = frozenset()  # layers with a plain feed-forward block

    def __post_init__(self) -> None:
        if not 1 <= self.num_experts_per_tok <= self.num_experts or self.intermediate_size < 1:
            raise ModelFileError(
                f"The model's description chooses {self.num_experts_per_tok} of {self.num_experts} experts of size "
                f"{self.intermediate_size}; download the model again."
            )

    @property
    def active_size(self) -> int:
        """The feed-forward size that one token goes through."""
        return self.num_experts_per_tok * self.intermediate_size + self.shared_intermediate_size

    @property
    def total_size(self) -> int:
        """The feed-forward size of all experts of a layer together."""
        return self.num_experts * self.intermediate_size + self.shared_intermediate_size


@dataclass(frozen=True)
class Multipliers:
    """Constants that Granite multiplies with. The loader folds them into the weights."""

    embedding: float = 1.0
    query: float = 1.0
    residual: float = 1.0
    logits: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and switches of a decoder. Sizes are counts of elements."""

    model_type: str  # as transformers calls it
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
    qk_norm_whole: bool = False  # over all heads at once (OLMoE) instead of each
    qkv_clip: float | None = None
    sliding_windows: tuple[int | None, ...] = ()  # per layer; empty: full attention everywhere
    experts: ExpertConfig | None = None
    multipliers: Multipliers = Multipliers()

    def sliding_window(self, layer: int) -> int | None:
        return self.sliding_windows[layer] if self.sliding_windows else None

    def matrix_shapes(self) -> tuple[tuple[int, int], ...]:
        """``(outputs, inputs)`` of a dense layer's matrices qkv, o, gate and up, down, and of the head."""
        heads = self.num_heads * self.head_dim
        return (
            (heads + 2 * self.num_kv_heads * self.head_dim, self.hidden_size),
            (self.hidden_size, heads),
            (2 * self.intermediate_size, self.hidden_size),
            (self.hidden_size, self.intermediate_size),
            (self.vocab_size, self.hidden_size),
        )

    def all_matrix_shapes(self) -> set[tuple[int, int]]:
        """Every shape of a packed matrix in the model."""
        qkv, o, gate_up, down, head = self.matrix_shapes()
        if self.experts is None:
            return {qkv, o, gate_up, down, head}
        sizes = self.feed_forward_sizes
        inner = {(2 * size, self.hidden_size) for size in sizes} | {
            (self.hidden_size, size) for size in sizes
        }
        return {qkv, o, head} | inner

    @property
    def feed_forward_sizes(self) -> set[int]:
        """The inner sizes of all feed-forward blocks and experts."""
        experts = self.experts
        if experts is None:
            return {self.intermediate_size}
        sizes = {experts.intermediate_size, experts.shared_intermediate_size} - {0}
        return sizes | ({self.intermediate_size} if experts.dense_layers else set())

    def is_sparse(self, layer: int) -> bool:
        """Whether the layer has experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads
