"""The small interface behind which all weight formats lie."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.errors import UnsupportedModelError


class Linear(ABC):
    """A packed weight matrix ``W [N, K]`` with an optional bias ``[N]``: ``y = x W^T + b``."""

    in_features: int
    out_features: int
    bias: Tensor | None

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """``x [..., K] -> [..., N]`` in the dtype of ``x``."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that one use of the matrix reads."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What the weights are made of, without the bias."""

    @abstractmethod
    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Linear:
        """A matrix of the same kind and shape, without a bias, made of other ``tensors``."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The weights as float32 ``[N, K]``, for tests and tools."""


class Tileable(Linear):
    """A matrix whose codes lie in torch's order or, if ``tiled``, in the tiles of our own kernels."""

    tiled: bool

    @abstractmethod
    def tile(self) -> None:
        """Put the codes into tiles, in place. Torch's kernels then work on a copy."""


@dataclass(frozen=True)
class GroupQuantized:
    """Unpacked 4-bit codes as some files hold them: ``w = scale * code + minimum`` per group of inputs."""

    codes: Tensor  # uint8 [N, K], values 0..15
    scale: Tensor  # float32 [N, K / group_size]
    minimum: Tensor  # float32 [N, K / group_size]
    group_size: int = 32

    def dequantize(self) -> Tensor:
        """float32 ``[N, K]``."""
        rows, columns = self.codes.shape
        groups = self.codes.view(rows, columns // self.group_size, self.group_size).float()
        return (groups * self.scale[..., None] + self.minimum[..., None]).view(rows, columns)


class WeightFormat(Protocol):
    """Packs float weights into one format on one device."""

    name: str
    activation_dtype: torch.dtype

    def unavailable(self, device: torch.device) -> str | None:
        """Why this format cannot run on ``device``, as a sentence; None if it can."""

    def misfit(self, out_features: int, in_features: int) -> str | None:
        """Why the kernels take no matrix ``[out_features, in_features]``, as a sentence; None if they do."""

    def pack(self, weight: Tensor | GroupQuantized, bias: Tensor | None, device: torch.device) -> Linear:
        """Pack ``weight [N, K]``.

        Raises:
            UnsupportedModelError: a matrix of a shape that the kernels do not take.
        """

    def bytes_per_weight(self) -> float:
        """Memory per weight, scales included."""


def check_shape(fmt: WeightFormat, weight: Tensor | GroupQuantized) -> None:
    """Refuse a matrix that ``fmt`` cannot hold. torch itself does not always: some of its kernels crash."""
    rows, columns = (weight.codes if isinstance(weight, GroupQuantized) else weight).shape
    if reason := fmt.misfit(rows, columns):
        raise UnsupportedModelError(f"This model cannot be packed as {fmt.name}: {reason}")
