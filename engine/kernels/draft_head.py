"""The draft head of the fused kernels, whose rows tokens of the text take over."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.kernels.adapters import int8_map
from engine.quantization.base import GroupQuantized, Linear
from engine.quantization.dense import DenseLinear
from engine.quantization.int4 import Int4Format, Int4Linear, quantize_groups, scales_and_zeros
from engine.quantization.int4_layout import TiledRows
from engine.quantization.int8 import Int8Linear
from engine.residuals.draft_vocabulary import MOST_ROWS, DraftVocabulary
from engine.residuals.drafter import whole_blocks
from engine.threads import use_threads

_CPU = torch.device("cpu")


class DraftHead:
    """The LM head's rows of a :class:`DraftVocabulary` in int4: the head's own codes, or rounded to it.

    Where this torch's int4 layout is not known it is int8, of all tokens that the accelerator was trained to draft, and none
    join.

    Args:
        head: the model's, tiled if it is int4.
        frequent: ``int64 [N]``, the most frequent first.

    Attributes:
        linear: what the kernels read.
        tokens: ``int64 [N]``, that of each row.
    """

    def __init__(self, head: Linear, frequent: Tensor, is_int4: bool) -> None:
        self._head = head
        self._rows: TiledRows | None = None
        if not is_int4:
            vocabulary = whole_blocks(frequent)
            self.linear: Linear = int8_map(_floats_of(head, vocabulary))
            self.tokens = vocabulary.numpy()
            return
        vocabulary = whole_blocks(frequent[:MOST_ROWS])
        groups = _groups_of(head, vocabulary)
        linear = Int4Format().pack(groups, None, _CPU)
        assert isinstance(linear, Int4Linear)
        linear.tile()
        self.linear = linear
        self._rows = TiledRows(linear.packed, linear.scales_and_zeros, linear.in_features)
        self._source = None
        if isinstance(head, Int4Linear):
            self._source = TiledRows(head.packed, head.scales_and_zeros, head.in_features)
        self._vocabulary = DraftVocabulary(vocabulary)
        self.tokens = self._vocabulary.tokens

    def take_up(self, ids: Sequence[int]) -> None:
        """Let these tokens of a text be drafted from now on."""
        rows, source = self._rows, self._source
        if rows is None or not (changed := self._vocabulary.join(ids)):
            return
        if source is not None and all(token < source.count for _, token in changed):
            for row, token in changed:
                rows.put(row, *source.get(token))
            return
        with use_threads(1):  # torch's own would keep the cores awake
            groups = _groups_of(self._head, torch.tensor([token for _, token in changed]))
            pairs = scales_and_zeros(groups).view(torch.uint8).flatten(1)
        words = groups.codes.numpy().view(np.uint32), pairs.numpy().view(np.uint32)
        for (row, _), codes, pair in zip(changed, *words, strict=True):
            rows.put(row, codes, pair)


def _groups_of(head: Linear, tokens: Tensor) -> GroupQuantized:
    return head.rows(tokens) if isinstance(head, Int4Linear) else quantize_groups(_floats_of(head, tokens))


def _floats_of(head: Linear, tokens: Tensor) -> Tensor:
    """Rows of a head in another format, float32."""
    if isinstance(head, Int8Linear):
        return head.rows(tokens).dequantize()
    assert isinstance(head, DenseLinear)
    return head.weight[tokens].float()
