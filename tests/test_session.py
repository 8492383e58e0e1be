"""Sessions on tiny models: against transformers, prefix reuse, turns, bounded memory."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path

import pytest
import torch

from engine.backend import DecoderBackend
from engine.errors import InvalidRequestError, ModelFileError, UnsupportedModelError
from engine.generation import ENGINE_LOCK
from engine.loading import load_session
from engine.prefix import PrefixCaches
from engine.requests import FinishReason, GenerationRequest, Message, SamplingParams
from engine.session import Session
from tests import tiny

CHAT = [Message("system", "the rules"), Message("user", "hello there, and then the stopping " * 3)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: tiny.save_model(root / family, family) for family in tiny.FAMILIES}


@pytest.fixture(scope="module")
def session(folders: dict[str, Path]) -> Session:
    return load_session("tiny", folders["llama"], "fp32", "cpu", threads=1)


def answer(session: Session, messages=CHAT, reuse: bool = False, **fields):
    fields.setdefault("max_new_tokens", 24)
    generation = session.stream_generate(GenerationRequest(messages=messages, **fields), reuse_prefix=reuse)
    for _ in generation:
        pass
    return generation


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_equals_transformers_generate(folders: dict[str, Path], family: str):
    from transformers import AutoModelForCausalLM

    session = load_session(family, folders[family], "fp32", "cpu")
    reference = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32)
    for prompt in ([5], [9, 200, 31] * 4, list(range(3, 153))):  # one token, a few, more than a chunk
        expected = reference.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=40, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :].tolist()
        request = GenerationRequest(prompt_ids=prompt, max_new_tokens=40, ignore_eos=True)
        generation = session.stream_generate(request)
        list(generation)
        assert list(generation.result.token_ids) == expected


def test_info_names_what_is_loaded(session: Session, folders: dict[str, Path]):
    info = session.info
    assert (info.name, info.architecture, info.weight_format, info.device) == ("tiny", "llama", "fp32", "cpu")
    assert info.context_length == tiny.CONTEXT_LENGTH and session.methods() == info.methods
    assert info.num_parameters == sum(p.numel() for p in tiny.build_model("llama").parameters())
    assert session.count_tokens("hello") == 1


def test_result_text_is_the_decoded_answer(session: Session):
    result = answer(session).result
    assert session.tokenizer.decode(result.token_ids).startswith(result.text)


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(1.0, seed=4), SamplingParams(0.8, top_p=0.9, seed=1)]
)
def test_the_same_request_gives_the_same_answer(session: Session, sampling: SamplingParams):
    first, second = answer(session, sampling=sampling), answer(session, sampling=sampling)
    assert first.result.token_ids == second.result.token_ids


def prompt_cache(generation) -> list[torch.Tensor]:
    """What the prefill wrote, layer by layer."""
    kept = generation.sequence.num_prompt_tokens - 1
    return [part.clone() for part in tiny.cached(generation.sequence.cache, kept)]


@pytest.mark.parametrize("weight_format", ["fp32", "bf16", "int8", "int4"])
def test_the_length_of_prefill_chunks_does_not_matter(
    folders: dict[str, Path], weight_format: str, monkeypatch: pytest.MonkeyPatch
):
    session = load_session("tiny", folders["mistral"], weight_format, "cpu")
    outcomes = []
    for chunk in (1, 7, 64, 1000):
        monkeypatch.setattr(session.backend, "prefill_chunk", chunk)
        generation = answer(session)
        outcomes.append((generation.result.token_ids, prompt_cache(generation)))
    for tokens, keys in outcomes[1:]:
        assert tokens == outcomes[0][0]
        # fp32 matrix products on CPU depend on the number of rows in the last bit
        if weight_format != "fp32":
            assert all(torch.equal(one, other) for one, other in zip(keys, outcomes[0][1], strict=True))


@pytest.mark.parametrize("weight_format", ["fp32", "bf16", "int8", "int4"])
def test_a_reused_prefix_changes_no_text_and_no_cache(folders: dict[str, Path], weight_format: str):
    """Several turns with reuse against each turn from nothing, on caches that are equal bit for bit."""
    session = load_session("tiny", folders["qwen3"], weight_format, "cpu")
    messages = list(CHAT)
    for turn in range(3):
        reused = answer(session, messages, reuse=True)
        fresh = answer(session, messages, reuse=False)
        assert reused.metrics.num_cached_tokens > 0 or turn == 0
        assert fresh.metrics.num_cached_tokens == 0
        assert reused.result.token_ids == fresh.result.token_ids
        if weight_format != "fp32":
            pairs = zip(prompt_cache(reused), prompt_cache(fresh), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)
        messages += [Message("assistant", reused.result.text), Message("user", f"and {turn}?")]


@pytest.mark.parametrize("weight_format", ["bf16", "int8", "int4"])
def test_the_answer_is_read_ahead_of_the_next_turn(folders: dict[str, Path], weight_format: str):
    """In the background, as prompt: the next turn finds it, and equals a turn from nothing bit for bit."""
    session = load_session("tiny", folders["llama"], weight_format, "cpu")
    first = answer(session, reuse=True)
    assert session.settling is not None
    session.settling.join(30)
    ids = [*first.sequence.ids[: first.sequence.num_prompt_tokens], *first.result.token_ids]
    request = GenerationRequest(prompt_ids=[*ids, 5, 6, 7], max_new_tokens=20)
    reused = session.stream_generate(request)
    fresh = session.stream_generate(request, reuse_prefix=False)
    assert list(reused) and list(fresh)
    assert reused.metrics.num_cached_tokens == len(ids)
    assert reused.result.token_ids == fresh.result.token_ids
    assert all(torch.equal(a, b) for a, b in zip(prompt_cache(reused), prompt_cache(fresh), strict=True))


def test_a_new_request_does_not_wait_for_the_reading_ahead(session: Session):
    """Taking the cache ends the background work; the answer is the same wherever it was interrupted."""
    expected = answer(session).result
    follow_up = [*CHAT, Message("assistant", expected.text), Message("user", "go on")]
    wanted = answer(session, follow_up).result.token_ids
    for _ in range(5):
        answer(session, reuse=True)
        assert answer(session, follow_up, reuse=True).result.token_ids == wanted


def test_regenerating_reads_one_token(session: Session):
    first, again = answer(session, reuse=True), answer(session, reuse=True)
    assert again.metrics.num_cached_tokens == again.metrics.num_prompt_tokens - 1
    assert first.result.token_ids == again.result.token_ids


def test_interleaved_generations_are_independent(session: Session):
    other = [Message("user", "quite another question about 12 12")]
    alone = [answer(session, messages).result.token_ids for messages in (CHAT, other)]
    requests = [GenerationRequest(messages=messages, max_new_tokens=24) for messages in (CHAT, other)]
    lanes = [session.stream_generate(request) for request in requests]
    while not all(lane.finished for lane in lanes):
        for lane in lanes:
            next(lane, None)
    assert [lane.result.token_ids for lane in lanes] == alone


def test_generations_on_two_threads_are_independent(session: Session):
    expected = answer(session).result.token_ids
    results: list[tuple[int, ...]] = []

    def run() -> None:
        results.append(answer(session).result.token_ids)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [expected] * 3 and not ENGINE_LOCK.locked()


def test_closing_mid_answer_frees_the_engine_and_keeps_the_prefix(session: Session):
    generation = session.stream_generate(GenerationRequest(messages=CHAT, max_new_tokens=100))
    next(generation)
    generation.close()
    assert generation.result.finish_reason is FinishReason.CANCELLED
    assert ENGINE_LOCK.acquire(timeout=1)
    ENGINE_LOCK.release()
    assert answer(session, reuse=True).metrics.num_cached_tokens > 0


def test_a_cancelled_prefill_leaves_a_usable_prefix(session: Session, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(session.backend, "prefill_chunk", 16)
    messages = [Message("user", "an odd beginning " * 8)]
    expected = answer(session, messages).result.token_ids
    generation = session.stream_generate(GenerationRequest(messages=messages))
    prefill = session.backend.prefill

    def stop_after_two(ids, cache):
        prefill(ids, cache)
        if cache.length >= 32:
            generation.cancel()

    monkeypatch.setattr(session.backend, "prefill", stop_after_two)
    assert list(generation) == [] and generation.prefill_progress[0] == 32
    monkeypatch.setattr(session.backend, "prefill", prefill)
    again = answer(session, messages, reuse=True)
    assert again.metrics.num_cached_tokens == 32 and again.result.token_ids == expected


def test_context_end_is_reported(session: Session):
    prompt = [7] * (tiny.CONTEXT_LENGTH - 10)
    request = GenerationRequest(prompt_ids=prompt, max_new_tokens=100, ignore_eos=True)
    generation = session.stream_generate(request)
    list(generation)
    assert generation.result.finish_reason is FinishReason.CONTEXT
    assert len(generation.result.token_ids) == 10


def test_a_long_chat_loses_its_oldest_turns(session: Session):
    turns = [Message("user" if n % 2 == 0 else "assistant", "some words here " * 2) for n in range(21)]
    generation = session.stream_generate(GenerationRequest(messages=[CHAT[0], *turns], max_new_tokens=8))
    list(generation)
    assert "left out" in generation.result.notices[0]
    assert session.tokenizer.decode(generation.sequence.ids).startswith("system\nthe rules\nuser\nsome")
    assert generation.metrics.num_prompt_tokens < tiny.CONTEXT_LENGTH


@pytest.mark.parametrize(
    "request_",
    [
        {"messages": [Message("user", "way too long " * 100)]},
        {"prompt_ids": [5] * tiny.CONTEXT_LENGTH},
        {"prompt_ids": [5, 10_000]},
        {"prompt_ids": [-1]},
        {"messages": CHAT, "method": "magic"},
    ],
)
def test_impossible_requests_are_one_sentence(session: Session, request_: dict):
    with pytest.raises(InvalidRequestError) as caught:
        session.stream_generate(GenerationRequest(**request_))
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"messages": []}, {"prompt_ids": []}, {"messages": CHAT, "prompt_ids": [1]},
        {"messages": CHAT, "max_new_tokens": 0}, {"messages": CHAT, "stop": ["a", ""]},
    ],
)  # fmt: skip
def test_malformed_requests_are_refused(fields: dict):
    with pytest.raises(InvalidRequestError):
        GenerationRequest(**fields)


def test_a_closed_session_says_so(folders: dict[str, Path]):
    session = load_session("tiny", folders["llama"], "fp32", "cpu")
    session.close()
    with pytest.raises(InvalidRequestError, match="unloaded"):
        session.stream_generate(GenerationRequest(messages=CHAT))


def test_closing_the_session_ends_its_generations_and_frees_the_weights(folders: dict[str, Path]):
    session = load_session("tiny", folders["llama"], "fp32", "cpu")
    weights = weakref.ref(session.backend.decoder)
    running, waiting = (session.stream_generate(GenerationRequest(messages=CHAT)) for _ in range(2))
    next(running)
    session.close()
    session.close()
    assert list(running) == [] and list(waiting) == []
    assert running.result.finish_reason is FinishReason.CANCELLED
    del running, waiting
    gc.collect()
    assert weights() is None


def test_wrong_devices_formats_and_folders_are_one_sentence(folders: dict[str, Path], tmp_path: Path):
    with pytest.raises(UnsupportedModelError, match="warp"):
        load_session("tiny", folders["llama"], "fp32", "warp")
    with pytest.raises(UnsupportedModelError, match="int3"):
        load_session("tiny", folders["llama"], "int3", "cpu")
    with pytest.raises(ModelFileError):
        load_session("tiny", tmp_path, "fp32", "cpu")


def test_loading_reports_progress(folders: dict[str, Path]):
    seen = []
    load_session("tiny", folders["llama"], "fp32", "cpu", on_progress=seen.append)
    assert seen[0].stage == "load" and seen[-1].stage == "ready"
    shares = [p.done for p in seen if p.stage == "load"]
    assert shares == sorted(shares) and shares[-1] == 1.0


# -- Kept caches ---------------------------------------------------------------------------------------


class Cache:
    def __init__(self, length: int, nbytes: int = 100) -> None:
        self.length, self.nbytes = length, nbytes


def test_only_prefilled_positions_are_kept():
    """The answer behind the prompt was computed by another kernel than a fresh prefill would use."""
    caches, cache = PrefixCaches(), Cache(80)
    caches.keep(list(range(50)), cache)
    assert caches.take(list(range(70))) is cache and cache.length == 49


def test_the_longest_common_prefix_wins_and_is_cut():
    caches, short, long = PrefixCaches(), Cache(40), Cache(60)
    caches.keep(list(range(40)), short)
    caches.keep(list(range(60)), long)
    assert caches.take([*range(50), 7, 7]) is long and long.length == 50
    assert caches.take([*range(20), 7]) is short and short.length == 20
    assert caches.take(list(range(60))) is None  # both are lent


def test_the_last_prompt_token_is_never_taken_from_a_cache():
    caches, cache = PrefixCaches(), Cache(60)
    caches.keep(list(range(60)), cache)
    assert caches.take(list(range(30))) is cache and cache.length == 29


def test_another_chat_is_not_robbed_for_a_few_tokens():
    caches = PrefixCaches()
    caches.keep(list(range(60)), Cache(60))
    assert caches.take([0, 1, 2, 3, *range(100, 150)]) is None


def test_kept_caches_are_bounded():
    caches = PrefixCaches()
    for start in (0, 1000, 2000):
        caches.keep(list(range(start, start + 60)), Cache(60))
    assert caches.take(list(range(60))) is None  # the oldest went
    huge = PrefixCaches()
    huge.keep(list(range(60)), Cache(60, 1 << 40))
    huge.keep(list(range(1000, 1060)), Cache(60, 1 << 40))
    assert huge.take(list(range(60))) is None and huge.take(list(range(1000, 1060))) is not None


# -- The default model ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm(default_model_path: Path) -> Session:
    return load_session("SmolLM2", default_model_path, "int4", "cpu")


@pytest.mark.real_model
def test_a_real_chat_makes_sense(smollm: Session):
    question = [Message("user", "What is the capital of France? Answer in one sentence.")]
    first = answer(smollm, question, reuse=True, max_new_tokens=40).result
    assert "Paris" in first.text and first.finish_reason is FinishReason.STOP
    follow_up = [*question, Message("assistant", first.text), Message("user", "And of Germany?")]
    second = answer(smollm, follow_up, reuse=True, max_new_tokens=40)
    assert "Berlin" in second.result.text and second.metrics.num_cached_tokens > 30


@pytest.mark.real_model
@pytest.mark.parametrize("weight_format", ["int4", "int8", "bf16"])
def test_real_text_is_the_same_for_any_prefill_chunk(
    default_model_path: Path, smollm: Session, weight_format: str, monkeypatch: pytest.MonkeyPatch
):
    """Must hold for a long prompt read in one chunk or in many: caches equal bit for bit, text equal."""
    session = smollm
    if weight_format != "int4":
        session = load_session("SmolLM2", default_model_path, weight_format, "cpu")
    messages = [Message("user", "Summarise: " + "The ship left port at dawn, and the crew sang. " * 25)]
    outcomes = []
    for chunk in (4096, 100, 16):
        monkeypatch.setattr(session.backend, "prefill_chunk", chunk)
        generation = answer(session, messages, max_new_tokens=32)
        kept = generation.sequence.num_prompt_tokens - 1
        outcomes.append((generation.result.text, tiny.cached(generation.sequence.cache, kept)[-2].clone()))
    assert kept > 256
    for text, keys in outcomes[1:]:
        assert text == outcomes[0][0]
        assert torch.equal(keys, outcomes[0][1])


@pytest.mark.real_model
def test_real_steps_do_not_depend_on_rows_in_the_batch(smollm: Session):
    """A row computed alone equals the row in a batch of up to eight: what verification relies on."""
    backend = smollm.backend
    assert isinstance(backend, DecoderBackend)
    stepper, ids = backend.stepper, smollm.tokenizer.encode("The ship left port at dawn, and the crew sang.")
    layers = backend.decoder.config.num_layers
    with torch.inference_mode():
        single, batched = backend.new_cache(64), backend.new_cache(64)
        count = min(8, stepper.max_rows)
        rows = [stepper.run_layers(stepper.embed(ids[i : i + 1]), single, i, 0, layers) for i in range(count)]
        together = stepper.run_layers(stepper.embed(ids[:count]), batched, 0, 0, layers)
        assert torch.equal(torch.cat(rows), together)
        assert torch.equal(torch.cat([stepper.logits(row) for row in rows]), stepper.logits(together))


def test_warming_up_builds_every_method(session: Session, monkeypatch: pytest.MonkeyPatch):
    """So that the first accelerated answer does not wait; one that cannot be built stops nobody."""
    build, built = session.backend.method, []

    def method(name: str):
        built.append(name)
        if name != "plain":
            raise ModelFileError("The accelerator is damaged.")
        return build(name)

    monkeypatch.setattr(session.backend, "method", method)
    monkeypatch.setattr(session.backend, "methods", lambda: ("plain", "m2r2"))
    session.warm_up()
    assert sorted(built) == ["m2r2", "plain"]
