"""The files of a tuning run: shards of text, kept final states, checkpoints. Each is whole or not there.

Everything is safetensors or JSON, written beside its place and moved there, so that a run killed at any
moment finds only complete files when it goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import SlipstreamError
from engine.residuals.corpus import Sequences
from engine.residuals.training import Batch, padded


class TuningError(SlipstreamError):
    """Tuning cannot go on; what is done is kept."""


class TuningStoppedError(TuningError):
    """The user stopped it; the same request goes on where it stopped."""

    def __init__(self) -> None:
        super().__init__(
            "Tuning was stopped; start it again with the same settings and it goes on from there."
        )


class Store:
    """One folder of a run.

    Raises:
        TuningError: from every method that writes, if there is no room or no permission.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with _told(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def save(self, name: str, tensors: dict[str, Tensor], step: int = 0) -> None:
        """Write ``tensors`` under ``name`` with the number of steps done."""
        from safetensors.torch import save

        content = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        self._write(f"{name}.safetensors", save(content, {"step": str(step)}))

    def load(self, name: str, only: Iterable[str] | None = None) -> tuple[dict[str, Tensor], int] | None:
        """What :meth:`save` wrote, or some of it; None if it is not there or damaged, so that it is made again."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path(name), "pt") as file:
                names = file.keys() if only is None else only
                return {key: file.get_tensor(key) for key in names}, int(file.metadata()["step"])
        except (OSError, SafetensorError, KeyError, ValueError, TypeError):
            return None

    def save_facts(self, name: str, facts: Any) -> None:
        """Write a small JSON file."""
        self._write(f"{name}.json", (json.dumps(facts, indent=1) + "\n").encode())

    def load_facts(self, name: str) -> Any:
        """What :meth:`save_facts` wrote, or None."""
        try:
            return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def remove(self, pattern: str) -> None:
        """Delete the tensor files whose names match."""
        for path in self.folder.glob(f"{pattern}.safetensors"):
            with contextlib.suppress(OSError):
                path.unlink()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against a second run.

        Raises:
            TuningError: another run has it.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / "lock")
        with _told(self.folder):
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise TuningError(
                    f"Another tuning run works in {self.folder}; wait for it or stop it."
                ) from None
        try:
            yield
        finally:
            lock.release()

    def _write(self, name: str, content: bytes) -> None:
        path = self.folder / name
        temporary = path.with_name(f"{name}.part")
        with _told(self.folder):
            try:
                with open(temporary, "wb") as file:
                    write_whole(file, content)
                temporary.replace(path)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise


def write_whole(file: Any, content: bytes) -> None:
    """Write and wait until it is on the disk: a full disk shows here at the latest."""
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise TuningError(
            f"Tuning cannot write into {folder} ({reason}); free some space or give a smaller disk budget, "
            "then start it again: what is done is kept."
        ) from error


# --- shards of text ---------------------------------------------------------------------------------------


def text_name(shard: int) -> str:
    return f"text-{shard:05d}"


def invented_name(shard: int) -> str:
    return f"invented-{shard:05d}"


def states_name(shard: int) -> str:
    return f"states-{shard:05d}"


def save_sequences(store: Store, name: str, sequences: Sequences) -> None:
    """Write one shard of text."""
    tokens = sequences.tokens[:, : int(sequences.lengths.max())]
    store.save(
        name,
        {"tokens": tokens, "prompt_lengths": sequences.prompt_lengths, "lengths": sequences.lengths},
    )


def load_sequences(store: Store, name: str) -> Sequences | None:
    """One shard of text, or None."""
    found = store.load(name)
    if found is None or found[0].keys() != {"tokens", "prompt_lengths", "lengths"}:
        return None
    return Sequences(**found[0])


class Corpus:
    """The shards of text as one, with the final states that are kept of them.

    Args:
        shards: the text. num_kept: of how many of the first shards the states are kept in ``store``.

    Attributes:
        kept: bool ``[n]``, the sequences whose states are kept.
    """

    def __init__(self, store: Store, shards: list[Sequences], num_kept: int) -> None:
        self.sequences = Sequences.join(shards)
        self._store = store
        self._files: dict[int, Any] = {}
        shard_of, offset = [], []
        for index, shard in enumerate(shards):
            ends = shard.lengths.long().cumsum(0)
            shard_of.append(torch.full_like(ends, index))
            offset.append(ends - shard.lengths)
        self._shard_of, self._offset = torch.cat(shard_of), torch.cat(offset)
        self.kept = self._shard_of < num_kept

    def batch(self, rows: Tensor, device: torch.device) -> Batch:
        """The sequences ``rows``, cut to the longest of them."""
        part, finals = cut(self.sequences, rows), None
        if bool(self.kept[rows].all()):
            width = part.tokens.shape[1]
            states = [F.pad(s, (0, 0, 0, width - len(s))) for s in map(self._states, rows.tolist())]
            finals = torch.stack(states).to(device)
        return Batch(part, finals)

    def close(self) -> None:
        """Let go of the files, which are mapped into memory."""
        self._files.clear()

    def _states(self, row: int) -> Tensor:
        """bfloat16 ``[length, D]``."""
        from safetensors import safe_open

        shard, begin = int(self._shard_of[row]), int(self._offset[row])
        if shard not in self._files:
            self._files[shard] = safe_open(self._store.path(states_name(shard)), "pt").__enter__()
        states: Tensor = self._files[shard].get_slice("states")[
            begin : begin + int(self.sequences.lengths[row])
        ]
        return states


def cut(sequences: Sequences, rows: Tensor) -> Sequences:
    """The sequences ``rows``, padded to what the longest of them needs."""
    part = sequences.select(rows)
    width = padded(int(part.lengths.max()))
    tokens = F.pad(part.tokens, (0, max(0, width - part.tokens.shape[1])))[:, :width]
    return Sequences(tokens, part.prompt_lengths, part.lengths)


def in_groups(sequences: Sequences, tokens_per_batch: int) -> list[Tensor]:
    """Rows of all ``sequences`` in batches of similar length, in a fixed order."""
    groups, group = [], list[int]()
    for row in sequences.lengths.argsort(stable=True).tolist():
        if group and (len(group) + 1) * padded(int(sequences.lengths[row])) > tokens_per_batch:
            groups.append(torch.tensor(group))
            group = []
        group.append(row)
    return [*groups, torch.tensor(group)]
