"""A dense model that a recipe splits into experts, as a checkpoint.

A recipe is a folder with ``recipe.json`` (the card) and ``recipe.safetensors``: for each split layer the order of
its neurons, a router and low-rank corrections. The weights themselves are the base model's.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import ModelFileError
from engine.models.checkpoint import Checkpoint
from engine.models.config import ExpertConfig, ModelConfig
from engine.models.expert_names import IN_STACKS, ExpertNames, split_index
from engine.quantization.base import GroupQuantized

CARD, TENSORS = "recipe.json", "recipe.safetensors"
_FEED_FORWARD = re.compile(
    r"model\.layers\.(\d+)\.mlp\.(gate|experts|shared_expert)(?:\.(gate|up|down)_proj)?\.weight"
)


def is_recipe(path: Path) -> bool:
    """Whether ``path`` is a recipe's folder."""
    return (path / CARD).is_file()


def base_of(folder: Path) -> Path:
    """The files of a recipe's base model, fetched if need be.

    Raises:
        ModelFileError: the card is damaged. DownloadError: the base model cannot be fetched.
    """
    from engine import hub

    return hub.resolve(_card(folder)["base_model"]["source"]).path


def base_fingerprint(checkpoint: Checkpoint) -> str:
    """16 hex digits that tell base models apart: shapes and norm gains."""
    config = checkpoint.config
    digest = hashlib.sha256(repr((config.num_layers, config.hidden_size, config.intermediate_size)).encode())
    for index in range(config.num_layers):
        gain = checkpoint.tensor(f"model.layers.{index}.post_attention_layernorm.weight")
        digest.update(gain.float().bfloat16().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


class SplitCheckpoint:
    """The base model at ``base`` with the feed-forward blocks that the recipe in ``folder`` makes of it.

    Raises:
        ModelFileError: the recipe is damaged, or for another base model.
    """

    expert_names: ExpertNames | None = IN_STACKS

    def __init__(self, folder: Path, base: Checkpoint) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        card = _card(folder)
        self._folder, self._base = folder, base
        if card["base_model"]["fingerprint"] != base_fingerprint(base):
            raise ModelFileError(
                f"The recipe in {folder.name} is for {card['base_model']['source']}, which is not the base model found."
            )
        try:
            self._tensors = load_file(folder / TENSORS)
            self.config = split_config(base.config, **card["split"])
        except (OSError, SafetensorError, TypeError) as error:
            raise _damaged(folder) from error
        experts = self.config.experts
        assert experts is not None
        self._shared, self._size = experts.shared_intermediate_size, experts.intermediate_size
        self._scale = float(experts.num_experts_per_tok)
        for layer in range(base.config.num_layers):
            if self.config.is_sparse(layer) and not self._is_whole(layer, card["split"]["rank"]):
                raise _damaged(folder)
        self._built: tuple[int, dict[str, Tensor]] = (-1, {})

    def __contains__(self, name: str) -> bool:
        return self._own(name) is not None or name in self._base

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        found = self._own(name)
        if found is None:
            return self._base.tensor(name, dtype)
        layer, part, matrix = found
        if part == "gate":
            tensor = self._tensors[f"{layer}.router"].float()
        else:
            whole = self._matrices(layer)[matrix]
            rows = (
                whole[: self._shared]
                if part == "shared_expert"
                else self._expert(whole, split_index(name)[1])
            )
            # The weights of the chosen experts sum to 1, where each stands for its whole part of a sum.
            scale = self._scale if matrix == "down" and part == "experts" else 1.0
            tensor = (rows.T if matrix == "down" else rows) * scale
        return tensor.contiguous() if dtype is None else tensor.to(dtype).contiguous()

    def pieces(self, name: str) -> Iterator[Tensor]:
        if self._own(name) is None:
            yield from self._base.pieces(name)
        else:
            yield self.tensor(name)

    def groups(self, name: str) -> GroupQuantized | None:
        return self._base.groups(name) if self._own(name) is None else None

    def _is_whole(self, layer: int, rank: int) -> bool:
        """Whether the recipe has all that a layer needs, in the shapes that it needs."""
        experts, hidden, inner = self.config.experts, self.config.hidden_size, self.config.intermediate_size
        assert experts is not None
        shapes: dict[str, tuple[int, ...]] = {"order": (inner,), "router": (experts.num_experts, hidden)}
        for matrix in ("gate", "up", "down"):
            inputs, outputs = (inner, hidden) if matrix == "down" else (hidden, inner)
            shapes |= {f"{matrix}.a": (rank, inputs), f"{matrix}.b": (outputs, rank)}
        found = {name: self._tensors.get(f"{layer}.{name}") for name in shapes}
        if any(tensor is None or tensor.shape != shapes[name] for name, tensor in found.items()):
            return False
        return torch.equal(self._tensors[f"{layer}.order"].long().sort().values, torch.arange(inner))

    def _own(self, name: str) -> tuple[int, str, str] | None:
        """Layer, part and matrix of a weight that the recipe makes."""
        match = _FEED_FORWARD.fullmatch(split_index(name)[0])
        if match is None or not self.config.is_sparse(int(match[1])):
            return None
        return int(match[1]), match[2], match[3]

    def _expert(self, whole: Tensor, number: int | None) -> Tensor:
        assert number is not None
        begin = self._shared + number * self._size
        return whole[begin : begin + self._size]

    def _matrices(self, layer: int) -> dict[str, Tensor]:
        """The corrected matrices of a layer, a row for each neuron, in the recipe's order."""
        if self._built[0] != layer:
            tensors, order = self._tensors, self._tensors[f"{layer}.order"].long()
            matrices = {}
            for matrix in ("gate", "up", "down"):
                weight = self._base.tensor(f"model.layers.{layer}.mlp.{matrix}_proj.weight").float()
                down, up = (tensors[f"{layer}.{matrix}.{half}"].float() for half in ("a", "b"))
                weight = weight + up @ down
                matrices[matrix] = (weight.T if matrix == "down" else weight)[order]
            self._built = (layer, matrices)
        return self._built[1]


def split_config(
    base: ModelConfig,
    num_experts: int,
    num_experts_per_tok: int,
    shared_size: int,
    dense_layers: int,
    rank: int,
) -> ModelConfig:
    """The description of ``base`` once it is split; the arguments are those of
    :class:`engine.experts.splitting.SplitConfig`."""
    size, rest = divmod(base.intermediate_size - shared_size, num_experts)
    if rest or rank < 1:
        raise TypeError("the neurons do not divide evenly")
    experts = ExpertConfig(
        num_experts, num_experts_per_tok, size, True, shared_size, frozenset(range(dense_layers))
    )
    return replace(base, experts=experts)


def _card(folder: Path) -> dict[str, Any]:
    try:
        card: dict[str, Any] = json.loads((folder / CARD).read_text(encoding="utf-8"))
        str(card["base_model"]["source"]), str(card["base_model"]["fingerprint"]), dict(card["split"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder) from error
    return card


def _damaged(folder: Path) -> ModelFileError:
    return ModelFileError(f"The recipe in {folder.name} is damaged or incomplete; fetch it again.")
