"""Weights on disk under one interface: HF safetensors folders and GGUF files. Pickles are never loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.errors import ModelFileError
from engine.models.config import ModelConfig
from engine.models.expert_names import EXPERT_NAMES, IN_STACKS, ExpertNames, split_index
from engine.quantization.base import GroupQuantized


class Checkpoint(Protocol):
    """Tensors under their HF names (``model.layers.0.self_attn.q_proj.weight`` and so on). A name may end in
    ``[3]``: that matrix of a stack of them."""

    config: ModelConfig
    expert_names: ExpertNames | None

    def __contains__(self, name: str) -> bool: ...

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor as ``dtype``; by default as stored, or float32 if it is stored quantized."""

    def pieces(self, name: str) -> Iterator[Tensor]:
        """As :meth:`tensor`, in pieces of its rows, in order: a large head need not be there twice."""

    def groups(self, name: str) -> GroupQuantized | None:
        """The matrix as 4-bit groups, if it is stored so and converts code by code."""


class SafetensorsCheckpoint:
    """A folder with ``config.json`` and ``*.safetensors``, sharded or not.

    Raises:
        ModelFileError: a file is missing, truncated or damaged.
    """

    def __init__(self, folder: Path) -> None:
        from engine.models.families import config_from_hf

        self.folder = folder
        try:
            raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelFileError(
                f"{folder} has no config.json; choose a folder that holds a model."
            ) from None
        except (ValueError, OSError) as error:
            raise ModelFileError(
                f"{folder / 'config.json'} cannot be read; download the model again."
            ) from error
        self.config = config_from_hf(raw)
        self.expert_names = EXPERT_NAMES.get(self.config.model_type)
        self._where: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            reason = (
                "only pickled weights, which are never loaded" if list(folder.glob("*.bin")) else "no weights"
            )
            raise ModelFileError(f"{folder.name} holds {reason}; choose a model with .safetensors files.")
        for file in files:
            for name in self._handle(file).keys():  # noqa: SIM118 (no dict)
                self._where[name] = file

    def __contains__(self, name: str) -> bool:
        return split_index(name)[0] in self._where

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        whole, index = split_index(name)
        if whole not in self._where:
            raise ModelFileError(f"{self.folder.name} lacks the weight {whole}; download the model again.")
        handle = self._handle(self._where[whole])
        stored = handle.get_tensor(whole) if index is None else _member(handle.get_slice(whole), index)
        return stored if dtype is None else stored.to(dtype)

    def pieces(self, name: str) -> Iterator[Tensor]:
        yield self.tensor(name)

    def groups(self, name: str) -> GroupQuantized | None:
        return None

    def _handle(self, file: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if file not in self._open:
            try:
                self._open[file] = safe_open(str(file), framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelFileError(
                    f"{file.name} is damaged or incomplete; download the model again."
                ) from error
        return self._open[file]


class GgufCheckpoint:
    """A ``.gguf`` file.

    Raises:
        ModelFileError: the file is missing, not a GGUF, or truncated.
    """

    def __init__(self, path: Path) -> None:
        from engine.models import gguf_file

        self.file = gguf_file.GgufFile(path)
        self.config = gguf_file.config_from_gguf(self.file)
        names = gguf_file.hf_names(self.config.num_layers)
        self._names = {hf: name for hf, name in names.items() if name in self.file.tensors}
        self.expert_names: ExpertNames | None = IN_STACKS
        # llama.cpp stores llama's q and k with rotary pairs interleaved; HF keeps the two halves apart.
        self._interleaved = self.config.model_type in ("llama", "mistral", "mixtral", "granitemoe")

    def __contains__(self, name: str) -> bool:
        return split_index(name)[0] in self._names

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        if name not in self:
            raise ModelFileError(f"{self.file.path.name} lacks the weight {name}; download the model again.")
        return self._unpermute(name, self.file.dequantize(self._stored(name), dtype or torch.float32))

    def pieces(self, name: str) -> Iterator[Tensor]:
        if name not in self or self._heads(name):  # missing, or its rows change places
            yield self.tensor(name)
        else:
            yield from self.file.pieces(self._stored(name))

    def groups(self, name: str) -> GroupQuantized | None:
        groups = self.file.groups(self._stored(name)) if name in self else None
        if groups is None:
            return None
        return GroupQuantized(
            self._unpermute(name, groups.codes),
            self._unpermute(name, groups.scale),
            self._unpermute(name, groups.minimum),
        )

    def _stored(self, name: str) -> str:
        """What the file calls it."""
        whole, _ = split_index(name)
        return self._names[whole] + name[len(whole) :]

    def _unpermute(self, name: str, weight: Tensor) -> Tensor:
        count = self._heads(name)
        if not count:
            return weight
        pairs = weight.view(count, weight.shape[0] // count // 2, 2, *weight.shape[1:])
        return pairs.transpose(1, 2).reshape(weight.shape).contiguous()

    def _heads(self, name: str) -> int:
        """Of how many heads the rows are interleaved; 0 if they are not."""
        heads = {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}
        return next((n for part, n in heads.items() if self._interleaved and f".{part}." in name), 0)


def _member(stack: Any, index: int) -> Tensor:
    """One matrix of a stack ``[E, N, K]``, read alone."""
    shape = stack.get_shape()
    if len(shape) != 3 or index >= shape[0]:
        raise ModelFileError(
            f"A stack of expert weights has the shape {shape}, too small for expert {index}; "
            "download the model again."
        )
    return stack[index]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a ``.gguf`` file, an HF folder, or a recipe's folder with the base model it names."""
    from engine.models.split_checkpoint import SplitCheckpoint, base_of, is_recipe

    if is_recipe(path):
        return SplitCheckpoint(path, open_checkpoint(base_of(path)))
    if path.is_dir():
        return SafetensorsCheckpoint(path)
    if path.suffix.lower() == ".gguf":
        return GgufCheckpoint(path)
    if not path.exists():
        raise ModelFileError(f"{path} does not exist; check the path.")
    raise ModelFileError(f"{path.name} is no model file; choose a .gguf file or a folder with config.json.")
