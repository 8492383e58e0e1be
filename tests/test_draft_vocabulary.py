"""Draft heads that take up the tokens of a text: which rows change, and that they draft what the whole head would."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch

from engine.decoding.base import TokenSequence
from engine.decoding.draft_plan import DraftPlan
from engine.decoding.sampling import Sampler
from engine.kernels import draft_head
from engine.kernels.draft_head import DraftHead
from engine.kernels.drafter import FusedDrafter
from engine.models.loader import load_decoder
from engine.models.stepper import make_stepper
from engine.requests import SamplingParams
from engine.residuals.agreement import agreement
from engine.residuals.corpus import generate_continuations
from engine.residuals.draft_vocabulary import DraftVocabulary
from engine.residuals.drafter import Drafter, make_drafter
from engine.residuals.vocabulary_sizes import measure
from tests import tiny
from tests.test_m2r2 import FUSED, PROMPT, accelerator, fixed, run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=4, vocab_size=336)


def test_tokens_of_the_text_take_the_last_rows_in_turn() -> None:
    vocabulary = DraftVocabulary(torch.arange(100, 110), 120)
    assert dict(vocabulary.join([100, 7, 109, 7])) == {8: 7}
    assert vocabulary.tokens.tolist() == [*range(100, 108), 7, 109]
    # 109 is there; the third new token takes the place of the first, which may come again
    assert dict(vocabulary.join([109, 8, 9])) == {8: 9, 9: 8}
    assert dict(vocabulary.join([9, 8, 107, 120])) == {}
    assert dict(vocabulary.join([7])) == {9: 7}
    assert vocabulary.tokens.tolist() == [*range(100, 108), 9, 7]


def test_of_a_text_with_too_many_rare_tokens_the_latest_are_kept() -> None:
    vocabulary = DraftVocabulary(torch.arange(10), 99)
    assert dict(vocabulary.join(range(50, 99))) == {8: 98, 9: 97}


def test_a_vocabulary_without_room_stays_as_it_is() -> None:
    vocabulary = DraftVocabulary(torch.arange(4), 99)
    assert not vocabulary.join([9])
    assert vocabulary.tokens.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("weight_format", FUSED)
def test_a_token_of_the_text_gets_the_row_that_it_would_have_had(
    folder: Path, weight_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the last of an int4 head that are no whole block."""
    stepper = make_stepper(load_decoder(folder, weight_format))
    head = stepper.decoder.weights.lm_head
    monkeypatch.setattr(draft_head, "MOST_ROWS", 64)
    small = DraftHead(head, torch.arange(200), True)
    small.take_up([250, 5, 319, 327, 320, 77])
    behind = set() if weight_format == "int4" else {320, 327}
    assert set(small.tokens.tolist()) - set(range(64)) == {250, 319, 77} | behind
    monkeypatch.setattr(draft_head, "MOST_ROWS", 384)
    whole = DraftHead(head, torch.arange(336), True)
    assert whole.tokens.tolist() == [*range(336), *[335] * 48]
    weights = whole.linear.dequantize()
    assert torch.equal(small.linear.dequantize(), weights[torch.from_numpy(small.tokens)])


@pytest.mark.parametrize("weight_format", FUSED)
def test_a_token_outside_the_vocabulary_is_drafted_once_the_text_has_it(
    folder: Path, weight_format: str
) -> None:
    decoder = load_decoder(folder, weight_format)
    made = accelerator(decoder)
    made.draft_vocab = torch.arange(64)
    drafter = cast(FusedDrafter, make_drafter(make_stepper(decoder), made))
    text, plan, drafted = list(range(200, 212)), DraftPlan(), set[int]()
    plan.force(1, 1.0)
    states = torch.randn(64, decoder.config.hidden_size, generator=torch.Generator().manual_seed(0))

    def draft() -> None:
        cache = decoder.new_cache(64)
        sequence = TokenSequence(list(PROMPT), cache, Sampler(SamplingParams()), len(PROMPT))
        for row in range(len(states)):
            drafted.update(drafter.draft_round(sequence, states, row, plan).tokens)

    draft()
    assert drafted and max(drafted) < 64
    drafter.take_up(text)
    draft()
    new = {token for token in drafted if token >= 64}
    assert new and new <= set(text)


@pytest.mark.parametrize("weight_format", FUSED)
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(0.9, seed=2)], ids=str)
def test_the_text_stays_the_models_own_whatever_the_head_has_taken_up(
    folder: Path, weight_format: str, params: SamplingParams
) -> None:
    stepper = make_stepper(load_decoder(folder, weight_format))
    made = accelerator(stepper.decoder)
    made.draft_vocab = torch.arange(64)
    drafter: Drafter = make_drafter(stepper, made)
    expected, _ = run(stepper, None, 60, params=params)
    drafter.take_up(list(range(300, 336)))  # of another text
    ids, rounds = run(stepper, fixed(drafter, 3), 60, params=params)
    assert ids == expected and any(drafted for drafted, _ in rounds)
    taken_up = set(cast(FusedDrafter, drafter)._head.tokens.tolist()) - set(range(64))
    assert taken_up & set(ids)


def test_what_sizes_are_worth_is_counted_on_the_models_own_text(folder: Path) -> None:
    decoder = load_decoder(folder, "fp32")
    made = accelerator(decoder)
    made.draft_vocab = torch.arange(336).flip(0)
    prompts = [[5, 70, 9], [33, 120, 7, 7, 61], [12] * 9]
    written = generate_continuations(decoder, prompts, [0.0] * 3, 40, [])
    rows = {(row["size"], row["with_text"]): row for row in measure(decoder, made, written, [336, 32])}
    assert rows[336, True]["covered"] == rows[336, False]["covered"] == 1
    whole = rows[336, True]["agreement_by_draft_position"]
    assert whole == rows[336, False]["agreement_by_draft_position"] and len(whole) == 3
    assert whole[0] == pytest.approx(agreement(decoder, made, written)[0], abs=1e-3)
    assert rows[32, False]["covered"] < rows[32, True]["covered"] < 1
