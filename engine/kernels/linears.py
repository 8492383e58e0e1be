"""Weight matrices as the compiled code sees them: a descriptor of addresses and sizes each."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.quantization.base import Linear, Tileable
from engine.quantization.dense import DenseLinear
from engine.quantization.int4 import Int4Linear
from engine.quantization.int8 import Int8Linear


class LinearTable:
    """Descriptors of linears (:mod:`engine.kernels.control`), and all that they point at, kept alive."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._linears: dict[tuple[int, int], tuple[Linear, np.ndarray]] = {}

    def kind(self, linear: Linear) -> str:
        """The dtype that chooses the compiled code for ``linear``."""
        if isinstance(linear, Int4Linear):
            return "uint8"
        if isinstance(linear, Int8Linear):
            return "int8"
        assert isinstance(linear, DenseLinear)
        return "float32" if linear.weight.dtype == torch.float32 else "uint16"

    def vector(self, tensor: Tensor | None) -> int:
        """Address of a float32 copy (or the tensor itself), kept alive; 0 for None."""
        if tensor is None:
            return 0
        tensor = tensor.detach().to(torch.float32).contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def describe(self, linear: Linear, parts: int = 1) -> np.ndarray:
        """The descriptor of ``linear``, its inputs split into ``parts``."""
        known = self._linears.get((id(linear), parts))
        if known is not None:
            return known[1]
        described = self._descriptor(linear, self.vector(linear.bias), parts)
        self._linears[id(linear), parts] = (linear, described)  # the reference keeps the id and the memory
        return described

    def describe_passing(self, linear: Linear) -> np.ndarray:
        """The descriptor of a linear without a bias whose memory belongs to somebody else; nothing is kept."""
        return self._descriptor(linear, 0, 1)

    def _descriptor(self, linear: Linear, bias: int, parts: int) -> np.ndarray:
        if isinstance(linear, Tileable):
            linear.tile()
        if isinstance(linear, Int4Linear):
            weight, scales = linear.packed, linear.scales_and_zeros.data_ptr()
        elif isinstance(linear, Int8Linear):
            weight, scales = linear.weight, linear.scales.data_ptr()
        else:
            assert isinstance(linear, DenseLinear)
            weight, scales = linear.weight, 0
        fields = [weight.data_ptr(), scales, bias, linear.out_features, linear.in_features, parts]
        return np.array(fields, np.int64)
