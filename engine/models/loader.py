"""Checkpoint -> packed decoder, one matrix at a time, so that the peak stays near the packed size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import OutOfMemoryError, UnsupportedModelError
from engine.models.checkpoint import Checkpoint, open_checkpoint
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder, DecoderWeights, LayerWeights
from engine.quantization import GroupQuantized, Linear, WeightFormat, get_format


def load_decoder(
    path: Path,
    weight_format: str,
    device: str | torch.device = "cpu",
    on_progress: Callable[[float], None] | None = None,
) -> Decoder:
    """Load the model at ``path`` (``.gguf`` or HF folder) packed as ``weight_format``.

    Args:
        on_progress: called with the share done, 0 to 1.

    Raises:
        ModelFileError, UnsupportedModelError, OutOfMemoryError.
    """
    target = torch.device(device)
    fmt = get_format(weight_format)
    if reason := fmt.unavailable(target):
        raise UnsupportedModelError(f"{weight_format} cannot be used here: {reason}")
    checkpoint = open_checkpoint(path)
    try:
        weights = _Packer(checkpoint, fmt, target).weights(on_progress or (lambda share: None))
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(
            f"{path.name} does not fit into the memory as {weight_format}; choose int4 or a smaller model."
        ) from error
    return Decoder(checkpoint.config, weights, fmt.activation_dtype, target)


class _Packer:
    """Reads, fuses and packs the matrices of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, fmt: WeightFormat, device: torch.device) -> None:
        self._checkpoint, self._format, self._device = checkpoint, fmt, device

    def weights(self, on_progress: Callable[[float], None]) -> DecoderWeights:
        config = self._checkpoint.config
        steps = config.num_layers + 1
        embedding = self._table()
        head_name = "model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
        lm_head = self._pack([head_name], None)
        on_progress(1 / steps)
        layers = []
        for index in range(config.num_layers):
            layers.append(self._layer(index, config))
            on_progress((index + 2) / steps)
        return DecoderWeights(embedding, tuple(layers), self._vector("model.norm.weight"), lm_head)

    def _layer(self, index: int, config: ModelConfig) -> LayerWeights:
        prefix = f"model.layers.{index}."

        def fused(*parts: str) -> Linear:
            names = [f"{prefix}{part}" for part in parts]
            return self._pack([f"{n}.weight" for n in names], [f"{n}.bias" for n in names])

        def norm(part: str) -> Tensor:
            return self._vector(f"{prefix}{part}.weight")

        return LayerWeights(
            attn_norm=norm("input_layernorm"),
            qkv=fused("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            o=fused("self_attn.o_proj"),
            mlp_norm=norm("post_attention_layernorm"),
            gate_up=fused("mlp.gate_proj", "mlp.up_proj"),
            down=fused("mlp.down_proj"),
            q_norm=norm("self_attn.q_norm") if config.qk_norm else None,
            k_norm=norm("self_attn.k_norm") if config.qk_norm else None,
        )

    def _pack(self, names: list[str], bias_names: list[str] | None) -> Linear:
        checkpoint = self._checkpoint
        bias = None
        if bias_names is not None and bias_names[0] in checkpoint:
            bias = torch.cat([checkpoint.tensor(name).float() for name in bias_names])
        weight: Tensor | GroupQuantized
        groups = [checkpoint.groups(name) for name in names] if self._format.name == "int4" else [None]
        if all(group is not None for group in groups):
            known = [group for group in groups if group is not None]
            weight = GroupQuantized(
                torch.cat([g.codes for g in known]),
                torch.cat([g.scale for g in known]),
                torch.cat([g.minimum for g in known]),
            )
        else:
            parts = [checkpoint.tensor(name) for name in names]
            weight = torch.cat(parts) if len(parts) > 1 else parts[0]  # one is not copied: a head is large
            del parts
        return self._format.pack(weight, bias, self._device)

    def _table(self) -> Tensor:
        table = self._checkpoint.tensor("model.embed_tokens.weight", self._format.activation_dtype)
        return table.to(self._device)

    def _vector(self, name: str) -> Tensor:
        wide = torch.float64 if self._format.activation_dtype == torch.float64 else torch.float32
        return self._checkpoint.tensor(name).to(device=self._device, dtype=wide)
