"""Packed weights kept on disk, so that a model that was loaded before is mapped instead of packed again.

Only for dense models in CPU formats that take long to pack. The files are named after all that they are made
from, and are the cache folder's: whoever deletes one loses time alone.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from engine import paths
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder, DecoderWeights, LayerWeights
from engine.models.feed_forward import FeedForward
from engine.quantization import get_format
from engine.quantization.base import Linear, Tileable
from engine.quantization.int4 import Int4Linear
from engine.quantization.int4_layout import torch_block
from engine.quantization.int8 import Int8Linear
from engine.quantization.packed_file import map_packed, write_packed

_LAYER_MATRICES = ("qkv", "o", "gate_up", "down")  # in the order of LayerWeights.matrices
_log = logging.getLogger(__name__)
_FORMATS = ("int4", "int8")
_WORTH_KEEPING = 1 << 24  # bytes; smaller models are packed in no time
_LONGEST_WRITE = 3600.0  # seconds; an unfinished file that is older has nobody who writes it
_SHARE_OF_DISK = 0.1  # of what is free or ours, which the files may take


class PackedModel:
    """The kept weights of the model at ``source`` in a format, whether they exist or not."""

    def __init__(self, source: Path, weight_format: str, device: str) -> None:
        self._format, self._device = weight_format, torch.device(device)
        self._possible = weight_format in _FORMATS and self._device.type == "cpu"
        folder = Path(__file__).parents[1]
        digest = hashlib.sha256(f"{torch.__version__} {torch_block()} {_state(source)}".encode())
        for code in sorted([*folder.glob("models/*.py"), *folder.glob("quantization/*.py")]):
            digest.update(code.read_bytes())  # what packs, or names what is packed
        place = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:8]
        self._stem = f"{source.stem}-{place}-{weight_format}-"
        self._file = paths.cache_dir() / "packed" / f"{self._stem}{digest.hexdigest()[:16]}.bin"

    def decoder(self, config: ModelConfig) -> Decoder | None:
        """The model with the kept weights; None if there are none."""
        if not self._possible or config.experts is not None:
            return None
        try:
            tensors, about = map_packed(self._file)
            weights = _from_tensors(tensors, about, config.num_layers)
            os.utime(self._file)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("kept weights cannot be used: %s", error)
            _delete(self._file)
            return None
        return Decoder(config, weights, get_format(self._format).activation_dtype, self._device)

    def keep(self, decoder: Decoder) -> None:
        """Keep the decoder's weights, if there is room. A model runs as well without."""
        if not self._possible or decoder.config.experts is not None or self._file.exists():
            return
        tensors, about = _to_tensors(decoder.weights)
        size = sum(tensor.nbytes for tensor in tensors.values())
        try:
            if size >= _WORTH_KEEPING and self._make_room(size):
                write_packed(self._file, tensors, about)
        except OSError as error:
            _log.warning("the packed weights could not be kept: %s", error)

    def _make_room(self, size: int) -> bool:
        """Delete what a killed process left, what this model was before, and then the files that were used
        longest ago, until ``size`` bytes more are within our share."""
        folder = self._file.parent
        folder.mkdir(parents=True, exist_ok=True)
        stale = time.time() - _LONGEST_WRITE
        for file in folder.iterdir():
            killed = file.suffix == ".partial" and file.stat().st_mtime < stale
            if killed or (file.suffix == ".bin" and file.name.startswith(self._stem)):
                _delete(file)
        kept = [(file.stat().st_mtime, file.stat().st_size, file) for file in folder.glob("*.bin")]
        total = sum(entry[1] for entry in kept)
        budget = _SHARE_OF_DISK * (shutil.disk_usage(folder).free + total)
        for _, file_size, file in sorted(kept):
            if total + size <= budget or size > budget:
                break
            if _delete(file):
                total -= file_size
        return total + size <= budget


def _delete(file: Path) -> bool:
    """Whether it is gone; on Windows it is not while another process has it open."""
    try:
        file.unlink()
    except OSError:
        return False
    return True


def _state(source: Path) -> str:
    """Changes when a file of the model does."""
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    stats = [(file.name, file.stat()) for file in files if file.exists()]
    return " ".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)


def _matrices(weights: DecoderWeights) -> Iterator[tuple[str, Linear]]:
    yield "lm_head", weights.lm_head
    for index, layer in enumerate(weights.layers):
        yield from zip((f"{index}.{name}" for name in _LAYER_MATRICES), layer.matrices(), strict=True)


def _to_tensors(weights: DecoderWeights) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """All tensors by name; of the matrices the inputs, the outputs and whether they are tiled."""
    assert isinstance(weights.embedding, Tensor)
    tensors, about = {"embedding": weights.embedding, "final_norm": weights.final_norm}, {}
    for name, matrix in _matrices(weights):
        assert isinstance(matrix, Tileable)
        about[name] = [matrix.in_features, matrix.out_features, matrix.tiled]
        if isinstance(matrix, Int4Linear):
            parts = {"packed": matrix.packed, "scales": matrix.scales_and_zeros}
        else:
            assert isinstance(matrix, Int8Linear)
            parts = {"packed": matrix.weight, "scales": matrix.scales}
        if matrix.bias is not None:
            parts["bias"] = matrix.bias
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    for index, layer in enumerate(weights.layers):
        for field in fields(layer):
            value = getattr(layer, field.name)
            if isinstance(value, Tensor):
                tensors[f"{index}.{field.name}"] = value
    return tensors, about


def _from_tensors(tensors: dict[str, Tensor], about: dict[str, list[int]], num_layers: int) -> DecoderWeights:
    def matrix(name: str) -> Linear:
        packed, scales = tensors[f"{name}.packed"], tensors[f"{name}.scales"]
        bias = tensors.get(f"{name}.bias")
        in_features, out_features, tiled = about[name]
        if packed.dtype == torch.int8:
            return Int8Linear(packed, scales, bias, bool(tiled))
        return Int4Linear(packed, scales, in_features, out_features, bias, bool(tiled))

    def layer(index: int) -> LayerWeights:
        qkv, o, gate_up, down = (matrix(f"{index}.{name}") for name in _LAYER_MATRICES)
        return LayerWeights(
            tensors[f"{index}.attn_norm"], qkv, o, tensors[f"{index}.mlp_norm"], FeedForward(gate_up, down),
            tensors.get(f"{index}.q_norm"), tensors.get(f"{index}.k_norm"),
        )  # fmt: skip

    layers = tuple(layer(index) for index in range(num_layers))
    return DecoderWeights(tensors["embedding"], layers, tensors["final_norm"], matrix("lm_head"))
