"""A round's drafts in one command: those that its steps one by one would give, as far as the same plan would go."""

from __future__ import annotations

import random
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from engine.decoding.base import TokenSequence
from engine.decoding.costs import RoundCosts
from engine.decoding.draft_plan import MOST_DRAFTS, DraftPlan
from engine.decoding.sampling import Sampler
from engine.kernels import draft_head
from engine.kernels.drafter import FusedDrafter
from engine.models.loader import load_decoder
from engine.models.stepper import make_stepper
from engine.requests import SamplingParams
from engine.residuals.drafter import Drafted, StepwiseDrafter, make_drafter
from tests import tiny
from tests.test_m2r2 import PROMPT, accelerator

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLINGS = (
    SamplingParams(),
    SamplingParams(temperature=0.8, seed=4),
    SamplingParams(temperature=1.5, seed=5),
    SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.3, seed=6),
    SamplingParams(repetition_penalty=1.2),
    SamplingParams(temperature=0.9, repetition_penalty=0.8, seed=7),
)


@pytest.fixture(scope="module")
def drafters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FusedDrafter]:
    folder, made = tiny.save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=4), {}
    for name in ("int4", "bf16"):  # with slow states, and on copies of layers
        decoder = load_decoder(folder, name)
        made[name] = cast(FusedDrafter, make_drafter(make_stepper(decoder), accelerator(decoder)))
    return made


def weighed(chance: random.Random, limit: int) -> DraftPlan:
    """A plan that stops somewhere, for what it has seen of drafts and of times."""
    plan, costs = DraftPlan(), RoundCosts(limit)
    for _ in range(40):
        confidence = chance.random()
        plan.luck.learn(confidence, chance.random() < min(1.0, 3 * confidence))
    plan.factor = chance.uniform(0.8, 1.5)
    costs.note_plain(1.0)
    row = chance.choice([0.01, 0.1, 0.3])
    for drafts in range(1, limit + 1):
        costs.note_round(drafts, 0.05 * drafts, drafts, False, 1 + row * drafts)
    plan.know(costs)
    plan.weigh(limit, chance.uniform(0.1, 1.2), chance.random())
    return plan


def forced(drafts: int, least: float) -> DraftPlan:
    plan = DraftPlan()
    plan.force(drafts, least)
    return plan


def rounds(
    drafter: FusedDrafter, plan: DraftPlan, params: SamplingParams, length: int
) -> list[tuple[Drafted, list[Tensor], list[Tensor]]]:
    """In one command and step by step: the drafts, their slow states, and what is in the cache."""
    found = []
    for draft_round in (FusedDrafter.draft_round, StepwiseDrafter.draft_round):
        ids = [*PROMPT, *range(9, 9 + length)]
        cache = drafter.stepper.decoder.new_cache(len(ids))
        drafter.stepper.prefill(ids[:-1], cache)
        sequence = TokenSequence(ids, cache, Sampler(params), len(PROMPT))
        states = torch.linspace(-1, 1, 2 * drafter.stepper.decoder.config.hidden_size).view(2, -1)
        drafted = draft_round(drafter, sequence, states, 1, plan)
        end = len(ids) - 1 + len(drafted.confidences)
        slow = [state.clone() for state in drafted.slow]
        found.append((drafted, slow, [each.clone() for each in tiny.cached(cache, end)]))
    return found


def compare(found: list[tuple[Drafted, list[Tensor], list[Tensor]]]) -> Drafted:
    (ours, our_states, our_cache), (theirs, their_states, their_cache) = found
    assert ours.tokens == theirs.tokens and ours.all_tokens == theirs.all_tokens
    assert ours.confidences == theirs.confidences and ours.offers == theirs.offers
    for one, other in zip([*our_states, *our_cache], [*their_states, *their_cache], strict=True):
        assert torch.equal(one, other)
    return ours


@pytest.mark.parametrize("weight_format", ["int4", "bf16"])
@pytest.mark.parametrize("params", SAMPLINGS, ids=str)
def test_the_plan_goes_as_far_as_step_by_step(
    drafters: dict[str, FusedDrafter], weight_format: str, params: SamplingParams
) -> None:
    """Also from a cache that has to grow for it."""
    chance, steps, dropped, offers = random.Random(1), set(), 0, 0
    for case in range(60):
        plan = weighed(chance, chance.choice([1, 2, 7, MOST_DRAFTS]))
        drafted = compare(rounds(drafters[weight_format], plan, params, case))
        steps.add(len(drafted.confidences))
        dropped += len(drafted.tokens) < len(drafted.confidences)
        offers += sum(map(len, drafted.offers))
    assert 1 in steps and len(steps) > 2 and 0 < dropped < 60 and offers


@pytest.mark.parametrize("weight_format", ["int4", "bf16"])
@pytest.mark.parametrize("drafts", [1, 4, MOST_DRAFTS])
@pytest.mark.parametrize("least", [0.0, 1.0])
def test_as_many_as_are_asked_for(
    drafters: dict[str, FusedDrafter], weight_format: str, drafts: int, least: float
) -> None:
    drafted = compare(rounds(drafters[weight_format], forced(drafts, least), SAMPLINGS[1], 3))
    assert len(drafted.tokens) == len(drafted.confidences) == drafts
    assert any(drafted.offers) == (least == 0)
    assert len(drafted.slow) == (drafts if weight_format == "int4" else 0)


def test_where_no_draft_can_be_told_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly all of very many tokens are as likely."""
    monkeypatch.setattr(draft_head, "MOST_ROWS", 8192)
    decoder = load_decoder(tiny.save_model(tmp_path, num_hidden_layers=4, vocab_size=9024), "int4")
    made = accelerator(decoder)
    made.draft_vocab = torch.arange(8192)
    drafter = cast(FusedDrafter, make_drafter(make_stepper(decoder), made))
    (drafted, _, _), (stepwise, _, _) = rounds(drafter, forced(3, 0.0), SamplingParams(5.0, seed=1), 3)
    assert drafted.tokens == [] and drafted.confidences == [0.0] and drafted.offers == [()]
    assert len(stepwise.tokens) == 3
