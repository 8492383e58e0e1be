"""A round in one command gives what drafting, verifying and accepting one after the other give."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from engine.decoding.base import TokenSequence
from engine.decoding.context import ContextDrafter
from engine.decoding.context_index import Match
from engine.decoding.controller import DepthController
from engine.decoding.m2r2 import M2R2Decoding
from engine.decoding.sampling import Sampler
from engine.kernels import round_fields
from engine.kernels.drafter import FusedDrafter
from engine.models.loader import load_decoder
from engine.models.stepper import make_stepper
from engine.requests import SamplingParams
from engine.residuals.drafter import StepwiseDrafter, Verified, make_drafter
from tests import tiny
from tests.test_m2r2 import PROMPT, accelerator, run

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLINGS = (
    SamplingParams(),
    SamplingParams(temperature=0.8, seed=4),
    SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.3, seed=6),
    SamplingParams(temperature=0.7, top_k=20, min_p=0.01, seed=6),
    SamplingParams(repetition_penalty=1.2),
    SamplingParams(temperature=0.8, min_p=1e-9, seed=5),  # native code cannot tell the token
)


@pytest.fixture(scope="module")
def drafters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FusedDrafter]:
    """They draft a few tokens alone, of those that the model often writes: so they are right at times, and have often occurred
    before."""
    folder, made = tiny.save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=4), {}
    for name in ("int4", "bf16"):  # with slow states, and on copies of layers
        decoder = load_decoder(folder, name)
        stepper, trained = make_stepper(decoder), accelerator(decoder)
        written = [token for n in range(8) for token in run(stepper, None, 60, [n + 5, 9])[0]]
        often = Counter([*written, *range(decoder.config.vocab_size)]).most_common(8)
        trained.draft_vocab = torch.tensor([token for token, _ in often])
        made[name] = cast(FusedDrafter, make_drafter(stepper, trained))
    return made


def knowing(chance: random.Random, row: float) -> DepthController:
    """A controller that has seen drafts, other tokens and times: a row takes that share of a step."""
    controller = DepthController(chance.choice([2, 7]))
    plan, costs = controller._plan, controller.costs
    for _ in range(60):
        confidence = chance.random()
        plan.luck.learn(confidence, chance.random() < min(1.0, 3 * confidence))
        plan.others.learn(confidence / 2, chance.random() < 0.3)
    for _ in range(5):
        costs.note_plain(1.0)
        for drafts in range(1, 12):
            costs.note_verification(drafts, 1 + row * drafts)
        costs.note_round(2, 0.1, 1, True, 1 + row / 2)
    controller._rounds = 100
    controller._next_refresh = 1000 if chance.random() < 0.8 else 0
    return controller


def rounds(drafter: FusedDrafter, params: SamplingParams, case: int) -> Iterator[tuple[Any, ...]]:
    """In one command, and one thing after the other."""
    for whole in (True, False):
        chance = random.Random(case)
        controller, context = knowing(chance, chance.choice([0.01, 0.1, 0.3])), ContextDrafter()
        for _ in range(40):
            context.observe(Match(chance.randrange(2, 6), (1,) * 4), 4, chance.randrange(5))
        ids = chance.choices(drafter._head.tokens.tolist(), k=chance.randrange(20, 200))
        cache = drafter.stepper.decoder.new_cache(len(ids))
        drafter.stepper.prefill(ids[:-1], cache)
        sequence = TokenSequence(ids, cache, Sampler(params), len(ids))
        method = M2R2Decoding(drafter, controller, context)
        method.start(sequence)
        method._plain_step(0.0)
        assert method._states is not None
        limit = chance.choice([3, 12, round_fields.MOST_ROWS - 1])
        states = method._states.clone()
        plan = controller.plan(limit, method._drift)
        if plan is None:
            return
        before = len(ids)
        if whole:
            found = drafter.whole_round(sequence, states, 0, plan, limit, method._round_context())
        else:
            found = method._verify(drafter.draft_round(sequence, states, 0, plan), plan, limit)
        assert found is not None
        end = before - 1 + 1 + found.num_in_chain + found.num_alternatives
        rows = [each.clone() for each in tiny.cached(cache, end)]
        yield replace(found, states=found.states.clone()), rows, ids[before:]


@pytest.mark.parametrize("params", SAMPLINGS, ids=str)
def test_it_is_the_same_round(drafters: dict[str, FusedDrafter], params: SamplingParams) -> None:
    seen: list[Verified] = []
    for case in range(240):
        drafter = drafters["int4" if case % 2 else "bf16"]
        pairs = zip(*[rounds(drafter, params, case)] * 2, strict=True)
        for (one, its_rows, ids), (other, rows, expected) in pairs:
            assert ids == expected and one.accepted == other.accepted
            assert (one.num_in_chain, one.num_alternatives) == (other.num_in_chain, other.num_alternatives)
            assert one.drafted.tokens == other.drafted.tokens and one.drafted.offers == other.drafted.offers
            assert one.match.length == other.match.length or one.num_in_chain == len(one.drafted.tokens)
            assert torch.equal(one.states, other.states)
            assert all(map(torch.equal, its_rows, rows))
            seen.append(one)
    assert any(each.num_alternatives for each in seen) and any(not each.num_alternatives for each in seen)
    assert any(each.num_in_chain > len(each.drafted.tokens) for each in seen)
    assert any(len(each.drafted.tokens) < len(each.drafted.confidences) for each in seen)
    if params.temperature < 1 and params.repetition_penalty == 1:
        assert any(each.accepted.num_in_chain for each in seen)


def test_one_native_code_cannot_tell_is_chosen_by_numpy(drafters: dict[str, FusedDrafter]) -> None:
    drafter = drafters["int4"]
    for case in range(40):
        list(rounds(drafter, SAMPLINGS[-1], case))
        if drafter._task.words[round_fields.NUM_NEW] == 0:
            return
    pytest.fail("native code could always tell")


@pytest.mark.parametrize("weight_format", ["int4", "bf16"])
@pytest.mark.parametrize("params", SAMPLINGS[:3], ids=str)
def test_round_follows_round(
    drafters: dict[str, FusedDrafter],
    weight_format: str,
    params: SamplingParams,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What one leaves behind is what the next begins with: the same rounds all through an answer."""
    found = []
    for whole in (None, True, False):  # behind the first the drafter knows the text's tokens
        if whole is False:
            monkeypatch.setattr(FusedDrafter, "whole_round", StepwiseDrafter.whole_round)
        drafter, controller = drafters[weight_format], knowing(random.Random(3), 0.001)
        monkeypatch.setattr(controller, "observe", lambda record: None)  # of times
        controller._next_refresh = 10_000
        cache = drafter.stepper.decoder.new_cache(len(PROMPT))
        drafter.stepper.prefill(PROMPT[:-1], cache)
        sequence = TokenSequence(list(PROMPT), cache, Sampler(params), len(PROMPT))
        method = M2R2Decoding(drafter, controller, None)
        method.start(sequence)
        steps = []
        while len(sequence.ids) < 300:
            step = method.step(300 - len(sequence.ids))
            steps.append((step.token_ids, step.provenance, step.num_draft_tokens))
        found.append(steps)
    assert found[1] == found[2]
    if params == SAMPLINGS[1]:  # drafts look at the same random numbers
        assert len({len(tokens) for tokens, *_ in found[1]}) > 1
