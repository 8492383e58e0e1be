"""One expert as one contiguous block of bytes, so that loading it is one read into a slot."""

from __future__ import annotations

import mmap
import zlib
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from engine.kernels import takes_tiles
from engine.models.config import ModelConfig
from engine.models.feed_forward import FeedForward
from engine.quantization import WeightFormat
from engine.quantization.base import Linear, Tileable

PAGE = 4096  # blobs begin and end on pages: reads that bypass the system's file cache ask for it
_ALIGNMENT = 64  # of tensors in a blob: the kernels' loads like cache lines


@dataclass(frozen=True)
class _Part:
    matrix: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int
    end: int


class BlobLayout:
    """Where the tensors of an expert lie in its blob; the same for all experts of a model.

    Args:
        expert: any expert of the model; its weights are not kept.

    Attributes:
        nbytes: size of a blob, a multiple of :data:`PAGE`.
        weight_bytes: of it, the weights.
        num_parameters: weights of an expert.
    """

    def __init__(self, expert: FeedForward) -> None:
        self._kinds = {name: _emptied(matrix) for name, matrix in _matrices(expert).items()}
        parts, at = [], 0
        for matrix, linear in _matrices(expert).items():
            for name, tensor in linear.tensors().items():
                parts.append(_Part(matrix, name, tuple(tensor.shape), tensor.dtype, at, at + tensor.nbytes))
                at += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._parts = tuple(parts)
        self.num_parameters = expert.num_parameters
        self.weight_bytes = sum(part.end - part.begin for part in parts)
        self.nbytes = -(-at // PAGE) * PAGE

    @classmethod
    def of(cls, config: ModelConfig, fmt: WeightFormat, device: torch.device | None = None) -> BlobLayout:
        """The layout of the routed experts of a model in a weight format.

        Args:
            device: where they compute, which decides the order of their codes; None: the CPU.

        Raises:
            UnsupportedModelError: the format takes no matrices of that shape.
        """
        assert config.experts is not None
        size, hidden = config.experts.intermediate_size, config.hidden_size
        shapes = ((2 * size, hidden), (hidden, size))
        device = device or torch.device("cpu")
        linears = [fmt.pack(torch.zeros(shape), None, device) for shape in shapes]
        for linear in linears if device.type == "cpu" else ():
            if isinstance(linear, Tileable) and takes_tiles(config, linear):
                linear.tile()
        return cls(FeedForward(*linears))

    def write(self, expert: FeedForward, blob: Tensor) -> None:
        """Put ``expert`` into ``blob``, uint8 ``[nbytes]``; its own codes may be put into another order for that."""
        matrices = _matrices(expert)
        for name, kind in self._kinds.items():
            if isinstance(kind, Tileable) and kind.tiled:
                cast(Tileable, matrices[name]).tile()
        for part in self._parts:
            tensor = matrices[part.matrix].tensors()[part.name].contiguous()
            blob[part.begin : part.end] = tensor.view(-1).view(torch.uint8)

    def view(self, blob: Tensor) -> FeedForward:
        """The expert whose bytes ``blob`` holds, now or later: nothing is copied."""
        tensors: dict[str, dict[str, Tensor]] = {name: {} for name in self._kinds}
        for part in self._parts:
            own = blob[part.begin : part.end].view(part.dtype).view(part.shape)
            tensors[part.matrix][part.name] = own
        return FeedForward(**{name: kind.with_tensors(tensors[name]) for name, kind in self._kinds.items()})

    def describe(self) -> list[list[object]]:
        """The layout as JSON holds it, to tell whether a file has the same."""
        return [
            [part.matrix, part.name, list(part.shape), str(part.dtype), part.begin, self._order(part)]
            for part in self._parts
        ]

    def _order(self, part: _Part) -> str:
        kind = self._kinds[part.matrix]
        return "tiles" if isinstance(kind, Tileable) and kind.tiled else "torch"


def checksum(blob: memoryview | bytes) -> int:
    """Of a whole blob: the CRC-32 of the sums of the 64-bit words at the same place of each page.

    Damage within one page, however large, changes at least one of the sums; larger random damage escapes with a
    chance of 2^-32. Ten times as fast as a CRC of everything, which on a laptop would cost as much as reading from
    the system's file cache does (our choice).
    """
    words = np.frombuffer(blob, np.uint64).reshape(-1, PAGE // 8)
    return zlib.crc32(np.add.reduce(words, axis=0).tobytes())


def page_aligned(count: int) -> Tensor:
    """``count`` zero bytes that start on a page, uint8. The system gives them when they are touched, and has them
    back as soon as nobody refers to them, which it has of a heap only sometimes.

    Raises:
        OSError: there is no memory.
    """
    return torch.frombuffer(mmap.mmap(-1, count), dtype=torch.uint8)


def _matrices(expert: FeedForward) -> dict[str, Linear]:
    return {"gate_up": expert.gate_up, "down": expert.down}


def _emptied(linear: Linear) -> Linear:
    """``linear`` without its memory."""
    return linear.with_tensors(
        {name: torch.empty_like(tensor, device="meta") for name, tensor in linear.tensors().items()}
    )
