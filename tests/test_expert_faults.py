"""What goes wrong with the experts' file ends in one sentence, never in a wrong token, and what is done is kept."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import paths
from engine.errors import ExpertStoreError, InvalidRequestError, OutOfMemoryError
from engine.experts import conversion, memory_guard, store
from engine.experts.blob import PAGE, checksum
from engine.experts.memory_guard import MemoryGuard
from engine.experts.model import prepare_store
from engine.experts.planner import parse_memory, plan_memory
from engine.experts.store import Key, damage_mark, read_index, unreadable
from engine.hardware import MemoryUse
from engine.kernels import turn_fields
from engine.loading import load_session
from engine.models.checkpoint import open_checkpoint
from engine.models.feed_forward import FeedForward
from engine.quantization import get_format
from engine.requests import GenerationRequest
from engine.session import Session
from tests import tiny

NUM_SLOTS = 5
REQUEST = GenerationRequest(prompt_ids=tuple(range(30, 50)), max_new_tokens=20, ignore_eos=True)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(paths.HOME_VARIABLE, str(tmp_path / "home"))
    # The test process is larger than the one that the plan is for.
    monkeypatch.setattr(memory_guard, "process_memory", lambda: 0)
    return tiny.save_model(tmp_path / "moe", "qwen3_moe")


@pytest.fixture
def session(folder: Path) -> Iterator[Session]:
    loaded = load_offloaded(folder)
    yield loaded
    loaded.close()


def load_offloaded(folder: Path) -> Session:
    return load_session("tiny", folder, "fp32", "cpu", memory=budget(folder))


def budget(folder: Path, num_slots: int = NUM_SLOTS, weight_format: str = "fp32") -> int:
    """Bytes that leave ``num_slots`` slots."""
    plan = plan_memory(open_checkpoint(folder).config, get_format(weight_format), 1 << 40)
    return plan.process + plan.dense + plan.context + num_slots * plan.expert


def answer(session: Session) -> list[int]:
    generation = session.stream_generate(REQUEST, reuse_prefix=False)
    return [piece.token_id for round_ in generation for piece in round_.pieces]


def store_file() -> Path:
    (file,) = (paths.cache_dir() / "experts").glob("*.experts")
    return file


def flip(file: Path, at: int) -> None:
    with file.open("r+b") as handle:
        handle.seek(at)
        byte = handle.read(1)[0]
        handle.seek(at)
        handle.write(bytes([byte ^ 4]))


def count_builds(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The experts that are packed from now on."""
    from engine.experts import model

    built: list[tuple[int, int]] = []
    packer = model.expert_packer

    def counting(*arguments: object) -> object:
        build = packer(*arguments)  # type: ignore[arg-type]

        def one(layer: int, number: int) -> FeedForward:
            built.append((layer, number))
            return build(layer, number)

        return one

    monkeypatch.setattr(model, "expert_packer", counting)
    return built


def test_a_session_with_little_memory_answers_as_one_with_much(folder: Path, session: Session) -> None:
    assert session.experts() is not None and session.experts().num_slots == NUM_SLOTS  # type: ignore[union-attr]
    assert any("5 of 24 experts stay in memory" in note for note in session.info.notes)
    with_all = load_session("tiny", folder, "fp32", "cpu", memory=1 << 40)
    assert with_all.experts() is None
    assert answer(session) == answer(with_all)
    assert session.info.num_parameters == with_all.info.num_parameters
    assert session.info.weight_bytes == with_all.info.weight_bytes
    report = session.experts()
    assert report is not None and report.stats.bytes_loaded > 0
    assert sum(map(sum, report.resident)) <= NUM_SLOTS and sum(map(sum, report.uses)) > 0


def test_a_flipped_bit_is_told_and_only_that_expert_made_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_offloaded(folder)
    tokens = answer(first)
    first.close()
    for number in range(8):  # of layer 1: whichever is asked for first
        flip(store_file(), (8 + number) * read_index(store_file()).blob_bytes + 100)
    with pytest.raises(ExpertStoreError, match=r"Expert \d of layer 1 .* is damaged; load the model again"):
        answer(load_offloaded(folder))
    assert damage_mark(store_file()).exists()
    built = count_builds(monkeypatch)
    repaired = load_offloaded(folder)
    assert built == [(1, number) for number in range(8)]
    assert answer(repaired) == tokens
    repaired.close()
    assert not damage_mark(store_file()).exists()


@pytest.mark.parametrize("kept", [0, 100, 5 * PAGE + 7])
def test_a_store_that_was_cut_short_is_made_anew(folder: Path, kept: int) -> None:
    first = load_offloaded(folder)
    tokens = answer(first)
    first.close()
    os.truncate(store_file(), kept)
    with pytest.raises(ExpertStoreError, match="cut short or damaged"):
        read_index(store_file())
    again = load_offloaded(folder)
    assert answer(again) == tokens
    again.close()


def test_cut_short_or_unreadable_while_it_answers(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    generation = session.stream_generate(REQUEST, reuse_prefix=False)
    next(generation)
    os.truncate(store_file(), 0)
    with pytest.raises(ExpertStoreError, match=r"cannot be read from .*; check the disk"):
        list(generation)
    assert generation.finished and generation.result.text is not None  # what had come is kept

    def broken(*arguments: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(store, "_read_at", broken)
    with pytest.raises(ExpertStoreError, match="cannot be read"):
        answer(session)


@pytest.mark.skipif(os.name == "nt", reason="Windows does not delete open files")
def test_deleted_while_it_answers(folder: Path, session: Session) -> None:
    tokens = answer(session)
    store_file().unlink()
    assert answer(session) == tokens  # an open file stays until it is closed
    again = load_offloaded(folder)
    assert answer(again) == tokens
    again.close()


def test_an_error_in_a_load_ahead_is_nobodys_business(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is needed must arrive."""
    tokens = answer(session)
    cache, failed = session.backend.tiers.cache, list[Key]()  # type: ignore[attr-defined]

    def damaged_once(key: Key, blob: memoryview) -> None:
        if key == absent and not failed:
            failed.append(key)
            raise unreadable(store_file())

    absent = next(key for key in cache.store.keys if not cache.holds(key))
    cache._fields[turn_fields.MAPPED] = 0  # it lies in the file cache, and would not be loaded
    cache._kept[turn_fields.CHECKED][:] = 0
    monkeypatch.setattr(cache.store, "check", damaged_once)
    cache.prefetch([absent])
    deadline = time.monotonic() + 10
    while not failed and time.monotonic() < deadline:
        cache.prefetch([])
        time.sleep(0.01)
    assert not cache.holds(absent)
    assert failed and answer(session) == tokens


def test_too_little_memory_for_one_layer(folder: Path) -> None:
    with pytest.raises(OutOfMemoryError, match=r"needs \d+ MB of memory as fp32, and there are"):
        load_session("tiny", folder, "fp32", "cpu", memory=budget(folder, 2))


def test_another_model_or_format_gets_a_store_of_its_own(folder: Path, session: Session) -> None:
    other = load_session("tiny", folder, "bf16", "cpu", memory=budget(folder, weight_format="bf16"))
    assert len(list((paths.cache_dir() / "experts").glob("*.experts"))) == 2
    other.close()


def test_a_changed_model_is_converted_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_store(folder, "fp32").close()
    tiny.save_model(folder, "qwen3_moe", seed=1)
    built = count_builds(monkeypatch)
    prepare_store(folder, "fp32").close()
    assert len(built) == 24
    prepare_store(folder, "fp32").close()
    assert len(built) == 24


def test_stopped_and_taken_up_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    seen: list[str] = []

    def watch(progress: object) -> None:
        seen.append(progress.message)  # type: ignore[attr-defined]
        if len(seen) == 10:
            stop.set()

    with pytest.raises(ExpertStoreError, match="was stopped; load the model again"):
        prepare_store(folder, "fp32", watch, stop)
    assert seen[9].startswith("Preparing the experts, once: 10 of 24")
    assert not list((paths.cache_dir() / "experts").glob("*.experts"))
    built = count_builds(monkeypatch)
    prepare_store(folder, "fp32").close()
    assert len(built) == 14


def test_killed_while_converting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import sys, time; from pathlib import Path\n"
        "from engine.experts import conversion; conversion._SYNC_SECONDS = 0.0\n"
        "from engine.experts.model import prepare_store\n"
        "def show(p):\n    print(int(p.done), flush=True)\n    time.sleep(0.05)\n"
        "prepare_store(Path(sys.argv[1]), 'fp32', show)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert process.stdout is not None
    while int(process.stdout.readline()) < 9:
        pass
    process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    process.wait()
    built = count_builds(monkeypatch)
    kept = prepare_store(folder, "fp32")
    assert 0 < len(built) <= 24 - 9
    blob = memoryview(bytearray(kept.layout.nbytes))
    for key in kept.keys:
        kept.read(key, blob, 0, len(blob))
        kept.check(key, blob)
    kept.close()


def test_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        usage = conversion.shutil.disk_usage(folder)
        patch.setattr(conversion.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(ExpertStoreError, match=r"take 0\.\d GB more in .*, where 0\.0 GB are free"):
            prepare_store(folder, "fp32")
    calls: list[int] = []
    sync = conversion.os.fsync

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_SYNC_SECONDS", 0.0)
        patch.setattr(conversion.os, "fsync", full)
        with pytest.raises(ExpertStoreError, match="No space left on device; make room"):
            prepare_store(folder, "fp32")
    built = count_builds(monkeypatch)
    prepare_store(folder, "fp32").close()
    assert 0 < len(built) < 24


def test_slots_leave_when_memory_gets_short(session: Session) -> None:
    tokens = answer(session)
    tiers = session.backend.tiers  # type: ignore[attr-defined]
    plan, cache = tiers.plan, tiers.cache
    roomy = MemoryUse(used=10, total=100)
    MemoryGuard(cache, plan, "cpu", lambda: roomy, lambda: plan.budget).look()
    assert cache.num_slots == NUM_SLOTS
    MemoryGuard(cache, plan, "cpu", lambda: roomy, lambda: plan.budget + 1).look()
    assert cache.num_slots == NUM_SLOTS - 1
    MemoryGuard(cache, plan, "cpu", lambda: roomy, lambda: 2 * plan.budget).look()
    assert cache.num_slots == NUM_SLOTS - 1  # all slots together would not make up for that
    for _ in range(5):
        MemoryGuard(cache, plan, "cpu", lambda: MemoryUse(used=99, total=100), lambda: plan.budget).look()
    assert cache.num_slots == plan.least_slots == 3
    assert answer(session) == tokens
    assert len(cache.residents()) <= 3


@pytest.mark.parametrize(
    ("text", "count"), [("6GB", 6 * 10**9), ("1.5 g", 15 * 10**8), ("800MB", 8 * 10**8), ("2GiB", 2 * 10**9)]
)
def test_amounts_of_memory(text: str, count: int) -> None:
    assert parse_memory(text) == count


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0GB", "6TB5", "nan"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="is no amount of memory"):
        parse_memory(text)


def test_checksums_see_every_damage_within_a_page() -> None:
    blob = bytearray(os.urandom(3 * PAGE))
    whole = checksum(bytes(blob))
    for at in (0, 7, PAGE - 1, PAGE, 3 * PAGE - 1):
        for bit in range(8):
            blob[at] ^= 1 << bit
            assert checksum(bytes(blob)) != whole
            blob[at] ^= 1 << bit
    assert checksum(bytes(blob)) == whole
    assert checksum(bytes(blob[:PAGE]) + bytes(2 * PAGE)) != whole
