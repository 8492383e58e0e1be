"""Drafts on int4 copies of the first layers: close to what those layers would draft, and nothing of it outlives the
round."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from engine.decoding.base import TokenSequence
from engine.decoding.calibration import Drift
from engine.decoding.controller import DepthController, RoundRecord
from engine.decoding.draft_plan import DraftPlan
from engine.decoding.m2r2 import M2R2
from engine.kernels.draft_layers import fits_int4
from engine.kernels.stepper import FusedStepper
from engine.models.decoder import Decoder
from engine.models.feed_forward import FeedForward
from engine.models.kv_cache import KVCache
from engine.models.loader import load_decoder
from engine.models.stepper import TorchStepper, make_stepper
from engine.quantization.base import Linear
from engine.quantization.dense import DenseLinear
from engine.quantization.int4 import quantize_groups
from engine.residuals.drafter import make_drafter
from tests import tiny
from tests.test_m2r2 import PROMPT, Scripted, accelerator, fixed, run

FORMATS = ("int8", "bf16", "fp32")
DEPTH = 2


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def steppers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FusedStepper]:
    folder = tiny.save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=4)
    made = {name: make_stepper(load_decoder(folder, name)) for name in (*FORMATS, "int4")}
    return {name: cast(FusedStepper, stepper) for name, stepper in made.items()}


def slots(cache: KVCache, first: int, last: int) -> list[Tensor]:
    """Keys and values of each layer."""
    parts = tiny.cached(cache, last, first)
    return [torch.cat(pair) for pair in zip(parts[::2], parts[1::2], strict=True)]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> list[bool]:
    return [torch.equal(one, other) for one, other in zip(ours, theirs, strict=True)]


class Moody(DepthController):
    """Drafts up to 4, and drops the last draft of every other round."""

    def __init__(self) -> None:
        super().__init__(fixed=4)
        self._chance = random.Random(1)
        self.records: list[RoundRecord] = []
        self.num_plain = 0

    def plan(self, limit: int, drift: Drift | None = None) -> DraftPlan | None:
        plan = super().plan(limit, drift)
        if plan is not None:
            plan.keep = lambda confidences: self._chance.random() < 0.75
        return plan

    def observe(self, record: RoundRecord) -> None:
        self.records.append(record)
        super().observe(record)

    def observe_plain(self, seconds: float) -> None:
        self.num_plain += 1
        super().observe_plain(seconds)


@pytest.mark.parametrize("weight_format", [*FORMATS, "int4"])
@pytest.mark.parametrize("luck", [0.0, 0.7, 1.0])
def test_after_each_round_the_cache_has_the_bits_of_a_fresh_prefill(
    steppers: dict[str, FusedStepper], weight_format: str, luck: float
) -> None:
    """With drafts that are kept and dropped, right and wrong, on a cache that grows."""
    stepper, count, chance = steppers[weight_format], 90, random.Random(3)
    expected, _ = run(stepper, None, count, [9])
    text = [9, *expected]

    def choose(place: int) -> int:
        return text[place] if place < len(text) and chance.random() < luck else chance.randrange(200)

    def check(sequence: TokenSequence) -> None:
        fresh = stepper.decoder.new_cache(len(sequence.ids))
        stepper.prefill(sequence.ids[:-1], fresh)
        assert all(equal(slots(sequence.cache, 0, fresh.length), slots(fresh, 0, fresh.length)))

    drafter, controller = (
        Scripted(make_drafter(stepper, accelerator(stepper.decoder, DEPTH)), choose),
        Moody(),
    )
    ids, rounds = run(stepper, M2R2(lambda: drafter, controller), count, [9], each=check)
    assert ids == expected
    assert any(drafted for drafted, _ in rounds) and (luck == 0 or any(accepted for _, accepted in rounds))
    # Only the first round, which has nothing to start from, and the last, which has no room, do not draft.
    assert controller.num_plain <= 1
    assert {record.num_steps - record.num_drafts for record in controller.records} == {0, 1}


@pytest.mark.parametrize("weight_format", FORMATS)
def test_verification_writes_over_what_a_draft_has_written(
    steppers: dict[str, FusedStepper], weight_format: str
) -> None:
    stepper, start = steppers[weight_format], len(PROMPT) - 1
    drafter = make_drafter(stepper, accelerator(stepper.decoder, DEPTH))
    cache, fresh = (stepper.decoder.new_cache(16) for _ in range(2))
    stepper.prefill(PROMPT[:-1], cache)
    state, ids = torch.ones(stepper.decoder.config.hidden_size), [PROMPT[-1]]
    for place in range(3):
        draft = drafter.draft(ids[-1], state, cache, start + place)
        assert draft.slow_state is None
        ids.append(draft.token)
        state = draft.exit_state
    stepper.prefill([*PROMPT[:-1], *ids], fresh)
    drafted, wanted = slots(cache, start, start + 3), slots(fresh, start, start + 3)
    assert not any(equal(drafted, wanted))
    for ours, theirs in zip(drafted[:DEPTH], wanted, strict=False):
        assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.95
    stepper.forward(ids, cache)
    assert all(equal(slots(cache, 0, start + 4), slots(fresh, 0, start + 4)))


def rounded(decoder: Decoder) -> Decoder:
    """With what int4 makes of the weights of the layers that draft."""

    def dense(linear: Linear) -> Linear:
        return DenseLinear(quantize_groups(linear.dequantize()).dequantize(), linear.bias)

    layers = [
        replace(
            layer,
            qkv=dense(layer.qkv),
            o=dense(layer.o),
            ffn=FeedForward(dense(layer.dense.gate_up), dense(layer.dense.down)),
        )
        for layer in decoder.layers[:DEPTH]
    ]
    weights = replace(decoder.weights, layers=(*layers, *decoder.layers[DEPTH:]))
    return Decoder(decoder.config, weights, decoder.dtype, decoder.device)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_draft_is_that_of_layers_rounded_to_int4(tmp_path: Path, family: str) -> None:
    """Biases, norms of queries and keys and windows are the model's own."""
    decoder = load_decoder(tiny.save_model(tmp_path / family, family), "fp32")
    drafts, written = [], []
    for stepper in (make_stepper(decoder), TorchStepper(rounded(decoder)), TorchStepper(decoder)):
        cache = decoder.new_cache(32)
        decoder.prefill(PROMPT[:-1], cache)
        drafter = make_drafter(stepper, accelerator(decoder, DEPTH))
        state = torch.linspace(-1, 1, decoder.config.hidden_size)
        drafts.append(drafter.draft(PROMPT[-1], state, cache, len(PROMPT) - 1))
        written.append(torch.cat(slots(cache, len(PROMPT) - 1, len(PROMPT))[:DEPTH]).flatten())
    (ours, reference, wide), (our_slots, its_slots, wide_slots) = drafts, written
    # Inputs are rounded to 8 bits, which is little beside the rounding of the weights.
    assert (our_slots - its_slots).norm() < 0.02 * its_slots.norm()
    assert (our_slots - its_slots).norm() < 0.3 * (our_slots - wide_slots).norm()
    agreement = torch.cosine_similarity(ours.exit_state, reference.exit_state, dim=0)
    assert agreement > 0.999
    assert agreement > torch.cosine_similarity(ours.exit_state, wide.exit_state, dim=0)
    assert abs(ours.confidence - reference.confidence) < 0.2


def test_what_int4_cannot_hold_is_not_copied(tmp_path: Path, steppers: dict[str, FusedStepper]) -> None:
    """Nor are int4 layers, which are narrow already, and layers with experts."""
    odd = load_decoder(tiny.save_model(tmp_path / "odd", intermediate_size=144), "fp32")
    sparse = load_decoder(tiny.save_model(tmp_path / "sparse", "qwen2_moe"), "fp32")
    assert not fits_int4(odd.config) and not fits_int4(sparse.config)
    for stepper in (make_stepper(odd), make_stepper(sparse), steppers["int4"]):
        cache = stepper.decoder.new_cache(16)
        state = torch.ones(stepper.decoder.config.hidden_size)
        drafter = make_drafter(stepper, accelerator(stepper.decoder, DEPTH))
        draft = drafter.draft(9, state, cache, 0)
        own = stepper.run_layers(stepper.embed([9]), stepper.decoder.new_cache(16), 0, 0, DEPTH)
        assert draft.slow_state is not None and torch.equal(draft.slow_state, own)
    expected, _ = run(make_stepper(odd), None, 40)
    drafter = make_drafter(make_stepper(odd), accelerator(odd))
    assert run(drafter.stepper, fixed(drafter, 3), 40)[0] == expected
