"""Downloads that break, stall, lie and run out of room."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from stand_in import Fault, StandIn, serve

from engine import download as module
from engine.download import (
    DamagedError,
    DiskError,
    DownloadCancelledError,
    RemoteFile,
    download,
)
from engine.errors import DownloadError
from engine.progress import Progress, ProgressMeter

CONTENT = random.Random(0).randbytes(1_500_000)
PATH = "/model.gguf"
ROOT = Path(__file__).parent.parent


@pytest.fixture
def server() -> Iterator[StandIn]:
    with serve() as state:
        state.files[PATH] = CONTENT
        yield state


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALL_SECONDS", 0.2)
    monkeypatch.setattr(module, "SILENCE_SECONDS", 1.5)
    monkeypatch.setattr(module, "MAX_PAUSE_SECONDS", 0.05)


def fetch(
    server: StandIn,
    target: Path,
    *,
    size: int | None = len(CONTENT),
    digest: str | None = None,
    seen: list[Progress] | None = None,
    cancel: threading.Event | None = None,
) -> Path:
    remote = RemoteFile(server.url + PATH, size, digest or hashlib.sha256(CONTENT).hexdigest())
    meter = ProgressMeter("a model", size, seen.append if seen is not None else None)
    return download(remote, target, meter, cancel)


def sentence(error: BaseException) -> str:
    text = str(error)
    assert text.endswith(".") and "\n" not in text and "Traceback" not in text
    return text


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_a_file_appears_whole_and_alone(server: StandIn, tmp_path: Path) -> None:
    seen: list[Progress] = []
    target = fetch(server, tmp_path / "models" / "m.gguf", seen=seen)
    assert target.read_bytes() == CONTENT
    assert left_over(target.parent) == ["m.gguf"]
    assert seen[-1].done == seen[-1].total == len(CONTENT)
    assert "a model" in seen[-1].message


def test_broken_connections_are_continued_not_repeated(server: StandIn, tmp_path: Path) -> None:
    server.faults[PATH] = Fault(cut_after=400_000, times=3)
    target = fetch(server, tmp_path / "m.gguf")
    assert target.read_bytes() == CONTENT
    assert server.asked(PATH) == [None, "bytes=400000-", "bytes=800000-", "bytes=1200000-"]
    assert server.bytes_sent == len(CONTENT)


def test_a_server_without_ranges_sends_it_all_again(server: StandIn, tmp_path: Path) -> None:
    server.faults[PATH] = Fault(cut_after=400_000, times=1, ignore_range=True)
    seen: list[Progress] = []
    assert fetch(server, tmp_path / "m.gguf", seen=seen).read_bytes() == CONTENT
    assert seen[-1].done == len(CONTENT)


def test_a_server_that_does_not_tell_the_size(server: StandIn, tmp_path: Path) -> None:
    assert fetch(server, tmp_path / "m.gguf", size=None).read_bytes() == CONTENT


def test_a_killed_download_resumes(server: StandIn, tmp_path: Path) -> None:
    server.faults[PATH] = Fault(pause_per_chunk=0.1)
    target = tmp_path / "m.gguf"
    digest = hashlib.sha256(CONTENT).hexdigest()
    script = (
        "import sys; from pathlib import Path\n"
        "from engine.download import RemoteFile, download; from engine.progress import ProgressMeter\n"
        f"remote = RemoteFile({server.url + PATH!r}, {len(CONTENT)}, {digest!r})\n"
        "download(remote, Path(sys.argv[1]), ProgressMeter('a model', None, None))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(target)], cwd=ROOT)
    until = time.monotonic() + 30
    while not any(path.stat().st_size > 200_000 for path in tmp_path.glob(".*.partial")):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists()  # a half download is never listed
    (partial,) = tmp_path.glob(".*.partial")
    have = partial.stat().st_size
    server.faults.clear()
    server.requests.clear()
    assert fetch(server, target).read_bytes() == CONTENT
    assert server.asked(PATH) == [f"bytes={have}-"]


def test_a_damaged_part_is_fetched_again(server: StandIn, tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    digest = hashlib.sha256(CONTENT).hexdigest()
    (tmp_path / f".m.gguf.{digest[:16]}.partial").write_bytes(b"\0" * 300_000)
    assert fetch(server, target).read_bytes() == CONTENT
    assert server.asked(PATH) == ["bytes=300000-", None]


@pytest.mark.parametrize("extra", [0, 5])
def test_a_part_as_long_as_the_file_or_longer(server: StandIn, tmp_path: Path, extra: int) -> None:
    digest = hashlib.sha256(CONTENT).hexdigest()
    (tmp_path / f".m.gguf.{digest[:16]}.partial").write_bytes(b"x" * (len(CONTENT) + extra))
    assert fetch(server, tmp_path / "m.gguf").read_bytes() == CONTENT


def test_a_complete_part_is_not_fetched_again(server: StandIn, tmp_path: Path) -> None:
    digest = hashlib.sha256(CONTENT).hexdigest()
    (tmp_path / f".m.gguf.{digest[:16]}.partial").write_bytes(CONTENT)
    assert fetch(server, tmp_path / "m.gguf").read_bytes() == CONTENT
    assert server.requests == []


def test_a_wrong_hash_is_refused_and_thrown_away(server: StandIn, tmp_path: Path) -> None:
    with pytest.raises(DamagedError) as caught:
        fetch(server, tmp_path / "m.gguf", digest="0" * 64)
    assert "checksum" in sentence(caught.value)
    assert left_over(tmp_path) == []


def test_a_stall_is_shown_as_stalled(server: StandIn, tmp_path: Path) -> None:
    server.faults[PATH] = Fault(stall_after=500_000, times=1)
    seen: list[Progress] = []
    assert fetch(server, tmp_path / "m.gguf", seen=seen).read_bytes() == CONTENT
    stalled = [progress for progress in seen if progress.stalled]
    assert stalled and all(progress.seconds_left is None for progress in stalled)
    assert any("stalled" in progress.message for progress in stalled)
    assert not seen[-1].stalled
    assert server.asked(PATH)[1] == "bytes=500000-"  # opened again, and continued


def test_a_stalled_download_can_be_stopped_at_once(server: StandIn, tmp_path: Path) -> None:
    server.faults[PATH] = Fault(stall_after=500_000, times=1)
    cancel = threading.Event()
    seen: list[Progress] = []
    threading.Timer(0.5, cancel.set).start()
    begin = time.monotonic()
    with pytest.raises(DownloadCancelledError) as caught:
        fetch(server, tmp_path / "m.gguf", seen=seen, cancel=cancel)
    assert time.monotonic() - begin < 1.4  # before the connection is given up
    sentence(caught.value)
    server.faults.clear()
    assert fetch(server, tmp_path / "m.gguf").read_bytes() == CONTENT
    assert server.asked(PATH)[-1] == "bytes=500000-"


def test_a_connection_that_always_breaks(server: StandIn, tmp_path: Path) -> None:
    server.faults[PATH] = Fault(cut_after=0, times=1000)
    with pytest.raises(DownloadError) as caught:
        fetch(server, tmp_path / "m.gguf")
    assert "keeps breaking" in sentence(caught.value)
    assert len(server.requests) == module.MAX_TRIES


def test_nobody_listens(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(DownloadError) as caught:
        download(RemoteFile("http://127.0.0.1:9/x", 1, "0"), tmp_path / "x", ProgressMeter("x", 1, None))
    assert "cannot be reached" in sentence(caught.value)
    assert time.monotonic() - begin < 3


@pytest.mark.parametrize("status", [403, 404, 503])
def test_a_server_that_refuses(server: StandIn, tmp_path: Path, status: int) -> None:
    server.faults[PATH] = Fault(status=status, times=1000)
    with pytest.raises(DownloadError) as caught:
        fetch(server, tmp_path / "m.gguf")
    assert str(status) in sentence(caught.value)
    assert len(server.requests) == 1


def test_an_error_in_the_middle_is_waited_out(server: StandIn, tmp_path: Path) -> None:
    server.faults[PATH] = Fault(cut_after=400_000, times=1)
    original = module._pause

    def then_fail_once(*arguments: object) -> None:
        original(*arguments)  # type: ignore[arg-type]
        server.faults[PATH] = Fault(status=503, times=1) if len(server.requests) == 1 else Fault()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_pause", then_fail_once)
        assert fetch(server, tmp_path / "m.gguf").read_bytes() == CONTENT
    assert len(server.requests) == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_fills_up(server: StandIn, tmp_path: Path) -> None:
    digest = hashlib.sha256(CONTENT).hexdigest()
    (tmp_path / f".m.gguf.{digest[:16]}.partial").symlink_to("/dev/full")
    with pytest.raises(DiskError) as caught:
        fetch(server, tmp_path / "m.gguf")
    assert "disk is full" in sentence(caught.value)
    assert "SLIPSTREAM_HOME" in str(caught.value)
    assert not (tmp_path / "m.gguf").exists()


def test_a_disk_that_is_too_small_is_told_before(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: free)
    with pytest.raises(DiskError) as caught:
        fetch(server, tmp_path / "m.gguf")
    assert "needs 2 MB" in sentence(caught.value) and server.requests == []


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(server: StandIn, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DiskError) as caught:
        fetch(server, tmp_path / "m.gguf")
    assert "cannot be written" in sentence(caught.value)


def test_a_file_where_the_folder_should_be(server: StandIn, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("")
    with pytest.raises(DiskError) as caught:
        fetch(server, tmp_path / "models" / "m.gguf")
    assert "cannot be written" in sentence(caught.value)


def test_two_at_once_fetch_it_once(server: StandIn, tmp_path: Path) -> None:
    server.faults[PATH] = Fault(pause_per_chunk=0.03)
    target = tmp_path / "m.gguf"
    others: list[Path] = []
    thread = threading.Thread(target=lambda: others.append(fetch(server, target)))
    thread.start()
    assert fetch(server, target).read_bytes() == CONTENT
    thread.join()
    assert others == [target]
    assert server.bytes_sent == len(CONTENT)


def test_time_left_comes_from_the_recent_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("engine.progress.time.monotonic", lambda: clock[0])
    seen: list[Progress] = []
    meter = ProgressMeter("a model", 10_000_000, seen.append)
    meter.add(4_000_000, fresh=False)  # resumed: it says nothing about the speed
    for _ in range(4):
        clock[0] += 0.5
        meter.add(500_000)
    assert seen[-1].seconds_left == pytest.approx(4.0)
    assert "6 of 10 MB, 4 s left" in seen[-1].message
    clock[0] += 9
    meter.report(stalled=True, note="stalled")
    assert seen[-1].seconds_left is None and seen[-1].stalled
