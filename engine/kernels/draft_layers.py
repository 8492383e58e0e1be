"""The first layers as draft steps read them: int4 copies, where the model's own weights are wider.

What a draft step makes may be wrong, and every byte that it does not read is time. The copies cost 5 bits a weight of
those few layers, and a fraction of a second to make.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.kernels import control
from engine.kernels.linears import LinearTable
from engine.models.config import ModelConfig
from engine.models.decoder import LayerWeights
from engine.quantization.int4 import Int4Format, quantize_groups

_CPU = torch.device("cpu")
_PLACES = (control.QKV, control.O_PROJ, control.GATE_UP_PROJ, control.DOWN_PROJ)


def fits_int4(config: ModelConfig) -> bool:
    """Whether a model's layers are dense and of shapes that int4 takes."""
    shapes = config.matrix_shapes()[: len(_PLACES)]
    return config.experts is None and not any(Int4Format().misfit(*shape) for shape in shapes)


def use_copies(table: LinearTable, records: np.ndarray, layers: Sequence[LayerWeights]) -> None:
    """Put int4 copies of the ``layers``' weights into the first of ``records``. All else stays as it is there: biases,
    too, and into how many parts a matrix is split, which depends on its shape alone."""
    for record, layer in zip(records, layers, strict=False):
        for place, linear in zip(_PLACES, layer.matrices(), strict=True):
            copy = Int4Format().pack(quantize_groups(linear.dequantize()), None, _CPU)
            described = table.describe(copy)
            for field in (control.WEIGHT, control.SCALES):
                record[place + field] = described[field]
