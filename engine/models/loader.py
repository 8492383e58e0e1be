"""Checkpoint -> packed decoder, one matrix at a time, so that the peak stays near the packed size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import ModelFileError, OutOfMemoryError, UnsupportedModelError
from engine.models.checkpoint import Checkpoint, open_checkpoint
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder, DecoderWeights, LayerWeights
from engine.quantization import GroupQuantized, Linear, WeightFormat, get_format
from engine.quantization.int4 import quantize_groups


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
        head = config.matrix_shapes()[-1]
        lm_head = self._pack([head_name], [], head)
        on_progress(1 / steps)
        layers = []
        for index in range(config.num_layers):
            layers.append(self._layer(index, config))
            on_progress((index + 2) / steps)
        return DecoderWeights(
            embedding, tuple(layers), self._vector("model.norm.weight", config.hidden_size), lm_head
        )

    def _layer(self, index: int, config: ModelConfig) -> LayerWeights:
        prefix = f"model.layers.{index}."
        qkv, o, gate_up, down, _ = config.matrix_shapes()

        def fused(shape: tuple[int, int], has_bias: bool, *parts: str) -> Linear:
            names = [f"{prefix}{part}" for part in parts]
            if not has_bias and f"{names[0]}.bias" not in self._checkpoint:
                return self._pack([f"{name}.weight" for name in names], [], shape)
            return self._pack([f"{n}.weight" for n in names], [f"{n}.bias" for n in names], shape)

        def norm(part: str, size: int) -> Tensor:
            return self._vector(f"{prefix}{part}.weight", size)

        qkv_parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        return LayerWeights(
            attn_norm=norm("input_layernorm", config.hidden_size),
            qkv=fused(qkv, config.qkv_bias, *qkv_parts),
            o=fused(o, config.output_bias, "self_attn.o_proj"),
            mlp_norm=norm("post_attention_layernorm", config.hidden_size),
            gate_up=fused(gate_up, config.mlp_bias, "mlp.gate_proj", "mlp.up_proj"),
            down=fused(down, config.mlp_bias, "mlp.down_proj"),
            q_norm=norm("self_attn.q_norm", config.head_dim) if config.qk_norm else None,
            k_norm=norm("self_attn.k_norm", config.head_dim) if config.qk_norm else None,
        )

    def _pack(self, names: list[str], bias_names: list[str], shape: tuple[int, int]) -> Linear:
        """Pack the matrices ``names``, joined along their outputs to ``shape``."""
        checkpoint = self._checkpoint
        weight: Tensor | GroupQuantized
        if self._format.name == "int4" and self._format.misfit(*shape) is None:
            # Files mix types: what is stored in 4-bit groups goes in as it is, and only the rest is rounded.
            known = [checkpoint.groups(name) or quantize_groups(checkpoint.pieces(name)) for name in names]
            _check_shape(names, [group.codes for group in known], shape)
            weight = GroupQuantized(
                torch.cat([g.codes for g in known]),
                torch.cat([g.scale for g in known]),
                torch.cat([g.minimum for g in known]),
            )
        else:
            parts = [checkpoint.tensor(name) for name in names]
            _check_shape(names, parts, shape)
            weight = torch.cat(parts) if len(parts) > 1 else parts[0]  # one is not copied: a head is large
            del parts
        bias = None
        if bias_names:
            biases = [checkpoint.tensor(name).float() for name in bias_names]
            _check_shape(bias_names, biases, shape[:1])
            bias = torch.cat(biases)
        return self._format.pack(weight, bias, self._device)

    def _table(self) -> Tensor:
        config, name = self._checkpoint.config, "model.embed_tokens.weight"
        table = self._checkpoint.tensor(name, self._format.activation_dtype)
        _check_shape([name], [table], (config.vocab_size, config.hidden_size))
        return table.to(self._device)

    def _vector(self, name: str, size: int) -> Tensor:
        wide = torch.float64 if self._format.activation_dtype == torch.float64 else torch.float32
        vector = self._checkpoint.tensor(name)
        _check_shape([name], [vector], (size,))
        return vector.to(device=self._device, dtype=wide)


def _check_shape(names: list[str], parts: list[Tensor], shape: tuple[int, ...]) -> None:
    """Refuse weights that do not join, along the first dimension, to ``shape``.

    Raises:
        ModelFileError: they do not.
    """
    fits = all(part.shape[1:] == shape[1:] and part.dim() == len(shape) for part in parts)
    if not fits or sum(part.shape[0] for part in parts) != shape[0]:
        found = " and ".join(" x ".join(map(str, part.shape)) for part in parts)
        raise ModelFileError(
            f"The weight {names[0]} has the shape {found}, where the model's description asks for "
            f"{' x '.join(map(str, shape))}; download the model again."
        )
