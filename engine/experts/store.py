"""All routed experts of a model in one file, read one blob at a time.

The blobs lie one behind the other, each with a checksum; behind them a JSON index, its length and a magic word.
A file is there only once it is whole: :mod:`engine.experts.conversion` writes it under another name.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from engine.errors import ExpertStoreError
from engine.experts.blob import BlobLayout, checksum

Key: TypeAlias = tuple[int, int]  # layer and expert
Shape: TypeAlias = tuple[
    int, int
]  # of an array with a place for each: layers, dense ones among them, and experts
MAGIC = b"SLIPEXPT"


@dataclass(frozen=True)
class StoreIndex:
    """What a store holds. ``about`` tells the model, the format and all else that the bytes depend on."""

    layers: tuple[int, ...]
    num_experts: int
    blob_bytes: int
    checksums: tuple[int, ...]  # of the blobs, layer by layer
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> Shape:
        """Of arrays over all experts."""
        return max(self.layers) + 1, self.num_experts

    def encode(self) -> bytes:
        """What lies behind the blobs."""
        data = json.dumps(
            {
                "layers": self.layers, "num_experts": self.num_experts, "blob_bytes": self.blob_bytes,
                "checksums": self.checksums, "about": self.about,
            }
        ).encode()  # fmt: skip
        return data + len(data).to_bytes(8, "little") + MAGIC


class ExpertStore:
    """An open store. Reads are positioned, so any number of threads may share it.

    Args:
        direct: bypass the system's file cache, where it can be (Linux). For measurements: the cache only
            ever helps.

    Attributes:
        descriptor: of the open file.

    Raises:
        ExpertStoreError: the file is missing, cut short, damaged, or of another model, format or version.
    """

    def __init__(self, file: Path, layout: BlobLayout, about: dict[str, Any], direct: bool = False) -> None:
        self.file, self.layout = file, layout
        self.index = read_index(file)
        if self.index.about != about or self.index.blob_bytes != layout.nbytes:
            raise ExpertStoreError(
                f"The experts in {file.name} belong to another model or version; delete the file, and it is "
                "made anew."
            )
        self._numbers = {
            (layer, expert): place * self.index.num_experts + expert
            for place, layer in enumerate(self.index.layers)
            for expert in range(self.index.num_experts)
        }
        self._checked: set[Key] = set()
        self.direct = direct and hasattr(os, "O_DIRECT")
        try:
            flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | (os.O_DIRECT if self.direct else 0)
            self.descriptor = os.open(file, flags)
        except OSError as error:
            raise unreadable(file) from error

    @property
    def keys(self) -> tuple[Key, ...]:
        """All experts, in the order in which they lie."""
        return tuple(self._numbers)

    def offset(self, key: Key) -> int:
        """Where in the file an expert's blob begins."""
        return self._numbers[key] * self.index.blob_bytes

    def read(self, key: Key, blob: memoryview, begin: int, end: int) -> None:
        """Bytes ``begin .. end`` of an expert's blob into the same place of ``blob``.

        Raises:
            ExpertStoreError: the disk or the file cannot be read.
        """
        offset = self.offset(key)
        try:
            while begin < end:
                count = _read_at(self.descriptor, blob[begin:end], offset + begin)
                if count == 0:
                    raise unreadable(self.file)
                begin += count
        except OSError as error:
            raise unreadable(self.file) from error

    def check(self, key: Key, blob: memoryview) -> None:
        """Compare a whole blob with its checksum, the first time that it is read: what a disk keeps wrongly it keeps
        wrongly from the start, and summing up every load would take a tenth of a token's time.

        Raises:
            ExpertStoreError: a bit differs.
        """
        if key in self._checked:
            return
        if checksum(blob) != self.index.checksums[self._numbers[key]]:
            with contextlib.suppress(OSError):
                damage_mark(self.file).touch()
            raise ExpertStoreError(
                f"Expert {key[1]} of layer {key[0]} in {self.file.name} is damaged; load the model again, and "
                "that part of the file is made anew."
            )
        self._checked.add(key)

    def close(self) -> None:
        """Closing twice is harmless."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def read_index(file: Path) -> StoreIndex:
    """The index at the end of ``file``.

    Raises:
        ExpertStoreError: there is none, or it does not fit the file.
    """
    try:
        with file.open("rb") as handle:
            size = handle.seek(0, os.SEEK_END)
            handle.seek(max(0, size - 16))
            tail = handle.read(16)
            length = int.from_bytes(tail[:8], "little")
            if tail[8:] != MAGIC or length > size - 16:
                raise ValueError("no index")
            handle.seek(size - 16 - length)
            raw = json.loads(handle.read(length))
        index = StoreIndex(
            tuple(raw["layers"]), raw["num_experts"], raw["blob_bytes"], tuple(raw["checksums"]), raw["about"]
        )
        blobs = len(index.layers) * index.num_experts
        if len(index.checksums) != blobs or size != blobs * index.blob_bytes + length + 16:
            raise ValueError("the sizes differ")
        return index
    except OSError as error:
        raise unreadable(file) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ExpertStoreError(
            f"The file with the model's experts, {file.name}, is cut short or damaged; load the model again, and "
            "what is missing is made anew."
        ) from error


def damage_mark(file: Path) -> Path:
    """A file that is there once a blob of ``file`` was found damaged."""
    return file.with_suffix(".damaged")


def view_bytes(blob: Tensor) -> memoryview:
    """A CPU tensor's bytes."""
    view: memoryview = blob.numpy().data
    return view


def unreadable(file: Path) -> ExpertStoreError:
    return ExpertStoreError(
        f"The model's experts cannot be read from {file.name}; check the disk, then load the model again."
    )


if hasattr(os, "preadv"):

    def _read_at(descriptor: int, target: memoryview, offset: int) -> int:
        return os.preadv(descriptor, [target], offset)

else:  # Windows
    import threading

    _seeking = threading.Lock()

    def _read_at(descriptor: int, target: memoryview, offset: int) -> int:
        with _seeking:
            os.lseek(descriptor, offset, os.SEEK_SET)
            data = os.read(descriptor, len(target))
        target[: len(data)] = data
        return len(data)
