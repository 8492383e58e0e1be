"""Accelerators on disk: a safetensors file, and beside it a JSON card that says what it belongs to.

The card names its base model by a fingerprint of what every file of that model shares, whatever its weight
format: the shapes, and the norm gains, which no format quantizes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from engine.errors import AdapterError
from engine.models.decoder import Decoder
from engine.paths import data_dir
from engine.residuals.accelerator import Accelerator, AcceleratorConfig

CARD_VERSION = 1
SHIPPED = Path(__file__).resolve().parents[2] / "assets" / "adapters"
log = logging.getLogger(__name__)


def tuned_dir() -> Path:
    """Where accelerators tuned on this machine are kept."""
    return data_dir() / "adapters"


def fingerprint(decoder: Decoder) -> str:
    """16 hex digits that tell models apart, but not the weight formats of one model."""
    config = decoder.config
    shape = (
        config.model_type, config.hidden_size, config.intermediate_size, config.num_layers, config.num_heads,
        config.num_kv_heads, config.head_dim, config.vocab_size,
        *([config.experts] if config.experts is not None else []),
    )  # fmt: skip
    digest = hashlib.sha256(repr(shape).encode())
    gains = [gain for layer in decoder.layers for gain in (layer.attn_norm, layer.mlp_norm)]
    for gain in (*gains, decoder.weights.final_norm):
        digest.update(gain.detach().float().bfloat16().cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def find_adapter(decoder: Decoder, folders: tuple[Path, ...] | None = None) -> Path | None:
    """The accelerator for this model: one tuned on this machine, else a shipped one, else None."""
    wanted = fingerprint(decoder)
    for folder in folders or (tuned_dir(), SHIPPED):
        for path in sorted(folder.glob("*.json")):
            try:
                card = read_card(path)
            except AdapterError as error:
                log.warning("%s", error)
                continue
            if _fits(card, wanted) and path.with_suffix(".safetensors").is_file():
                return path.with_suffix(".safetensors")
    return None


def read_card(path: Path) -> dict[str, Any]:
    """The card at ``path`` (or beside a ``.safetensors`` file).

    Raises:
        AdapterError: it is missing, damaged, or from another version of this program.
    """
    path = path.with_suffix(".json")
    try:
        card: Any = json.loads(path.read_text(encoding="utf-8"))
        if card["version"] != CARD_VERSION:
            raise AdapterError(f"{path.name} was written by another version; tune the model again.")
        AcceleratorConfig(**card["accelerator"])
        str(card["base_model"]["name"]), str(card["base_model"]["fingerprint"])
    except FileNotFoundError:
        raise AdapterError(
            f"The card {path.name} is missing beside the adapters; copy both files together."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"The card {path.name} cannot be read; fetch it again or tune the model again."
        ) from error
    result: dict[str, Any] = card
    return result


def _fits(card: dict[str, Any], wanted: str) -> bool:
    """Whether the card is of the model ``wanted``, or names it as one whose draft layers are the same weights, such
    as a model split into experts behind them."""
    base = card["base_model"]
    return wanted in (base["fingerprint"], *base.get("also_fits", ()))


def load_accelerator(path: Path, decoder: Decoder) -> Accelerator:
    """The accelerator at ``path`` (``.safetensors`` with its card), for this model.

    Raises:
        AdapterError: it belongs to another model, or a file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    card = read_card(path)
    base = card["base_model"]
    if not _fits(card, fingerprint(decoder)):
        raise AdapterError(f"{path.name} was trained for {base['name']}, which is not the loaded model.")
    accelerator = Accelerator(AcceleratorConfig(**card["accelerator"]), decoder.config)
    try:
        tensors = load_file(path)
        tensors["draft_vocab"] = tensors["draft_vocab"].long()
        vocabulary = tensors["draft_vocab"]
        if not 0 <= int(vocabulary.min()) <= int(vocabulary.max()) < decoder.config.vocab_size:
            raise ValueError("draft vocabulary")
        accelerator.load_state_dict(tensors)
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise AdapterError(
            f"{path.name} is damaged or incomplete; fetch it again or tune the model again."
        ) from error
    return accelerator.requires_grad_(False)


def save_accelerator(
    path: Path,
    accelerator: Accelerator,
    decoder: Decoder,
    base_model: str | dict[str, Any],
    training: dict[str, Any],
    measured: dict[str, Any],
) -> None:
    """Write ``path`` (``.safetensors``) and its card, each atomically, the card last.

    Args:
        base_model: its name, as people know it, or what another card says of it.
        training: data and settings. measured: greedy agreement by suite and draft position.

    Raises:
        OSError: there is no room.
    """
    from safetensors.torch import save

    tensors = {
        key: value.int() if key == "draft_vocab" else value.bfloat16().contiguous()
        for key, value in accelerator.state_dict().items()
    }
    if isinstance(base_model, str):
        base_model = {"name": base_model, "fingerprint": fingerprint(decoder)}
    card = {
        "version": CARD_VERSION,
        "base_model": base_model,
        "accelerator": asdict(accelerator.config),
        "training": training,
        "measured": measured,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, save(tensors))
    _write(path.with_suffix(".json"), (json.dumps(card, indent=1) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
