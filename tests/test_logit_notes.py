"""What a pass notes of its logits is what they hold, and whoever chooses by it chooses the same token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.decoding.logit_notes import LogitNotes, notes_of
from engine.decoding.sampling import Sampler
from engine.kernels import make_fused_stepper
from engine.kernels.control import BLOCK
from engine.requests import SamplingParams
from tests.test_kernels import PLAIN, make_decoder

pytestmark = pytest.mark.usefixtures("one_thread")
TEMPERATURE = 0.7
SETTINGS = (
    SamplingParams(),
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(TEMPERATURE, seed=1),
    SamplingParams(TEMPERATURE, top_p=0.95, repetition_penalty=1.05, seed=2),
    SamplingParams(TEMPERATURE, top_p=0.5, repetition_penalty=2.0, seed=3),
    SamplingParams(TEMPERATURE, top_k=5, top_p=0.8, seed=4),
    SamplingParams(1.3, top_p=0.9, repetition_penalty=1.1, seed=5),  # not weighed at that temperature
    SamplingParams(TEMPERATURE, min_p=0.1, repetition_penalty=0.9, seed=6),
)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("weight_format", "vocabulary"), [("int4", 544), ("int8", 544), ("bf16", 300)])
def test_the_notes_of_a_pass(weight_format: str, vocabulary: int, threads: int) -> None:
    decoder = make_decoder(weight_format, **PLAIN, vocab_size=vocabulary)
    stepper, cache = make_fused_stepper(decoder, threads), decoder.new_cache(32)
    for rows in (1, 3, 5):
        _, logits = stepper.forward(list(range(rows)), cache, weigh_at=TEMPERATURE)
        notes = notes_of(logits)
        assert notes is not None and notes.temperature == TEMPERATURE
        for row in range(rows):
            maxima, weights = _read(notes, row, vocabulary)
            blocks = logits[row].split(BLOCK)
            assert maxima[: len(blocks)].tolist() == [float(block.max()) for block in blocks]
            sums = [float(((block - block.max()) / TEMPERATURE).exp().sum()) for block in blocks]
            np.testing.assert_allclose(weights[: len(blocks)], sums, rtol=1e-5)
            assert np.isneginf(maxima[len(blocks) :]).all() and not weights[len(blocks) :].any()
    stepper.close()


@pytest.mark.parametrize("params", SETTINGS)
def test_who_chooses_by_notes_chooses_the_same(params: SamplingParams) -> None:
    decoder = make_decoder("int4", **PLAIN, vocab_size=544)
    stepper, cache = make_fused_stepper(decoder, 1), decoder.new_cache(64)
    noted, alone = Sampler(params), Sampler(params)
    ids = [3, 5, 8]
    for position in range(40):
        _, logits = stepper.forward([ids[-1], position], cache, weigh_at=TEMPERATURE)
        logits *= 4  # a tiny model's are nearly alike
        notes = notes_of(logits)
        assert notes is not None
        _write(notes, logits)
        for row in range(2):
            token = alone.choose(logits.clone(), ids, row)
            assert noted.choose(logits, ids, row) == token
        ids.append(token)
    stepper.close()


def test_only_what_a_pass_wrote_has_notes() -> None:
    assert notes_of(torch.zeros(4)) is None
    decoder = make_decoder("int4", **PLAIN)
    stepper, cache = make_fused_stepper(decoder, 1), decoder.new_cache(32)
    _, logits = stepper.forward([1, 2], cache)
    assert notes_of(logits) is not None
    assert notes_of(logits[0]) is None and notes_of(logits.clone()) is None
    stepper.close()


def _read(notes: LogitNotes, row: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks' maxima and weights of a row."""
    found = notes._memory[row]
    assert notes.step == found.nbytes and found.shape[1] * BLOCK >= vocabulary
    return found[0], found[1]


def _write(notes: LogitNotes, logits: torch.Tensor) -> None:
    """As whoever changes logits has to."""
    for row, values in enumerate(logits):
        for block, part in enumerate(values.split(BLOCK)):
            notes._memory[row, :, block] = (
                float(part.max()),
                float(((part - part.max()) / TEMPERATURE).exp().sum()),
            )
