"""Draft steps on the fused kernels: one command of the team for each."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import control
from engine.kernels.stepper import FusedStepper
from engine.models.kv_cache import KVCache
from engine.quantization.base import Linear
from engine.quantization.int4 import Int4Format, Int4Linear, quantize_groups
from engine.quantization.int8 import Int8Format
from engine.residuals.accelerator import Accelerator, LowRank
from engine.residuals.drafter import Draft, cut_head, whole_blocks

_CPU = torch.device("cpu")


class FusedDrafter:
    """A :class:`engine.residuals.drafter.Drafter` on a :class:`FusedStepper`.

    Adapters and maps are rounded to int8 and the draft head to int4, whatever the model's own format: drafts
    may be wrong, and every byte not read is time. The slow row has the stepper's own bits.
    """

    def __init__(self, stepper: FusedStepper, accelerator: Accelerator) -> None:
        decoder, table = stepper.decoder, stepper.table
        self.stepper = stepper
        self.depth = accelerator.config.depth
        self._eps = decoder.config.norm_eps
        vocab = whole_blocks(accelerator.draft_vocab)
        self._vocab = vocab.numpy()
        self._adapters = np.zeros((self.depth, control.ADAPTER_FIELDS), np.int64)
        for index in range(self.depth):
            adapters = accelerator.adapters(index)
            halves = [
                half
                for pair in (adapters.q, adapters.o, adapters.gate_up, adapters.down)
                for half in _halves(pair)
            ]
            self._adapters[index] = np.concatenate([table.describe(half) for half in halves])
        head = _draft_head(stepper, vocab)
        start = 0
        if accelerator.start is not None:
            start = table.describe(_int8(accelerator.start)).ctypes.data
        self._logits = np.zeros(head.out_features, np.float32)
        self._exit = torch.zeros(decoder.config.hidden_size)
        self._fields = {
            control.ROWS: 2,
            control.LAST: self.depth,
            control.NORM: stepper.final_norm,
            control.ADAPTERS: self._adapters.ctypes.data,
            control.START_MAP: start,
            control.EXIT_MAP: table.describe(_int8(accelerator.exit)).ctypes.data,
            control.DRAFT_HEAD: table.describe(head).ctypes.data,
            control.DRAFT_BUFFER: self._exit.data_ptr(),
            control.DRAFT_LOGITS: self._logits.ctypes.data,
        }
        rank = max(accelerator.adapters(index).q.down.shape[0] for index in range(self.depth))
        for thread in range(stepper.num_threads):
            own = control.RANKS + thread * control.RANK_FIELDS
            stepper.team.control[own + control.OWN_LOW] = stepper.buffer(rank + 16)
            stepper.team.control[own + control.OWN_RAISED] = stepper.buffer(64)

    def condition(self, final: Tensor) -> Tensor:
        values = final.numpy()
        return torch.from_numpy(values / np.sqrt(values.dot(values) / len(values) + np.float32(self._eps)))

    def draft(self, token: int, condition: Tensor, cache: KVCache, position: int) -> Draft:
        stepper = self.stepper
        stepper.follow(cache, position + 1)
        stepper.use_positions((position, position), (True, False))
        embedded = stepper.embed([token])
        slow = torch.empty_like(embedded)
        fields = {
            **self._fields,
            control.HIDDEN: embedded.data_ptr(),
            control.OUT: slow.data_ptr(),
            control.CONDITION: condition.data_ptr(),
        }
        stepper.team.run(control.RUN_DRAFT, fields)
        best = int(self._logits.argmax())
        confidence = float(stepper.team.control[control.CONFIDENCE :].view(np.float32)[0])
        return Draft(int(self._vocab[best]), confidence, slow, self.condition(self._exit))


def _int8(weight: Tensor) -> Linear:
    return Int8Format().pack(weight.detach(), None, _CPU)


def _halves(adapter: LowRank) -> tuple[Linear, Linear]:
    """Both matrices of an adapter, the rank padded with zeros to what the kernels count in."""
    padding = -adapter.down.shape[0] % 16
    return _int8(F.pad(adapter.down, (0, 0, 0, padding))), _int8(F.pad(adapter.up, (0, padding)))


def _draft_head(stepper: FusedStepper, vocab: Tensor) -> Linear:
    """The head's rows of the draft vocabulary: its own int4 codes, or rounded to int4 (int8 where this
    torch's int4 layout is not known)."""
    head = stepper.decoder.weights.lm_head
    if isinstance(head, Int4Linear):
        return cut_head(stepper.decoder, vocab)
    rows = head.dequantize()[vocab]
    if stepper.draft_head_is_int4:
        return Int4Format().pack(quantize_groups(rows), None, _CPU)
    return _int8(rows)
