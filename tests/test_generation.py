"""Generations on a scripted backend: ends, stops, limits, cancelling, metrics, turns."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import pytest
import torch

from engine.decoding.base import Step, TokenSequence
from engine.decoding.sampling import Sampler
from engine.errors import InvalidRequestError, OutOfMemoryError, SlipstreamError
from engine.generation import ENGINE_LOCK, Generation
from engine.requests import FinishReason, GenerationRequest, Provenance, SamplingParams
from engine.text_stream import TextStream

EOS = 0
PROMPT = [50, 51, 52, 53, 54]


@dataclass
class FakeCache:
    length: int = 0
    nbytes: int = 0


@dataclass
class FakeBackend:
    """Speaks a script of rounds; a token's text is its character."""

    script: list[str]
    context_length: int = 1000
    prefill_chunk: int = 2
    kernel: str = "fake"
    chunks: list[list[int]] = field(default_factory=list)
    rooms: list[int] = field(default_factory=list)
    on_step: object = None
    on_chunk: object = None

    def methods(self):
        return ("plain",)

    def method(self, name: str):
        if name != "plain":
            raise InvalidRequestError(f"There is no decoding method {name!r}.")
        return self

    def new_cache(self, capacity: int):
        return FakeCache()

    def prefill(self, ids, cache):
        assert ENGINE_LOCK.locked()
        self.chunks.append(list(ids))
        cache.length += len(ids)
        if self.on_chunk:
            self.on_chunk()

    def close(self):
        pass

    name = "plain"
    lossless = True

    def start(self, sequence):
        assert sequence.cache.length == len(sequence.ids) - 1
        self.sequence = sequence

    def step(self, max_tokens: int) -> Step:
        assert ENGINE_LOCK.locked() and max_tokens >= 1
        self.rooms.append(max_tokens)
        if self.on_step:
            self.on_step()
        text = self.script.pop(0)[:max_tokens]
        ids = tuple(EOS if char == "$" else ord(char) for char in text)
        self.sequence.ids.extend(ids)
        self.sequence.cache.length += len(ids)
        kinds = (Provenance.DRAFTED,) * (len(ids) - 1) + (Provenance.VERIFIED,)
        return Step(ids, kinds, len(ids) + 1, len(ids) - 1, 0.001, 0.002)


def generate(backend: FakeBackend, prompt=PROMPT, **fields) -> Generation:
    request = GenerationRequest(prompt_ids=prompt, **fields)
    sequence = TokenSequence(list(prompt), FakeCache(), Sampler(SamplingParams()), len(prompt))
    text = TextStream(lambda index: b"" if index == EOS else chr(index).encode(), request.stop)
    return Generation(backend, request, sequence, text, frozenset({EOS}))


def test_rounds_join_to_the_result():
    generation = generate(FakeBackend(["He", "llo", "$"]))
    rounds = list(generation)
    assert [r.text for r in rounds] == ["He", "llo", ""]
    result = generation.result
    assert result.text == "Hello" and result.finish_reason is FinishReason.STOP
    assert result.token_ids == (*map(ord, "Hello"), EOS)
    assert [p.provenance for p in rounds[0].pieces] == [Provenance.DRAFTED, Provenance.VERIFIED]


def test_prefill_takes_all_but_the_last_prompt_token_in_chunks():
    backend = FakeBackend(["a$"])
    generation = generate(backend)
    assert generation.prefill_progress == (0, 5)
    list(generation)
    assert backend.chunks == [[50, 51], [52, 53]]
    assert generation.prefill_progress == (5, 5)


def test_a_prompt_of_one_token_has_no_prefill():
    backend = FakeBackend(["a$"])
    generation = generate(backend, prompt=[7])
    list(generation)
    assert backend.chunks == [] and generation.result.text == "a"


def test_tokens_behind_the_end_are_dropped():
    generation = generate(FakeBackend(["ab$cd", "ef"]))
    assert [r.text for r in generation] == ["ab"]
    assert generation.result.token_ids == (97, 98, EOS)
    assert generation.metrics.num_new_tokens == 3


def test_ignore_eos_goes_on():
    generation = generate(FakeBackend(["a$b", "cd"]), ignore_eos=True, max_new_tokens=5)
    list(generation)
    assert generation.result.finish_reason is FinishReason.LENGTH
    assert generation.result.token_ids == (97, EOS, 98, 99, 100)


def test_a_stop_string_inside_a_round_ends_it():
    generation = generate(FakeBackend(["one S", "TOP two"]), stop=["STOP"])
    assert [r.text for r in generation] == ["one ", ""]
    result = generation.result
    assert result.text == "one " and result.finish_reason is FinishReason.STOP
    assert bytes(result.token_ids).decode() == "one STOP"


def test_max_tokens_bounds_the_round_and_releases_withheld_text():
    backend = FakeBackend(["abc", "dST"])
    generation = generate(backend, max_new_tokens=6, stop=["STOP"])
    assert "".join(r.text for r in generation) == "abcdST" == generation.result.text
    assert generation.result.finish_reason is FinishReason.LENGTH
    assert backend.rooms == [6, 3]


def test_a_full_context_ends_with_its_own_reason():
    backend = FakeBackend(["abc", "def"], context_length=10)
    generation = generate(backend)
    list(generation)
    assert generation.result.text == "abcde" and generation.result.finish_reason is FinishReason.CONTEXT
    assert backend.rooms == [5, 2]


def test_the_end_inside_the_last_room_is_a_stop():
    generation = generate(FakeBackend(["ab$"]), max_new_tokens=3)
    list(generation)
    assert generation.result.finish_reason is FinishReason.STOP


def test_cancel_is_obeyed_within_one_round():
    generation = generate(FakeBackend(["a"] * 10))
    next(generation)
    generation.cancel()
    assert list(generation) == []
    assert generation.result.finish_reason is FinishReason.CANCELLED and generation.result.text == "a"


def test_cancel_during_a_round_delivers_that_round_and_no_more():
    backend = FakeBackend(["a"] * 10)
    generation = generate(backend)
    backend.on_step = generation.cancel
    assert [r.text for r in generation] == ["a"]
    assert generation.result.finish_reason is FinishReason.CANCELLED


def test_cancel_is_obeyed_within_one_prefill_chunk():
    backend = FakeBackend(["a"])
    generation = generate(backend)
    backend.on_chunk = generation.cancel
    assert list(generation) == []
    assert len(backend.chunks) == 1
    assert generation.result.finish_reason is FinishReason.CANCELLED and generation.result.text == ""


def test_close_before_the_first_round_and_twice():
    generation = generate(FakeBackend(["a"]))
    generation.close()
    generation.close()
    assert list(generation) == [] and generation.result.finish_reason is FinishReason.CANCELLED


def test_close_after_the_end_changes_nothing():
    generation = generate(FakeBackend(["a$"]))
    list(generation)
    generation.close()
    assert generation.result.finish_reason is FinishReason.STOP


def test_leaving_a_with_block_closes():
    with generate(FakeBackend(["a"] * 5)) as generation:
        next(generation)
    assert generation.finished and not ENGINE_LOCK.locked()


def test_close_from_another_thread_ends_a_running_round():
    """Gradio closes from whatever thread: the round at work finishes, then everything is freed."""
    inside, closed = threading.Event(), threading.Event()
    backend = FakeBackend(["a"] * 5)

    def wait() -> None:
        inside.set()
        assert closed.wait(5)

    backend.on_step = wait
    generation = generate(backend)
    freed = []
    generation._on_finish = freed.append
    worker = threading.Thread(target=lambda: next(generation))
    worker.start()
    assert inside.wait(5)
    generation.close()  # returns at once
    assert not generation.finished
    closed.set()
    worker.join(5)
    assert generation.finished and freed == [generation] and not ENGINE_LOCK.locked()


def test_an_error_frees_the_engine_and_ends_the_generation():
    backend = FakeBackend([])
    generation = generate(backend)
    with pytest.raises(IndexError):
        next(generation)
    assert not ENGINE_LOCK.locked() and generation.finished
    assert list(generation) == []


@pytest.mark.parametrize(
    "raised", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")]
)
def test_memory_errors_are_a_sentence(raised: Exception):
    backend = FakeBackend(["a"])

    def fail() -> None:
        raise raised

    backend.on_step = fail
    with pytest.raises(OutOfMemoryError, match=r"not enough memory .*\.$"):
        next(generate(backend))


def test_the_result_waits_for_the_end():
    generation = generate(FakeBackend(["a$"]))
    with pytest.raises(SlipstreamError, match="not finished"):
        _ = generation.result
    list(generation)
    assert generation.result.text == "a"


@pytest.mark.parametrize("kernel", ["fused", "torch"])
def test_torch_keeps_out_of_the_way_of_the_fused_threads(kernel: str):
    """Their spinning threads and a second one of torch's would fight for a core. (Their steps see to it themselves.)"""
    before, seen, steps = torch.get_num_threads(), [], []
    backend = FakeBackend(["ab", "c$"], kernel=kernel)
    backend.on_chunk = lambda: seen.append(torch.get_num_threads())
    backend.on_step = lambda: steps.append((torch.get_num_threads(), torch.is_inference_mode_enabled()))
    torch.set_num_threads(2)
    try:
        assert "".join(piece.text for piece in generate(backend)) == "abc"
        assert set(seen) == {1 if kernel == "fused" else 2} and len(seen) == 2
        assert set(steps) == {(2, kernel != "fused")} and len(steps) == 2
        assert torch.get_num_threads() == 2  # the next model that this thread loads gets all of them
    finally:
        torch.set_num_threads(before)


def test_an_unknown_method_is_refused_at_once():
    with pytest.raises(InvalidRequestError, match="nonsense"):
        generate(FakeBackend([]), method="nonsense")


def test_metrics_count_engine_time_only_and_the_prefill_apart():
    generation = generate(FakeBackend(["ab", "cd", "e$"]))
    rounds = list(generation)
    metrics = generation.metrics
    assert metrics.num_prompt_tokens == 5 and metrics.num_new_tokens == 6
    assert metrics.num_decode_tokens == 4  # the first round belongs to the prompt
    assert metrics.decode_seconds == pytest.approx(sum(r.seconds for r in rounds[1:]))
    assert metrics.prefill_seconds > rounds[0].seconds
    assert metrics.ttft == pytest.approx(metrics.prefill_seconds)
    stats = metrics.speculation
    assert (stats.num_rounds, stats.num_draft_tokens, stats.num_accepted_tokens) == (3, 9, 3)
    assert (rounds[0].num_draft_tokens, rounds[0].draft_seconds) == (3, 0.001)


def test_a_slow_reader_costs_the_engine_nothing():
    """Between rounds the lock is free, and waiting does not count as engine time."""
    generation = generate(FakeBackend(["a", "b", "c$"]))
    for _ in generation:
        assert ENGINE_LOCK.acquire(timeout=1)
        threading.Event().wait(0.05)
        ENGINE_LOCK.release()
    assert generation.metrics.decode_seconds < 0.05


def test_two_generations_take_turns():
    first, second = generate(FakeBackend(["a", "b", "c$"])), generate(FakeBackend(["x", "y", "z$"]))
    seen = ""
    for left, right in zip(first, second, strict=True):
        seen += left.text + right.text
    assert seen == "axbycz"
