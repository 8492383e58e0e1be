"""Model folders that cannot be used, and files, as the person who opens them sees it: one sentence each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import ModelFileError, SlipstreamError, UnsupportedModelError
from engine.loading import load_session
from engine.models.checkpoint import open_checkpoint
from engine.session import Session
from tests import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("saved") / "tiny", "qwen2")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def sentence(path: Path, error: type[SlipstreamError] = ModelFileError, weight_format: str = "int4") -> str:
    """What the person reads when the model is loaded."""
    with pytest.raises(error) as caught:
        load_session("tiny", path, weight_format, "cpu")
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    return message


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace weights of the only file; None removes one. Dots are written as double underscores."""
    weights = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del weights[name]
        else:
            assert name in weights
            weights[name] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("weight_format", ["auto", "fp32"])
def test_truncated_weights(folder: Path, weight_format: str) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 4, 8, 200, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert "model.safetensors is damaged or incomplete" in sentence(folder, weight_format=weight_format)


def test_a_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    tiny.build_model("qwen2").save_pretrained(folder, max_shard_size="40KB")
    shards = sorted(folder.glob("*.safetensors"))
    held = load_file(shards[1])
    shards[1].unlink()
    message = sentence(folder)
    assert "lacks the weight" in message and any(name in message for name in held)


def test_a_missing_weight(folder: Path) -> None:
    change_weights(folder, model__layers__1__mlp__down_proj__weight=None)
    assert "tiny lacks the weight model.layers.1.mlp.down_proj.weight" in sentence(folder)


def test_a_missing_bias(folder: Path) -> None:
    """The model would answer nonsense without it."""
    change_weights(folder, model__layers__1__self_attn__q_proj__bias=None)
    assert "model.layers.1.self_attn.q_proj.bias" in sentence(folder)


@pytest.mark.parametrize("weight_format", ["int4", "fp32"])
@pytest.mark.parametrize(
    ("name", "shape", "asked"),
    [
        ("model__layers__0__self_attn__k_proj__weight", (48, 64), "128 x 64"),
        ("model__layers__0__self_attn__k_proj__weight", (32, 32), "128 x 64"),
        ("model__layers__2__mlp__down_proj__weight", (128, 64), "64 x 128"),
        ("model__layers__2__self_attn__v_proj__bias", (16,), "128"),
        ("model__layers__1__input_layernorm__weight", (63,), "64"),
        ("model__embed_tokens__weight", (100, 64), "288 x 64"),
        ("model__norm__weight", (64, 1), "64"),
    ],
)
def test_weights_of_another_shape(
    folder: Path, name: str, shape: tuple[int, ...], asked: str, weight_format: str
) -> None:
    assert tiny.vocab_size() == 288
    change_weights(folder, **{name: torch.ones(shape)})
    message = sentence(folder, weight_format=weight_format)
    assert " x ".join(map(str, shape)) in message and f"asks for {asked};" in message


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"hidden_size": None}, "'hidden_size'"),
        ({"num_hidden_layers": None}, "'num_hidden_layers'"),
        ({"num_attention_heads": 0, "head_dim": None}, "damaged"),
        ({"num_attention_heads": "four", "head_dim": None}, "damaged"),
        ({"rope_parameters": 7}, "damaged"),
        ({"layer_types": 5}, "damaged"),
        ({"hidden_size": 96, "head_dim": 16}, "96"),
    ],
)
def test_damaged_config_entries(folder: Path, changes: dict[str, Any], word: str) -> None:
    raw = {**json.loads((folder / "config.json").read_text()), **changes}
    kept = {key: value for key, value in raw.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    assert word in sentence(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"llama"', "\0\0"])
def test_a_config_that_is_none(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json" in sentence(folder)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear"},
        {"rope_type": "linear", "factor": "two"},
        {"rope_type": "llama3", "factor": 8.0},
        {"rope_type": "yarn"},
        {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 3, "long_factor": [1.0] * 3},
    ],
)
def test_a_damaged_rotation(folder: Path, rope: dict[str, Any]) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw["rope_parameters"] = {"rope_theta": 1000.0, **rope}
    (folder / "config.json").write_text(json.dumps(raw))
    assert "rotary" in sentence(folder)


def test_an_unknown_rotation(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw["rope_parameters"] = {"rope_type": "spiral", "rope_theta": 1000.0}
    (folder / "config.json").write_text(json.dumps(raw))
    assert "'spiral'" in sentence(folder, UnsupportedModelError)


def test_a_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "config.json" in sentence(folder)


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no weights" in sentence(folder)


def test_pickles_are_refused_unread(folder: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (open, (str(folder / "ran"), "w"))

    (folder / "model.safetensors").unlink()
    torch.save(Trap(), folder / "pytorch_model.bin")
    assert "never loaded" in sentence(folder)
    with pytest.raises(ModelFileError, match=r"pytorch_model.bin is a pickle, .* never loaded"):
        Session.load(str(folder / "pytorch_model.bin"))
    assert not (folder / "ran").exists()


def test_pickles_beside_safetensors_are_ignored(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert load_session("tiny", folder, "fp32", "cpu").info.architecture == "qwen2"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        (b"", "GGUF"),
        (b"GGML" + bytes(60), "not a GGUF"),
        (b"GGUF\3\0\0\0\1", "damaged"),
    ],
)
def test_gguf_files_that_are_none(tmp_path: Path, content: bytes | None, words: str) -> None:
    """Missing, empty, of a wrong magic, truncated; test_gguf_header.py cuts and damages a file everywhere."""
    file = tmp_path / "some.gguf"
    if content is not None:
        file.write_bytes(content)
    assert words in sentence(file) and "some.gguf" in sentence(file)
    with pytest.raises(ModelFileError) as caught:
        Session.load(str(file))
    assert "some.gguf" in str(caught.value)


@pytest.mark.real_model
def test_the_real_file_cut_off(default_model_path: Path, tmp_path: Path) -> None:
    size = default_model_path.stat().st_size
    for share in (0.001, 0.5, 0.9999):
        cut = tmp_path / "cut.gguf"
        with default_model_path.open("rb") as source, cut.open("wb") as target:
            target.write(source.read(int(share * size)))
        assert "cut.gguf is damaged or incomplete" in sentence(cut)


def test_names_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="does not exist"):
        open_checkpoint(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelFileError, match="no model file"):
        open_checkpoint(tmp_path / "notes.txt")
