"""Choosing by native code: the same tokens as by numpy, the same order of drafts, and nothing changed that is the caller's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.decoding import native_choice, sampling
from engine.decoding.ranking import Candidates
from engine.decoding.sampling import Sampler
from engine.errors import SlipstreamError
from engine.requests import SamplingParams

any_settings = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.5]),
    top_k=st.sampled_from([0, 0, 1, 5, 40]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01, 0.9999]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 1e-9]),
    repetition_penalty=st.sampled_from([1.0, 1.05, 1.3, 0.8]),
    seed=st.integers(0, 2**63 - 1),
)
drafts_settings = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.5]),
    repetition_penalty=st.sampled_from([1.0, 1.05, 1.3]),
    seed=st.integers(0, 2**63 - 1),
)


def by_numpy(params: SamplingParams) -> Sampler:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "native_choice", lambda *_: None)
        return Sampler(params)


@settings(max_examples=400, deadline=None)
@given(
    params=any_settings,
    rng=st.integers(0, 10_000).map(np.random.default_rng),
    size=st.sampled_from([1, 5, 16, 40, 700, 20_003]),
    spread=st.sampled_from([0.5, 3.0, 8.0]),
    num_seen=st.sampled_from([0, 1, 300]),
)
def test_the_choice_is_numpys(params, rng, size, spread, num_seen):
    logits = torch.from_numpy((rng.standard_normal(size) * spread).astype(np.float32))
    history, before = rng.integers(0, size, num_seen).tolist(), logits.clone()
    assert Sampler(params).choose(logits, history) == by_numpy(params).choose(logits, history)
    assert torch.equal(logits, before)


@settings(max_examples=300, deadline=None)
@given(
    params=drafts_settings,
    rng=st.integers(0, 10_000).map(np.random.default_rng),
    size=st.sampled_from([4, 16, 500, 8192]),
    spread=st.sampled_from([1.0, 4.0]),
    least=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
)
def test_the_order_of_drafts_is_numpys(params, rng, size, spread, least):
    tokens = np.sort(rng.choice(40_000, size, replace=False))
    logits = (rng.standard_normal(size) * spread).astype(np.float32)
    history, drafted = rng.choice(tokens, min(size, 200)).tolist(), rng.choice(tokens, 2).tolist()

    def ranked(sampler: Sampler) -> tuple[tuple[int, float], ...]:
        weights = np.exp(logits - logits.max())
        found = Candidates(tokens, weights, float(weights.sum()), float(logits.max()))
        return sampler.ranking(history, drafted)(found, least)

    got, expected = ranked(Sampler(params)), ranked(by_numpy(params))
    assert got[0][0] == expected[0][0]
    # What unlikely drafts lose by a penalty is left out of the total, so one at the very edge may come or go.
    for (token, chance), (other, right) in zip(got, expected, strict=False):
        assert token == other and chance == pytest.approx(right, rel=0.1)
    for _, chance in (*got[len(expected) :], *expected[len(got) :]):
        assert chance < 1.1 * least + 1e-6


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(0.7, seed=1),
        SamplingParams(0.7, top_p=0.95, repetition_penalty=1.05, seed=1),
        SamplingParams(1.0, top_k=40, top_p=0.9, min_p=0.05, seed=1),
    ],
)
def test_numpy_is_asked_for_what_is_rare_alone(params: SamplingParams, monkeypatch: pytest.MonkeyPatch):
    """On logits as peaked as a model's."""
    sampler, asked = Sampler(params), []
    monkeypatch.setattr(sampler, "_scores", lambda *_: asked.append(1) or by_numpy(params)._scores(*_))
    rng = np.random.default_rng(0)
    for position in range(200):
        logits = torch.from_numpy((rng.standard_normal(5000) * 2).astype(np.float32))
        logits[position] += 12
        sampler.choose(logits, range(position))
    assert len(asked) < 20


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(0.7, top_p=0.9, seed=0)])
@pytest.mark.parametrize("place", [0, 7, 20, 39])
def test_a_single_value_that_is_no_number_is_a_sentence(params: SamplingParams, place: int):
    logits = torch.randn(40)
    logits[place] = float("nan")
    with pytest.raises(SlipstreamError, match="not numbers"):
        Sampler(params).choose(logits, [])


def test_other_kinds_of_logits_are_numpys():
    native = native_choice.native_choice(SamplingParams(), 1)
    assert native is not None and native.takes(torch.zeros(4))
    assert not native.takes(torch.zeros(4, dtype=torch.float64)) and not native.takes(torch.zeros(8)[::2])
    assert Sampler(SamplingParams()).choose(torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64), []) == 1


def test_tokens_beyond_the_logits_are_left_alone():
    logits = torch.tensor([1.0, 3.0, 2.9])
    assert Sampler(SamplingParams(repetition_penalty=2.0)).choose(logits, [1, 7, 2_000_000_000]) == 2
