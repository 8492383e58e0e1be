"""Alternatives to drafts, verified in the same pass: more tokens a round, and the same text."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from engine.decoding.acceptance import Accepted, Alternative, accept
from engine.decoding.base import TokenSequence
from engine.decoding.calibration import Drift
from engine.decoding.controller import DepthController, RoundRecord
from engine.decoding.draft_plan import DraftPlan
from engine.decoding.m2r2 import M2R2
from engine.decoding.sampling import Sampler
from engine.kernels import make_fused_stepper
from engine.models.decoder import Decoder
from engine.models.loader import load_decoder
from engine.models.stepper import Stepper, TorchStepper, make_stepper
from engine.requests import SamplingParams
from engine.residuals.drafter import make_drafter
from tests import tiny
from tests.test_m2r2 import FUSED, NUM_LAYERS, PROMPT, SAMPLINGS, Scripted, accelerator, fixed, run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Decoder]:
    folder = tiny.save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=NUM_LAYERS)
    return {name: load_decoder(folder, name) for name in ("fp64", *FUSED)}


def scripted(
    stepper: Stepper, choose: Callable[[int], int], offer: Callable[[int], Sequence[int]]
) -> Scripted:
    return Scripted(make_drafter(stepper, accelerator(stepper.decoder)), choose, offer)


# Rows instead of others

CHAIN, INSTEAD_OF = [3, 50, 7, 99], [1, 1, 3]  # and three others: two for the first draft, one for the third
OTHERS = [51, 52, 98]


@pytest.mark.parametrize(
    "length", [1, 40, 60, 61, 62, 63, 64, 126, 127]
)  # around the ends of attention's chunks
@pytest.mark.parametrize("weight_format", FUSED)
def test_an_alternative_has_the_bits_of_plain_decoding(
    decoders: dict[str, Decoder], weight_format: str, length: int
) -> None:
    decoder = decoders[weight_format]
    stepper = make_fused_stepper(decoder, num_threads=2)
    _compare(stepper, decoder, length, lambda one, other: torch.equal(one, other))


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.MOE_FAMILIES])
@pytest.mark.parametrize("fused", [True, False])
def test_alternatives_of_every_family(tmp_path: Path, family: str, fused: bool) -> None:
    """Sliding windows, norms of queries and keys, biases, experts."""
    decoder = load_decoder(tiny.save_model(tmp_path / family, family), "fp32" if fused else "fp64")
    stepper = make_stepper(decoder) if fused else TorchStepper(decoder)
    assert stepper.name == ("fused" if fused else "torch")
    for length in (5, 62):
        _compare(stepper, decoder, length, lambda one, other: torch.allclose(one, other, atol=1e-5))


def _compare(
    stepper: Stepper, decoder: Decoder, length: int, same: Callable[[torch.Tensor, torch.Tensor], bool]
) -> None:
    text = [(7 * place) % 200 for place in range(length)]
    cache = decoder.new_cache(length + len(CHAIN) + len(OTHERS))
    stepper.prefill(text, cache)
    hidden, logits = (t.clone() for t in stepper.forward(CHAIN + OTHERS, cache, instead_of=INSTEAD_OF))
    for number, (other, row) in enumerate(zip(OTHERS, INSTEAD_OF, strict=True)):
        straight = decoder.new_cache(length + len(CHAIN) + 1)
        stepper.prefill(text, straight)
        expected, wanted = stepper.forward([*CHAIN[:row], other], straight)
        own = len(CHAIN) + number
        assert same(hidden[own], expected[row]) and same(logits[own], wanted[row])
        stepper.forward(CHAIN + OTHERS, cache, instead_of=INSTEAD_OF)
        stepper.copy_slot(cache, length + own, length + row)
        end = length + row + 1
        for ours, theirs in zip(tiny.cached(cache, end), tiny.cached(straight, end), strict=True):
            assert same(ours, theirs)


# Whole generations


@pytest.mark.parametrize("alternatives", [1, 3])
@pytest.mark.parametrize("drafts", [1, 2, 5])
@pytest.mark.parametrize("weight_format", ["fp64", *FUSED])
def test_greedy_output_is_plain(
    decoders: dict[str, Decoder], weight_format: str, drafts: int, alternatives: int
) -> None:
    decoder = decoders[weight_format]
    stepper = TorchStepper(decoder) if weight_format == "fp64" else make_stepper(decoder)
    expected, _ = run(stepper, None, 80)
    drafter = make_drafter(stepper, accelerator(decoder))
    ids, rounds = run(stepper, fixed(drafter, drafts, alternatives), 80)
    assert ids == expected
    assert max(drafted for drafted, _ in rounds) == drafts + alternatives


@pytest.mark.parametrize("weight_format", ["fp64", "int4"])
def test_an_alternative_that_is_always_right_gives_two_tokens(
    decoders: dict[str, Decoder], weight_format: str
) -> None:
    decoder = decoders[weight_format]
    stepper = TorchStepper(decoder) if weight_format == "fp64" else make_stepper(decoder)
    expected, _ = run(stepper, None, 61)
    text = [*PROMPT, *expected, *[0] * 9]
    drafter = scripted(stepper, lambda place: (text[place] + 1) % 200, lambda place: (150, text[place]))
    ids, rounds = run(stepper, fixed(drafter, 2, 4), 61)
    assert ids == expected
    # The first round has no verified state to start from, and the last ones no room.
    assert all(accepted == 1 for _, accepted in rounds[1:-4]) and len(rounds) < 35


def test_alternatives_that_are_always_wrong_give_one(decoders: dict[str, Decoder]) -> None:
    stepper = make_stepper(decoders["bf16"])
    expected, _ = run(stepper, None, 24)
    text = [*PROMPT, *expected, *[0] * 9]
    drafter = scripted(
        stepper, lambda place: (text[place] + 1) % 200, lambda place: ((text[place] + 2) % 200,)
    )
    ids, rounds = run(stepper, fixed(drafter, 3, 2), 24)
    assert ids == expected and len(rounds) == 24


@pytest.mark.parametrize("weight_format", FUSED)
def test_after_each_round_the_cache_has_the_bits_of_a_fresh_prefill(
    decoders: dict[str, Decoder], weight_format: str
) -> None:
    """Drafts and alternatives right and wrong, drafts kept and dropped, on a cache that grows."""

    class Moody(DepthController):
        def plan(self, limit: int, drift: Drift | None = None) -> DraftPlan | None:
            plan = super().plan(limit, drift)
            if plan is not None:
                plan.keep = lambda confidences: chance.random() < 0.75
            return plan

    stepper, chance = make_stepper(decoders[weight_format]), random.Random(3)
    expected, _ = run(stepper, None, 90, [9])
    text = [9, *expected, *[0] * 9]

    def maybe(place: int) -> int:
        return text[place] if chance.random() < 0.5 else chance.randrange(200)

    def check(sequence: TokenSequence) -> None:
        fresh = stepper.decoder.new_cache(len(sequence.ids))
        stepper.prefill(sequence.ids[:-1], fresh)
        end = fresh.length
        for ours, theirs in zip(tiny.cached(sequence.cache, end), tiny.cached(fresh, end), strict=True):
            assert torch.equal(ours, theirs)

    drafter = scripted(stepper, maybe, lambda place: (maybe(place), maybe(place)))
    method = M2R2(lambda: drafter, Moody(fixed=4, fixed_alternatives=3))
    ids, rounds = run(stepper, method, 90, [9], each=check)
    assert ids == expected
    assert len(rounds) < 60


@pytest.mark.parametrize("params", SAMPLINGS, ids=str)
def test_a_seed_gives_the_text_that_plain_decoding_gives(
    decoders: dict[str, Decoder], params: SamplingParams
) -> None:
    stepper = make_stepper(decoders["int4"])
    expected, _ = run(stepper, None, 80, params=params)
    text = [*PROMPT, *expected, *[0] * 9]
    drafter = scripted(stepper, lambda place: text[place] if place % 2 else 3, lambda place: (text[place], 4))
    ids, rounds = run(stepper, fixed(drafter, 4, 6), 80, params=params)
    assert ids == expected
    assert any(accepted > 1 for _, accepted in rounds)


# The rule alone


def test_the_rule_follows_the_models_distribution() -> None:
    """Chi-square over 20,000 draws: a draft and two alternatives to it, one of them impossible."""
    from scipy.stats import chisquare

    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, float("-inf")]] * 4)
    expected = logits[0].softmax(-1)[:4].double()
    others = (Alternative(0, 0), Alternative(4, 0))
    first, second, draws = torch.zeros(5), torch.zeros(5), 20_000
    for seed in range(draws):
        ids = [9]
        accepted = accept(logits, [1], ids, Sampler(SamplingParams(1.0, seed=seed)), others)
        assert accepted.num_drafts == len(ids) - 2 == (ids[1] in (0, 1))
        first[ids[1]] += 1
        if len(ids) > 2:
            second[ids[2]] += 1
    assert chisquare(first[:4], draws * expected / expected.sum()).pvalue > 1e-3
    assert chisquare(second[:4], second.sum() * expected / expected.sum()).pvalue > 1e-3


@pytest.mark.parametrize(
    ("drafts", "others", "accepted", "ids"),
    [
        ([2], [Alternative(3, 0)], Accepted(0, True, 2, True), [3, 0]),
        ([3], [Alternative(2, 0)], Accepted(1, False, 1, True), [3, 1]),
        ([3, 0], [Alternative(2, 0), Alternative(1, 1)], Accepted(1, True, 4, True), [3, 1, 3]),
        ([2, 1], [Alternative(3, 1)], Accepted(0, False, 0, False), [3]),  # another place's
    ],
)
def test_acceptance_table(
    drafts: list[int], others: list[Alternative], accepted: Accepted, ids: list[int]
) -> None:
    logits = torch.eye(4)[[3, 1, 0, 2, 3]]
    text = [9]
    assert accept(logits, drafts, text, Sampler(SamplingParams()), others) == accepted
    assert text[1:] == ids


# Which ones


def taught(row_seconds: float) -> DepthController:
    """A controller that knows what rows take beside a plain step of a second."""
    controller = DepthController()
    for drafts in (1, 2, 3, 4, 5):
        controller.observe_plain(1.0)
        controller.observe(RoundRecord(drafts, drafts, 1, 0.1 * drafts, 1 + drafts * row_seconds))
    for _ in range(20):
        controller.plan(7)
        controller.observe_plain(1.0)
    assert controller.plan(7)
    return controller


OFFERS = [[(5, 0.2), (6, 0.03)], [(7, 0.35)]]


@pytest.mark.parametrize(
    ("row_seconds", "tokens"), [(0.001, [5, 7, 6]), (0.08, [5, 7]), (0.16, [5]), (0.5, [])]
)
def test_the_likeliest_are_taken_while_they_are_worth_a_row(row_seconds: float, tokens: list[int]) -> None:
    chosen = taught(row_seconds).alternatives([0.5, 0.5], OFFERS, 2, 5)
    assert [each.token for each in chosen] == tokens
    assert all(each.place == (each.token == 7) for each in chosen)


@pytest.mark.parametrize("room", [0, 1, 2])
def test_there_may_be_no_room(room: int) -> None:
    assert len(taught(0.001).alternatives([0.5, 0.5], OFFERS, 2, room)) == room


def test_what_was_offered_and_never_right_is_not_taken_for_long() -> None:
    controller = taught(0.05)
    assert controller.alternatives([0.5], OFFERS[:1], 1, 5)
    for _ in range(60):
        controller.observe(RoundRecord(1, 2, 1, 0.1, 1.1, ((0.5, False),), ((0.2, False),)))
    controller.plan(7)
    assert not controller.alternatives([0.5], OFFERS[:1], 1, 5)


@pytest.mark.parametrize(("row_seconds", "least"), [(0.02, 0.05), (0.2, 0.3)])
def test_only_likely_tokens_are_asked_for(row_seconds: float, least: float) -> None:
    plan = taught(row_seconds).plan(7)
    assert plan is not None
    assert plan.least_offer([]) == pytest.approx(0.8 * row_seconds, rel=0.3)
    assert plan.least_offer([0.5]) > plan.least_offer([])
    assert plan.least_offer([]) < least
