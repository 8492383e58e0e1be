"""Accelerators on disk: what was saved comes back, and what does not fit is refused in one sentence."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import AdapterError
from engine.models.decoder import Decoder
from engine.models.loader import load_decoder
from engine.residuals import adapter_file
from engine.residuals.accelerator import Accelerator, AcceleratorConfig
from engine.residuals.adapter_file import (
    find_adapter,
    fingerprint,
    load_accelerator,
    read_card,
    save_accelerator,
)
from engine.residuals.shrink import shrink
from tests import tiny

CONFIG = AcceleratorConfig(depth=2, rank=4, draft_vocab_size=64)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return load_decoder(tiny.save_model(tmp_path_factory.mktemp("models") / "tiny"), "fp32")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """A model of the same shape with other weights."""
    return load_decoder(tiny.save_model(tmp_path_factory.mktemp("models") / "other", seed=1), "fp32")


@pytest.fixture
def saved(decoder: Decoder, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    accelerator = Accelerator(CONFIG, decoder.config)
    accelerator.draft_vocab = torch.arange(0, 192, 3)
    path = tmp_path / "mine.safetensors"
    save_accelerator(path, accelerator, decoder, "Tiny", {"steps": 1}, {"note": "none"})
    return path


def refused(path: Path, decoder: Decoder) -> str:
    """The sentence with which loading is refused."""
    with pytest.raises(AdapterError) as caught:
        load_accelerator(path, decoder)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and path.stem in message
    return message


def edit_card(path: Path, **changes: Any) -> None:
    card = path.with_suffix(".json")
    card.write_text(json.dumps({**json.loads(card.read_text()), **changes}))


def test_what_is_saved_comes_back(decoder: Decoder, saved: Path) -> None:
    loaded = load_accelerator(saved, decoder)
    torch.manual_seed(0)
    original = Accelerator(CONFIG, decoder.config)
    assert loaded.config == CONFIG and torch.equal(loaded.draft_vocab, torch.arange(0, 192, 3))
    state = loaded.state_dict()
    for name, value in original.state_dict().items():
        if name != "draft_vocab":
            torch.testing.assert_close(state[name], value.bfloat16().float())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert read_card(saved)["base_model"] == {"name": "Tiny", "fingerprint": fingerprint(decoder)}


def test_the_fingerprint_tells_models_apart_and_not_formats(
    decoder: Decoder, other: Decoder, tmp_path: Path
) -> None:
    folder = tiny.save_model(tmp_path / "again")
    assert {fingerprint(load_decoder(folder, name)) for name in ("fp32", "bf16", "int8", "int4")} == {
        fingerprint(decoder)
    }
    assert fingerprint(other) != fingerprint(decoder)


def test_an_adapter_of_another_model(saved: Path, other: Decoder) -> None:
    assert "was trained for Tiny, which is not the loaded model" in refused(saved, other)


def test_a_card_may_name_models_that_it_fits_as_well(saved: Path, decoder: Decoder, other: Decoder) -> None:
    base = {**read_card(saved)["base_model"], "also_fits": [fingerprint(other)]}
    edit_card(saved, base_model=base)
    assert load_accelerator(saved, other).config == load_accelerator(saved, decoder).config == CONFIG
    assert find_adapter(other, (saved.parent,)) == saved


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file(decoder: Decoder, saved: Path, share: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    assert "damaged or incomplete" in refused(saved, decoder)


def test_missing_files(decoder: Decoder, saved: Path) -> None:
    card = saved.with_suffix(".json").read_text()
    saved.with_suffix(".json").unlink()
    assert "mine.json is missing beside the adapters" in refused(saved, decoder)
    saved.with_suffix(".json").write_text(card)
    saved.unlink()
    assert "damaged or incomplete" in refused(saved, decoder)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"version": 1}',
        '{"version": 1, "accelerator": {"depht": 3}, "base_model": {}}',
    ],
)
def test_a_damaged_card(decoder: Decoder, saved: Path, content: str) -> None:
    saved.with_suffix(".json").write_text(content)
    assert "cannot be read" in refused(saved, decoder)


def test_a_card_of_another_version(decoder: Decoder, saved: Path) -> None:
    edit_card(saved, version=99)
    assert "another version" in refused(saved, decoder)


def test_a_card_that_does_not_fit_the_tensors(decoder: Decoder, saved: Path) -> None:
    edit_card(saved, accelerator={**read_card(saved)["accelerator"], "rank": 5})
    assert "damaged or incomplete" in refused(saved, decoder)


def test_draft_tokens_outside_the_vocabulary(decoder: Decoder, tmp_path: Path) -> None:
    accelerator = Accelerator(CONFIG, decoder.config)
    accelerator.draft_vocab = torch.arange(64) + decoder.config.vocab_size - 10
    path = tmp_path / "mine.safetensors"
    save_accelerator(path, accelerator, decoder, "Tiny", {}, {})
    assert "damaged or incomplete" in refused(path, decoder)


def test_one_tuned_here_comes_before_a_shipped_one(
    decoder: Decoder, other: Decoder, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shipped, tuned = tmp_path / "shipped", tmp_path / "tuned"
    for folder in (shipped, tuned):
        folder.mkdir()
    assert find_adapter(decoder, (tuned, shipped)) is None
    for suffix in (".json", ".safetensors"):
        shutil.copy(saved.with_suffix(suffix), shipped)
    assert find_adapter(decoder, (tuned, shipped)) == shipped / saved.name
    assert find_adapter(other, (tuned, shipped)) is None
    (tuned / "broken.json").write_text("{")
    for suffix in (".json", ".safetensors"):
        shutil.copy(saved.with_suffix(suffix), tuned)
    with caplog.at_level(logging.WARNING):
        assert find_adapter(decoder, (tuned, shipped)) == tuned / saved.name
    assert "broken.json cannot be read" in caplog.text
    (tuned / saved.name).unlink()  # a card without its adapters is passed over
    assert find_adapter(decoder, (tuned, shipped)) == shipped / saved.name


def test_a_full_disk_leaves_the_old_adapter(
    decoder: Decoder, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    before = saved.read_bytes()
    monkeypatch.setattr(adapter_file.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_accelerator(saved, Accelerator(CONFIG, decoder.config), decoder, "Tiny", {}, {})
    assert saved.read_bytes() == before and not list(saved.parent.glob("*.part"))
    assert load_accelerator(saved, decoder).config == CONFIG


@pytest.mark.real_model
def test_the_shipped_adapter_belongs_to_the_default_model(default_model_path: Path) -> None:
    decoder = load_decoder(default_model_path, "int4")
    path = find_adapter(decoder, (adapter_file.SHIPPED,))
    assert path is not None
    accelerator = load_accelerator(path, decoder)
    agreements = read_card(path)["measured"]["greedy_agreement_by_draft_position"]["mt_bench"]
    assert accelerator.config.depth == 3 and agreements[0] > 0.5


def test_a_shrunk_accelerator_keeps_the_strongest_directions(decoder: Decoder) -> None:
    torch.manual_seed(1)
    large = Accelerator(replace(CONFIG, rank=8), decoder.config)
    for parameter in large.parameters():
        torch.nn.init.normal_(parameter)
    counts = torch.arange(decoder.config.vocab_size)
    small = shrink(large, 4, 16, counts)
    assert small.draft_vocab.tolist() == large.draft_vocab[-16:].flip(0).tolist()
    assert torch.equal(small.exit, large.exit) and small.config.rank == 4
    for index in range(2):
        for name in ("q", "o", "gate_up", "down"):
            before, after = (getattr(each.adapters(index), name) for each in (large, small))
            whole, cut = before.up @ before.down, after.up @ after.down
            lost = torch.linalg.svdvals(whole)[4:].norm()
            torch.testing.assert_close((whole - cut).norm(), lost, rtol=1e-3, atol=1e-4)
    same = shrink(large, 8, 64, counts)
    x = torch.randn(3, decoder.config.hidden_size)
    torch.testing.assert_close(same.adapters(0).q(x), large.adapters(0).q(x), rtol=1e-3, atol=1e-4)
