"""Checkpoint -> packed decoder, one matrix at a time, so that the peak stays near the packed size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from engine.errors import ModelFileError, OutOfMemoryError, UnsupportedModelError
from engine.mapped_files import check_mapped_files
from engine.models.checkpoint import Checkpoint, open_checkpoint
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder, DecoderWeights, LayerWeights
from engine.models.feed_forward import ExpertSource, FeedForward, MixtureOfExperts, ResidentExperts
from engine.quantization import GroupQuantized, Linear, WeightFormat, get_format
from engine.quantization.int4 import quantize_groups


def load_decoder(
    path: Path,
    weight_format: str,
    device: str | torch.device = "cpu",
    on_progress: Callable[[float], None] | None = None,
    experts: Callable[[int], ExpertSource] | None = None,
) -> Decoder:
    """Load the model at ``path`` (``.gguf`` or HF folder) packed as ``weight_format``.

    Args:
        on_progress: called with the share done, 0 to 1.
        experts: where the experts of a layer come from; None: all are packed and stay in memory.

    Raises:
        ModelFileError, UnsupportedModelError, OutOfMemoryError.
    """
    target = torch.device(device)
    fmt = get_format(weight_format)
    if reason := fmt.unavailable(target):
        raise UnsupportedModelError(f"{weight_format} cannot be used here: {reason}")
    checkpoint = open_checkpoint(path)
    try:
        weights = _Packer(checkpoint, fmt, target, experts).weights(on_progress or (lambda share: None))
        check_mapped_files()
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(
            f"{path.name} does not fit into the memory as {weight_format}; choose int4 or a smaller model."
        ) from error
    return Decoder(checkpoint.config, weights, fmt.activation_dtype, target)


def expert_packer(
    checkpoint: Checkpoint, fmt: WeightFormat, device: torch.device
) -> Callable[[int, int], FeedForward]:
    """A function that reads and packs one routed expert of a layer.

    Raises (the function): ModelFileError, UnsupportedModelError.
    """
    return _Packer(checkpoint, fmt, device).expert


Scale: TypeAlias = Tensor | None  # a factor for each output of a matrix


class _Packer:
    """Reads, fuses and packs the matrices of one checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        fmt: WeightFormat,
        device: torch.device,
        experts: Callable[[int], ExpertSource] | None = None,
    ) -> None:
        self._checkpoint, self._format, self._device = checkpoint, fmt, device
        self._sources = experts or self._all_experts

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
        final_norm = self._vector("model.norm.weight", config.hidden_size) * config.multipliers.logits
        return DecoderWeights(embedding, tuple(layers), final_norm, lm_head)

    def _layer(self, index: int, config: ModelConfig) -> LayerWeights:
        prefix = f"model.layers.{index}."
        qkv, o, gate_up, down, _ = config.matrix_shapes()
        scales = config.multipliers

        def fused(shape: tuple[int, int], has_bias: bool, *parts: str, scale: Scale = None) -> Linear:
            names = [f"{prefix}{part}" for part in parts]
            if not has_bias and f"{names[0]}.bias" not in self._checkpoint:
                return self._pack([f"{name}.weight" for name in names], [], shape, scale)
            return self._pack([f"{n}.weight" for n in names], [f"{n}.bias" for n in names], shape, scale)

        def norm(part: str, size: int) -> Tensor:
            return self._vector(f"{prefix}{part}.weight", size)

        def feed_forward() -> FeedForward:
            return FeedForward(
                fused(gate_up, config.mlp_bias, "mlp.gate_proj", "mlp.up_proj"),
                fused(down, config.mlp_bias, "mlp.down_proj", scale=_scale(scales.residual, down)),
            )

        qkv_parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        q_size, k_size = (queries, keys) if config.qk_norm_whole else (config.head_dim, config.head_dim)
        return LayerWeights(
            attn_norm=norm("input_layernorm", config.hidden_size),
            qkv=fused(qkv, config.qkv_bias, *qkv_parts, scale=_scale(scales.query, qkv, queries)),
            o=fused(o, config.output_bias, "self_attn.o_proj", scale=_scale(scales.residual, o)),
            mlp_norm=norm("post_attention_layernorm", config.hidden_size),
            ffn=self._experts(index, config) if config.is_sparse(index) else feed_forward(),
            q_norm=norm("self_attn.q_norm", q_size) if config.qk_norm else None,
            k_norm=norm("self_attn.k_norm", k_size) if config.qk_norm else None,
        )

    def _experts(self, index: int, config: ModelConfig) -> MixtureOfExperts:
        experts, names, hidden = config.experts, self._checkpoint.expert_names, config.hidden_size
        assert experts is not None and names is not None
        prefix = f"model.layers.{index}."
        shared = shared_gate = None
        if size := experts.shared_intermediate_size:
            part = "mlp.shared_expert."
            shared = self._block(
                prefix, (f"{part}gate_proj.weight", f"{part}up_proj.weight"), f"{part}down_proj.weight", size
            )
            if config.model_type == "qwen2_moe":
                shared_gate = self._plain(f"{prefix}mlp.shared_expert_gate.weight", (1, hidden))
        router = self._plain(prefix + names.router, (experts.num_experts, hidden))
        return MixtureOfExperts(experts, router, self._sources(index), shared, shared_gate)

    def _all_experts(self, index: int) -> ExpertSource:
        experts = self._checkpoint.config.experts
        assert experts is not None
        return ResidentExperts([self.expert(index, number) for number in range(experts.num_experts)])

    def expert(self, index: int, number: int) -> FeedForward:
        """One routed expert of layer ``index``, packed."""
        experts, names = self._checkpoint.config.experts, self._checkpoint.expert_names
        assert experts is not None and names is not None
        gate_up = tuple(name.format(number) for name in names.gate_up)
        prefix = f"model.layers.{index}."
        return self._block(prefix, gate_up, names.down.format(number), experts.intermediate_size)

    def _block(self, prefix: str, gate_up: tuple[str, ...], down: str, size: int) -> FeedForward:
        config = self._checkpoint.config
        wide, narrow = (2 * size, config.hidden_size), (config.hidden_size, size)
        return FeedForward(
            self._pack([prefix + name for name in gate_up], [], wide),
            self._pack([prefix + down], [], narrow, _scale(config.multipliers.residual, narrow)),
        )

    def _plain(self, name: str, shape: tuple[int, int]) -> Tensor:
        """A small matrix that is not packed."""
        matrix = self._checkpoint.tensor(name, self._format.activation_dtype)
        if matrix.dim() == 1:  # llama.cpp leaves a dimension of one out
            matrix = matrix[None]
        _check_shape([name], [matrix], shape)
        return matrix.to(self._device)

    def _pack(
        self, names: list[str], bias_names: list[str], shape: tuple[int, int], scale: Scale = None
    ) -> Linear:
        """Pack the matrices ``names``, joined along their outputs to ``shape``, each output times its scale."""
        checkpoint = self._checkpoint
        weight: Tensor | GroupQuantized
        if self._format.name == "int4" and self._format.misfit(*shape) is None:
            # Files mix types: what is stored in 4-bit groups goes in as it is, and only the rest is rounded.
            known = [checkpoint.groups(name) or quantize_groups(checkpoint.pieces(name)) for name in names]
            _check_shape(names, [group.codes for group in known], shape)
            factor = 1.0 if scale is None else scale[:, None]
            weight = GroupQuantized(
                torch.cat([g.codes for g in known]),
                torch.cat([g.scale for g in known]) * factor,
                torch.cat([g.minimum for g in known]) * factor,
            )
        else:
            parts = [checkpoint.tensor(name) for name in names]
            _check_shape(names, parts, shape)
            weight = torch.cat(parts) if len(parts) > 1 else parts[0]  # one is not copied: a head is large
            del parts
            if scale is not None:
                weight = (weight.float() * scale[:, None]).to(weight.dtype)
        bias = None
        if bias_names:
            biases = [checkpoint.tensor(name).float() for name in bias_names]
            _check_shape(bias_names, biases, shape[:1])
            bias = torch.cat(biases) if scale is None else torch.cat(biases) * scale
        return self._format.pack(weight, bias, self._device)

    def _table(self) -> Tensor:
        config, name = self._checkpoint.config, "model.embed_tokens.weight"
        table = self._checkpoint.tensor(name, self._format.activation_dtype)
        _check_shape([name], [table], (config.vocab_size, config.hidden_size))
        if config.multipliers.embedding != 1.0:
            table = (table.float() * config.multipliers.embedding).to(table.dtype)
        return table.to(self._device)

    def _vector(self, name: str, size: int) -> Tensor:
        dtype = self._format.activation_dtype
        if self._device.type == "cpu" and dtype != torch.float64:
            dtype = torch.float32  # as the kernels read it
        vector = self._checkpoint.tensor(name)
        _check_shape([name], [vector], (size,))
        return vector.to(device=self._device, dtype=dtype)


def _scale(factor: float, shape: tuple[int, int], rows: int | None = None) -> Scale:
    """``factor`` for the first ``rows`` outputs (None: all) of a matrix, 1 for the others; None if it is 1."""
    if factor == 1.0:
        return None
    scale = torch.ones(shape[0])
    scale[:rows] = factor
    return scale


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
