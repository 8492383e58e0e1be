"""Drafts out of the context: whatever matches, the output is plain decoding's own, and matches that fail cost little."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.backend import DecoderBackend
from engine.decoding import context_index
from engine.decoding.base import TokenSequence
from engine.decoding.context import MAX_DRAFTS, ContextDrafter
from engine.decoding.context_index import ContextIndex, Match, NativeIndex, index_of
from engine.decoding.controller import DepthController
from engine.decoding.costs import RoundCosts
from engine.decoding.lookup import Lookup
from engine.decoding.m2r2 import M2R2
from engine.decoding.sampling import Sampler
from engine.kernels.round_fields import LENGTHS
from engine.models.decoder import Decoder
from engine.models.loader import load_decoder
from engine.models.stepper import Stepper, TorchStepper, make_stepper
from engine.requests import SamplingParams
from engine.residuals.drafter import make_drafter
from tests import tiny
from tests.test_m2r2 import accelerator, run

FORMATS = ("fp64", "fp32", "int4", "int8", "bf16")
# What a model repeats: its own text is one period over and over, and the prompt holds matches that go wrong.
PROMPT = [5, 70, 9, 33, 120, 7, 7, 61, 5, 70, 9, 34, 120, 7, 8, 5, 70]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Decoder]:
    folder = tiny.save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=4)
    return {name: load_decoder(folder, name) for name in FORMATS}


class Wrong(ContextDrafter):
    """Verifies tokens that are never right."""

    def choose(
        self, match: Match, limit: int, costs: RoundCosts, rate: float | None = None
    ) -> tuple[int, ...]:
        return (286,) * min(limit, 4)


def stepper_of(decoder: Decoder) -> Stepper:
    return TorchStepper(decoder) if decoder.dtype == torch.float64 else make_stepper(decoder)


@pytest.mark.parametrize("drafter", [ContextDrafter, lambda: ContextDrafter(fixed=7), Wrong])
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_output_is_plain_decodings(
    decoders: dict[str, Decoder], weight_format: str, drafter: type[ContextDrafter], temperature: float
) -> None:
    stepper, params = stepper_of(decoders[weight_format]), SamplingParams(temperature=temperature, seed=3)
    expected, _ = run(stepper, None, 120, PROMPT, params)
    lookup = Lookup(stepper, drafter())
    assert run(stepper, lookup, 120, PROMPT, params)[0] == expected  # type: ignore[arg-type]
    both = M2R2(
        lambda: make_drafter(stepper, accelerator(stepper.decoder)), DepthController(), context=drafter()
    )
    assert run(stepper, both, 120, PROMPT, params)[0] == expected


@pytest.mark.parametrize("drafts", [1, 3, 7])
def test_the_cache_is_that_of_a_fresh_prefill(decoders: dict[str, Decoder], drafts: int) -> None:
    stepper = TorchStepper(decoders["fp64"])

    def check(sequence: TokenSequence) -> None:
        fresh = stepper.decoder.new_cache(256)
        stepper.prefill(sequence.ids[:-1], fresh)
        end = fresh.length
        for mine, theirs in zip(tiny.cached(sequence.cache, end), tiny.cached(fresh, end), strict=True):
            torch.testing.assert_close(mine, theirs)

    _, rounds = run(stepper, Lookup(stepper, ContextDrafter(fixed=drafts)), 60, PROMPT, each=check)  # type: ignore[arg-type]
    assert any(accepted for _, accepted in rounds) and any(drafted > accepted for drafted, accepted in rounds)


@pytest.mark.parametrize("make", [ContextIndex, index_of])
def test_matches_of_a_growing_text(make: Callable[[list[int]], ContextIndex]) -> None:
    """Against a search through the whole text, over random texts of few tokens, with drafts behind them and without; also of
    texts that outgrow what there was room for at first."""
    draw = random.Random(0)
    for case in range(40):
        ids: list[int] = []
        index = make(ids)
        for _ in range(300 if case % 8 == 0 else 60):
            ids += [draw.randrange(4 + case) for _ in range(draw.randrange(1, 4))]
            drafts = [draw.randrange(4 + case) for _ in range(draw.randrange(0, 3))]
            assert index.find(5) == _search(ids, 5, [])
            assert index.find(5, drafts) == _search(ids, 5, drafts)


def test_native_code_looks_for_matches() -> None:
    assert isinstance(index_of([1, 2, 3]), NativeIndex)


def test_where_native_code_fails_python_looks_for_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("no LLVM")

    monkeypatch.setattr("engine.kernels.native.load_matches", fail)
    context_index._native_find.cache_clear()
    try:
        index = index_of([1, 2, 3, 1, 2])
        assert not isinstance(index, NativeIndex) and index.find(1) == Match(2, (3,))
    finally:
        context_index._native_find.cache_clear()


def _search(ids: list[int], limit: int, drafts: list[int]) -> Match:
    latest = ids + drafts
    for length in (length for length in reversed(LENGTHS) if length <= len(latest)):
        for end in range(len(ids) - 1, length - 1, -1):
            if ids[end - length : end] == latest[-length:]:
                return Match(length, tuple(ids[end : end + limit]))
    return Match()


def test_it_learns_which_matches_are_worth_it() -> None:
    drafter, match, costs = ContextDrafter(), Match(3, (1, 2, 3, 4)), RoundCosts(MAX_DRAFTS)
    costs.note_plain(1.0)
    assert drafter.choose(match, 4, costs)
    for _ in range(40):
        drafter.observe(match, 2, 0)
    assert drafter.choose(match, 4, costs) == ()
    assert drafter.choose(Match(5, (1, 2)), 4, costs)  # of longer ones nothing bad is known
    for _ in range(60):
        drafter.observe(match, 4, 4)
    assert drafter.choose(match, 4, costs) == (1, 2, 3, 4)
    assert drafter.choose(match, 2, costs) == (1, 2)
    assert drafter.choose(match, 4, costs, rate=1000.0) == ()


def test_rows_that_cost_much_are_not_added() -> None:
    drafter, match, costs = ContextDrafter(), Match(5, (1, 2, 3, 4, 5)), RoundCosts(MAX_DRAFTS)
    costs.note_plain(1.0)
    for drafts, seconds in ((1, 1.1), (2, 1.2), (3, 3.0)):
        costs.note_verification(drafts, seconds)
    assert drafter.choose(match, 5, costs) == (1, 2)


def test_every_model_has_it_and_those_with_an_accelerator_both(decoders: dict[str, Decoder]) -> None:
    decoder = decoders["fp32"]
    backend = DecoderBackend(decoder)
    assert backend.methods() == ("plain", "lookup")
    sequence = TokenSequence(list(PROMPT), decoder.new_cache(64), Sampler(SamplingParams()), len(PROMPT))
    backend.prefill(PROMPT[:-1], sequence.cache)
    method = backend.method("lookup")
    method.start(sequence)
    assert len(method.step(8).token_ids) >= 1
    backend.close()


@pytest.mark.real_model
def test_the_default_model_repeats_itself(default_model_path: Path) -> None:
    from engine.loading import load_session
    from engine.requests import GenerationRequest, Message

    session = load_session("default", default_model_path)
    assert session.methods() == ("plain", "lookup", "m2r2", "stream")
    backend = session.backend
    assert isinstance(backend, DecoderBackend)
    # How much is verified depends on what rows take at this moment, unless it is fixed.
    backend.factories["fixed"] = Lookup(backend.stepper, ContextDrafter(fixed=4)).new_method
    prompt = [Message("user", "Write the numbers from 1 to 30, one per line, each after the word Number.")]
    texts, accepted = {}, {}
    for method in session.methods():
        generation = session.stream_generate(
            GenerationRequest(messages=prompt, method=method, max_new_tokens=120)
        )
        for _ in generation:
            pass
        texts[method] = generation.result.token_ids
        accepted[method] = generation.metrics.speculation.num_accepted_tokens
    assert len(set(texts.values())) == 1
    assert accepted["plain"] == 0 and accepted["fixed"] > 20
    session.close()
