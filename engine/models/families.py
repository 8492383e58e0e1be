"""HF ``config.json`` -> ``ModelConfig``, one function per family, found by ``model_type``."""

from __future__ import annotations

from typing import Any

from engine.errors import ModelFileError, UnsupportedModelError
from engine.models.config import ModelConfig, RopeConfig


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


_FAMILIES = {"llama": _llama, "mistral": _mistral, "qwen2": _qwen2, "qwen3": _qwen3}
