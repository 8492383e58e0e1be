"""HF ``config.json`` -> ``ModelConfig``, one function per family, found by ``model_type``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine.errors import ModelFileError, UnsupportedModelError
from engine.models.config import ExpertConfig, ModelConfig, Multipliers, RopeConfig


def config_from_hf(raw: dict[str, Any]) -> ModelConfig:
    """The model description in an HF ``config.json``.

    Raises:
        UnsupportedModelError: an architecture that the decoder does not run.
        ModelFileError: an entry is missing.
    """
    if not isinstance(raw, dict):
        raise ModelFileError("The model's config.json is damaged; download the model again.")
    kind = raw.get("model_type")
    if kind not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        raise UnsupportedModelError(f"The architecture {kind!r} is not one the fast decoder knows ({known}).")
    try:
        return _FAMILIES[kind](raw)
    except KeyError as error:
        raise ModelFileError(f"The model's config.json lacks {error}; download the model again.") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelFileError("The model's config.json is damaged; download the model again.") from error


def _common(raw: dict[str, Any], **switches: Any) -> ModelConfig:
    heads = raw["num_attention_heads"]
    fields: dict[str, Any] = {
        "model_type": raw["model_type"],
        "hidden_size": raw["hidden_size"],
        "intermediate_size": raw["intermediate_size"],
        "num_layers": raw["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": raw.get("head_dim") or raw["hidden_size"] // heads,
        "vocab_size": raw["vocab_size"],
        "context_length": raw["max_position_embeddings"],
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "rope": _rope(raw),
        "tie_embeddings": raw.get("tie_word_embeddings", False),
    }
    return ModelConfig(**{**fields, **switches})


def _rope(raw: dict[str, Any]) -> RopeConfig:
    # transformers 5 writes rope_parameters (theta inside); older files have rope_scaling and rope_theta.
    scaling = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = scaling.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    # Phi-3's way of writing longrope; transformers lets it win, too.
    if trained := raw.get("original_max_position_embeddings"):
        scaling["original_max_position_embeddings"] = trained
    return RopeConfig(float(theta), scaling)


def _windows(raw: dict[str, Any]) -> tuple[int | None, ...]:
    layers, window = raw["num_hidden_layers"], raw.get("sliding_window")
    kinds = raw.get("layer_types")
    if kinds:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if not raw.get("use_sliding_window") or not window:
        return ()
    full = raw.get("max_window_layers", layers)
    return tuple(None if layer < full else window for layer in range(layers))


def _llama(raw: dict[str, Any]) -> ModelConfig:
    bias = raw.get("attention_bias", False)
    return _common(raw, qkv_bias=bias, output_bias=bias, mlp_bias=raw.get("mlp_bias", False))


def _mistral(raw: dict[str, Any]) -> ModelConfig:
    window = raw.get("sliding_window")
    return _common(raw, sliding_windows=(window,) * raw["num_hidden_layers"] if window else ())


def _qwen2(raw: dict[str, Any]) -> ModelConfig:
    return _common(raw, qkv_bias=True, sliding_windows=_windows(raw))


def _qwen3(raw: dict[str, Any]) -> ModelConfig:
    bias = raw.get("attention_bias", False)
    return _common(raw, qkv_bias=bias, output_bias=bias, qk_norm=True, sliding_windows=_windows(raw))


def _experts(raw: dict[str, Any], size: int, normalize: bool, **fields: Any) -> ExpertConfig:
    count = raw.get("num_experts") or raw["num_local_experts"]
    return ExpertConfig(count, raw["num_experts_per_tok"], size, normalize, **fields)


def _dense_layers(raw: dict[str, Any]) -> frozenset[int]:
    step, named = raw.get("decoder_sparse_step", 1), raw.get("mlp_only_layers") or ()
    return frozenset(n for n in range(raw["num_hidden_layers"]) if n in named or (n + 1) % step)


def _mixtral(raw: dict[str, Any]) -> ModelConfig:
    return replace(_mistral(raw), experts=_experts(raw, raw["intermediate_size"], True))


def _olmoe(raw: dict[str, Any]) -> ModelConfig:
    bias = raw.get("attention_bias", False)
    experts = _experts(raw, raw["intermediate_size"], raw.get("norm_topk_prob", False))
    return _common(
        raw, qkv_bias=bias, output_bias=bias, qk_norm=True, qk_norm_whole=True, qkv_clip=raw.get("clip_qkv"),
        norm_eps=raw.get("rms_norm_eps", 1e-5), experts=experts,
    )  # fmt: skip


def _qwen2_moe(raw: dict[str, Any]) -> ModelConfig:
    experts = _experts(
        raw, raw["moe_intermediate_size"], raw.get("norm_topk_prob", False),
        shared_intermediate_size=raw["shared_expert_intermediate_size"], dense_layers=_dense_layers(raw),
    )  # fmt: skip
    return replace(_qwen2(raw), qkv_bias=raw.get("qkv_bias", True), experts=experts)


def _qwen3_moe(raw: dict[str, Any]) -> ModelConfig:
    normalize = raw.get("norm_topk_prob", False)
    experts = _experts(raw, raw["moe_intermediate_size"], normalize, dense_layers=_dense_layers(raw))
    return replace(_qwen3(raw), experts=experts)


def _granitemoe(raw: dict[str, Any]) -> ModelConfig:
    bias = raw.get("attention_bias", False)
    # The softmax of the best logits is what the renormalised softmax of all is.
    config = _common(
        raw, qkv_bias=bias, output_bias=bias, experts=_experts(raw, raw["intermediate_size"], True)
    )
    multipliers = Multipliers(
        embedding=raw.get("embedding_multiplier", 1.0),
        query=raw.get("attention_multiplier", 1.0) * config.head_dim**0.5,
        residual=raw.get("residual_multiplier", 1.0),
        logits=1 / raw.get("logits_scaling", 1.0),
    )
    return replace(config, multipliers=multipliers)


_FAMILIES = {
    "llama": _llama, "mistral": _mistral, "qwen2": _qwen2, "qwen3": _qwen3, "mixtral": _mixtral, "olmoe": _olmoe,
    "qwen2_moe": _qwen2_moe, "qwen3_moe": _qwen3_moe, "granitemoe": _granitemoe,
}  # fmt: skip
