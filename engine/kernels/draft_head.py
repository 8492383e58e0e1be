"""The draft head of the fused kernels, whose rows tokens of the text take over."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels.adapters import int8_map
from engine.kernels.head_kinds import BF16, FP32, INT4, INT8, INT8_BLOCK
from engine.kernels.native import load_draft_rows
from engine.quantization.base import Linear
from engine.quantization.dense import DenseLinear
from engine.quantization.int4 import Int4Format, Int4Linear, quantize_groups
from engine.quantization.int4_layout import BLOCK
from engine.quantization.int8 import Int8Linear
from engine.residuals.draft_vocabulary import MOST_ROWS, DraftVocabulary
from engine.residuals.drafter import whole_blocks

_CPU = torch.device("cpu")


class DraftHead:
    """The LM head's rows of a :class:`DraftVocabulary` in int4: the head's own codes, or rounded to it. Of a head in tiles the
    last tokens, which are no whole one, do not join.

    Where this torch's int4 layout is not known it is int8, of all tokens that the accelerator was trained to draft, and none
    join.

    Args:
        head: the model's, in tiles if it is int4 or int8; it has to outlive this one.
        frequent: ``int64 [N]``, the most frequent first.

    Attributes:
        linear: what the kernels read.
        tokens: ``int64 [N]``, that of each row.
    """

    def __init__(self, head: Linear, frequent: Tensor, is_int4: bool) -> None:
        self._vocabulary: DraftVocabulary | None = None
        if not is_int4:
            vocabulary = whole_blocks(frequent)
            self.linear: Linear = int8_map(_floats_of(head, vocabulary))
            self.tokens = vocabulary.numpy()
            return
        vocabulary = whole_blocks(frequent[:MOST_ROWS])
        rows = (
            head.rows(vocabulary)
            if isinstance(head, Int4Linear)
            else quantize_groups(_floats_of(head, vocabulary))
        )
        linear = Int4Format().pack(rows, None, _CPU)
        assert isinstance(linear, Int4Linear)
        linear.tile()
        self.linear = linear
        self._source, end = _source(head)
        self._target = linear.packed.data_ptr(), linear.scales_and_zeros.data_ptr()
        self._take_row = load_draft_rows()
        self._vocabulary = DraftVocabulary(vocabulary, end)
        self.tokens = self._vocabulary.tokens

    def take_up(self, ids: Sequence[int]) -> None:
        """Let these tokens of a text be drafted from now on."""
        if self._vocabulary is not None:
            for row, token in self._vocabulary.join(ids):
                self._take_row(*self._source, token, *self._target, row, self.linear.in_features)


def _floats_of(head: Linear, tokens: Tensor) -> Tensor:
    """Rows of the model's head, float32."""
    if isinstance(head, (Int4Linear, Int8Linear)):
        return head.rows(tokens).dequantize()
    assert isinstance(head, DenseLinear)
    return head.weight[tokens].float()


def _source(head: Linear) -> tuple[tuple[int, int, int], int]:
    """What a head is made of and where it lies, as :mod:`engine.kernels.draft_rows` says, and how many of its rows that
    reads: of a matrix in tiles, those of whole ones."""
    if isinstance(head, Int4Linear):
        source = INT4, head.packed.data_ptr(), head.scales_and_zeros.data_ptr()
        return source, head.out_features // BLOCK * BLOCK
    if isinstance(head, Int8Linear):
        source = INT8, head.weight.data_ptr(), head.scales.data_ptr()
        return source, head.out_features // INT8_BLOCK * INT8_BLOCK
    assert isinstance(head, DenseLinear)
    kind = BF16 if head.weight.dtype == torch.bfloat16 else FP32
    return (kind, head.weight.data_ptr(), 0), head.out_features
