"""A model that was loaded before is mapped instead of packed again, and computes the same to the last bit."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import loading
from engine.errors import ModelFileError
from engine.models import packed_model
from engine.models.checkpoint import open_checkpoint
from engine.models.loader import load_decoder
from engine.models.packed_model import PackedModel
from engine.quantization.packed_file import map_packed, write_packed
from engine.session import Session
from tests import tiny


@pytest.fixture
def keep_all(slipstream_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny models are kept as well; returns where."""
    monkeypatch.setattr(packed_model, "_WORTH_KEEPING", 0)
    return slipstream_home / "cache" / "packed"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.save_model(tmp_path / "tiny", "qwen2", hidden_size=64, intermediate_size=128, head_dim=16)


def logits(session: Session) -> torch.Tensor:
    backend: Any = session.backend
    ids = [5, 6, 7, 8]
    cache = backend.new_cache(16)
    rows = backend.stepper.embed(ids)
    layers = backend.decoder.config.num_layers
    return backend.stepper.logits(backend.stepper.run_layers(rows, cache, 0, 0, layers))


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_a_second_load_packs_nothing_and_computes_the_same(
    keep_all: Path, model: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = loading.load_session("tiny", model, name, "cpu")
    assert len(list(keep_all.iterdir())) == 1
    expected = logits(first)

    def refuse(*_: Any) -> None:
        raise AssertionError("packed again")

    monkeypatch.setattr("engine.models.loader.load_decoder", refuse)
    second = loading.load_session("tiny", model, name, "cpu")
    assert second.info == first.info
    assert torch.equal(logits(second), expected)
    for one, other in zip(
        second.backend.decoder.layers,
        first.backend.decoder.layers,
        strict=True,  # type: ignore[attr-defined]
    ):
        assert torch.equal(one.qkv.dequantize(), other.qkv.dequantize())
        assert torch.equal(one.qkv.bias, other.qkv.bias)


@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_what_is_quickly_made_is_not_kept(keep_all: Path, model: Path, name: str) -> None:
    loading.load_session("tiny", model, name, "cpu")
    assert not keep_all.exists()


def test_small_models_are_not_kept(slipstream_home: Path, model: Path) -> None:
    loading.load_session("tiny", model, "int4", "cpu")
    assert not (slipstream_home / "cache" / "packed").exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "header", "other magic"])
def test_a_damaged_file_is_packed_again(keep_all: Path, model: Path, damage: str) -> None:
    expected = logits(loading.load_session("tiny", model, "int4", "cpu"))
    (file,) = keep_all.iterdir()
    whole = file.read_bytes()
    broken = {
        "cut": whole[:-64],
        "flipped": whole[:-5000] + bytes([whole[-5000] ^ 1]) + whole[-4999:],
        "empty": b"",
        "header": whole[:40] + b"\xff" + whole[41:],
        "other magic": b"x" + whole[1:],
    }[damage]
    file.write_bytes(broken)
    assert torch.equal(logits(loading.load_session("tiny", model, "int4", "cpu")), expected)
    assert file.read_bytes() == whole  # and is whole again


def test_a_changed_model_is_packed_again_and_a_damaged_one_refused(keep_all: Path, model: Path) -> None:
    loading.load_session("tiny", model, "int4", "cpu")
    tiny.save_model(model, "qwen2", seed=1, hidden_size=64, intermediate_size=128, head_dim=16)
    changed = loading.load_session("tiny", model, "int4", "cpu")
    assert len(list(keep_all.iterdir())) == 1  # what the model was before is of no use
    fresh = load_decoder(model, "int4")
    qkv = changed.backend.decoder.layers[0].qkv  # type: ignore[attr-defined]
    assert torch.equal(qkv.dequantize(), fresh.layers[0].qkv.dequantize())
    (weights,) = model.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelFileError):
        loading.load_session("tiny", model, "int4", "cpu")


def test_the_disk_is_shared_fairly(keep_all: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loading.load_session("tiny", model, "int4", "cpu")
    (first,) = keep_all.iterdir()
    monkeypatch.setattr(packed_model, "_SHARE_OF_DISK", 0.0)
    loading.load_session("tiny", model, "int8", "cpu")
    assert list(keep_all.iterdir()) == [first]  # nothing fits, so nothing is thrown away for it

    class Usage:
        free = 0

    monkeypatch.setattr(packed_model, "_SHARE_OF_DISK", 1.0)
    monkeypatch.setattr(packed_model.shutil, "disk_usage", lambda folder: Usage)
    smaller = PackedModel(model, "int4", "cpu")
    decoder = smaller.decoder(open_checkpoint(model).config)
    assert decoder is not None
    other = tiny.save_model(
        model.parent / "b", "qwen2", seed=2, hidden_size=64, intermediate_size=128, head_dim=16
    )
    PackedModel(other, "int4", "cpu").keep(decoder)
    assert [file.name[:2] for file in keep_all.iterdir()] == ["b-"]  # the older one has made room


def test_what_a_killed_process_left_is_cleared_away(keep_all: Path, model: Path) -> None:
    keep_all.mkdir(parents=True)
    for name, age in (("a-int4-1.bin.77.partial", 7200), ("b-int4-2.bin.78.partial", 60)):
        (keep_all / name).write_bytes(b"half")
        os.utime(keep_all / name, (time.time() - age,) * 2)
    loading.load_session("tiny", model, "int4", "cpu")
    left = {file.suffix: file.name for file in keep_all.iterdir()}
    assert left.keys() == {".bin", ".partial"} and left[".partial"].startswith("b-")


def test_a_full_disk_keeps_nobody_from_loading(
    keep_all: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.atomic.os.fsync", full)
    loading.load_session("tiny", model, "int4", "cpu")
    assert list(keep_all.iterdir()) == []


def test_every_tensor_starts_at_a_multiple_of_64_bytes(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(7, dtype=torch.uint8),
        "wide": torch.randn(3, 5).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
    }
    write_packed(tmp_path / "x.bin", tensors, {"a": [1, 2]})
    mapped, about = map_packed(tmp_path / "x.bin")
    assert about == {"a": [1, 2]} and list(mapped) == list(tensors)
    for name, tensor in tensors.items():
        assert mapped[name].dtype == tensor.dtype and torch.equal(mapped[name], tensor)
        assert tensor.numel() == 0 or mapped[name].data_ptr() % 64 == 0
    before = (tmp_path / "x.bin").read_bytes()
    mapped["odd"].add_(1)  # stays here
    assert (tmp_path / "x.bin").read_bytes() == before
