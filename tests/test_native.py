"""Compiled kernels are kept as object code, which LLVM alone links; and the quick imports leave nothing out."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

from engine.kernels import native
from engine.kernels.native import Kinds

ROOT = Path(__file__).resolve().parents[1]
KINDS = Kinds("uint16", "uint16", "uint32", "uint32")


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kept_code_runs_without_the_compiler() -> None:
    code = f"""
import sys
import numpy as np
from engine.kernels import control
from engine.kernels.native import Kinds, load_program
program = load_program({KINDS!r})
block = np.zeros(200, np.int64)
block[control.THREADS] = 3
program.publish(block.ctypes.data)
program.publish(block.ctypes.data)
number, threads = divmod(block[control.SEQUENCE], control.MOST_THREADS)
print(number, threads, np.count_nonzero(block), "numba" in sys.modules)
"""
    run(code)  # compiles what was not compiled before
    assert run(code) == "2 3 2 False"


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "no header"])
def test_damaged_code_is_compiled_again(
    slipstream_home: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    file = native._folder() / "x.o"
    objects = {"work": ("_work", b"\x00\nabc"), "publish": ("_publish", b"de"), "copy_slot": ("_copy", b"fg")}
    native._write(file, objects)
    assert native._read(file) == objects
    assert [entry.name for entry in file.parent.iterdir()] == ["x.o"]
    whole = file.read_bytes()
    broken = {
        "cut": whole[:-1],
        "flipped": whole[:-1] + b"f",
        "empty": b"",
        "no header": whole[whole.index(b"\n") :],
    }
    file.write_bytes(broken[damage])
    assert native._read(file) is None


def test_code_that_cannot_be_kept_runs_all_the_same(
    slipstream_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.atomic.os.replace", full)
    native._write(native._folder() / "x.o", {"work": ("_work", b"abc")})
    assert list(native._folder().iterdir()) == []  # nothing half


def test_the_compiler_has_a_process_of_its_own(
    slipstream_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where that cannot be had, or leaves nothing, the code is compiled here. Once, and with what is wanted soon."""
    kept = {"work": ("_work", b"abc"), "publish": ("_publish", b"de"), "copy_slot": ("_copy", b"fg")}
    here: list[tuple[str, ...]] = []
    monkeypatch.setattr(native, "_link", lambda symbol, code, *_: (symbol, code))
    monkeypatch.setattr(native, "_compile", lambda names: here.append(names) or kept)
    load = native.load_program.__wrapped__

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(native.subprocess, "run", refuse)
    assert load(KINDS).work == ("_work", b"abc") and here == [astuple(KINDS)]
    apart: list[tuple[str, ...]] = []

    def compile_apart(command: list[str], **options: Any) -> Any:
        assert command[1:3] == ["-m", "engine.kernels.native"]
        apart.append(tuple(command[3:]))
        native._write(native._file(apart[-1]), kept)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(native.subprocess, "run", compile_apart)
    for _ in range(2):
        assert load(KINDS).publish == ("_publish", b"de") and here == [astuple(KINDS)]
    assert sorted(apart) == [
        ("choices",),
        ("draft_rows",),
        ("matches",),
        astuple(KINDS),
    ]  # the first three are wanted soon


def test_torch_without_shapes_works_as_ever(tmp_path: Path) -> None:
    code = f"""
import sys
from app.quick_imports import import_torch
import_torch()
assert "torch._decomp" not in sys.modules
import torch
torch.manual_seed(0)
torch.multinomial(torch.rand(5), 2, generator=torch.Generator().manual_seed(1))
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 4))
model(torch.randn(2, 4)).sum().backward()
from pathlib import Path
from tests import tiny
folder = tiny.save_model(Path({str(tmp_path / "gpt")!r}), hidden_size=64, intermediate_size=128)
from engine.loading import load_session
load_session("llama", folder, "nf4", "cpu")
from transformers import AutoConfig, AutoModelForCausalLM
small = dict(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=tiny.vocab_size(), bos_token_id=0, eos_token_id=2)
AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **small)).save_pretrained(folder)
print(load_session("gpt", folder, "fp32", "cpu").info.architecture)
"""
    assert run(code) == "gpt2"


def test_gradio_brings_pandas_when_it_is_asked_for() -> None:
    code = """
import sys
from app.quick_imports import import_gradio
import_gradio()
assert "pandas" not in sys.modules
from gradio import caching
assert caching.pd.DataFrame({"a": [1]}).shape == (1, 1)
import pandas
print(pandas.DataFrame is caching.pd.DataFrame)
"""
    assert run(code) == "True"
