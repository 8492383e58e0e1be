"""Tiny random models as GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.tiny import MOE_FAMILIES

_PARTS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "block_sparse_moe.router": "ffn_gate_inp", "block_sparse_moe.gate": "ffn_gate_inp",
}  # fmt: skip

_ARCHITECTURES = {"mistral": "llama", "mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}


def gguf_name(name: str) -> str:
    """A tensor's name in GGUF from its name in HF."""
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, kind = name.rsplit(".", 1)
    if stem in whole:
        return f"{whole[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_PARTS[part]}.{kind}"


def save_gguf(path: Path, model: Any, kind: str = "F32", extra: dict[str, Any] | None = None) -> Path:
    """Write a transformers ``model`` of ours as a GGUF file whose matrices have the type ``kind``.

    Args:
        extra: further metadata under the architecture's prefix; numbers and strings.
    """
    config, quantization = model.config, gguf.GGMLQuantizationType[kind]
    arch = _ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, arch)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.model_type in MOE_FAMILIES:
        _add_experts(writer, config)
    for key, value in (extra or {}).items():
        adder = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        adder(f"{arch}.{key}", value)
    for name, parameter in model.state_dict().items():
        if ".experts." in name:
            _add_stacks(writer, name, parameter.float().numpy(), quantization)
            continue
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = parameter.float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, count in heads.items():
            if arch in ("llama", "granitemoe") and f".{part}." in name:
                values = _interleave(values, count)
        if values.ndim == 2:
            writer.add_tensor(gguf_name(name), gguf.quantize(values, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_experts(writer: Any, config: Any) -> None:
    writer.add_expert_count(getattr(config, "num_experts", None) or config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if size := getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(size)
    if config.model_type == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if config.model_type == "granitemoe":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def _add_stacks(writer: Any, name: str, values: np.ndarray, kind: Any) -> None:
    layer = name.split(".")[2]
    parts = (
        {"down": values}
        if "down" in name
        else dict(zip(("gate", "up"), np.split(values, 2, axis=1), strict=True))
    )
    for part, stack in parts.items():
        data = gguf.quantize(np.ascontiguousarray(stack), kind)
        writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.weight", data, raw_dtype=kind)


def _interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp keeps the two numbers of a rotary pair side by side."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random bytes of a quantized matrix ``[rows, bytes]``, with scales that are finite and moderate.

    The ``gguf`` package quantizes to a few types only; any bytes are valid codes of the others.
    """
    quantization = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quantization]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows * columns // block, size), dtype=np.uint8)
    # Where float16 scales lie in a block; a high byte of 0x2c is a number between 0.06 and 0.13.
    for at in _SCALES.get(kind, ()):
        blocks[:, at + 1] = 0x2C
    if kind == "IQ1_M":  # its float16 is spread over the high four bits of four words
        blocks[:, 49::2] = (blocks[:, 49::2] & 0x0F) | np.array([0x00, 0x00, 0xC0, 0x20], np.uint8)
    if kind == "BF16":
        blocks[:, 1] = 0x3D + blocks[:, 1] % 3  # numbers between 0.03 and 8
    if kind == "MXFP4":
        blocks[:, 0] = 120 + blocks[:, 0] % 8  # the exponent
    return blocks.reshape(rows, -1)


_SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,), "IQ2_XXS": (0,),
    "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip
