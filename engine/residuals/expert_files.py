"""Files of what names a mixture of experts' experts: safetensors and a JSON card that says for which model.

A file holds a whole :class:`ExpertStream`, or, of models that were too large to train one, its router maps alone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.atomic import replacing
from engine.errors import AdapterError
from engine.models.decoder import Decoder
from engine.residuals.adapter_file import SHIPPED, fingerprint, tuned_dir
from engine.residuals.expert_stream import ExpertStream, ExpertStreamConfig
from engine.residuals.router_maps import RouterMaps

FOLDER = "experts"  # beside the drafting accelerators
_MAPS = "maps."  # what the names of their tensors begin with
_log = logging.getLogger(__name__)


def find_stream(decoder: Decoder) -> ExpertStream | None:
    """The stream for this model: one tuned on this machine, else a shipped one, else None."""
    for path, card in _files_for(decoder):
        if "stream" in card:
            try:
                return load_stream(path, decoder)
            except AdapterError as error:
                _log.warning("%s cannot be used: %s", path.name, error)
    return None


def find_maps(decoder: Decoder) -> RouterMaps | None:
    """The router maps for this model, likewise; None as well if they say nothing."""
    for path, _ in _files_for(decoder):
        try:
            tensors = {
                name.removeprefix(_MAPS): tensor
                for name, tensor in _read(path).items()
                if name.startswith(_MAPS)
            }
            maps = RouterMaps(decoder.config)
            maps.load_state_dict(tensors)
        except (AdapterError, RuntimeError) as error:
            _log.warning("%s cannot be used: %s", path.name, error)
            continue
        if maps.fitted:
            return maps.requires_grad_(False)
    return None


def load_stream(path: Path, decoder: Decoder) -> ExpertStream:
    """The stream at ``path`` (``.safetensors`` with its card).

    Raises:
        AdapterError: it belongs to another model, or a file is missing or damaged.
    """
    try:
        card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if card["base_model"]["fingerprint"] != fingerprint(decoder):
            raise AdapterError(
                f"{path.name} was trained for {card['base_model']['name']}, which is not the loaded model."
            )
        stream = ExpertStream(ExpertStreamConfig(**card["stream"]), decoder.config)
        stream.load_state_dict(_read(path))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _damaged(path) from error
    return stream.requires_grad_(False)


def save_stream(
    path: Path, stream: ExpertStream, decoder: Decoder, name: str, training: Mapping[str, Any], measured: Any
) -> None:
    """Write ``path`` and its card, each atomically, the card last."""
    card = {"stream": asdict(stream.config), "training": training, "measured": measured}
    _save(path, stream.state_dict(), decoder, name, card)


def save_maps(
    path: Path, maps: RouterMaps, decoder: Decoder, name: str, training: Mapping[str, Any], measured: Any
) -> None:
    """Likewise, of maps alone."""
    tensors = {_MAPS + key: tensor for key, tensor in maps.state_dict().items()}
    _save(path, tensors, decoder, name, {"training": training, "measured": measured})


def read_measured(path: Path) -> str:
    """What a file's card says about its predictions, as text."""
    measured = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["measured"]
    recall = ", ".join(f"{name} {value:.1%}" for name, value in measured["recall_by_lookahead"].items())
    return f"Recall by lookahead: {recall}.\n{measured['note']}"


def read_recall(path: Path) -> float:
    """Of the experts that the next layer wants, the share that the maps of a file name."""
    measured = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["measured"]
    return float(measured["recall_by_lookahead"]["ridge_gate 1"])


def _files_for(decoder: Decoder) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The files of this model and their cards."""
    wanted = fingerprint(decoder)
    for folder in (tuned_dir() / FOLDER, SHIPPED / FOLDER):
        for path in sorted(folder.glob("*.json")):
            try:
                card = json.loads(path.read_text(encoding="utf-8"))
                if card["base_model"]["fingerprint"] == wanted:
                    yield path.with_suffix(".safetensors"), card
            except (OSError, ValueError, KeyError, TypeError) as error:
                _log.warning("%s cannot be used: %s", path.name, error)


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> AdapterError:
    return AdapterError(f"{path.name} is damaged or incomplete; fetch it again or tune the model again.")


def _save(
    path: Path, tensors: Mapping[str, Tensor], decoder: Decoder, name: str, card: dict[str, Any]
) -> None:
    from safetensors.torch import save

    content = {key: value.detach().bfloat16().contiguous() for key, value in tensors.items()}
    card = {"base_model": {"name": name, "fingerprint": fingerprint(decoder)}, **card}
    with replacing(path) as file:
        file.write(save(content))
    with replacing(path.with_suffix(".json")) as file:
        file.write((json.dumps(card, indent=1) + "\n").encode())
