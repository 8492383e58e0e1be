"""M2R2 decoding is lossless: whatever is drafted, the output is plain decoding's own."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.backend import DecoderBackend
from engine.decoding.acceptance import accept
from engine.decoding.base import TokenSequence
from engine.decoding.controller import DepthController
from engine.decoding.m2r2 import M2R2
from engine.decoding.sampling import Sampler
from engine.generation import Generation
from engine.kernels.drafter import FusedDrafter
from engine.models.decoder import Decoder
from engine.models.kv_cache import KVCache
from engine.models.loader import load_decoder
from engine.models.stepper import Stepper, TorchStepper, make_stepper
from engine.requests import FinishReason, GenerationRequest, Message, Provenance, SamplingParams
from engine.residuals.accelerator import Accelerator, AcceleratorConfig
from engine.residuals.drafter import Draft, Drafter, StepwiseDrafter, make_drafter
from engine.session import ModelInfo, Session
from engine.tokenizer import load_tokenizer
from tests import tiny

NUM_LAYERS = 4
PROMPT = [5, 70, 9, 33, 120, 7, 7, 61]
EXACT = ("fp32", "fp64")
FUSED = ("int4", "int8", "bf16", "fp32")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def decoders(folder: Path) -> dict[str, Decoder]:
    return {name: load_decoder(folder, name) for name in ("fp64", *FUSED)}


def accelerator(decoder: Decoder, depth: int = 2, rank: int = 8, conditioned: bool = True) -> Accelerator:
    """Random, every matrix at work; it drafts badly, and sometimes rightly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(depth)
        config = AcceleratorConfig(depth, rank, conditioned, draft_vocab_size=200)
        made = Accelerator(config, decoder.config)
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
        made.exit.data += torch.eye(*made.exit.shape)
    return made.requires_grad_(False)


class Scripted(StepwiseDrafter):
    """A drafter whose tokens, and those that it offers beside them, are chosen by the test; everything else is the real
    one's."""

    def __init__(
        self,
        inner: Drafter,
        choose: Callable[[int], int],
        offer: Callable[[int], Sequence[int]] = lambda place: (),
    ) -> None:
        self._inner, self._choose, self._offer = inner, choose, offer
        self.depth, self.stepper = inner.depth, inner.stepper

    def draft(self, token: int, state: Tensor, cache: KVCache, position: int, *how: Any) -> Draft:
        real = self._inner.draft(token, state, cache, position, *how)
        others = tuple((other, 0.2) for other in self._offer(position + 1))
        return Draft(self._choose(position + 1), 0.5, real.slow_state, real.exit_state, others)


def run(
    stepper: Stepper,
    method: M2R2 | None,
    count: int,
    prompt: list[int] = PROMPT,
    params: SamplingParams | None = None,
    each: Callable[[TokenSequence], None] | None = None,
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of ``count`` new tokens, and (drafted, accepted) of each round."""
    from engine.decoding.plain import PlainDecoding

    decoder = stepper.decoder
    cache = decoder.new_cache(len(prompt) + 8)
    if len(prompt) > 1:
        decoder.prefill(prompt[:-1], cache)
    sequence = TokenSequence(list(prompt), cache, Sampler(params or SamplingParams()), len(prompt))
    decoding = PlainDecoding(stepper) if method is None else method.new_method()
    decoding.start(sequence)
    rounds = []
    while (left := len(prompt) + count - len(sequence.ids)) > 0:
        before = len(sequence.ids)
        step = decoding.step(left)
        assert 1 <= len(step.token_ids) <= left
        assert sequence.ids[before:] == list(step.token_ids)
        assert cache.length == len(sequence.ids) - 1
        assert step.provenance.count(Provenance.DRAFTED) == step.num_accepted_tokens
        rounds.append((step.num_draft_tokens, step.num_accepted_tokens))
        if each is not None:
            each(sequence)
    return sequence.ids[len(prompt) :], rounds


def fixed(drafter: Drafter, drafts: int, alternatives: int = 0) -> M2R2:
    return M2R2(lambda: drafter, DepthController(8, fixed=drafts, fixed_alternatives=alternatives))


@pytest.mark.parametrize("drafts", range(9))
@pytest.mark.parametrize("weight_format", EXACT)
def test_greedy_output_is_plain_for_every_number_of_drafts(
    decoders: dict[str, Decoder], weight_format: str, drafts: int
) -> None:
    stepper = TorchStepper(decoders[weight_format])
    expected, _ = run(stepper, None, 60)
    ids, rounds = run(stepper, fixed(make_drafter(stepper, accelerator(stepper.decoder)), drafts), 60)
    assert ids == expected
    assert max(drafted for drafted, _ in rounds) == drafts


@pytest.mark.parametrize("depth", range(NUM_LAYERS + 1))
@pytest.mark.parametrize("conditioned", [True, False])
@pytest.mark.parametrize("weight_format", EXACT)
def test_greedy_output_is_plain_for_every_draft_interval(
    decoders: dict[str, Decoder], weight_format: str, conditioned: bool, depth: int
) -> None:
    stepper = TorchStepper(decoders[weight_format])
    made = accelerator(stepper.decoder, depth, conditioned=conditioned)
    expected, _ = run(stepper, None, 40)
    assert run(stepper, fixed(make_drafter(stepper, made), 3), 40)[0] == expected


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.MOE_FAMILIES])
def test_every_family_drafts_losslessly(tmp_path: Path, family: str) -> None:
    decoder = load_decoder(tiny.save_model(tmp_path / family, family), "fp64")
    stepper = TorchStepper(decoder)
    expected, _ = run(stepper, None, 60)
    assert run(stepper, fixed(make_drafter(stepper, accelerator(decoder)), 4), 60)[0] == expected


@pytest.mark.parametrize("weight_format", FUSED)
def test_the_fused_kernels_draft_losslessly(decoders: dict[str, Decoder], weight_format: str) -> None:
    stepper = make_stepper(decoders[weight_format])
    assert stepper.name == "fused"
    expected, _ = run(stepper, None, 80)
    for depth, drafts in ((1, 2), (2, 5), (NUM_LAYERS, 3)):
        drafter = make_drafter(stepper, accelerator(stepper.decoder, depth))
        assert run(stepper, fixed(drafter, drafts), 80)[0] == expected


@pytest.mark.parametrize("conditioned", [True, False])
def test_the_fused_drafter_drafts_as_the_reference_does(conditioned: bool, tmp_path: Path) -> None:
    """It rounds adapters to int8 and the head to int4, so states are close and not the same. (A model of a shape that
    int4 cannot hold: no copies of layers.)"""
    decoder = load_decoder(tiny.save_model(tmp_path / "model", intermediate_size=144), "fp32")
    made = accelerator(decoder, conditioned=conditioned)
    fused, plain = make_stepper(decoder), TorchStepper(decoder)
    states = []
    for stepper in (fused, plain):
        cache = decoder.new_cache(32)
        decoder.prefill(PROMPT[:-1], cache)
        drafter = make_drafter(stepper, made)
        state = torch.linspace(-1, 1, decoder.config.hidden_size)
        states.append(drafter.draft(PROMPT[-1], state, cache, len(PROMPT) - 1))
    ours, reference = states
    torch.testing.assert_close(ours.slow_state, reference.slow_state, rtol=1e-4, atol=1e-5)
    agreement = torch.nn.functional.cosine_similarity(ours.exit_state, reference.exit_state, dim=0)
    assert agreement > 0.999
    assert abs(ours.confidence - reference.confidence) < 0.2


@pytest.mark.parametrize("dense", [[], [0], [2], [1, 2, 3]])
def test_the_fused_drafter_drafts_through_experts_as_the_reference_does(
    dense: list[int], tmp_path: Path
) -> None:
    """Dense layers and layers with experts in any order; the reference on the same slow states."""
    folder = tiny.save_model(
        tmp_path / "moe", "qwen2_moe", num_hidden_layers=NUM_LAYERS, mlp_only_layers=dense
    )
    decoder = load_decoder(folder, "fp32")
    made = accelerator(decoder, 4)
    drafts = []
    for stepper in (make_stepper(decoder), TorchStepper(decoder)):
        cache = decoder.new_cache(64)
        stepper.prefill(PROMPT[:-1], cache)
        drafter = make_drafter(stepper, made)
        state = torch.linspace(-1, 1, decoder.config.hidden_size)
        drafts.append(drafter.draft(PROMPT[-1], state, cache, len(PROMPT) - 1))
        hidden = stepper.embed(PROMPT[-1:])
        own = stepper.run_layers(hidden, cache, len(PROMPT) - 1, 0, 4)
        torch.testing.assert_close(drafts[-1].slow_state, own, rtol=1e-4, atol=1e-5)
    ours, reference = drafts
    agreement = torch.nn.functional.cosine_similarity(ours.exit_state, reference.exit_state, dim=0)
    assert agreement > 0.995  # roundings of adapters and head, added up over more layers than above
    assert abs(ours.confidence - reference.confidence) < 0.2


@pytest.mark.parametrize("drafts", [1, 3, 8])
def test_a_drafter_that_is_always_right_gives_all_and_one_more(
    decoders: dict[str, Decoder], drafts: int
) -> None:
    stepper = TorchStepper(decoders["fp64"])
    expected, _ = run(stepper, None, 64)
    text = PROMPT + expected
    oracle = Scripted(make_drafter(stepper, accelerator(stepper.decoder)), lambda place: text[place])
    ids, rounds = run(stepper, fixed(oracle, drafts), 64)
    assert ids == expected
    # The first round has no verified state to start from, the last no room for more.
    assert all(accepted == drafted for drafted, accepted in rounds)
    assert all(drafted == drafts for drafted, _ in rounds[1:-1])


@pytest.mark.parametrize("drafts", [1, 3, 8])
def test_a_drafter_that_is_always_wrong_gives_one(decoders: dict[str, Decoder], drafts: int) -> None:
    stepper = TorchStepper(decoders["fp64"])
    expected, _ = run(stepper, None, 24)
    text = [*PROMPT, *expected, 0]
    wrong = Scripted(
        make_drafter(stepper, accelerator(stepper.decoder)), lambda place: (text[min(place, 31)] + 1) % 200
    )
    ids, rounds = run(stepper, fixed(wrong, drafts), 24)
    assert ids == expected
    assert len(rounds) == 24
    assert all(accepted == 0 for _, accepted in rounds)


def test_after_each_round_the_cache_is_a_fresh_prefill(decoders: dict[str, Decoder]) -> None:
    decoder = decoders["fp64"]
    stepper = TorchStepper(decoder)
    expected, _ = run(stepper, None, 40)
    text, chance = PROMPT + expected, random.Random(3)

    def sometimes(place: int) -> int:
        return text[place] if place < len(text) and chance.random() < 0.6 else chance.randrange(200)

    def check(sequence: TokenSequence) -> None:
        fresh = decoder.new_cache(len(sequence.ids))
        decoder.prefill(sequence.ids[:-1], fresh)
        end = fresh.length
        for ours, theirs in zip(tiny.cached(sequence.cache, end), tiny.cached(fresh, end), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)

    drafter = Scripted(make_drafter(stepper, accelerator(decoder)), sometimes)
    ids, rounds = run(stepper, fixed(drafter, 4), 40, each=check)
    assert ids == expected
    assert 0 < sum(accepted for _, accepted in rounds) < sum(drafted for drafted, _ in rounds)


def test_a_prompt_of_one_token(decoders: dict[str, Decoder]) -> None:
    stepper = TorchStepper(decoders["fp64"])
    expected, _ = run(stepper, None, 30, prompt=[9])
    drafter = make_drafter(stepper, accelerator(stepper.decoder))
    assert run(stepper, fixed(drafter, 5), 30, prompt=[9])[0] == expected


def test_whatever_the_controller_decides_the_output_is_the_same(decoders: dict[str, Decoder]) -> None:
    stepper = make_stepper(decoders["bf16"])
    expected, _ = run(stepper, None, 160)
    ids, rounds = run(
        stepper, M2R2(lambda: make_drafter(stepper, accelerator(stepper.decoder)), DepthController()), 160
    )
    assert ids == expected
    assert any(drafted for drafted, _ in rounds)


SAMPLINGS = (
    SamplingParams(temperature=0.8, seed=4),
    SamplingParams(temperature=1.3, top_k=20, seed=5),
    SamplingParams(temperature=1.0, top_p=0.8, repetition_penalty=1.3, seed=6),
    SamplingParams(temperature=0.0, repetition_penalty=1.2),
)


@pytest.mark.parametrize("params", SAMPLINGS, ids=str)
def test_a_seed_gives_the_text_that_plain_decoding_gives(
    decoders: dict[str, Decoder], params: SamplingParams
) -> None:
    stepper = make_stepper(decoders["int4"])
    expected, _ = run(stepper, None, 80, params=params)
    text = PROMPT + expected
    drafter = make_drafter(stepper, accelerator(stepper.decoder))
    assert run(stepper, fixed(drafter, 4), 80, params=params)[0] == expected
    oracle = Scripted(drafter, lambda place: text[place] if place % 5 else 3)
    ids, rounds = run(stepper, fixed(oracle, 4), 80, params=params)
    assert ids == expected
    assert any(accepted > 1 for _, accepted in rounds)


# The acceptance rule alone


def test_acceptance_follows_the_models_distribution() -> None:
    """Chi-square over 20,000 draws, for a likely, an unlikely and an impossible draft."""
    from scipy.stats import chisquare

    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, float("-inf")]] * 2)
    expected = logits[0].softmax(-1)[:4].double()
    for draft in (0, 3, 4):
        first, second, accepted = torch.zeros(5), torch.zeros(5), 0
        draws = 20_000
        for seed in range(draws):
            ids = [1]
            right = accept(logits, [draft], ids, Sampler(SamplingParams(1.0, seed=seed))).num_drafts
            accepted += right
            first[ids[1]] += 1
            if right:
                second[ids[2]] += 1
        assert first[4] == 0
        assert chisquare(first[:4], draws * expected / expected.sum()).pvalue > 1e-3
        if accepted:
            assert chisquare(second[:4], accepted * expected / expected.sum()).pvalue > 1e-3
        # The rejection rule of Leviathan et al.: accepted with the model's own probability of the draft
        probability = float(expected[draft]) if draft < 4 else 0.0
        assert abs(accepted / draws - probability) < 4 * (0.25 / draws) ** 0.5


@pytest.mark.parametrize(
    ("drafts", "accepted", "ids"),
    [([], 0, [3]), ([3], 1, [3, 1]), ([2], 0, [3]), ([3, 1, 0], 3, [3, 1, 0, 2]), ([3, 0, 0], 1, [3, 1])],
)
def test_greedy_acceptance_table(drafts: list[int], accepted: int, ids: list[int]) -> None:
    logits = torch.eye(4)[[3, 1, 0, 2]][: len(drafts) + 1]
    text = [9]
    assert accept(logits, drafts, text, Sampler(SamplingParams())).num_drafts == accepted
    assert text[1:] == ids


# Ends of the answer, through the session


@pytest.fixture(scope="module")
def sessions(folder: Path) -> dict[str, Session]:
    """A plain one, and one that drafts 6 at a time."""
    made = {}
    for name in ("plain", "m2r2"):
        decoder = load_decoder(folder, "fp64")
        stepper = TorchStepper(decoder)
        method = fixed(make_drafter(stepper, accelerator(decoder)), 6)
        backend = DecoderBackend(decoder, stepper, method if name == "m2r2" else None)
        info = ModelInfo("tiny", "llama", 1, "fp64", "cpu", 256, 1, "torch", backend.methods())
        made[name] = Session(backend, load_tokenizer(folder), info)
    return made


def both(sessions: dict[str, Session], **fields: Any) -> tuple[Any, Any]:
    results = []
    for name, session in sessions.items():
        request = GenerationRequest(method=name, **fields)
        generation = session.stream_generate(request, reuse_prefix=False)
        for _ in generation:
            pass
        results.append(generation)
    return results[0], results[1]


def agree(sessions: dict[str, Session], reason: FinishReason | None = None, **fields: Any) -> None:
    plain, drafted = both(sessions, **fields)
    assert drafted.result.token_ids == plain.result.token_ids
    assert drafted.result.text == plain.result.text
    assert drafted.result.finish_reason is plain.result.finish_reason
    if reason is not None:
        assert drafted.result.finish_reason is reason


@pytest.mark.parametrize("count", [*range(1, 12), 40])
def test_max_tokens_inside_a_draft(sessions: dict[str, Session], count: int) -> None:
    agree(sessions, FinishReason.LENGTH, prompt_ids=PROMPT, max_new_tokens=count, ignore_eos=True)


@pytest.mark.parametrize("seed", range(12))
def test_end_of_sequence_inside_a_draft(sessions: dict[str, Session], seed: int) -> None:
    params = SamplingParams(temperature=2.5, seed=seed)
    agree(sessions, prompt_ids=PROMPT, max_new_tokens=150, sampling=params)


@pytest.mark.parametrize("place", [1, 3, 8, 14])
def test_stop_strings_inside_a_draft(sessions: dict[str, Session], place: int) -> None:
    plain, _ = both(sessions, prompt_ids=PROMPT, max_new_tokens=40, ignore_eos=True)
    text = plain.result.text
    stop = text[place : place + 2]
    agree(sessions, FinishReason.STOP, prompt_ids=PROMPT, max_new_tokens=40, ignore_eos=True, stop=(stop,))


@pytest.mark.parametrize("length", range(240, 256))
def test_the_context_ends_inside_a_draft(sessions: dict[str, Session], length: int) -> None:
    prompt = [3 + index * 7 % 190 for index in range(length)]
    agree(sessions, FinishReason.CONTEXT, prompt_ids=prompt, max_new_tokens=100, ignore_eos=True)


def test_counters_add_up(sessions: dict[str, Session]) -> None:
    _, drafted = both(sessions, prompt_ids=PROMPT, max_new_tokens=50, ignore_eos=True)
    counted = drafted.metrics.speculation
    assert counted.num_accepted_tokens == sum(counted.num_accepted_tokens_per_pos)
    assert counted.num_rounds + counted.num_accepted_tokens == drafted.metrics.num_new_tokens == 50
    assert counted.num_draft_tokens <= 6 * counted.num_drafts


@pytest.mark.real_model
@pytest.mark.parametrize("weight_format", ["int4", "int8", "bf16"])
def test_the_real_model_answers_the_same(default_model_path: Path, weight_format: str) -> None:
    session = Session.load(str(default_model_path), weight_format, threads=2)
    try:
        assert "m2r2" in session.methods()
        accepted = 0
        for params in (SamplingParams(), SamplingParams(temperature=0.7, seed=1)):
            for question in ("Why is the sky blue?", "Write a short poem about the sea."):
                texts = []
                for method in ("plain", "m2r2"):
                    request = GenerationRequest(
                        messages=(Message("user", question),),
                        max_new_tokens=96,
                        method=method,
                        sampling=params,
                    )
                    generation = session.stream_generate(request, reuse_prefix=False)
                    for _ in generation:
                        pass
                    texts.append(generation.result.token_ids)
                    accepted += generation.metrics.speculation.num_accepted_tokens
                assert texts[0] == texts[1]
        assert accepted > 40
    finally:
        session.close()


def test_drafts_start_from_their_own_text_while_another_answer_takes_turns(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All passes give their states in the same memory."""
    decoder = load_decoder(folder, "int4")
    stepper = make_stepper(decoder)
    backend = DecoderBackend(decoder, stepper, fixed(make_drafter(stepper, accelerator(decoder)), 3))
    info = ModelInfo("tiny", "llama", 1, "int4", "cpu", 256, 1, "fused", backend.methods())
    session, seen = Session(backend, load_tokenizer(folder), info), []
    whole_round = FusedDrafter.whole_round

    def watched(
        drafter: FusedDrafter, sequence: TokenSequence, states: Tensor, row: int, *others: Any
    ) -> Any:
        seen.append((len(sequence.ids), states[row].clone()))
        return whole_round(drafter, sequence, states, row, *others)

    monkeypatch.setattr(FusedDrafter, "whole_round", watched)

    def answer(method: str, prompt: list[int]) -> Generation:
        request = GenerationRequest(method=method, prompt_ids=prompt, max_new_tokens=40, ignore_eos=True)
        return session.stream_generate(request, reuse_prefix=False)

    list(answer("m2r2", PROMPT))
    alone, seen = seen, []
    for _ in zip(answer("m2r2", PROMPT), answer("plain", PROMPT[::-1]), strict=False):
        pass
    assert len(seen) > 20
    for (length, state), (expected_length, expected) in zip(seen, alone, strict=False):
        assert length == expected_length and torch.equal(state, expected)
