"""The number of CPU threads that a computation uses, per calling thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def use_threads(num_threads: int | None) -> Iterator[None]:
    """Compute without autograd, on ``num_threads`` CPU threads (None: torch's own choice).

    OpenMP keeps its thread count per calling thread, and the app calls from a pool of them, so the
    count is set where the work is done, and put back: the next work there may be a model's loading.
    """
    import torch

    before = torch.get_num_threads()
    wanted = before if num_threads is None else num_threads
    if wanted != before:
        torch.set_num_threads(wanted)
    try:
        with torch.inference_mode():
            yield
    finally:
        if wanted != before:
            torch.set_num_threads(before)


def set_threads(num_threads: int | None) -> None:
    """Use ``num_threads`` CPU threads from here on in the calling thread (None: leave it)."""
    import torch

    if num_threads is not None and torch.get_num_threads() != num_threads:
        torch.set_num_threads(num_threads)
