"""One file over HTTP: resumable, verified, cancellable, and honest about stalls.

Bytes go to a hidden ``.partial`` file beside the target, whose name carries the expected digest, so a
partial of other content is never continued. The target appears by a rename, after its size and digest
were checked: a file that is there is complete.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import os
import queue
import shutil
import threading
import time
import urllib.error
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import DownloadError
from engine.progress import ProgressMeter
from engine.web import FIRST_ANSWER_SECONDS, cannot_reach, open_url

CHUNK = 1 << 18
SILENCE_SECONDS = 15.0  # a connection that is silent this long is given up and opened again
STALL_SECONDS = 4.0  # from then on the user sees "stalled", not the last speed
MAX_TRIES = 6  # connections in a row that brought nothing
MAX_PAUSE_SECONDS = 15.0


class DownloadCancelledError(DownloadError):
    """The user stopped it; what has arrived stays for the next try."""

    def __init__(self) -> None:
        super().__init__("The download was stopped; what has arrived is kept.")


class DiskError(DownloadError):
    """No room, or no permission to write; another source would not help."""


class DamagedError(DownloadError):
    """What arrived is not what was announced."""


@dataclass(frozen=True)
class RemoteFile:
    """What to fetch. ``digest`` is hexadecimal, of the kind ``digest_kind``: ``sha256``, or ``git-sha1``
    (the hub's identifier of small files). ``private_headers`` go to the first host only."""

    url: str
    size: int | None
    digest: str
    digest_kind: str = "sha256"
    private_headers: Mapping[str, str] = field(default_factory=dict)


def download(
    remote: RemoteFile, target: Path, meter: ProgressMeter, cancel: threading.Event | None = None
) -> Path:
    """Fetch ``remote`` to ``target``, continuing an earlier try; returns ``target``.

    Raises:
        DownloadCancelledError: ``cancel`` was set.
        DiskError: no room for it.
        DamagedError: the content is not what ``remote`` says.
        DownloadError: the server cannot be reached, refuses, or the connection keeps breaking.
    """
    partial = target.with_name(f".{target.name}.{remote.digest[:16]}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(partial.with_suffix(".lock"), meter, cancel):
            if target.exists() and remote.size in (None, target.stat().st_size):
                meter.add(target.stat().st_size, fresh=False)  # another process was faster
                return target
            _fetch_and_check(remote, partial, target.name, meter, cancel)
            publish(partial, target)
            return target
    except urllib.error.HTTPError as error:
        host = urllib.parse.urlsplit(remote.url).hostname
        raise DownloadError(
            f"{host} does not hand out {target.name} (HTTP {error.code} {error.reason}); try again later."
        ) from error
    except OSError as error:
        raise _explain_disk_error(error, target.parent) from error


def publish(partial: Path, target: Path) -> None:
    """Make a finished file appear under its name, durably."""
    with partial.open("r+b") as file:
        os.fsync(file.fileno())
    os.replace(partial, target)


def _fetch_and_check(
    remote: RemoteFile, partial: Path, name: str, meter: ProgressMeter, cancel: threading.Event | None
) -> None:
    """Complete ``partial``. A part left by an earlier try may be damaged, so it gets one clean try more."""
    resumed = _size(partial) > 0
    try:
        _fetch(remote, partial, meter, cancel)
        _check(remote, partial, name)
    except DamagedError:
        meter.take_back(_size(partial))
        partial.unlink(missing_ok=True)
        if not resumed:
            raise
        _fetch_and_check(remote, partial, name, meter, cancel)


def _fetch(remote: RemoteFile, partial: Path, meter: ProgressMeter, cancel: threading.Event | None) -> None:
    """Bring ``partial`` to its full size, over as many connections as it takes."""
    have = _size(partial)
    meter.add(have, fresh=False)
    if remote.size is not None:
        if have > remote.size:
            raise DamagedError("The part that an earlier try left is longer than the file.")
        _check_room(partial.parent, remote.size - have)
    tries, answered, complete = 0, False, have == remote.size
    with partial.open("r+b" if have else "wb", buffering=0) as file:
        file.seek(have)
        while not complete:
            try:
                for start, chunk in _stream(remote, have, meter, cancel):
                    answered = True
                    if start is not None and start < have:  # it cannot continue and sends everything again
                        meter.take_back(have)
                        have = 0
                        file.seek(0)
                        file.truncate()
                    with disk_errors(partial.parent):
                        _write_all(file, chunk)
                    have += len(chunk)
                    tries = 0 if chunk else tries
                    meter.add(len(chunk))
                complete = remote.size is None or have >= remote.size
                if not complete:
                    raise DownloadError("it was closed early")
            except (DownloadCancelledError, DiskError, DamagedError):
                raise
            except (OSError, http.client.HTTPException, DownloadError) as error:
                if isinstance(error, urllib.error.HTTPError) and (error.code < 500 or not answered):
                    raise
                tries += 1
                reason = getattr(error, "reason", error)
                if not answered:
                    raise cannot_reach(remote.url, reason) from error
                if tries >= MAX_TRIES:
                    host = urllib.parse.urlsplit(remote.url).hostname
                    raise DownloadError(
                        f"The connection to {host} keeps breaking ({reason}); start again when the network "
                        "is better, what has arrived is kept."
                    ) from error
                _pause(min(2.0**tries / 2, MAX_PAUSE_SECONDS), meter, cancel)


def _stream(
    remote: RemoteFile, have: int, meter: ProgressMeter, cancel: threading.Event | None
) -> Iterator[tuple[int | None, bytes]]:
    """Yield (offset at which the body starts, b"") once, then (None, chunk) until the body ends.

    A thread of its own reads, since a read cannot be interrupted: so a stall is seen and a stop obeyed
    at once, whatever the connection does.
    """
    items: queue.Queue[tuple[int | None, bytes] | BaseException | None] = queue.Queue(maxsize=16)
    abandoned = threading.Event()

    def put(item: tuple[int | None, bytes] | BaseException | None) -> bool:
        while not abandoned.is_set():
            with contextlib.suppress(queue.Full):
                items.put(item, timeout=0.2)
                return True
        return False

    def read() -> None:
        try:
            headers = {"Range": f"bytes={have}-"} if have else {}
            with open_url(remote.url, headers, remote.private_headers, SILENCE_SECONDS) as response:
                going_on = put((_start_of(response, have), b""))
                # read1: what is there now; read would wait until a slow line has filled the chunk.
                while going_on and (chunk := response.read1(CHUNK)):
                    going_on = put((None, chunk))
            put(None)
        except BaseException as error:
            put(error)

    threading.Thread(target=read, name="download", daemon=True).start()
    patience, last_news = FIRST_ANSWER_SECONDS, time.monotonic()
    try:
        while True:
            if cancel is not None and cancel.is_set():
                raise DownloadCancelledError
            try:
                item = items.get(timeout=0.1)
            except queue.Empty:
                silence = time.monotonic() - last_news
                if silence > patience:
                    raise DownloadError("no answer") from None
                if silence > STALL_SECONDS:
                    meter.report(stalled=True, note="stalled")
                continue
            if item is None:
                return
            if isinstance(item, urllib.error.HTTPError) and item.code == 416:
                raise DamagedError("The part that an earlier try left does not belong to the file.")
            if isinstance(item, BaseException):
                raise item
            patience, last_news = SILENCE_SECONDS, time.monotonic()
            yield item
    finally:
        abandoned.set()


def _start_of(response: Any, asked: int) -> int:
    """The offset at which the body of ``response`` starts: the one asked for, or 0."""
    if response.status != 206:
        return 0
    if not response.headers.get("Content-Range", "").strip().startswith(f"bytes {asked}-"):
        raise DownloadError("it sent another part than asked for")
    return asked


def _write_all(file: Any, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[file.write(view) :]


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn operating-system errors of the block into sentences about ``folder``."""
    try:
        yield
    except OSError as error:
        raise _explain_disk_error(error, folder) from error


def _explain_disk_error(error: OSError, folder: Path) -> DiskError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskError(
            f"The disk is full ({folder}); free some space and start again (what has arrived is kept), "
            "or set SLIPSTREAM_HOME to a folder on another disk."
        )
    return DiskError(
        f"{folder} cannot be written to ({error.strerror}); set SLIPSTREAM_HOME to another folder."
    )


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskError(
            f"The download needs {needed / 1e6:.0f} MB and {folder} has {free / 1e6:.0f} MB free; "
            "free some space, or set SLIPSTREAM_HOME to a folder on another disk."
        )


def _check(remote: RemoteFile, partial: Path, name: str) -> None:
    size = _size(partial)
    with partial.open("rb") as file:
        digest = file_digest(file, remote.digest_kind, size)
    if digest != remote.digest or remote.size not in (None, size):
        raise DamagedError(
            f"{name} arrived damaged (its checksum is wrong) and was thrown away; try again, "
            "and if it happens again, try another network."
        )


def file_digest(file: BinaryIO, kind: str, size: int) -> str:
    """The hexadecimal ``sha256`` or ``git-sha1`` of an open file of ``size`` bytes."""
    if kind == "git-sha1":
        check = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    else:
        check = hashlib.sha256()
    while chunk := file.read(1 << 20):
        check.update(chunk)
    return check.hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _pause(seconds: float, meter: ProgressMeter, cancel: threading.Event | None) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        meter.report(stalled=True, note=f"connection lost, trying again in {max(1, round(left))} s")
        if (cancel or threading.Event()).wait(min(left, 0.25)):
            raise DownloadCancelledError


@contextlib.contextmanager
def exclusive(lock: Path, meter: ProgressMeter, cancel: threading.Event | None) -> Iterator[None]:
    """Hold ``lock`` against other processes; while another holds it, say so and stay cancellable."""
    from filelock import FileLock, Timeout

    handle = FileLock(str(lock))
    while True:
        try:
            handle.acquire(timeout=0.25)
            break
        except Timeout:
            meter.report(note="waiting for another window that fetches it")
            if cancel is not None and cancel.is_set():
                raise DownloadCancelledError from None
    try:
        yield
    finally:
        handle.release()
