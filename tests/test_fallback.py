"""Architectures that our decoder does not know chat through transformers, and the person is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import doctor
from engine.errors import InvalidRequestError, ModelFileError, UnsupportedModelError
from engine.loading import load_session
from engine.models.fallback import TransformersBackend
from engine.requests import FinishReason, GenerationRequest, Message
from engine.session import Session
from tests import tiny

CHAT = [Message("system", "the rules"), Message("user", "hello there, and then the stopping " * 3)]
KINDS = ("gpt2", "gpt_neox", "gemma2", "mamba")  # gemma2's window and mamba's state cannot be rolled back


def build(kind: str) -> Any:
    """A random model of an architecture that is not ours."""
    from transformers import AutoConfig, AutoModelForCausalLM

    ends = {"vocab_size": tiny.vocab_size(), "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    fields: dict[str, dict[str, Any]] = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256},
        "gpt_neox": {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
            "max_position_embeddings": 256,
        },
        "gemma2": {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 16, "intermediate_size": 64, "max_position_embeddings": 256, "sliding_window": 16,
        },
        "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    }  # fmt: skip
    config = AutoConfig.for_model(kind, initializer_range=0.3, **fields[kind], **ends)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        build(kind).save_pretrained(root / kind)
        tiny.save_tokenizer(root / kind)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(folders["gpt2"], tmp_path / "model"))


def answer(session: Session, reuse: bool = False, **fields: Any) -> Any:
    generation = session.stream_generate(GenerationRequest(**fields), reuse_prefix=reuse)
    list(generation)
    return generation


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_transformers_generate(folders: dict[str, Path], kind: str) -> None:
    session, reference = load_session(kind, folders[kind], "fp32", "cpu"), build(kind)
    for prompt in ([5], [9, 200, 31] * 4, list(range(3, 153))):
        expected = reference.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :].tolist()
        outcome = answer(session, prompt_ids=prompt, max_new_tokens=20, ignore_eos=True).result
        assert list(outcome.token_ids) == expected


def test_the_person_is_told(folders: dict[str, Path]) -> None:
    info = load_session("tiny", folders["gpt2"], "auto", "cpu").info
    assert (info.architecture, info.weight_format, info.kernel) == ("gpt2", "bf16", "transformers")
    assert info.methods == ("plain",) and info.context_length == 256
    assert any("Acceleration is off" in note and "gpt2" in note for note in info.notes)
    parameters = list(build("gpt2").parameters())
    assert info.num_parameters == sum(p.numel() for p in parameters)
    assert info.weight_bytes == 2 * info.num_parameters  # the embedding table is the head as well


def test_an_embedding_of_its_own_is_not_read_at_each_step(folders: dict[str, Path]) -> None:
    info = load_session("tiny", folders["gpt_neox"], "fp32", "cpu").info
    assert info.weight_bytes == 4 * (info.num_parameters - tiny.vocab_size() * 32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reused_prefix_changes_nothing(folders: dict[str, Path], kind: str) -> None:
    """Whether its cache can be cut (gpt2) or has to be read again (mamba)."""
    session = load_session(kind, folders[kind], "fp32", "cpu")
    messages = list(CHAT)
    for turn in range(3):
        fresh = answer(session, messages=messages, max_new_tokens=12)
        reused = answer(session, True, messages=messages, max_new_tokens=12)
        assert reused.result.token_ids == fresh.result.token_ids
        assert reused.metrics.num_cached_tokens > 0 or turn == 0
        assert session.settling is not None
        session.settling.join(30)
        messages += [Message("assistant", fresh.result.text), Message("user", f"and {turn}?")]


@pytest.mark.parametrize("kind", KINDS)
def test_caches_roll_back_by_position(folders: dict[str, Path], kind: str) -> None:
    backend = load_session(kind, folders[kind], "fp32", "cpu").backend
    assert isinstance(backend, TransformersBackend)
    ids = list(range(3, 43))
    wanted = backend.forward(ids, backend.new_cache(64))
    cache = backend.new_cache(64)
    backend.prefill([*ids[:30], 7, 7, 7], cache)
    assert cache.length == 33 and cache.nbytes > 0
    cache.length = 31
    cache.length = 30  # twice, without a step between
    backend.prefill(ids[30:35], cache)
    again = backend.forward(ids[35:], cache)
    assert cache.length == 40
    assert (again - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_stopping_and_the_end_of_the_context(folders: dict[str, Path]) -> None:
    session = load_session("tiny", folders["gpt2"], "fp32", "cpu")
    generation = session.stream_generate(GenerationRequest(messages=CHAT, ignore_eos=True))
    next(generation)
    generation.cancel()
    assert list(generation) == [] and generation.result.finish_reason is FinishReason.CANCELLED
    full = answer(session, prompt_ids=[7] * 250, max_new_tokens=50, ignore_eos=True).result
    assert full.finish_reason is FinishReason.CONTEXT and len(full.token_ids) == 6
    with pytest.raises(InvalidRequestError, match="method"):
        session.stream_generate(GenerationRequest(messages=CHAT, method="m2r2"))
    session.close()
    with pytest.raises(InvalidRequestError, match="unloaded"):
        session.stream_generate(GenerationRequest(messages=CHAT))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_in_chunks_is_the_prompt_in_one_piece(folders: dict[str, Path], kind: str) -> None:
    """transformers' own recurrent caches forget what came before a second chunk."""
    backend = load_session(kind, folders[kind], "fp32", "cpu").backend
    ids = torch.randint(3, tiny.vocab_size(), (200,), generator=torch.Generator().manual_seed(3)).tolist()
    wanted = backend.forward(ids, backend.new_cache(0))
    cache = backend.new_cache(0)
    for begin in range(0, 199, 40):
        backend.prefill(ids[begin : min(begin + 40, 199)], cache)
    assert cache.length == 199
    assert (backend.forward(ids[199:], cache) - wanted).abs().max() < 1e-4 * wanted.abs().max()


def assert_sentence(message: str, *words: str) -> None:
    assert message.endswith(".") and "\n" not in message
    for word in words:
        assert word in message


def test_packed_formats_are_refused(folders: dict[str, Path]) -> None:
    for weight_format in ("int4", "nf4"):
        with pytest.raises(UnsupportedModelError) as caught:
            load_session("tiny", folders["gpt2"], weight_format, "cpu")
        assert_sentence(str(caught.value), "gpt2", weight_format, "bf16")


@pytest.mark.parametrize("kind", ["warpformer", "t5", None])
def test_architectures_that_nobody_runs(folder: Path, kind: str | None) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UnsupportedModelError) as caught:
        load_session("tiny", folder, "auto", "cpu")
    assert_sentence(str(caught.value), str(kind))


def test_code_that_comes_with_a_model_is_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "m.C", "AutoModelForCausalLM": "m.M"}})
    )
    (folder / "m.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UnsupportedModelError, match="own"):
        load_session("tiny", folder, "auto", "cpu")
    assert not (tmp_path / "ran").exists()


def test_pickles_are_refused(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelFileError) as caught:
        load_session("tiny", folder, "auto", "cpu")
    assert_sentence(str(caught.value), "safetensors")


def test_damaged_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 5, 100, len(whole) - 40):
        file.write_bytes(whole[:size])
        with pytest.raises(ModelFileError) as caught:
            load_session("tiny", folder, "auto", "cpu")
        assert_sentence(str(caught.value), "download")
    file.write_bytes(whole)
    weights = load_file(file)
    del weights["transformer.h.0.mlp.c_fc.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ModelFileError) as caught:
        load_session("tiny", folder, "auto", "cpu")
    assert_sentence(str(caught.value), "transformer.h.0.mlp.c_fc.weight")


def test_a_damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "gpt2", "n_embd": "many", "n_layer": []}')
    with pytest.raises((ModelFileError, UnsupportedModelError)) as caught:
        load_session("tiny", folder, "auto", "cpu")
    assert_sentence(str(caught.value))


def test_doctor_says_who_runs_it(folder: Path, slipstream_home: Path) -> None:
    report = doctor.examine_model(str(folder), "cpu")
    assert_sentence(str(report.problem), "transformers", "acceleration is off")
