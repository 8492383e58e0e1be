"""Tuning on several devices: processes started by ``accelerate launch``, or this one alone.

The processes share the work folder. Each has a copy of the model; shards of text are dealt out, and
gradients are averaged at each step.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from engine.errors import UnsupportedModelError


@dataclass(frozen=True)
class Workers:
    """This process among ``count``; all calls but the properties are made by all of them together."""

    rank: int = 0
    count: int = 1
    device: str | None = None  # that this process was given

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            _distributed().barrier()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.count == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        _distributed().all_reduce(value)
        return bool(value > 0)

    def average(self, parameters: list[torch.nn.Parameter]) -> None:
        """Gradients become their mean over the processes."""
        if self.count == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])  # one exchange, not one each
        _distributed().all_reduce(together)
        parts = (together / self.count).split([gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, parts, strict=True):
            gradient.copy_(mean.view_as(gradient))


def find_workers(device: str) -> Workers:
    """The processes that this one was launched with.

    Raises:
        UnsupportedModelError: several were launched, and accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Workers()
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise UnsupportedModelError(
            "Tuning on several devices needs the package accelerate; install it, or start one process."
        ) from error
    state = PartialState(cpu=device == "cpu")
    return Workers(state.process_index, state.num_processes, str(state.device))


def _distributed() -> Any:
    return torch.distributed
