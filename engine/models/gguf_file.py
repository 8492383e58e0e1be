"""GGUF: reading the file, its metadata as a ``ModelConfig``, its tensors, and its 4-bit blocks unrequantized.

The ``gguf`` package parses and dequantizes; only the code-by-code path into 4-bit groups is our own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import ModelFileError, UnsupportedModelError
from engine.mapped_files import map_file
from engine.models.config import ExpertConfig, ModelConfig, Multipliers, RopeConfig
from engine.models.expert_names import split_index
from engine.models.gguf_header import TensorEntry, read_header
from engine.quantization.base import GroupQuantized

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: ``shape`` in GGUF order (innermost first), ``data`` the mapped bytes of its rows."""

    shape: tuple[int, ...]
    tensor_type: Any  # gguf.GGMLQuantizationType
    data: np.ndarray


def _locate(entry: TensorEntry, file: np.ndarray) -> GgufTensor:
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(entry.type_id)
    except ValueError:
        raise UnsupportedModelError(
            f"The tensor {entry.name} has the type {entry.type_id}, which cannot be read; "
            "choose another quantization of this model."
        ) from None
    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = math.prod(entry.shape)
    num_bytes = count // block * size
    if entry.offset + num_bytes > len(file) or count % block:
        raise ValueError("cut off")
    data = file[entry.offset : entry.offset + num_bytes]
    plain = {"F32": np.float32, "F16": np.float16, "F64": np.float64}.get(kind.name)
    rows = data.view(plain) if plain else data
    return GgufTensor(entry.shape, kind, rows.reshape(*reversed(entry.shape[1:]), -1))


# Architecture in GGUF -> in transformers, and whether its chosen experts' weights are normalised (llama.cpp's rule
# where the file does not say).
_ARCHITECTURES = {
    "llama": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False), "olmoe": ("olmoe", False),
    "qwen2moe": ("qwen2_moe", False), "qwen3moe": ("qwen3_moe", True), "granitemoe": ("granitemoe", True),
}  # fmt: skip


class GgufFile:
    """An opened, checked ``.gguf`` file, memory-mapped.

    Raises:
        ModelFileError: missing, not a GGUF, truncated or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        header = self._header = read_header(path)
        try:
            bytes_ = map_file(path)
            self.tensors = {entry.name: _locate(entry, bytes_) for entry in header.tensors.values()}
        except (ValueError, OverflowError, OSError) as error:
            raise ModelFileError(f"{path.name} is damaged or incomplete; download it again.") from error
        if not self.tensors:
            raise ModelFileError(f"{path.name} holds no weights; download it again.")

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value, or ``default``."""
        value = self._header.metadata.get(key)
        if isinstance(value, np.ndarray):
            value = value.tolist()
        return default if value is None else value

    def find(self, name: str) -> GgufTensor:
        """The tensor ``name``, or, of ``name[3]``, that matrix of a stack.

        Raises:
            ModelFileError: there are not so many.
        """
        whole, index = split_index(name)
        tensor = self.tensors[whole]
        if index is None:
            return tensor
        if len(tensor.shape) != 3 or index >= tensor.shape[2]:
            raise ModelFileError(
                f"{self.path.name} holds {whole} in the shape {tensor.shape}, too small for expert {index}; "
                "download it again."
            )
        return GgufTensor(tensor.shape[:2], tensor.tensor_type, tensor.data[index])

    def dequantize(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor as ``dtype`` (a copy), in row-major ``[N, K]``."""
        values = torch.empty(tuple(reversed(self.find(name).shape)), dtype=dtype)
        start = 0
        for piece in self.pieces(name):  # a piece at a time in float32
            values[start : start + len(piece)] = piece
            start += len(piece)
        return values

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The tensor in pieces of its rows, in order, float32."""
        import gguf

        tensor = self.find(name)
        inner = tensor.shape[-2::-1]  # of one row of rows
        try:
            for start in range(0, len(tensor.data), _ROWS_AT_ONCE):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    rows = tensor.data[start : start + _ROWS_AT_ONCE]
                    # As one long row: the package loops in Python over every sixteen of them.
                    piece = gguf.dequantize(rows.reshape(1, -1), tensor.tensor_type)
                yield torch.from_numpy(np.require(piece, np.float32, "W")).view(-1, *inner)
        except (NotImplementedError, KeyError) as error:
            raise UnsupportedModelError(
                f"{self.path.name} uses the tensor type {tensor.tensor_type.name}, which cannot be read; "
                "choose another quantization of this model."
            ) from error

    def groups(self, name: str) -> GroupQuantized | None:
        """4-bit groups of a Q4_0, Q4_1 or Q4_K matrix, code by code; None for other types."""
        tensor = self.find(name)
        unpack = _UNPACKERS.get(tensor.tensor_type.name)
        if unpack is None:
            return None
        rows = int(tensor.shape[1])
        codes, scale, minimum = unpack(np.asarray(tensor.data).reshape(rows, -1))
        return GroupQuantized(torch.from_numpy(codes), torch.from_numpy(scale), torch.from_numpy(minimum))


def _f16(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """``[..., n] -> [..., 2 n]``: all low halves, then all high halves, as ggml blocks keep them."""
    return np.concatenate((packed & 15, packed >> 4), axis=-1)


def _unpack_q4_0(data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    blocks = data.reshape(data.shape[0], -1, 18)  # f16 d, 16 bytes; w = d (q - 8)
    scale = _f16(blocks[..., :2])[..., 0]
    return _nibbles(blocks[..., 2:]).reshape(data.shape[0], -1), scale, -8 * scale


def _unpack_q4_1(data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    blocks = data.reshape(data.shape[0], -1, 20)  # f16 d, f16 m, 16 bytes; w = d q + m
    halves = _f16(blocks[..., :4])
    codes = _nibbles(blocks[..., 4:]).reshape(data.shape[0], -1)
    return codes, np.ascontiguousarray(halves[..., 0]), np.ascontiguousarray(halves[..., 1])


def _unpack_q4_k(data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # f16 d, f16 dmin, 12 bytes of eight 6-bit scales and minimums, 128 bytes; w = d sc q - dmin m
    rows = data.shape[0]
    blocks = data.reshape(rows, -1, 144)
    d, dmin = _f16(blocks[..., 0:2]), _f16(blocks[..., 2:4])
    packed = blocks[..., 4:16]
    low, middle, high = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scale = np.concatenate((low & 63, (high & 15) | ((low >> 6) << 4)), axis=-1)
    minimum = np.concatenate((middle & 63, (high >> 4) | ((middle >> 6) << 4)), axis=-1)
    quants = blocks[..., 16:].reshape(rows, -1, 4, 32)  # each 32 bytes: one sub-block low, the next high
    codes = np.stack((quants & 15, quants >> 4), axis=-2).reshape(rows, -1)
    return codes, (d * scale).reshape(rows, -1), (-dmin * minimum).reshape(rows, -1)


_UNPACKERS = {"Q4_0": _unpack_q4_0, "Q4_1": _unpack_q4_1, "Q4_K": _unpack_q4_k}


def config_from_gguf(file: GgufFile) -> ModelConfig:
    """The model description in the file's metadata.

    Raises:
        UnsupportedModelError: an architecture that the decoder does not run.
        ModelFileError: metadata are missing.
    """
    arch = file.get("general.architecture")
    if arch not in _ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.path.name} is a {arch} model, which this version cannot run from GGUF."
        )

    def need(key: str) -> Any:
        value = file.get(f"{arch}.{key}")
        if value is None:
            raise ModelFileError(f"{file.path.name} lacks the entry {arch}.{key}; download it again.")
        return value

    hidden, heads = int(need("embedding_length")), int(need("attention.head_count"))
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelFileError(f"{file.path.name} lacks its embedding table; download it again.")
    layers = int(need("block_count"))
    window = file.get(f"{arch}.attention.sliding_window")
    clip = file.get(f"{arch}.attention.clamp_kqv")
    experts = _experts_from_gguf(file, arch, need) if int(file.get(f"{arch}.expert_count", 0)) else None
    kind = _ARCHITECTURES[arch][0]
    return ModelConfig(
        model_type="mixtral" if experts is not None and kind == "llama" else kind,
        hidden_size=hidden,
        intermediate_size=int(need("feed_forward_length")),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=int(file.get(f"{arch}.attention.head_count_kv", heads)),
        head_dim=int(file.get(f"{arch}.attention.key_length", hidden // heads)),
        vocab_size=int(embedding.shape[1]),
        context_length=int(need("context_length")),
        norm_eps=float(need("attention.layer_norm_rms_epsilon")),
        rope=_rope_from_gguf(file, arch),
        tie_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        qk_norm_whole=arch == "olmoe",
        qkv_clip=float(clip) if clip else None,
        sliding_windows=(int(window),) * layers if window else (),
        experts=experts,
        multipliers=_multipliers_from_gguf(file, arch),
    )


def _experts_from_gguf(file: GgufFile, arch: str, need: Callable[[str], Any]) -> ExpertConfig:
    normalize = file.get(f"{arch}.expert_weights_norm")
    return ExpertConfig(
        num_experts=int(need("expert_count")),
        num_experts_per_tok=int(need("expert_used_count")),
        intermediate_size=int(
            file.get(f"{arch}.expert_feed_forward_length", 0) or need("feed_forward_length")
        ),
        normalize_weights=_ARCHITECTURES[arch][1] if normalize is None else bool(normalize),
        shared_intermediate_size=int(file.get(f"{arch}.expert_shared_feed_forward_length", 0)),
        dense_layers=frozenset(
            layer
            for layer in range(int(need("block_count")))
            if f"blk.{layer}.ffn_gate_inp.weight" not in file.tensors
        ),
    )


def _multipliers_from_gguf(file: GgufFile, arch: str) -> Multipliers:
    """Only Granite's files have them."""
    if arch != "granitemoe":
        return Multipliers()
    head_dim = int(file.get(f"{arch}.embedding_length")) // int(file.get(f"{arch}.attention.head_count"))
    head_dim = int(file.get(f"{arch}.attention.key_length", head_dim))
    return Multipliers(
        embedding=float(file.get(f"{arch}.embedding_scale") or 1.0),  # llama.cpp takes 0 for none
        query=float(file.get(f"{arch}.attention.scale") or head_dim**-0.5) * head_dim**0.5,
        residual=float(file.get(f"{arch}.residual_scale") or 1.0),
        logits=1 / float(file.get(f"{arch}.logit_scale") or 1.0),
    )


def _rope_from_gguf(file: GgufFile, arch: str) -> RopeConfig:
    theta = float(file.get(f"{arch}.rope.freq_base", 10000.0))
    factors = None
    if "rope_freqs.weight" in file.tensors:
        factors = tuple(file.dequantize("rope_freqs.weight").flatten().tolist())
    scaling: dict[str, Any] = {}
    kind = file.get(f"{arch}.rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        scaling = {"rope_type": kind, "factor": float(file.get(f"{arch}.rope.scaling.factor", 1.0))}
        trained = file.get(f"{arch}.rope.scaling.original_context_length")
        if trained:
            scaling["original_max_position_embeddings"] = int(trained)
    return RopeConfig(theta, scaling, factors)


def hf_names(num_layers: int) -> dict[str, str]:
    """HF tensor name -> GGUF tensor name."""
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "mlp.gate": "ffn_gate_inp",
        "mlp.experts.gate_proj": "ffn_gate_exps",  # these three are stacks
        "mlp.experts.up_proj": "ffn_up_exps",
        "mlp.experts.down_proj": "ffn_down_exps",
        "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
        "mlp.shared_expert.up_proj": "ffn_up_shexp",
        "mlp.shared_expert.down_proj": "ffn_down_shexp",
        "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    }
    for layer in range(num_layers):
        for hf, ggml in parts.items():
            for kind in ("weight", "bias"):
                names[f"model.layers.{layer}.{hf}.{kind}"] = f"blk.{layer}.{ggml}.{kind}"
    return names
