"""A mapped file that is cut, or whose disk fails, while it is in use: a sentence instead of the end of the process."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.errors import ModelFileError
from engine.mapped_files import check_mapped_files, map_file

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems are left as they are")


def mapping(file: Path, guarded: bool = True, pages: int = 4) -> np.ndarray:
    file.write_bytes(bytes([7]) * (4096 * pages))
    return map_file(file) if guarded else np.memmap(file, np.uint8, mode="r")


def test_pages_that_are_gone_are_zeros_and_told(tmp_path: Path) -> None:
    mapped, other = mapping(tmp_path / "weights.bin"), mapping(tmp_path / "other.bin")
    check_mapped_files()
    os.truncate(tmp_path / "weights.bin", 4096)
    assert mapped[:4096].all() and not mapped[4096:].any() and other.all()
    for _ in range(2):  # until it is given up
        with pytest.raises(ModelFileError, match=r"weights\.bin can no longer be read"):
            check_mapped_files()
    del mapped
    gc.collect()
    check_mapped_files()
    assert other.all()


def test_any_thread_may_find_it(tmp_path: Path) -> None:
    from threading import Thread

    mapped = mapping(tmp_path / "weights.bin", pages=64)
    os.truncate(tmp_path / "weights.bin", 0)
    found: list[int] = []
    threads = [Thread(target=lambda: found.append(int(mapped.sum()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [0] * 4
    with pytest.raises(ModelFileError):
        check_mapped_files()


def test_another_fault_ends_the_process_as_ever(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from tests.test_mapped_files import mapping\n"
        "folder = Path(sys.argv[1])\n"
        "guarded, other = mapping(folder / 'a'), mapping(folder / 'b', guarded=False)\n"
        "os.truncate(folder / 'a', 0); print(guarded.sum(), flush=True)\n"
        "os.truncate(folder / 'b', 0); print(other.sum(), flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.stdout == "0\n" and done.returncode == -7


def test_an_answer_ends_with_the_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept weights, mapped by a second load."""
    from engine.loading import load_session
    from engine.models import packed_model
    from engine.requests import GenerationRequest
    from tests import tiny

    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(packed_model, "_WORTH_KEEPING", 0)
    folder = tiny.save_model(tmp_path / "model")
    tiny.save_tokenizer(folder)
    request = GenerationRequest(prompt_ids=[5, 7, 9], max_new_tokens=40, ignore_eos=True)
    load_session("tiny", folder, "int8", "cpu").close()
    session = load_session("tiny", folder, "int8", "cpu")
    generation = session.stream_generate(request)
    next(generation)
    (file,) = (tmp_path / "home").rglob("packed/*.bin")
    os.truncate(file, 4096)
    with pytest.raises(ModelFileError, match="can no longer be read from its disk"):
        list(generation)
    assert generation.finished
    session.close()
    del session, generation
    gc.collect()
    again = load_session("tiny", folder, "int8", "cpu")  # packed anew
    assert len(list(again.stream_generate(request))) > 0
    again.close()


def test_what_is_loaded_from_a_failing_file_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.models import loader
    from tests import tiny, tiny_gguf

    file = tiny_gguf.save_gguf(tmp_path / "model.gguf", tiny.build_model())
    vector = loader._Packer._vector

    def cut(self: object, name: str, size: int) -> object:
        if name == "model.norm.weight":  # the last one
            os.truncate(file, 8192)
        return vector(self, name, size)  # type: ignore[arg-type]

    monkeypatch.setattr(loader._Packer, "_vector", cut)
    with pytest.raises(ModelFileError, match=r"model\.gguf can no longer be read"):
        loader.load_decoder(file, "fp32")
