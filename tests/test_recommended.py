"""How a model's authors sample from it: read from its files, followed by the page until a person chooses otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from app.preferences import HOUSE_SAMPLING, PreferenceFile, Preferences
from app.sampling_choice import RANGES, explained, in_force
from app.settings_panel import sampling_shown
from engine.loading import load_session
from engine.recommended import recommended_sampling
from engine.requests import SamplingParams
from tests import tiny

QWEN = {"do_sample": True, "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20}


def folder_with(tmp_path: Path, content: Any) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "generation_config.json").write_text(text)
    return tmp_path


def gguf_with(path: Path, **settings: float) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in settings.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"general.sampling.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_a_folder_says(tmp_path: Path):
    found = recommended_sampling(folder_with(tmp_path, {**QWEN, "eos_token_id": 3, "max_new_tokens": 9}))
    assert found == SamplingParams(0.7, top_k=20, top_p=0.8, repetition_penalty=1.1)


def test_what_is_not_named_is_off(tmp_path: Path):
    assert recommended_sampling(folder_with(tmp_path, {"top_k": 64, "top_p": 0.95})) == SamplingParams(
        1.0, top_k=64, top_p=0.95
    )


def test_what_a_gguf_says(tmp_path: Path):
    file = gguf_with(tmp_path / "model.gguf", temp=0.6, top_p=0.95, top_k=20, penalty_repeat=1.05)
    assert recommended_sampling(file) == SamplingParams(0.6, top_k=20, top_p=0.95, repetition_penalty=1.05)
    assert recommended_sampling(gguf_with(tmp_path / "other.gguf")) is None


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"eos_token_id": 2},
        {"do_sample": False, "temperature": 0.7},
        "{broken",
        [1],
        {"temperature": "hot"},
        {"temperature": -1},
        {"top_p": None},
        {"top_k": "many", "temperature": 1.0},
        {"top_k": 1e400, "temperature": 1.0},
    ],
)
def test_nothing_or_nonsense_is_no_recommendation(tmp_path: Path, content: Any):
    assert recommended_sampling(folder_with(tmp_path, content)) is None


def test_a_missing_or_broken_file_is_none_either(tmp_path: Path):
    assert recommended_sampling(tmp_path) is None
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03")
    assert (
        recommended_sampling(tmp_path / "x.gguf") is None
        and recommended_sampling(tmp_path / "y.gguf") is None
    )


def test_a_loaded_model_tells_it(tmp_path: Path):
    folder = tiny.save_model(tmp_path / "model")
    tiny.save_tokenizer(folder)
    folder_with(folder, QWEN)
    session = load_session("tiny", folder, "fp32")
    assert session.info.recommended == SamplingParams(0.7, top_k=20, top_p=0.8, repetition_penalty=1.1)
    session.close()


# The page


ADVICE = SamplingParams(0.6, top_k=20, top_p=0.9)


def test_a_persons_choice_goes_before_the_authors_and_these_before_ours():
    assert in_force(Preferences(), None) == HOUSE_SAMPLING
    advised = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.0, "repetition_penalty": 1.0}
    assert in_force(Preferences(), ADVICE) == advised
    assert in_force(Preferences(temperature=0.0, top_k=0), ADVICE) == {
        **advised,
        "temperature": 0.0,
        "top_k": 0,
    }


def test_what_the_sliders_cannot_show_is_cut():
    values = in_force(Preferences(), SamplingParams(5.0, top_k=1000, top_p=0.01, repetition_penalty=0.5))
    assert all(low <= values[name] <= high for name, (low, high) in RANGES.items())


def test_whose_settings_they_are():
    assert explained(in_force(Preferences(), None), None) == ""
    assert (
        explained(in_force(Preferences(), ADVICE), ADVICE)
        == "Sampling is set as the model's authors recommend."
    )
    other = explained(in_force(Preferences(top_p=0.5), ADVICE), ADVICE)
    assert other == "The model's authors recommend temperature 0.6, top p 0.9, top k 20."
    *values, remark = sampling_shown(Preferences(), ADVICE)
    assert values == [0.6, 0.9, 20, 0.0, 1.0] and "recommend" in remark


def test_what_nobody_chose_is_not_written_down_as_a_choice(tmp_path: Path):
    file = PreferenceFile(tmp_path / "settings.json")
    file.save(temperature=0.7)
    assert PreferenceFile(tmp_path / "settings.json").value == Preferences(temperature=0.7)


def test_a_file_of_before_holds_choices_where_they_differ_from_our_settings(tmp_path: Path):
    (tmp_path / "settings.json").write_text(json.dumps({**HOUSE_SAMPLING, "top_p": 0.5, "seed": 3}))
    assert PreferenceFile(tmp_path / "settings.json").value == Preferences(top_p=0.5, seed=3)
