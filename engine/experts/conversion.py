"""Writing a model's expert store: once, resumable, and there only when it is whole.

The blobs go into a file of another name, and a journal beside it says which of them are on the disk, with their
checksums. What a killed process has written is compared with the journal and kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from engine.atomic import replacing
from engine.errors import ExpertStoreError
from engine.experts.blob import BlobLayout, checksum, page_aligned
from engine.experts.store import StoreIndex, read_index, view_bytes
from engine.mapped_files import check_mapped_files
from engine.models.feed_forward import FeedForward
from engine.progress import Progress, format_seconds

_SYNC_SECONDS = 5.0  # between two times that what is written is made certain to be on the disk


def write_store(
    file: Path,
    build: Callable[[int, int], FeedForward],
    layers: Sequence[int],
    num_experts: int,
    layout: BlobLayout,
    about: dict[str, Any],
    on_progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> None:
    """Write ``file``, going on with what an earlier call has left.

    Args:
        build: packs one expert, given its layer and number.
        about: what the bytes depend on; work of another ``about`` is thrown away.

    Raises:
        ExpertStoreError: the disk is full or cannot be written, or ``cancel`` was set; what is done is kept.
        ModelFileError: from ``build``.
    """
    from filelock import FileLock

    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        if _is_whole(file, about):  # another process was here
            return
        keys = [(layer, number) for layer in layers for number in range(num_experts)]
        try:
            with _partial(file).open("r+b" if _partial(file).exists() else "w+b") as handle:
                checksums = _kept(file, handle, about, layout.nbytes)
                _check_room(file, (len(keys) - len(checksums)) * layout.nbytes)
                with _Journal(file, about, handle, checksums) as journal:
                    blob = page_aligned(layout.nbytes)
                    began, first = time.monotonic(), len(checksums)
                    for place, key in enumerate(keys):
                        if place in checksums:
                            continue
                        if cancel is not None and cancel.is_set():
                            raise ExpertStoreError(
                                "Preparing the model's experts was stopped; load the model again, and it goes on "
                                "from there."
                            )
                        layout.write(build(*key), blob)
                        check_mapped_files()
                        handle.seek(place * layout.nbytes)
                        handle.write(view_bytes(blob))
                        journal.add(place, checksum(view_bytes(blob)))
                        if on_progress is not None:
                            on_progress(_progress(len(checksums), first, len(keys), began))
                index = StoreIndex(
                    tuple(layers), num_experts, layout.nbytes,
                    tuple(checksums[place] for place in range(len(keys))), about,
                )  # fmt: skip
                handle.seek(len(keys) * layout.nbytes)
                handle.truncate()
                handle.write(index.encode())
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(_partial(file), file)
        except OSError as error:
            raise ExpertStoreError(
                f"The model's experts cannot be written to {file.parent}: {error.strerror or error}; make room or "
                "set SLIPSTREAM_HOME to a folder on another disk, and it goes on from there."
            ) from error
        with contextlib.suppress(OSError):
            _journal(file).unlink()


def reopen(file: Path) -> None:
    """Make a store that turned out damaged one that :func:`write_store` goes on with: what is whole is kept."""
    try:
        index = read_index(file)
        lines = [_first_line(index.about)]
        lines += [f"{place} {crc}\n" for place, crc in enumerate(index.checksums)]
        _journal(file).write_text("".join(lines), encoding="utf-8")
        os.replace(file, _partial(file))
    except (ExpertStoreError, OSError):  # not even an index is left
        with contextlib.suppress(OSError):
            file.unlink()


def _is_whole(file: Path, about: dict[str, Any]) -> bool:
    try:
        return read_index(file).about == about
    except ExpertStoreError:
        return False


def _partial(file: Path) -> Path:
    return file.with_suffix(".partial")


def _journal(file: Path) -> Path:
    return file.with_suffix(".journal")


def _first_line(about: dict[str, Any]) -> str:
    return json.dumps(about, sort_keys=True) + "\n"


class _Journal:
    """Appends the checksums of blobs, after the blobs themselves are on the disk."""

    def __init__(
        self, file: Path, about: dict[str, Any], handle: BinaryIO, checksums: dict[int, int]
    ) -> None:
        self._handle, self._checksums = handle, checksums
        self._pending: list[str] = []
        self._synced = time.monotonic()
        with replacing(_journal(file)) as text:
            kept = "".join(f"{place} {crc}\n" for place, crc in checksums.items())
            text.write((_first_line(about) + kept).encode())
        self._text = _journal(file).open("a", encoding="utf-8")

    def __enter__(self) -> _Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._sync()
        finally:
            self._text.close()

    def add(self, place: int, value: int) -> None:
        self._checksums[place] = value
        self._pending.append(f"{place} {value}\n")
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self._sync()

    def _sync(self) -> None:
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self._text.writelines(self._pending)
        self._text.flush()
        self._pending.clear()
        self._synced = time.monotonic()


def _kept(file: Path, handle: BinaryIO, about: dict[str, Any], size: int) -> dict[int, int]:
    """The checksums of the blobs that an earlier call has written and that are whole, by place."""
    found: dict[int, int] = {}
    for place, expected in _journal_lines(file, about):
        handle.seek(place * size)
        blob = handle.read(size)
        if len(blob) == size and checksum(blob) == expected:
            found[place] = expected
    return found


def _journal_lines(file: Path, about: dict[str, Any]) -> Iterator[tuple[int, int]]:
    try:
        lines = _journal(file).read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError):
        return
    if lines and lines[0] == _first_line(about):
        for line in lines[1:]:
            words = line.split()
            if len(words) == 2 and line.endswith("\n") and all(word.isdigit() for word in words):
                yield int(words[0]), int(words[1])


def _check_room(file: Path, needed: int) -> None:
    free = shutil.disk_usage(file.parent).free
    if needed > free:
        raise ExpertStoreError(
            f"The model's experts take {needed / 1e9:.1f} GB more in {file.parent}, where {free / 1e9:.1f} GB are "
            "free; make room or set SLIPSTREAM_HOME to a folder on another disk."
        )


def _progress(done: int, first: int, total: int, began: float) -> Progress:
    passed = time.monotonic() - began
    left = passed / (done - first) * (total - done) if done > first and passed > 1 else None
    tail = f", {format_seconds(left)} left" if left is not None else ""
    message = f"Preparing the experts, once: {done} of {total}{tail}."
    return Progress("prepare", done, total, left, False, message)
