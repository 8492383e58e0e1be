"""Prompts that the model makes up itself: what of its writing becomes a prompt, and tuning on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.models.loader import load_decoder
from engine.requests import Message
from engine.residuals import tuning, tuning_data
from engine.residuals.corpus import Sequences
from engine.residuals.invention import Frame, as_prompts, chat_frame
from engine.residuals.stages import Runner
from engine.residuals.tuning_data import DataConfig, data_name, encode_prompts
from engine.residuals.tuning_store import TuningError, TuningStoppedError
from engine.tokenizer import load_tokenizer
from tests import tiny
from tests.tuning_worker import small_request

EOS, START = 2, 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("invention") / "tiny", num_hidden_layers=5)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_data, "_SHARD_FLOPS", 0)  # shards of four rows


def test_a_frame_around_any_text_is_the_whole_chat(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    frame = chat_frame(tokenizer)
    text = "hello stop"
    chat = tokenizer.encode_chat([Message("user", text)])
    assert [*frame.before, *tokenizer.encode(text), *frame.behind] == chat
    assert tokenizer.eos_ids & set(frame.behind)  # the end of the user's turn is the template's to write


def sequences(*turns: list[int]) -> Sequences:
    width = max(map(len, turns)) + 2
    rows = torch.tensor([[7, 8, *turn, *[0] * (width - 2 - len(turn))] for turn in turns], dtype=torch.int32)
    lengths = torch.tensor([2 + len(turn) for turn in turns], dtype=torch.int32)
    return Sequences(rows, torch.full_like(lengths, 2), lengths)


def test_what_of_its_writing_becomes_a_prompt() -> None:
    good = [10, 11, 12, 13, EOS]
    written = sequences(
        good, [10, 11, 12, 13, 14], [10, EOS], [10, START, 12, 13, EOS], [20, 21, 22, 23, EOS]
    )
    found = as_prompts(written, Frame((7, 8), (EOS, 30)), {EOS}, {EOS, START})
    # not: one without an end, one too short, one with a special token inside
    assert found == [(7, 8, 10, 11, 12, 13, EOS, 30), (7, 8, 20, 21, 22, 23, EOS, 30)]


def test_the_text_answers_its_own_prompts_beside_the_others(quick: None, model: Path, tmp_path: Path) -> None:
    prompts = tiny.save_prompts(tmp_path / "prompts.jsonl")
    request = small_request(model, prompts, tmp_path / "a.safetensors")
    # random weights end few of their turns, and those late
    request = replace(request, data=replace(request.data, num_tokens=1500, num_invented=12, temperature=1.0))
    corpus = tuning.prepare(request, tmp_path / "work", Runner()).corpus.sequences
    own = set(map(tuple, given(model, prompts, request.data)))
    asked = {
        tuple(t[:n]) for t, n in zip(corpus.tokens.tolist(), corpus.prompt_lengths.tolist(), strict=True)
    }
    assert asked & own and asked - own
    frame = chat_frame(load_tokenizer(model))
    for prompt in asked - own:
        assert prompt[: len(frame.before)] == frame.before and prompt[-len(frame.behind) :] == frame.behind
    again = tuning.prepare(request, tmp_path / "other", Runner()).corpus.sequences
    assert torch.equal(corpus.tokens, again.tokens)


def given(model: Path, prompts: Path, data: DataConfig) -> list[list[int]]:
    decoder = load_decoder(model, "fp32", "cpu")
    return encode_prompts(prompts, load_tokenizer(model), decoder, data).training


def test_stopped_while_inventing_it_goes_on_from_what_it_has(
    quick: None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tiny.save_prompts(tmp_path / "prompts.jsonl")
    request = small_request(model, prompts, tmp_path / "a.safetensors")
    request = replace(request, data=replace(request.data, num_invented=6))
    stop = Runner(cancel=_StopAfter(3))
    with pytest.raises(TuningStoppedError):
        tuning.prepare(request, tmp_path / "work", stop)
    kept = sorted((tmp_path / "work").glob("data-*/invented-*"))
    before = [file.stat().st_mtime_ns for file in kept]
    assert kept
    stopped = tuning.prepare(request, tmp_path / "work", Runner()).corpus.sequences
    assert [file.stat().st_mtime_ns for file in kept] == before
    undisturbed = tuning.prepare(request, tmp_path / "other", Runner()).corpus.sequences
    assert torch.equal(stopped.tokens, undisturbed.tokens)


class _StopAfter:
    """An event that sets itself."""

    def __init__(self, shards: int) -> None:
        self._left = shards * 7  # looked at seven times a shard: six legs of sixteen steps, and behind them

    def is_set(self) -> bool:
        self._left -= 1
        return self._left < 0


@pytest.mark.parametrize("always", [[], [(1, 300, 2), (1, 301, 2)]], ids=["none", "the same two"])
def test_a_model_without_new_prompts_is_told_in_a_sentence(
    always: list[tuple[int, ...]], quick: None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning_data, "as_prompts", lambda *_: always)
    request = small_request(model, tiny.save_prompts(tmp_path / "p.jsonl"), tmp_path / "a.safetensors")
    with pytest.raises(TuningError, match=f"makes up {len(always)} prompts and no more"):
        tuning.prepare(replace(request, data=replace(request.data, num_invented=5)), tmp_path / "w", Runner())


def test_texts_with_and_without_invented_prompts_lie_apart(model: Path, tmp_path: Path) -> None:
    prompts = tiny.save_prompts(tmp_path / "prompts.jsonl")
    decoder, tokenizer, data = load_decoder(model, "fp32", "cpu"), load_tokenizer(model), DataConfig()
    encoded = encode_prompts(prompts, tokenizer, decoder, data)
    plain, more = (data_name(decoder, "m", encoded, replace(data, num_invented=n)) for n in (0, 5))
    assert plain != more
